"""neighbours/tiers.py, packed.py and observed.py: two tiers of packed tokens, and who chooses."""
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from cache_cases import assert_same, at, refused, state
from calling import check_error, result_of, run
from fused.step import compiled_step
from model import OTHERS
from neighbours import fit, fitted, observed
from neighbours.evict import EvictConfig
from neighbours.observed import column_sums
from neighbours.packed import Tier
from neighbours.tiers import TierCache, TierConfig
from reference_cache import (
    DTYPES, HALF_EPS, attention64, boosted_channels, fake_quantized, keys_like, loudest_first,
    randn, rel)


# ---- column sums of attention -------------------------------------------------------------------

def probabilities(q, k):
    """Causal softmax in float64, a query and a head at a time: [b, H, n, T]."""
    n, T = q.shape[2], k.shape[2]
    out = torch.zeros(*q.shape[:3], T, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            keys = k[b, h * k.shape[1] // q.shape[1]].double()
            for i in range(n):
                end = T - n + i + 1
                scores = keys[:end] @ q[b, h, i].double() / q.shape[3] ** 0.5
                out[b, h, i, :end] = scores.softmax(0)
    return out


def test_column_sums_are_those_of_the_probabilities(monkeypatch):
    """In one chunk and in many, behind tokens that are there already. Guards against a chunk that
    sees too few keys or too many, and query heads of another KV head."""
    for B, H, Hk, n, T in ((2, 4, 2, 30, 41), (1, 3, 3, 40, 40), (1, 2, 1, 1, 1)):
        q, k = 3 * randn(B, H, n, 8), randn(B, Hk, T, 8, seed=1)
        wanted = probabilities(q, k).unflatten(1, (Hk, -1)).sum((2, 3))
        for chunk in (2**24, 1000):
            monkeypatch.setattr(observed, "CHUNK", chunk)
            torch.testing.assert_close(column_sums(q, k).double(), wanted, atol=1e-5, rtol=1e-5)


def test_column_sums_of_some_queries_estimate_those_of_all():
    """Guards against probes that count too little or too much, and tokens that only the newest 64
    queries see but do not count exactly."""
    k = randn(1, 2, 140, 8)
    even = torch.zeros(1, 4, 120, 8)  # a query pays every token that it sees the same
    p = probabilities(even, k)
    probes = [*range(0, 56, 8), *range(56, 120)]
    seen = (p > 0).double()
    weighted = sum((8 if i < 56 else 1) * p[:, :, i] for i in probes)
    counted = sum((8 if i < 56 else 1) * seen[:, :, i] for i in probes)
    wanted = (weighted / counted * seen.sum(2)).unflatten(1, (2, -1)).sum(2)
    torch.testing.assert_close(column_sums(even, k, every=8).double(), wanted, atol=1e-5, rtol=1e-5)
    loud = randn(1, 4, 120, 8, seed=2)
    newest = slice(140 - 64, None)
    torch.testing.assert_close(column_sums(loud, k, every=8)[..., newest],
                               column_sums(loud, k)[..., newest])


# ---- the tiers, token by token ------------------------------------------------------------------

SMALL = TierConfig(group_size=8, residual=32, boost=8, v_group_size=8)
CONFIGS = {
    "zipcache": SMALL,
    "mikv": replace(SMALL, hi=8, mean=0, sink=0, boost=0),
    "lag": replace(SMALL, share=0.5, lag=5, sink=9, v_group_size=16),
    "K 4 V 2": replace(SMALL, k_bits=4, hi=8),
}
HEADS, D = 2, 16  # KV heads, of two query heads each


class Row:
    """One row of a TierCache by its definition, a token and a KV head at a time."""

    def __init__(self, config):
        self.c, self.n = config, 0
        self.k = self.v = torch.zeros(HEADS, 0, D)
        self.sums = torch.zeros(HEADS, 0, dtype=torch.float64)
        self.read = {}  # (head, key block): {token: (k, v)}
        self.loud = {}  # head: the boosted channels of its `lo` tier

    def extend(self, q, k, v):
        """Queries q [H, n, D], tokens k, v [HEADS, n, D] -> [H, n, D]; all see the same codes."""
        n, before = k.shape[1], self.n
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.sums = torch.nn.functional.pad(self.sums, (0, n))
        self.n += n
        if n == 1:  # a step: R tokens get codes when it is written
            self.divide_all(self.n, before)
        out = torch.zeros(len(q), n, D, dtype=torch.float64)
        for h in range(len(q)):
            head = h // 2
            keys, values = self.reads(head, before if n == 1 else before - 1)
            for i in range(n):
                p = (keys[: before + i + 1] @ q[h, i].double() / D**0.5).softmax(0)
                out[h, i] = p @ values[: len(p)]
                self.sums[head, : len(p)] += p
        if n > 1:
            self.divide_all(self.n + 1, self.n)
        return out

    def blocks(self, n):
        """Key blocks that a query reads from the tiers as token n - 1."""
        return max(0, (n - 2 - self.c.lag) // self.c.residual)

    def reads(self, head, pos):
        k, v = self.k[head].double(), self.v[head].double()
        for block in range(self.blocks(pos + 1)):
            for t, (key, value) in self.read[head, block].items():
                k[t], v[t] = key, value
        return k, v

    def divide_all(self, n, counted):
        for head in range(HEADS):
            for block in range(self.blocks(n + 1)):
                if (head, block) not in self.read:
                    self.read[head, block] = self.divide(head, block, counted)

    def divide(self, head, block, counted):
        c, R = self.c, self.c.residual
        tokens = [t for t in range(block * R, block * R + R) if t >= c.sink]
        rank = {t: self.sums[head, t].item() / (counted - t if c.mean else 1) for t in tokens}
        best = sorted(tokens, key=lambda t: -rank[t])[: round(c.share * R)]
        rest = [t for t in range(block * R, block * R + R) if t not in best]
        if block == 0:
            self.loud[head] = loudest(c, self.k[head], rest)[: boosted_channels(c.boost, D)]
        return self.coded(head, sorted(best), c.hi, c.hi, []) | self.coded(
            head, rest, c.k_bits, c.v_bits, self.loud[head])

    def coded(self, head, tokens, k_bits, v_bits, loud):
        """{token: (k, v)} as read from one tier, the `loud` channels of k in twice the bits."""
        out, Gv = {}, self.c.value_group(D)
        for group in torch.tensor(tokens).split(self.c.group_size):
            counts = group >= self.c.sink
            if counts.any():
                keys, fine = (fake_quantized(self.k[head, group].mT, bits, counts).mT
                              for bits in (k_bits, 2 * k_bits))
                keys[:, loud] = fine[:, loud]
                values = self.v[head, group].unflatten(1, (-1, Gv))
                values = fake_quantized(values, v_bits).flatten(1)
                out |= {int(t): (keys[i], values[i]) for i, t in enumerate(group) if counts[i]}
        return out


def loudest(c, k, tokens):
    """The channels of k [T, D] by the widest group of these tokens, the first of them sinks."""
    return loudest_first(k[None, tokens], c.group_size, len(tokens), c.sink)[0]


def tokens_of(batch, n, dtype=torch.float32):
    """q [B, H, n, D], k, v [B, Hk, n, D]."""
    return (2 * randn(batch, 2 * HEADS, n, D, dtype=dtype), keys_like(batch, HEADS, n, D, seed=1)
            .to(dtype), randn(batch, HEADS, n, D, seed=2, dtype=dtype))


def make(config=SMALL, batch=1, max_len=400, **kind):
    return config.make(batch, HEADS, max_len, D, **kind)


def extend(cache, parts, new):
    """The next tokens of each row, `new` [B], right-padded with loud ones."""
    padded = [torch.full_like(x[:, :, : max(new)], 100) for x in parts]
    for b, n in enumerate(new):
        for x, y in zip(parts, padded):
            y[b, :, :n] = x[b, :, cache.lengths[b] : cache.lengths[b] + n]
    return cache.extend(*padded, new)


def step(cache, parts):
    """One token a row -> its attention."""
    q, k, v = (at(x, cache.lengths) for x in parts)
    cache.append(k, v)
    return cache.attend(q), q


def fused(cache, q):
    return cache.fused(q, cache.pos - 1, cache.index[: cache.capacity : cache.block])


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "lag" else pytest.mark.slow) for name in CONFIGS])
def test_attention_is_that_of_the_definition(name):
    """Rows of unequal lengths, prompts, steps, and prompts behind them; plain and fused. Guards
    against a wrong measure, tokens that are lost, twice or of another row, sinks that stretch a
    group or count twice, wrong axes, channels, fields and blocks, and sums that stop where decoding
    starts."""
    lengths, parts = [75, 34, 1], tokens_of(3, 300)
    cache, rows = make(CONFIGS[name], 3), [Row(CONFIGS[name]) for _ in range(3)]
    for new in (lengths, [20, 90, 3]):
        out = extend(cache, parts, new)
        for b, (row, n) in enumerate(zip(rows, new)):
            wanted = row.extend(*(x[b, :, row.n : row.n + n] for x in parts))
            assert rel(out[b, :, :n], wanted) < 1e-5
        for _ in range(40):
            plain, q = step(cache, parts)
            other = fused(cache, q)
            for b, row in enumerate(rows):
                wanted = row.extend(*(x[b, :, row.n : row.n + 1] for x in parts))
                assert rel(plain[b], wanted) < 1e-5 and rel(other[b], wanted) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_attentions_are_close_to_the_truth(dtype):
    """In half precision too, over many blocks. Guards against sums in half precision, scales of
    another dtype than the kernels read, and the tokens behind a row."""
    parts = tokens_of(2, 900, dtype)
    parts[2][1] *= 30  # a row beside it, which its blocks reach into
    cache = make(batch=2, max_len=900, dtype=dtype)
    extend(cache, parts, [870, 33])
    plain, q = step(cache, parts)
    k, v = cache.dequantized()
    for out in (plain, fused(cache, q)):
        assert out.dtype == dtype
        for b, n in enumerate(cache.lengths):
            truth = attention64(q[b, :, 0], k[b, :, :n], v[b, :, :n])
            assert rel(out[b, :, 0], truth) < 8 * HALF_EPS[dtype] + 1e-6


