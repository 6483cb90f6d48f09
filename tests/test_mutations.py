"""Each of these bugs must make a check of test_kivi.py fail.

A test that no bug can fail is worth nothing, so here the caches get one bug after the other.
"""
import kivi
import pytest
import quantize as qz
import test_kivi
import torch
from kivi import KiviCache, KVConfig
from reference_cache import DTYPES, randn
from test_extend import check_queries, check_splits

BOOSTED = "boosted, 4 sinks, values of 64"
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


@bug(KVConfig, "slot")
def the_ring_has_a_slot_too_few(original, config, t):
    return t % config.residual


@bug(KiviCache, "read")
def keys_get_codes_before_attention(original, cache, pos, n, heads, rows=slice(None)):
    # The order of Algorithm 1.
    return original(cache, pos + 1, n, heads, rows)[0], original(cache, pos, n, heads, rows)[1]


@bug(KiviCache, "read")
def one_exact_value_too_few(original, cache, pos, n, heads, rows=slice(None)):
    return original(cache, pos, n, heads, rows)[0], original(cache, pos + 1, n, heads, rows)[1]


@bug(KiviCache, "read", "4 sinks")
def sinks_are_read_from_codes(original, cache, pos, n, heads, rows=slice(None)):
    k, v = original(cache, pos, n, heads, rows)
    old = (pos >= 64).view(-1, 1, 1, 1)
    k[:, :, :4] = torch.where(old, cache.from_codes("k", n, heads, rows)[:, :, :4], k[:, :, :4])
    return k, v


@bug(KVConfig, "grouped_as", "4 sinks")
def sinks_stretch_their_group(original, config, t):
    return t


@bug(KiviCache, "seen", "sliding")
def the_sliding_window_is_a_token_too_long(original, cache, pos, t):
    return original(cache, pos, t) | (t == pos - cache.sliding)


@bug(KiviCache, "store")
def codes_go_to_the_rows_that_are_not_due(original, cache, name, group, token, chosen, new):
    original(cache, name, group, token, ~chosen, new)


@bug(KiviCache, "store")
def codes_land_in_the_next_field(original, cache, name, group, token, chosen, new):
    original(cache, name, group ^ 1, token, chosen, new)


@bug(KiviCache, "from_codes")
def groups_are_read_in_another_order(original, cache, name, n, heads, rows):
    return original(cache, name, n, heads, rows).roll(cache.config.group_size, 2)


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
def every_row_counts_as_long_as_the_longest(original, cache, k, v, start, ends):
    original(cache, k, v, start, ends.max().expand_as(ends))


@bug(KiviCache, "prefill")
def the_upper_bit_of_values_is_lost(original, cache, k, v, lengths):
    original(cache, k, v, lengths)
    cache.v_packed &= 0x55


@bug(kivi, "key_codes")
def keys_are_quantized_per_token(original, x, config, order):
    codes, scale, zero = qz.group_codes(x, config.k_bits, -1)  # D == G, so the shapes still fit
    return codes, scale.mT, zero.mT


@bug(qz, "group_codes")
def codes_are_rounded_down(original, x, bits, dim=-1):
    _, scale, zero = original(x, bits, dim)
    return ((x - zero) / scale).clamp(0, 2**bits - 1).floor().to(torch.uint8), scale, zero


@bug(KVConfig, "value_group", BOOSTED)
def the_group_size_of_values_is_ignored(original, config, head_dim):
    return config.group_size


# ---- boosted channels ---------------------------------------------------------------------------

@bug(kivi, "key_codes", BOOSTED)
def steps_write_no_low_halves(original, x, config, order):
    codes, scale, zero = original(x, config, order)
    codes[..., x.shape[-1] :] = 0
    return codes, scale, zero


@bug(qz, "key_codes", BOOSTED)
def the_scale_of_boosted_prompts_counts_fine_steps(original, x, config, order):
    codes, scale, zero = original(x, config, order)
    scale[..., : config.boosted(x.shape[-1])] /= 2**config.k_bits
    return codes, scale, zero


