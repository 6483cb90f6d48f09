"""neighbours/tiers.py, packed.py and observed.py: two tiers of packed tokens, and who chooses."""
import json
from dataclasses import replace

import pytest
import torch
from cache_cases import assert_same, at, refused, state
from calling import check_error, result_of, run
from fused.attention import compiled_attention
from fused.step import compiled_step
from model import OTHERS
from neighbours import observed
from neighbours.observed import column_sums
from neighbours.tiers import TierCache, TierConfig
from reference_cache import (
    DTYPES, HALF_EPS, attention64, ends, fake_quantized, keys_like, randn, rel)


# ---- column sums of attention -------------------------------------------------------------------

def probabilities(q, k):
    """Causal softmax in float64, a query and a head at a time: [b, H, n, T]."""
    n, T = q.shape[2], k.shape[2]
    out = torch.zeros(*q.shape[:3], T, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys = k[b, h * k.shape[1] // q.shape[1]].double()
            for i in range(n):
                end = T - n + i + 1
                scores = keys[:end] @ q[b, h, i].double() / q.shape[3] ** 0.5
                out[b, h, i, :end] = scores.softmax(0)
    return out


def test_column_sums_are_those_of_the_probabilities(monkeypatch):
    """In one chunk and in many, behind tokens that are there already. Guards against a chunk that
    sees too few keys or too many, and query heads of another KV head."""
    for B, H, Hk, n, T in ((2, 4, 2, 30, 41), (1, 3, 3, 40, 40), (1, 2, 1, 1, 1)):
        q, k = 3 * randn(B, H, n, 8), randn(B, Hk, T, 8, seed=1)
        wanted = probabilities(q, k).unflatten(1, (Hk, -1)).sum((2, 3))
        for chunk in (2**24, 1000):
            monkeypatch.setattr(observed, "CHUNK", chunk)
            torch.testing.assert_close(column_sums(q, k).double(), wanted, atol=1e-5, rtol=1e-5)


def test_column_sums_of_some_queries_estimate_those_of_all():
    """Guards against probes that count too little or too much, and tokens that only the newest 64
    queries see but do not count exactly."""
    k = randn(1, 2, 140, 8)
    even = torch.zeros(1, 4, 120, 8)  # a query pays every token that it sees the same
    p = probabilities(even, k)
    probes = [*range(0, 56, 8), *range(56, 120)]
    seen = (p > 0).double()
    weighted = sum((8 if i < 56 else 1) * p[:, :, i] for i in probes)
    counted = sum((8 if i < 56 else 1) * seen[:, :, i] for i in probes)
    wanted = (weighted / counted * seen.sum(2)).unflatten(1, (2, -1)).sum(2)
    torch.testing.assert_close(column_sums(even, k, every=8).double(), wanted, atol=1e-5, rtol=1e-5)
    loud = randn(1, 4, 120, 8, seed=2)
    newest = slice(140 - 64, None)
    torch.testing.assert_close(column_sums(loud, k, every=8)[..., newest],
                               column_sums(loud, k)[..., newest])


# ---- the tiers, token by token ------------------------------------------------------------------

SMALL = TierConfig(group_size=8, residual=32)
CONFIGS = {
    "zipcache": SMALL,
    "mikv": replace(SMALL, hi=8, mean=0, sink=0, shrink=1.0),
    "lag": replace(SMALL, share=0.5, lag=5, sink=9, v_group_size=16),
    "K 4 V 2": replace(SMALL, k_bits=4, hi=8),
}
HEADS, D = 2, 16  # KV heads, of two query heads each


class Row:
    """One row of a TierCache by its definition, a token and a KV head at a time."""

    def __init__(self, config):
        self.c, self.n = config, 0
        self.k = self.v = torch.zeros(HEADS, 0, D)
        self.sums = torch.zeros(HEADS, 0, dtype=torch.float64)
        self.read = {}  # (head, key block): {token: (k, v)}

    def extend(self, q, k, v):
        """Queries q [H, n, D] and tokens k, v [HEADS, n, D] -> [H, n, D]; all see the same codes."""
        n, before = k.shape[1], self.n
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.sums = torch.nn.functional.pad(self.sums, (0, n))
        self.n += n
        if n == 1:  # a step: R tokens get codes when it is written
            self.divide_all(self.n, before)
        out = torch.zeros(len(q), n, D, dtype=torch.float64)
        for h in range(len(q)):
            head = h // 2
            keys, values = self.reads(head, before if n == 1 else before - 1)
            for i in range(n):
                p = (keys[: before + i + 1] @ q[h, i].double() / D**0.5).softmax(0)
                out[h, i] = p @ values[: len(p)]
                self.sums[head, : len(p)] += p
        if n > 1:
            self.divide_all(self.n + 1, self.n)
        return out

    def blocks(self, n):
        """Key blocks that a query reads from the tiers as token n - 1."""
        return max(0, (n - 2 - self.c.lag) // self.c.residual)

    def reads(self, head, pos):
        k, v = self.k[head].double(), self.v[head].double()
        for block in range(self.blocks(pos + 1)):
            for t, (key, value) in self.read[head, block].items():
                k[t], v[t] = key, value
        return k, v

    def divide_all(self, n, counted):
        for head in range(HEADS):
            for block in range(self.blocks(n + 1)):
                if (head, block) not in self.read:
                    self.read[head, block] = self.divide(head, block, counted)

    def divide(self, head, block, counted):
        c, R = self.c, self.c.residual
        tokens = [t for t in range(block * R, block * R + R) if t >= c.sink]
        rank = {t: self.sums[head, t].item() / (counted - t if c.mean else 1) for t in tokens}
        best = sorted(tokens, key=lambda t: -rank[t])[: round(c.share * R)]
        rest = [t for t in range(block * R, block * R + R) if t not in best]
        return self.coded(head, sorted(best), c.hi, c.hi, 1) | self.coded(
            head, rest, c.k_bits, c.v_bits, c.shrink)

    def coded(self, head, tokens, k_bits, v_bits, shrink):
        """{token: (k, v)} as read from one tier."""
        out, Gv = {}, self.c.value_group(D)
        for group in torch.tensor(tokens).split(self.c.group_size):
            counts = group >= self.c.sink
            if counts.any():
                keys = clamped(self.k[head, group].mT, shrink, counts)
                keys = fake_quantized(keys, k_bits, counts).mT
                values = clamped(self.v[head, group].unflatten(1, (-1, Gv)), shrink)
                values = fake_quantized(values, v_bits).flatten(1)
                out |= {int(t): (keys[i], values[i]) for i, t in enumerate(group) if counts[i]}
        return out


def clamped(x, shrink, counts=None):
    low, high = ends(x, counts)
    cut = (high - low) * (1 - shrink) / 2
    return x.clamp(low + cut, high - cut)


def tokens_of(batch, n, dtype=torch.float32):
    """q [B, H, n, D], k, v [B, Hk, n, D]."""
    return (2 * randn(batch, 2 * HEADS, n, D, dtype=dtype), keys_like(batch, HEADS, n, D, seed=1)
            .to(dtype), randn(batch, HEADS, n, D, seed=2, dtype=dtype))


def make(config=SMALL, batch=1, max_len=400, **kind):
    return config.make(batch, HEADS, max_len, D, **kind)


def extend(cache, parts, new):
    """The next tokens of each row, `new` [B], right-padded with loud ones."""
    padded = [torch.full_like(x[:, :, : max(new)], 100) for x in parts]
    for b, n in enumerate(new):
        for x, y in zip(parts, padded):
            y[b, :, :n] = x[b, :, cache.lengths[b] : cache.lengths[b] + n]
    return cache.extend(*padded, new)


def step(cache, parts):
    """One token a row -> its attention."""
    q, k, v = (at(x, cache.lengths) for x in parts)
    cache.append(k, v)
    return cache.attend(q), q


def fused(cache, q):
    return cache.fused(q, cache.pos - 1, cache.index[: cache.capacity : cache.block])


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_that_of_the_definition(name):
    """Rows of unequal lengths, prompts, steps, and prompts behind them; plain and fused. Guards
    against a wrong measure, tokens that are lost, twice or of another row, sinks that stretch a
    group or count twice, wrong axes, fields and blocks, and sums that stop where decoding starts.
    """
    lengths, parts = [75, 34, 1], tokens_of(3, 300)
    cache, rows = make(CONFIGS[name], 3), [Row(CONFIGS[name]) for _ in range(3)]
    for new in (lengths, [20, 90, 3]):
        out = extend(cache, parts, new)
        for b, (row, n) in enumerate(zip(rows, new)):
            wanted = row.extend(*(x[b, :, row.n : row.n + n] for x in parts))
            assert rel(out[b, :, :n], wanted) < 1e-5
        for _ in range(40):
            plain, q = step(cache, parts)
            other = fused(cache, q)
            for b, row in enumerate(rows):
                wanted = row.extend(*(x[b, :, row.n : row.n + 1] for x in parts))
                assert rel(plain[b], wanted) < 1e-5 and rel(other[b], wanted) < 1e-5
