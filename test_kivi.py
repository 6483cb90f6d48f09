"""Run: pytest test_kivi.py        (about 3 minutes on two cores; KIVI_SLOW=1 adds the long ones; no network, no GPU needed)

The code under test is compared with references written here in plain Python or plain PyTorch, never with itself:
`ref_group` (scalar quantizer), `ref_read` (what a cache of T tokens shows), `dense_attention`, `RefKivi` and `RefLlama`
(a Llama with the official KIVI order, token by token, on Python lists). Every docstring says which bug its test guards against.
"""
import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import kivi
import quantize as qz
from kivi import FullCache, KiviCache

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared" / "checkpoints"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examples(n):
    """Hypothesis settings: n examples, always the same ones."""
    return settings(deadline=None, derandomize=True, max_examples=n, database=None, suppress_health_check=list(HealthCheck))


slow = pytest.mark.skipif(os.environ.get("KIVI_SLOW") != "1", reason="long: set KIVI_SLOW=1")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# ---- references --------------------------------------------------------------------------------------------------------------

def f32(x):
    """A Python float rounded to float32 (half to even); double rounding is harmless because 53 >= 2 * 24 + 2."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def round_to(dtype, x):
    """A float32 value rounded to `dtype`, half to even, by its bits."""
    if dtype == torch.float32 or not math.isfinite(x):
        return x
    if dtype == torch.float16:
        try:
            return struct.unpack("<e", struct.pack("<e", x))[0]
        except OverflowError:
            return math.copysign(math.inf, x)
    word = struct.unpack("<I", struct.pack("<f", x))[0]
    word = word + 0x7FFF + (word >> 16 & 1) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", word))[0]


def smallest(dtype):
    """The smallest subnormal of `dtype`, from its exponent and mantissa widths."""
    return {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[dtype]


def unit(dtype):
    """u: half the distance between 1 and the next number."""
    return {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]


def ref_group(values, bits, dtype):
    """One group, scalar by scalar: (codes, scale, zero). The formula of the paper, against the stored scale, in float32."""
    top = 2**bits - 1
    low, high = min(values), max(values)
    if high == low:
        scale = 1.0
    else:
        scale = round_to(dtype, f32(f32(high - low) / top)) or smallest(dtype)
    codes = []
    for x in values:
        r = f32(f32(x - low) / scale)
        codes.append(round(min(max(r, 0.0), top)))  # Python rounds half to even
    return codes, scale, low


def ref_dequantize(codes, scale, zero, dtype):
    limit = torch.finfo(dtype).max  # a scale that was rounded up may carry the top code past the last finite number
    return [min(max(round_to(dtype, f32(f32(c * scale) + zero)), -limit), limit) for c in codes]


def ref_fake(x, bits, kept=None):
    """x [..., G] quantized and dequantized as one group a row, vectorized, in float32; kept [G] bool: what counts for min and max."""
    top = 2**bits - 1
    y = x.float()
    low, high = y, y
    if kept is not None:
        low, high = y.masked_fill(~kept, math.inf), y.masked_fill(~kept, -math.inf)
    low, high = low.min(-1, keepdim=True).values, high.max(-1, keepdim=True).values
    scale = ((high - low) / top).to(x.dtype).float()
    scale[scale == 0] = smallest(x.dtype)
    scale[high == low] = 1.0
    codes = torch.round(torch.minimum(torch.maximum((y - low) / scale, torch.tensor(0.0)), torch.tensor(float(top))))
    return codes * scale + low


def ref_read(k, v, k_bits=2, v_bits=2, group_size=32, residual=128, sink=0):
    """What the last attention step over ONE row's tokens reads, in float32: k, v [Hk, T, D] -> the same shapes.

    Keys at or after ((T - 1) // R) * R are exact (the flush comes after the attention of its step), values of the last R + 1
    tokens are exact, the first S tokens are exact; the rest went through the quantizer once, from the exact numbers.
    """
    n_tokens, n_channels = k.shape[1:]
    k_out, v_out = k.to(torch.float32, copy=True), v.to(torch.float32, copy=True)
    token = torch.arange(n_tokens)
    for start in range(0, (n_tokens - 1) // residual * residual, group_size):
        stop = start + group_size
        if stop <= sink:
            continue
        kept = token[start:stop] >= sink
        group = ref_fake(k[:, start:stop].transpose(1, 2), k_bits, kept).transpose(1, 2)  # [Hk, G, D], one scale a channel
        k_out[:, start:stop][:, kept] = group[:, kept]
    old = (token < n_tokens - residual - 1) & (token >= sink)
    for c in range(0, n_channels, group_size):
        v_out[:, old, c:c + group_size] = ref_fake(v[:, old, c:c + group_size], v_bits)
    return k_out, v_out


def dense_attention(q, k, v):
    """float32 attention of one row: q [H, D], k, v [Hk, T, D] -> [H, D]; query head h reads KV head h // (H / Hk)."""
    out = []
    for h in range(q.shape[0]):
        kh, vh = k[h * k.shape[0] // q.shape[0]].float(), v[h * v.shape[0] // q.shape[0]].float()
        p = torch.softmax(kh @ q[h].float() / math.sqrt(q.shape[1]), 0)
        out.append(p @ vh)
    return torch.stack(out)


def rel(a, b):
    """Relative L2 distance of a from the reference b."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def keys_like(*shape, seed=0, dtype=torch.float32):
    """Random K with a few large channels, as real keys have: a wrong axis of the scale then shows."""
    loud = 1 + 9 * (torch.arange(shape[-1]) % 7 == 3)
    return (randn(*shape, seed=seed) * loud + 0.5 * loud).to(dtype)


# ---- the quantizer ------------------------------------------------------------------------------------------------------------

KINDS = ("normal", "constant", "outlier", "offset", "large", "edge", "denormal", "levels", "two", "zeros")


def make_groups(kind, n, size, dtype, seed):
    """n groups of adversarial numbers, [n, size] in dtype."""
    info = torch.finfo(dtype)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=g)
    if kind == "constant":
        x = x[:, :1].expand(n, size) * 10.0 ** (seed % 9 - 4)
    elif kind == "outlier":
        x[torch.arange(n), torch.randint(size, (n,), generator=g)] *= 1000
    elif kind == "offset":  # range far below the rounding of the offset
        x = x + 300
    elif kind == "large":
        x = x * (info.max / 32)
    elif kind == "edge":  # the last numbers before overflow, of both signs or of one
        steps = torch.randint(0, 4, (n, size), generator=g).double() * info.eps * info.max
        x = (info.max - steps) * (torch.randint(0, 2, (n, size), generator=g) * 2 - 1 if seed % 2 else torch.randint(0, 2, (n, size), generator=g))
    elif kind == "denormal":
        x = torch.randint(-9, 10, (n, size), generator=g).double() * smallest(dtype) * 3 ** (seed % 6)
    elif kind == "levels":
        x = torch.randint(0, 4, (n, size), generator=g).float() * 0.25 - 1
    elif kind == "two":
        x = torch.randint(0, 2, (n, size), generator=g).float() * x[:, :1] + 1
    elif kind == "zeros":
        x = torch.zeros(n, size) * (torch.randint(0, 2, (n, size), generator=g) * 2 - 1)  # zeros of both signs
    return x.to(dtype)


groups = st.builds(make_groups, st.sampled_from(KINDS), st.integers(1, 3), st.sampled_from((4, 16, 32, 128)), st.sampled_from(DTYPES),
                   st.integers(0, 10**6))
bit_widths = st.sampled_from((2, 4, 8))


def quantize_or_refuse(x, bits, size):
    """quantize, or None where a ValueError is right: the range of a group overflows float32."""
    fits = all(math.isfinite(f32(max(row) - min(row))) for row in x.reshape(-1, size).tolist())
    try:
        result = qz.quantize(x, bits, size)
    except ValueError:
        assert not fits, "finite numbers with a finite range were refused"
        return None
    assert fits, "a range that overflows float32 was accepted"
    return result


def error_bound(x, x_hat, scale, bits):
    """The derived bound of |x - x_hat|, element by element, in float64.

    Let e = 2^-24 (float32), u the dtype's, t its smallest subnormal, top = 2^bits - 1, range = max - min = top * s_exact.
    stored scale  s = round(range / top): |s - s_exact| <= max(s * (u + 2e), t / 2); the clamp to t only acts where s_exact < t / 2,
                  and then (x - zero) / t is an integer, so nothing is lost
    the code      where (x - zero) / s <= top, rounding loses s / 2 (and 2 e top s: subtraction and division are in float32);
                  beyond top the clamp loses x - zero - top * s <= top * (s_exact - s). One or the other, never the sum.
    x_hat         code * s and + zero are rounded to float32 (top * s * e, |x_hat| * e), then to the dtype: max(u |x_hat|, t / 2)
    The zero costs nothing: it is an element of the group.
    """
    top, e, u, t = 2**bits - 1, 2.0**-24, unit(x.dtype), smallest(x.dtype)
    s = scale.double()
    code = torch.maximum(s / 2 + 2 * e * top * s, top * torch.maximum(s * (u + 2 * e), torch.full_like(s, t / 2)))
    return (code + top * s * e + (u + e) * x_hat.double().abs() + t / 2) * (1 + 2.0**-20)


@examples(200)
@given(groups, bit_widths)
def test_round_trip_error_stays_within_the_derived_bound(x, bits):
    """Guards against codes computed with an unrounded scale, truncation in place of rounding, a symmetric range, a wrong top code."""
    size = x.shape[1]
    result = quantize_or_refuse(x, bits, size)
    if result is None:
        return
    codes, scale, zero = result
    x_hat = qz.dequantize(codes, scale, zero)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and int(codes.max()) <= 2**bits - 1
    assert scale.dtype == zero.dtype == x_hat.dtype == x.dtype and scale.shape == zero.shape == (x.shape[0], 1)
    assert (scale > 0).all() and torch.isfinite(x_hat).all()
    error = (x.double() - x_hat.double()).abs()
    bound = error_bound(x, x_hat, scale, bits)
    assert (error <= bound).all(), f"error {error.max()} above the bound, {(error / bound).max()} times"


@examples(120)
@given(groups, bit_widths)
def test_codes_scale_and_zero_equal_the_scalar_reference(x, bits):
    """Guards against any other rounding order: half-up codes, a float16 subtraction, a scale divided by 2^bits, an epsilon in it."""
    result = quantize_or_refuse(x, bits, x.shape[1])
    if result is None:
        return
    codes, scale, zero = result
    x_hat = qz.dequantize(codes, scale, zero)
    for i, row in enumerate(x.tolist()):
        want_codes, want_scale, want_zero = ref_group(row, bits, x.dtype)
        assert codes[i].tolist() == want_codes
        assert scale[i].item() == want_scale and zero[i].item() == want_zero
        assert x_hat[i].tolist() == ref_dequantize(want_codes, want_scale, want_zero, x.dtype)


@examples(60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8), st.sampled_from(DTYPES), bit_widths)
def test_arbitrary_finite_floats_equal_the_scalar_reference(values, dtype, bits):
    """Guards against a special case that `make_groups` did not think of (hypothesis shrinks to it)."""
    x = torch.tensor([values]).to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    result = quantize_or_refuse(x, bits, 8)
    if result is not None:
        want_codes, want_scale, want_zero = ref_group(x[0].tolist(), bits, dtype)
        assert (result[0][0].tolist(), result[1].item(), result[2].item()) == (want_codes, want_scale, want_zero)


@examples(120)
@given(groups, bit_widths)
def test_quantizing_x_hat_again_gives_x_hat(x, bits):
    """Idempotence. Guards against a biased zero or scale, whose error would grow every time a cache is read and written again.

    x_hat = zero + c s + d, |d| <= u M (M = max |x_hat|). Code 0 and code top both occur, so the second range is top s + d' and
    the second scale, the number nearest to s + d' / top, is off by at most twice d' / top. So the codes are the same where
    s / 2 > 3 u M, and x_hat moves by at most 4 u M; where s is smaller, by half a step, which is then below 3 u M: the same 4 u M.
    float32 rounds product, sum and range as well (13 u M in all); a subnormal scale is off by t / 2, times top. The top code can
    be missing when top * u > 1/2 (8 bits in bfloat16): the second scale is then smaller by up to 1 / 255, a step at the top.
    """
    result = quantize_or_refuse(x, bits, x.shape[1])
    if result is None:
        return
    codes, scale, zero = result
    x_hat = qz.dequantize(codes, scale, zero)
    again = quantize_or_refuse(x_hat, bits, x.shape[1])
    if again is None:
        return
    u, t, top = unit(x.dtype), smallest(x.dtype), 2**bits - 1
    moves = 16 if x.dtype == torch.float32 else 4.01
    biggest = x_hat.double().abs().amax(1, keepdim=True)
    drift = (qz.dequantize(*again).double() - x_hat.double()).abs()
    step = scale.double() if top * u > 0.49 else 0
    assert (drift <= moves * u * biggest + top * t + step).all()
    clear = (scale.double() > 2.1 * moves * u * biggest) & (scale.double() >= torch.finfo(x.dtype).smallest_normal) & (top * u < 0.49)
    assert torch.equal(again[0][clear.expand_as(codes)], codes[clear.expand_as(codes)])


@examples(60)
@given(st.sampled_from(DTYPES), bit_widths, st.sampled_from((0.25, 1.0, 2.0**-10)), st.integers(-20, 20), st.integers(0, 10**6))
def test_representable_levels_survive_exactly_and_forever(dtype, bits, step, offset, seed):
    """Numbers offset + c * step with step a power of two are their own x_hat; guards against an off-by-one top code or a lossy zero."""
    if dtype == torch.bfloat16:
        offset = 0  # 8 bits of mantissa hold 0 .. 255 and no offset
    codes = torch.randint(0, 2**bits, (3, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    x = (codes.double() * step + offset * step).to(dtype)
    got, scale, zero = qz.quantize(x, bits, 32)
    assert torch.equal(got, codes) and (scale == step).all() and (zero == offset * step).all()
    x_hat = qz.dequantize(got, scale, zero)
    assert torch.equal(x_hat, x)
    again = qz.quantize(x_hat, bits, 32)
    assert all(torch.equal(a, b) for a, b in zip(again, (got, scale, zero)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", (0.0, -0.0, 1e-3, -7.0, "max", "-max", "tiny"))
def test_a_constant_group_is_exact(dtype, value):
    """Guards against 0 / 0 = NaN codes where max == min (kivi-algorithm.md, pitfall 3)."""
    number = {"max": torch.finfo(dtype).max, "-max": -torch.finfo(dtype).max, "tiny": smallest(dtype)}.get(value, value)
    x = torch.full((2, 64), number, dtype=dtype)
    codes, scale, zero = qz.quantize(x, 2, 32)
    assert (codes == 0).all() and (scale == 1).all() and torch.equal(qz.dequantize(codes, scale, zero), x)


def test_quantization_loses_something():
    """Guards against a silent no-op: 2 bits of Gaussian noise must cost about 0.39 of a standard deviation."""
    x = randn(64, 1024)
    error = (qz.dequantize(*qz.quantize(x, 2, 32)) - x).pow(2).mean().sqrt().item()
    assert 0.37 < error < 0.41


@examples(60)
@given(st.sampled_from((-1, 0, 1, 2, -2)), bit_widths, st.sampled_from((4, 8, 12)), st.permutations(range(4)), st.integers(0, 999))
def test_dim_and_the_order_of_groups_only_move_the_result(dim, bits, size, order, seed):
    """Guards against groups that leak into each other and against a `dim` that is honoured for the codes but not for the scale."""
    x = randn(4 * size, 4 * size, 4 * size, seed=seed)[:, :5, :3] if dim in (0,) else randn(*[4 * size if i == dim % 3 else 5 for i in range(3)], seed=seed)
    codes, scale, zero = qz.quantize(x, bits, size, dim)
    flat = x.movedim(dim, -1).contiguous()
    want = qz.quantize(flat, bits, size)
    assert all(torch.equal(a.movedim(dim, -1), b) for a, b in zip((codes, scale, zero), want))
    assert torch.equal(qz.dequantize(codes, scale, zero, dim).movedim(dim, -1), qz.dequantize(*want))
    shuffled = flat.unflatten(-1, (4, size))[..., list(order), :].flatten(-2)
    for a, b in zip(qz.quantize(shuffled, bits, size), want):
        assert torch.equal(a.unflatten(-1, (4, -1)), b.unflatten(-1, (4, -1))[..., list(order), :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("whole_group", (False, True), ids=("one element", "whole group"))
def test_nan_and_inf_are_refused(dtype, bad, whole_group):
    """Guards against a poisoned group that is stored in silence: NaN compares false, so a check of the scale alone misses it."""
    x = randn(2, 64, dtype=dtype)
    x[1, 32:64 if whole_group else 33] = bad
    with pytest.raises(ValueError, match=r"(?i)nan|inf"):
        qz.quantize(x, 2, 32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_range_that_overflows_is_refused(dtype):
    """Guards against an infinite scale, and with it NaN, from finite numbers (pitfall 4)."""
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 0], x[0, 1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    with pytest.raises(ValueError):
        qz.quantize(x, 2, 32)


@pytest.mark.parametrize("low", (-65504.0, 0.0))
def test_float16_at_its_edge_stays_finite(low):
    """Guards against x_hat = inf: (65504 - 0) / 3 rounds up to 21840 and 3 * 21840 no longer fits float16."""
    x = torch.full((1, 32), low, dtype=torch.float16)
    x[0, 1] = 65504
    x_hat = qz.dequantize(*qz.quantize(x, 2, 32))
    assert x_hat[0, 0] == low and x_hat[0, 1] == 65504


@pytest.mark.parametrize("bits", (0, 1, 3, 5, 16, -2))
def test_other_bit_widths_are_refused_by_name(bits):
    """Guards against 3 bits packed as if they were 4, or a KeyError in place of a sentence."""
    x = torch.zeros(1, 48)
    for call in (lambda: qz.quantize(x, bits, 16), lambda: qz.pack(x.to(torch.uint8), bits), lambda: qz.unpack(x.to(torch.uint8), bits)):
        with pytest.raises(ValueError, match=rf"(?<!\d){bits}\b") as info:
            call()
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("n, size", ((33, 32), (31, 32), (64, 48), (64, 0), (64, -32)))
def test_a_group_that_does_not_fit_is_refused_by_name(n, size):
    """Guards against a silently shorter last group (pitfalls 8 and 10)."""
    with pytest.raises(ValueError) as info:
        qz.quantize(torch.zeros(2, n), 2, size)
    assert str(n) in str(info.value) and str(size) in str(info.value) and "\n" not in str(info.value)


def test_dequantize_refuses_scales_of_other_groups():
    """Guards against broadcasting a scale over codes it does not belong to."""
    with pytest.raises(ValueError):
        qz.dequantize(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 3), torch.zeros(2, 3))


# ---- packing ------------------------------------------------------------------------------------------------------------------

def test_packing_is_little_endian_inside_the_byte():
    """The check value of the official layout; guards against big-endian packing, which `unpack(pack(c)) == c` cannot see."""
    assert qz.pack(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 2).tolist() == [0xE4]
    assert qz.pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert qz.pack(torch.tensor([7, 255], dtype=torch.uint8), 8).tolist() == [7, 255]


@examples(60)
@given(bit_widths, st.integers(0, 2), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 10**6))
def test_unpack_and_pack_are_inverse(bits, dim, shape, seed):
    """unpack(pack(c)) == c and pack(unpack(p)) == p along every dim; guards against a code that spills into its neighbour."""
    g = torch.Generator().manual_seed(seed)
    per = 8 // bits
    shape[dim] *= per
    codes = torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)
    packed = qz.pack(codes, bits, dim)
    assert packed.dtype == torch.uint8 and packed.shape[dim] * per == codes.shape[dim]
    assert torch.equal(qz.unpack(packed, bits, dim), codes)
    for index in range(packed.shape[dim]):  # byte by byte, in plain arithmetic
        want = sum(codes.select(dim, index * per + j).int() * 2 ** (bits * j) for j in range(per))
        assert torch.equal(packed.select(dim, index).int(), want)
    anything = torch.randint(0, 256, packed.shape, generator=g, dtype=torch.uint8)
    assert torch.equal(qz.pack(qz.unpack(anything, bits, dim), bits, dim), anything)


@pytest.mark.parametrize("n, bits", ((3, 2), (5, 2), (1, 4)))
def test_codes_that_do_not_fill_a_byte_are_refused(n, bits):
    """Guards against dropped codes at the end."""
    with pytest.raises(ValueError, match=str(n)):
        qz.pack(torch.zeros(n, dtype=torch.uint8), bits)


# ---- the caches: what they read ---------------------------------------------------------------------------------------------------

CASES = {  # name: (H, Hk, D, options)
    "paper": (4, 2, 32, dict(group_size=32, residual=128)),
    "small window": (4, 2, 32, dict(group_size=32, residual=32)),
    "small groups": (2, 2, 64, dict(group_size=16, residual=32)),
    "groups of 64": (4, 1, 64, dict(group_size=64, residual=64)),
    "groups of 128": (2, 1, 128, dict(group_size=128, residual=128)),
    "4 bits": (4, 2, 32, dict(k_bits=4, v_bits=4, group_size=16, residual=48)),
    "8 bits": (4, 2, 32, dict(k_bits=8, v_bits=8, group_size=16, residual=32)),
    "K 4 V 2": (8, 2, 32, dict(k_bits=4, v_bits=2, group_size=32, residual=64)),
    "K 2 V 8": (4, 2, 32, dict(k_bits=2, v_bits=8, group_size=16, residual=32)),
    "4 sinks": (4, 2, 32, dict(group_size=16, residual=32, sink=4)),
    "40 sinks": (4, 2, 32, dict(group_size=16, residual=32, sink=40)),  # one whole group and a half
    "D 96": (6, 3, 96, dict(group_size=32, residual=64)),
    "D 80": (2, 1, 80, dict(group_size=16, residual=32)),
}
case = pytest.mark.parametrize("name", CASES)


def make_cache(name="small window", batch=1, max_len=512, dtype=torch.float32, device="cpu"):
    _, n_kv_heads, head_dim, options = CASES[name]
    return KiviCache(batch, n_kv_heads, max_len, head_dim, dtype=dtype, device=device, **options)


def make_tokens(name, batch, n_tokens, dtype=torch.float32, seed=0):
    """(q [B, H, 1, D], k, v [B, Hk, T, D]) of a case: loud K channels, and a first token ten times as large as the others."""
    n_heads, n_kv_heads, head_dim, _ = CASES[name]
    k = keys_like(batch, n_kv_heads, n_tokens, head_dim, seed=seed)
    k[:, :, 0] *= 10
    v = randn(batch, n_kv_heads, n_tokens, head_dim, seed=seed + 1)
    return randn(batch, n_heads, 1, head_dim, seed=seed + 2, dtype=dtype), k.to(dtype), v.to(dtype)


def fill(cache, k, v, lengths, steps=0):
    """A right-padded prefill of `lengths` tokens of each row, then `steps` tokens one by one. The padding is loud."""
    start, longest = torch.tensor(lengths), max(lengths)
    k0, v0 = k[:, :, :longest].clone(), v[:, :, :longest].clone()
    for b, n in enumerate(lengths):
        k0[b, :, n:], v0[b, :, n:] = 1e4, -1e4
    cache.prefill(k0, v0, start)
    for step in range(steps):
        append(cache, k, v, start + step)


def append(cache, k, v, at):
    """Appends token at[b] of row b."""
    cache.append(*(torch.stack([x[b, :, t:t + 1] for b, t in enumerate(at.tolist())]) for x in (k, v)))


def state(cache):
    """Every tensor that the cache owns, by name."""
    return {name: tensor.clone() for name, tensor in cache.named_buffers()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


def check_reads(cache, q, k, v, lengths, options, tolerance=1e-5):
    """dequantized() is what the closed form says, bit for bit, and attend is float32 attention over it.

    The query goes in as float32, so that the tolerance is not spent on the rounding of q and of the result; a query in the
    cache's dtype must give the same, rounded. dequantized() rounds x_hat to the cache's dtype, attend need not.
    """
    assert list(cache.lengths) == list(lengths) and cache.length == max(lengths)
    k_read, v_read = cache.dequantized()
    assert k_read.shape == v_read.shape == (len(lengths), k.shape[1], max(lengths), k.shape[3])
    rounded, out = cache.attend(q), cache.attend(q.float())
    assert rounded.shape == q.shape and rounded.dtype == q.dtype and k_read.dtype == v_read.dtype == k.dtype
    assert rel(rounded, out) <= unit(q.dtype)
    for b, n in enumerate(lengths):
        want_k, want_v = ref_read(k[b, :, :n], v[b, :, :n], **options) if options is not None else (k[b, :, :n], v[b, :, :n])
        assert torch.equal(k_read[b, :, :n], want_k.to(k.dtype)), f"K of row {b} at length {n}"
        assert torch.equal(v_read[b, :, :n], want_v.to(v.dtype)), f"V of row {b} at length {n}"
        assert not k_read[b, :, n:].any() and not v_read[b, :, n:].any(), "padding shows"
        distance = rel(out[b, :, 0], dense_attention(q[b, :, 0], want_k, want_v))
        assert distance <= tolerance, f"attend of row {b} at length {n}: {distance}"
    assert torch.equal(cache.attend(q), rounded), "attend changed something"


def check_cache(name="small window", dtype=torch.float32, every=1):
    """A ragged batch of three rows, prefilled and then grown token by token, read after every step."""
    options = CASES[name][3]
    residual = options["residual"]
    lengths = [1, residual - 1, residual + 18]
    steps = residual + 40
    q, k, v = make_tokens(name, 3, lengths[-1] + steps, dtype)
    cache = make_cache(name, batch=3, dtype=dtype)
    fill(cache, k, v, lengths)
    check_reads(cache, q, k, v, lengths, options)
    for step in range(steps):
        append(cache, k, v, torch.tensor(lengths))
        lengths = [n + 1 for n in lengths]
        if step % every == 0 or any(n % residual < 2 for n in lengths):
            check_reads(cache, q, k, v, lengths, options)
    assert rel(cache.dequantized()[0][2], k[2]) > 0.001, "nothing was quantized"


@case
def test_every_step_reads_the_closed_form(name):
    """Official order, bit for bit: K exact from ((T - 1) // R) R on, V for R + 1 tokens, ragged rows, sinks, every width.

    Guards against Algorithm 1's order (flush before attention), an off-by-one ring slot, a group shifted by the prompt
    length, padding or sinks inside a minimum, a row that follows another row's length.
    """
    check_cache(name, every=1 if CASES[name][3]["residual"] <= 64 else 7)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("small window", "K 4 V 2", "8 bits", "4 sinks"))
def test_half_precision_reads_the_closed_form(name, dtype):
    """Guards against scales kept in float32, codes computed in bfloat16, and scores accumulated in the cache's dtype."""
    check_cache(name, dtype, every=5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n_heads, n_kv_heads", ((4, 4), (4, 2), (4, 1), (8, 1), (6, 3), (1, 1), (16, 2)))
def test_attend_equals_dense_attention_for_every_head_grouping(n_heads, n_kv_heads, dtype):
    """MHA, GQA, MQA at T = 1, R - 1, R, R + 1, 2 R + 31, 1000. Guards against query head h reading KV head h % Hk, a missing
    1 / sqrt(D), softmax over empty slots, and a boundary that is right for one T only."""
    options, head_dim, lengths = dict(group_size=32, residual=64), 32, (1, 63, 64, 65, 159, 1000)
    q = randn(6, n_heads, 1, head_dim, seed=3, dtype=dtype)
    k, v = (randn(6, n_kv_heads, 1000, head_dim, seed=seed, dtype=dtype) for seed in (0, 1))

    def new(batch):
        return KiviCache(batch, n_kv_heads, 1024, head_dim, dtype=dtype, **options)

    cache = new(6)
    fill(cache, k, v, lengths)
    check_reads(cache, q, k, v, lengths, options)
    k_read, v_read = cache.dequantized()
    for b, n in enumerate(lengths):  # the same rows alone, and the tolerance that the rounding of x_hat and of the result needs
        alone = new(1)
        fill(alone, k[b:b + 1], v[b:b + 1], [n])
        check_reads(alone, q[b:b + 1], k[b:b + 1], v[b:b + 1], [n], options)
        want = dense_attention(q[b, :, 0], k_read[b, :, :n], v_read[b, :, :n])
        assert rel(cache.attend(q)[b, :, 0], want) <= (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_lossless_pattern_gives_dense_attention_on_the_originals(bits):
    """K and V that lie exactly on 2^bits levels: nothing may be lost. Guards against a biased dequantization, a dropped plane of
    the packed word, channels or tokens in the wrong order: errors that a tolerance for quantization noise would swallow."""
    n_tokens, head_dim, group = 1000, 256, 32
    g = torch.Generator().manual_seed(bits)
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (2, 2, 2, n_tokens, head_dim), generator=g).float()
    codes[0][:, :, ::group], codes[0][:, :, 1::group] = 0, top  # K: every group of tokens spans the range
    codes[1][..., ::group], codes[1][..., 1::group] = top, 0  # V: every group of channels
    k, v = (codes[0] - top // 2) / 2**bits, (codes[1] - 1) / 2**bits
    q = randn(2, 4, 1, head_dim, seed=5)
    cache = KiviCache(2, 2, 1024, head_dim, k_bits=bits, v_bits=bits, group_size=group, residual=32)
    fill(cache, k, v, (960, 500), steps=40)
    for b, n in enumerate((1000, 540)):
        assert all(torch.equal(read[b, :, :n], x[b, :, :n]) for read, x in zip(cache.dequantized(), (k, v)))
        assert rel(cache.attend(q)[b, :, 0], dense_attention(q[b, :, 0], k[b, :, :n], v[b, :, :n])) <= 1e-5


def test_extreme_scores_do_not_overflow():
    """Guards against a softmax without its maximum subtracted, or with the maximum of one part only."""
    q, k, v = make_tokens("small window", 1, 200)
    for loud in (5, 150, 199):  # quantized, in the window, the newest
        x = k.clone() * 0.1
        x[:, :, loud] = 50 * q[0, 0, 0]
        cache = make_cache()
        fill(cache, x, v, [190], steps=10)
        out = cache.attend(q * 20)
        want = dense_attention(q[0, :, 0] * 20, *ref_read(x[0], v[0], **CASES["small window"][3]))
        assert torch.isfinite(out).all() and rel(out[0, :, 0], want) <= 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_full_cache_is_dense_attention(dtype):
    """The baseline's own correctness. Guards against a benchmark that is won against a wrong opponent."""
    q, k, v = make_tokens("small window", 3, 200, dtype)
    cache = FullCache(3, 2, 256, 32, dtype=dtype)
    fill(cache, k, v, (1, 60, 150))
    check_reads(cache, q, k, v, (1, 60, 150), None, 1e-5 if dtype == torch.float32 else 4e-3)
    for step in range(50):
        append(cache, k, v, torch.tensor((1, 60, 150)) + step)
    check_reads(cache, q, k, v, (51, 110, 200), None, 1e-5 if dtype == torch.float32 else 4e-3)


# ---- the caches: state ------------------------------------------------------------------------------------------------------------

@case
@pytest.mark.parametrize("extra", ("1", "R-1", "R", "R+1", "2R+31"))
def test_prefill_equals_appends_bit_for_bit(name, extra):
    """The state is a function of the tokens: prefill(L), L appends and a mix agree in every buffer, padding included.

    Guards against a group that starts where the prompt ended, a second quantization at a flush, stale ring slots.
    """
    residual = CASES[name][3]["residual"]
    n = eval(extra.replace("2R", "2*R"), {"R": residual})
    q, k, v = make_tokens(name, 1, n)
    states, outs = [], []
    for prompt in sorted({n, 1, n // 2, n // residual * residual, n - 1} - {0}):
        cache = make_cache(name)
        fill(cache, k, v, [prompt], n - prompt)
        states.append(state(cache))
        outs.append(cache.attend(q))
    for s, out in zip(states, outs):
        assert_same(s, states[0])
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("name", ("small window", "4 sinks", "K 2 V 8"))
def test_a_row_of_a_batch_equals_the_same_prompt_alone(name):
    """Guards against one length for the whole batch (pitfall 2), and a flush of one row that touches its neighbours."""
    lengths, steps = [1, 31, 40, 64, 100], 50
    q, k, v = make_tokens(name, 5, 150)
    batch = make_cache(name, batch=5)
    fill(batch, k, v, lengths, steps)
    k_read, v_read = batch.dequantized()
    together, out = state(batch), batch.attend(q)
    for b, n in enumerate(lengths):
        alone = make_cache(name)
        fill(alone, k[b:b + 1], v[b:b + 1], [n], steps)
        for x, y in zip(alone.dequantized(), (k_read, v_read)):
            assert torch.equal(x[0], y[b, :, :n + steps])
        for key, tensor in state(alone).items():
            if together[key].shape[:1] == (5,) and tensor.shape[:1] == (1,):
                assert torch.equal(tensor[0], together[key][b]), key
        assert rel(alone.attend(q[b:b + 1])[0], out[b]) <= 1e-6


def test_the_order_of_rows_only_moves_the_result():
    """Guards against anything shared between rows."""
    lengths, order = [5, 70, 33, 64], [2, 0, 3, 1]
    q, k, v = make_tokens("small window", 4, 130)
    a, b = make_cache(batch=4), make_cache(batch=4)
    fill(a, k, v, lengths, 60)
    fill(b, k[order], v[order], [lengths[i] for i in order], 60)
    assert torch.equal(a.attend(q)[order], b.attend(q[order]))
    assert all(torch.equal(x[order], y) for x, y in zip(a.dequantized(), b.dequantized()))


@pytest.mark.parametrize("name", ("small window", "4 bits", "4 sinks"))
def test_every_token_is_quantized_exactly_once(name):
    """A read value changes once, from the exact number to its code, and never again. Guards against a re-quantized group
    (at 2 bits it drifts), and against a flush that is skipped (it would never change)."""
    residual, sink = CASES[name][3]["residual"], CASES[name][3].get("sink", 0)
    n = 5 * residual
    _, k, v = make_tokens(name, 1, n)
    cache = make_cache(name)
    changes = [torch.zeros(n), torch.zeros(n)]
    before = [k[0, :, :0], v[0, :, :0]]
    for t in range(n):
        (cache.prefill if t == 0 else cache.append)(k[:, :, t:t + 1], v[:, :, t:t + 1])
        for i, (read, exact) in enumerate(zip(cache.dequantized(), (k, v))):
            assert torch.equal(read[0, :, t], exact[0, :, t]), "the newest token is not exact"
            changes[i][:t] += (read[0, :, :t] != before[i]).any(-1).any(0)
            before[i] = read[0].clone()
    token = torch.arange(n)
    for count, boundary in zip(changes, ((n - 1) // residual * residual, n - residual - 1)):
        assert torch.equal(count, ((token >= sink) & (token < boundary)).float())


@pytest.mark.parametrize("kind", ("kivi", "full"))
def test_reset_leaves_no_trace(kind):
    """Guards against stale codes, ring slots or positions in the second conversation."""
    q, k, v = make_tokens("4 sinks", 2, 200)
    new = (lambda: make_cache("4 sinks", batch=2)) if kind == "kivi" else (lambda: FullCache(2, 2, 512, 32))
    used, fresh = new(), new()
    fill(used, k * 7, v * 7, (120, 90), steps=60)
    used.reset()
    assert used.length == 0 and list(used.lengths) == [0, 0]
    assert_same(state(used), state(fresh))
    for cache in (used, fresh):
        fill(cache, k, v, (3, 40), steps=30)
    assert_same(state(used), state(fresh))
    assert torch.equal(used.attend(q), fresh.attend(q))


class CacheMachine(RuleBasedStateMachine):
    """Any order of prefill, appends and resets of two ragged rows; after every step the cache is compared with the closed
    form and, buffer by buffer, with a new cache that was given the same tokens in one prefill."""

    name, capacity = "small groups", 224

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = make_tokens(self.name, 2, self.capacity)
        self.cache = make_cache(self.name, batch=2, max_len=self.capacity)
        self.lengths = [0, 0]

    @precondition(lambda self: not self.cache.length)
    @rule(first=st.integers(1, 100), second=st.integers(1, 100))
    def prefill(self, first, second):
        self.lengths = [first, second]
        fill(self.cache, self.k, self.v, self.lengths)

    @precondition(lambda self: max(self.lengths) < self.capacity)
    @rule(n=st.sampled_from((1, 1, 2, 15, 31, 32, 33)))
    def append(self, n):
        for _ in range(min(n, self.capacity - max(self.lengths))):
            append(self.cache, self.k, self.v, torch.tensor(self.lengths))
            self.lengths = [m + 1 for m in self.lengths]

    @precondition(lambda self: max(self.lengths) == self.capacity)
    @rule()
    def overflow(self):
        before = state(self.cache)
        with pytest.raises(ValueError, match=str(self.capacity)):
            append(self.cache, self.k, self.v, torch.tensor([0, 0]))
        assert_same(state(self.cache), before)

    @precondition(lambda self: self.cache.length)
    @rule()
    def second_prefill(self):
        before = state(self.cache)
        with pytest.raises(ValueError):
            self.cache.prefill(self.k[:, :, :5], self.v[:, :, :5])
        assert_same(state(self.cache), before)

    @rule()
    def reset(self):
        self.cache.reset()
        self.lengths = [0, 0]

    @invariant()
    def reads_the_closed_form(self):
        if not max(self.lengths):
            assert self.cache.length == 0
            return
        check_reads(self.cache, self.q, self.k, self.v, self.lengths, CASES[self.name][3])
        if min(self.lengths):
            other = make_cache(self.name, batch=2, max_len=self.capacity)
            fill(other, self.k, self.v, self.lengths)
            assert_same(state(self.cache), state(other))


def test_any_mix_of_operations_gives_the_same_state():
    """The state machine above. Guards against a dependence on history that no fixed schedule reaches."""
    run_state_machine_as_test(CacheMachine, settings=settings(examples(40), stateful_step_count=12))


# ---- the caches: refusals -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, named", (
    (dict(group_size=24, residual=48), "24"), (dict(group_size=128), "128"), (dict(residual=48), "48"), (dict(residual=16), "16"),
    (dict(residual=0), "0"), (dict(k_bits=3), "3"), (dict(v_bits=1), "1"), (dict(k_bits=16), "16"), (dict(sink=-1), "-1"),
    (dict(max_len=0), "0"), (dict(max_len=-5), "-5"), (dict(group_size=0), "0")))
def test_a_wrong_construction_is_refused_by_name(bad, named):
    """Guards against an assertion without a message, or a failure hundreds of tokens later at the first flush (pitfalls 10, 11)."""
    with pytest.raises(ValueError) as info:
        KiviCache(1, 2, bad.pop("max_len", 256), 64, **bad)
    assert re.search(rf"(?<!\d){re.escape(named)}\b", str(info.value)) and "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ("kivi", "full"))
def test_a_full_cache_raises_and_names_its_capacity(kind):
    """Guards against a ring that wraps in silence, and against capacity rounded up for the user (pitfall 11)."""
    q, k, v = make_tokens("small window", 1, 80)
    cache = make_cache(max_len=70) if kind == "kivi" else FullCache(1, 2, 70, 32)
    with pytest.raises(ValueError, match="70"):
        cache.prefill(k, v)
    assert cache.length == 0
    fill(cache, k, v, [60], steps=10)
    before, out = state(cache), cache.attend(q)
    with pytest.raises(ValueError, match="70"):
        append(cache, k, v, torch.tensor([70]))
    assert cache.length == 70 and torch.equal(cache.attend(q), out)
    assert_same(state(cache), before)


@pytest.mark.parametrize("kind", ("kivi", "full"))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("which", ("k", "v"))
def test_nan_and_inf_are_refused_and_change_nothing(kind, bad, which):
    """Guards against a poisoned group, and against a refused call that leaves half of its work behind."""
    q, k, v = make_tokens("small window", 1, 70)
    new = (lambda: make_cache()) if kind == "kivi" else (lambda: FullCache(1, 2, 512, 32))
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[which][0, 1, 17, 3] = bad
    cache = new()
    with pytest.raises(ValueError, match=r"(?i)nan|inf"):
        cache.prefill(poisoned["k"], poisoned["v"])
    assert cache.length == 0
    assert_same(state(cache), state(new()))
    fill(cache, k, v, [60])
    before = state(cache)
    with pytest.raises(ValueError, match=r"(?i)nan|inf"):
        append(cache, poisoned["k"], poisoned["v"], torch.tensor([17]))
    assert cache.length == 60
    assert_same(state(cache), before)


def test_a_second_prefill_is_refused():
    """Guards against a second prompt written over the first one's groups (pitfall 15)."""
    _, k, v = make_tokens("small window", 1, 70)
    cache = make_cache()
    cache.prefill(k, v)
    with pytest.raises(ValueError, match="reset"):
        cache.prefill(k, v)
    cache.reset()
    cache.prefill(k, v)


@pytest.mark.parametrize("lengths", ([71, 3], [3, 0], [3, -1], [3]))
def test_impossible_lengths_are_refused(lengths):
    """Guards against a row that reads past its padding."""
    _, k, v = make_tokens("small window", 2, 70)
    cache = make_cache(batch=2)
    with pytest.raises(ValueError):
        cache.prefill(k, v, torch.tensor(lengths))
    assert cache.length == 0


def test_padding_longer_than_the_capacity_is_harmless():
    """Rows of 20 and 33 tokens padded to 700 fit a cache of 64. Guards against capacity checked on the padded length."""
    q, k, v = make_tokens("small window", 2, 700)
    cache = make_cache(batch=2, max_len=64)
    cache.prefill(k, v, torch.tensor([20, 33]))
    check_reads(cache, q, k, v, [20, 33], CASES["small window"][3])


# ---- memory -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("batch, max_len", ((1, 6144), (3, 4001)))
@case
def test_nbytes_is_the_formula(name, batch, max_len, dtype):
    """Bytes from the bits: guards against a second copy of the codes, an int32 code, metadata in float32, a forgotten ring,
    and against a formula in the program that says something else than the buffers."""
    _, n_kv_heads, head_dim, options = CASES[name]
    o = dict(k_bits=2, v_bits=2, sink=0) | options
    cache = make_cache(name, batch, max_len, dtype)
    unit_of_capacity = math.lcm(o["residual"], 4 * o["group_size"])  # whole flushes, whole bytes of K at 2 bits
    tokens = -(-max_len // unit_of_capacity) * unit_of_capacity
    elements = batch * n_kv_heads * tokens * head_dim
    want = sum(elements * (o[bits] / 8 + 2 * dtype.itemsize / o["group_size"]) for bits in ("k_bits", "v_bits"))
    want += 2 * batch * n_kv_heads * (o["sink"] + o["residual"] + 1) * head_dim * dtype.itemsize + 8 * batch
    if dtype == torch.bfloat16:  # the words: bits + 32 / G an element, and the ring
        assert want - 8 * batch - 2 * batch * n_kv_heads * (o["sink"] + o["residual"] + 1) * head_dim * 2 == pytest.approx(
            elements * (o["k_bits"] + o["v_bits"] + 2 * 32 / o["group_size"]) / 8)
    assert cache.nbytes == pytest.approx(want, rel=0.01)
    assert cache.nbytes == cache.config.bytes(batch, n_kv_heads, max_len, head_dim, dtype)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in owned_tensors(cache)}
    assert cache.nbytes == sum(storages.values()), "a buffer is missing from nbytes, or a view hides a larger one"


def owned_tensors(thing):
    """Every tensor reachable from an object's attributes, buffers and containers."""
    seen, stack = [], [thing]
    while stack:
        x = stack.pop()
        if isinstance(x, torch.Tensor):
            seen.append(x)
        elif isinstance(x, dict):
            stack += x.values()
        elif isinstance(x, (list, tuple)):
            stack += x
        elif isinstance(x, torch.nn.Module):
            stack += vars(x).values()
    return seen


def test_nbytes_never_grows():
    """Guards against buffers that are concatenated or replaced while decoding."""
    _, k, v = make_tokens("small window", 1, 200)
    cache = make_cache()
    before, addresses = cache.nbytes, {n: t.data_ptr() for n, t in cache.named_buffers()}
    fill(cache, k, v, [60], steps=140)
    assert cache.nbytes == before and {n: t.data_ptr() for n, t in cache.named_buffers()} == addresses


def test_two_bits_buy_what_the_table_says():
    """kivi-algorithm.md, section 2: 3 bits an element at G = 32, so 4.84 times less than bfloat16 at 4,096 tokens (R = 128)."""
    full = FullCache(1, 2, 4096, 128, dtype=torch.bfloat16)
    small = KiviCache(1, 2, 4096, 128, dtype=torch.bfloat16)
    assert full.nbytes == pytest.approx(2 * 2 * 4096 * 128 * 2, rel=0.01)
    ring = 2 * 2 * 129 * 128 * 2
    assert (small.nbytes - ring) * 8 / (2 * 2 * 4096 * 128) == pytest.approx(3.0, rel=0.01)
    assert 4.5 < full.nbytes / small.nbytes < 5.0
    presets = {name: (c.k_bits, c.v_bits, c.group_size, c.residual, c.sink) for name, c in kivi.PRESETS.items()}
    assert presets == {"kivi2": (2, 2, 32, 128, 0), "kivi4": (4, 4, 32, 128, 0), "k4v2": (4, 2, 32, 128, 0)}


# ---- mutations: each of these bugs must make a check above fail ----------------------------------------------------------------------

def wrap(monkeypatch, owner, name, change):
    """Replaces owner.name by change(original)."""
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))


def swapped_scale_axis(mp):
    """K quantized per token, its scales stored as if they were per channel (D == G == 32, so that the shapes still fit)."""
    def change(original):
        def group_codes(x, bits):
            if x.shape[-2] != 32:  # V: [.., D / G, G]
                return original(x, bits)
            codes, scale, zero = original(x.transpose(-1, -2), bits)
            return codes.transpose(-1, -2), scale, zero
        return group_codes
    wrap(mp, kivi, "group_codes", change)


def dropped_group(mp):
    """The first group of every prefill is lost."""
    def change(original):
        def prefill(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.k_scale[:, :, 0] = 0
            self.k_zero[:, :, 0] = 0
        return prefill
    wrap(mp, KiviCache, "prefill", change)


def zeroed_output(mp):
    wrap(mp, KiviCache, "attend", lambda original: lambda self, q: torch.zeros_like(original(self, q)))


def skipped_flush(mp):
    wrap(mp, KiviCache, "flush", lambda original: lambda self, *args: None)


def flush_every_second_time(mp):
    """Blocks with an odd number are not quantized."""
    def change(original):
        return lambda self, pos: original(self, pos) if int(pos.max()) // self.config.residual % 2 == 0 else None
    wrap(mp, KiviCache, "flush", change)


def flush_twice(mp):
    """The codes are quantized again: once more through the flush, from what the cache reads."""
    def change(original):
        def flush(self, pos):
            self.k_window.copy_((self.k_window * 4).round() / 4)
            original(self, pos)
        return flush
    wrap(mp, KiviCache, "flush", change)


def wrong_head_mapping(mp):
    """Query head h reads KV head h % Hk."""
    def change(original):
        def attend(self, q):
            m = q.unflatten(1, (-1, self.k_window.shape[1])).transpose(1, 2).flatten(1, 2)
            return original(self, m).unflatten(1, (self.k_window.shape[1], -1)).transpose(1, 2).flatten(1, 2)
        return attend
    wrap(mp, KiviCache, "attend", change)


def stale_ring(mp):
    """The window is one slot off: the newest value lands where the next one belongs."""
    wrap(mp, KiviCache, "slot", lambda original: lambda self, t: (original(self, t) + 1) % self.k_window.shape[2])


def truncated_codes(mp):
    """Codes are rounded down."""
    def change(original):
        def group_codes(x, bits):
            codes, scale, zero = original(x, bits)
            return ((x.float() - zero.float()) / scale.float()).clamp(0, 2**bits - 1).floor().to(torch.uint8), scale, zero
        return group_codes
    wrap(mp, kivi, "group_codes", change)


def one_length_for_all(mp):
    """Every row counts as long as the longest one (pitfall 2)."""
    def change(original):
        def prefill(self, k, v, lengths=None):
            return original(self, k, v, None)
        return prefill
    wrap(mp, KiviCache, "prefill", change)


def missing_plane(mp):
    """The upper half of every packed byte of V is lost, as by a wrong mask."""
    def change(original):
        def prefill(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.v_packed &= 0x0F
        return prefill
    wrap(mp, KiviCache, "prefill", change)


MUTATIONS = (swapped_scale_axis, dropped_group, zeroed_output, skipped_flush, flush_every_second_time, flush_twice, wrong_head_mapping,
             stale_ring, truncated_codes, one_length_for_all, missing_plane)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_the_checks_notice(mutation, monkeypatch):
    """`check_cache`, which `test_every_step_reads_the_closed_form` is made of, must fail under every one of these bugs."""
    check_cache("small window", every=8)
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check_cache("small window", every=8)


@pytest.mark.parametrize("mutation", ("floor", "half up", "wrong top", "input dtype"))
def test_the_scalar_reference_notices(mutation, monkeypatch):
    """The comparison with `ref_group` must fail when the quantizer rounds down, rounds half up, divides by 2^bits, or
    computes its codes against the unrounded scale."""
    def broken(x, bits):
        top = 2**bits - 1
        zero, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
        exact = (high - zero) / (top + (mutation == "wrong top"))
        exact = torch.where(exact > 0, exact, 1.0)
        r = ((x.float() - zero) / (exact if mutation == "input dtype" else exact.to(x.dtype).float())).clamp(0, top)
        codes = {"floor": r.floor(), "half up": (r + 0.5).floor()}.get(mutation, r.round()).to(torch.uint8)
        return codes, exact.to(x.dtype), zero.to(x.dtype)

    def check():
        for dtype in DTYPES:
            for bits in (2, 8):
                x = torch.cat([randn(20, 32, seed=1), torch.arange(64).view(2, 32) % 7 / 2.0]).to(dtype)
                x[-2:, 0] = 3.0 if bits == 2 else 127.5  # steps of one half: exact ties
                codes, scale, zero = qz.quantize(x, bits, 32)
                for i, row in enumerate(x.tolist()):
                    assert (codes[i].tolist(), scale[i].item(), zero[i].item()) == ref_group(row, bits, dtype)
    check()
    monkeypatch.setattr(qz, "group_codes", broken)
    with pytest.raises(AssertionError):
        check()
