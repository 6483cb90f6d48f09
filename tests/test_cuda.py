"""What runs on a GPU: attention, the compiled model, and the program with its options.

python -m pytest -q -n 8 tests/test_cuda.py     (-n of pytest-xdist: nearly all of it is compiling)

The halves: -k attention and -k program.
"""
import json
from types import SimpleNamespace

import pytest
import torch
from cache_cases import CASES, SHAPES, at, fill, make_tokens
from calling import ROOT, result_of, run
from reference import SMALL, some_ids, write_kvtuner
from reference_cache import HALF_EPS, attention64, randn, rel
from test_attentions import Layer
from test_weights import quantized_linear

import generate
from decoding.decoder import Decoder
from fused.attention import compiled_attention
from fused.drafts import drafted, fused_drafted, leaving
from fused.full import compiled_full_attention
from fused.linear_launches import compiled_weights
from fused.step import EXACT, compiled_quantizer, compiled_step
from kivi import FullCache, KiviCache
from model import OTHERS, ModelConfig, Transformer
from neighbours.nuq import NuqConfig
from neighbours.tiers import TierConfig
from program.memory import needs
from study.models import random_model

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")
HALVES = (torch.float16, torch.bfloat16)


# ---- attention ----------------------------------------------------------------------------------

def make_cache(name, batch, max_len, dtype):
    _, n_kv_heads, head_dim, options = SHAPES[name]
    kind = KiviCache if name in CASES else FullCache
    return kind(batch, n_kv_heads, max_len, head_dim, dtype=dtype, device=DEVICE, **options)


def filled(name, dtype, lengths, steps=20):
    """(queries, cache) on the GPU; the last `steps` tokens of each row came one by one."""
    tokens = make_tokens(name, len(lengths), max(lengths), dtype)
    q, k, v = (x.to(DEVICE) for x in tokens)
    cache = make_cache(name, len(lengths), 1024, dtype)
    fill(cache, k, v, [n - steps for n in lengths], steps)
    return q, cache


def errors(cache, q, out, sliding=None):
    """Of every row: its distance from float64 attention over what the cache reads."""
    k, v = cache.dequantized()
    return [rel(out[b, :, 0], attention64(q[b, :, 0], k[b, :, :n], v[b, :, :n], sliding))
            for b, n in enumerate(cache.lengths)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_attention_is_as_close_to_the_truth(name, dtype, fresh_compiler):
    """Plain and fused against float64. Guards against GPU-only arithmetic: word width, reduced
    precision, denormals taken for zero; and kernels that overlap but depend on each other."""
    q, cache = filled(name, dtype, (21, 190, 560, 1000))
    sliding = SHAPES[name][3].get("sliding")
    attend = compiled_attention(DEVICE)
    plain, fused = cache.attend(q), attend(cache, q)
    assert fused.shape == plain.shape == q.shape and fused.dtype == plain.dtype == dtype
    limits = [1.1 * error + HALF_EPS[dtype] for error in errors(cache, q, plain, sliding)]
    found = errors(cache, q, fused, sliding)
    assert all(error <= limit for error, limit in zip(found, limits)), (found, limits)
    assert all(torch.equal(attend(cache, q), fused) for _ in range(50)), "kernels overlap"


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_attention_in_float32_is_the_plain_one(name, fresh_compiler):
    """The fused form of a packed cache has no float32 on a GPU. Guards against one that is chosen
    nevertheless, and against products in TF32."""
    q, cache = filled(name, torch.float32, (21, 190, 560, 1000))
    sliding = SHAPES[name][3].get("sliding")
    plain, fused = cache.attend(q), compiled_attention(DEVICE)(cache, q)
    assert rel(fused, plain) <= 1e-5 and max(errors(cache, q, plain, sliding)) <= 1e-5
    assert max(errors(cache, q, fused, sliding)) <= 1e-5


@pytest.mark.parametrize("batch, n_heads, n_kv_heads, boost", (
    (1, 4, 1, 0), (48, 8, 2, 0), (1, 4, 1, 16), (48, 8, 2, 16)))
@torch.no_grad()
def test_attention_in_a_graph(batch, n_heads, n_kv_heads, boost, fresh_compiler):
    """One row of one KV head, and many rows. Guards against a launch for dimensions that a kernel
    lacks, and against a read of what is not written yet: replays of one graph, new queries each,
    equal separate calls."""
    dtype = torch.bfloat16
    queries = [randn(batch, n_heads, 1, 64, seed=i, dtype=dtype).to(DEVICE) for i in range(30)]
    k, v = (randn(batch, n_kv_heads, 900, 64, seed=i, dtype=dtype).to(DEVICE) for i in range(2))
    lengths = [900 - 17 * b for b in range(batch)]
    cache = KiviCache(batch, n_kv_heads, 1024, 64, dtype=dtype, device=DEVICE, boost=boost)
    cache.prefill(k, v, lengths)
    pos, t, static = cache.pos - 1, cache.tokens(900), queries[0].clone()
    attend = compiled_attention(DEVICE)
    assert max(errors(cache, static, attend(cache, static, pos, t))) <= 4e-3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):  # as layers of a model do: the second finds memory that is given back
            out = attend(cache, static, pos, t)
    for q in queries:
        out.fill_(float("nan"))
        static.copy_(q)
        graph.replay()
        assert torch.equal(out, attend(cache, q, pos, t))


