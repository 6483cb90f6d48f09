"""The caches that the tests are about, and how the tests fill and compare them."""
import re

import pytest
import torch
from kivi import FullCache, KiviCache
from reference_cache import keys_like, randn

CASES = {  # name: (H, Hk, D, options)
    "paper": (4, 2, 32, dict(group_size=32, residual=128)),
    "small window": (4, 2, 32, dict(group_size=32, residual=32)),
    "small groups": (2, 2, 64, dict(group_size=16, residual=32)),
    "groups of 8": (2, 1, 32, dict(group_size=8, residual=24)),
    "groups of 64": (4, 1, 64, dict(group_size=64, residual=64)),
    "groups of 128": (2, 1, 128, dict(group_size=128, residual=128)),
    "4 bits": (4, 2, 32, dict(k_bits=4, v_bits=4, group_size=16, residual=48)),
    "8 bits": (4, 2, 32, dict(k_bits=8, v_bits=8, group_size=16, residual=32)),
    "K 4 V 2": (8, 2, 32, dict(k_bits=4, v_bits=2, group_size=32, residual=64)),
    "K 2 V 8": (4, 2, 32, dict(k_bits=2, v_bits=8, group_size=16, residual=32)),
    "4 sinks": (4, 2, 32, dict(group_size=16, residual=32, sink=4)),
    "40 sinks": (4, 2, 32, dict(group_size=16, residual=32, sink=40)),  # two groups and a half
    "D 96": (6, 3, 96, dict(group_size=32, residual=64)),
    "D 80": (2, 1, 80, dict(group_size=16, residual=32)),
    "sliding": (4, 2, 32, dict(group_size=16, residual=32, sliding=20)),
    "sliding over sinks": (4, 2, 32, dict(group_size=16, residual=32, sink=5, sliding=50)),
    "boosted": (4, 2, 64, dict(group_size=32, residual=64, boost=16)),
    "boosted, 4 sinks, values of 64": (4, 2, 64, dict(
        group_size=16, residual=32, sink=4, boost=0.25, v_group_size=64)),
    "boosted 4 bits": (2, 1, 32, dict(k_bits=4, v_bits=4, group_size=16, residual=32, boost=8)),
    "boosted, D 96": (2, 1, 96, dict(group_size=32, residual=64, boost=0.25)),
    "boosted, sliding over sinks": (2, 1, 32, dict(
        group_size=16, residual=32, sink=5, sliding=50, boost=8)),
    "all at once": (2, 2, 32, dict(k_bits=4, group_size=16, residual=32, sink=5, sliding=90,
                                   boost=8, v_group_size=8)),
}
BOOSTED = tuple(name for name in CASES if "boost" in CASES[name][3])
SHAPES = CASES | {"full": (4, 2, 32, {}), "full, sliding": (4, 2, 32, dict(sliding=20))}


def make_cache(name="small window", batch=1, max_len=512, dtype=torch.float32):
    _, n_kv_heads, head_dim, options = SHAPES[name]
    kind = KiviCache if name in CASES else FullCache
    return kind(batch, n_kv_heads, max_len, head_dim, dtype=dtype, **options)


def make_tokens(name, batch, n_tokens, dtype=torch.float32, seed=0):
    """q [B, H, 1, D], k, v [B, Hk, T, D]: loud K channels, and a first key ten times as large."""
    n_heads, n_kv_heads, head_dim, _ = SHAPES[name]
    k = keys_like(batch, n_kv_heads, n_tokens, head_dim, seed=seed)
    k[:, :, 0] *= 10
    v = randn(batch, n_kv_heads, n_tokens, head_dim, seed=seed + 1, dtype=dtype)
    return randn(batch, n_heads, 1, head_dim, seed=seed + 2, dtype=dtype), k.to(dtype), v


def fill(cache, k, v, lengths, steps=0, padding=1e4):
    """A prefill of `lengths` tokens, right-padded with large numbers, then `steps` tokens."""
    k_padded, v_padded = (x[:, :, : max(lengths)].clone() for x in (k, v))
    for b, n in enumerate(lengths):
        k_padded[b, :, n:] = padding
        v_padded[b, :, n:] = -padding
    cache.prefill(k_padded, v_padded, torch.tensor(lengths))
    for step in range(steps):
        append(cache, k, v, [n + step for n in lengths])


def at(x, tokens):
    """Token tokens[b] of row b: [B, Hk, 1, D]."""
    return torch.stack([x[b, :, t : t + 1] for b, t in enumerate(tokens)])


def append(cache, k, v, tokens):
    cache.append(at(k, tokens), at(v, tokens))


def extend(cache, k, v, lengths, new, seed=0):
    """Extends a cache whose rows hold the first `lengths` tokens of k and v by the next `new` ones,
    with loud padding: (queries, result)."""
    n = max(new)
    parts = []
    for x in (k, v):
        part = torch.full_like(x[:, :, :n], 1e4)
        for b, (first, more) in enumerate(zip(lengths, new)):
            part[b, :, :more] = x[b, :, first : first + more]
        parts.append(part)
    heads = k.shape[1] * 2
    q = randn(len(k), heads, n, k.shape[3], seed=seed, dtype=k.dtype)
    return q, cache.extend(q, *parts, new)


def state(cache):
    """Every byte of the cache by buffer, those behind its heads and rows too, and its lengths."""
    everything = {name: torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage()).clone()
                  for name, buffer in cache.named_buffers()}
    return everything | {"lengths": torch.tensor(cache.lengths)}


def row_state(cache, row):
    """Every byte that belongs to one row of the cache, by buffer."""
    return {name: buffer[row : row + 1].contiguous().view(torch.uint8)
            for name, buffer in cache.named_buffers() if name not in ("index", "rows")}


def assert_same(a, b):
    """Two states, or rows of states, are the same."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


def refused(call, *words):
    """`call` must raise a ValueError of one line that holds these words or numbers."""
    with pytest.raises(ValueError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert re.search(rf"(?<![\w.-]){re.escape(str(word))}(?!\w)", message), (word, message)
