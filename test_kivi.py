"""Run: pytest test_kivi.py       (half a minute on one core; no GPU, no network)

The specification of quantize.py and kivi.py. What they do is compared with what is written in
tests/reference_cache.py, in plain Python and from the paper, never with itself. Every docstring
says which bug its test guards against.

In tests/ are channels in twice the bits (test_boost.py), what the caches refuse (test_refusals.py),
the bugs that must make a check here fail (test_mutations.py), and the compiled forms of the same
(test_attentions.py).
"""
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test)

import kivi
import quantize as qz
from kivi import KiviCache

sys.path.append(str(Path(__file__).resolve().parent / "tests"))
from cache_cases import (  # noqa: E402
    CASES, SHAPES, append, assert_same, extend, fill, make_cache, make_tokens, refused, row_state,
    state)
from reference_cache import (  # noqa: E402
    DTYPES, HALF_EPS, KINDS, SMALLEST, attention64, drift_bound, error_bound, expected_reads,
    full_bytes, hostile_groups, kivi_bytes, randn, rel, scalar_dequantize, scalar_quantize,
    to_float32)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def one_thread():
    """Most tensors here are tiny: a second thread would only wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(n):
    """Hypothesis settings: n examples, always the same ones."""
    return settings(deadline=None, derandomize=True, max_examples=n, database=None,
                    suppress_health_check=list(HealthCheck))


# ---- the quantizer ------------------------------------------------------------------------------

bit_widths = st.sampled_from((2, 4, 8))
groups = st.builds(hostile_groups, st.sampled_from(KINDS), st.integers(1, 3),
                   st.sampled_from((4, 16, 32, 128)), st.sampled_from(DTYPES),
                   st.integers(0, 10**6))


def quantize_or_refuse(x, bits):
    """x [n, G] as n groups; None where a ValueError is right: the range overflows float32."""
    fits = all(math.isfinite(to_float32(max(row) - min(row))) for row in x.tolist())
    try:
        result = qz.quantize(x, bits, x.shape[1])
    except ValueError:
        assert not fits, "finite numbers with a finite range were refused"
        return None
    assert fits, "a range that overflows float32 was accepted"
    return result


def assert_scalar_reference(x, bits):
    """The quantizer and the reference agree in every code, scale, zero and x_hat."""
    result = quantize_or_refuse(x, bits)
    if result is None:
        return
    x_hat = qz.dequantize(*result)
    for i, row in enumerate(x.tolist()):
        wanted = scalar_quantize(row, bits, x.dtype)
        codes, scale, zero = result
        assert (codes[i].tolist(), scale[i].item(), zero[i].item()) == wanted
        assert x_hat[i].tolist() == scalar_dequantize(*wanted, x.dtype)


@examples(120)
@given(groups, bit_widths)
def test_codes_scale_and_zero_equal_the_scalar_reference(x, bits):
    """Guards against any other order of rounding: half-up codes, a subtraction in float16, a scale
    divided by 2^bits, an epsilon in it."""
    assert_scalar_reference(x, bits)


@examples(60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8,
                max_size=8), st.sampled_from(DTYPES), bit_widths)
def test_arbitrary_finite_floats_equal_the_scalar_reference(values, dtype, bits):
    """Guards against a special case that `hostile_groups` does not think of."""
    info = torch.finfo(dtype)
    assert_scalar_reference(torch.tensor([values]).to(dtype).clamp(info.min, info.max), bits)


@examples(200)
@given(groups, bit_widths)
def test_round_trip_error_stays_within_the_derived_bound(x, bits):
    """Guards against codes of an unrounded scale, truncation, a symmetric range, a wrong top."""
    result = quantize_or_refuse(x, bits)
    if result is None:
        return
    codes, scale, zero = result
    x_hat = qz.dequantize(*result)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and int(codes.max()) < 2**bits
    assert scale.dtype == zero.dtype == x_hat.dtype == x.dtype
    assert scale.shape == zero.shape == (len(x), 1) and (scale > 0).all()
    error = (x.double() - x_hat.double()).abs()
    assert (error <= error_bound(x, x_hat, scale, bits)).all()


@examples(120)
@given(groups, bit_widths)
def test_quantizing_x_hat_again_gives_x_hat(x, bits):
    """Guards against a biased zero or scale: its error would grow with every rewriting."""
    result = quantize_or_refuse(x, bits)
    if result is None:
        return
    x_hat = qz.dequantize(*result)
    again = quantize_or_refuse(x_hat, bits)
    if again is None:
        return
    bound, stays = drift_bound(x_hat, result[1], bits)
    assert ((qz.dequantize(*again).double() - x_hat.double()).abs() <= bound).all()
    assert torch.equal(again[0][stays], result[0][stays])


@examples(60)
@given(st.sampled_from(DTYPES), bit_widths, st.sampled_from((0.25, 1.0, 2.0**-10)),
       st.integers(-20, 20), st.integers(0, 10**6))
def test_representable_levels_survive_exactly_and_forever(dtype, bits, step, offset, seed):
    """offset + c * step, step a power of two, is its own x_hat. Guards against an off-by-one top
    code or a lossy zero."""
    if dtype == torch.bfloat16:
        offset = 0  # its 8 bits hold 0 .. 255 and no offset
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 32), generator=generator, dtype=torch.uint8)
    codes[:, 0] = 0
    codes[:, 1] = 2**bits - 1
    x = ((codes.double() + offset) * step).to(dtype)
    first = qz.quantize(x, bits, 32)
    assert torch.equal(first[0], codes) and torch.equal(qz.dequantize(*first), x)
    assert (first[1] == step).all() and (first[2] == offset * step).all()


@every_dtype
@pytest.mark.parametrize("value", (0.0, -0.0, 1e-3, -7.0, "max", "-max", "tiny"))
def test_a_constant_group_is_exact(dtype, value):
    """Guards against 0 / 0 = NaN codes where max == min."""
    largest = torch.finfo(dtype).max
    number = {"max": largest, "-max": -largest, "tiny": SMALLEST[dtype]}.get(value, value)
    x = torch.full((2, 64), number, dtype=dtype)
    codes, scale, zero = qz.quantize(x, 2, 32)
    assert (codes == 0).all() and (scale == 1).all()
    assert torch.equal(qz.dequantize(codes, scale, zero), x)


def test_quantization_loses_something():
    """Guards against a silent no-op: 2 bits of Gaussian noise cost 0.39 of a standard deviation."""
    x = randn(64, 1024)
    error = (qz.dequantize(*qz.quantize(x, 2, 32)) - x).pow(2).mean().sqrt().item()
    assert 0.37 < error < 0.41


@examples(60)
@given(st.sampled_from((-1, 0, 1, 2, -2)), bit_widths, st.sampled_from((4, 8, 12)),
       st.permutations(range(4)), st.integers(0, 999))
def test_dim_and_the_order_of_groups_only_move_the_result(dim, bits, size, order, seed):
    """Guards against groups that leak into each other, and a `dim` honoured for codes only."""
    shape = [5, 5, 5]
    shape[dim] = 4 * size
    x = randn(*shape, seed=seed)
    flat = x.movedim(dim, -1).contiguous()
    got = qz.quantize(x, bits, size, dim)
    wanted = qz.quantize(flat, bits, size)
    for a, b in zip((*got, qz.dequantize(*got, dim)), (*wanted, qz.dequantize(*wanted))):
        assert torch.equal(a.movedim(dim, -1), b)
    shuffled = flat.unflatten(-1, (4, size))[..., list(order), :].flatten(-2)
    for a, b in zip(qz.quantize(shuffled, bits, size), wanted):
        assert torch.equal(a.unflatten(-1, (4, -1)), b.unflatten(-1, (4, -1))[..., list(order), :])


@pytest.mark.parametrize("low", (-65504.0, 0.0))
def test_float16_at_its_edge_stays_finite(low):
    """Guards against x_hat = inf: 65504 / 3 rounds up to 21840, and 3 * 21840 is no float16."""
    x = torch.full((1, 32), low, dtype=torch.float16)
    x[0, 1] = 65504
    x_hat = qz.dequantize(*qz.quantize(x, 2, 32))
    assert x_hat[0, 0] == low and x_hat[0, 1] == 65504


def test_packing_is_little_endian_inside_the_byte():
    """The official layout. Guards against what `unpack(pack(c)) == c` cannot see."""
    for bits, codes, packed in ((2, [0, 1, 2, 3], [0xE4]), (4, [1, 2, 15, 0], [0x21, 0x0F]),
                                (8, [7, 255], [7, 255])):
        assert qz.pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


@examples(60)
@given(bit_widths, st.integers(0, 2), st.lists(st.integers(1, 4), min_size=3, max_size=3),
       st.integers(0, 10**6))
def test_unpack_and_pack_are_inverse(bits, dim, shape, seed):
    """Both ways, along every dim. Guards against a code that spills into its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    per_byte = 8 // bits
    shape[dim] *= per_byte
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = qz.pack(codes, bits, dim)
    assert packed.dtype == torch.uint8 and packed.shape[dim] * per_byte == codes.shape[dim]
    assert torch.equal(qz.unpack(packed, bits, dim), codes)
    for i in range(packed.shape[dim]):  # byte by byte, in plain arithmetic
        fields = [codes.select(dim, i * per_byte + j).int() << bits * j for j in range(per_byte)]
        assert torch.equal(packed.select(dim, i).int(), sum(fields))
    anything = torch.randint(0, 256, packed.shape, generator=generator, dtype=torch.uint8)
    assert torch.equal(qz.pack(qz.unpack(anything, bits, dim), bits, dim), anything)