@pytest.mark.parametrize("n_heads, sliding", ((2, None), (8, None), (8, 300)))
@torch.no_grad()
def test_attention_of_a_full_cache(n_heads, sliding, fresh_compiler):
    """The baseline in bfloat16, one and four query heads a KV head, rows of unequal lengths. Guards
    against keys of other heads, and masks of other rows."""
    dtype = torch.bfloat16
    q = randn(3, n_heads, 1, 128, dtype=dtype).to(DEVICE)
    k, v = (randn(3, 2, 900, 128, seed=i, dtype=dtype).to(DEVICE) for i in (1, 2))
    cache = FullCache(3, 2, 1024, 128, sliding=sliding, dtype=dtype, device=DEVICE)
    cache.prefill(k, v, (1, 60, 900))
    full = compiled_full_attention()
    for out in (cache.attend(q), full(cache, q, cache.pos - 1, cache.tokens(900))):
        assert max(errors(cache, q, out, sliding)) <= 4e-3


@torch.no_grad()
def test_attention_of_drafts_over_a_full_cache(fresh_compiler):
    """Five drafts in bfloat16, each as a decode step of its own. Guards against masks of others."""
    lengths = (3, 196, 576)
    q, k, v = (x.to(DEVICE) for x in make_tokens("full", 3, 600, torch.bfloat16))
    cache = make_cache("full", 3, 1024, torch.bfloat16)
    fill(cache, k, v, [n + 5 for n in lengths])
    queries = randn(3, q.shape[1], 5, q.shape[3], seed=5, dtype=q.dtype).to(DEVICE)
    out = compiled_full_attention()(cache, queries, cache.pos - 5, cache.tokens(cache.length))
    for i in range(5):
        cache.set_lengths([n + 1 + i for n in lengths])
        assert max(errors(cache, queries[:, :, i : i + 1], out[:, :, i : i + 1])) <= 4e-3


@pytest.mark.parametrize("kv, n_heads", [(kv, 8) for kv in (
    "kivi2:read=256", "kivi2+:read=256,by=mean", "kivi2-:read=512", "kivi2:read=768",
    "kivi2+:read=768", "tiers", "tiers:lag=32", "h2o:slots=300")] + [("kivi2+:read=768", 2)])
