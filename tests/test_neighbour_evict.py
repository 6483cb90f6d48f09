"""neighbours/evict.py: which tokens stay, against a cache written here on one row and one KV head.

The reference reads tokens one after the other, in float64 and with a dictionary for slots.
"""
import itertools
import json
import re
from unittest.mock import Mock

import pytest
import torch
from cache_cases import assert_same, refused, row_state, state
from calling import check_error, result_of, run, type_lines
from make_golden import tokens as some_tokens
from reference import changed
from reference_cache import attention64, randn, rel
from safetensors.torch import load_file, save_file

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
    """q [B, H, n, D], k, v [B, Hk, n, D]: some keys are louder: attention has favourites."""
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


def test_sizes_are_those_of_the_buffers():
    """Guards against slots that sinks and newest tokens fill, a share that counts as all, traffic
    of tokens that are not held."""
    cache = make(EvictConfig(slots=10, sink=8), dtype=torch.bfloat16)
    assert cache.recent == 2 and make(EvictConfig(share=0.01, sink=8)).slots == 9
    kept = sum(x.numel() * x.itemsize for name, x in cache.contents().items() if name != "pos")
    assert cache.config.stored_bits(D) == 8 * kept / (2 * HK * 10 * D)
    assert EvictConfig(share=0.25).stored_bits(D) == cache.config.stored_bits(D) / 4
    read = (cache.k_window.nbytes + cache.v_window.nbytes + cache.born.nbytes) / 10  # of one slot
    assert [cache.traffic(n) for n in (1, 5, 10, 99)] == [read, 5 * read, 10 * read, 10 * read]


# ---- in a model ---------------------------------------------------------------------------------

def layer_0(model, ids):
    """q, k, v of a text's tokens [n] in the first layer, which depend on no cache."""
    layer = model.layers[0]
    x = model.embed(ids[None])
    return layer.attention.qkv(layer.attention_norm(x), *model.rope(torch.arange(len(ids))[None]))


@torch.no_grad()
@pytest.mark.parametrize("groups", ((1, 1024), (2, 1024), (1, 7), (2, 7)))
def test_a_model_reads_and_decodes_as_in_the_reference(model, groups, monkeypatch):
    """Two rows of a prompt, 12 steps, a second text; row by row, together and in parts. Guards
    against padding that counts, parts of a prompt that forget those before, the second turn of a
    conversation that does not see what the first one held."""
    monkeypatch.setattr(model, "groups", lambda *_: groups)
    ids = torch.cat([some_tokens(90, seed) for seed in (0, 1)])
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

    model.extend(ids[:, :25], lengths)
    new, lengths = lengths, [0, 0]
    both("read", new)
    for _ in range(12):
        cache.advance()
        model.decode(torch.stack([ids[row, n : n + 1] for row, n in enumerate(lengths)]),
                     cache.tokens(cache.length))
        both("append", [1, 1])
    more = torch.stack([ids[row, n : n + 20] for row, n in enumerate(lengths)])
    model.extend(more, [20, 9])
    both("read", [20, 9])


@torch.no_grad()
def test_a_prompt_that_came_to_no_end_counts_nothing(model, monkeypatch):
    """Guards against sums of an interrupted prompt that the next one goes on with."""
    ids, states = some_tokens(40), []
    for interrupted in (True, False):
        model.setup_caches(1, 80, f"h2o:slots={N}")
        if interrupted:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(EvictCache, "fill", Mock(side_effect=KeyboardInterrupt))
                model.extend(ids[:, :30], chunk=10)
        model.extend(ids, chunk=10)
        states.append(model.cache.state())
    assert_same(*({name: x for name, x in s.items() if torch.is_tensor(x)} for s in states))


@torch.no_grad()
def test_with_a_slot_for_every_token_it_is_the_full_cache(model):
    """Two texts with steps between. Guards against keys that are rotated anew, and a past that is
    seen in part."""
    ids = some_tokens(60)
    logits = {}
    for kv in ("bf16", "h2o:1", "h2o:slots=64"):
        model.setup_caches(1, 60, kv)
        logits[kv] = [model.extend(ids[:, :20])]
        for t in range(20, 40):
            model.cache.advance()
            logits[kv].append(model.decode(ids[:, t : t + 1], model.cache.tokens(t + 1)))
        logits[kv].append(model.extend(ids[:, 40:]))
    for kv in ("h2o:1", "h2o:slots=64"):
        assert rel(torch.cat(logits[kv]), torch.cat(logits["bf16"])) < 1e-5


