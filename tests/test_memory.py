"""What a run takes in memory by the formula, against what is allocated; bytes that steps read."""
import math

import pytest
import torch
from cache_cases import CASES, SHAPES, make_cache
from calling import check_error, run
from reference import decode_step, make_checkpoint, peak_allocation
from reference_cache import full_bytes, kivi_bytes

import generate
from checkpoint import room
from checkpoint import weights as checkpoint_weights
from checkpoint.room import container_bytes
from fused import linear
from kivi import PRESETS, FullCache, KiviCache
from model import ModelConfig, Transformer
from neighbours.observed import column_sums
from neighbours.tiers import TierConfig
from program.memory import OBSERVED, cache_sizes, needs, traffic_of
from study.models import random_model

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 8192, "dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2,
         "head_dim": 32, "hidden_dim": 704, "max_len": 8192}


@pytest.mark.parametrize("shape, dtype", (
    ({}, torch.float32),
    pytest.param({"n_kv_heads": 8, "hidden_dim": 2048}, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param({"head_dim": 128, "hidden_dim": 64}, torch.float32, marks=pytest.mark.slow),
), ids=("GQA", "MHA", "wide heads"))
def test_the_memory_formula_holds(shape, dtype):
    """Weights, caches and activations by the formula against what is allocated: the caches to the
    byte, activations at most 5 % above the formula and at least 60 % of it. A prompt in several
    parts, and several rows. Guards against a [T, T] mask, logits of all positions, a second copy of
    K and V, and a formula that tells tales."""
    model = random_model(ModelConfig(**SHAPE | shape), CPU).to(dtype)
    weights = sum(p.nbytes for p in model.parameters())
    for batch, prompt, kv in ((1, 3000, "kivi2+"), (3, 500, "kivi4"), (2, 2500, "bf16")):
        parts = needs(model, batch, prompt, prompt + 40, kv)
        model.setup_caches(batch, prompt + 40, kv)
        assert parts["weights"] == weights + model.freq.nbytes
        caches = sum(layer.cache.nbytes for layer in model.layers)
        assert parts["codes"] + parts["metadata"] + parts["window"] == caches
        tokens = torch.zeros(batch, prompt, dtype=torch.int64)
        prefill = peak_allocation(lambda: model.prefill(tokens))
        step = peak_allocation(lambda: decode_step(model, tokens[:, :1]))
        share = max(prefill, step) / parts["activations"]
        assert 0.6 <= share <= 1.05, (batch, prompt, kv, prefill, step, parts)


def test_a_prompt_leaves_q_before_its_mlp():
    """Guards against q, K and V of a chunk that stay in memory beside the MLP's numbers."""
    model = random_model(ModelConfig(**SHAPE | {"n_kv_heads": 8, "hidden_dim": 1400}), CPU)
    model.setup_caches(1, 540, "bf16")
    activations = needs(model, 1, 500, 540, "bf16")["activations"]
    peak = peak_allocation(lambda: model.prefill(torch.zeros(1, 500, dtype=torch.int64)))
    assert 0.6 * activations <= peak <= 0.95 * activations


@pytest.mark.parametrize("kv", ("kivi2", "kivi2+", "bf16"))
def test_the_memory_formula_knows_the_past(kv):
    """100 tokens behind 4,000, whose K and V in float32 are more than all else. Guards against a
    past that counts as nothing, or as if it were read again."""
    config = ModelConfig(vocab_size=64, dim=64, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=32,
                         hidden_dim=64, max_len=8192)
    model = random_model(config, CPU).to(torch.float32)
    model.setup_caches(1, 4200, kv)
    tokens = torch.zeros(1, 4000, dtype=torch.int64)
    model.prefill(tokens)
    activations = needs(model, 1, 4100, 4200, kv, held=4000)["activations"]
    peak = peak_allocation(lambda: model.extend(tokens[:, :100]))
    assert 0.6 * activations <= peak <= 1.05 * activations


@pytest.mark.parametrize("kv", ("kivi2", "kivi2+", "tiers", "mikv"))
@pytest.mark.parametrize("head_dim", (32, 128))
def test_the_memory_formula_knows_the_flush(kv, head_dim):
    """Many short rows, whose keys of a block in float32 are more than all else that a step
    allocates. Guards against counting them never, or those of a group only."""
    config = ModelConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, n_kv_heads=4,
                         head_dim=head_dim, hidden_dim=64, max_len=8192)
    model = random_model(config, CPU)
    model.setup_caches(64, 100, kv)
    model.cache.pos.fill_(128)
    activations = needs(model, 64, 60, 100, kv)["activations"]
    assert 0.6 * activations <= peak_allocation(model.flush) <= 1.05 * activations