@torch.no_grad()
def test_attention_of_neighbours_is_the_plain_one(kv, n_heads, fresh_compiler):
    """Compiled as a decode step compiles it, bfloat16, rows of unequal lengths. Guards against
    launches for other shapes, a product of a single row, and loads of pages with masks that a
    product cannot have."""
    shape = SimpleNamespace(n_layers=1, head_dim=128, n_kv_heads=2)
    model = SimpleNamespace(config=shape, layers=[SimpleNamespace(window=None)])
    name, _, argument = kv.partition(":")
    (config,) = OTHERS[name](argument, model)
    cache = config.make(3, 2, 2048, 128, sliding=None, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = (randn(3, heads, 1900, 128, seed=seed, dtype=torch.bfloat16).to(DEVICE)
               for seed, heads in enumerate((n_heads, 2, 2)))
    cache.extend(q, k, v, (1900, 1501, 300))
    query = randn(3, n_heads, 1, 128, seed=9, dtype=torch.bfloat16).to(DEVICE)
    args = query, cache.pos - 1, cache.tokens(cache.length)
    plain = cache.attention(*args)
    step = compiled_step(SimpleNamespace(weights=None, parallel=False), DEVICE)
    assert rel(step.attend(cache, *args), plain) <= 1e-2


@pytest.mark.parametrize("name", ("tiers", "nuq"))
@torch.no_grad()
def test_neighbours_of_many_rows_are_written_as_plainly(name, fresh_compiler):
    """32 rows of 3 KV heads. Guards against a sort: Inductor compiles it at some shapes alone."""
    tables = {"k_zero": torch.zeros(3, 1, 64), "k_scale": torch.full((3, 1, 64), 3.0),
              "k_levels": torch.linspace(-1, 1, 8), "v_levels": torch.linspace(-1, 1, 8),
              "freq": torch.linspace(1, 0.01, 32)}
    config = TierConfig() if name == "tiers" else NuqConfig(3, 3, tables=tables)
    shape = {"sliding": None, "dtype": torch.float32, "device": DEVICE}
    plain, compiled = (config.make(32, 3, 512, 64, **shape) for _ in range(2))
    pos = torch.full((32,), 128, device=DEVICE)
    new = [randn(32, 3, 1, 64, seed=seed).to(DEVICE) for seed in (1, 2)]
    for cache in (plain, compiled):
        for i, (part, x) in enumerate(cache.named_buffers()):
            if part.endswith("window"):
                x.copy_(randn(*x.shape, seed=i).abs() + 0.01)

    def write(cache):
        cache.write(*new, pos[:, None])
        cache.quantize_keys(pos)

    write(plain)
    torch.compile(write, fullgraph=True, options=EXACT)(compiled)
    for part, x in plain.named_buffers():
        assert (x != compiled.get_buffer(part)).sum() <= 1e-3 * x.numel()
        assert x.count_nonzero() or "packed" not in part


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ("paper", "small window", "K 4 V 2", "40 sinks", "D 80",
                                  "sliding over sinks", "boosted, 4 sinks, values of 64"))
@torch.no_grad()
def test_attention_of_drafts_is_that_of_their_own_steps(name, dtype, fresh_compiler):
    """Seven drafts: each is as close to the truth of its own step as that step. Guards against a
    value that is read exactly after it has left the window, or twice, and against a launch for
    other shapes than those of drafts."""
    lengths = (21, 196, 576, 992)  # no key block ends within seven tokens
    q, cache = filled(name, dtype, lengths)
    heads, Hk, D, options = SHAPES[name]
    queries = randn(4, heads, 7, D, seed=5, dtype=dtype).to(DEVICE)
    k, v = (randn(4, Hk, 7, D, seed=i, dtype=dtype).to(DEVICE) for i in (6, 7))
    attend = compiled_attention(DEVICE, fused_drafted, drafted)
    before = {n: x.clone() for n, x in cache.named_buffers()}
    left = leaving(cache, cache.pos, 7)
    out = attend(cache, queries, cache.pos, cache.tokens(cache.length), k, v, left)
    assert all(torch.equal(x, before[n]) for n, x in cache.named_buffers())
    for i in range(7):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        q = queries[:, :, i : i + 1]
        plain = errors(cache, q, cache.attend(q), options.get("sliding"))
        limits = [1.1 * error + HALF_EPS[dtype] for error in plain]
        found = errors(cache, q, out[:, :, i : i + 1], options.get("sliding"))
        assert all(error <= limit for error, limit in zip(found, limits)), (i, found, limits)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("name", ("paper", "boosted, 4 sinks, values of 64", "all at once"))
