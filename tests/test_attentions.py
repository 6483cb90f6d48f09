"""The compiled forms of what kivi.py does: fused/attention.py, and the steps of fused/step.py.

A compilation takes 10 to 25 seconds on a CPU, so most cases are slow ones (KIVI_SLOW=1).
"""
from types import SimpleNamespace

import fused.attention
import pytest
import torch
from cache_cases import (
    BOOSTED, CASES, SHAPES, assert_same, at, fill, make_cache, make_tokens, refused, state)
from fused.attention import compiled_attention
from fused.full import compiled_full_attention
from fused.step import compiled_quantizer, compiled_step
from quantize import BITS
from reference_cache import DTYPES, HALF_EPS, attention64

QUICK = (("small window", torch.bfloat16), ("full, sliding", torch.float32))
# On a CPU the dtypes differ in how they are read and rounded alone, so half precision takes some of
# the cases; tests/test_cuda.py takes all.
HALF = ("small window", "K 4 V 2", "8 bits", "4 sinks", "boosted, 4 sinks, values of 64",
        "all at once", "full")
EVERY_CASE = [
    pytest.param(name, dtype, id=f"{name}, {dtype}",
                 marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in SHAPES for dtype in DTYPES if dtype == torch.float32 or name in HALF
]

# How far the fused attention may exceed 1.1 times the error of the plain one, in half eps of the
# dtype. In half precision that is the rounding of the result. In float32 it is that of the scores,
# which softmax turns into a relative error: 75 half eps were seen where scores reach 1,947, whose
# own rounding is 1,000 half eps, 37 where they reach 76, elsewhere at most 22.
SLACK = {torch.float32: 80, torch.bfloat16: 1, torch.float16: 1}


def check_attentions(name, dtype, attend, lengths, calm):
    """Both attentions of ragged rows against float64 attention over what the cache reads.

    calm  what q is divided by: a few tokens get all of the weight, or all tokens get some
    A capacity of 650 tokens ends inside a block, and the last row is full of loud tokens, which the
    block of the row before it reads as well.
    """
    q, k, v = make_tokens(name, len(lengths), 650, dtype)
    q, k[-1], v[-1] = q / calm, 30 * k[-1], 30 * v[-1]
    cache = make_cache(name, len(lengths), 650, dtype)
    fill(cache, k, v, lengths, steps=1)
    k_read, v_read = cache.dequantized()
    before = state(cache)
    plain, fused = cache.attend(q), attend(cache, q)
    assert fused.shape == plain.shape and fused.dtype == plain.dtype
    for b, n in enumerate(cache.lengths):
        truth = attention64(q[b, :, 0], k_read[b, :, :n], v_read[b, :, :n],
                            SHAPES[name][3].get("sliding"))
        error, limit = (((x[b, :, 0].double() - truth).norm() / truth.norm()).item()
                        for x in (fused, plain))
        limit = 1.1 * limit + SLACK[dtype] * HALF_EPS[dtype]
        assert error <= limit, f"row {b} of {n} tokens: {error}, at most {limit}"
    assert_same(state(cache), before)


def compiled_for(name):
    """The compiled attention of a cache of that name."""
    if name in CASES:
        return compiled_attention("cpu")
    full = compiled_full_attention()
    return lambda cache, q: full(cache, q, cache.pos - 1, cache.tokens(cache.length))


@pytest.mark.parametrize("name, dtype", EVERY_CASE)
def test_the_fused_attention_is_as_close_to_the_truth(name, dtype, fresh_compiler):
    """From one token to many blocks, in one compilation. Guards against a plane, scale or zero of
    another group, a slot of another token, a mask that lets in what lies behind a row or drops the
    token between the boundaries of K and V, and a sum in half precision."""
    attend = compiled_for(name)
    R = SHAPES[name][3].get("residual", 128)
    for lengths in ((1, R - 1, R), (R + 1, 2 * R + 18, 300), (3, 450, 649), (649, 1, 600)):
        for calm in (1, 64):
            check_attentions(name, dtype, attend, lengths, calm)


def check_uncompiled(name, dtype, monkeypatch):
    """The fused form as PyTorch computes it without a compiler, at many lengths."""
    monkeypatch.setattr(torch, "compile", lambda form, **options: form)
    attend = compiled_attention("cpu")
    R = CASES[name][3]["residual"]
    check_attentions(name, dtype, attend, (R, 2 * R + 18, 649), calm=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BOOSTED)
def test_the_fused_form_of_boosted_keys_is_as_close_to_the_truth(name, dtype, monkeypatch):
    """What the slow cases compile, uncompiled. Guards against a query in another order than the
    columns, and low halves that count too much or not at all."""
    check_uncompiled(name, dtype, monkeypatch)


def with_order(order, by_column, cache, rows, scale):
    """by_column(cache, rows, scale), as if k_order were `order`."""
    stored = cache.k_order.clone()
    cache.k_order.copy_(order.expand_as(stored))
    result = by_column(cache, rows, scale)
    cache.k_order.copy_(stored)
    return result


def natural_order(by_column, cache, rows, scale):
    return with_order(torch.arange(cache.head_dim), by_column, cache, rows, scale)


def order_of_the_first_row(by_column, cache, rows, scale):
    return with_order(cache.k_order[:1].clone(), by_column, cache, rows, scale)


def column_of_every_channel(by_column, cache, rows, scale):
    return with_order(cache.k_order.argsort(-1), by_column, cache, rows, scale)


def no_low_halves(by_column, cache, rows, scale):
    rows, scale = by_column(cache, rows, scale)
    rows[..., cache.head_dim :] = 0
    return rows, scale


def low_halves_count_as_high_ones(by_column, cache, rows, scale):
    rows, scale = by_column(cache, rows, scale)
    rows[..., cache.head_dim :] *= 2**cache.config.k_bits
    return rows, scale


def low_halves_have_the_scales_of_the_quietest(by_column, cache, rows, scale):
    rows, scale = by_column(cache, rows, scale)
    n = scale.shape[-1] - cache.head_dim
    return rows, torch.cat([scale[..., :-n], scale[..., -2 * n : -n]], -1)


@pytest.mark.parametrize("bug", (
    natural_order, order_of_the_first_row, column_of_every_channel, no_low_halves,
    low_halves_count_as_high_ones, low_halves_have_the_scales_of_the_quietest),
    ids=lambda bug: bug.__name__)
def test_the_check_of_the_fused_form_notices(bug, monkeypatch):
    """Each of these bugs in what the fused form makes of boosted keys must fail the check above."""
    original = fused.attention.by_column
    monkeypatch.setattr(fused.attention, "by_column", lambda *args: bug(original, *args))
    with pytest.raises(AssertionError):
        check_uncompiled("boosted, 4 sinks, values of 64", torch.float32, monkeypatch)


def test_more_caches_than_inductor_allows(monkeypatch, fresh_compiler):
    """Each batch size is a compilation. Guards against the compiler's own limit of 8."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, fullgraph, options: compiled(
        fn, backend="eager", fullgraph=fullgraph))  # no Inductor, which takes long
    with torch._dynamo.config.patch(recompile_limit=8):
        attend = compiled_attention("cpu")
        for batch in range(1, 11):
            q, k, v = make_tokens("small window", batch, 20)
            cache = make_cache("small window", batch, 64)
            cache.prefill(k, v)
            assert torch.allclose(attend(cache, q), cache.attend(q), atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype, least", ((torch.bfloat16, 2.0**-24), (torch.float16, 2.0**-22)))
def test_half_precision_reads_codes_exactly(bits, dtype, least):
    """All bytes, as a GPU reads them. Guards against a code of another plane, a wrong power of two,
    and codes of a float16 cache so low that a tensor core cuts them off."""
    packed = torch.arange(256, dtype=torch.uint8)
    found = fused.attention.numbers(SimpleNamespace(dtype=dtype), packed, bits, torch.float16)
    for plane, (codes, factor) in enumerate(found):
        wanted = (torch.arange(256) >> plane * bits) % 2**bits
        assert torch.equal(codes.double() * factor, wanted.double())
        assert codes[codes != 0].abs().min() == least * 2 ** (plane * bits)


@pytest.mark.parametrize("name", ("small window", "full"))
def test_the_fused_attention_refuses_the_same(name):
    """Before anything is compiled. Guards against NaN, or an error of the compiler, in silence."""
    attend = compiled_attention("cpu")
    q, k, v = make_tokens(name, 2, 40)
    cache = make_cache(name, 2)
    refused(lambda: attend(cache, q), "prefill", "append")
    fill(cache, k, v, [40, 3])
    for wrong in (q[:, :3], q[:1], q[..., :16], q.bfloat16(), q.expand(-1, -1, 2, -1)):
        refused(lambda: attend(cache, wrong), "q", "multiple")


class Layer:
    """As much of a model's layer as the steps touch. What goes in is q, k and v themselves."""

    def __init__(self, cache):
        self.cache = cache
        self.attention = self

    def attention_norm(self, x):
        return x

    def qkv(self, x, cos, sin):
        return x, cos, sin


@pytest.mark.parametrize("name, dtype", (
    ("small window", torch.bfloat16), ("all at once", torch.bfloat16),
    ("small window", torch.float32), ("boosted, 4 sinks, values of 64", torch.float16),
    ("K 2 V 8", torch.float16)), ids=str)
@pytest.mark.slow
def test_compiled_steps_leave_the_same_bytes(name, dtype, fresh_compiler):
    """Prompts and steps, compiled and plain. Guards against a compiler that divides or rounds in
    another way, and a compiled step that quantizes in rows which are too short."""
    R = CASES[name][3]["residual"]
    q, k, v = make_tokens(name, 3, 3 * R + 40, dtype)
    plain, compiled = make_cache(name, 3, dtype=dtype), make_cache(name, 3, dtype=dtype)
    compiled.quantizer = compiled_quantizer()
    step = compiled_step(None, "cpu")
    layer = Layer(compiled)
    for lengths in ([1, R - 1, 2 * R + 18], [1, 5, R - 3]):
        for cache in (plain, compiled):
            cache.reset()
            fill(cache, k, v, lengths)
        for t in range(R + 20):
            assert_same(state(compiled), state(plain))
            k_new, v_new = (at(x, [n + t for n in lengths]) for x in (k, v))
            plain.append(k_new, v_new)
            compiled.advance()
            assert torch.equal(step.before(layer, q, k_new, v_new, compiled.pos), q)
            if compiled.completes_key_block():
                step.flush(layer, compiled.pos)
            compiled.pos += 1
        assert_same(state(compiled), state(plain))


def test_plain_attention_runs_under_autocast():
    """Guards against sums of two dtypes, which end in a library's message."""
    q, k, v = make_tokens("paper", 1, 200)
    cache = make_cache("paper")
    cache.prefill(k, v)
    wanted = cache.attend(q)
    with torch.autocast("cpu", torch.bfloat16):
        got = cache.attend(q)
    assert got.dtype == wanted.dtype and (got - wanted).norm() < 0.03 * wanted.norm()
