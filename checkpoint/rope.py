"""Rotary embeddings: what a config.json says of them, and the rotation of each channel pair."""
from math import ceil, floor, log, pi

import torch

NUMBERS = {  # what an entry may hold of them, all above 0
    "rope_theta", "factor", "max_position_embeddings", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim",
}


def rope_entry(raw):
    """The rotary embedding of a config.json in one spelling, with the defaults filled in.

    raw      the whole config.json
    returns  dict: rope_type, rope_theta, original_max_position_embeddings, and what the type needs
    raises   ValueError: a model that rotates only a part of each head
    """
    rope = raw.get("rope_scaling", raw.get("rope_parameters", {}))
    rope = {name: value for name, value in rope.items() if value is not None}
    context = raw.get("max_position_embeddings", 2048)
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    old_context = rope.get("original_max_position_embeddings", context)
    if kind == "dynamic":
        old_context = context
    if kind == "yarn" and "factor" not in rope:
        rope["factor"] = context / old_context
    part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
    if part != 1:
        raise ValueError(f"partial_rotary_factor {part} is not supported: "
                         "only models that rotate whole heads (1.0) are")
    return rope | {
        "rope_type": kind,
        "rope_theta": theta,
        "max_position_embeddings": context,
        "original_max_position_embeddings": old_context,
    }


def rope_frequencies(config):
    """How fast each channel pair turns, and the factor of cos and sin.

    config   has head_dim, rope_theta and rope_scaling, the dict of `rope_entry`
    returns  radians per token, float32 [D / 2]; a float
    raises   ValueError: an unknown type; KeyError: a type without an entry that it needs
    source   linear, llama3: Llama 3.1 reference code; yarn: arXiv 2309.00071;
             dynamic (its growth with the length is in `Transformer.rope`)
    """
    scaling = config.rope_scaling
    kind = scaling.get("rope_type", "default")
    # By name, here and below: the process may have another default device or dtype.
    even_channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / config.rope_theta ** (even_channels / config.head_dim)
    scale = 1.0
    if kind in ("default", "dynamic"):
        return freq, scale
    if kind == "linear":
        return freq / scaling["factor"], scale
    if kind == "llama3":
        kept = _kept_by_llama3(freq, scaling)
    elif kind == "yarn":
        kept = _kept_by_yarn(config)
        scale = _yarn_scale(scaling)
    else:
        raise ValueError(f"rope_scaling of type {kind} is not supported; "
                         "supported: default, linear, dynamic, llama3, yarn")
    # Slow pairs are stretched by `factor`, fast ones kept, those in between blended.
    return (1 - kept) * freq / scaling["factor"] + kept * freq, scale


def dynamic_frequencies(freq, scaling, lengths):
    """freq [D / 2] for rows of lengths [B] tokens: [B, 1, 1, D / 2].

    Beyond the trained context, slower with every token (as transformers does).
    """
    old, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    growth = factor * lengths.float().clamp(min=old) / old - (factor - 1)
    pairs = torch.arange(0, 2 * len(freq), 2, dtype=torch.float32, device=freq.device)
    return freq * growth[:, None, None, None] ** -(pairs / (2 * len(freq) - 2))


def _kept_by_llama3(freq, scaling):
    """How much of each frequency is kept, 0 .. 1 [D / 2]: by its turns in the old context."""
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(config):
    """The same for yarn: by the number of the pair, between two pairs of given turns."""
    scaling = config.rope_scaling
    D = config.head_dim

    def pair_with(turns):
        """The pair (not a whole number) that turns so often in the old context."""
        context = scaling["original_max_position_embeddings"]
        return D * log(context / (turns * 2 * pi)) / (2 * log(config.rope_theta))

    first = pair_with(scaling.get("beta_fast") or 32)
    last = pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first = floor(first)
        last = ceil(last)
    first = max(first, 0)
    last = min(last, D - 1)
    width = last - first or 0.001  # without, 0 / 0 where both are one pair
    pairs = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pairs - first) / width).clamp(0, 1)


def _yarn_scale(scaling):
    """The factor of cos and sin, which sharpens attention over the longer context."""
    factor = scaling["factor"]

    def growth(strength):
        return 0.1 * strength * log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("attention_factor"):
        return scaling["attention_factor"]
    strength = scaling.get("mscale")
    strength_all = scaling.get("mscale_all_dim")
    if strength and strength_all:
        return growth(strength) / growth(strength_all)
    return growth(1)


def rotate(x, cos, sin):
    """Rotary embedding as Hugging Face has it, halves instead of interleaved pairs.

    x [B, H, T, D]; cos, sin [B, 1, T, D / 2]
    """
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)