@torch.no_grad()
def test_attention_extends_to_the_same_bytes(name, dtype):
    """Guards against an order of operations that only a GPU sees: bytes read after they are
    overwritten."""
    heads, Hk, D, _ = SHAPES[name]
    q, k, v = (x.to(DEVICE) for x in make_tokens(name, 2, 400, dtype))
    cache = make_cache(name, 2, 512, dtype)
    first = lengths = [3, 90]
    fill(cache, k, v, first)
    for new in ([40, 1], [1, 0], [130, 200], [5, 7]):
        n = max(new)
        parts = [torch.stack([x[b, :, end : end + n] for b, end in enumerate(lengths)])
                 for x in (k, v)]
        out = cache.extend(q.expand(-1, -1, n, -1).contiguous(), *parts, new)
        assert torch.isfinite(out).all()
        lengths = [end + more for end, more in zip(lengths, new)]
    for b, (start, end) in enumerate(zip(first, lengths)):
        alone = make_cache(name, 1, 512, dtype)
        fill(alone, k[b : b + 1], v[b : b + 1], [start], end - start)
        for buffer, x in alone.contents().items():
            assert torch.equal(x[0], cache.contents()[buffer][b]), buffer


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("name", ("paper", "boosted, 4 sinks, values of 64", "all at once"))
@torch.no_grad()
def test_attention_finds_the_same_bytes_compiled(name, dtype, fresh_compiler):
    """Prompts and steps, compiled and plain, leave the same bytes. Guards against a scale that is
    not rounded before it divides, a division that is not exact, and a compiled step that
    quantizes rows that are too short."""
    R = CASES[name][3]["residual"]
    lengths = [1, R - 1, R + 18]
    q, k, v = (x.to(DEVICE) for x in make_tokens(name, 3, 2 * R + 60, dtype))
    plain, compiled = (make_cache(name, 3, 512, dtype) for _ in range(2))
    compiled.quantizer = compiled_quantizer()
    step = compiled_step(SimpleNamespace(weights=None), DEVICE)
    layer = Layer(compiled)
    for cache in (plain, compiled):
        fill(cache, k, v, lengths)
    for t in range(R + 20):
        k_new, v_new = (at(x, [n + t for n in lengths]) for x in (k, v))
        plain.append(k_new, v_new)
        compiled.advance()
        step.before(layer, q, k_new, v_new, compiled.pos)
        if compiled.completes_key_block():
            step.flush(layer, compiled.pos)
        compiled.pos += 1
    others = dict(compiled.named_buffers())
    differ = {buffer: (x != others[buffer]).double().mean().item()
              for buffer, x in plain.named_buffers() if not torch.equal(x, others[buffer])}
    assert not differ, f"shares that differ: {differ}"


# ---- the model ----------------------------------------------------------------------------------

@pytest.mark.parametrize("options", ({"kv": "bf16"}, SMALL, {"kv": "kivi2+"}, {"kv": "kivi4"}),
                         ids=("bf16", "kivi2", "kivi2+", "kivi4"))
def test_program_decodes_compiled_as_eager(checkpoint, options, fresh_compiler):
    """256 greedy tokens, float32, compiled and in CUDA graphs. Guards against a graph that replays
    an old position or pointer."""
    prompt = torch.tensor([some_ids(20), some_ids(20, seed=1)], device=DEVICE)
    net = Transformer.from_pretrained(checkpoint, DEVICE)
    eager = generate.generate(net, prompt, 256, stop=(), **options)
    net.compile()
    assert torch.equal(generate.generate(net, prompt, 256, stop=(), **options), eager)


@pytest.mark.parametrize("kv", ("tiers", "h2o:0.3", "h2o:slots=64,mean", "kivi2:read=128"))
def test_program_decodes_neighbours_in_graphs(checkpoint, kv):
    """300 greedy tokens, float32. Guards against sums of attention that a capture counts twice."""
    prompt = torch.tensor([some_ids(200), some_ids(200, seed=1)], device=DEVICE)
    net = Transformer.from_pretrained(checkpoint, DEVICE)
    texts = []
    for graphs in (False, True):
        net.setup_caches(2, 512, kv)
        decoder = Decoder(net, torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), graphs)
        texts.append(generate.generate(net, prompt, 300, stop=(), decoder=decoder))
    assert torch.equal(*texts)


