"""Key channels in twice the bits: which ones, where their codes stand, and what they are good for.

That caches with them read what they should, and keep their state as others do, stands in
test_kivi.py, by the cases whose names begin with "boosted".
"""
import kivi
import pytest
import quantize as qz
import torch
from cache_cases import (
    BOOSTED, CASES, SHAPES, append, assert_same, fill, make_cache, make_tokens, row_state, state)
from hypothesis import given
from hypothesis import strategies as st
from kivi import KiviCache
from reference_cache import (
    DTYPES, attention64, boosted_channels, loudest_first, randn, rel)
from test_kivi import check_reads, examples

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
boosted_case = pytest.mark.parametrize("name", BOOSTED)


def expected_order(k, name):
    """[Hk, D] by the reference, of one row's keys [Hk, T, D]."""
    options = CASES[name][3]
    order = loudest_first(k, options["group_size"], options["residual"], options.get("sink", 0))
    return torch.tensor(order)


# ---- where the codes stand ----------------------------------------------------------------------

@boosted_case
@every_dtype
def test_codes_and_scales_of_boosted_keys_are_where_the_docstring_says(name, dtype):
    """Every column decoded by hand. Column c holds channel order[c]; of the first n it holds the
    high half of a code of twice the bits, and column D + c the low half; their scale counts steps
    of the high half. What is read has the natural order of channels.

    Guards against a layout that its own reader understands, and kernels on these buffers do not:
    low halves first, halves that changed places, an order that says the column of a channel.
    """
    _, n_kv_heads, D, options = CASES[name]
    bits, G, R = options.get("k_bits", 2), options["group_size"], options["residual"]
    sink, n = options.get("sink", 0), boosted_channels(options["boost"], D)
    n_tokens = 5 * R  # whole groups, but not whole bytes of them
    _, k, v = make_tokens(name, 1, n_tokens + R, dtype)
    cache = make_cache(name, dtype=dtype)
    fill(cache, k, v, [3 * R + 7], steps=3 * R - 7)
    assert cache.k_packed.shape[-1] == D + n and cache.k_order.shape == (1, n_kv_heads, D)
    assert torch.equal(cache.k_order[0].long(), expected_order(k[0], name))
    t = torch.arange(n_tokens)
    stack, field = t // G // (8 // bits), t // G % (8 // bits)
    read = cache.dequantized()[0]
    source = t.clamp(min=sink)  # a sink has the code of the first token that is none
    for head in range(n_kv_heads):
        columns = cache.k_packed[0, head, stack, t % G] >> (field * bits)[:, None] & 2**bits - 1
        for column, channel in enumerate(cache.k_order[0, head].tolist()):
            x, boost = k[0, head, source, channel], column < n
            codes, scale, zero = qz.quantize(x, 2 * bits if boost else bits, G)
            scale = scale.float() * (2**bits if boost else 1)
            high, low = (codes >> bits, codes & 2**bits - 1) if boost else (codes, 0 * codes)
            assert torch.equal(columns[:, column], high)
            assert not boost or torch.equal(columns[:, D + column], low)
            for buffer, wanted in ((cache.k_scale, scale), (cache.k_zero, zero.float())):
                got = buffer[0, head, : n_tokens // G, 0, column].float()
                assert torch.equal(got, wanted)
            scale, zero = (x.float().repeat_interleave(G) for x in (scale, zero))
            x_hat = (high + low / 2**bits) * scale + zero
            assert torch.equal(read[0, head, sink:n_tokens, channel], x_hat[sink:])


def test_all_channels_boosted_are_twice_the_bits():
    """Guards against a special case at the end: no plain channel is left, or no boosted one."""
    q, k, v = make_tokens("boosted", 2, 300)
    options = dict(group_size=32, residual=64)
    for boost, plain_bits in ((64, 4), (0.1, 2)):  # a tenth of 64 channels: less than eight
        caches = (KiviCache(2, 2, 512, 64, boost=boost, **options),
                  KiviCache(2, 2, 512, 64, k_bits=plain_bits, **options))
        for cache in caches:
            fill(cache, k, v, (150, 40), steps=150)
        boosted, plain = caches
        for x, y in zip(boosted.dequantized(), plain.dequantized()):
            assert torch.equal(x, y)
        assert torch.equal(boosted.attend(q), plain.attend(q))


@st.composite
def configurations(draw):
    """(D, options of a KiviCache) that `KVConfig.check` lets pass, most of them boosted."""
    G = draw(st.sampled_from((8, 16, 32)))
    D = draw(st.sampled_from((32, 64, 96)))
    return D, dict(
        k_bits=draw(st.sampled_from((2, 4))), v_bits=draw(st.sampled_from((2, 4, 8))), group_size=G,
        residual=G * draw(st.integers(1, 3)), sink=draw(st.sampled_from((0, 1, 7, 16, 40))),
        boost=draw(st.sampled_from((0, 0.1, 0.25, 0.99, 8, 24, D))),
        v_group_size=draw(st.sampled_from((0, 8, 16, 64))),
        sliding=draw(st.sampled_from((None, 5, 60))))


@examples(40)
@given(configurations(), st.sampled_from(DTYPES), st.lists(st.integers(1, 120), min_size=2,
                                                           max_size=2), st.integers(0, 40))
def test_any_configuration_reads_the_closed_form(configuration, dtype, lengths, steps):
    """Guards against two options that do not bear each other, which no fixed case pairs."""
    D, options = configuration
    with pytest.MonkeyPatch.context() as mp:
        for cases in (CASES, SHAPES):
            mp.setitem(cases, "any", (4, 2, D, options))
        q, k, v = make_tokens("any", 2, 160, dtype)
        cache = make_cache("any", 2, 200, dtype)
        fill(cache, k, v, lengths, steps)
        check_reads(cache, "any", q, k, v, [n + steps for n in lengths])
        at_once = make_cache("any", 2, 200, dtype)
        fill(at_once, k, v, [n + steps for n in lengths])
        assert_same(state(cache), state(at_once))


# ---- which channels -----------------------------------------------------------------------------

@boosted_case
def test_the_order_depends_on_the_first_tokens_of_the_row_alone(name):
    """However a row came to its tokens. Guards against an order of a former occupant or of a
    batch mate, one of padding, and one that follows the newest block of keys."""
    R = CASES[name][3]["residual"]
    n, steps = R + 7, 2 * R
    _, k, v = make_tokens(name, 3, n + steps)
    wanted = torch.stack([expected_order(row, name) for row in k])
    k[:, :, R:] = 50 * k[:, :, R:].roll(3, 3)  # other channels are loud later
    alone = make_cache(name)
    fill(alone, k[1:2], v[1:2], [1], n - 1)
    with_others, after_others, parked = (make_cache(name, 3) for _ in range(3))
    fill(with_others, k, v, [1, n, 2 * R])
    fill(after_others, k.roll(5, 3), v, [n, n, n], steps=9)
    after_others.reset()
    fill(after_others, k, v, [R, n, R - 1])
    fill(parked, k.roll(5, 3), v, [n, n, n])
    parked.park(1)
    for t in range(n):
        append(parked, k, v, [n + t % R, t, n])
    for cache, row in ((alone, 0), (with_others, 1), (after_others, 1), (parked, 1)):
        assert torch.equal(cache.k_order[row].long(), wanted[1])
    assert_same(row_state(alone, 0), row_state(with_others, 1))
    assert_same(row_state(alone, 0), row_state(after_others, 1))
    for step in range(steps):
        append(with_others, k, v, [1 + step, n + step, 2 * R])
    assert torch.equal(with_others.k_order.long(), wanted), "a row changed its order"


@boosted_case
def test_a_short_prompt_leaves_the_order_to_the_append_that_completes_the_block(name):
    """Guards against an order of fewer than R tokens, or of the padding behind them."""
    R = CASES[name][3]["residual"]
    _, k, v = make_tokens(name, 2, 2 * R)
    cache = make_cache(name, 2)
    fill(cache, k, v, [R - 1, R + 5])
    assert not cache.k_order[0].any()
    assert torch.equal(cache.k_order[1].long(), expected_order(k[1], name))
    append(cache, k, v, [R - 1, R + 5])
    assert torch.equal(cache.k_order[0].long(), expected_order(k[0], name))
    assert torch.equal(cache.k_order[1].long(), expected_order(k[1], name))


@every_dtype
@pytest.mark.parametrize("prompt", (32, 1), ids=("prefill", "append"))
def test_the_widest_group_decides_and_ties_go_to_the_lower_channel(prompt, dtype):
    """By hand. Guards against an unstable sort, a range over all R tokens instead of a group, the
    first or the last group alone, the largest number or the variance instead of the range, and a
    sink that counts."""
    name, D = "boosted, sliding over sinks", 32  # groups of 16, R = 32, 5 sinks
    k = torch.zeros(1, 1, 32, D)
    k[..., 7, ::2] = 1  # even channels: a range of 1 in the first group
    k[..., 20, 1::2] = -1  # odd ones: the same in the second
    k[..., 20, 30], k[..., 9, 3] = -1, 1  # one of each, that varies in both
    k[..., 9, 29] = 3
    k[..., 30, 12] = 4
    k[..., ::2, 10] = 2.5  # varies most, and is less wide
    k[..., 16:, 5] -= 100  # constant in each group but for its -1: no wider than the others
    k[..., 6] += 50  # large, and no wider than the others
    k[..., :5, 8] = 70  # in sinks alone
    cache = make_cache(name, dtype=dtype)
    fill(cache, k.to(dtype), k.to(dtype), [prompt], steps=32 - prompt)
    rest = [channel for channel in range(D) if channel not in (12, 29, 10)]
    assert cache.k_order[0, 0].tolist() == [12, 29, 10, *rest]


# ---- what it is good for ------------------------------------------------------------------------

@pytest.mark.parametrize("k_bits, factor", ((2, 5), (4, 17)))
def test_boosted_channels_lose_less_by_the_ratio_of_their_steps(k_bits, factor):
    """15 steps in the range instead of 3, or 255 instead of 15; the other channels do not change.
    Guards against bits that are stored and of no use."""
    _, k, v = make_tokens("boosted", 2, 64 * 9)
    errors = []
    for boost in (0, 16):
        cache = KiviCache(2, 2, 64 * 9, 64, k_bits=k_bits, group_size=32, residual=64, boost=boost)
        fill(cache, k, v, (64 * 9, 64 * 9))
        errors.append((cache.dequantized()[0] - k)[:, :, : 64 * 8])
    order = cache.k_order.long()[:, :, None].expand(-1, -1, 64 * 8, -1)
    (loud, quiet), (loud_boosted, quiet_boosted) = (
        error.gather(3, order).tensor_split([16], 3) for error in errors)
    assert torch.equal(quiet, quiet_boosted)
    assert factor * 0.93 < (loud.norm() / loud_boosted.norm()).item() < factor * 1.07


def gain_of_boost():
    """The error of attention over 1,000 tokens, 8 of 128 channels loud, by that with boost."""
    errors = torch.zeros(2)
    for seed in range(6):
        q, k, v = (randn(1, 2, n, 128, seed=3 * seed + i) for i, n in enumerate((1, 1000, 1000)))
        k[..., seed::16] *= 20
        wanted = attention64(q[0, :, 0] / 4, k[0], v[0])
        for i, boost in enumerate((0, 0.25)):
            cache = KiviCache(1, 2, 1024, 128, v_bits=8, boost=boost)
            cache.prefill(k, v)
            errors[i] += rel(cache.attend(q / 4)[0, :, 0], wanted)
    return (errors[0] / errors[1]).item()


def test_boost_makes_attention_over_loud_keys_more_exact():
    """3.5 times as exact, where the step of the loud channels is 5 times as fine and the others
    stay as they are. Guards against a change that leaves every code in its place but takes the use
    from them."""
    assert gain_of_boost() > 3


@pytest.mark.parametrize("bug", ("the quietest", "the lowest numbers"))
def test_the_gain_is_that_of_the_right_channels(bug, monkeypatch):
    """The bound above must fail if other channels are boosted."""
    order = kivi.channel_order
    others = {"the quietest": lambda keys: order(keys).flip(-1),
              "the lowest numbers": lambda keys: order(keys).sort().values}
    monkeypatch.setattr(kivi, "channel_order", others[bug])
    assert gain_of_boost() < 1.5
