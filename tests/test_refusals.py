"""What the quantizer and both caches refuse: one clear line, and nothing is changed."""
import math
import re

import pytest
import quantize as qz
import torch
from cache_cases import append, assert_same, fill, make_cache, make_tokens, refused, state
from kivi import FullCache, KiviCache
from reference_cache import DTYPES, randn

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_caches = pytest.mark.parametrize("name", ("small window", "full"))


# ---- the quantizer ------------------------------------------------------------------------------

@every_dtype
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("end", (33, 64), ids=("one element", "whole group"))
def test_nan_and_inf_are_refused(dtype, bad, end):
    """Guards against a poisoned group stored in silence: NaN passes a check of the scale alone."""
    x = randn(2, 64, dtype=dtype)
    x[1, 32:end] = bad
    refused(lambda: qz.quantize(x, 2, 32), "NaN", "inf")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_range_that_overflows_is_refused(dtype):
    """Guards against an infinite scale, and with it NaN, from finite numbers."""
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, :2] = torch.tensor((1, -1)) * torch.finfo(dtype).max
    refused(lambda: qz.quantize(x, 2, 32), "overflows")


@pytest.mark.parametrize("bits", (0, 1, 3, 5, 16, -2))
def test_other_bit_widths_are_refused_by_name(bits):
    """Guards against 3 bits packed as if they were 4, or a KeyError in place of a sentence."""
    codes = torch.zeros(1, 48, dtype=torch.uint8)
    refused(lambda: qz.quantize(codes.float(), bits, 16), bits)
    refused(lambda: qz.pack(codes, bits), bits)
    refused(lambda: qz.unpack(codes, bits), bits)


@pytest.mark.parametrize("n, size", ((33, 32), (31, 32), (64, 48), (64, 0), (64, -32)))
def test_a_group_that_does_not_fit_is_refused_by_name(n, size):
    """Guards against a silently shorter last group, and scales broadcast over foreign codes."""
    refused(lambda: qz.quantize(torch.zeros(2, n), 2, size), n, size)
    scale = torch.ones(2, 7)
    refused(lambda: qz.dequantize(torch.zeros(2, n, dtype=torch.uint8), scale, scale), n, 7)


@pytest.mark.parametrize("n, bits", ((3, 2), (5, 2), (1, 4)))
def test_codes_that_do_not_fill_a_byte_are_refused(n, bits):
    """Guards against dropped codes at the end."""
    refused(lambda: qz.pack(torch.zeros(n, dtype=torch.uint8), bits), n)


# ---- the caches ---------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, named", (
    ({"group_size": 24, "residual": 48}, 24), ({"group_size": 128}, 128), ({"group_size": 0}, 0),
    ({"group_size": 4}, 4), ({"group_size": -32}, -32), ({"residual": 48}, 48),
    ({"residual": 16}, 16), ({"residual": 0}, 0), ({"residual": -32}, -32), ({"k_bits": 3}, 3),
    ({"v_bits": 1}, 1), ({"k_bits": 16}, 16), ({"sink": -1}, -1), ({"boost": 12}, 12),
    ({"boost": 1}, 1), ({"boost": 8.5}, 8.5), ({"boost": -8}, -8), ({"boost": -0.25}, -0.25),
    ({"boost": 72}, 72), ({"boost": math.inf}, "inf"), ({"boost": math.nan}, "nan"),
    ({"boost": 8, "k_bits": 8}, "k_bits"), ({"boost": 0.25, "k_bits": 8}, "k_bits"),
    ({"v_group_size": 48}, 48), ({"v_group_size": 4}, 4), ({"v_group_size": -64}, -64),
    ({"head_dim": 36, "v_group_size": 64}, 36),
    ({"max_len": 0}, 0), ({"max_len": -5}, -5), ({"batch": 0}, 0), ({"sliding": 0}, 0),
    ({"sliding": -3}, -3), ({"n_kv_heads": 0}, 0), ({"head_dim": 0}, 0),
    ({"dtype": torch.float64}, torch.float64), ({"dtype": torch.int32}, torch.int32)))