@pytest.mark.parametrize("options", ({"kv": "bf16"}, SMALL, {"kv": "kivi2+"}),
                         ids=("bf16", "kivi2", "kivi2+"))
def test_program_speculates_to_the_same_text(checkpoint, options, fresh_compiler):
    """200 greedy tokens, float32, compiled, in CUDA graphs: looked up, and by a draft model that is
    the model itself. Guards against a capture that accepts drafts and so loses values, and against
    a block of keys that is never quantized, and against a number of drafts that is compiled as
    any number because a step of one token came first."""
    prompt = [some_ids(12) * 4, some_ids(9, seed=1)]
    net, small = (Transformer.from_pretrained(checkpoint, DEVICE) for _ in range(2))
    want = generate.generate(net, prompt, 200, stop=(), **options)
    net.compile()
    plain = generate.generate(net, prompt, 200, stop=(), **options)  # one token a step comes first
    assert plain == want
    for draft in (None, small):
        stats = {}
        assert generate.generate(net, prompt, 200, stop=(), speculate=5, draft=draft, stats=stats,
                                 **options) == want
    assert stats["steps"] + stats["compile_steps"] < 120, "the model does not accept its own drafts"


def test_program_shares_graphs_between_waves(checkpoint, fresh_compiler):
    """Guards against a graph that replays the tokens or lengths of the wave that captured it, and
    against capturing anew in every wave."""
    net = Transformer.from_pretrained(checkpoint, DEVICE)
    lengths = ((50, 3, 20), (7, 33, 1), (12, 12, 40))
    waves = [[some_ids(n, n) for n in wave] for wave in lengths]
    limits = [60, 9, 30]
    eager = [generate.generate(net, wave, limits, stop=(), **SMALL) for wave in waves]
    net.compile()
    net.setup_caches(3, 160, **SMALL)
    token = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    decoder = Decoder(net, token, temperature=0.0)
    seen = []
    for wave, want in zip(waves, eager):
        assert generate.generate(net, wave, limits, stop=(), decoder=decoder) == want
        seen.append(dict(decoder.graphs))
    assert seen[0] and all(seen[-1][n] is graph for n, graph in seen[0].items())
    assert len(seen[-1]) <= len(seen[0]) + 1


@torch.no_grad()
def test_program_prefills_in_parts_exactly_and_as_the_formula_says():
    """bfloat16, 20,000 tokens in parts of 4,096 and short rows together. Guards against a flash
    kernel that aligns its mask at the other corner, and against memory that grows with the square
    of the prompt."""
    config = ModelConfig(vocab_size=512, dim=1024, n_layers=2, n_heads=8, n_kv_heads=2,
                         head_dim=128, hidden_dim=2816, max_len=32768)
    net = random_model(config, DEVICE)
    for batch, prompt in ((1, 20000), (70, 200)):
        tokens = torch.randint(512, (batch, prompt), device=DEVICE)
        net.setup_caches(batch, prompt + 40, "kivi2")
        parts = needs(net, batch, prompt, prompt + 40, "kivi2")
        net.prefill(tokens)  # the first one allocates the libraries' workspaces
        for layer in net.layers:
            layer.cache.reset()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = net.prefill(tokens)
        assert torch.cuda.max_memory_allocated() - before <= 1.05 * parts["activations"]
        assert rel(logits, net(tokens)[:, -1]) <= 2e-2


@pytest.mark.parametrize("bits, group_size, inputs", (
    (8, None, 11008), (8, None, 14336), (4, 32, 11008), (4, 32, 14336), (4, 128, 11008)))
