"""PrefixKV's slots and the gate of evict.py, fitted to a model by forward passes over a text; and
the configs of caches from such a file."""
import torch

from neighbours import fitted
from neighbours.evict import EvictConfig, features

GATE_SINKS = 4  # a gate sees nothing of what makes a first token loud

NEWEST = 16  # tokens at the end of a text that a gate is not fitted to: few queries have seen them
UNIT = 64  # slots: each number of them is a compilation of its own


def observed(model, tokens):
    """The caches of all layers after tokens [rows, n]: no token is dropped."""
    model.setup_caches(*tokens.shape, f"h2o:slots={tokens.shape[1]}")
    model.prefill(tokens)
    return [layer.cache for layer in model.layers]


def fit_slots(model, tokens, slots):
    """how many slots each layer gets (PrefixKV)"""
    if not 1 <= slots <= tokens.shape[1]:
        raise ValueError(f"--slots must lie in 1 .. {tokens.shape[1]}, the --tokens, got {slots}")
    # As published: the same share of each layer's attention, which goes to its most attended
    # tokens, is found by bisection for every text.
    curves = []  # of each layer: the share [rows, n] that the best tokens get together
    for cache in observed(model, tokens):
        best = cache.score.mean(1).sort(descending=True).values
        curves.append((best / best.sum(1, keepdim=True)).cumsum(1))
    curves = torch.stack(curves)
    low, high = (torch.full_like(curves[0, :, :1], end) for end in (0.0, 1.0))
    for _ in range(40):
        middle = (low + high) / 2
        counts = (curves < middle).sum(2) + 1  # [layers, rows]
        many = counts.sum(0)[:, None] > slots * len(curves)
        low, high = torch.where(many, low, middle), torch.where(many, middle, high)
    counts = ((curves < low).sum(2) + 1).float().mean(1)
    return {"slots": (counts / UNIT).round().clamp(min=1).long() * UNIT}


def fit_gate(model, tokens, share):
    """a linear estimate of the attention that tokens get (Attention-Gate, untrained)"""
    EvictConfig(share=share).check(model.config.head_dim)
    n, weights = tokens.shape[1], []
    if n <= GATE_SINKS + NEWEST:
        raise ValueError(f"--tokens must be more than {GATE_SINKS + NEWEST}, got {n}")
    for cache in observed(model, tokens):
        born, weight = cache.born.transpose(0, 1), []
        used = (born > GATE_SINKS) & (born <= n - NEWEST)
        mean = (cache.score.transpose(0, 1) / (n + 1 - born)).clamp(min=1e-7).log()
        x = features(cache.k_window, cache.v_window).transpose(0, 1)
        for head in range(len(x)):
            a, y = x[head][used[head]].double(), mean[head][used[head]].double()
            square = a.mT @ a
            ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), device=a.device)
            weight.append(torch.linalg.solve(square + ridge, a.mT @ y).float())
        weights.append(torch.stack(weight))
    return {"weight": torch.stack(weights), "share": torch.tensor(share)}


def prefixkv(argument, model):
    fit = fitted.read(argument, "prefixkv", {"slots": [model.config.n_layers]})
    return [EvictConfig(sink=1, slots=n) for n in map(int, fit["slots"])]


def gate(argument, model):
    c = model.config
    weight = [c.n_layers, c.n_kv_heads, c.head_dim + c.head_dim // 2 + 3]
    fit = fitted.read(argument, "gate", {"weight": weight, "share": []})
    size = {"sink": GATE_SINKS, "share": fit["share"].item()}
    return [EvictConfig(gate=layer, **size) for layer in fit["weight"]]