def test_the_memory_formula_knows_the_keys_of_a_step():
    """Rows whose prompts come one after the other, and whose steps come together: K and V of one
    KV head in float32 are more than all else. Guards against counting less than both."""
    config = ModelConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=128,
                         hidden_dim=64, max_len=8192)
    model = random_model(config, CPU)
    model.setup_caches(6, 2100, "kivi2+")
    tokens = torch.zeros(6, 2000, dtype=torch.int64)
    model.prefill(tokens)
    activations = needs(model, 6, 2000, 2100, "kivi2+")["activations"]
    step = peak_allocation(lambda: decode_step(model, tokens[:, :1]))
    assert 0.6 * activations <= step <= 1.05 * activations


@pytest.mark.parametrize("kv, dtype, prompt, shape", (
    ("tiers", torch.float32, 600, {"n_heads": 8, "n_kv_heads": 2, "head_dim": 32}),
    ("tiers", torch.bfloat16, 200, {"n_heads": 8, "n_kv_heads": 2, "head_dim": 128}),
    ("h2o:0.2", torch.float32, 800, {"n_heads": 2, "n_kv_heads": 2, "head_dim": 256}),
    ("tiers", torch.bfloat16, 200, {"n_heads": 8, "n_kv_heads": 8, "head_dim": 128}),
), ids=("probabilities", "queries", "keys", "keys in float32"))
def test_the_memory_formula_knows_what_ranks_tokens(kv, dtype, prompt, shape):
    """The probabilities of a prompt, which are computed once more beside its queries. Guards
    against counting none, or these alone."""
    config = ModelConfig(vocab_size=64, dim=64, n_layers=2, hidden_dim=64, max_len=8192, **shape)
    model = random_model(config, CPU).to(dtype)
    model.setup_caches(1, prompt + 40, kv)
    activations = needs(model, 1, prompt, prompt + 40, kv)["activations"]
    tokens = torch.zeros(1, prompt, dtype=torch.int64)
    peak = peak_allocation(lambda: model.prefill(tokens))
    assert 0.85 * activations <= peak <= 1.05 * activations


def test_ranking_takes_no_more_memory_than_its_parts_say(monkeypatch):
    """Many query heads over few keys, and R tokens that are compared with each other. Guards
    against K written out for every query head, and comparisons of a whole prompt at once."""
    q, k = torch.randn(1, 16, 4, 128), torch.randn(1, 2, 2000, 128)
    peak = peak_allocation(lambda: column_sums(q, k))
    assert peak <= 1.05 * (OBSERVED * 16 * 4 * 2000 + q.nbytes)
    monkeypatch.setattr("quantize.FILL", 2**17)
    peaks = []
    for n in (1024, 4096):
        cache = TierConfig(residual=512).make(1, 1, n + 1, 32)
        cache.observed, new = torch.rand(1, 1, n, 1), torch.randn(2, 1, 1, n, 32)
        peaks.append(peak_allocation(lambda: cache.fill(*new, cache.pos, cache.pos + n)))
    assert peaks[1] <= 1.2 * peaks[0]


