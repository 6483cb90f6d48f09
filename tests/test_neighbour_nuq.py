"""neighbours/nuq.py, the cache of KVQuant, against a reference number by number."""
import cmath

import pytest
import torch
from cache_cases import append, assert_same, at, fill, refused, row_state, state
from calling import check_error, result_of, run
from reference import changed, some_ids
from reference_cache import attention64, keys_like, randn, rel
from safetensors.torch import load_file, save_file

import generate
import kivi
from checkpoint.hub import EMBEDDED
from neighbours import calibrate, fitted, nuq_levels
from neighbours.nuq import NuqCache, NuqConfig
from program.memory import cache_parts, traffic_of

CASES = {  # name: (Hk, D, bits, options of the config)
    "2 bits": (2, 32, 2, {}),
    "3 bits": (2, 32, 3, {}),
    "no sink": (1, 64, 2, {"sink": 0}),
    "4 sinks, 9 newest": (2, 32, 2, {"sink": 4, "residual": 9}),
    "320 channels": (5, 64, 3, {"residual": 1}),  # 4 outliers, whose numbers need 16 bits
}


def make(case="2 bits", batch=1, max_len=64, dtype=torch.float32, sliding=None, seed=0):
    """A cache whose layer has ranges that leave out some numbers, and levels that are not even."""
    n_kv_heads, head_dim, bits, options = CASES[case]
    loud = keys_like(n_kv_heads, 1, head_dim, seed=seed + 7).abs()
    levels = randn(2, 2**bits, seed=seed + 8).clamp(-1, 1).sort(-1).values
    tables = {"freq": 1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim),
              "k_zero": randn(n_kv_heads, 1, head_dim, seed=seed + 9) / 4, "k_scale": loud + 1,
              "k_levels": levels[0], "v_levels": levels[1]}
    config = NuqConfig(bits, bits, tables=tables, **options)
    return config.make(batch, n_kv_heads, max_len, head_dim, sliding=sliding, dtype=dtype)


def tokens_for(case, batch, n, dtype=torch.float32, seed=0):
    n_kv_heads, head_dim, _, _ = CASES[case]
    k = keys_like(batch, n_kv_heads, n, head_dim, seed=seed)
    return k.to(dtype), randn(batch, n_kv_heads, n, head_dim, seed=seed + 1).to(dtype)


# ---- the reference ------------------------------------------------------------------------------

def turned(head, angles):
    """A key [D] of one head, whose channel pairs d and d + D / 2 turn by these angles."""
    half = len(angles)
    z = [complex(head[d], head[d + half]) * cmath.exp(1j * angles[d]) for d in range(half)]
    return [x.real for x in z] + [x.imag for x in z]


def coded(x, levels, zero, scale):
    return min(levels, key=lambda level: abs((x - zero) / scale - level)) * scale + zero


def with_outliers(flat, codes, n):
    """What codes read, but exact where they miss most, n times."""
    far = sorted(range(len(flat)), key=lambda c: -abs(flat[c] - codes[c]))[:n]
    return [flat[c] if c in far else x for c, x in enumerate(codes)]


def read_key(key, t, tables, n):
    """What attention reads of the key [Hk][D] of token t, n outliers of which are exact."""
    angles = [t * f for f in tables["freq"].tolist()]
    zeros, scales = (tables[name].flatten().tolist() for name in ("k_zero", "k_scale"))
    flat = sum((turned(head, [-angle for angle in angles]) for head in key), [])
    levels = tables["k_levels"].tolist()
    codes = [coded(x, levels, zero, scale) for x, zero, scale in zip(flat, zeros, scales)]
    out = with_outliers(flat, codes, n)
    return [turned(out[c : c + len(key[0])], angles) for c in range(0, len(out), len(key[0]))]