def numbered(cache, n):
    """Extends an empty cache by n tokens whose values say which they are: a constant is exact."""
    q, k, _ = tokens_of(1, n)
    v = torch.arange(n).float().expand(1, HEADS, D, n).mT.contiguous()
    cache.extend(q, k, v)


@pytest.mark.parametrize("share", (0.25, 0.5, 0.75))
def test_every_token_is_in_one_place_and_the_best_are_in_the_hi_tier(share, monkeypatch):
    """Given sums: guards against another share, tokens that are lost or twice, a count of queries
    that could see a token which is off by one, and an order of equal ones that is not the first."""
    sums = torch.arange(1.0, 131.0).flip(0)  # token t: as many as the queries that could see it
    sums[40:60:2] *= 3
    monkeypatch.setattr(observed, "column_sums", lambda q, k, every: sums.expand(1, HEADS, -1))
    cache = make(replace(SMALL, share=share))
    numbered(cache, 130)
    assert cache.dequantized()[1][0, :, :, 0].sort().values.tolist() == [[*range(130)]] * HEADS
    hi, lo = (tier.from_codes("v", 4 * tier.size, slice(None), slice(None))[0, 0, :, 0].tolist()
              for tier in cache.tiers)
    n = round(32 * share)
    wanted = []
    for first in range(0, 128, 32):
        tokens = range(max(first, 4), first + 32)
        loud = [t for t in tokens if t in range(40, 60, 2)]
        wanted += sorted((loud + [t for t in tokens if t not in loud])[:n])
    assert hi == wanted and sorted(hi + lo)[4:] == [*range(4, 128)]


