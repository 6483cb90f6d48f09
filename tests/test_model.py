"""The model against an independent Llama, and against transformers' numbers of every architecture
(make_golden.py). Every docstring says which bugs its test guards against.
"""
import pytest
import torch
from make_golden import GREEDY, LENGTH, VARIANTS, noise, tokens
from reference import (
    FAMILIES, SMALL, decode_logits, make_checkpoint, ref_llama, some_ids, write_kvtuner,
)
from reference_cache import rel

import generate
from kivi import FullCache, KiviCache
from model import Transformer, causal

every_variant = pytest.mark.parametrize("name", VARIANTS)
EIGHT = {"kv": "kivi2", "k_bits": 8, "v_bits": 8, "group_size": 16}  # its window holds these texts
FOUR = {"kv": "kivi2", "k_bits": 4, "group_size": 16, "residual": 16}


# ---- an independent Llama -----------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_equals_an_independent_llama(family, tmp_path):
    """Guards against a swapped fused weight, interleaved rotary pairs, a forgotten bias, q/k norm
    or rope scaling, an untied head."""
    folder = make_checkpoint(tmp_path, **FAMILIES[family])
    ids = some_ids(100)
    logits = Transformer.from_pretrained(folder)(torch.tensor([ids, ids[::-1]]))
    assert logits.shape == (2, 100, 260)
    assert (logits[0] - ref_llama(folder, ids)).abs().max() <= 1e-4
    assert (logits[1] - ref_llama(folder, ids[::-1])).abs().max() <= 1e-4


@pytest.mark.parametrize("n_prompt, n", ((1, 270), (5, 20), (127, 140), (128, 140), (129, 140)))
def test_full_cache_decoding_equals_the_forward_pass(model, n_prompt, n):
    """At every position, around the cache's block edges. Guards against a position off by one, a
    mask that hides the newest token."""
    ids = torch.tensor([some_ids(n)])
    model.setup_caches(1, n, kv="bf16")
    logits = decode_logits(model, ids, n_prompt)[0]
    assert (logits - model(ids)[0, n_prompt - 1 :]).abs().max() <= 1e-4


@pytest.mark.parametrize("kv, bits, group_size, residual, n_prompt", (
    ("kivi2", (2, 2), 16, 32, 1),
    ("kivi2", (2, 2), 32, 64, 64),
    ("kivi4", (4, 4), 32, 32, 90),
    ("k4v2", (4, 2), 32, 64, 90),
))
def test_kivi_decoding_equals_the_official_order(
        checkpoint, model, kv, bits, group_size, residual, n_prompt):
    """Logits of 170 teacher-forced tokens against `RefKivi`. Guards against quantized K or V in
    the prompt's own attention, keys cached before their rotation, a flush one step early or late,
    bits of K and V exchanged.

    The two programs agree to 2e-5. They may round a key to different codes where it lies on an
    edge, so the tolerance leaves room for that; Algorithm 1's order (flush first) changes the
    median by 0.1 to 0.5, which the last lines make sure of.
    """
    ids = some_ids(170, seed=n_prompt)
    options = {"group_size": group_size, "residual": residual}
    model.setup_caches(1, len(ids), kv=kv, **options)
    logits = decode_logits(model, torch.tensor([ids]), n_prompt)[0]
    options |= {"k_bits": bits[0], "v_bits": bits[1]}
    official = ref_llama(checkpoint, ids, n_prompt, options)[n_prompt - 1 :]
    distance = (logits - official).abs().amax(1)
    assert distance[0] <= 1e-4 and distance.median() <= 1e-3 and distance.max() <= 0.05
    if n_prompt == 64:
        other = ref_llama(checkpoint, ids, n_prompt, options, algorithm_1=True)[n_prompt - 1 :]
        assert (other - official).abs().amax(1).median() > 0.05


def test_a_window_that_holds_everything_is_the_forward_pass(model):
    """Up to T = R nothing is quantized. Guards against a flush or an eviction that comes early."""
    ids = torch.tensor([some_ids(128)])
    model.setup_caches(1, 200, kv="kivi2")
    assert (decode_logits(model, ids, 20)[0] - model(ids)[0, 19:]).abs().max() <= 1e-4


@pytest.mark.parametrize("options, named", (
    ({"max_len": 513}, "513"),
    ({"max_len": 100, "kv": "kivi3"}, "kivi3"),
    ({"max_len": 100, "group_size": 64}, "64"),
    ({"max_len": 100, "k_bits": 3}, "3"),
))
def test_the_model_refuses_what_it_cannot_hold(model, options, named):
    """Guards against an index error deep inside, or a context that is silently longer than the
    trained one."""
    with pytest.raises(ValueError, match=named):
        model.setup_caches(1, **options)