@pytest.mark.slow
@torch.no_grad()
def test_quantized_weights_take_the_memory_that_the_formula_says(tmp_path, monkeypatch):
    """Bytes of weights by hand, from shapes; the activations as in
    `test_the_memory_formula_holds`; loading never holds much more than the result. Guards against
    weights that stay beside their codes, and against whole layers written out."""
    folder = make_checkpoint(tmp_path / "full", hidden_size=512, intermediate_size=4096,
                             num_hidden_layers=2, vocab_size=1024, max_position_embeddings=4096)
    model = Transformer.from_pretrained(folder, weights="int4")
    elements = 2 * (512 * (128 + 64 + 64) + 128 * 512 + 3 * 512 * 4096)
    small = elements // 2 + elements // 32 * 8  # codes; scale and zero in float32
    head = 1024 * 512 + 1024 * 8
    by_hand = small + head + 4 * (1024 * 512 + 5 * 512)
    monkeypatch.setattr(linear, "CHUNK", 2**18)
    parts = needs(model, 1, 500, 600, "kivi2")
    assert parts["weights"] == by_hand + model.freq.nbytes
    model.setup_caches(1, 600, "kivi2")
    tokens = torch.zeros(1, 500, dtype=torch.int64)
    peak = peak_allocation(lambda: model.prefill(tokens))
    assert 0.5 * parts["activations"] <= peak <= 1.05 * parts["activations"]
    del model
    monkeypatch.setattr(linear, "CHUNK", 2**20)
    mapped = (folder / "model.safetensors").stat().st_size
    largest = 4096 * 512 * 4
    peak = peak_allocation(lambda: Transformer.from_pretrained(folder, weights="int4"))
    assert peak < mapped + by_hand + 3 * largest


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_the_closed_form(name):
    """Part by part, and in all what a cache says of itself. Guards against a formula that says
    something else than the buffers, and a buffer that counts as another part."""
    _, n_kv_heads, head_dim, options = SHAPES[name]
    for batch, max_len, dtype in ((1, 6144, torch.bfloat16), (3, 1001, torch.float32)):
        shape = (batch, n_kv_heads, max_len, head_dim)
        cache = make_cache(name, batch, max_len, dtype)
        if name in CASES:
            wanted = kivi_bytes(*shape, dtype, cache.block, **options)
        else:
            wanted = full_bytes(*shape, dtype)
        sizes = cache_sizes(type(cache), *shape, dtype=dtype, **options)
        assert sizes == wanted and sum(sizes.values()) == cache.nbytes


@pytest.mark.parametrize("max_len, residual, ratio", (
    (499, 32, 3.91), (499, 128, 2.52), (4096, 32, 5.09), (4096, 128, 4.55), (32768, 128, 5.21)))
def test_two_bits_save_what_the_documents_say(max_len, residual, ratio):
    """A layer of Llama-2-7B in bfloat16. Guards against spare room that eats what the bits save."""
    shape = (1, 32, max_len, 128)
    full, small = (
        sum(cache_sizes(kind, *shape, dtype=torch.bfloat16, **options).values())
        for kind, options in ((FullCache, {}), (KiviCache, {"residual": residual})))
    assert full == pytest.approx(2 * 32 * max_len * 128 * 2, rel=0.03)
    assert full / small == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("kv, bits", (
    ("kivi2", 3), ("kivi2+", 3), ("kivi2-", 2.75), ("kivi4", 5), ("k4v2", 4)))
def test_presets_store_the_bits_that_the_documents_say(kv, bits):
    """Codes, scales and zeros of a long row in bfloat16, for a number of K or V. Guards against
    boosted channels or groups of values whose bits are not counted."""
    shape = (1, 8, 2**15, 128)
    sizes = cache_sizes(KiviCache, *shape, dtype=torch.bfloat16, **vars(PRESETS[kv]))
    stored = 8 * (sizes["codes"] + sizes["metadata"]) / (2 * 8 * 2**15 * 128)
    assert stored == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("options", (
    {}, {"sink": 3}, {"k_bits": 4, "dtype": torch.bfloat16}, {"sliding": 70},
    {"sliding": 200, "v_bits": 8}, {"boost": 16}, {"v_group_size": 64},
    {"boost": 0.25, "v_group_size": 32, "sink": 4, "dtype": torch.bfloat16}), ids=str)
