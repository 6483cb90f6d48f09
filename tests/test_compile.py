"""Compiled models: what is compiled, when, and that it computes the same.

A compilation by Inductor takes half a minute, so most of these let Dynamo trace the step for its
backend "eager", which decides what breaks a graph and what compiles anew; the others are slow ones
(KIVI_SLOW=1). What attention computes when compiled stands in test_attentions.py.
"""
import ctypes
from pathlib import Path

import pytest
import torch
from cache_cases import assert_same, state
from make_golden import tokens
from reference import SMALL, resident, some_ids
from reference_cache import randn
from torch._dynamo.utils import counters

import generate
from fused.attention import compiled_attention
from kivi import KiviCache
from model import ModelConfig, Transformer
from study.models import random_model

CPU = torch.device("cpu")
FULL = {"kv": "bf16"}
FOUR = {"kv": "kivi2", "k_bits": 4, "group_size": 16, "residual": 16}
BOOSTED = {"kv": "kivi2+", "group_size": 16, "residual": 16, "boost": 8}
only_eager = pytest.mark.parametrize("backend", ("eager",), indirect=True)


@pytest.fixture(params=("eager", pytest.param("inductor", marks=pytest.mark.slow)))
def backend(request, monkeypatch, fresh_compiler):
    """What torch.compile hands its graphs to."""
    compile = torch.compile

    def compile_for_it(fn, **options):
        options.pop("options", None)
        return compile(fn, backend="eager", **options)

    if request.param == "eager":
        monkeypatch.setattr(torch, "compile", compile_for_it)
    return request.param


# ---- the decode step ----------------------------------------------------------------------------

@pytest.mark.slow
def test_compiled_decoding_recompiles_nothing_and_equals_eager(model, backend):
    """300 tokens after a warm-up of 40, under fail_on_recompile; the text is the eager one. Guards
    against a Python counter in the graph, a cache whose length is a constant there, a flush that
    changes a guard."""
    prompt = torch.tensor([some_ids(20), some_ids(20, seed=1)])
    eager = generate.generate(model, prompt, 340, stop=(), **SMALL)
    model.setup_caches(2, 400, **SMALL)
    model.compile()
    generate.generate(model, prompt, 40, stop=())
    with torch.compiler.set_stance("fail_on_recompile"):
        fast = generate.generate(model, prompt, 340, stop=())
    assert torch.equal(fast, eager)


@pytest.mark.parametrize("name, options", (
    pytest.param("falcon 7b", FOUR, marks=pytest.mark.slow),
    ("falcon new decoder", FULL),
    pytest.param("mistral, window", BOOSTED, marks=pytest.mark.slow),
    pytest.param("qwen2, window above layer 1", FULL, marks=pytest.mark.slow),
    pytest.param("llama, rope dynamic", FOUR, marks=pytest.mark.slow),
))
def test_the_compiled_step_equals_the_eager_one(name, options, folders, backend):
    """Guards against a graph break in LayerNorm, GELU, the shared norm or the window's mask."""
    net = Transformer.from_pretrained(folders(name))
    eager = generate.generate(net, tokens(20), 40, stop=(), **options)
    net.compile()
    assert torch.equal(generate.generate(net, tokens(20), 40, stop=(), **options), eager)


@pytest.mark.slow
@only_eager
def test_layers_of_the_same_bits_share_a_compilation(model, tmp_path, backend):
    """Guards against a compilation a layer: minutes for a model of 32."""
    made = []
    for pairs in ([(4, 2), (4, 2)], [(4, 2), (2, 2)]):
        torch._dynamo.reset()
        counters.clear()
        (tmp_path / "bits").write_text("\n".join(f"{k_bits} {v_bits}" for k_bits, v_bits in pairs))
        model.setup_caches(1, 100, f"kvtuner:{tmp_path / 'bits'}", residual=32)
        model.compile()
        generate.generate(model, torch.tensor([some_ids(40)]), 40, stop=())
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == 6 and 6 < made[1] <= 9, made


def test_the_recompile_check_can_fail(fresh_compiler):
    """The same stance must notice a step that reads a Python counter: what the tests above would
    see if the cache did so."""
    class Counter:
        n = 0

    counter = Counter()

    def step(x):
        return x + counter.n

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
    compiled(torch.ones(3))
    counter.n = 5
    with torch.compiler.set_stance("fail_on_recompile"):
        with pytest.raises(RuntimeError, match="(?i)recompil"):
            compiled(torch.ones(3))


