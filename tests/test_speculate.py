"""Several tokens a step: drafts, what they attend to, and texts that must be those without them."""
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cache_cases import (
    CASES, SHAPES, assert_same, fill, make_cache, make_tokens, row_state,
)
from reference import SMALL, changed, some_ids
from reference_cache import HALF_EPS, randn, rel

import generate
from decoding.speculate import Lookup, Lookups, Speculator, speculator
from fused.attention import compiled_attention
from fused.drafts import drafted, fused_drafted, leaving
from fused.full import full_attention
from fused.step import append_drafts, commit
from model import Transformer

HELD = (1, 25, 100, 192)  # tokens; five more complete no key block before the last, for any R


def some_drafts(name, dtype):
    """(cache, queries, k, v) of five drafts a row, and K and V of what the cache holds."""
    q, k, v = make_tokens(name, 4, 240, dtype)
    cache = make_cache(name, 4, 300, dtype)
    fill(cache, k, v, HELD)
    queries = randn(4, q.shape[1], 5, q.shape[3], seed=7, dtype=dtype)
    k, v = (torch.stack([x[b, :, n : n + 5] for b, n in enumerate(HELD)]) for x in (k, v))
    return cache, queries, k, v


def held(cache):
    """Every byte of a packed cache; of a full one, what its rows hold."""
    if cache.config is None:
        return dict(zip("kv", cache.dequantized()))
    return {name: x for name, x in cache.state().items() if torch.is_tensor(x)}


def check_drafts(name, dtype, attend):
    cache, q, k, v = some_drafts(name, dtype)
    before, left = held(cache), None
    if name in CASES:
        left = leaving(cache, cache.pos, 5)
    else:
        append_drafts(cache, k, v, cache.pos, torch.tensor([5, 5, 5, 5]))
    out = attend(cache, q, cache.pos, cache.tokens(cache.length + 5), k, v, left)
    assert out.shape == q.shape and out.dtype == dtype
    assert_same(held(cache), before)
    for i in range(5):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        for b, want in enumerate(cache.attend(q[:, :, i : i + 1])):
            assert rel(out[b, :, i], want[:, 0]) <= 1e-5 + 2 * HALF_EPS[dtype], (b, i)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_draft_sees_what_its_own_step_would_see(name, dtype):
    """Guards against a value that is read exactly after it has left the window, or twice, or not at
    all, and against drafts that see those behind them."""
    check_drafts(name, dtype, drafted)


@pytest.mark.parametrize("name", set(SHAPES) - set(CASES))
def test_the_librarys_grouped_kernel_gets_a_query_a_head(name):
    """What CUDA does. Guards against the masks of other drafts."""
    cache, q, k, v = some_drafts(name, torch.float32)
    append_drafts(cache, k, v, cache.pos, torch.tensor([5, 5, 5, 5]))
    t = cache.tokens(cache.length + 5)
    by_head, by_row = (full_attention(cache, q, cache.pos, t, grouped) for grouped in (True, False))
    assert rel(by_head, by_row) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_the_fused_form_is_the_same(name, monkeypatch):
    """Uncompiled; tests/test_cuda.py has it compiled."""
    monkeypatch.setattr(torch, "compile", lambda form, **options: form)
    for dtype in (torch.float32, torch.bfloat16):
        check_drafts(name, dtype, compiled_attention("cpu", fused_drafted, drafted))


@pytest.mark.parametrize("name", SHAPES)
def test_accepted_drafts_are_committed_as_single_tokens(name):
    """Rows accept different numbers. Guards against a row that takes more than it accepted, and
    against a value that gets no codes because its step was skipped."""
    cache, _, k, v = some_drafts(name, torch.float32)
    accepted = torch.tensor([1, 5, 3, 4])
    if name not in CASES:
        append_drafts(cache, k, v, cache.pos, accepted)
    commit(cache, k, v, cache.pos, accepted)
    cache.set_lengths([n + more for n, more in zip(HELD, accepted.tolist())])
    _, k, v = make_tokens(name, 4, 240)
    for b, (n, more) in enumerate(zip(HELD, accepted.tolist())):
        alone = make_cache(name, 1, 300)
        fill(alone, k[b : b + 1], v[b : b + 1], [n], more)
        assert_same(row_state(alone, 0), row_state(cache, b))