def test_a_kvtuner_file_gives_every_layer_its_bits(model, tmp_path):
    """Bytes of every layer as of a cache made by hand; all 2/2 fills the same bytes as kivi2.
    Guards against one layer's bits for all of them."""
    ids = torch.tensor([some_ids(150)])
    runs = []
    for kv in ("kivi2", write_kvtuner(tmp_path / "bits", [(2, 2)] * 2)):
        model.setup_caches(1, 200, kv, residual=32)
        logits = decode_logits(model, ids, 70)
        runs.append([logits, *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    pairs = [(4, 2), (2, 8)]
    model.setup_caches(1, 200, write_kvtuner(tmp_path / "bits", pairs), residual=32)
    c = model.config
    for layer, (k_bits, v_bits) in zip(model.layers, pairs):
        by_hand = KiviCache(1, c.n_kv_heads, 200, c.head_dim, k_bits=k_bits, v_bits=v_bits,
                            residual=32)
        assert layer.cache.nbytes == by_hand.nbytes
        assert (layer.cache.config.k_bits, layer.cache.config.v_bits) == (k_bits, v_bits)


@pytest.mark.parametrize("options", ({"kv": "bf16"}, SMALL | {"sink": 3}), ids=("bf16", "kivi2"))
def test_prefill_in_any_chunks_is_the_same(model, options):
    """Long rows in parts, short rows together, a last part of one token. Guards against keys
    missing from a part, a mask that is aligned at its other corner, K and V in the wrong rows of
    the cache, padding of a group."""
    rows = torch.tensor([some_ids(200, n) for n in range(5)])
    lengths = [200, 3, 77, 1, 150]
    want = model(rows)[torch.arange(5), torch.tensor(lengths) - 1]

    def prefilled(chunk):
        model.setup_caches(5, 220, **options)
        logits = model.prefill(rows, lengths, chunk=chunk)
        return logits, [layer.cache.dequantized() for layer in model.layers]

    _, plain = prefilled(None)
    for chunk in (None, 1000, 10**6, 400, 199, 64, 7):
        logits, caches = prefilled(chunk)
        assert rel(logits, want) < 1e-5, chunk
        for got, expected in zip(caches, plain):
            # A code at its border may fall to the other side.
            assert all(rel(a, b) < 0.01 for a, b in zip(got, expected)), chunk


# ---- transformers -------------------------------------------------------------------------------

@every_variant
def test_the_forward_pass_equals_transformers(name, folders, golden):
    """Guards against anything that is not as the architecture has it: norms, layouts, biases,
    rotary scaling, masks."""
    net = Transformer.from_pretrained(folders(name))
    assert (net(tokens(LENGTH))[0] - golden[f"{name}/logits"]).abs().max() <= 1e-4


@every_variant
@pytest.mark.parametrize("options", ({"kv": "bf16"}, EIGHT), ids=("full", "8 bits"))
def test_greedy_decoding_equals_transformers(name, options, folders, golden):
    """Guards against a decode step that differs from the forward pass: a position, a window, a
    norm that `after` forgets."""
    net = Transformer.from_pretrained(folders(name))
    prompt = tokens(LENGTH)[:, : LENGTH - GREEDY]
    out = generate.generate(net, prompt, GREEDY, stop=(), **options)
    assert out[0, -GREEDY:].tolist() == golden[f"{name}/greedy"].tolist()
    if "dynamic" not in name:  # there a key keeps the rotation of its own step
        net.setup_caches(1, LENGTH, **options)
        logits = decode_logits(net, tokens(LENGTH), 20)[0]
        assert (logits - golden[f"{name}/logits"][19:]).abs().max() <= 1e-4


@every_variant
def test_rows_of_a_batch_equal_each_prompt_alone(name, folders):
    """Guards against padding that is seen, and (dynamic) a rotation by the longest row's length."""
    net = Transformer.from_pretrained(folders(name))
    prompts = [tokens(n, seed)[0].tolist() for seed, n in enumerate((5, 47, 16, 33))]
    for options in ({"kv": "bf16"}, FOUR):
        together = generate.generate(net, prompts, 12, stop=(), **options)
        for prompt, row in zip(prompts, together):
            assert generate.generate(net, [prompt], 12, stop=(), **options)[0] == row


def test_the_variants_differ(golden):
    """Two variants with the same numbers would mean that one is not what its name says."""
    logits = [golden[f"{name}/logits"] for name in VARIANTS]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert (a - b).abs().max() > 0.1


# ---- sliding windows ----------------------------------------------------------------------------

def dense(q, k, v, seen):
    """Attention over the tokens where seen [Tq, T], by its definition: q [B, H, Tq, D],
    k, v [B, Hk, T, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("T, window, chunk", (
    (40, 7, 16), (40, 1, 16), (48, 39, 16), (48, 16, 16), (33, 40, 16), (33, None, 16),
    (700, 300, 512)))
def test_prefill_attends_to_the_window(T, window, chunk, monkeypatch):
    """Guards against a window that is off by one, and against a mask as large as the square of the
    text."""
    masks = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **options):
        masks.append(0 if attn_mask is None else attn_mask.numel())
        return sdpa(*args, attn_mask=attn_mask, **options)

    q, k, v = noise("q", 2, 4, T, 16), noise("k", 2, 2, T, 16), noise("v", 2, 2, T, 16)
    age = torch.arange(T)[:, None] - torch.arange(T)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    want = dense(q, k, v, (age >= 0) & (age < (window or T)))
    for first in (0, 5, T - 1):  # queries of the last tokens
        out = causal(q[:, :, first:], k, v, window, chunk)
        assert (out - want[:, :, first:]).abs().max() <= 1e-5
    assert max(masks) <= chunk * (chunk + (window or T))


CACHES = {
    "full": (FullCache, {}),
    "kivi": (KiviCache, {"group_size": 8, "residual": 32}),
    "K 4 V 2, sinks": (KiviCache, {"group_size": 8, "residual": 32, "sink": 4, "k_bits": 4}),
}


def prefilled_and_grown(cache, k, v):
    """The cache with 300 and 130 tokens in its two rows, the last ten of each appended."""
    cache.prefill(k[:, :, :299], v[:, :, :299], [290, 120])
    for t in range(10):
        token = torch.tensor([290 + t, 120 + t])[:, None, None, None].expand(2, 2, 1, 16)
        cache.append(k.gather(2, token), v.gather(2, token))
    return cache


@pytest.mark.parametrize("sliding", (1, 20, 33, 100, 299, 300, 1000))
@pytest.mark.parametrize("kind", CACHES)
def test_decode_attends_to_the_window(kind, sliding):
    """Rows of 300 and 130 tokens, some of them appended: attention over what the cache shows of
    the window, and nothing changes when every group outside it holds other numbers. Guards against
    a bound that is off by one on either side, in either part of the cache."""
    make, options = CACHES[kind]
    k, v, q = noise("k", 2, 2, 300, 16), noise("v", 2, 2, 300, 16), noise("q", 2, 4, 1, 16)
    lengths = (300, 130)
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        for row, n in enumerate(lengths):
            x[row, :, : max(0, n - sliding) // 8 * 8] += 50
        if kind == "full":
            x[0, :, : max(0, 300 - sliding)] = -9e3
    cache = prefilled_and_grown(make(2, 2, 300, 16, sliding=sliding, **options), k, v)
    other = prefilled_and_grown(make(2, 2, 300, 16, sliding=sliding, **options), *poisoned)
    out = cache.attend(q)
    assert torch.equal(out, other.attend(q))
    shown_k, shown_v = (x.float() for x in cache.dequantized())
    t = torch.arange(300)
    for row, n in enumerate(lengths):
        seen = (t > n - 1 - sliding) & (t < n)
        want = dense(q[row, None], shown_k[row, None], shown_v[row, None], seen[None])
        assert (out[row] - want[0]).abs().max() <= 1e-5


def test_a_window_of_no_tokens_is_refused():
    """Guards against an empty softmax."""
    for make in (FullCache, KiviCache):
        with pytest.raises(ValueError, match="sliding"):
            make(1, 1, 64, 32, sliding=0)


@pytest.mark.parametrize("tokens, lengths, words", (
    ([[1, 2, 3]] * 2, [0, 3], "1 .. 3"), ([[1, 2, 3]] * 2, [3, 7], "7"),
    ([[1, 2, 3]], None, "2 rows"), ([[1, 2, 3]] * 3, None, "3 rows"),
    ([[1] * 65] * 2, None, "67")))
def test_prompts_that_do_not_fit_the_caches_are_refused(model, tokens, lengths, words):
    """Guards against caches that are half written."""
    model.setup_caches(2, 64, **SMALL)
    model.prefill(torch.tensor([[5, 6]] * 2))
    with pytest.raises(ValueError, match=words):
        model.extend(torch.tensor(tokens), lengths)
    assert model.cache.lengths == [2, 2] == model.cache.pos.tolist()