@bug(KiviCache, "read", BOOSTED)
def low_halves_are_not_read(original, cache, pos, n, heads, rows=slice(None)):
    low = cache.k_packed[..., cache.head_dim :]
    stored = low.clone()
    low.zero_()
    k_and_v = original(cache, pos, n, heads, rows)
    low.copy_(stored)
    return k_and_v


@bug(KiviCache, "read", BOOSTED)
def the_order_is_not_undone(original, cache, pos, n, heads, rows=slice(None)):
    stored = cache.k_order.clone()
    cache.k_order.copy_(torch.arange(cache.head_dim))
    k_and_v = original(cache, pos, n, heads, rows)
    cache.k_order.copy_(stored)
    return k_and_v


@bug(kivi, "channel_order", BOOSTED)
def the_quietest_channels_are_boosted(original, groups):
    return original(groups).flip(-1)


@bug(kivi, "channel_order", BOOSTED)
def only_the_first_group_tells_the_loudest(original, groups):
    return original(groups[:, :, :1])


@bug(KiviCache, "choose", BOOSTED)
def every_block_of_keys_has_its_own_order(original, cache, groups, chosen, rows=slice(None)):
    complete = (cache.pos > 0) & ((cache.pos + 1) % cache.config.residual == 0)
    original(cache, groups, chosen | complete[rows], rows)


@bug(KiviCache, "choose", BOOSTED)
def sinks_count_among_the_loud(original, cache, groups, chosen, rows=slice(None)):
    groups = groups.clone()
    groups[:, :, 0, :4] = cache.k_window[rows, :, :4]
    original(cache, groups, chosen, rows)


@bug(KiviCache, "choose", BOOSTED)
def all_rows_have_the_order_of_the_first(original, cache, groups, chosen, rows=slice(None)):
    original(cache, groups[:1].expand_as(groups), chosen, rows)


@bug(KiviCache, "choose", BOOSTED)
def all_heads_have_the_order_of_the_first(original, cache, groups, chosen, rows=slice(None)):
    original(cache, groups[:, :1].expand_as(groups), chosen, rows)


# ---- they are noticed ---------------------------------------------------------------------------

@pytest.mark.parametrize("owner, attribute, name, mutation", MUTATIONS)
def test_the_checks_notice(owner, attribute, name, mutation, monkeypatch):
    """`check_cache`, of which `test_every_step_reads_the_closed_form` is made (and which passes
    there), must fail under each of these bugs."""
    original = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda *args: mutation(original, *args))
    with pytest.raises(AssertionError):
        test_kivi.check_cache(name, every=8)


def extend_first(original, cache, q, k, v, lengths):
    """Attends to new tokens as the cache will hold them, not exactly."""
    cache.fill(k, v, cache.pos, cache.pos + torch.tensor(lengths))
    return original(cache, q, k, v, lengths)


@pytest.mark.parametrize("owner, name, mutation", (
    (KiviCache, "pick", lambda original, cache, name, x, t, starts, rows:
        qz.take(x, t.expand(len(x), -1) - starts)),  # the window is forgotten
    (kivi, "merge", lambda original, stored, new, old, bits:
        original(stored, new, old & False, bits)),  # codes beside the new ones are lost
    (KiviCache, "choose", lambda original, cache, groups, chosen, rows=slice(None):
        original(cache, groups, chosen | True, rows)),  # channels are chosen anew
    (KiviCache, "seen", lambda original, cache, pos, t: t <= pos + 1),  # a token from the future
    (KiviCache, "attention", lambda original, cache, q, pos, t, seen=None, beside=None:
        original(cache, q, pos + 1, t, seen, beside)),  # the past as the next step reads it
    (KiviCache, "extend", extend_first),
), ids=lambda x: x if isinstance(x, str) else "")
def test_the_checks_of_extend_notice(owner, name, mutation, monkeypatch):
    """One of the checks of tests/test_extend.py must fail under each of these bugs."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: mutation(original, *args))
    failed = 0
    for check, argument in ((check_splits, 3), (check_queries, torch.float32)):
        try:
            check(BOOSTED, argument)
        except AssertionError:
            failed += 1
    assert failed


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