def test_drafts_may_be_more_than_a_group():
    """Groups of 8 and 12 drafts: two of the values that leave share a byte. Guards against one that
    is written over the other."""
    cache, held, accepted = make_cache("groups of 8", 2, 120), (48, 73), (12, 9)
    _, k, v = make_tokens("groups of 8", 2, 120)
    fill(cache, k, v, held)
    new = (torch.stack([x[b, :, n : n + 12] for b, n in enumerate(held)]) for x in (k, v))
    commit(cache, *new, cache.pos, torch.tensor(accepted))
    cache.set_lengths([n + more for n, more in zip(held, accepted)])
    for b, (n, more) in enumerate(zip(held, accepted)):
        alone = make_cache("groups of 8", 1, 120)
        fill(alone, k[b : b + 1], v[b : b + 1], [n], more)
        assert_same(row_state(alone, 0), row_state(cache, b))


def test_a_lookup_proposes_what_followed_last():
    lookup = Lookup()
    text = [1, 2, 3, 4, 9, 2, 3, 5, 7, 8]
    assert lookup.propose(text, 4) == []  # 7, 8 are new
    text += [2, 3]
    assert lookup.propose(text, 3) == [5, 7, 8]  # after 2, 3 for the second time
    text += [4]
    assert lookup.propose(text, 2) == [9, 2]  # 2, 3, 4 goes before the shorter 3, 4
    assert lookup.propose(text + [1, 1], 2) == []
    assert Lookup().propose([5], 3) == [] == Lookup().propose([5, 5], 3)
    assert Lookup().propose([5, 5, 5, 5, 5], 3) == [5]


OPTIONS = ({"kv": "bf16"}, SMALL, SMALL | {"kv": "kivi2+"}, SMALL | {"kv": "k4v2"})


@pytest.mark.parametrize("options, speculate", (
    *((options, 4) for options in OPTIONS[:3]), (SMALL, 1), (OPTIONS[0], 15),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((OPTIONS[3], 4), (OPTIONS[2], 15)))),
    ids=lambda x: x["kv"] if isinstance(x, dict) else str(x))
def test_the_text_is_the_one_without_drafts(model, options, speculate):
    """Rows that repeat themselves and rows that do not, over many key blocks. Guards against a
    draft behind the end of its block, a block that is never quantized, and a row that goes on with
    another one's drafts."""
    prompts = [some_ids(9) * 4, some_ids(23, seed=1), some_ids(3, seed=2) * 7]
    limits = [110, 40, 90]
    want = generate.generate(model, prompts, limits, stop=(), **options)
    stats, ended = {}, {}
    found = generate.generate(model, prompts, limits, stop=(), speculate=speculate, stats=stats,
                              on_row=lambda row, new: ended.update({row: new}), **options)
    assert found == want
    assert [ended[row] for row in range(3)] == [x[len(p):] for x, p in zip(want, prompts)]


def test_drafts_that_are_right_save_steps(model):
    """The model as its own draft model. Guards against drafts that are thrown away: every step
    brings five tokens. With a packed cache the two differ, and the text is the packed one's."""
    prompt = [some_ids(40)]
    want = generate.generate(model, prompt, 121, stop=(), kv="bf16")
    draft = Transformer(model.config)
    draft.load_state_dict(model.state_dict())
    draft.set_rope()
    stats = {}
    found = generate.generate(model, prompt, 121, stop=(), speculate=4, draft=draft.eval(),
                              stats=stats, kv="bf16")
    assert found == want and stats["steps"] == 24
    want = generate.generate(model, prompt, 121, stop=(), **SMALL)
    assert generate.generate(model, prompt, 121, stop=(), speculate=4, draft=draft, **SMALL) == want
    small = Transformer(replace(model.config, vocab_size=model.config.vocab_size + 1))
    with pytest.raises(ValueError, match="tokenizer"):
        speculator(model, torch.zeros(1, 1, dtype=torch.int64), 4, small)


def test_the_text_may_fill_the_caches(model):
    """Guards against drafts beyond the capacity."""
    prompt = [some_ids(10) * 3]
    model.setup_caches(1, 70, **SMALL)
    want = generate.generate(model, prompt, 40, stop=())
    assert generate.generate(model, prompt, 40, stop=(), speculate=6) == want


def test_a_row_without_numbers_takes_no_other_row(model, monkeypatch):
    """Logits of NaN in one row at the third step. Guards against a negative token that is read."""
    prompts = [some_ids(9) * 3, some_ids(20)]
    want = generate.generate(model, prompts, 30, stop=(), **SMALL)
    verify, steps = Speculator.verify, []

    def broken(self, tokens, count, t):
        logits, drafts = verify(self, tokens, count, t)
        steps.append(t)
        if len(steps) == 3:
            logits[0] = float("nan")
        return logits, drafts

    monkeypatch.setattr(Speculator, "verify", broken)
    faults, ended = {}, {}
    out = generate.generate(model, prompts, 30, stop=(), speculate=4, **SMALL,
                            on_fault=faults.__setitem__, on_row=ended.__setitem__)
    assert out[1] == want[1] and list(ended) == [1] and list(faults) == [0]
    assert out[0] == want[0][: len(out[0])] and len(out[0]) < len(want[0])


