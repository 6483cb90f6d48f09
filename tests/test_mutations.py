"""Each of these bugs must make a check of test_kivi.py fail.

A test that no bug can fail is worth nothing, so here the caches get one bug after the other.
"""
import kivi
import pytest
import quantize as qz
import test_kivi
import torch
from kivi import KiviCache
from reference_cache import DTYPES, randn

MUTATIONS = []


def bug(owner, name, case="small window"):
    """Registers a function that takes the original of owner.name, and the call's arguments."""
    def register(mutation):
        MUTATIONS.append(pytest.param(owner, name, case, mutation, id=mutation.__name__))
        return mutation
    return register


@bug(KiviCache, "quantize_keys")
def keys_never_get_codes(original, cache, pos):
    pass


@bug(KiviCache, "quantize_keys")
def every_second_block_of_keys_gets_no_codes(original, cache, pos):
    if int(pos.max()) // cache.config.residual % 2 == 0:
        original(cache, pos)


@bug(KiviCache, "quantize_keys")
def keys_are_quantized_twice(original, cache, pos):
    cache.k_window.copy_((cache.k_window * 4).round() / 4)
    original(cache, pos)


@bug(KiviCache, "quantize_value")
def values_never_get_codes(original, cache, pos):
    pass


@bug(KiviCache, "quantize_value")
def values_get_codes_a_step_late(original, cache, pos):
    original(cache, pos - 1)


@bug(KiviCache, "slot")
def the_ring_has_a_slot_too_few(original, cache, t):
    return t % cache.config.residual


@bug(KiviCache, "exact")
def keys_get_codes_before_attention(original, cache, pos, t):  # the order of Algorithm 1
    return original(cache, pos + 1, t)[0], original(cache, pos, t)[1]


@bug(KiviCache, "exact")
def one_exact_value_too_few(original, cache, pos, t):
    return original(cache, pos, t)[0], original(cache, pos + 1, t)[1]


@bug(KiviCache, "exact", "4 sinks")
def sinks_are_read_from_codes(original, cache, pos, t):
    return t >= pos[:, None] // 32 * 32, t >= pos[:, None] - 32


@bug(KiviCache, "grouped_as", "4 sinks")
def sinks_stretch_their_group(original, cache, t):
    return t


@bug(KiviCache, "seen", "sliding")
def the_sliding_window_is_a_token_too_long(original, cache, pos, t):
    return original(cache, pos, t) | (t == pos[:, None] - cache.sliding)


@bug(KiviCache, "store")
def codes_go_to_the_rows_that_are_not_due(original, cache, name, group, token, chosen, new):
    original(cache, name, group, token, ~chosen, new)


@bug(KiviCache, "store")
def codes_land_in_the_next_field(original, cache, name, group, token, chosen, new):
    original(cache, name, group ^ 1, token, chosen, new)


@bug(KiviCache, "read")
def groups_are_read_in_another_order(original, cache, name, n):
    for part, x in original(cache, name, n):
        yield part, x.roll(1, 2)


@bug(KiviCache, "parts")
def zeros_are_lost(original, cache, name):
    *parts, zero = original(cache, name)
    return *parts, torch.zeros_like(zero)


@bug(KiviCache, "attention")
def nothing_is_attended_to(original, cache, q, pos, t):
    return torch.zeros_like(q)


@bug(KiviCache, "attention")
def query_heads_read_the_wrong_kv_head(original, cache, q, pos, t):
    q = q.unflatten(1, (-1, cache.n_kv_heads)).transpose(1, 2).flatten(1, 2)
    out = original(cache, q, pos, t)
    return out.unflatten(1, (cache.n_kv_heads, -1)).transpose(1, 2).flatten(1, 2)


@bug(KiviCache, "attention")
def scores_are_not_divided_by_the_root(original, cache, q, pos, t):
    return original(cache, q * cache.head_dim**0.5, pos, t)


@bug(KiviCache, "fill")
def every_row_counts_as_long_as_the_longest(original, cache, k, v, lengths):
    original(cache, k, v, lengths.max().expand_as(lengths))


@bug(KiviCache, "prefill")
def the_upper_bit_of_values_is_lost(original, cache, k, v, lengths):
    original(cache, k, v, lengths)
    cache.v_packed &= 0x55


@bug(kivi, "group_codes")
def keys_are_quantized_per_token(original, x, bits, dim, shrink):
    codes, scale, zero = original(x, bits, -1, shrink)  # D == G, so the shapes still fit
    return codes, scale.mT, zero.mT


@bug(qz, "group_codes", "4 sinks, shrunk")
def codes_span_all_of_the_range(original, x, bits, dim, shrink):
    return original(x, bits, dim)


@bug(qz, "group_codes")
def codes_are_rounded_down(original, x, bits, dim, shrink):
    _, scale, zero = original(x, bits, dim, shrink)
    return ((x - zero) / scale).clamp(0, 2**bits - 1).floor().to(torch.uint8), scale, zero


@pytest.mark.parametrize("owner, attribute, name, mutation", MUTATIONS)
def test_the_checks_notice(owner, attribute, name, mutation, monkeypatch):
    """`check_cache`, of which `test_every_step_reads_the_closed_form` is made (and which passes
    there), must fail under each of these bugs."""
    original = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda *args: mutation(original, *args))
    with pytest.raises(AssertionError):
        test_kivi.check_cache(name, every=8)


@pytest.mark.parametrize("mutation", ("none", "floor", "half up", "wrong top", "unrounded scale"))
def test_the_scalar_reference_notices(mutation, monkeypatch):
    """A quantizer that rounds codes otherwise, divides by 2^bits, or computes codes against the
    unrounded scale must differ from the reference."""
    def broken(x, bits, dim=-1):
        top = 2**bits - 1
        zero = x.float().amin(dim, keepdim=True)
        exact = (x.float().amax(dim, keepdim=True) - zero) / (top + (mutation == "wrong top"))
        scale = exact if mutation == "unrounded scale" else exact.to(x.dtype).float()
        codes = ((x.float() - zero) / scale).clamp(0, top)
        rounded = {"floor": codes.floor(), "half up": (codes + 0.5).floor()}
        codes = rounded.get(mutation, codes.round()).to(torch.uint8)
        return codes, exact.to(x.dtype), zero.to(x.dtype)

    monkeypatch.setattr(qz, "group_codes", broken)
    differences = 0
    for dtype in DTYPES:
        for bits in (2, 8):
            x = torch.cat([randn(20, 32, seed=1), torch.arange(64).view(2, 32) % 7 / 2.0])
            x[-2:, 0] = 3.0 if bits == 2 else 127.5  # steps of one half: exact ties
            try:
                test_kivi.assert_scalar_reference(x.to(dtype), bits)
            except AssertionError:
                differences += 1
    assert (differences == 0) == (mutation == "none")