# ---- the caches: what they read -----------------------------------------------------------------

def check_reads(cache, name, q, k, v, lengths, tolerance=1e-5):
    """dequantized() is the closed form bit for bit, and attend is attention over it.

    Of a half-precision KiviCache the query goes in as float32, so that the tolerance is not spent
    on the rounding of q and of the result; in the cache's dtype it gives the same, rounded.
    """
    options = SHAPES[name][3]
    before = state(cache)
    assert cache.lengths == cache.pos.tolist() == list(lengths) and cache.length == max(lengths)
    k_read, v_read = cache.dequantized()
    assert k_read.shape == v_read.shape == (*k.shape[:2], max(lengths), k.shape[3])
    rounded = out = cache.attend(q)
    assert rounded.shape == q.shape and rounded.dtype == q.dtype
    if name in CASES:
        out = cache.attention(q.float(), cache.pos - 1, cache.tokens(cache.length))
        assert rel(rounded, out) <= HALF_EPS[q.dtype]
    for b, n in enumerate(lengths):
        wanted = k[b, :, :n], v[b, :, :n]
        if name in CASES:
            wanted = expected_reads(*wanted, **options)
        for x, y in zip((k_read, v_read), wanted):
            assert torch.equal(x[b, :, :n], y), f"row {b} at length {n}"
            assert not x[b, :, n:].any(), "padding shows"
        distance = rel(out[b, :, 0], attention64(q[b, :, 0], *wanted, options.get("sliding")))
        assert distance <= tolerance, f"attend of row {b} at length {n}: {distance}"
    assert_same(state(cache), before)