@pytest.fixture
def files(model, tmp_path):
    """What `python -m neighbours.calibrate` may write for the tiny checkpoint, by method."""
    c = model.config
    shape = c.n_layers, c.n_kv_heads, c.head_dim * 3 // 2 + 3
    fits = {"prefixkv": {"slots": torch.tensor([24.0, 40.0])},
            "gate": {"weight": randn(*shape), "share": torch.tensor(0.25)}}
    for method, tensors in fits.items():
        fitted.write(tmp_path / method, method, tensors, model)
    return {method: f"{method}:{tmp_path / method}" for method in fits}


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("method", ("prefixkv", "gate"))
def test_compiled_steps_equal_plain_ones_and_recompile_nothing(method, files, checkpoint,
                                                               fresh_compiler):
    """Before and after the slots are full, in layers of unequal slots or gates. Guards against a
    graph that breaks, a length or a gate that is a constant in it, a step that reads what another
    writes."""
    # No token twice: in the first layer a gate would rate both alike, and rounding would choose.
    ids = randn(2, 260, seed=1).argsort(1)[:, :80]
    logits = {}
    for compiled in (False, True):
        model = Transformer.from_pretrained(checkpoint)
        model.setup_caches(2, 80, files[method])
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


# ---- what is fitted -----------------------------------------------------------------------------