@pytest.mark.parametrize("steps, new, fault", (
    ([[5]], [5], False),
    ([[5], [7, 2, -1]], [5, 7, 2], False),  # a stop token before it
    ([[5], [-1, 7]], [5], True),
    ([[5], [3, 4], [6, -1]], [5, 3, 4, 6], True)))
def test_what_ends_a_row_comes_first(model, steps, new, fault):
    """A decoder that yields several tokens, -1 for no number. Guards against a row that is judged
    by the last of them."""
    class Steps(Speculator):
        def steps(self, done, new, limits):
            return iter([[step] for step in steps])

    model.setup_caches(1, 60, "bf16")
    decoder = Steps(model, torch.zeros(1, 1, dtype=torch.int64), 3, Lookups(), temperature=0.0)
    faults, ended = {}, {}
    out = generate.generate(model, [[1, 2]], len(new) if not fault else 9, stop={2},
                            decoder=decoder, on_fault=faults.__setitem__, on_row=ended.__setitem__)
    assert out == [[1, 2, *new]]
    assert bool(faults) == fault and ended == ({} if fault else {0: new})


def test_no_draft_goes_beyond_the_end(model):
    """The model as its own draft model. Guards against caches that hold more than the text, behind
    which a conversation cannot go on."""
    draft = Transformer(model.config)
    draft.load_state_dict(model.state_dict())
    draft.set_rope()
    model.setup_caches(1, 200, "bf16")
    (out,) = generate.generate(model, [some_ids(10)], 13, stop=(), speculate=8, draft=draft.eval())
    assert len(out) == 23 and model.cache.lengths == [22]


def test_drafts_that_cannot_be_are_refused(model, checkpoint, tmp_path):
    ids = [some_ids(10)]
    for n in (-1, 16):
        with pytest.raises(ValueError, match="15"):
            generate.generate(model, ids, 5, speculate=n, **SMALL)
    with pytest.raises(ValueError, match="its own"):
        generate.generate(model, ids, 5, speculate=2, draft=model, **SMALL)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    dynamic = Transformer.from_pretrained(changed(checkpoint, tmp_path, rope_scaling=scaling))
    with pytest.raises(ValueError, match="dynamic"):
        generate.generate(dynamic, ids, 5, speculate=2, **SMALL)


class Stubborn(Lookups):
    """Drafts that are always the same."""

    def __call__(self, texts, lengths, most):
        return [self.drafts[:n] for n in most]


@pytest.mark.slow
def test_sampled_texts_keep_their_distribution(model):
    """2,400 texts of three sampled tokens with two drafts that are right in some of them, against
    the exact probabilities. Guards against drafts that are accepted too often, and against a token
    behind a refused draft that is drawn from the whole distribution once more."""
    torch.manual_seed(0)
    ids, rows = some_ids(12), 400
    sampling = {"temperature": 1.5, "top_k": 2}

    def probabilities(text):
        logits, tokens = model(torch.tensor([text]))[0, -1].topk(2)
        return dict(zip(tokens.tolist(), (logits / 1.5).softmax(0).tolist()))

    exact = {}
    for first, p1 in probabilities(ids).items():
        for second, p2 in probabilities([*ids, first]).items():
            for third, p3 in probabilities([*ids, first, second]).items():
                exact[first, second, third] = p1 * p2 * p3
    likely = max(exact, key=exact.get)
    model.setup_caches(rows, 40, "bf16")
    propose = Stubborn()
    propose.drafts = list(likely[1:])
    token = torch.zeros(rows, 1, dtype=torch.int64)
    decoder = Speculator(model, token, 3, propose, **sampling)
    found = Counter()
    for _ in range(6):
        texts = generate.generate(model, [ids] * rows, 3, stop=(), decoder=decoder)
        found.update(tuple(text[len(ids):]) for text in texts)
    assert set(found) <= set(exact)
    n = sum(found.values())
    chi2 = sum((found[x] - n * p) ** 2 / (n * p) for x, p in exact.items())
    assert chi2 < 24.3, (chi2, found, exact)  # 7 degrees of freedom: one in 1,000


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:3], ids=("bf16", "kivi2", "kivi2+"))
def test_the_compiled_text_is_the_same(checkpoint, options, fresh_compiler):
    net = Transformer.from_pretrained(checkpoint)
    prompts = [some_ids(9) * 4, some_ids(23, seed=1)]
    want = generate.generate(net, prompts, 60, stop=(), **options)
    net.compile()
    assert generate.generate(net, prompts, 60, stop=(), speculate=4, **options) == want