def check_boosted_channels():
    """Queries of 0 pay all tokens the same, so of the first 32 those behind the sinks have the
    largest means, and the others are in the `lo` tier."""
    q, k, v = tokens_of(3, 200)
    k[:, :, :4, 0], k[:, :, 4:12, 1], k[:, :, 32:] = 1e3, 1e3, 50 * k[:, :, 32:].roll(3, 3)
    parts, lo = (0 * q, k, v), [*range(4), *range(12, 32)]
    wanted = torch.tensor([[loudest(SMALL, head, lo) for head in row] for row in k])
    for prompts in ([100, 20, 1], [1, 34, 31]), ([31, 5, 0], [1, 2, 60], [50, 90, 3]):
        cache = make(batch=3)
        for new in prompts:
            extend(cache, parts, new)
        for _ in range(70):
            step(cache, parts)
            for order, right, n in zip(cache.tiers[1].k_order, wanted, cache.lengths):
                assert n <= 32 or torch.equal(order.long(), right)


def test_the_first_tokens_of_the_lo_tier_choose_its_boosted_channels(monkeypatch):
    """However a row came to its tokens. Guards against an order of sinks, of tokens of the other
    tier, of padding, of another row or head, and of a later block: each step would choose anew."""
    check_boosted_channels()
    choose = Tier.choose
    monkeypatch.setattr(Tier, "choose", lambda tier, groups, chosen, rows:
                        choose(tier, groups, chosen | True, rows))
    with pytest.raises(AssertionError):
        check_boosted_channels()


