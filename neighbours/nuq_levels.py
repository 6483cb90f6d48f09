"""The numbers of KVQuant (neighbours/nuq.py): ranges, levels and codes, and a model's own ones.

K and V [B, Hk, n, D] are B rows, Hk KV heads, n tokens, D channels."""
import torch

from checkpoint.rope import rotate

BITS = 2, 3  # a code has
APART = 0.01  # share of the numbers of K that the ranges of its channels leave out


def outliers(channels):
    """How many of the `channels` of a token, over all KV heads, are stored by themselves."""
    return 2 * max(1, round(channels / 200))


def rotation(t, freq):
    """cos, sin [B, 1, n, D / 2] of tokens t [B, n]. A factor that the model has for both stays in
    its keys."""
    angle = t[:, None, :, None].float() * freq
    return angle.cos(), angle.sin()


def tokenwise(x):
    """[B, Hk, n, D] -> [B, 1, n, Hk D]"""
    return x.transpose(1, 2).flatten(2)[:, None]


def value_range(v):
    """zero, scale [B, 1, n, 1] of each token of v, over all heads but for as many of the largest
    numbers as of the smallest, which are outliers."""
    v = tokenwise(v)
    n = outliers(v.shape[-1]) // 2
    top, bottom = (v.topk(n + 1, largest=largest).values[..., n:] for largest in (True, False))
    scale = ((top - bottom) / 2).clamp_min(torch.finfo(torch.float16).tiny)  # of equal numbers
    return (top + bottom) / 2, scale


def largest(x, n):
    """Where the n largest of x [.., X], none below 0, are: [.., n]. Of equal ones the first; NaN
    is larger than all.

    One after the other: the library's choice among equal ones depends on the shape, and Inductor's
    own sort does not compile at every shape.
    """
    place, found = torch.arange(x.shape[-1], device=x.device), []
    for _ in range(n):
        is_best = (x == x.amax(-1, keepdim=True)) | x.isnan()
        found.append(torch.where(is_best, place, len(place) - 1).amin(-1, keepdim=True))
        x = x.masked_fill(place == found[-1], -1)
    return torch.cat(found, -1)


def nearest(x, levels):
    """The number of the level that is nearest to x: uint8 like x."""
    edges = (levels[1:] + levels[:-1]) / 2
    return (x[..., None] > edges).sum(-1, dtype=torch.uint8)


def pack(codes, bits):
    """Codes [.., D] -> bytes [.., bits D / 8]: the lowest bit of all channels, then the next."""
    planes = torch.stack([codes >> b & 1 for b in range(bits)], -2).unflatten(-1, (-1, 8))
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (planes << place).sum(-1, dtype=torch.uint8).flatten(-2)


def unpack(packed, bits):
    """The inverse of `pack`."""
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = (packed.unflatten(-1, (bits, -1, 1)) >> place & 1).unbind(-3)
    return sum(plane << b for b, plane in enumerate(planes)).flatten(-2)


def calibrate(model, tokens):
    """ranges of K, levels of K and V (KVQuant): for --kv nuq2:FILE and nuq3:FILE"""
    model.setup_caches(*tokens.shape, "bf16")
    model.prefill(tokens)
    cos, sin = rotation(model.cache.index[None, : tokens.shape[1]], model.freq)
    layers = []
    for layer in model.layers:
        k, v = (x.float() for x in layer.cache.dequantized())
        # The first token stays exact, and is unlike all others.
        layers.append(calibrated(rotate(k, cos, -sin)[:, :, 1:], v[:, :, 1:]))
    return {name: torch.stack([layer[name] for layer in layers]).cpu() for name in layers[0]}


def calibrated(k, v):
    """`calibrate` of one layer, from its keys before RoPE and its values.

    returns k_zero, k_scale [Hk, 1, D]; for 2 and 3 bits k_levels2 [4], k_levels3 [8], v_levels2,
            v_levels3; float32
    """
    numbers = k.transpose(0, 1).flatten(1, 2)  # [Hk, tokens, D]
    last = numbers.shape[1] - 1
    low, high = (numbers.kthvalue(1 + round(last * share), 1, keepdim=True).values
                 for share in (APART / 2, 1 - APART / 2))
    k_zero, k_scale = (high + low) / 2, ((high - low) / 2).clamp_min(1e-6)
    v_zero, v_scale = value_range(v)
    steps = {"k": (k - k_zero) / k_scale, "v": (v - v_zero) / v_scale}
    levels = {f"{name}_levels{bits}": fitted_levels(x, 2**bits)
              for name, x in steps.items() for bits in BITS}
    return {"k_zero": k_zero, "k_scale": k_scale} | levels


def fitted_levels(x, n, bins=2048):
    """n levels, those nearest to the numbers of x within -1 .. 1: k-means on their histogram."""
    count = torch.histc(x, bins, -1, 1).double()
    middle = ((torch.arange(bins, device=x.device) + 0.5) * 2 / bins - 1).double()
    share = (torch.arange(n, device=x.device).double() + 0.5) / n
    levels = middle[torch.searchsorted(count.cumsum(0) / count.sum(), share)]
    for _ in range(100):
        cell = nearest(middle, levels).long()
        total, weight = (torch.zeros_like(levels).index_add_(0, cell, y)
                         for y in (count * middle, count))
        levels = torch.where(weight > 0, total / weight, levels)
    return levels.float()