# ---- prefill ------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", (
    pytest.param(SMALL, marks=pytest.mark.slow), {"kv": "kivi2+", "k_bits": 4, "residual": 64}),
    ids=("kivi2", "kivi2+"))
def test_compiled_prefill_gives_the_same_bytes(options, checkpoint, backend):
    """Prompts of many lengths, float32. Guards against arithmetic that the compiler changes,
    against a compilation for every length, and against one that happens inside the first prompt,
    whose time is reported."""
    eager, fast = (Transformer.from_pretrained(checkpoint) for _ in range(2))
    fast.compile(prefill=True)
    counters.clear()
    for net in (eager, fast):
        net.setup_caches(3, 400, **options)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2  # keys and values
    for lengths in ([1, 2, 3], [64, 31, 129], [333, 200, 7]):
        prompts = torch.tensor([some_ids(max(lengths), n) for n in lengths])
        for net in (eager, fast):
            net.cache.reset()
            net.prefill(prompts, lengths)
        for a, b in zip(eager.layers, fast.layers):
            assert_same(state(a.cache), state(b.cache))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@only_eager
def test_one_kv_head_compiles_before_the_first_prompt(backend):
    """Guards against a warm-up of one block of bytes, a size that the compiler takes for a
    constant: the first prompt would compile again."""
    config = ModelConfig(vocab_size=64, dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32,
                         hidden_dim=64, max_len=512)
    model = random_model(config, CPU)
    model.compile(prefill=True)
    counters.clear()
    model.setup_caches(2, 400, "kivi2")
    for name, buffer in model.cache.named_buffers():
        untouched = name in ("index", "rows") or not buffer.any()
        assert untouched, f"the warm-up left something in {name}"
    model.prefill(torch.zeros(2, 300, dtype=torch.int64), [300, 7])
    assert counters["stats"]["unique_graphs"] == 2


# ---- what else must not happen ------------------------------------------------------------------

def largest_allocation(call):
    """(bytes of the largest tensor that call() allocates, bytes by which the process's peak memory
    grew; None where unknown)."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    largest = max([e.nbytes() for e in events], default=0)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process holds would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    except (OSError, AttributeError):
        return largest, None
    before = resident("VmRSS")
    call()
    return largest, resident("VmHWM") - before


@pytest.mark.slow
def test_compiled_attention_allocates_nothing_as_large_as_the_cache(fresh_compiler):
    """On 32,768 tokens: no temporary, and no growth of the process, near the 67 MB of one layer's K
    in full precision. Guards against attention that rebuilds K or V; a tensor of that size is
    measured first, to see that it shows."""
    heads, n_tokens, head_dim = 8, 32768, 64
    full = heads * n_tokens * head_dim * 4
    largest, growth = largest_allocation(lambda: torch.ones(full // 4))
    assert largest == full and (growth is None or growth > 0.9 * full), "the measurement is blind"
    cache = KiviCache(1, heads, n_tokens + 1024, head_dim)
    for buffer in (cache.k_packed, cache.v_packed):
        buffer.random_(0, 256)
    cache.pos.fill_(n_tokens)
    cache.lengths[:] = [n_tokens]
    q = randn(1, heads, 1, head_dim)
    attend = compiled_attention(CPU)
    largest, growth = largest_allocation(lambda: attend(cache, q))
    assert 0 < largest <= full / 16, f"{largest} bytes at once"
    assert growth is None or growth <= full / 16, f"the process grew by {growth} bytes"


def test_compiling_attention_leaves_inductor_as_it_was():
    """Who copies the files compiles other things in the same process. Guards against launches that
    stay in force for all of them."""
    from torch._inductor.virtualized import V

    before = type(V.choices)
    attend = compiled_attention("cuda")
    assert type(V.choices) is before
    cache = KiviCache(1, 1, 64, 32, device="meta", dtype=torch.bfloat16)
    with pytest.raises(Exception):  # no CUDA kernel for it, but the call has been entered and left
        attend(cache, None, cache.pos, cache.index)
    assert type(V.choices) is before