def check_cache(name="small window", dtype=torch.float32, every=1):
    """Three ragged rows, prefilled and then grown token by token, read after every few steps."""
    residual = CASES[name][3]["residual"]
    lengths = [1, residual - 1, residual + 18]
    steps = residual + 40
    q, k, v = make_tokens(name, 3, lengths[-1] + steps, dtype)
    cache = make_cache(name, 3, dtype=dtype)
    fill(cache, k, v, lengths)
    check_reads(cache, name, q, k, v, lengths)
    for step in range(steps):
        append(cache, k, v, lengths)
        lengths = [n + 1 for n in lengths]
        if step % every == 0 or any(n % residual < 2 for n in lengths):
            check_reads(cache, name, q, k, v, lengths)
    assert rel(cache.dequantized()[0][2], k[2]) > 0.001, "nothing was quantized"


@case
def test_every_step_reads_the_closed_form(name):
    """The official order bit for bit, in ragged rows: K exact from (T - 1) // R * R on, V for R + 1
    tokens.

    Guards against Algorithm 1's order (quantize, then attend), an off-by-one slot, a group shifted
    by the prompt's length, padding or sinks inside a minimum, a row that follows another's length.
    """
    check_cache(name, every=1 if CASES[name][3]["residual"] <= 32 else 5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("small window", "K 4 V 2", "8 bits", "4 sinks",
                                  "boosted, 4 sinks, values of 64", "sliding over sinks"))
