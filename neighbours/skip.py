"""SkipDecode (arXiv 2307.02628): later tokens pass through fewer layers.

A step at position n of rows with room for N tokens runs through HIGH - (HIGH - LOW) * n / N layers,
all rows alike: the first, which warms up, and the last ones. What a token skips all later tokens
skip, until the caches are emptied for other prompts, so no K or V is ever missing. A prompt runs
through all layers, and so cannot come behind a text that was decoded.

As published: the first layer and the last ones, one number for a batch, which never rises. Not: the
model must be trained with this schedule, and no such weights are public. Without them the text is
ruined: that is what the measurement shows.

    --skip 8:6    eight layers at first, six at last
"""
from types import MethodType


def skip_layers(model, schedule):
    """Makes the decode steps of a model skip layers by "HIGH:LOW".

    raises ValueError: no such schedule for this model
    """
    high, _, low = schedule.partition(":")
    n = len(model.layers)
    if not (high.isdecimal() and low.isdecimal() and 2 <= int(low) <= int(high) <= n):
        raise ValueError(f"--skip is HIGH:LOW with 2 to {n} layers, such as {n}:{n - n // 4}, "
                         f"got {schedule!r}")
    high, low = int(high), int(low)
    active = high

    def path(model):
        nonlocal active
        done = model.cache.length / model.cache.max_len
        active = min(active, high - int((high - low) * done))  # a row that is parked is no longest
        return [model.layers[0], *model.layers[n - active + 1 :]]

    def prefill(model, *prompts):
        nonlocal active
        active = high
        return type(model).prefill(model, *prompts)

    model.path, model.prefill = MethodType(path, model), MethodType(prefill, model)