@torch.no_grad()
def test_program_multiplies_quantized_weights(bits, group_size, inputs, fresh_compiler):
    """Every compiled form, at sizes that fill no whole tiles (11008) and whose sums are cut
    (14336), against float32 products with the dequantized weights. Guards against masks at the ends
    of rows, and products that leave their kernel in bfloat16 before they are added up."""
    layer, _ = quantized_linear(bits, group_size, torch.bfloat16, inputs=inputs, outputs=1000)
    layer = layer.to(DEVICE)

    def multiply(layer, x):
        return layer(x)

    call = compiled_weights(multiply)
    weights = layer.dequantized().float()
    for rows in (1, 3, 16, 40, 100, 200):
        x = randn(rows, inputs, seed=rows, dtype=torch.bfloat16).to(DEVICE)
        expected = x.float() @ weights.mT + layer.bias.float()
        assert rel(call(layer, x).float(), expected) < 3e-3, rows


# ---- the program --------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """A file with 170 tokens of text, most of which a cache with a small window quantizes."""
    file = tmp_path_factory.mktemp("story") / "story.txt"
    text = (ROOT / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    file.write_text(text[:600], encoding="utf-8")
    return file


def result_on_gpu(story, *options):
    """The JSON of 12 tokens after the story."""
    return result_of("--device", DEVICE.type, "--prompt-file", story, "--temperature", 0,
                     "--max-new-tokens", 12, *options)


def check_compiled(story, dtype, *options):
    """The program, compiled, in a dtype; in float32 the text must be that of uncompiled steps."""
    options = ("--dtype", dtype, *options)
    result = result_on_gpu(story, "--compile", *options)
    assert 1 <= result["new_tokens"] <= 12 and result["text"].strip()
    assert result["compile_s"] > 0 and result["peak_bytes"] > result["kv_bytes"]
    if dtype == "float32":
        assert result["text"] == result_on_gpu(story, "--no-compile", *options)["text"]


@pytest.mark.parametrize("dtype", generate.DTYPES)
@pytest.mark.parametrize("kv", ("bf16", "kivi2", "kivi2+", "kivi2-", "kivi4", "k4v2"))
def test_program_runs_for_every_kv_and_dtype(kv, dtype, story, fresh_compiler):
    """Guards against a combination that does not compile, or fails in its first step."""
    check_compiled(story, dtype, "--kv", kv)


@pytest.mark.parametrize("options", (
    ("--group-size", 64, "--residual", 64), ("--residual", 32, "--sink", 4),
    ("--weights", "int4"), ("--weights", "int8")), ids=lambda options: " ".join(map(str, options)))
def test_program_runs_with_options(options, story, fresh_compiler):
    """Guards against sizes that a kernel's launch does not fit."""
    check_compiled(story, "bfloat16", *options)


def test_program_runs_with_bits_of_every_layer(story, tmp_path, fresh_compiler):
    """Guards against a kernel of one layer's bits for another's."""
    kv = write_kvtuner(tmp_path / "bits", [(2, 2), (4, 2)] * 4)
    check_compiled(story, "bfloat16", "--kv", kv)


def test_program_answers_many_prompts(tmp_path, fresh_compiler):
    """float32. Guards against graphs that one wave leaves in the next one's way."""
    file = tmp_path / "prompts"
    prompts = ["Once upon a time", "The sea", "He looked at the old house. " * 9, "It was", "And"]
    file.write_text("\n".join(prompts))
    options = ("--device", DEVICE.type, "--dtype", "float32", "--temperature", 0,
               "--max-new-tokens", 12, "--residual", 32, "--json")
    code, out, err = run("--prompts", file, "--batch-size", 2, "--compile", *options)
    assert code == 0, err
    *objects, last = map(json.loads, out.splitlines())
    assert last["finished"] == 5 and last["waves"] == 3 and last["compile_s"] > 0
    for o in objects:
        alone = result_of("--no-compile", "--prompt", o["prompt"].strip(), *options[:-1])
        assert o["text"] == alone["text"]


def test_program_says_why_it_does_not_compile(story):
    """Guards against half a minute of compiling for a sentence, and CUDA graphs whose time counts
    as decoding."""
    code, _, err = run("--device", DEVICE.type, "--prompt-file", story, "--max-new-tokens", 12)
    assert code == 0 and err.splitlines()[0].startswith("not compiling the decode step: ")
    assert "after capturing CUDA graphs" in err and "steps ran uncompiled" in err