def test_a_wrong_construction_is_refused_by_name(bad, named):
    """Guards against a failure hundreds of tokens later, when the first keys get codes."""
    arguments = {"batch": 1, "n_kv_heads": 2, "max_len": 256, "head_dim": 64} | bad
    name = [] if "dtype" in bad else list(bad)[:1]
    refused(lambda: KiviCache(**arguments), named, *name)
    if bad.keys() <= {"batch", "n_kv_heads", "max_len", "head_dim", "sliding", "dtype"}:
        refused(lambda: FullCache(**arguments), named, *name)


@pytest.mark.parametrize("right", (
    {"boost": 64}, {"boost": 0.5}, {"boost": 8.0, "k_bits": 4}, {"boost": 0, "k_bits": 8},
    {"group_size": 128, "v_group_size": 64}, {"v_group_size": 128}, {"head_dim": 80,
                                                                     "v_group_size": 64}), ids=str)
def test_a_right_construction_is_not_refused(right):
    """Guards against a check that forbids what the caches can do: all channels boosted, no channel
    boosted of 8 bits, groups of tokens that do not divide head_dim beside groups of values that
    do."""
    KiviCache(**{"batch": 1, "n_kv_heads": 2, "max_len": 256, "head_dim": 64} | right)


@both_caches
def test_a_full_cache_raises_and_names_its_capacity(name):
    """Guards against a ring that wraps in silence, and a capacity that is rounded up."""
    _, k, v = make_tokens(name, 1, 80)
    cache = make_cache(name, max_len=70)
    refused(lambda: cache.prefill(k, v), 80, 70)
    assert_same(state(cache), state(make_cache(name, max_len=70)))
    fill(cache, k, v, [60], steps=10)
    before = state(cache)
    refused(lambda: append(cache, k, v, [70]), 70)
    assert_same(state(cache), before)


@both_caches
@pytest.mark.parametrize("which", ("k", "v"))
@pytest.mark.parametrize("dtype, bad", (
    (torch.float32, math.nan), (torch.float32, math.inf), (torch.float32, -math.inf),
    (torch.float32, 3e38), (torch.float16, math.inf), (torch.bfloat16, math.nan),
    (torch.bfloat16, 1e5), (torch.bfloat16, -1e5)))
def test_what_cannot_be_stored_is_refused_and_changes_nothing(name, which, dtype, bad):
    """NaN, inf, a range that may overflow, and bfloat16 numbers beyond float16, as which scales and
    zeros are stored.

    Guards against a poisoned group, and a refused call that leaves half of its work behind.
    """
    _, k, v = make_tokens(name, 1, 70, dtype)
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[which][0, 1, 17, 3] = bad
    cache = make_cache(name, dtype=dtype)
    if math.isfinite(bad) and name.startswith("full"):  # there such numbers are held as they are
        cache.prefill(**poisoned)
        append(cache, *poisoned.values(), [17])
        read = dict(zip("kv", cache.dequantized()))[which]
        assert torch.equal(read[:, :, :70], poisoned[which])
        assert torch.equal(read[:, :, 70], poisoned[which][:, :, 17])
        return
    refused(lambda: cache.prefill(**poisoned), which, "NaN", "inf", "large")
    assert_same(state(cache), state(make_cache(name, dtype=dtype)))
    fill(cache, k, v, [60])
    before = state(cache)
    refused(lambda: append(cache, *poisoned.values(), [17]), which, "NaN", "inf", "large")
    assert_same(state(cache), before)


@both_caches
@pytest.mark.parametrize("padding", (math.nan, math.inf, 1e30))
def test_padding_may_hold_anything(name, padding):
    """Behind a row's length nothing is a number of it. Guards against a check, or a minimum, that
    reads the padding."""
    _, k, v = make_tokens(name, 2, 70)
    cache, clean = make_cache(name, 2), make_cache(name, 2)
    fill(cache, k, v, [70, 3], padding=padding)
    fill(clean, k, v, [70, 3], padding=0)
    assert_same(state(cache), state(clean))


@both_caches
def test_padding_longer_than_the_capacity_is_harmless(name):
    """Rows of 20 and 33 tokens padded to 700 fit a cache of 64. Guards against a capacity that is
    checked on the padded length."""
    _, k, v = make_tokens(name, 2, 700)
    cache, short = make_cache(name, 2, 64), make_cache(name, 2, 64)
    cache.prefill(k, v, torch.tensor([20, 33]))
    fill(short, k, v, [20, 33])
    assert_same(state(cache), state(short))


