"""The compiled forms of what kivi.py does: fused/attention.py, and the steps of fused/step.py.

A compilation takes 10 to 25 seconds on a CPU, so most cases are slow ones (KIVI_SLOW=1).
"""
import pytest
import torch
from cache_cases import CASES, SHAPES, append, assert_same, at, fill, make_cache, make_tokens, state
from fused.attention import compiled_attention
from fused.step import compiled_quantizer, compiled_step
from reference_cache import DTYPES, HALF_EPS, attention64

QUICK = (("all at once", torch.float32), ("sliding over sinks", torch.bfloat16),
         ("full, sliding", torch.float32))
EVERY_CASE = [
    pytest.param(name, dtype, id=f"{name}, {dtype}",
                 marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in SHAPES for dtype in DTYPES
]


def check_attentions(name, dtype, attend, lengths, steps=1):
    """Both attentions of ragged rows against float64 attention over what the cache reads."""
    q, k, v = make_tokens(name, len(lengths), max(lengths) + steps, dtype)
    cache = make_cache(name, len(lengths), 650, dtype)
    fill(cache, k, v, lengths, steps)
    k_read, v_read = cache.dequantized()
    plain = cache.attend(q)
    fused = attend(cache, q)
    assert fused.shape == plain.shape and fused.dtype == plain.dtype
    for b, n in enumerate(lengths):
        n += steps
        truth = attention64(q[b, :, 0], k_read[b, :, :n], v_read[b, :, :n],
                            SHAPES[name][3].get("sliding"))
        errors = [(x[b, :, 0].double() - truth).norm() / truth.norm() for x in (plain, fused)]
        yield n, *errors


@pytest.mark.parametrize("name, dtype", EVERY_CASE)
def test_the_fused_attention_is_as_close_to_the_truth(name, dtype, fresh_compiler):
    """"""
    attend = compiled_attention("cpu")
    R = SHAPES[name][3].get("residual", 128)
    for lengths in ((1, R - 1, R), (R + 1, 2 * R + 18, 300), (649, 1, 600), (0+3, 649, 450)):
        for n, p, f in check_attentions(name, dtype, attend, lengths):
            u=HALF_EPS[dtype]
            print("R", name, dtype, n, "%.3g %.3g excess/u %.2f" % (p, f, (f - 1.1 * p) / u))
