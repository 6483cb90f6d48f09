"""PrefixKV's slots and the gate of evict.py and ZipVL's shares of tiers.py, fitted to a model by
forward passes over a text; and the configs of caches from such a file."""
from math import ceil

import torch

from neighbours import fitted
from neighbours.evict import EvictConfig, features
from neighbours.tiers import TierConfig

GATE_SINKS = 4  # a gate sees nothing of what makes a first token loud
NEWEST = 16  # tokens at the end of a text that a gate is not fitted to: few queries have seen them
UNIT = 64  # slots: each number of them is a compilation of its own


def observed(model, tokens):
    """The caches of all layers after tokens [rows, n]: no token is dropped."""
    model.setup_caches(*tokens.shape, f"h2o:slots={tokens.shape[1]}")
    model.prefill(tokens)
    return [layer.cache for layer in model.layers]


def counts(model, tokens, mean, least):
    """How many of tokens [rows, n] each layer keeps: [layers], `mean` on average. All layers keep
    the same share of the attention that tokens get, but at least `least` tokens."""
    curves = []  # [layers, rows, n]: attention that the best tokens get
    for cache in observed(model, tokens):
        by_token = cache.score.gather(2, cache.born.argsort(2))  # each head has an order of its own
        best = by_token.mean(1).sort(descending=True).values
        curves.append((best / best.sum(1, keepdim=True)).cumsum(1))
    curves = torch.stack(curves)
    curves[..., : least - 1] = 0  # these are kept at any share
    # As published, the share is found for every text. What bisection would find stands in a list of
    # all: each smaller share is one token more.
    shares = curves.transpose(0, 1).flatten(1).sort(1).values[:, (mean - 1) * len(curves)]
    return ((curves < shares[:, None]).sum(2) + 1.0).mean(1)


def fit_slots(model, tokens, slots):
    """how many slots each layer gets (PrefixKV)"""
    n = tokens.shape[1]
    if not UNIT <= slots <= n:
        raise ValueError(f"--slots must be {UNIT}, which each layer gets at least, to {n}, the "
                         f"--tokens, got {slots}")
    return {"slots": (counts(model, tokens, slots, UNIT) / UNIT).round() * UNIT}


def fit_shares(model, tokens, share):
    """what share of its tokens each layer keeps in 4 bits (ZipVL)"""
    n, groups = tokens.shape[1], TierConfig.residual // TierConfig.group_size
    if not 1 / groups <= share <= 1 - 1 / groups:
        raise ValueError(f"--share must lie in {1 / groups} .. {1 - 1 / groups}, as both tiers get "
                         f"{TierConfig.group_size} of {TierConfig.residual} tokens, got {share}")
    kept = counts(model, tokens, ceil(share * n), ceil(n / groups))
    return {"shares": (kept / n * groups).round().clamp(max=groups - 1) / groups}


def fit_gate(model, tokens, share):
    """a linear estimate of the attention that tokens get (Attention-Gate, untrained)"""
    EvictConfig(share=share).check(model.config.head_dim)
    n, weights = tokens.shape[1], []
    for cache in observed(model, tokens):
        used = ((cache.born > GATE_SINKS) & (cache.born <= n - NEWEST))[..., None]
        mean = (cache.score / (n + 1 - cache.born)).clamp(min=1e-7).log()[..., None]
        # Ridge regression of all heads at once: rows of zeros change nothing.
        x, y = ((z * used).transpose(0, 1).flatten(1, 2).double()
                for z in (features(cache.k_window, cache.v_window), mean))
        square = x.mT @ x
        square += 1e-3 * square.diagonal(dim1=1, dim2=2).mean() * torch.eye(x.shape[2]).to(x)
        weights.append(torch.linalg.solve(square, x.mT @ y)[..., 0].float())
    return {"weight": torch.stack(weights), "share": torch.tensor(share)}


def prefixkv(argument, model):
    slots = fitted.read(argument, model, "prefixkv", {"slots": [model.config.n_layers]})["slots"]
    if slots.min() < 1:
        raise ValueError(f"{argument} leaves a layer without slots: fit another one")
    return [EvictConfig(sink=1, slots=n) for n in map(int, slots)]


def zipvl(argument, model):
    fit = fitted.read(argument, model, "zipvl", {"shares": [model.config.n_layers]})
    return [TierConfig(share=share) for share in fit["shares"].tolist()]


def gate(argument, model):
    c = model.config
    weight = [c.n_layers, c.n_kv_heads, c.head_dim + c.head_dim // 2 + 3]
    fit = fitted.read(argument, model, "gate", {"weight": weight, "share": []})
    return [EvictConfig(sink=GATE_SINKS, share=fit["share"].item(), gate=layer)
            for layer in fit["weight"]]