def test_traffic_is_that_of_the_tokens_present(options):
    """Token by token, as the docstring of kivi.py says what is packed when. Guards against the
    capacity instead of the length, a window that is always full, metadata in bits, K and V with the
    same boundary or the same groups, and low halves of boosted channels that are not read."""
    B, Hk, D, G, R = 2, 3, 64, 16, 32
    cache = KiviCache(B, Hk, 300, D, group_size=G, residual=R, **options)
    full_options = {key: options[key] for key in ("sliding", "dtype") if key in options}
    full = FullCache(B, Hk, 300, D, **full_options)
    item = cache.dtype.itemsize
    boost = options.get("boost", 0)
    columns = D + (boost if boost >= 1 else int(boost * D))
    k_token = columns * cache.config.k_bits / 8 + D / G * 2 * item  # bytes of a packed token
    v_token = D * cache.config.v_bits / 8 + D / options.get("v_group_size", G) * 2 * item
    for length in (1, 31, 32, 33, 34, 64, 65, 100, 300):
        first = max(0, length - options.get("sliding", length))
        total = 0
        for t in range(first, length):
            k_packed = t < (length - 1) // R * R
            v_packed = t < length - 1 - R
            for packed, n_bytes in ((k_packed, k_token), (v_packed, v_token)):
                total += n_bytes if packed and t >= cache.config.sink else D * item
        assert traffic_of(cache, length) == Hk * total
        assert traffic_of(full, length) == 2 * Hk * (length - first) * D * item
    assert traffic_of(cache, 300) < cache.nbytes / B or "sliding" in options


# ---- what is free -------------------------------------------------------------------------------

def control_groups(root, group, files):
    """The files of a system whose process is in a control group: {path: text}."""
    files = {"proc/self/cgroup": group} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def limits(folder, limit, used, cached=0):
    version_1 = "/memory/" in folder + "/"
    names = (("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1
             else ("memory.max", "memory.current"))
    stat = f"anon 5\nactive_file 7\ninactive_file {cached}\n"
    if version_1:
        stat = f"inactive_file 1\ntotal_active_file 7\ntotal_inactive_file {cached}\n"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{used}\n",
            f"{folder}/memory.stat": stat}


TREE = "sys/fs/cgroup"


@pytest.mark.parametrize("group, files, free", (
    ("0::/\n", limits(TREE, 1000, 300, 50), 750),
    ("0::/job/step\n", limits(f"{TREE}/job/step", "max", 1) | limits(f"{TREE}/job", 900, 100), 800),
    ("0::/job/step\n", limits(f"{TREE}/job/step", 500, 1) | limits(f"{TREE}/job", 900, 500), 400),
    ("0::/\n", limits(TREE, "max", 300), math.inf),
    ("3:cpu:/x\n4:memory:/x\n0::/\n", limits(f"{TREE}/memory/x", 1000, 300, 60), 760),
    ("4:memory:/docker/abc\n", limits(f"{TREE}/memory", 1000, 300), 700),
    ("0::/\n", {}, math.inf),
), ids=("container", "a job", "a smaller step", "no limit", "version 1", "container, version 1",
        "no such files"))
def test_the_limit_of_a_container_is_seen(group, files, free, tmp_path):
    """Guards against the memory of a whole machine in a container that is killed at its limit, and
    against files in the page cache that count as taken."""
    control_groups(tmp_path, group, files)
    assert container_bytes(tmp_path) == free
    assert container_bytes(tmp_path / "nowhere") == math.inf


def test_the_least_counts_as_free(monkeypatch):
    """Guards against a limit that is read and not used."""
    monkeypatch.setattr(room, "container_bytes", lambda root: 12345)
    assert room.free_bytes(CPU) == 12345


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch):
    """Guards against a process that the system kills while it loads."""
    model, _ = generate.load()
    needed = sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(room, "free_bytes", lambda device: needed)
    assert run("--max-new-tokens", 1)[0] == 0
    monkeypatch.setattr(room, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(checkpoint_weights, "_read", None)
    check_error(run(), "the weights need", "--weights int4")
