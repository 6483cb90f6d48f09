"""A cache that reads the pages its query can use: what it reads, and that it reads it rightly."""
import pytest
import torch
from calling import result_of
from reference_cache import HALF_EPS, keys_like, randn, rel

from fused.attention import compiled_attention
from generate import load
from kivi import KiviCache
from neighbours.retrieve import ReadConfig, RetrieveCache, bounds, pages_of
from program.memory import traffic_of
from quantize import PRESETS

T, LENGTHS = 1600, (1600, 1499, 90)
CASES = {  # preset, tokens to read, and what differs
    "kivi2": ("kivi2", 512, {}),
    "blocks of four pages": ("kivi2", 640, {"max_len": 4500}),
    "kivi2+": ("kivi2+", 256, {}),
    "pages of 256": ("kivi2-", 512, {}),
    "K 4 V 2": ("k4v2", 384, {"by": "mean"}),
    "by the loudest channels": ("kivi2+", 512, {"by": "loud"}),
    "window of 96": ("kivi2", 256, {"residual": 96}),  # is no whole number of pages
    "window of 256": ("kivi4", 256, {"residual": 256}),
    "sliding": ("kivi2", 256, {"sliding": 900}),
}


def make(name="kivi2", batch=3, dtype=torch.float32, max_len=1700):
    preset, read, more = CASES[name]
    options = {"by": "bound"} | more
    sliding, max_len = options.pop("sliding", None), options.pop("max_len", max_len)
    config = ReadConfig(**(vars(PRESETS[preset]) | options), read=read)
    config.check(64)
    return config.make(batch, 2, max_len, 64, sliding=sliding, dtype=dtype, device="cpu")


def filled(name="kivi2", dtype=torch.float32, lengths=LENGTHS):
    cache = make(name, len(lengths), dtype)
    k = keys_like(len(lengths), 2, T, 64, seed=1).to(dtype)
    v = randn(len(lengths), 2, T, 64, seed=2, dtype=dtype)
    cache.prefill(k, v, lengths)
    return cache, randn(len(lengths), 6, 1, 64, seed=3, dtype=dtype)


def queries(cache, q):
    return q.float().reshape(len(q), 2, 3, 64)


def pages_read(cache, q):
    n_pages = min(len(cache.tokens(cache.length)), cache.capacity) // cache.page
    return pages_of(cache, queries(cache, q), cache.pos - 1, n_pages)[0]


