"""neighbours/evict.py: which tokens stay, against a cache written here on one row and one KV head.

The reference reads tokens one after the other, in float64 and with a dictionary for slots.
"""
from dataclasses import replace

import pytest
import torch
from cache_cases import assert_same, refused, row_state, state
from calling import check_error, process, result_of, run
from make_golden import tokens as some_tokens
from reference_cache import attention64, randn, rel
from torch.nn import functional as F

import generate
from model import Transformer
from neighbours import calibrate, fit, fitted
from neighbours.evict import EvictCache, EvictConfig, features

H, HK, D, N = 4, 2, 16, 12
GATE = randn(HK, D * 3 // 2 + 3, seed=9)
CONFIGS = {
    "h2o": EvictConfig(slots=N),
    "mean": EvictConfig(slots=N, mean=True),
    "sinks": EvictConfig(slots=N, sink=2, residual=3),
    "gate": EvictConfig(slots=N, sink=2, gate=GATE),
    "share": EvictConfig(share=0.15),
}
all_configs = pytest.mark.parametrize("name", CONFIGS)


class Reference:
    """The tokens that one row and one KV head hold: {token: [k, v, score]}."""

    def __init__(self, slots, recent, sink, mean=False, gate=None):
        self.slots, self.recent, self.sink, self.mean, self.gate = slots, recent, sink, mean, gate
        self.held, self.newest, self.length, self.queries = {}, {}, 0, 0

    def score(self, k, v):
        if self.gate is None:
            return 0.0
        half = len(k) // 2
        pairs = (k[:half] ** 2 + k[half:] ** 2).sqrt()
        sees = torch.cat([v, pairs, v.norm()[None], pairs.norm()[None], torch.ones(1).double()])
        return (sees * self.gate.double()).sum().item()

    def worth(self, token):
        score = self.held[token][2]
        return score / (self.queries - token) if self.mean else score

    def drop(self, slots):
        """Drops the worst tokens that may go, until so many are left."""
        free = [t for t in self.held if self.sink <= t < self.length - self.recent]
        worst = sorted(free, key=self.worth)[: max(0, len(self.held) - slots)]
        for t in worst:
            del self.held[t]

    def count(self):
        for t, attention in self.newest.items():
            self.held[t][2] += attention if self.gate is None else 0
        self.newest = {}

    def put(self, k, v):
        self.held[self.length] = [k.double(), v.double(), self.score(k.double(), v.double())]
        self.length += 1

    def append(self, k, v):
        """Of one new token; what came before has been seen by all queries up to its own."""
        self.count()
        self.queries = self.length
        newcomer = self.length
        self.length += 1  # it is one of the newest already
        self.drop(self.slots - 1)
        self.length = newcomer
        self.put(k, v)

    def attend(self, q):
        """q [M, D] -> [M, D]; remembers what each token got."""
        k, v = (torch.stack([entry[i] for entry in self.held.values()]) for i in (0, 1))
        p = (q.double() @ k.mT * k.shape[1] ** -0.5).softmax(-1)
        self.newest = dict(zip(self.held, p.sum(0).tolist()))
        return p @ v

    def read(self, q, k, v):
        """A text of n tokens: exact attention [M, n, D], and then the best stay."""
        out = []
        for t in range(k.shape[0]):
            self.count()
            self.put(k[t], v[t])
            out.append(self.attend(q[:, t]))
        self.count()
        self.queries = self.length
        self.drop(self.slots)
        return torch.stack(out, 1)


def references(cache):
    """One for every row and KV head of a cache."""
    c = cache.config
    gates = [None] * cache.n_kv_heads if c.gate is None else c.gate
    return [[Reference(cache.slots, cache.recent, c.sink, c.mean, gate) for gate in gates]
            for _ in range(cache.batch)]


def make(config, batch=1, max_len=100, dtype=torch.float32):
    return config.make(batch, HK, max_len, D, dtype=dtype)


def text(batch, n, seed=0, dtype=torch.float32):
    """q [B, H, n, D], k, v [B, Hk, n, D]: some keys are louder, so that attention has favourites."""
    k = 1.5 * randn(batch, HK, n, D, seed=seed) * (1 + randn(batch, HK, n, 1, seed=seed + 1).abs())
    q, v = randn(batch, H, n, D, seed=seed + 2), randn(batch, HK, n, D, seed=seed + 3)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def step(cache, q, k, v):
    cache.append(k, v)
    return cache.attend(q)


def held(cache, row, head):
    """The tokens in the slots of a row and head, and their scores."""
    born = cache.born[row, head]
    score = (cache.score + cache.newest)[row, head]
    return {t - 1: s for t, s in zip(born.tolist(), score.tolist()) if t}


def check_held(cache, expected, row, head):
    """The same tokens, once each, with the same scores."""
    assert (cache.born[row, head] > 0).sum() == min(cache.lengths[row], cache.slots)
    got = held(cache, row, head)
    want = {t: entry[2] + expected.newest.get(t, 0) * (expected.gate is None)
            for t, entry in expected.held.items()}
    assert got.keys() == want.keys()
    assert all(abs(got[t] - want[t]) <= 1e-4 * (1 + abs(want[t])) for t in want)


@all_configs
def test_a_text_decoding_and_another_text_are_as_in_the_reference(name):
    """Prompts of unequal lengths, shorter and longer than the slots, 30 steps, a second text, 10
    steps. Guards against a token dropped too early or too late, a step that is counted twice or
    not at all, padding that counts, a mean by the wrong number of queries, a second text that
    forgets the scores, newest tokens or sinks that go."""
    cache = make(CONFIGS[name], batch=3)
    assert (cache.slots, cache.recent) == {"share": (15, 7), "sinks": (N, 3)}.get(name, (N, 6))
    q, k, v = text(3, 100)
    expected, lengths = references(cache), [0, 0, 0]

    def read(new):
        parts = [torch.full((3, x.shape[1], max(new), D), 1e4) for x in (q, k, v)]
        for x, part in zip((q, k, v), parts):
            for row, n in enumerate(new):
                part[row, :, :n] = x[row, :, lengths[row] : lengths[row] + n]
        out = cache.extend(*parts, new)
        for row, n in enumerate(new):
            for head in range(HK):
                at = slice(lengths[row], lengths[row] + n)
                queries = q[row, 2 * head : 2 * head + 2, at]
                want = expected[row][head].read(queries, k[row, head, at], v[row, head, at])
                assert rel(out[row, 2 * head : 2 * head + 2, :n], want) < 1e-5
            lengths[row] += n

    def steps(n):
        for _ in range(n):
            new = [torch.stack([x[row, :, at : at + 1] for row, at in enumerate(lengths)])
                   for x in (q, k, v)]
            out = step(cache, *new)
            for row, at in enumerate(lengths):
                for head in range(HK):
                    one, heads = expected[row][head], slice(2 * head, 2 * head + 2)
                    one.append(k[row, head, at], v[row, head, at])
                    assert rel(out[row, heads, 0], one.attend(q[row, heads, at])) < 1e-5
                    check_held(cache, one, row, head)
                lengths[row] += 1

    read([5, 11, 40])
    steps(30)
    read([20, 1, 7])
    steps(10)
    for row in range(3):  # sinks and the newest are there
        for head in range(HK):
            kept = set(range(CONFIGS[name].sink))
            kept |= set(range(lengths[row] - cache.recent, lengths[row]))
            assert kept <= held(cache, row, head).keys()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_reads_what_it_holds(dtype):
    """Guards against scores or products that are rounded to half precision: 0.004 is bfloat16's own
    rounding of the result."""
    cache = make(CONFIGS["h2o"], dtype=dtype)
    q, k, v = text(1, 60, dtype=dtype)
    cache.extend(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    for t in range(30, 60):
        new = slice(t, t + 1)
        out = step(cache, q[:, :, new], k[:, :, new], v[:, :, new])
        keys, values = cache.dequantized()
        assert out.dtype == keys.dtype == dtype and keys.shape == (1, HK, N, D)
        assert rel(out[0, :, 0], attention64(q[0, :, t], keys[0], values[0])) < 0.004
    # Each query gave 1 in all to the tokens of its heads; what was dropped took its part along.
    assert cache.score.dtype == torch.float32 and 0 < cache.score.sum() < H * 60
    stored = torch.isin(keys[0, 0], k[0, 0]).all()
    assert stored, "a key was rounded or mixed"


@all_configs
def test_a_step_that_runs_twice_counts_once(name):
    """Before and after the slots are full, from the first token of a row on. Guards against the
    warm-up of a CUDA graph that counts attention twice or takes a second slot."""
    once, twice = (make(CONFIGS[name], batch=2) for _ in range(2))
    q, k, v = text(2, 30)
    for t in range(30):
        new = slice(t, t + 1)
        step(once, q[:, :, new], k[:, :, new], v[:, :, new])
        for _ in range(2):
            twice.write(k[:, :, new], v[:, :, new], twice.pos[:, None])
            twice.attention(q[:, :, new], twice.pos, twice.tokens(t + 1))
        twice.advance()
        twice.pos += 1
        assert_same(state(once), state(twice))


@all_configs
def test_a_parked_row_is_refilled_and_a_reset_leaves_nothing(name):
    """A row that was full is parked, goes on beside the others for 3 steps, and gets a new text;
    another begins anew by appends alone. Guards against counters, scores or tokens of the text
    before, NaN among them."""
    used, fresh = (make(CONFIGS[name], batch=2) for _ in range(2))
    q, k, v = text(2, 60)
    used.extend(q, k, v)
    used.k_window[0, :, 3] = used.v_window[0, :, 3] = used.score[0] = used.newest[0] = torch.nan
    used.park(0)
    for _ in range(3):
        step(used, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    used.park(0)
    own = slice(0, 1)
    for cache in (used, fresh):
        if cache.gate is None:
            cache.observe(q[own, :, :9], k[own, :, :9], 0, torch.tensor([9]))
        cache.fill(k[own, :, :9], v[own, :, :9], cache.pos[own], torch.tensor([9]), 0)
        cache.set_lengths([9])
    assert_same(row_state(used, 0), row_state(fresh, 0))
    used.park(1)
    used.park(0)
    anew = make(CONFIGS[name], batch=2)
    for t in range(20):
        new = slice(t, t + 1)
        outs = [step(cache, q[:, :, new], k[:, :, new], v[:, :, new]) for cache in (used, anew)]
        assert torch.equal(*outs)
    used.reset()
    assert_same(state(used), state(make(CONFIGS[name], batch=2)))


@all_configs
def test_a_state_and_a_fork_go_on_alike(name):
    """Guards against a buffer that a state or a fork forgets, and slots that change with max_len
    unless they are a share of it."""
    first = make(CONFIGS[name], batch=2)
    q, k, v = text(2, 60)
    first.extend(q[:, :, :20], k[:, :, :20], v[:, :, :20], [20, 4])
    step(first, q[:, :, 20:21], k[:, :, 20:21], v[:, :, 20:21])
    longer = make(CONFIGS[name], batch=3, max_len=150)
    if name == "share":
        refused(lambda: longer.load_state(first.state()), "slots", 15, 22)
        longer = make(CONFIGS[name], batch=3)
    longer.load_state(first.state(), row=1)
    longer.fork(1, [0])
    for t in range(21, 60):
        new = slice(t, t + 1)
        more = [torch.cat([x[:1, :, new], x[:, :, new]]) for x in (q, k, v)]
        out = step(longer, *more)
        assert torch.equal(out[1:], step(first, q[:, :, new], k[:, :, new], v[:, :, new]))
        assert torch.equal(out[0], out[1])


# ---- in a model ---------------------------------------------------------------------------------

def layer_0(model, ids):
    """q, k, v of a text's tokens [n] in the first layer, which depend on no cache."""
    layer = model.layers[0]
    x = model.embed(ids[None])
    return layer.attention.qkv(layer.attention_norm(x), *model.rope(torch.arange(len(ids))[None]))


@torch.no_grad()
@pytest.mark.parametrize("chunk", (None, 1000, 7))
def test_a_model_reads_and_decodes_as_in_the_reference(model, chunk):
    """Two rows of a prompt, 12 steps, a second text; in one piece, together and in parts. Guards
    against padding that counts, parts of a prompt that forget those before, the second turn of a
    conversation that does not see what the first one held."""
    ids = torch.stack([some_tokens(90, seed) for seed in (0, 1)])
    texts = [layer_0(model, row) for row in ids]
    model.setup_caches(2, 90, f"h2o:slots={N}")
    cache, lengths = model.cache, [25, 14]
    expected = references(cache)

    def reference(row, head, at, method):
        q, k, v = (x[0] for x in texts[row])
        one, heads = expected[row][head], q.shape[0] // cache.n_kv_heads
        queries = q[heads * head : heads * (head + 1), at]
        if method == "read":
            one.read(queries, k[head, at], v[head, at])
        else:
            one.append(k[head, at.start], v[head, at.start])
            one.attend(queries[:, 0])

    def both(method, new):
        for row, n in enumerate(new):
            for head in range(cache.n_kv_heads):
                reference(row, head, slice(lengths[row], lengths[row] + n), method)
                check_held(cache, expected[row][head], row, head)
            lengths[row] += n

    model.extend(ids[:, :25], lengths, chunk=chunk)
    new, lengths = lengths, [0, 0]
    both("read", new)
    for _ in range(12):
        cache.advance()
        model.decode(torch.stack([ids[row, n : n + 1] for row, n in enumerate(lengths)]),
                     cache.tokens(cache.length))
        both("append", [1, 1])
    more = torch.stack([ids[row, n : n + 20] for row, n in enumerate(lengths)])
    model.extend(more, [20, 9], chunk=chunk)
    both("read", [20, 9])


@torch.no_grad()
def test_with_a_slot_for_every_token_it_is_the_full_cache(model):
    """Two texts with steps between. Guards against keys that are rotated anew, and a past that is
    seen in part."""
    ids = some_tokens(60)[None]
    logits = {}
    for kv in ("bf16", "h2o:1", "prefix"):
        model.setup_caches(1, 60, "h2o:slots=64" if kv == "prefix" else kv)
        logits[kv] = [model.extend(ids[:, :20])]
        for t in range(20, 40):
            model.cache.advance()
            logits[kv].append(model.decode(ids[:, t : t + 1], model.cache.tokens(t + 1)))
        logits[kv].append(model.extend(ids[:, 40:]))
    for kv in ("h2o:1", "prefix"):
        assert rel(torch.cat(logits[kv]), torch.cat(logits["bf16"])) < 1e-5


@torch.no_grad()
@pytest.mark.slow
def test_compiled_steps_equal_plain_ones_and_recompile_nothing(checkpoint, fresh_compiler):
    """Before and after the slots are full, in layers of unequal slots. Guards against a graph that
    breaks, a length that is a constant in it, a repeated first step that counts twice."""
    ids = torch.stack([some_tokens(80, seed) for seed in (0, 1)])
    logits = {}
    for compiled in (False, True):
        model = Transformer.from_pretrained(checkpoint)
        model.setup_caches(2, 80, "h2o:slots=24")
        if compiled:
            model.compile()
        model.prefill(ids[:, :10])
        logits[compiled] = []
        for t in range(10, 80):
            stance = "fail_on_recompile" if compiled and t > 12 else "default"
            with torch.compiler.set_stance(stance):
                model.cache.advance()
                logits[compiled].append(model.decode(ids[:, t : t + 1], model.cache.tokens(t + 1)))
                if t < 14:
                    model.flush()
    assert rel(torch.stack(logits[True]), torch.stack(logits[False])) < 1e-4