def test_slots_of_layers_hold_the_same_share_of_attention(model, monkeypatch):
    """Against all shares that make a difference, tried one by one, on attention computed here.
    Guards against curves that are not sorted, heads whose slots hold tokens in orders of their own,
    a search that ends beside the wanted total, texts that are mixed, and a unit that layers get
    beyond the total."""
    monkeypatch.setattr(fit, "UNIT", 1)
    ids, n, read = torch.cat([some_tokens(50, seed) for seed in (0, 1)]), 50, {}
    for number, layer in enumerate(model.layers):
        def record(*args, number=number, qkv=layer.attention.qkv):
            read[number] = qkv(*args)
            return read[number]
        monkeypatch.setattr(layer.attention, "qkv", record)
    model(ids)
    curves = [[] for _ in ids]  # of each text and layer
    for row, (q, k, _) in itertools.product(range(len(ids)), read.copy().values()):
        k = k[row].repeat_interleave(q.shape[1] // k.shape[1], 0).double()
        scores = q[row].double() @ k.mT * q.shape[3] ** -0.5
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        attention = scores.softmax(-1).mean(0).sum(0)
        curves[row].append((attention.sort(descending=True).values / attention.sum()).cumsum(0))

    def best(curves, wanted, least):
        """Tokens of each layer by the largest share that is not too much."""
        for share in torch.cat(curves).sort(descending=True).values.tolist():
            counts = [max(least, int((curve < share - 1e-7).sum()) + 1) for curve in curves]
            if sum(counts) <= wanted * len(curves):
                return torch.tensor(counts).float()

    for wanted in range(3, 48, 3):
        for least in (wanted, wanted - 1, 1):
            mean = sum(best(text, wanted, least) for text in curves) / len(curves)
            assert fit.counts(model, ids, wanted, least).tolist() == mean.tolist()
        found = fit.fit_slots(model, ids, wanted)["slots"]
        assert found.tolist() == mean.round().long().tolist()
        assert abs(found.sum() - wanted * len(model.layers)) <= len(model.layers)


def test_a_gate_finds_a_linear_law(model, monkeypatch):
    """Tokens whose mean attention follows a gate exactly. Guards against features of the wrong
    token or head, sums in place of means, ends of the text that are fitted, too."""
    caches, law = [], 0.2 * randn(2, HK, D * 3 // 2 + 3, seed=5)
    for weight in law:
        cache = EvictConfig(slots=200).make(3, HK, 200, D)
        cache.k_window.copy_(randn(3, HK, 200, D, seed=6))
        cache.v_window.copy_(randn(3, HK, 200, D, seed=7))
        cache.born.copy_(torch.stack([torch.randperm(200) + 1 for _ in range(6)]).view(3, HK, 200))
        x = features(cache.k_window, cache.v_window)
        cache.score.copy_((x @ weight[:, :, None])[..., 0].exp() * (201 - cache.born))
        cache.score[(cache.born <= 4) | (cache.born > 184)] = 1e9
        caches.append(cache)
    monkeypatch.setattr(fit, "observed", lambda model, tokens: caches)
    found = fit.fit_gate(model, torch.zeros(3, 200, dtype=torch.int64), 0.25)
    for cache, weight, got in zip(caches, law, found["weight"]):
        x = features(cache.k_window, cache.v_window)
        assert rel(x @ got[:, :, None], x @ weight[:, :, None]) < 0.01
    assert found["share"] == 0.25


def test_a_gate_needs_no_queries():
    """Guards against a gate that waits for attention, padding that is kept, another choice than
    with queries."""
    (q, k, v), caches = text(2, 40), [make(CONFIGS["gate"], batch=2) for _ in range(2)]
    k[1, :, 7:] = torch.nan
    caches[0].prefill(k, v, [40, 7])
    caches[1].extend(q, k, v, [40, 7])
    assert_same(state(caches[0]), state(caches[1]))
    assert caches[0].state()["k_window"].isfinite().all()


# ---- the programs -------------------------------------------------------------------------------

def test_the_program_runs_with_the_embedded_model():
    """Guards against a name that is not registered, and a cache that grows with the text."""
    found = result_of("--kv", "h2o:0.2", "--max-new-tokens", 40, "--temperature", 0)
    assert found["new_tokens"] == 40 and found["kv"] == "h2o:0.2"
    assert found["kv_bytes"] < 0.25 * found["kv_bytes_full"]


def test_a_text_does_not_depend_on_the_others_of_its_file(checkpoint, files, tmp_path):
    """Guards against a share of the capacity, which the longest prompt decides."""
    file, texts = tmp_path / "prompts.txt", []

    def answers(kv):
        return run("--checkpoint", checkpoint, "--prompts", file, "--kv", kv, "--temperature", 0,
                   "--max-new-tokens", 20, "--json")

    for other in ("And then", "A prompt that is longer than the other one"):
        file.write_text(f"One day the old man\n{other}\n")
        code, out, err = answers("h2o:slots=12")
        assert code == 0, err
        texts.append(json.loads(out.splitlines()[0])["text"])
        for kv in ("h2o:0.2", files["gate"]):
            check_error(answers(kv), "--prompts", "h2o:slots=N")
    assert texts[0] == texts[1]


def test_a_conversation_goes_on_from_what_is_held(monkeypatch):
    """Guards against a second turn that reads all again, or fails."""
    type_lines(monkeypatch, "One day the old man", "And then", "At last")
    code, _, err = run("--interactive", "--max-new-tokens", 10, "--temperature", 0,
                       "--kv", "h2o:slots=12,mean")
    read = [int(n) for n in re.findall(r"tokens, (\d+) of them read", err)]
    assert code == 0 and len(read) == 2 and max(read) < 10, err


@pytest.mark.parametrize("method, option, value", (
    ("prefixkv", "--slots", 100), ("gate", "--share", 0.3), ("zipvl", "--share", 0.4)))
def test_what_was_fitted_runs(method, option, value, checkpoint, tmp_path):
    """From a text to an answer, in two programs. Guards against a file that its reader refuses."""
    book, file = tmp_path / "book.txt", tmp_path / "fit"
    book.write_text("All that is gold does not glitter. " * 40)
    code, _, err = run(method, file, "--text", book, "--checkpoint", checkpoint, "--rows", 2,
                       "--tokens", 200, option, value, main=calibrate.main)
    assert code == 0, err
    found = result_of("--checkpoint", checkpoint, "--kv", f"{method}:{file}",
                      "--max-new-tokens", 100)
    assert found["new_tokens"] > 1


def test_a_fit_is_of_one_model(model, files, checkpoint, tmp_path):
    """It fits the model in every dtype, with other weights and in every process; it does not fit
    another with the same shapes. Guards against a file of a base model that is taken for its
    instruct sibling, and against one that is refused for rounding."""
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"weights": "int8"}):
        same = Transformer.from_pretrained(checkpoint, **options)
        for kv in files.values():
            assert len(same.kv_configs(kv)) == 2
    model.config.ranks = 0, 2
    assert len(model.kv_configs(files["prefixkv"])) == 2
    refused(lambda: model.kv_configs(files["gate"]), "torchrun")
    weights = load_file(checkpoint / "model.safetensors")
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    for theta, name in ((10001.0, None), (10000.0, norm), (10000.0, embedding)):
        folder = changed(checkpoint, tmp_path, rope_theta=theta)
        other = weights | ({name: weights[name] * 1.01} if name else {})
        save_file(other, folder / "model.safetensors")
        for kv in files.values():
            refused(lambda: Transformer.from_pretrained(folder).kv_configs(kv), "another model")