def test_a_step_may_run_twice():
    """As before a CUDA graph is captured, where a block is completed and elsewhere. Guards against
    attention that counts twice."""
    parts = tokens_of(2, 200)
    once, twice = make(batch=2), make(batch=2)
    for cache in (once, twice):
        extend(cache, parts, [30, 63])
    for _ in range(6):
        q, k, v = (at(x, once.lengths) for x in parts)
        for cache, times in ((once, 1), (twice, 2)):
            cache.advance()
            for _ in range(times):
                cache.write(k, v, cache.pos[:, None])
                cache.attention(q, cache.pos, cache.tokens(cache.length))
                cache.quantize_keys(cache.pos)
            cache.pos += 1
        assert_same(state(once), state(twice))


def test_a_row_is_as_if_alone_and_may_be_filled_again():
    """Guards against another row's sums, and against the attention of a row's former tokens: it
    ended at the length that the new ones have."""
    parts = tokens_of(3, 200)
    batch, alone = make(batch=3), make()
    extend(batch, parts, [60, 98, 10])
    for _ in range(3):
        step(batch, parts)
    batch.park(1)
    batch.append(*(x[:, :, :1] for x in parts[1:]))
    batch.park(1)
    q, k, v = (x[:1, :, :101] for x in parts)
    for cache, row in ((alone, 0), (batch, 1)):
        cache.observe(q, k, row, torch.tensor([q.shape[2]]))
        cache.fill(k, v, cache.pos[row : row + 1], torch.tensor([101]), row)
        cache.set_lengths([101], row)
    for _ in range(40):
        i = alone.lengths[0]
        new = [x[[0, 0, 2], :, i : i + 1] for x in parts]
        for cache, one in ((alone, slice(1)), (batch, slice(None))):
            cache.append(*(x[one] for x in new[1:]))
        torch.testing.assert_close(batch.attend(new[0])[1], alone.attend(new[0][:1])[0])


def test_reset_leaves_nothing_and_a_state_goes_on():
    """Into a longer cache and another row, and forked. Guards against sums that a state lacks,
    entries of a tier that are cut off, and leftovers."""
    parts = tokens_of(3, 300)
    fresh, cache, longer = make(batch=3), make(batch=3), make(batch=3, max_len=700)
    extend(cache, parts, [100, 100, 100])
    step(cache, parts)
    cache.reset()
    assert_same(state(cache), state(fresh))
    extend(cache, [x[:1].expand(3, -1, -1, -1) for x in parts], [140, 3, 140])
    for _ in range(30):
        step(cache, parts)
    cache.fork(0, [1])
    longer.load_state(cache.state())
    for _ in range(60):
        new = [x[:1, :, cache.length : cache.length + 1].expand(3, -1, -1, -1) for x in parts]
        outs = []
        for some in (cache, longer):
            some.append(*new[1:])
            outs += [some.attend(new[0])]
        assert torch.equal(outs[0][0], outs[0][1])
        torch.testing.assert_close(outs[0], outs[1])
    refused(lambda: make(replace(SMALL, share=0.5)).load_state(cache.state()), "share", 0.5)


