"""Caches that go on: many tokens behind what is there, copies of rows, and states of caches."""
import random

import pytest
import torch
from cache_cases import (
    SHAPES, append, assert_same, extend, fill, make_cache, make_tokens, refused, row_state, state,
)
from hypothesis import given, settings, strategies as st
from reference_cache import HALF_EPS, attention64, randn, rel

from kivi import FullCache, KiviCache

SOME = ("small window", "K 4 V 2", "40 sinks", "boosted, 4 sinks, values of 64", "full")


def quick(*names):
    """All caches; those that are not among these are slow."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in SHAPES]


@pytest.mark.parametrize("name", quick(*SOME, "paper", "all at once"))
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_split_gives_the_bytes_of_single_tokens(name, seed):
    """Rows of unequal lengths, in pieces of any length, none included. Guards against a piece that
    forgets values or keys that the window still holds, quantizes twice, or chooses the channels of
    boosted keys from other tokens than the first R."""
    check_splits(name, seed)


def check_splits(name, seed):
    rng = random.Random(seed)
    _, k, v = make_tokens(name, 2, 400, seed=seed % 50)
    cache = make_cache(name, 2)
    lengths = [rng.randint(1, 150) for _ in range(2)]
    first = list(lengths)
    fill(cache, k, v, lengths)
    while max(lengths) < 300:
        new = [rng.randint(0, rng.choice((1, 5, 70))) for _ in range(2)]
        if max(new):
            extend(cache, k, v, lengths, new)
            lengths = [n + more for n, more in zip(lengths, new)]
        if rng.random() < 0.3:
            append(cache, k, v, lengths)
            lengths = [n + 1 for n in lengths]
    assert cache.lengths == lengths == cache.pos.tolist()
    for b in range(2):
        alone = make_cache(name)
        fill(alone, k[b : b + 1], v[b : b + 1], [first[b]], lengths[b] - first[b])
        assert_same(row_state(alone, 0), row_state(cache, b))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", quick(*SOME, "sliding over sinks", "full, sliding"))
def test_a_query_sees_the_past_as_it_was_held_and_new_tokens_exactly(name, dtype):
    """Guards against a query that sees tokens behind its own or of the padding, past tokens that
    are quantized before it reads them, and a sliding window from another token on."""
    check_queries(name, dtype)


def check_queries(name, dtype):
    _, k, v = make_tokens(name, 2, 300, dtype)
    cache = make_cache(name, 2, 400, dtype)
    lengths = [30, 101]
    fill(cache, k, v, lengths)
    held = cache.dequantized()
    q, out = extend(cache, k, v, lengths, [66, 20])
    sliding = SHAPES[name][3].get("sliding")
    for b, more in enumerate((66, 20)):
        n = lengths[b]
        whole = [torch.cat([old[b, :, :n].double(), x[b, :, n : n + more].double()], 1)
                 for old, x in zip(held, (k, v))]
        for i in range(0, more, 5):
            want = attention64(q[b, :, i], *(x[:, : n + i + 1] for x in whole), sliding)
            assert rel(out[b, :, i], want) <= 6 * HALF_EPS[dtype] + 1e-5


@pytest.mark.parametrize("name", SOME)
def test_on_an_empty_cache_it_is_a_prefill(name):
    """Queries in more than one part. Guards against a mask that is cut at the wrong place."""
    _, k, v = make_tokens(name, 2, 900)
    whole, parts = (make_cache(name, 2, 1000) for _ in range(2))
    fill(whole, k, v, [900, 40])
    q, out = extend(parts, k, v, [0, 0], [900, 40])
    assert_same(state(parts), state(whole))
    for i in (0, 39, 511, 512, 899):
        want = attention64(q[0, :, i], k[0, :, : i + 1], v[0, :, : i + 1])
        assert rel(out[0, :, i], want) <= 1e-5


@pytest.mark.parametrize("name", SOME)
def test_an_empty_row_stays_empty(name):
    """Guards against padding in its window."""
    _, k, v = make_tokens(name, 2, 50)
    cache = make_cache(name, 2)
    extend(cache, k, v, [0, 0], [40, 0])
    assert_same(row_state(cache, 1), row_state(make_cache(name), 0))


@pytest.mark.parametrize("where", (0, 1))
@pytest.mark.parametrize("name", SOME)
def test_padding_may_hold_anything(name, where):
    """NaN in K or V behind the new tokens of a row. Guards against a product with weights of 0."""
    _, k, v = make_tokens(name, 2, 160)
    results = []
    for padding in (0, torch.nan):
        cache = make_cache(name, 2)
        fill(cache, k, v, [60, 30])
        new = [x[:, :, 60:160].clone() for x in (k, v)]
        new[where][1, :, 40:] = padding
        q = randn(2, 2 * k.shape[1], 100, k.shape[3], seed=3)
        results.append((cache.extend(q, *new, [100, 40]), state(cache)))
    (clean, before), (found, after) = results
    assert torch.equal(found[0], clean[0]) and torch.equal(found[1, :, :40], clean[1, :, :40])
    assert_same(before, after)


@pytest.mark.parametrize("name", SOME)
def test_a_fork_is_the_row_itself(name):
    """Guards against a copy that shares memory with its source or leaves out a buffer, against
    lengths that stay, and against rows that are not there, of which half is copied."""
    _, k, v = make_tokens(name, 3, 200)
    cache = make_cache(name, 3)
    fill(cache, k, v, [90, 5, 170])
    before = state(cache)
    for row, rows in ((2, [1, 3]), (2, [-1]), (3, [0])):
        refused(lambda: cache.fork(row, rows), 0, 2, rows[-1])
    assert_same(state(cache), before)
    cache.fork(2, [])  # a batch of one prompt has no others
    assert_same(state(cache), before)
    cache.fork(2, (n for n in (0, 1)))
    assert cache.lengths == [170, 170, 170] == cache.pos.tolist()
    assert_same(row_state(cache, 0), row_state(cache, 2))
    append(cache, k, v, [170, 171, 172])
    alone = make_cache(name)
    fill(alone, k[2:], v[2:], [170])
    append(alone, k[1:2], v[1:2], [171])
    assert_same(row_state(alone, 0), row_state(cache, 1))


@pytest.mark.parametrize("max_len", (300, 512, 700))
@pytest.mark.parametrize("name", (*SOME, "all at once"))
def test_a_state_goes_on_in_another_cache(name, max_len):
    """Smaller and larger ones, from any row on. Guards against entries that depend on the capacity,
    and against remains of what the rows held before."""
    _, k, v = make_tokens(name, 2, 300)
    cache = make_cache(name, 2)
    fill(cache, k, v, [130, 40], steps=9)
    saved = cache.state()
    one = make_cache(name, 1)
    fill(one, k[1:], v[1:], [49])
    assert all(torch.equal(x, cache.state(slice(1, 2))[n]) for n, x in one.state().items()
               if torch.is_tensor(x))
    other = make_cache(name, 3, max_len)
    fill(other, k[[1, 0, 1]], v[[1, 0, 1]], [200, 250, 290])
    other.load_state(saved, row=1)
    assert other.lengths == [200, 139, 49] == other.pos.tolist()
    assert_same({n: x for n, x in cache.state().items() if torch.is_tensor(x)},
                {n: x for n, x in saved.items() if torch.is_tensor(x)})
    tokens = [200, 139, 49]
    for step in range(40):
        append(other, k[[0, 0, 1]], v[[0, 0, 1]], [n + step for n in tokens])
        append(cache, k, v, [n + step for n in tokens[1:]])
    for b in range(2):
        again = make_cache(name, 1, max_len)
        fill(again, k[b : b + 1], v[b : b + 1], [cache.lengths[b]])
        assert_same(row_state(again, 0), row_state(other, 1 + b))


def test_a_state_of_another_cache_is_refused():
    cache = make_cache("small window", 1)
    _, k, v = make_tokens("small window", 1, 80)
    fill(cache, k, v, [80])
    saved = cache.state()
    before = state(cache)
    for changed, words in (
        ({"k_bits": 4}, ("k_bits", 4, 2)),
        ({"residual": 64}, ("residual", 64, 32)),
        ({"dtype": "torch.float16"}, ("dtype",)),
        ({"kind": "FullCache"}, ("kind", "FullCache")),
        ({"v_packed": saved["v_packed"][:, :1]}, ("v_packed", "damaged")),
        ({"k_scale": saved["k_scale"].half()}, ("k_scale", "damaged")),
        ({"k_window": None}, ("k_window", "missing")),
        ({"lengths": [80, 3]}, (80, 1, 512)),
        ({"lengths": [900]}, (900, 512)),
        ({"lengths": [-1]}, ("lengths",)),
        ({"lengths": "80"}, ("lengths",)),
    ):
        refused(lambda: cache.load_state(saved | changed), *words)
    refused(lambda: make_cache("full").load_state(saved), "kind", "KiviCache", "FullCache")
    for row in (1, -1):
        refused(lambda: cache.load_state(saved, row=row), row, 80, 512)
    assert_same(state(cache), before)


@pytest.mark.parametrize("kind", (KiviCache, FullCache))
def test_wrong_tokens_are_refused(kind):
    """And leave the cache as it was. Guards against shapes that broadcast, and lengths that are
    counted before the check."""
    cache = kind(2, 2, 100, 32)
    x, q = randn(2, 2, 5, 32), randn(2, 4, 5, 32, seed=1)
    cache.extend(q, x, x)
    before = state(cache)
    for args, words in (
        ((q, x[:, :1], x), ("k", 2)),
        ((q, x, x[:, :, :4]), ("v", 5)),
        ((q[:, :3], x, x), ("q", 2)),
        ((q[:, :, :1], x, x), ("q", 5)),
        ((q, x.half(), x), ("k",)),
        ((q, x[0], x), ("k",)),
        ((q[:, :, :0], x[:, :, :0], x[:, :, :0]), ("lengths", 0)),
        ((q, x, x, [5]), ("lengths", 2)),
        ((q, x, x, [6, 1]), ("lengths", 5)),
        ((q, x, x, [-1, 1]), ("lengths", 5)),
        ((q, x * float("nan"), x), ("k", "NaN")),
        ((randn(2, 4, 96, 32), randn(2, 2, 96, 32), randn(2, 2, 96, 32)), (101, 100)),
    ):
        refused(lambda: cache.extend(*args), *words)
    assert_same(state(cache), before)