@both_caches
def test_a_second_prefill_is_refused(name):
    """Guards against a second prompt written over the first one's groups."""
    _, k, v = make_tokens(name, 1, 70)
    cache = make_cache(name)
    cache.prefill(k, v)
    before = state(cache)
    refused(lambda: cache.prefill(k, v), 70, "reset")
    assert_same(state(cache), before)
    cache.reset()
    cache.prefill(k, v)
    assert_same(state(cache), before)


@both_caches
@pytest.mark.parametrize("lengths", ([71, 3], [3, 0], [3, -1], [2.5, 3], [3], [3, 3, 3], []))
def test_impossible_lengths_are_refused(name, lengths):
    """Guards against a row that reads past its padding."""
    _, k, v = make_tokens(name, 2, 70)
    cache = make_cache(name, 2)
    for given in (lengths, torch.tensor(lengths)):
        refused(lambda: cache.prefill(k, v, given), "lengths", 70)
    assert_same(state(cache), state(make_cache(name, 2)))


@both_caches
def test_attend_of_an_empty_cache_is_refused(name):
    """Guards against a softmax over nothing, which is NaN."""
    q, k, v = make_tokens(name, 2, 40)
    cache = make_cache(name, 2)
    refused(lambda: cache.attend(q), "prefill", "append")
    fill(cache, k, v, [40, 1])
    cache.reset()
    refused(lambda: cache.attend(q), "prefill", "append")


def wrong_versions(x):
    """{what is wrong: x [B, heads, n, D] with another shape, dtype or device}."""
    B, heads, n, D = x.shape
    shapes = {
        "no dimension": (), "three dimensions": (B, heads, D), "five": (1, B, heads, n, D),
        "a row more": (B + 1, heads, n, D), "one row": (1, heads, n, D),
        "a head more": (B, heads + 1, n, D), "one head": (B, 1, n, D), "no head": (B, 0, n, D),
        "three tokens": (B, heads, 3, D), "no token": (B, heads, 0, D),
        "wide": (B, heads, n, 2 * D), "narrow": (B, heads, n, D - 1), "empty": (B, heads, n, 0),
        "tokens first": (B, n, heads, D), "channels first": (B, heads, D, n),
    }
    wrong = {name: torch.ones(shape, dtype=x.dtype) for name, shape in shapes.items()}
    dtypes = (*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
    wrong |= {str(dtype): x.to(dtype) for dtype in dtypes if dtype != x.dtype}
    return wrong | {"another device": x.to("meta")}


@both_caches
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("method, tensor", (
    ("prefill", "k"), ("prefill", "v"), ("append", "k"), ("append", "v"), ("attend", "q")))
def test_a_wrong_tensor_is_refused_by_name(name, dtype, method, tensor):
    """Any shape, dtype or device that does not fit the cache, in any argument of any method.

    Guards against a tensor that is broadcast, cast or cut in silence, an error from the depths of
    a kernel, and a call that fails when half of its work is done.
    """
    q, k, v = make_tokens(name, 3, 40, dtype)
    cache = make_cache(name, 3, dtype=dtype)
    if method != "prefill":
        fill(cache, k, v, [40, 1, 33])
        k, v = k[:, :, :1], v[:, :, :1]
    arguments = {"q": q} if method == "attend" else {"k": k, "v": v}
    before = state(cache)
    heads = "a multiple of 2" if tensor == "q" else 2
    n = r"\d+" if method == "prefill" else 1
    for what, wrong in wrong_versions(arguments[tensor]).items():
        # k says how many tokens a prompt has: of another number it is v that does not fit.
        blamed = "v" if method == "prefill" and what in ("three tokens", "no token") else tensor
        with pytest.raises(ValueError) as info:
            getattr(cache, method)(**arguments | {tensor: wrong})
        wanted = rf"{blamed} must be \[3, {heads}, {n}, 32\] in {dtype} on cpu, got .+ on .+"
        assert re.fullmatch(wanted, str(info.value)), (what, str(info.value))
        assert_same(state(cache), before)
    getattr(cache, method)(**arguments)  # the right ones pass


@both_caches
def test_a_prompt_without_tokens_is_refused(name):
    """Guards against rows of length 0, which attention cannot read."""
    cache = make_cache(name, 2)
    empty = torch.zeros(2, 2, 0, 32)
    refused(lambda: cache.prefill(empty, empty), "lengths")
    assert_same(state(cache), state(make_cache(name, 2)))