class Layer:
    def __init__(self, cache):
        self.cache = cache


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compiled_steps_are_the_same_and_compile_once(dtype, fresh_compiler):
    """Two layers, until rows have several blocks. Guards against what cannot be compiled, and a
    compilation for every length or layer."""
    parts = tokens_of(2, 700, dtype)
    plain, *layers = (make(batch=2, max_len=700, dtype=dtype) for _ in range(3))
    for cache in (plain, *layers):
        extend(cache, parts, [90, 20])
    steps, write = compiled_step(None, "cpu"), torch.compile(TierCache.write, fullgraph=True)
    with ExitStack() as stack:
        for i in range(580):
            if i == 80:
                stack.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
            q, k, v = (at(x, plain.lengths) for x in parts)
            plain.append(k, v)
            wanted = plain.attend(q)
            for cache in layers:
                cache.advance()
                write(cache, k, v, cache.pos[:, None])
                out = steps.attend(cache, q, cache.pos, cache.tokens(cache.length))
                if cache.completes_key_block():
                    steps.flush(Layer(cache), cache.pos)
                cache.pos += 1
                assert rel(out, wanted) < 4 * HALF_EPS[dtype] + 2e-6


# ---- in the program -----------------------------------------------------------------------------

def test_padding_of_a_prompt_does_not_count(model):
    """Guards against prompts that are read together, where the queries of padding would pay."""
    tokens = torch.randint(0, 100, (2, 90), generator=torch.Generator().manual_seed(0))
    logits = []
    for rows in (slice(0, 2), slice(1, 2)):
        model.setup_caches(len(tokens[rows]), 120, "tiers", group_size=8, residual=32)
        model.prefill(tokens[rows], [90, 75][rows], chunk=500)
        model.cache.advance()
        token = tokens[rows, :1]
        logits.append(model.decode(token, model.cache.tokens(model.cache.length))[-1])
    torch.testing.assert_close(*logits)


def test_a_prompt_in_parts_counts_as_one(model):
    """Guards against sums that begin anew with every part of a prompt."""
    tokens = torch.randint(0, 100, (1, 90), generator=torch.Generator().manual_seed(0))
    seen = []
    for chunk in (90, 25):
        model.setup_caches(1, 100, "tiers", group_size=8, residual=32)
        model.prefill(tokens, chunk=chunk)
        seen.append(model.cache.state()["sum_window"])
        seen.append(model.cache.state()["tiers.1.k_order"])
    torch.testing.assert_close(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3]) and seen[1].any()


def test_the_program_takes_them_by_name(embedded, tmp_path):
    """Guards against names that nobody registers, and a saved cache that is not the same."""
    file, shares = tmp_path / "cache", tmp_path / "shares"
    long = "Once upon a time there was a king. " * 20
    for kv in ("tiers", "mikv:lag=4"):
        assert result_of("--kv", kv, "--prompt", long, "--max-new-tokens", 4)["kv"] == kv
    fitted.write(shares, "zipvl", {"shares": torch.tensor([0.25, 0.5] * 4)}, embedded[0])
    args = "--kv", f"zipvl:{shares}", "--temperature", 0, "--max-new-tokens", 3
    first = result_of(*args, "--prompt", long, "--save-cache", file)
    assert first["new_tokens"] == 3
    assert result_of(*args, "--prompt", " Then", "--load-cache", file)["new_tokens"] == 3


def test_shares_of_a_file_are_those_of_the_layers(model, tmp_path):
    """Guards against shares that no tier could hold, and a share of another layer."""
    kv = f"zipvl:{tmp_path / 'f'}"
    for shares, sizes in (([0.25, 0.6], [32, 64]), ([0.75, 0.2], [96, 32])):
        fitted.write(tmp_path / "f", "zipvl", {"shares": torch.tensor(shares)}, model)
        configs = model.kv_configs(kv)
        assert [config.sizes for config in configs] == [(hi, 128 - hi) for hi in sizes]
    for wrong in (0.01, 1.0, -0.5):
        fitted.write(tmp_path / "f", "zipvl", {"shares": torch.tensor([0.25, wrong])}, model)
        refused(lambda: model.kv_configs(kv), "share", "another share")