def test_what_cannot_be_is_refused_in_one_line(model, files, tmp_path):
    """Guards against a traceback, and a setting that is ignored."""
    def kv(name, **options):
        return lambda: model.setup_caches(1, 80, name, **options)

    for wrong in ("h2o", "h2o:half", "h2o:slots=0", "h2o:0.2,median", "h2o:7"):
        refused(kv(wrong), "h2o:slots=256")
    refused(kv("h2o:0"), "share")
    for more in (("--interactive",), ("--save-cache", tmp_path / "cache")):  # other capacities
        check_error(run("--kv", "h2o:0.2", *more), "h2o:slots=N", more[0])
    refused(kv("h2o:1.5"), 1.5)
    refused(kv("h2o:0.2", group_size=16), "--group-size")
    refused(kv("h2o:slots=64", sink=4, residual=60), 64, 60, "more slots")
    refused(kv("h2o:0.2", sink=-1), -1)
    for newest in (15, 300):  # the share of 80 tokens is 16 slots
        refused(kv("h2o:0.2", sink=1, residual=newest), 16, newest, "larger share")
    kv("h2o:0.2", sink=1, residual=14)()
    for method in ("prefixkv", "gate"):
        refused(kv(f"{method}:"), f"{method} needs a file", f"neighbours.calibrate {method}")
    for wrong in ("prefixkv", "gate", f"gate:{tmp_path / 'none'}", f"gate:{__file__}"):
        refused(kv(wrong), "neighbours.calibrate")
    refused(kv(files["gate"].replace("gate:", "prefixkv:")), "prefixkv", "not written")
    fitted.write(tmp_path / "other", "prefixkv", {"slots": torch.tensor([64.0] * 3)}, model)
    refused(kv(f"prefixkv:{tmp_path / 'other'}"), "another model", 3)
    weight = torch.full((2, HK, 32 * 3 // 2 + 3), torch.nan)
    bad = {"weight": weight, "share": torch.tensor(0.25)}
    fitted.write(tmp_path / "bad", "gate", bad, model)
    refused(kv(f"gate:{tmp_path / 'bad'}"), "NaN")
    fitted.write(tmp_path / "bad", "gate", bad | {"weight": weight.half()}, model)
    refused(kv(f"gate:{tmp_path / 'bad'}"), "float32")
    fitted.write(tmp_path / "bad", "prefixkv", {"slots": torch.tensor([0.0, 64.0])}, model)
    refused(kv(f"prefixkv:{tmp_path / 'bad'}"), "slots")
    model.layers[1].window = 30
    refused(kv("h2o:0.2"), "sliding window")
    q, k, v = text(1, 10)
    cache = make(CONFIGS["h2o"])
    refused(lambda: cache.prefill(k, v), "extend(q, k, v)")
    cache.extend(q, k, v)
    cache.reset()
    refused(lambda: cache.prefill(k, v), "extend(q, k, v)")  # the sums are used up


def test_the_command_refuses_in_one_line(checkpoint, tmp_path, monkeypatch):
    """Guards against a traceback after minutes, or a file of nothing."""
    book = tmp_path / "book.txt"
    book.write_text("All that is gold does not glitter. " * 40)

    def calls(method, *more, text=book, file=tmp_path / "fit"):
        return run(method, file, "--text", text, "--checkpoint", checkpoint, *more,
                   main=calibrate.main)

    check_error(calls("h2o"), "prefixkv")
    check_error(calls("gate", text=tmp_path / "none"), "none")
    for data, named in ((b"a\xff\xfeb", "utf-8"), (b"a\0b", "UTF-8")):  # no text in a known coding
        (tmp_path / "bytes").write_bytes(data * 999)
        check_error(calls("gate", text=tmp_path / "bytes"), "bytes", named)
    check_error(calls("gate", "--rows", 9), "9 rows", "--text")
    check_error(calls("gate", "--tokens", 20), "20")
    for method in ("nuq", "predict", "prefixkv", "zipvl"):  # of too few, or more than the context
        for n in (2, 63, 513):
            check_error(calls(method, "--rows", 1, "--tokens", n), "--tokens", "64", "512", str(n))
    check_error(calls("gate", "--tokens", 99, "--share", 2), "share")
    for slots in (63, 100):
        check_error(calls("prefixkv", "--tokens", 99, "--slots", slots), "64", "99", str(slots))
    check_error(calls("zipvl", "--tokens", 99, "--share", 0.9), "--share", "0.9")
    check_error(calls("prefixkv", "--tokens", 99, "--slots", 64, file=tmp_path / "no" / "fit"),
                "cannot be written")
    monkeypatch.setattr(Transformer, "from_pretrained", None)  # before the model is read
    check_error(calls("nuq", "--tokens", 99, file=tmp_path), "cannot be written")