def read_value(value, tables, n, number):
    """The same for a value [Hk][D]; `number` is the dtype of its scale and zero."""
    flat = sum(value, [])
    order = sorted(flat)
    low, high = order[n // 2], order[-1 - n // 2]
    zero, scale = torch.tensor([(high + low) / 2, (high - low) / 2]).to(number).tolist()
    levels = tables["v_levels"].tolist()
    out = with_outliers(flat, [coded(x, levels, zero, scale) for x in flat], n)
    return [out[c : c + len(value[0])] for c in range(0, len(out), len(value[0]))]


def expected(cache, k, v):
    """What attention reads of one row: k, v [Hk, T, D] -> the same in float32."""
    c, T = cache.config, k.shape[1]
    channels = len(k) * k.shape[2]
    n = max(2, 2 * round(channels / 200))
    number = torch.float32 if k.dtype == torch.float32 else torch.float16
    k_out, v_out = k.float(), v.float()
    for t in range(c.sink, T - c.residual):
        key, value = k[:, t].tolist(), v[:, t].tolist()
        k_out[:, t] = torch.tensor(read_key(key, t, c.tables, n))
        v_out[:, t] = torch.tensor(read_value(value, c.tables, n, number))
    return k_out, v_out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_reads_what_the_paper_says(case, dtype):
    """Guards against keys that are not turned back or turned by another position, ranges of
    another channel, a level that is not the nearest, outliers that are lost or of one head alone,
    sinks and newest tokens that are read from codes."""
    cache = make(case, dtype=dtype, max_len=40)
    k, v = tokens_for(case, 1, 32, dtype)
    fill(cache, k, v, [20], 12)
    q = randn(1, 2 * cache.n_kv_heads, 1, cache.head_dim, dtype=dtype)
    want = expected(cache, k[0], v[0])
    for x, y in zip(cache.dequantized(), want):
        # An outlier is kept as what its code misses, in 16 bits or in float32.
        assert (x[0] - y).abs().max() <= (2e-5 if dtype == torch.float32 else 2e-2)
        assert rel(x[0], y) <= (1e-6 if dtype == torch.float32 else 1e-3)
    out = cache.attend(q)[0, :, 0]
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert rel(out, attention64(q[0, :, 0], *want)) < limit


def test_keys_at_the_ends_of_their_ranges_do_not_depend_on_the_last_bit():
    """As keys of frequent tokens in the first layer, which are the ends. Guards against outliers
    that are chosen by rounding, so that a row beside others is read unlike the row alone."""
    cache, read = make("no sink"), []
    end = (cache.k_zero + cache.k_scale)[None]  # in all channels of the first token
    ulp = torch.nextafter(end, end + randn(*end.shape, seed=1))
    for k in (end, ulp):
        cache.prefill(k, torch.zeros_like(k))
        read.append(cache.dequantized()[0])
        cache.reset()
    assert (read[0] - read[1]).abs().max() < 1e-5


def test_nan_stays_in_its_row():
    """Where nothing is checked, as in a decode step. Guards against an outlier that is nowhere, an
    error of the library for all rows, and NaN that codes hide."""
    cache, alone = make(batch=2), make()
    k, v = tokens_for("2 bits", 2, 9)
    fill(alone, k[1:], v[1:], [9])
    k[0, 0, 8, 3] = torch.nan
    fill(cache, k[:, :, :8], v[:, :, :8], [8, 8])
    cache.write(k[:, :, 8:], v[:, :, 8:], cache.pos[:, None])
    cache.set_lengths([9, 9])
    q = randn(2, 4, 1, 32)
    assert cache.attend(q)[0].isnan().any()
    assert rel(cache.attend(q)[1:], alone.attend(q[1:])) < 1e-6


def test_attention_slides():
    """Guards against a layer's window of tokens that is forgotten."""
    cache = make(sliding=9)
    k, v = tokens_for("2 bits", 1, 32)
    fill(cache, k, v, [30], 2)
    q = randn(1, 4, 1, 32)
    want = attention64(q[0, :, 0], *expected(cache, k[0], v[0]), sliding=9)
    assert rel(cache.attend(q)[0, :, 0], want) < 1e-5
    assert traffic_of(cache, 32) == traffic_of(cache, 9) < traffic_of(make(), 32)


def test_few_heads_at_a_time_are_read_alike(monkeypatch):
    """Guards against outliers of other heads in the place of those that are read."""
    cache = make("320 channels")
    k, v = tokens_for("320 channels", 1, 32)
    cache.prefill(k, v)
    q = randn(1, 10, 1, 64)
    want = cache.attend(q)
    monkeypatch.setattr(kivi, "PORTION", (1, 1))
    assert len(cache.portions(32)) == 5 and torch.equal(cache.attend(q), want)


# ---- the state is a function of the tokens -------------------------------------------------------

@pytest.mark.parametrize("case", ("3 bits", "4 sinks, 9 newest"))
def test_bytes_do_not_depend_on_how_tokens_came(case):
    """Rows of unequal lengths by prefill, by appends, by extend, and alone. Guards against another
    rounding of a prompt, positions of another row, and padding in the cache."""
    lengths = [30, 1, 17]
    k, v = tokens_for(case, 3, 40)
    whole, steps, parts = (make(case, 3) for _ in range(3))
    fill(whole, k, v, [n + 5 for n in lengths])
    fill(steps, k, v, lengths, 5)
    fill(parts, k, v, [2, 1, 3])
    new = [n + 5 - m for n, m in zip(lengths, (2, 1, 3))]
    k_new, v_new = (torch.full_like(x[:, :, : max(new)], 1e4) for x in (k, v))
    for row, (first, n) in enumerate(zip((2, 1, 3), new)):
        k_new[row, :, :n], v_new[row, :, :n] = (x[row, :, first : first + n] for x in (k, v))
    parts.extend(randn(3, 4, max(new), 32), k_new, v_new, new)
    # A ring keeps what came before the newest tokens, and unwritten slots are zeros: by contents.
    assert_same(state(whole), state(steps))
    assert_same(state(whole), state(parts))
    for row, n in enumerate(lengths):
        alone = make(case)
        fill(alone, k[row : row + 1], v[row : row + 1], [n + 5])
        assert_same(row_state(alone, 0), row_state(whole, row))


def test_a_step_that_runs_twice_changes_nothing():
    """Guards against a write that adds up: the first run of a CUDA graph is a rehearsal."""
    cache = make("4 sinks, 9 newest", 2)
    k, v = tokens_for("4 sinks, 9 newest", 2, 32)
    fill(cache, k, v, [20, 3], 2)
    once = state(cache)
    cache.write(at(k, [21, 4]), at(v, [21, 4]), cache.pos[:, None] - 1)
    cache.quantize_keys(cache.pos - 1)
    assert_same(once, state(cache))


def test_a_row_is_parked_and_refilled():
    """Guards against what is left of the row before, or a row beside that is touched."""
    k, v = tokens_for("4 sinks, 9 newest", 2, 40)
    cache, fresh = make("4 sinks, 9 newest", 2), make("4 sinks, 9 newest")
    fill(cache, k, v, [20, 8])
    beside = row_state(cache, 0)
    cache.park(1)
    nothing = cache.pos[1:] * 0
    cache.fill(v[1:, :, :15], k[1:, :, :15], nothing, nothing + 15, 1)
    cache.set_lengths([15], 1)
    fill(fresh, v[1:], k[1:], [15])
    for x, y in zip(cache.dequantized(slice(1, 2)), fresh.dequantized()):
        assert torch.equal(x, y)
    assert_same(beside, row_state(cache, 0))


def test_reset_state_and_fork_go_on_alike():
    """Guards against tokens that a saved cache lacks, constants of the layer that are emptied with
    it, and the state of a cache with other levels."""
    k, v = tokens_for("4 sinks, 9 newest", 2, 40)
    cache, other, forked = (make("4 sinks, 9 newest", 2, n) for n in (64, 200, 64))
    fresh = state(cache)
    fill(cache, k, v, [20, 8])
    saved = cache.state()
    other.load_state(saved)
    forked.load_state({name: x[:1] if torch.is_tensor(x) else x for name, x in saved.items()}
                      | {"lengths": [20]})
    forked.fork(0, [1])
    for one in (cache, other):
        append(one, k, v, [20, 8])
    append(forked, *(x[:1].expand(2, -1, -1, -1) for x in (k, v)), [20, 20])
    for x, y, z in zip(cache.dequantized(), other.dequantized(), forked.dequantized()):
        assert torch.equal(x, y) and torch.equal(z, x[:1].expand(2, -1, -1, -1))
    cache.reset()
    assert_same(fresh, state(cache))
    refused(lambda: make("4 sinks, 9 newest", 2, seed=1).load_state(saved), "tables")


@pytest.mark.slow
@pytest.mark.parametrize("case", ("3 bits", "4 sinks, 9 newest"))
def test_the_compiled_step_is_the_plain_one(case, fresh_compiler):
    """Every part compiles as one graph, once for all numbers of tokens. Guards against a branch on
    numbers of the device and a recompilation as tokens come."""
    one, other = make(case, 2, 1000), make(case, 2, 1000)
    k, v = tokens_for(case, 2, 600)
    write, attend, flush = (torch.compile(f, fullgraph=True) for f in (
        NuqCache.write, NuqCache.attention, NuqCache.quantize_keys))
    for cache in (one, other):
        fill(cache, k, v, [100, 250])
    for step in range(400):
        q = randn(2, 4, 1, 32, seed=step)
        tokens = at(k, [100 + step % 350] * 2), at(v, [100 + step % 350] * 2)
        one.append(*tokens)
        other.advance()
        write(other, *tokens, other.pos[:, None])
        flush(other, other.pos)
        other.pos += 1
        if step % 50 == 0:
            t = other.tokens(other.length)
            torch._dynamo.maybe_mark_dynamic(t, 0)
            assert rel(attend(other, q, other.pos - 1, t), one.attend(q)) < 1e-4
        torch._dynamo.config.error_on_recompile = step > 150
    torch._dynamo.config.error_on_recompile = False
    for x, y in zip(one.dequantized(), other.dequantized()):
        assert rel(x, y) < 1e-3


# ---- bits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", (2, 3))
def test_codes_and_their_bytes(bits):
    """Guards against planes in another order when they are read, and bits without use."""
    codes = torch.randint(0, 2**bits, (3, 5, 32), dtype=torch.uint8)
    packed = nuq_levels.pack(codes, bits)
    assert packed.shape == (3, 5, bits * 4) and packed.dtype == torch.uint8
    assert torch.equal(nuq_levels.unpack(packed, bits), codes)
    one = torch.zeros(32, dtype=torch.uint8)
    one[9] = 2
    assert nuq_levels.pack(one, bits).tolist() == [0] * 5 + [2] + [0] * (bits * 4 - 6)


@pytest.mark.parametrize("case", CASES)
def test_stored_bits_are_those_of_a_token(case):
    """Guards against bits by a formula that the buffers do not share."""
    cache = make(case, dtype=torch.bfloat16)
    per_token = traffic_of(cache, 33) - traffic_of(cache, 32)
    numbers = 2 * cache.n_kv_heads * cache.head_dim
    assert cache.config.stored_bits(cache.head_dim) == pytest.approx(8 * per_token / numbers)


# ---- calibration --------------------------------------------------------------------------------

def test_a_calibration_is_of_the_keys_before_rope(model):
    """Against the numbers that leave the linear layer, by sorting. Guards against rotated keys,
    the first token in a range, and rows or heads in another order."""
    tokens = torch.tensor([some_ids(60, seed=n) for n in range(4)])
    c, seen = model.config, []
    hook = model.layers[1].attention.wqkv.register_forward_hook(lambda *x: seen.append(x[-1]))
    found = nuq_levels.calibrate(model, tokens)
    hook.remove()
    k = torch.cat(seen)[:, 1:, c.n_heads * c.head_dim :][..., : c.n_kv_heads * c.head_dim]
    numbers = k.flatten(0, 1).sort(0).values  # [236, Hk D]
    low, high = numbers[1], numbers[-2]  # 1 % of them is 1.2 at either end
    for name, want in (("k_zero", (high + low) / 2), ("k_scale", (high - low) / 2)):
        assert (found[name][1].flatten() - want).abs().max() < 1e-5
    shape = [c.n_layers, c.n_kv_heads, 1, c.head_dim]
    assert list(found["k_zero"].shape) == list(found["k_scale"].shape) == shape


def test_levels_are_where_the_numbers_are():
    """Guards against k-means that stops early, and numbers beyond the range that draw levels
    outwards."""
    x = torch.cat([randn(4000, seed=1) / 20 - 0.5, randn(1000, seed=2) / 20 + 0.6,
                   torch.full((3000,), 5.0)])
    levels = nuq_levels.fitted_levels(x, 4)
    inside = x[x.abs() <= 1]
    nearest = (inside[:, None] - levels).abs().argmin(1)
    means = torch.stack([inside[nearest == n].mean() for n in range(4)])
    assert (levels - means).abs().max() < 2e-3 and levels.tolist() == sorted(levels.tolist())
    assert levels[0] < -0.5 and 0.5 < levels[3] < 0.7


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A calibration of the embedded model, by the command."""
    file = tmp_path_factory.mktemp("nuq") / "tiny.safetensors"
    code, _, err = run("nuq", file, "--text", EMBEDDED / "heldout.txt", "--rows", 1,
                       "--tokens", 200, main=calibrate.main)
    assert code == 0, err
    return file


def test_the_program_writes_text(file):
    """Guards against a name that nobody knows, and bytes in the report that are not the cache's."""
    kv = f"nuq3:{file}"
    result = result_of("--kv", kv, "--max-new-tokens", 10, "--temperature", 0)
    assert result["new_tokens"] == 10 and result["kv"] == kv
    assert result["kv_bytes"] < result["kv_bytes_full"] / 4


def test_batches_and_the_memory_table(embedded, file):
    """A row beside others gets its own text, and the parts add up to what is allocated. Guards
    against layers that share a table."""
    model, _ = embedded
    prompts = [some_ids(n, seed=n) for n in (30, 5)]
    kv = f"nuq2:{file}"
    together = generate.generate(model, prompts, 8, stop=(), kv=kv)
    parts = cache_parts(model, 2, 38, kv)
    assert sum(parts.values()) == sum(layer.cache.nbytes for layer in model.layers)
    rows, channels, room, spare = 8 * 2, 128, 128, 128  # rows of all layers; tokens; bytes a head
    assert parts["codes"] == 2 * rows * (room * channels * 2 // 8 + 2 * spare)
    of_v, outliers = room * 4 + spare, room * 2 * (4 + 1) + 2 * spare  # float32, and a channel
    assert parts["metadata"] == 2 * rows * (of_v + outliers)
    tables = [layer.cache.k_levels for layer in model.layers]
    assert not torch.equal(tables[0], tables[1])
    for prompt, row in zip(prompts, together):
        assert generate.generate(model, [prompt], 8, stop=(), kv=kv) == [row]


# ---- refusals -----------------------------------------------------------------------------------

def test_what_cannot_be_is_refused(embedded, model, file, tmp_path):
    """Each in one line that says what to do. Guards against a traceback, and against a cache that
    reads with the ranges of another model."""
    for kv in ("nuq2", "nuq2:nowhere.safetensors"):
        check_error(run("--kv", kv), "python -m neighbours.calibrate nuq FILE")
    check_error(run("--kv", f"nuq2:{file}", "--group-size", 32), "group_size")
    check_error(run("--kv", f"nuq2:{file}", "--speculate", 2), "--speculate")
    refused(lambda: model.setup_caches(1, 50, f"nuq2:{file}"), "another model")
    tensors = load_file(file)
    save_file(tensors, tmp_path / "of nobody")
    refused(lambda: embedded[0].setup_caches(1, 50, f"nuq2:{tmp_path / 'of nobody'}"), "nuq")
    for dtype in (torch.float16, torch.int64):
        wrong = {"k_levels2": tensors["k_levels2"].to(dtype)}
        fitted.write(tmp_path / "f", "nuq", tensors | wrong, embedded[0])
        refused(lambda: embedded[0].setup_caches(1, 50, f"nuq2:{tmp_path / 'f'}"), "float32")
    refused(lambda: embedded[0].setup_caches(1, 50, f"nuq2:{file}", residual=-1), "residual", "-1")
    refused(lambda: embedded[0].setup_caches(1, 50, f"nuq2:{file}", boost=8), "boost")
    refused(lambda: NuqConfig().check(60), "60")


def test_models_that_nuq_cannot_serve(model, checkpoint, file, tmp_path, monkeypatch):
    """Guards against angles that change with the length, and outliers of some heads alone."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    folder = changed(checkpoint, tmp_path, rope_scaling=dynamic)
    other, _ = generate.load(folder)
    refused(lambda: other.kv_configs(f"nuq2:{file}"), "dynamic")
    monkeypatch.setattr(model.config, "ranks", (0, 2))
    refused(lambda: model.kv_configs(f"nuq2:{file}"), "torchrun")