def test_shares_hold_the_same_part_of_the_attention(monkeypatch):
    """By hand: of 100 tokens a layer pays all alike, another only 20. It gets the 25 that are the
    least, and the first what is left. Guards against a least that is added after the search, and
    shares that no tier could hold."""
    caches = []
    for loud in (100, 20):
        cache = EvictConfig(slots=100).make(2, HEADS, 100, D)
        cache.born.copy_(1 + torch.rand(2, HEADS, 100).argsort(2))  # each head's own order
        cache.score.copy_(cache.born > 100 - loud)
        caches.append(cache)
    monkeypatch.setattr(fit, "observed", lambda model, tokens: caches)
    tokens = torch.zeros(2, 100, dtype=torch.int64)
    for share, wanted in ((0.25, [0.25, 0.25]), (0.4, [0.5, 0.25]), (0.6, [0.75, 0.25])):
        assert fit.fit_shares(None, tokens, share)["shares"].tolist() == wanted
    for share in (0.2, 0.8):
        refused(lambda: fit.fit_shares(None, tokens, share), "--share", share)


@pytest.mark.parametrize("kv, named", (
    ("tiers:shares=0.5", "shares"), ("tiers:share", "share"), ("tiers:share=inf", "share"),
    ("tiers:hi=2", "hi"), ("tiers:share=0.05", "share"), ("tiers:sink=97", "96"),
    ("tiers:boost=7", "boost"), ("tiers:lag=-1", "lag"), ("tiers:every=0", "every"),
    ("tiers:v_group_size=12", "v_group_size"), ("tiers:mean=7", "mean"), ("mikv:zzz", "mikv"),
    ("tiers:share=0.5,share=0.5", "once"), ("zipvl:", "zipvl needs a file"),
    ("zipvl:nothing", "neighbours.calibrate zipvl"), ("zipvl", "neighbours.calibrate zipvl")))
def test_what_cannot_be_is_refused(kv, named):
    """Guards against an error of the library, or a cache that is not what was asked for."""
    check_error(run("--kv", kv, "--max-new-tokens", 2), named)


def test_other_refusals(model, tmp_path):
    """Guards against a prefill that ranks by nothing, and a window that is not kept."""
    _, k, v = tokens_of(1, 5)
    refused(lambda: make().prefill(k, v), "extend")
    refused(lambda: make(sliding=20), "sliding window", "choose another")
    fitted.write(tmp_path / "f", "zipvl", {"shares": torch.tensor([0.5])}, model)
    refused(lambda: OTHERS["zipvl"](tmp_path / "f", model), "another model")
    fitted.write(tmp_path / "f", "gate", {"shares": torch.tensor([0.5, 0.5])}, model)
    refused(lambda: OTHERS["zipvl"](tmp_path / "f", model), "not written for zipvl")


def test_bits_and_bytes(model):
    """Guards against metadata or low halves that are not counted, an order of channels that is
    counted with every token, and traffic of another number of tokens."""
    assert OTHERS["mikv"]("", model)[0].stored_bits(64) == 4.5
    plain = TierConfig(boost=0, v_group_size=0)
    for config, bits, half in ((TierConfig(), 3.4375, 3.875), (plain, 3.5, 4.0)):
        assert config.stored_bits(64) == bits and replace(config, share=0.5).stored_bits(64) == half
        cache = config.make(2, 3, 600, 64, dtype=torch.bfloat16)
        stored = sum(x.numel() * x.itemsize for name, x in cache.tiers.named_buffers()
                     if not name.endswith("k_order"))
        assert 8 * stored == bits * 2 * 2 * 3 * 512 * 64
        coded, exact = 3 * 128, 129 + 4  # of 513 tokens: the block that token 511 ended is exact
        assert cache.traffic(513) == 3 * 64 * 2 * (coded * bits / 8 + exact * 2)
        assert cache.traffic(514) == 3 * 64 * 2 * (4 * 128 * bits / 8 + (2 + 4) * 2)