def test_half_precision_reads_the_closed_form(name, dtype):
    """Guards against scales of another dtype than the tokens', and scores or sums in half."""
    check_cache(name, dtype, every=5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n_heads, n_kv_heads", ((4, 4), (4, 2), (4, 1), (8, 1), (6, 3), (1, 1),
                                                 (16, 2)))
def test_attend_equals_attention_for_every_head_grouping(n_heads, n_kv_heads, dtype, monkeypatch):
    """Guards against query head h reading KV head h % Hk, and a boundary right for one T only."""
    options = dict(group_size=32, residual=64)
    monkeypatch.setitem(CASES, "heads", (n_heads, n_kv_heads, 32, options))
    monkeypatch.setitem(SHAPES, "heads", CASES["heads"])
    lengths = (1, 63, 64, 65, 159, 1000)
    q = randn(6, n_heads, 1, 32, seed=3, dtype=dtype)
    k, v = (randn(6, n_kv_heads, 1000, 32, seed=seed, dtype=dtype) for seed in (0, 1))
    cache = make_cache("heads", 6, 1024, dtype)
    fill(cache, k, v, lengths)
    check_reads(cache, "heads", q, k, v, lengths)
    out, reads = cache.attend(q), cache.dequantized()
    for b, n in enumerate(lengths):  # through the interface alone; bfloat16 rounds the result
        wanted = attention64(q[b, :, 0], *(x[b, :, :n] for x in reads))
        assert rel(out[b, :, 0], wanted) <= (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_lossless_pattern_gives_attention_on_the_originals(bits):
    """K and V on 2^bits levels lose nothing. Guards against a biased dequantization, a dropped
    plane, tokens or channels in the wrong order: what a tolerance for noise would swallow."""
    top, group = 2**bits - 1, 32
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, top + 1, (2, 2, 2, 1000, 256), generator=generator).float()
    codes[0, :, :, ::group] = 0  # K: every group of tokens spans the range
    codes[0, :, :, 1::group] = top
    codes[1, ..., ::group] = top  # V: every group of channels
    codes[1, ..., 1::group] = 0
    k, v = (codes[0] - top // 2) / 2**bits, (codes[1] - 1) / 2**bits
    q = randn(2, 4, 1, 256, seed=5)
    cache = KiviCache(2, 2, 1024, 256, k_bits=bits, v_bits=bits, group_size=group, residual=32)
    fill(cache, k, v, (960, 500), steps=40)
    out = cache.attend(q)
    for b, n in enumerate((1000, 540)):
        for read, x in zip(cache.dequantized(), (k, v)):
            assert torch.equal(read[b, :, :n], x[b, :, :n])
        assert rel(out[b, :, 0], attention64(q[b, :, 0], k[b, :, :n], v[b, :, :n])) <= 1e-5


@pytest.mark.parametrize("loud", (5, 150, 199), ids=("quantized", "in the window", "the newest"))
def test_extreme_scores_do_not_overflow(loud):
    """Guards against a softmax without its maximum subtracted, or with that of one part only."""
    q, k, v = make_tokens("small window", 1, 200)
    k *= 0.1
    k[:, :, loud] = 50 * q[0, 0, 0]
    cache = make_cache()
    fill(cache, k, v, [190], steps=10)
    check_reads(cache, "small window", 20 * q, k, v, [200])


def test_a_long_row_is_the_same_in_pieces(monkeypatch):
    """Attention dequantizes 2 million numbers at a time, those of a few KV heads. Guards against
    one head's scales or order with another's codes, and last heads that are left out."""
    options = dict(group_size=32, residual=96, v_bits=4, boost=16)
    monkeypatch.setitem(CASES, "long", (8, 8, 64, options))
    monkeypatch.setitem(SHAPES, "long", CASES["long"])
    q, k, v = make_tokens("long", 1, 9000)
    q[..., 3::7] = 0  # or the first token, loud as it is, gets all of the weight
    cache = make_cache("long", 1, 9000)
    fill(cache, k, v, [9000])
    heads = [len(range(8)[part]) for part in cache.portions(9000)]
    assert heads == [3, 3, 2]
    check_reads(cache, "long", q, k, v, [9000])


@pytest.mark.parametrize("name", ("full", "full, sliding"))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)))
def test_full_cache_is_attention(name, dtype, tolerance):
    """The baseline itself. Guards against a comparison that is won against a wrong opponent."""
    q, k, v = make_tokens(name, 3, 200, dtype)
    cache = make_cache(name, 3, 256, dtype)
    fill(cache, k, v, (1, 60, 150))
    check_reads(cache, name, q, k, v, (1, 60, 150), tolerance)
    for step in range(50):
        append(cache, k, v, (1 + step, 60 + step, 150 + step))
    check_reads(cache, name, q, k, v, (51, 110, 200), tolerance)


