"""Decode steps through fewer and fewer layers."""
import pytest
import torch
from calling import check_error, result_of, run

from generate import generate, load
from neighbours.skip import skip_layers

N, PROMPT, CAPACITY = 8, 20, 60


def test_every_step_runs_through_its_layers():
    """Against the same layers one after the other, with attention over all that they ever held.
    Guards against a layer too few, a layer that comes back, and keys of another token."""
    model, tokenizer = load()
    tokens = torch.tensor([tokenizer.encode("Once upon a time " * 20).ids[:CAPACITY]])
    full = model(tokens)
    skip_layers(model, "8:4")
    model.setup_caches(1, CAPACITY, "bf16")
    held = {}  # layer -> inputs that reached it: all of the prompt, then those of the steps

    x = model.embed(tokens[:, :PROMPT])
    rotation = model.rope(torch.arange(CAPACITY)[None])
    cut = lambda n: [r[:, :, :n] for r in rotation]  # noqa: E731
    for i, layer in enumerate(model.layers):
        held[i] = x
        x = layer(x, *cut(PROMPT))
    model.prefill(tokens[:, :PROMPT])
    numbers = []
    for n in range(PROMPT, CAPACITY):
        model.cache.advance()
        active = 8 - int(4 * (n + 1) / CAPACITY)
        numbers.append(active)
        logits = model.decode(tokens[:, n : n + 1], model.cache.tokens(model.cache.length))
        x = model.embed(tokens[:, n : n + 1])
        for i in [0, *range(N - active + 1, N)]:
            held[i] = torch.cat([held[i], x], 1)
            place = [*range(PROMPT), *range(PROMPT, n + 1)]
            assert held[i].shape[1] == len(place)  # what is skipped once is never needed again
            x = model.layers[i](held[i], *cut(n + 1))[:, -1:]
        want = model.head(model.norm(x))[:, 0]
        assert (logits - want).abs().max() < 1e-3
    assert numbers == sorted(numbers, reverse=True) and numbers[0] == 7 and numbers[-1] == 4
    assert (logits - full[:, -1]).abs().max() > 0.1


@pytest.mark.slow
def test_from_the_command_line():
    common = ("--temperature", 0, "--max-new-tokens", 30)
    whole, same = (result_of(*common, *more)["text"] for more in ((), ("--skip", "8:8")))
    assert whole == same != result_of(*common, "--skip", "8:4")["text"]


@pytest.mark.parametrize("schedule", ("9:8", "8:1", "4:8", "8", "8:x", ":", "8:-2"))
def test_a_schedule_that_cannot_be_is_refused(schedule):
    check_error(run("--skip", schedule), "--skip")


@pytest.mark.parametrize("other", (("--speculate", 2), ("--interactive",), ("--save-cache", "f")))
def test_it_does_not_go_with_drafts_or_texts_that_go_on(other):
    check_error(run("--skip", "8:6", *other), "--skip", other[0])


def test_layers_do_not_come_back(monkeypatch):
    """The longest row ends first. Guards against steps that read K and V which were skipped."""
    model, _ = load()
    skip_layers(model, "8:2")
    path, numbers = model.path, []
    model.path = lambda: (numbers.append(len(path())), path())[1]
    for _ in range(2):
        generate(model, [[5] * 40, [6] * 10], (4, 20), kv="bf16", stop=())
        assert numbers == sorted(numbers, reverse=True) and numbers[-1] < 4 and len(numbers) > 18
        numbers.clear()  # the next prompts begin with all layers again
