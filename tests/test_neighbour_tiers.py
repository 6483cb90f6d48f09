"""neighbours/tiers.py and neighbours/observed.py: two tiers of packed tokens, and who chooses."""
import pytest
import torch
from neighbours import observed
from neighbours.observed import column_sums
from reference_cache import randn


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