@pytest.mark.parametrize("name", ("small groups", "4 bits", "8 bits", "K 4 V 2"))
@every_dtype
def test_the_bytes_are_codes_scales_and_zeros_where_the_docstring_says(name, dtype):
    """Field a of byte [j, i] is token (j P + a) G + i; scales and zeros are float16 for a half-
    precision cache, else float32, and lose nothing. Guards against another layout: one that its
    own reader understands, and `fused/` or a kernel on these buffers does not."""
    _, _, head_dim, options = CASES[name]
    group_size, residual = options["group_size"], options["residual"]
    n = 5 * residual  # whole groups of keys, but not whole bytes of them
    _, k, v = make_tokens(name, 2, n + residual, dtype)
    cache = make_cache(name, 2, dtype=dtype)
    fill(cache, k, v, (n + residual, n))
    t = torch.arange(n)
    for x, read, bits, dim in ((k, "k", options.get("k_bits", 2), 2),
                               (v, "v", options.get("v_bits", 2), 3)):
        codes, scale, zero = qz.quantize(x[:1, :, :n], bits, group_size, dim)
        packed, got_scale, got_zero = (getattr(cache, f"{read}_{part}")[:1]
                                       for part in ("packed", "scale", "zero"))
        stack, field = t // group_size // (8 // bits), t // group_size % (8 // bits)
        # K: scales [B, Hk, groups, 1, D]. V: [B, Hk, groups, D / G, G], codes [.., stacks, D, G].
        if read == "v":
            packed, got_scale, got_zero = packed.mT, got_scale.mT, got_zero.mT
        got_scale, got_zero = (y.flatten(2, 3)[:, :, :n] for y in (got_scale, got_zero))
        got = packed[:, :, stack, t % group_size] >> (field * bits)[:, None] & 2**bits - 1
        assert torch.equal(got, codes)
        for numbers, wanted in ((got_scale, scale), (got_zero, zero)):
            kept = torch.float32 if dtype == torch.float32 else torch.float16
            assert numbers.dtype == kept
            assert torch.equal(numbers[:, :, : wanted.shape[2]].float(), wanted.float())


def test_bfloat16_at_the_edge_of_float16_stays_finite():
    """65280 is the last bfloat16 that float16 metadata holds. Guards against an infinite scale."""
    q, k, v = make_tokens("small window", 1, 100, torch.bfloat16)
    k[:, :, ::2], v[..., ::2] = 65280, -65280
    k[:, :, 1::2], v[..., 1::2] = -65280, 65280
    cache = make_cache(dtype=torch.bfloat16)
    fill(cache, k, v, [70], steps=30)
    check_reads(cache, "small window", q, k, v, [100])


def test_tiny_bfloat16_numbers_lose_only_what_float16_cannot_hold():
    """float16 rounds scales and zeros below 2^-17 by 2^-25. Guards against codes that then stand
    for something else: of another scale, or of NaN where the scale is 0."""
    _, k, v = make_tokens("small window", 1, 100, torch.bfloat16)
    k, v = k * 2.0**-18, v * 2.0**-22
    cache = make_cache(dtype=torch.bfloat16)
    fill(cache, k, v, [70], steps=30)
    wanted = expected_reads(k[0], v[0], **CASES["small window"][3])
    for read, x in zip(cache.dequantized(), wanted):
        assert ((read[0] - x).abs() <= (3 + 1) * 2.0**-25).all()