def expected(cache, q):
    """Attention in float64 over the tokens of the pages, the sinks and the last R + 1 tokens."""
    k, v = (x.double() for x in cache.dequantized())
    pages, c, rows = pages_read(cache, q), cache.config, []
    for b, length in enumerate(cache.lengths):
        for head in range(2):
            t = torch.arange(length)
            in_page = torch.isin(t // cache.page, pages[b, head])
            seen = in_page | (t >= length - 1 - c.residual) | (t < c.sink)
            seen &= t > length - 1 - (cache.sliding or length)
            scores = queries(cache, q)[b, head].double() @ k[b, head, :length].T / 8
            p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            rows.append(p @ v[b, head, :length])
    return torch.stack(rows).view(len(q), 6, 1, 64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_attends_to_its_pages_and_to_all_that_is_exact(name, dtype):
    """Plain and fused. Guards against a page read twice, a page of another head, a key of the
    window taken from a wrong page, and sinks or old tokens that come in with a page."""
    cache, q = filled(name, dtype)
    assert not cache.reads_all
    want, bound = expected(cache, q), 3e-6 + 2 * HALF_EPS[dtype]
    assert rel(cache.attend(q), want) <= bound
    end = min(cache.length, cache.capacity)
    fused = cache.fused(cache, q, cache.pos - 1, cache.index[: end : cache.block])
    assert rel(fused, want) <= bound
    whole = KiviCache.attention(cache, q, cache.pos - 1, cache.tokens(cache.length))
    assert rel(whole, want) > 10 * bound  # or reading everything would pass as well


def test_pages_are_those_with_the_largest_bounds():
    """Guards against a rank that is off by one, ties, and pages that are not there."""
    cache, q = filled("kivi2+")
    pages = pages_read(cache, q)
    best = bounds(cache, queries(cache, q), 13)
    for b, length in enumerate(LENGTHS):
        newest = max(0, length - 1 - 128) // 128
        for head in range(2):
            *chosen, last = pages[b, head].tolist()
            order = best[b, head, :newest].sort(descending=True).indices.tolist()
            assert [page for page in chosen if page >= 0] == order[:2]
            assert last == newest


@pytest.mark.parametrize("name", ("kivi2", "kivi2+"))
def test_the_first_page_is_read_unless_sinks_are_exact(name):
    """Its keys are tiny, so its bound is the smallest. Guards against a text without its first
    tokens, to which models attend whatever the query."""
    cache, (k, v) = make(name, 1), randn(2, 1, 2, T, 64, seed=8)
    k[:, :, :128] *= 1e-3
    cache.prefill(k, v)
    chosen = pages_read(cache, randn(1, 6, 1, 64, seed=9))[..., : cache.n_chosen]
    assert [0 in head.tolist() for head in chosen[0]] == [name == "kivi2"] * 2


@pytest.mark.parametrize("by", ("bound", "mean"))
def test_pages_out_of_sight_are_not_chosen(by):
    """Those of old tokens have the largest bounds. Guards against a sliding window of which a step
    reads only what is exact, and a first page that nobody can see."""
    cache, (k, v) = make("sliding", 2), randn(2, 2, 2, T, 64, seed=8)
    cache.by, k[:, :, :600] = by, 50 * k[:, :, :600]
    cache.prefill(k, v, [1600, 1412])
    pages = pages_read(cache, randn(2, 6, 1, 64, seed=9))
    for row, first in zip(pages[..., :2], (700 // 128, 512 // 128)):
        assert (row >= first).all()
    short = make("sliding", 2)
    short.prefill(k[:, :, :1000], v[:, :, :1000], [1000, 900])
    first = [[0 in head for head in row] for row in pages_read(short, k[:, [0] * 6, :1]).tolist()]
    assert first == [[True, True]] * 2  # some of its tokens are seen


@pytest.mark.parametrize("name", ("kivi2", "by the loudest channels"))
def test_nan_stays_in_its_row(name):
    """Guards against pages of one rank, whose numbers add up to one that is not there."""
    cache, q = filled(name)
    before, starts = cache.attend(q), cache.index[: cache.capacity : cache.block]
    q[0] = torch.nan
    for out in (cache.attend(q), cache.fused(cache, q, cache.pos - 1, starts)):
        assert out[0].isnan().all() and rel(out[1:], before[1:]) < 3e-6


def test_equal_bounds_choose_different_pages():
    cache = make("kivi2", 1)
    same = torch.ones(1, 2, T, 64)
    cache.prefill(same, same)
    assert pages_read(cache, torch.ones(1, 6, 1, 64))[0, 0].tolist() == [0, 1, 2, 3, 11]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_key_scores_more_than_its_bound(preset):
    """Guards against the range of boosted channels and their order, and against zero and scale of
    another group."""
    config = ReadConfig(**vars(PRESETS[preset]), read=512)
    cache = config.make(1, 2, 1700, 64, sliding=None, dtype=torch.float32, device="cpu")
    cache.prefill(keys_like(1, 2, T, 64, seed=4), randn(1, 2, T, 64, seed=5))
    rows = randn(1, 2, 3, 64, seed=6)
    n = 1536 // cache.page - 1
    keys = cache.from_codes("k", T, slice(None), slice(None))[:, :, : n * cache.page]
    scores = (rows @ keys.mT).amax(2).unflatten(-1, (n, cache.page)).amax(-1)
    most = bounds(cache, rows, n)
    assert (scores <= most + 1e-4).all()
    assert (most < 3 * scores.abs().amax()).all()  # or any large number would do
    cache.by = "mean"
    middle = bounds(cache, rows, n)
    assert (middle < most).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_page_counts_by_its_mean_key(preset):
    """The mean over its groups of the middles of the ranges of the keys themselves. Guards against
    the best of its groups, which is no mean, and the middle of boosted codes of too few bits."""
    config = ReadConfig(**vars(PRESETS[preset]), read=512, by="mean")
    cache = config.make(1, 2, 1700, 64, sliding=None, dtype=torch.float32, device="cpu")
    k, n = keys_like(1, 2, T, 64, seed=4), 1536 // cache.page - 1
    cache.prefill(k, randn(1, 2, T, 64, seed=5))
    k[:, :, : config.sink] = k[:, :, config.sink, None]  # sinks do not stretch the first range
    groups = k[:, :, : n * cache.page].unflatten(2, (n, 4, -1)).double()
    means = ((groups.amin(4) + groups.amax(4)) / 2).mean(3)  # [1, Hk, pages, D]
    rows = randn(1, 2, 3, 64, seed=6)
    want = (rows.double() @ means.mT).amax(2)
    assert rel(bounds(cache, rows, n), want) < 1e-5


@pytest.mark.parametrize("residual", (96, 128, 256))
@pytest.mark.parametrize("max_len", (1600, 5000, 10000, 70000))
def test_whole_blocks_lie_in_the_buffers(residual, max_len):
    """Fused kernels read the last block whole. Guards against a block that goes beyond them."""
    config = ReadConfig(read=640, residual=residual)
    cache = config.make(1, 2, max_len, 64, sliding=None, dtype=torch.bfloat16, device="meta")
    assert not cache.reads_all
    last = cache.index[: cache.capacity : cache.block].shape[0] * cache.block
    for name, x in cache.contents().items():
        if name.startswith(("k_packed", "v_packed", "k_scale")):
            in_row = x.shape[2] * last // cache.capacity * x.stride(2)
            before = x.stride(0) - x.stride(1) + x.storage_offset()
            assert before + in_row <= x.untyped_storage().nbytes() // x.itemsize


@pytest.mark.parametrize("preset", ("kivi2+", "kivi2-"))
def test_loud_channels_count_by_their_codes(preset):
    """And the others by the middle of their range. Guards against scales, an order and a middle of
    other channels, and against the half of a boosted code that is not read."""
    config = ReadConfig(**vars(PRESETS[preset]), read=512, by="loud")
    cache = config.make(1, 2, 1700, 64, sliding=None, dtype=torch.float32, device="cpu")
    cache.prefill(keys_like(1, 2, T, 64, seed=4), randn(1, 2, T, 64, seed=5))
    rows, n = randn(1, 2, 3, 64, seed=6), 1536 // cache.page - 1
    keys = cache.from_codes("k", T, slice(None), slice(None))[:, :, : n * cache.page]
    groups = keys.unflatten(2, (-1, config.group_size))
    highest, lowest = groups.amax(3, keepdim=True), groups.amin(3, keepdim=True)
    loud = torch.zeros(1, 2, 64).scatter(2, cache.k_order[..., :16].long(), 1)[:, :, None, None]
    read = torch.where(loud > 0, groups, (highest + lowest) / 2).flatten(2, 3)
    want = (rows @ read.mT).amax(2).unflatten(-1, (n, cache.page)).amax(-1)
    # Half of a step of the codes that are read: their range is 15 of the fine ones, a step 4.
    missed = (rows.abs().amax(2)[:, :, None, None] * (highest - lowest) * loud * 2 / 15).sum(-1)
    most, bound = bounds(cache, rows, n), missed.flatten(2).unflatten(-1, (n, -1)).amax(-1)
    assert ((most - want).abs() <= bound).all() and (most - want).abs().mean() < want.std() / 3


def test_what_it_holds_is_kivis():
    """The bytes, and attention of many tokens at once, which reads everything."""
    cache, q = filled()
    kivi = KiviCache(3, 2, 1700, 64)
    kivi.load_state(cache.state() | {"kind": "KiviCache"})
    new = [randn(3, heads, 5, 64, seed=seed) for seed, heads in enumerate((6, 2, 2))]
    assert rel(cache.extend(*new), kivi.extend(*new)) < 1e-6
    state = kivi.state()
    for name, x in cache.state().items():
        assert name == "kind" or (torch.equal(x, state[name]) if torch.is_tensor(x) else True)


def test_a_short_cache_reads_everything():
    short = make(max_len=600)
    short.prefill(randn(3, 2, 500, 64), randn(3, 2, 500, 64, seed=1))
    kivi = KiviCache(3, 2, 600, 64)
    kivi.load_state(short.state() | {"kind": "KiviCache"})
    q = randn(3, 6, 1, 64)
    assert short.reads_all and torch.equal(short.attend(q), kivi.attend(q))


@pytest.mark.slow
def test_compiled_as_plain():
    """One compilation for all lengths. Guards against shapes that data decides."""
    attend = compiled_attention("cpu", RetrieveCache.fused, RetrieveCache.attention)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (1600, 900, 400):
            cache, q = filled("kivi2+", lengths=(length, 90))
            assert rel(attend(cache, q), expected(cache, q)) < 3e-6


def test_from_the_command_line():
    """A step of the embedded model reads 128 tokens instead of all 1,500."""
    prompt = "Once upon a time there was a king. " * 150
    result = result_of("--kv", "kivi2:read=128", "--prompt", prompt, "--max-new-tokens", "5")
    assert result["new_tokens"] == 5 and result["kv"] == "kivi2:read=128"
    model, _ = load()
    model.setup_caches(1, 1600, "kivi2+:read=256,by=mean")
    assert all(type(layer.cache) is RetrieveCache for layer in model.layers)
    assert model.cache.n_chosen == 2 and model.cache.by == "mean"
    for kv, by in (("kivi2:read=256", "bound"), ("kivi2+:read=256", "loud")):
        assert model.kv_configs(kv)[0].by == by
    read, kivi = model.cache, KiviCache(1, 2, 1600, 64, **vars(PRESETS["kivi2+"]))
    assert traffic_of(read, 1500) < 0.85 * traffic_of(kivi, 1500)


@pytest.mark.parametrize("kv, message", (
    ("kivi2:read=100", "read must be a multiple of 128 tokens, got 100"),
    ("kivi2:read=0", "read must be a multiple"),
    ("kivi2:read=x", "use read=TOKENS"),
    ("kivi2:", "use read=TOKENS"),
    ("kivi2:write=128", "use read=TOKENS"),
    ("kivi2+:read=128,read=256", "'read=256'.* each once"),
    ("kivi2:by=bound,by=mean", "'by=mean'.* each once"),
    ("kivi2:read=128,by=luck", "by must be bound, mean or loud, got 'luck'"),
    ("kivi2:read=128,by=loud", "use kivi2\\+, or by=bound"),
    ("kivi3:read=128", "unknown kv 'kivi3:read=128'"),
))
def test_refusals(kv, message):
    model, _ = load()
    with pytest.raises(ValueError, match=message):
        model.setup_caches(1, 1600, kv)


def test_a_share_that_boosts_no_channel_is_not_enough():
    """Guards against by=loud that looks at nothing loud."""
    model, _ = load()
    with pytest.raises(ValueError, match="use kivi2\\+, or by=bound"):
        model.setup_caches(1, 1600, "kivi2:read=128,by=loud", boost=0.1)