# ---- the caches: state --------------------------------------------------------------------------

@case
@pytest.mark.parametrize("n_residuals, more", ((0, 1), (1, -1), (1, 0), (1, 1), (2, 31)))
def test_prefill_equals_appends_byte_for_byte(name, n_residuals, more, monkeypatch):
    """The state is a function of the tokens: prefill(L), L appends and every mix of them agree.

    Guards against a group that starts where the prompt ended, a second quantization, a stale slot,
    a long prompt that loses something between the pieces it is quantized in.
    """
    residual = CASES[name][3]["residual"]
    n = n_residuals * residual + more
    q, k, v = make_tokens(name, 1, n)
    states = []
    outs = []
    for fill_at_once in (qz.FILL, 1):
        monkeypatch.setattr(qz, "FILL", fill_at_once)
        for prompt in sorted({n, 1, n // 2, n // residual * residual, n - 1} - {0}):
            cache = make_cache(name)
            fill(cache, k, v, [prompt], n - prompt)
            states.append(state(cache))
            outs.append(cache.attend(q))
    for other, out in zip(states, outs):
        assert_same(other, states[0])
        assert rel(out, outs[0]) <= 1e-6


@pytest.mark.parametrize("name", ("small window", "4 sinks", "K 2 V 8", "full",
                                  "boosted, 4 sinks, values of 64"))
def test_a_row_of_a_batch_has_the_same_bytes_as_alone(name):
    """At any place in the batch. Guards against one length for all rows, a row that writes into its
    neighbours, and a `fill` of some rows that is not what a prefill of all of them writes."""
    lengths, order, steps = [1, 31, 40, 64, 100], [3, 0, 4, 2, 1], 30
    q, k, v = make_tokens(name, 5, 150)
    batch, moved, pieces = (make_cache(name, 5) for _ in range(3))
    fill(batch, k, v, lengths)
    for rows in (slice(0, 2), slice(2, 5)):
        ends = torch.tensor(lengths[rows])
        pieces.fill(k[rows, :, :100], v[rows, :, :100], torch.zeros_like(ends), ends, rows.start)
    pieces.pos.copy_(batch.pos)
    assert_same(state(pieces) | {"lengths": batch.pos}, state(batch))
    batch.reset()
    fill(batch, k, v, lengths, steps)
    fill(moved, k[order], v[order], [lengths[b] for b in order], steps)
    out = batch.attend(q)
    for b, n in enumerate(lengths):
        alone = make_cache(name)
        fill(alone, k[b : b + 1], v[b : b + 1], [n], steps)
        assert_same(row_state(alone, 0), row_state(batch, b))
        assert_same(row_state(alone, 0), row_state(moved, order.index(b)))
        assert rel(alone.attend(q[b : b + 1])[0], out[b]) <= 1e-6


@pytest.mark.parametrize("name", ("small window", "4 bits", "4 sinks",
                                  "boosted, 4 sinks, values of 64"))
def test_every_token_is_quantized_exactly_once(name):
    """What is read of a token changes once, from exact to its code. Guards against a group that is
    quantized again (at 2 bits it drifts), and one that never is."""
    options = CASES[name][3]
    residual, sink = options["residual"], options.get("sink", 0)
    n = 5 * residual
    _, k, v = make_tokens(name, 1, n)
    cache = make_cache(name)
    changes = torch.zeros(2, n)
    before = [k[0, :, :0], v[0, :, :0]]
    for t in range(n):
        (append if t else fill)(cache, k, v, [t] if t else [1])
        for i, (read, exact) in enumerate(zip(cache.dequantized(), (k, v))):
            assert torch.equal(read[0, :, t], exact[0, :, t]), "the newest token is not exact"
            changes[i, :t] += (read[0, :, :t] != before[i]).any(-1).any(0)
            before[i] = read[0]
    token = torch.arange(n)
    for count, boundary in zip(changes, ((n - 1) // residual * residual, n - residual - 1)):
        assert torch.equal(count, ((token >= sink) & (token < boundary)).float())


@pytest.mark.parametrize("name", ("4 sinks", "boosted", "full"))
def test_reset_leaves_no_trace(name):
    """Guards against stale codes, slots or positions in the second conversation."""
    _, k, v = make_tokens(name, 2, 200)
    used, fresh = make_cache(name, 2), make_cache(name, 2)
    lengths = used.lengths
    fill(used, k * 7, v * 7, (120, 90), steps=60)
    used.reset()
    assert used.length == 0 and used.lengths is lengths == [0, 0]
    assert_same(state(used), state(fresh))
    for cache in (used, fresh):
        fill(cache, k, v, (3, 40), steps=30)
    assert_same(state(used), state(fresh))


@pytest.mark.parametrize("name", ("small window", "boosted, 4 sinks, values of 64"))
def test_a_parked_row_disturbs_no_other(name):
    """Guards against a finished row that runs into the others, or still counts as the longest."""
    q, k, v = make_tokens(name, 2, 200)
    cache = make_cache(name, 2)
    fill(cache, k, v, (150, 40))
    cache.park(0)
    assert cache.lengths == cache.pos.tolist() == [0, 40]
    for step in range(60):
        append(cache, k, v, (150 % 200, 40 + step))
    wanted = expected_reads(k[1, :, :100], v[1, :, :100], **CASES[name][3])
    for read, x in zip(cache.dequantized(), wanted):
        assert torch.equal(read[1], x)
    assert rel(cache.attend(q)[1, :, 0], attention64(q[1, :, 0], *wanted)) <= 1e-5


@pytest.mark.parametrize("name", ("small window", "boosted, 4 sinks, values of 64"))
def test_a_parked_cache_starts_over(name):
    """Guards against old codes under the new ones: nothing but their lengths says they are old."""
    q, k, v = make_tokens(name, 2, 300)
    cache = make_cache(name, 2)
    fill(cache, k.flip(2), v.flip(2), (300, 290))
    cache.park(0)
    cache.park(1)
    fill(cache, k, v, (20, 70), steps=140)
    check_reads(cache, name, q, k, v, [160, 210])


@pytest.mark.parametrize("max_len", (200, 300))
def test_tokens_that_never_fill_a_block_need_no_codes(max_len):
    """One row is in a block of keys that stays incomplete, behind the room for codes, while another
    gets codes. Guards against codes written there, and codes that only the window needs."""
    q, k, v = make_tokens("paper", 2, max_len)
    cache = make_cache("paper", 2, max_len)
    whole = max_len // 128 * 128
    lengths = [whole - 5, max_len - 20]
    assert cache.capacity == whole
    fill(cache, k, v, lengths, steps=20)
    check_reads(cache, "paper", q, k, v, [n + 20 for n in lengths])


class CacheMachine(RuleBasedStateMachine):
    """Any order of prefills, appends, extensions, forks, moves and resets of two ragged rows. After
    every step the cache is compared with the closed form, and with a new one that got the same
    tokens in one prefill."""

    capacity = 224

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = make_tokens(self.name, 2, self.capacity)
        self.cache = make_cache(self.name, 2, self.capacity)
        self.lengths = [0, 0]

    @precondition(lambda self: not self.cache.length)
    @rule(first=st.integers(1, 100), second=st.integers(1, 100))
    def prefill(self, first, second):
        self.lengths = [first, second]
        fill(self.cache, self.k, self.v, self.lengths)

    @rule(n=st.sampled_from((1, 1, 2, 15, 31, 32, 33)))
    def append(self, n):
        for _ in range(min(n, self.capacity - max(self.lengths))):
            append(self.cache, self.k, self.v, self.lengths)
            self.lengths = [m + 1 for m in self.lengths]

    @rule(new=st.tuples(st.integers(0, 70), st.integers(0, 70)))
    def extend(self, new):
        new = [min(more, self.capacity - n) for more, n in zip(new, self.lengths)]
        if max(new):
            extend(self.cache, self.k, self.v, self.lengths, new)
            self.lengths = [n + more for n, more in zip(self.lengths, new)]

    @precondition(lambda self: min(self.lengths))
    @rule(row=st.integers(0, 1))
    def fork(self, row):
        self.cache.fork(row, [1 - row])
        self.k[1 - row], self.v[1 - row] = self.k[row], self.v[row]
        self.lengths[1 - row] = self.lengths[row]

    @rule()
    def move(self):
        saved, self.cache = self.cache.state(), make_cache(self.name, 2, self.capacity)
        self.cache.load_state(saved)

    @precondition(lambda self: self.cache.length)
    @rule()
    def second_prefill(self):
        before = state(self.cache)
        refused(lambda: fill(self.cache, self.k, self.v, [5, 5]), "reset")
        assert_same(state(self.cache), before)

    @precondition(lambda self: self.cache.length == self.capacity)
    @rule()
    def overflow(self):
        before = state(self.cache)
        refused(lambda: append(self.cache, self.k, self.v, [0, 0]), self.capacity)
        assert_same(state(self.cache), before)

    @rule()
    def reset(self):
        self.cache.reset()
        self.lengths = [0, 0]

    @invariant()
    def reads_the_closed_form(self):
        if max(self.lengths):
            check_reads(self.cache, self.name, self.q, self.k, self.v, self.lengths)
        if min(self.lengths):
            other = make_cache(self.name, 2, self.capacity)
            fill(other, self.k, self.v, self.lengths)
            assert_same(state(self.cache), state(other))


@pytest.mark.parametrize("name", ("small groups", "boosted, 4 sinks, values of 64"))
def test_any_mix_of_operations_gives_the_same_state(name):
    """Guards against a dependence on history that no fixed schedule reaches."""
    machine = type("Machine", (CacheMachine,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(examples(20), stateful_step_count=10))


# ---- memory -------------------------------------------------------------------------------------

def owned_tensors(thing):
    """Every tensor reachable from an object's attributes, buffers and containers."""
    found = []
    stack = [thing]
    while stack:
        x = stack.pop()
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (dict, torch.nn.Module)):
            stack += (x if isinstance(x, dict) else vars(x)).values()
        elif isinstance(x, (list, tuple)):
            stack += x
    return found


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("batch, max_len", ((1, 6144), (3, 4001), (2, 70)))
@pytest.mark.parametrize("name", SHAPES)
def test_nbytes_is_the_closed_form(name, batch, max_len, dtype):
    """Guards against a second copy of the codes, an int32 code, metadata in float32, and columns
    for low halves that no channel has."""
    _, n_kv_heads, head_dim, options = SHAPES[name]
    shape = (batch, n_kv_heads, max_len, head_dim)
    cache = make_cache(name, batch, max_len, dtype)
    if name in CASES:
        wanted = kivi_bytes(*shape, dtype, cache.block, **options)
        unit = math.lcm(options["residual"], 4 * options["group_size"])
        assert cache.block % unit == 0  # whole blocks of keys, and whole bytes at 2 bits
        assert cache.block <= max(512, unit, max_len / 4)  # so a short row reads little
    else:
        wanted = full_bytes(*shape, dtype)
    assert cache.nbytes == sum(wanted.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in owned_tensors(cache)}
    assert cache.nbytes == sum(storages.values()), "something is missing from nbytes"


@pytest.mark.parametrize("name", ("small window", "full"))
def test_buffers_never_grow_and_never_move(name):
    """Guards against buffers that are concatenated, replaced, cast or moved."""
    _, k, v = make_tokens(name, 1, 200)
    cache = make_cache(name)
    before = cache.nbytes, [buffer.data_ptr() for buffer in cache.buffers()]
    fill(cache, k, v, [60], steps=140)
    cache.reset()
    assert (cache.nbytes, [buffer.data_ptr() for buffer in cache.buffers()]) == before
    with pytest.raises(RuntimeError, match="moved or cast"):
        cache.to(torch.float64)


def test_the_presets_are_the_documented_ones():
    """Guards against a preset that drifts away from the paper, or from the figures measured."""
    presets = {name: tuple(vars(config).values()) for name, config in kivi.PRESETS.items()}
    assert presets == {
        "kivi2": (2, 2, 32, 128, 0, 0, 0), "kivi2+": (2, 2, 32, 128, 4, 0.25, 64),
        "kivi2-": (2, 2, 64, 128, 4, 0.25, 64),
        "kivi4": (4, 4, 32, 128, 0, 0, 0), "k4v2": (4, 2, 32, 128, 0, 0, 0)}
