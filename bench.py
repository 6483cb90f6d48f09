"""Measurements. Every time stands beside its ceiling (bytes over the measured copy bandwidth) and its error.

    python bench.py attention        one layer's decode attention: SDPA, FlexAttention, FullCache, kivi4, kivi2
    python bench.py decode           a whole decode step of Llama-2-7B and Llama-3.1-8B shapes, random weights
    python bench.py throughput       tokens/s against the batch within --budget-gb, short and long loads, random weights
    python bench.py memory           bytes a token of every cache, by the formula and as allocated; peak of whole runs
    python bench.py quality          perplexity, KL and retrieval through the cache; --study: the long table; --tune: bits a layer

Times are medians of CUDA-graph replays over enough caches to exceed the L2 (wall-clock medians on a CPU). The last line of
stdout is one JSON object; --json FILE writes it, after Ctrl-C or SIGTERM what has been measured until then.
"""
import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F

import generate
from kivi import PRESETS, FullCache, KiviCache, KVConfig, compiled_attention
from model import ModelConfig, Transformer, rotate, shard
from quantize import CHUNK, QuantizedLinear, group_codes, quantize_weight, weight_format

SHAPES = {  # name -> B, H, Hk, T, D
    "mha": (16, 32, 32, 8192, 128),
    "gqa": (32, 32, 8, 16384, 128),
    "b1-32k": (1, 32, 8, 32768, 128),
    "b1-128k": (1, 32, 8, 131072, 128),
    "b8-4k": (8, 32, 8, 4096, 128),
    "b1-8k": (1, 32, 8, 8192, 128),
    "b4-32k": (4, 32, 8, 32768, 128),
    "mha-b1-32k": (1, 32, 32, 32768, 128),
    "cpu-d128": (1, 32, 8, 16384, 128),
    "cpu-d64": (1, 32, 8, 16384, 64),
}
CACHES = {
    "kivi2": PRESETS["kivi2"],
    "kivi2+": PRESETS["kivi2+"],
    "kivi2 G64": KVConfig(2, 2, 64, 128),
    "kivi2 G128": KVConfig(2, 2, 128, 128),
    "kivi4": PRESETS["kivi4"],
}
MODELS = {
    "llama-2-7b": (ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 1 << 17), 16, 8192),
    "llama-3.1-8b": (ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 1 << 17, rope_theta=500000.0), 32, 16384),
}
LARGE = {"llama-3.1-70b": (ModelConfig(128256, 8192, 80, 64, 8, 128, 28672, 1 << 17, rope_theta=500000.0), 16, 8192)}  # decode, with --layers
TINY = ModelConfig(512, 64, 2, 4, 2, 32, 128, 1 << 17)  # runs anywhere, in tests
REQUESTS = {"bf16": ("bf16", {}), "kivi2 R32": ("kivi2", {"residual": 32}), "kivi2 R128": ("kivi2", {}), "kivi2+": ("kivi2+", {})}  # many at once
OUTSIDE = {  # label -> our cache of as many bits, options of transformers' QuantizedCache: the nearest to kivi2 that it has
    "transformers bf16": ("bf16", None),
    "transformers quanto 2 bits": ("kivi2", {"backend": "quanto", "nbits": 2, "axis_key": -1, "axis_value": 0, "q_group_size": 32, "residual_length": 128}),
}


def say(*text):
    print(*text, file=sys.stderr, flush=True)


def machine(device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}


def timed(calls, device, repeats=30):
    """Median seconds of one call, over the thunks in `calls`: replays of one CUDA graph of them all, or wall clock."""
    if device.type != "cuda":
        for call in calls:
            call()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            seconds.append((time.perf_counter() - start) / len(calls))
        return statistics.median(seconds)
    calls = calls * -(-8 // len(calls))  # or the launch of the graph would count: 5 us of a single call
    stream = generate.side_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = [call() for call in calls]  # noqa: F841  (distinct outputs)
    graph.replay()
    milliseconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end) / len(calls))
    return statistics.median(milliseconds) / 1e3


def copy_bandwidth(device):
    """Bytes a second that a large copy moves, read plus written: the ceiling of everything here."""
    x = torch.ones(2 ** (28 if device.type == "cuda" else 25), device=device)
    y = torch.empty_like(x)
    seconds = [timed([call], device, 20) for call in (lambda: y.copy_(x), lambda: torch.neg(x, out=y))]  # a copy may go to a slower engine
    return 2 * x.nbytes / min(seconds)


def random_kv(B, Hk, T, D, device, dtype):
    """Keys with a few channels 20 times as large as the others, as real keys have; plain normal values."""
    k, v = (torch.randn(B, Hk, T, D, device=device, dtype=dtype) for _ in range(2))
    k[..., torch.randperm(D, device=device)[:4]] *= 20
    return k, v


def reference(q, k, v):
    """float32 attention, one batch row at a time: q [B, H, 1, D], k, v [B, Hk, T, D]."""
    out = []
    for b in range(q.shape[0]):
        rows = q[b].view(k.shape[1], -1, q.shape[-1]).float()
        s = rows @ k[b].float().mT / q.shape[-1] ** 0.5
        out.append((s.softmax(-1) @ v[b].float()).view(q.shape[1:]))
    return torch.stack(out)


def attention(args, device):
    """One layer's decode attention: SDPA, FlexAttention, FullCache and the packed caches, with the error beside every time."""
    from torch.nn.attention.flex_attention import flex_attention

    dtype, results = torch.bfloat16, args.done.setdefault("rows", [])
    bandwidth = copy_bandwidth(device)
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    for name in args.shapes or [n for n in SHAPES if n.startswith("cpu") == (device.type == "cpu")]:
        B, H, Hk, T, D = SHAPES[name]
        bytes_full = 2 * B * Hk * T * D * 2
        rows = {}

        def measure(label, calls, nbytes, out, ref):
            torch.cuda.empty_cache() if device.type == "cuda" else None
            error = ((out.float() - ref).norm() / ref.norm()).item()
            seconds = timed(calls, device)
            row = rows[label] = {"shape": name, "form": label, "us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9, "bytes": nbytes,
                           "floor_us": nbytes / bandwidth * 1e6, "error": error}
            results.append(row)
            say(f"  {name:9} {label:12} {seconds * 1e6:9.1f} us  {100 * nbytes / bandwidth / seconds:5.1f} % of its floor  error {error:.1e}")

        def attempt(label, work):
            try:
                start = time.perf_counter()
                work()
                say(f"            ({time.perf_counter() - start:.0f} s)")
            except Exception as error:  # one form must not end the table
                say(f"  {name:9} {label:12} failed: {type(error).__name__}: {str(error)[:300]}")

        q = torch.randn(B, H, 1, D, device=device, dtype=dtype)
        k, v = random_kv(B, Hk, T, D, device, dtype)
        sets = min(8, math.ceil(2e8 / bytes_full)) if device.type == "cuda" else 1
        copies = [(k, v)] + [(k.clone(), v.clone()) for _ in range(sets - 1)]
        ref = reference(q, k, v)

        def full(label, fn):
            attempt(label, lambda: measure(label, [lambda k=k, v=v: fn(k, v) for k, v in copies], bytes_full, fn(k, v), ref))

        full("sdpa rows", lambda k, v: F.scaled_dot_product_attention(q.view(B, Hk, -1, D), k, v).view(q.shape))
        full("sdpa gqa", lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=H != Hk))
        flex = torch.compile(flex_attention, dynamic=False)
        full("flex", lambda k, v: flex(q, k, v, enable_gqa=H != Hk))
        del copies

        def cached(label, make):
            def work():
                torch.compiler.reset()  # or the compiler takes what differs from the cache before, as the sinks, for a variable: half the speed
                cache = make()
                cache.prefill(k, v)
                sets = min(16, math.ceil(2e8 / cache.nbytes)) if device.type == "cuda" else 1
                caches = [cache] + [make() for _ in range(sets - 1)]
                for other in caches[1:]:
                    other.prefill(k, v)
                step = compiled_attention(type(cache), device)
                pos, blocks = cache.pos - 1, cache.blocks(T)
                nbytes = cache.nbytes
                out = step(cache, q, pos, blocks)
                ref = reference(q, *cache.dequantized())
                measure(label, [lambda c=c: step(c, q, pos, blocks) for c in caches], nbytes, out, ref)
            attempt(label, work)

        make = dict(dtype=dtype, device=device)
        cached("full cache", lambda: FullCache(B, Hk, T, D, **make))
        for label, config in CACHES.items():
            if not args.caches or label in args.caches:
                cached(label, lambda: KiviCache(B, Hk, T + 256, D, **vars(config), **make))  # room to decode into
        best = min(r["us"] for f, r in rows.items() if not f.startswith("kivi"))
        for r in rows.values():
            r["ratio"] = best / r["us"]
        del k, v, ref
        torch.compiler.reset()
    print(f"\ncopy bandwidth {bandwidth / 1e9:.0f} GB/s\n\n| shape (B, H, Hk, T, D) | form | us | GB/s | of its floor | against best bf16 | error |\n|---|---|---|---|---|---|---|")
    for r in results:
        print(f"| {r['shape']} {SHAPES[r['shape']]} | {r['form']} | {r['us']:.1f} | {r['GB/s']:.0f} | {100 * r['floor_us'] / r['us']:.0f} % "
              f"| {r['ratio']:.2f} | {r['error']:.1e} |")
    return {"copy_GB/s": bandwidth / 1e9, "rows": results}


class ExactFullCache(FullCache):
    """The strongest baseline: the library's attention over exactly the tokens present in all rows, without a mask."""

    tokens = 0

    def attention(self, q, pos, blocks):
        n = self.tokens
        k, v = self.k[:, :, :n], self.v[:, :, :n]
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def random_model(config, device, weights=None):
    config = dataclasses.replace(config, weights=weight_format(weights) if weights else None)
    if generate.processes() > 1:
        config = shard(config, torch.distributed.get_rank(), generate.processes())
    with torch.device("meta"):
        model = Transformer(config)
    model.to(torch.bfloat16).to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(1)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            N, K = len(layer.packed), layer.packed.shape[1] * 32 // layer.bits
            for rows in torch.arange(N).split(CHUNK // K):  # a small part at a time: what is quantized is all that stays
                part = quantize_weight(torch.randn(len(rows), K, device=device, dtype=torch.bfloat16) * 0.02, layer.bits, K // layer.meta.shape[1])
                for view, x in zip((layer.packed, layer.meta), part):
                    view[rows[0] : rows[-1] + 1] = x
    freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    model.register_buffer("freq", freq, persistent=False)
    return model.eval().requires_grad_(False)


def weight_bytes(model):
    """Bytes of weights that a decode step reads: all but the embedding."""
    tensors = [*model.named_parameters(), *((n, x) for n, x in model.named_buffers() if ".cache." not in n)]
    return sum(x.nbytes for n, x in tensors if not n.startswith("embed"))


def decode(args, device):
    """A whole decode step, random weights, beside its roofline: weights and KV bytes over the measured copy bandwidth."""
    bandwidth, results = copy_bandwidth(device), args.done.setdefault("rows", [])
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    for name, form in itertools.product(args.models or MODELS, args.weights):
        config, B, T = {**MODELS, **LARGE}[name]
        B, T = args.batch or B, args.tokens or T
        if args.layers:
            config.n_layers = args.layers
        clear(device)
        model = random_model(config, device, None if form == "bf16" else form)
        weights = weight_bytes(model)
        k, v = random_kv(B, model.config.n_kv_heads, T, config.head_dim, device, torch.bfloat16)
        for kv in args.caches or ["bf16", "kivi2", "kivi2+", "kivi4"]:
            torch.compiler.reset()
            for layer in model.layers:
                layer.cache = None
            clear(device)
            capacity = args.capacity or T + 256
            model.setup_caches(B, capacity, kv)
            if kv == "bf16":
                for layer in model.layers:
                    layer.cache.__class__, layer.cache.tokens = ExactFullCache, T
            lengths = torch.full((B,), T - 8, device=device)
            model.cache.pos.copy_(lengths)
            for layer in model.layers:
                layer.cache.fill(k, v, lengths)
            model.cache.lengths[:] = lengths.tolist()
            model.compile()
            start = time.perf_counter()
            token = torch.zeros(B, 1, dtype=torch.int64, device=device)
            decoder = generate.Decoder(model, token, temperature=0.0)
            decoder()
            torch.cuda.synchronize()
            cold = time.perf_counter() - start
            graph = next(iter(decoder.graphs.values()))
            times = []
            for _ in range(20):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                model.cache.pos.copy_(lengths)
                a.record()
                graph.replay()
                b.record()
                b.synchronize()
                times.append(a.elapsed_time(b))
            ms = statistics.median(times)
            kv_bytes = B * sum(layer.cache.traffic(T - 7) for layer in model.layers)
            floor = (weights + kv_bytes) / bandwidth * 1e3
            results.append({"model": name, "batch": B, "tokens": T, "capacity": capacity, "form": form, "kv": kv, "ms": ms, "tokens_per_s": B / ms * 1e3,
                            "weights": weights, "kv_bytes": kv_bytes, "floor_ms": floor, "first_step_s": cold,
                            "peak_GB": torch.cuda.max_memory_allocated() / 1e9})
            say(f"  {name} B={B} T={T} weights {form} {kv}: {ms:.2f} ms, {B / ms * 1e3:.0f} tokens/s, {100 * floor / ms:.0f} % of its roofline, first step {cold:.0f} s")
        del model, k, v, layer, decoder, graph
        torch.cuda.empty_cache()
    print("\n| model | B | T | weights | cache | ms | tokens/s | of its roofline | against bf16 | peak, GB | first step, s |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for r in results:
        base = [x["ms"] for x in results if x["kv"] == x["form"] == "bf16" and x["model"] == r["model"]]
        r["ratio"] = base[0] / r["ms"] if base else None
        print(f"| {r['model']} | {r['batch']} | {r['tokens']} | {r['form']} | {r['kv']} | {r['ms']:.2f} | {r['tokens_per_s']:.0f} | {100 * r['floor_ms'] / r['ms']:.0f} % "
              f"| {r['ratio'] and round(r['ratio'], 2)} | {r['peak_GB']:.1f} | {r['first_step_s']:.0f} |")
    return {"copy_GB/s": bandwidth / 1e9, "rows": results}


# ---- many requests: memory and throughput -------------------------------------------------------------------------------

def run_bytes(model, batch, prompt, output, kv, options):
    return sum(model.memory(batch, prompt, prompt + output, kv, **options).values())


def largest_batch(model, prompt, output, kv, options, budget):
    return generate.largest(1 << 16, lambda B: run_bytes(model, B, prompt, output, kv, options) <= generate.SAFE * budget)


def start_caches(model, batch, capacity, kv, options):
    """Caches of `batch` rows full of random numbers (zeros would flatter: a GPU computes them at a higher clock)."""
    for layer in model.layers:
        layer.cache = None
    clear(model.embed.weight.device)
    model.setup_caches(batch, capacity, kv, **options)
    for layer in model.layers:
        for name, buffer in layer.cache.named_buffers():
            if name not in ("pos", "index"):
                buffer.random_(0, 256) if buffer.dtype == torch.uint8 else buffer.normal_(0, 0.1)
        if kv == "bf16":
            layer.cache.__class__ = ExactFullCache


def clear(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compile_step(model, kv, device):
    """The compiled step of a measurement. Full precision: the library's attention over exactly the tokens present."""
    torch.compiler.reset()
    if device.type != "cuda":
        return
    model.compile(prefill=True)
    if kv == "bf16":
        model.attend = lambda cache, *args: cache.attention(*args)


def at_length(model, n):
    """Puts the end of every row at n tokens. The cost of a step depends on that alone."""
    model.cache.pos.fill_(n)
    model.cache.lengths[:] = [n] * model.cache.batch
    for layer in model.layers:
        layer.cache.tokens = n + 1  # of ExactFullCache


def seconds(call, device, repeats):
    """Median seconds of a call that ends on the device."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forget_graphs(decoder):
    decoder.graphs, decoder.pool = None if decoder.graphs is None else {}, None


def prefill_seconds(model, batch, prompt, device):
    """Seconds of a prefill of `batch` rows: a loop over groups of rows, of which the first is measured (on CUDA five times where it is short)."""
    rows, chunk = model.groups(prompt)
    rows = min(rows, batch)
    tokens = torch.randint(model.config.vocab_size, (rows, prompt), device=device)
    model.cache.pos.fill_(prompt)
    call = lambda: model.prefill_rows(tokens, 0, chunk)
    call()  # warm-up: the first of a process takes 0.2 s longer, which `batch` would multiply
    return seconds(call, device, 5 if prompt <= 4096 and device.type == "cuda" else 1) * batch / rows


def step_seconds(model, batch, lengths, device, repeats=9):
    """Seconds of one decode step, of the model's share of flushes included, at each of the lengths."""
    token = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    out = []
    decoder = generate.Decoder(model, token, temperature=0.0)
    for n in lengths:
        if isinstance(model.cache, ExactFullCache):
            forget_graphs(decoder)  # the length is part of them
        at_length(model, n)
        decoder()
        graph = decoder.graphs[len(model.cache.blocks(n + 1, bucket=True))] if device.type == "cuda" else None

        def step():
            model.cache.pos.fill_(n)
            if graph is not None:
                return graph.replay()
            decoder._step(model.cache.blocks(n + 1))

        out.append(seconds(step, device, repeats))
    if isinstance(model.cache, KiviCache):
        model.cache.pos.fill_(model.cache.config.residual)
        model.flush()
        flush = seconds(model.flush, device, 3) / model.cache.config.residual
        out = [t + flush for t in out]
    return out


def integral(lengths, values):
    """Sum of a piecewise linear function over the whole numbers lengths[0] .. lengths[-1] - 1, nearly."""
    return sum((b - a) * (x + y) / 2 for a, b, x, y in zip(lengths, lengths[1:], values, values[1:]))


def matmul_speed(device):
    """Floating-point operations a second of a large product: the other ceiling."""
    n = 8192 if device.type == "cuda" else 512
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed([lambda: x @ y], device, 10)


def sample_batches(top, other, curve):
    """Batches to measure: the largest, that of the other cache, and, for a curve, powers of four below."""
    return sorted({top, *([other, *(4**i for i in range(8))] if curve else [])} & set(range(1, top + 1)))


def shape(args, name):
    config = TINY if name == "tiny" else MODELS[name][0]
    return dataclasses.replace(config, n_layers=args.layers or config.n_layers)


def load(text):
    """(prompt, output) tokens of "prompt/output"."""
    prompt, output = map(int, text.split("/"))
    if min(prompt, output) < 1:
        raise ValueError
    return prompt, output


def cap(device, budget):
    """Lets allocations beyond the budget fail, as on a card of that size. The CUDA context comes on top."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.get_device_properties(device).total_memory))


def throughput(args, device):
    """Tokens a second against the batch, until the budget is full: the paper's Figure 5, and long contexts.

    A row's tokens/s count prefill and decoding of the whole load. Its time is that of one measured group of the prefill times the
    groups, and the measured decode step integrated over 4 lengths; `--verify` runs one batch of each load from end to end beside it.
    """
    bandwidth, flops, budget = copy_bandwidth(device), matmul_speed(device), args.budget_gb * 1e9
    results = args.done.setdefault("rows", [])
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s, matrix product {flops / 1e12:.0f} TFLOP/s, budget {args.budget_gb:g} GB")
    cap(device, budget)
    for name in args.models or MODELS:
        model = random_model(shape(args, name), device)
        weights = weight_bytes(model)
        for prompt, output in args.loads:
            other = {}
            for label in args.caches or REQUESTS:
                kv, options = REQUESTS[label]
                compile_step(model, kv, device)
                top = largest_batch(model, prompt, output, kv, options, budget)
                if not top:
                    say(f"  {name} {prompt}/{output} {label}: not one row fits")
                    continue
                other[label] = top
                lengths = [prompt + round(i * (output - 1) / 3) for i in range(4)]
                batches = list(args.batches or sample_batches(top, other.get("bf16", 0), args.curve))
                while batches:
                    batch = batches.pop(0)
                    r = {"model": name, "prompt": prompt, "output": output, "cache": label, "batch": batch, "largest": batch == top}
                    r["formula_bytes"] = run_bytes(model, batch, prompt, output, kv, options)
                    try:
                        begin = time.perf_counter()
                        start_caches(model, batch, prompt + output, kv, options)
                        r["prefill_s"] = prefill_seconds(model, batch, prompt, device)
                        steps = step_seconds(model, batch, lengths, device)
                        r["step_ms"], r["took_s"] = [1e3 * t for t in steps], time.perf_counter() - begin
                    except torch.OutOfMemoryError as error:
                        r["failed"] = str(error)[:200]
                        say(f"  {name} {prompt}/{output} {label} B={batch}: out of memory")
                        results.append(r)
                        if batch == top > 1:  # the formula was too small: a little less, so that the comparison does not end here
                            top = int(0.95 * batch)
                            batches.append(top)
                        continue
                    r["decode_s"] = integral(lengths, steps) + steps[-1] * (output - 1 - (lengths[-1] - lengths[0]))
                    r["tokens_per_s"] = batch * output / (r["prefill_s"] + r["decode_s"])
                    r["decode_tokens_per_s"] = batch * (output - 1) / r["decode_s"]
                    middle = prompt + output // 2
                    kv_bytes = batch * sum(layer.cache.traffic(middle) for layer in model.layers)
                    r["roofline_ms"] = {"weights": weights / bandwidth * 1e3, "matmul": weights / 2 * 2 * batch / flops * 1e3, "kv": kv_bytes / bandwidth * 1e3}
                    if device.type == "cuda":
                        r["peak_bytes"], r["reserved_bytes"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                    results.append(r)
                    say(f"  {name} {prompt}/{output} {label} B={batch}: {r['tokens_per_s']:.0f} tokens/s, prefill {r['prefill_s']:.1f} s, step "
                        f"{r['step_ms'][0]:.2f} to {r['step_ms'][-1]:.2f} ms, peak {r.get('peak_bytes', 0) / 1e9:.1f} GB of {r['formula_bytes'] / 1e9:.1f} "
                        f"by the formula ({r['took_s']:.0f} s)")
                if args.verify and label == list(args.caches or REQUESTS)[-1] and "failed" not in r:
                    r["verified"] = end_to_end(model, r, kv, options, device)
        del model
        clear(device)
        if args.outside:
            try:
                outside(args, name, results, device)
            except Exception as error:  # another library's, of whatever version
                say(f"  {name}: no more rows of transformers: {' '.join(str(error).split())[:200]}")
    print(f"\n{args.budget_gb:g} GB budget\n\n| model | prompt/output | cache | batch | tokens/s | decoding only | peak, GB | prefill, s | step, ms | roofline, ms: weights, products, KV |"
          "\n|---|---|---|---|---|---|---|---|---|---|")
    for r in results:
        if "failed" not in r:
            floor = ", ".join(f"{r['roofline_ms'][k]:.2f}" for k in ("weights", "matmul", "kv")) if "roofline_ms" in r else "-"
            print(f"| {r['model']} | {r['prompt']}/{r['output']} | {r['cache']} | {r['batch']}{' (largest)' if r['largest'] else ''} | {r['tokens_per_s']:.1f} "
                  f"| {r['decode_tokens_per_s']:.1f} | {r.get('peak_bytes', r['formula_bytes']) / 1e9:.2f} | {r['prefill_s']:.2f} "
                  f"| {statistics.mean(r['step_ms']):.2f} | {floor} |")
    print("\n| model | prompt/output | cache | batch against bf16 | tokens/s | decoding only | peak memory at bf16's largest batch |\n|---|---|---|---|---|---|---|")
    ratios = []
    for r in (r for r in results if r["largest"] and r["cache"] != "bf16" and "failed" not in r):
        same = [x for x in results if "failed" not in x and all(x[k] == r[k] for k in ("model", "prompt", "output"))]
        full = [x for x in same if x["cache"] == "bf16" and x["largest"]]
        if full:
            best = lambda cache, key: max(x[key] for x in same if x["cache"] == cache)
            peak = lambda x: x.get("peak_bytes", x["formula_bytes"])
            at = [x for x in same if x["cache"] == r["cache"] and x["batch"] == full[0]["batch"]]
            ratio = {"batch": r["batch"] / full[0]["batch"], "peak": peak(full[0]) / peak(at[0]) if at else None,
                     **{key: best(r["cache"], key) / best("bf16", key) for key in ("tokens_per_s", "decode_tokens_per_s")}}
            ratios.append({**{k: r[k] for k in ("model", "prompt", "output", "cache")}, **ratio})
            less = "-" if ratio["peak"] is None else f"{ratio['peak']:.2f}× lower"
            print(f"| {r['model']} | {r['prompt']}/{r['output']} | {r['cache']} | {ratio['batch']:.2f}× | {ratio['tokens_per_s']:.2f}× "
                  f"| {ratio['decode_tokens_per_s']:.2f}× | {less} |")
    if args.plot:
        plot(results, Path(args.plot))
    return {"copy_GB/s": bandwidth / 1e9, "matmul_TFLOP/s": flops / 1e12, "budget_GB": args.budget_gb, "rows": results, "ratios": ratios}


def outside(args, name, results, device):
    """Adds rows of transformers' own Llama of that shape to `results`, as its users run it: eager, sdpa, all prompts at once.

    Its QuantizedCache has groups of 32, K per channel (of consecutive tokens, across heads where T is no multiple), V per token; every step dequantizes
    all but the last 0 to 128 tokens, and one in 128 quantizes all anew, which is timed once and spread. As in our rows prefill is run and steps are timed
    at 4 lengths, in caches of random K and V. The largest batch, to a 16th of ours, is what runs within the budget there (a long run would fragment the
    memory as well); on a CPU it is by our formula for as many bits, which is `formula_bytes`.
    """
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, QuantizedCache

    c = shape(args, name)
    with torch.device("meta"):
        ours = Transformer(c).to(torch.bfloat16)
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers, head_dim=c.head_dim,
                         num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_len)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def measured(batch, prompt, lengths, options, repeats=1):
        """(seconds of the prefill, [seconds of a step at each length]); None: out of memory."""
        new = lambda: QuantizedCache(config=config, **options) if options else DynamicCache(config=config)
        step = lambda tokens, cache: model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        try:
            clear(device)
            tokens, steps = torch.randint(c.vocab_size, (batch, prompt), device=device), []
            prefill = [seconds(lambda: step(tokens, new()), device, 1) for _ in range(2 if repeats > 1 and prompt <= 4096 else 1)][-1]  # the first warms up
            for n in lengths:
                cache = new()  # the last one's memory is free from here
                x = torch.randn(batch, c.n_kv_heads, n, c.head_dim, device=device, dtype=torch.bfloat16)
                for layer in range(c.n_layers):
                    for part in x.split([n - 64, 64], 2) if options else [x]:  # half the window is full, as in the mean
                        cache.update(part, part, layer)
                del x, part
                steps.append(seconds(lambda: step(tokens[:, :1], cache), device, repeats))
            if options:
                for layer in cache.layers:
                    layer.residual_length = 1
                again = seconds(lambda: step(tokens[:, :1], cache), device, 1) - steps[-1]
                steps = [t + again / options["residual_length"] for t in steps]
            return prefill, steps
        except torch.OutOfMemoryError:
            return None

    for (label, (kv, options)), (prompt, output) in itertools.product(OUTSIDE.items(), args.loads):
        begin, lengths = time.perf_counter(), [prompt + round(i * (output - 1) / 3) for i in range(4)]
        unit = options["q_group_size"] // math.gcd(options["q_group_size"], c.n_kv_heads) if options else 1  # rows * heads must be groups
        most = largest_batch(ours, prompt, output, kv, {}, args.budget_gb * 1e9) // unit
        grid = unit * max(1, most // 16)
        for batch in args.batches or [grid * generate.largest(most * unit // grid, lambda i: measured(i * grid, prompt, lengths[-1:], options) is not None)]:
            prefill, steps = batch and measured(batch, prompt, lengths, options, 3) or (None, None)
            if steps is None:
                say(f"  {name} {prompt}/{output} {label}: " + (f"out of memory with {batch} rows" if batch else f"not {unit} rows fit"))
                continue
            r = {"model": name, "prompt": prompt, "output": output, "cache": label, "batch": batch, "largest": not args.batches,
                 "formula_bytes": run_bytes(ours, batch, prompt, output, kv, {}), "prefill_s": prefill, "step_ms": [1e3 * t for t in steps],
                 "decode_s": integral(lengths, steps), "took_s": time.perf_counter() - begin}
            r["tokens_per_s"], r["decode_tokens_per_s"] = batch * output / (prefill + r["decode_s"]), batch * (output - 1) / r["decode_s"]
            if device.type == "cuda":
                r["peak_bytes"], r["reserved_bytes"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            results.append(r)
            say(f"  {name} {prompt}/{output} {label} B={batch}: {r['tokens_per_s']:.0f} tokens/s, prefill {prefill:.1f} s, step {r['step_ms'][0]:.2f} to "
                f"{r['step_ms'][-1]:.2f} ms, peak {r.get('peak_bytes', 0) / 1e9:.1f} GB ({r['took_s']:.0f} s)")


def end_to_end(model, r, kv, options, device):
    """One batch of a load, really run: {seconds of prefill and decoding} beside the estimates of row r."""
    for layer in model.layers:
        layer.cache = None
    clear(device)
    model.setup_caches(r["batch"], r["prompt"] + r["output"], kv, **options)
    stats, prompts = {}, torch.randint(model.config.vocab_size, (r["batch"], r["prompt"]), device=device)
    generate.generate(model, prompts, r["output"], stop=(), stats=stats)
    say(f"    end to end: prefill {stats['prefill_s']:.2f} s (estimate {r['prefill_s']:.2f}), decoding {stats['decode_s']:.2f} s (estimate {r['decode_s']:.2f})")
    return stats


def plot(results, prefix):
    """Tokens/s and peak memory against the batch, one PNG a model and load, named after `prefix`."""
    try:
        import matplotlib
    except ImportError:
        return say("no plots: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for key in sorted({(r["model"], r["prompt"], r["output"]) for r in results}):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for cache in dict.fromkeys(r["cache"] for r in results):
            rows = sorted((r for r in results if (r["model"], r["prompt"], r["output"]) == key and r["cache"] == cache and "failed" not in r),
                          key=lambda r: r["batch"])
            for axis, of in zip(axes, (lambda r: r["tokens_per_s"], lambda r: r.get("peak_bytes", r["formula_bytes"]) / 1e9)):
                axis.plot([r["batch"] for r in rows], [of(r) for r in rows], marker="o", label=cache)
        for axis, label in zip(axes, ("tokens/s, prefill included", "peak memory, GB")):
            axis.set(xlabel="batch", ylabel=label, ylim=(0, None))
            axis.legend()
        figure.suptitle(f"{key[0]}, {key[1]} prompt and {key[2]} new tokens")
        figure.savefig(f"{prefix}-{key[0]}-{key[1]}.png", dpi=120)
        pyplot.close(figure)


def memory(args, device):
    """Bytes a token of the caches, by the formula and as allocated, and the peak of whole runs with the weights."""
    table, runs = (args.done.setdefault(key, []) for key in ("bytes_per_token", "runs"))
    on_device = (lambda: (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())) if device.type == "cuda" else None
    for name in args.models or MODELS:
        c = shape(args, name)
        sizes = (c.n_kv_heads, c.head_dim)
        for T in args.lengths:
            full = None
            for label, config in [("bf16", None)] + [(f"{kv} G{G} R{R}", dataclasses.replace(PRESETS[kv], group_size=G, residual=R))
                                                     for kv in ("kivi4", "k4v2", "kivi2") for G in (32, 64, 128) for R in (32, 128) if R >= G]:
                if config is not None and c.head_dim % config.group_size:
                    continue
                cls, options = (FullCache, {}) if config is None else (KiviCache, vars(config))
                formula = (FullCache if config is None else config).bytes(1, sizes[0], T, sizes[1], torch.bfloat16)
                full = full or formula
                row = {"model": name, "tokens": T, "cache": label, "formula": c.n_layers * formula / T, "ratio": full / formula}
                clear(device)
                before = on_device() if on_device else None
                cache = cls(1, sizes[0], T, sizes[1], dtype=torch.bfloat16, device=device, **options)
                row["buffers"] = c.n_layers * cache.nbytes / T
                if on_device:
                    row["allocated"], row["reserved"] = (c.n_layers * (b - a) / T for a, b in zip(before, on_device()))
                del cache
                table.append(row)
    print("\nOne row's cache, bytes a token, all layers (measured on one)\n\n| model | tokens | cache | formula | buffers | allocated | reserved | smaller than bf16 |"
          "\n|---|---|---|---|---|---|---|---|")
    for r in table:
        measured = " | ".join(f"{r[k]:.0f}" if k in r else "-" for k in ("formula", "buffers", "allocated", "reserved"))
        print(f"| {r['model']} | {r['tokens']} | {r['cache']} | {measured} | {r['ratio']:.2f}× |")

    budget = args.budget_gb * 1e9
    cap(device, budget)
    for name in args.models or MODELS:
        model = random_model(shape(args, name), device)
        for prompt, output in [(args.prefill, 64)] if args.prefill else args.loads:
            batch = args.batch
            for label in args.caches or REQUESTS:
                kv, options = REQUESTS[label]
                compile_step(model, kv, device)
                top = largest_batch(model, prompt, output, kv, options, budget)
                batch = batch or (1 if args.prefill else max(1, top))  # that of the first cache, full precision
                r = {"model": name, "prompt": prompt, "output": output, "cache": label, "batch": batch, "largest_batch": top,
                     **model.memory(batch, prompt, prompt + output, kv, **options)}
                r["formula_bytes"] = run_bytes(model, batch, prompt, output, kv, options)
                for layer in model.layers:
                    layer.cache = None
                clear(device)
                try:
                    model.setup_caches(batch, prompt + output, kv, **options)
                    tokens = torch.randint(model.config.vocab_size, (batch, prompt), device=device)
                    start = time.perf_counter()
                    logits = model.prefill(tokens)
                    r["prefill_s"] = time.perf_counter() - start
                    if kv == "bf16":
                        for layer in model.layers:
                            layer.cache.__class__ = ExactFullCache
                    decoder = generate.Decoder(model, logits.argmax(-1)[:, None], temperature=0.0)
                    for n in (prompt, prompt + output - 1):  # the first step, and the last, which reads most
                        at_length(model, n)
                        forget_graphs(decoder)
                        decoder()
                    decoder.token.tolist()
                    if on_device:
                        r["peak_bytes"], r["reserved_bytes"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                except torch.OutOfMemoryError as error:
                    r["failed"] = str(error)[:200]
                decoder = logits = None
                runs.append(r)
                say(f"  {name} {prompt}/{output} {label} B={batch}: " + (r.get("failed") or
                    f"prefill {r['prefill_s']:.1f} s, peak {r.get('peak_bytes', 0) / 1e9:.2f} GB, {r['formula_bytes'] / 1e9:.2f} by the formula"))
        del model
        clear(device)
    print(f"\nWhole runs within {args.budget_gb:g} GB, weights included, at the batch that fits with the first cache\n\n| model | prompt/output | batch | cache | weights | K and V | "
          "activations | formula, GB | peak, GB | reserved, GB | less than the first | largest batch |\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in runs:
        first = next(x for x in runs if all(x[k] == r[k] for k in ("model", "prompt")))
        peak = lambda x: x.get("peak_bytes", x["formula_bytes"])
        r["less"] = None if "failed" in r or "failed" in first else peak(first) / peak(r)
        gb = " | ".join(f"{n / 1e9:.3f}" for n in (r["weights"], r["codes"] + r["metadata"] + r["window"], r["activations"], r["formula_bytes"]))
        measured = " | ".join(f"{r[k] / 1e9:.2f}" if k in r else "failed" if "failed" in r else "-" for k in ("peak_bytes", "reserved_bytes"))
        print(f"| {r['model']} | {r['prompt']}/{r['output']} | {r['batch']} | {r['cache']} | {gb} | {measured} | {r['less'] and round(r['less'], 2)} "
              f"| {r['largest_batch']} |")
    return {"budget_GB": args.budget_gb, "bytes_per_token": table, "runs": runs}


# ---- quality ------------------------------------------------------------------------------------------------------------

QUALITY = {  # what `quality` compares: label -> kv and options of setup_caches; the first is the measure of all others
    "full precision": ("bf16", {}),
    "kivi4": ("kivi4", {}),
    "k4v2": ("k4v2", {}),
    "kivi2+": ("kivi2+", {}),
    "kivi2": ("kivi2", {}),
    "kivi2, R = 32": ("kivi2", {"residual": 32}),
}
NAMES = "apple arrow bell boat book bottle candle chair clock coat coin crown drum flower hammer kettle lamp mirror needle rope".split()
RETRIEVAL = {  # task -> facts hidden in the prompt, a fact, the question that ends it, digits of the answer
    "pass key": (1, "The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key? The pass key is", 5),
    "multi-key": (4, "Key {name}: {key}.", "What is the value of {name}? The value of {name} is", 3),
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Fake:
    """A cache that exists only as numbers, for what kivi.py does not have: other axes, no residual, ideas that did not pay.

    Everything is quantized and dequantized at once, and a mask says which query reads the result and which the exact number:
    the state of a cache depends on its length alone, so this is what the steps one by one would read (test_kivi.py compares).
    axes      "channel" (groups of consecutive tokens of one channel) or "token" (groups of channels of one token)
    residual  values: the last R tokens are exact; keys, and values per channel: the tokens after the last multiple of R. At 0
              what is grouped along tokens still stays exact until its group is complete
    rotated   quantized after a Hadamard rotation of the head's channels; k_norm: each key divided by its norm, which is stored
    pre_rope  keys are quantized before their rotary embedding
    """

    k_bits: int = 2
    v_bits: int = 2
    k_axis: str = "channel"
    v_axis: str = "token"
    group_size: int = 32
    residual: int = 128
    sink: int = 0
    k_shrink: float = 1.0
    v_shrink: float = 1.0
    k_rotated: bool = False
    v_rotated: bool = False
    k_norm: bool = False
    pre_rope: bool = False

    def bits(self, D):
        """Stored bits per element, scale and zero of 16 bits each included."""
        group = lambda axis: self.group_size if axis == "channel" else min(self.group_size, D)
        return (self.k_bits + 32 / group(self.k_axis) + 16 / D * self.k_norm + self.v_bits + 32 / group(self.v_axis)) / 2

    def exact(self, pos, what):
        """[n, T] bool: does the query at pos [n] read token t < T of K ("k") or V ("v") exactly?"""
        axis, R, block = getattr(self, f"{what}_axis"), self.residual, max(self.residual, self.group_size)
        first = pos // block * block  # of a block that is not complete
        if axis == "token" and what == "v":
            first = pos - R
        elif axis == "token" and R == 0:
            first = pos + 1
        t = torch.arange(int(pos[-1]) + 1, device=pos.device)
        return (t >= first[:, None]) | (t < self.sink)

    def quantized(self, x, bits, axis, shrink):
        """x [B, Hk, T, D] as it comes back from `bits` bits."""
        G, T, D = self.group_size, *x.shape[2:]
        if axis == "token":
            codes, scale, zero = group_codes(x.unflatten(-1, (-1, min(G, D))), bits, shrink=shrink)
            return (codes * scale + zero).flatten(-2)
        t = torch.arange(-(-T // G) * G, device=x.device)  # a sink stays out of its group, and so does what is not there yet
        t = torch.maximum(t, (t | G - 1).clamp(max=self.sink)).clamp(max=T - 1)
        codes, scale, zero = group_codes(x[:, :, t].unflatten(2, (-1, G)), bits, dim=3, shrink=shrink)
        return (codes * scale + zero).flatten(2, 3)[:, :, :T]

    def read(self, k, v, rope):
        """K and V [B, Hk, T, D] as attention reads them where they are not exact; rope: cos and sin of all T positions."""
        turn = hadamard(k.shape[-1], k)
        x = rotate(k, rope[0], -rope[1]) if self.pre_rope else k
        norm = x.norm(dim=-1, keepdim=True) if self.k_norm else 1
        x = x / norm @ turn if self.k_rotated else x / norm
        x = self.quantized(x, self.k_bits, self.k_axis, self.k_shrink)
        x = norm * (x @ turn if self.k_rotated else x)
        x = rotate(x, *rope) if self.pre_rope else x
        y = self.quantized(v @ turn if self.v_rotated else v, self.v_bits, self.v_axis, self.v_shrink)
        return x, (y @ turn if self.v_rotated else y)


def hadamard(n, like):
    """The symmetric orthogonal matrix of signs [n, n], n a power of two."""
    h = torch.ones(1, 1, device=like.device, dtype=like.dtype)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


class FakeCache(torch.nn.Module):
    """Stands in for a layer's cache while `decoded` runs many tokens at once."""

    def __init__(self, fake, k, v, rope):
        super().__init__()
        self.fake, self.k, self.v, self.rope = fake, k, v, rope

    def update(self, k, v, pos):
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)

    def attention(self, q, pos, blocks):
        """q [B, H, n, D] at pos [n] -> [B, H, n, D], in float32."""
        f, M = self.fake, q.shape[1] // self.k.shape[1]
        k, v = self.k.float(), self.v.float()
        k_read, v_read = f.read(self.k, self.v, self.rope)
        q = q.unflatten(1, (-1, M)).float()  # [B, Hk, M, n, D]
        scores = torch.where(f.exact(pos, "k"), q @ k[:, :, None].mT, q @ k_read.float()[:, :, None].mT)
        seen = torch.arange(k.shape[2], device=q.device) <= pos[:, None]
        p = (scores * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf).softmax(-1)
        exact = f.exact(pos, "v")
        return (p * exact @ v[:, :, None] + p * ~exact @ v_read.float()[:, :, None]).flatten(1, 2).type_as(self.k)


def prefilled(model, tokens):
    """Exact prefill of tokens [B, L]: (K and V of every layer, [B, Hk, L, D] each; log-probabilities [B, V] of the next token)."""
    model.setup_caches(*tokens.shape, "bf16")
    logits = model.prefill(tokens)
    return [(layer.cache.k[:, :, : tokens.shape[1]], layer.cache.v[:, :, : tokens.shape[1]]) for layer in model.layers], logits


def decoded(model, cache, prompt, tokens):
    """Log-probabilities [B, n + 1, V] of teacher-forced decoding of tokens [B, n] after a prompt from `prefilled`.

    cache  (kv, options): token by token through the real cache; a Fake, or one a layer: simulated, all tokens at once
    """
    (kv, logits), (B, n) = prompt, tokens.shape
    L, device = kv[0][0].shape[2], tokens.device
    if isinstance(cache, tuple):
        model.setup_caches(B, L + n, cache[0], **cache[1])
        first = model.cache
        first.pos.fill_(L)
        first.lengths[:] = [L] * B
        out = [logits]
        for layer, (k, v) in zip(model.layers, kv):
            layer.cache.fill(k, v, first.pos)
        for t in range(n):
            first.advance()
            out.append(model.decode(tokens[:, t : t + 1], first.blocks(first.length)))
            if first.due():
                model.flush()
        return torch.stack(out, 1).float().log_softmax(-1)
    fakes = cache if isinstance(cache, list) else [cache] * len(kv)
    pos, rope = torch.arange(L, L + n, device=device), model.rope(torch.arange(L + n, device=device)[None])
    x, (cos, sin) = model.embed(tokens), model.rope(pos[None])
    for layer, fake, (k, v) in zip(model.layers, fakes, kv):
        layer.cache = FakeCache(fake, k, v, rope)
        x = layer.after(x, layer.cache.attention(layer.before(x, cos, sin, pos), pos, None))
        layer.cache = None
    return torch.cat([logits[:, None], model.head(model.norm(x))], 1).float().log_softmax(-1)


def stored_bits(model, length):
    """Bits per element of K and V with 16-bit numbers, from the buffers: (of what is quantized, of the whole cache at `length` tokens)."""
    size = lambda buffers: sum(8 * b.numel() * (1 if b.dtype == torch.uint8 else 2) for b in buffers)
    caches = [layer.cache for layer in model.layers]
    heads = caches[0].batch * 2 * model.config.n_kv_heads * model.config.head_dim * len(caches)  # elements a token
    whole = size(b for c in caches for b in c.buffers()) / heads / length
    if isinstance(caches[0], FullCache):
        return 16.0, whole
    config, n = caches[0].config, caches[0].max_len
    held = ((config.capacity(n), "packed"), (config.grouped(n), ("scale", "zero")))  # tokens that these buffers hold
    return sum(size(b for c in caches for name, b in c.named_buffers() if name.endswith(parts)) / heads / tokens for tokens, parts in held), whole


def paragraph(tokenizer, text):
    """Tokens of a paragraph inside a text: with the blank line before it, without what a tokenizer puts at a text's start."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    return encode("x\n\n" + text)[len(encode("x")):]


def needles(tokenizer, text, task, length, trials, rng):
    """Prompts that hide facts in a text and ask for one of them: [(prompt, answer, depth)], token lists of `length` together."""
    count, fact, question, digits = RETRIEVAL[task]
    start, story, out = tokenizer.encode("").ids, [paragraph(tokenizer, p) for p in text.split("\n\n") if p.strip()], []
    for depth in DEPTHS * trials:
        names = rng.sample(NAMES, count)
        keys = [rng.randrange(10 ** (digits - 1), 10**digits) for _ in names]
        hidden = [paragraph(tokenizer, fact.format(name=n, key=k)) for n, k in zip(names, keys)]
        ask = paragraph(tokenizer, question.format(name=names[0]))
        answer = paragraph(tokenizer, f"{question.format(name=names[0])} {keys[0]}")[len(ask):]
        room = length - len(start + ask + answer) - sum(map(len, hidden))
        if room < 0:
            raise ValueError(f"a prompt of {length} tokens has no room for the {task} task: use a larger --lengths")
        filler, ends, i = [], [0], rng.randrange(len(story))
        while len(filler) < room:
            filler += story[i % len(story)]
            ends.append(min(len(filler), room))
            i += 1
        places = [depth] + [rng.random() for _ in names[1:]]
        cuts = sorted((min(ends, key=lambda e: abs(e - p * room)), j) for j, p in enumerate(places))
        ids, at = list(start), 0
        for cut, j in cuts:
            ids, at = ids + filler[at:cut] + hidden[j], cut
        out.append((ids + filler[at:room] + ask, answer, depth))
    return out


def text_rows(tokenizer, text, prefill, rows, tokens):
    """[rows, prefill + n] windows of a text that overlap by their prefill, so that no token is scored twice; n <= tokens."""
    start, ids = tokenizer.encode("").ids, tokenizer.encode(text, add_special_tokens=False).ids
    prefill -= len(start)
    n = min(tokens, (len(ids) - prefill) // rows) if rows > 0 else 0
    if n < 1:
        raise ValueError(f"a text of {len(ids)} tokens does not give {rows} rows after a prefill of {prefill}: use fewer --rows")
    return torch.tensor([start + ids[i * n : i * n + prefill + n] for i in range(rows)])


def text_metrics(logp, base, target):
    """logp, base [B, n, V], target [B, n] -> perplexity and the distance of logp to base."""
    kl = torch.stack([(b.exp() * (b - x)).sum(-1) for x, b in zip(logp, base)])
    loss = -logp.gather(-1, target[..., None]).mean().item()
    return {"perplexity": math.exp(loss), "perplexity_ratio": math.exp(loss + base.gather(-1, target[..., None]).mean().item()),
            "kl": kl.mean().item(), "kl_p99": kl.flatten().quantile(0.99).item(),
            "top1": (logp.argmax(-1) == base.argmax(-1)).float().mean().item()}


def tuned(model, bits, measure):
    """(K bits, V bits) of every layer, `bits` in the mean, by greedy search on KL; `measure`: a list of Fakes -> KL.

    Each move doubles the bits of one layer's K or V: the one that lowers KL most per bit. Gains are measured again only
    for the best candidate (they shrink as others are taken), until it stays the best.
    """
    pairs = [[2, 2] for _ in model.layers]
    fakes = lambda pairs: [Fake(*p) for p in pairs]
    now, stale = measure(fakes(pairs)), {(i, j): math.inf for i in range(len(pairs)) for j in (0, 1)}
    budget = round(2 * len(pairs) * (bits - 2))
    tried = {}
    while moves := [m for m in stale if pairs[m[0]][m[1]] <= min(4, budget)]:
        move = max(moves, key=stale.get)
        i, j = move
        if move in tried:  # measured since the last move was made, and still the best
            now, pairs, budget = tried[move], [list(p) for p in pairs], budget - pairs[i][j]
            pairs[i][j] *= 2
            say(f"    layer {i}: K {pairs[i][0]} V {pairs[i][1]}, KL {now:.5f}, {bits - budget / 2 / len(pairs):.3f} bits")
            tried = {}
            continue
        better = [list(p) for p in pairs]
        better[i][j] *= 2
        tried[move] = measure(fakes(better))
        stale[move] = (now - tried[move]) / pairs[i][j]
    return pairs


STUDY = {  # the paper's findings in small, then what was tried beyond the paper
    **{f"K per {k}, V per {v}, R = 0": Fake(k_axis=k, v_axis=v, residual=0) for k in ("channel", "token") for v in ("token", "channel")},
    **{f"K per {k}, V per {v}, R = 128": Fake(k_axis=k, v_axis=v) for k, v in (("channel", "channel"), ("token", "token"), ("token", "channel"))},
    **{f"K per {k}, V per {v}, R = 0, 4 bits": Fake(4, 4, k, v, residual=0) for k in ("channel", "token") for v in ("token", "channel")},
    **{f"2 bits, R = {r}": Fake(residual=r) for r in (32, 64, 128)},
    **{f"2 bits, G = {g}": Fake(group_size=g) for g in (64, 128)},
    **{f"K {k} V {v} bits": Fake(k, v) for k, v in ((2, 4), (4, 2), (4, 4))},
    "sink 4": Fake(sink=4), "sink 32": Fake(sink=32),
    "V shrink 0.8": Fake(v_shrink=0.8), "shrink 0.8": Fake(k_shrink=0.8, v_shrink=0.8), "sink 32, V shrink 0.8": Fake(sink=32, v_shrink=0.8),
    **{f"sink 32, shrink {s}": Fake(sink=32, k_shrink=s, v_shrink=s) for s in (0.95, 0.9, 0.85, 0.8, 0.75)},
    "sink 4, shrink 0.8": Fake(sink=4, k_shrink=0.8, v_shrink=0.8),
    "V rotated": Fake(v_rotated=True),
    "K norm": Fake(k_norm=True), "K norm, K rotated": Fake(k_norm=True, k_rotated=True), "K rotated": Fake(k_rotated=True),
    "pre-RoPE K": Fake(pre_rope=True),
    **{f"kivi2+, {name}": Fake(**{"sink": 32, "k_shrink": 0.8, "v_shrink": 0.8} | change) for name, change in {
        "R = 32": {"residual": 32}, "G = 64": {"group_size": 64}, "4 bits K": {"k_bits": 4}, "V rotated": {"v_rotated": True},
        "K rotated": {"k_rotated": True}, "K norm, K rotated": {"k_norm": True, "k_rotated": True}, "pre-RoPE K": {"pre_rope": True}}.items()},
}


@torch.no_grad()
def quality(args, device):
    """What a cache's bits cost, teacher-forced through the cache after an exact prefill: what decoding really reads."""
    begin, clock = time.perf_counter(), lambda: f"({time.perf_counter() - begin:.0f} s)"
    model, tokenizer = generate.load(args.checkpoint, device, generate.DTYPES[args.dtype], weights=args.weights)
    text = Path(args.text or generate.EMBEDDED / "heldout.txt").read_text(encoding="utf-8")
    caches = {c: QUALITY.get(c, (c, {})) for c in dict.fromkeys([next(iter(QUALITY)), *(args.caches or QUALITY)])}
    rows = text_rows(tokenizer, text, args.prefill, args.rows, args.tokens or 512).to(device)
    prompt = prefilled(model, rows[:, : args.prefill])
    say(f"{len(rows)} rows of {rows.shape[1]} tokens, {args.prefill} of them prefilled {clock()}")
    score = slice(0, len(rows))
    part = lambda s: (([(k[s], v[s]) for k, v in prompt[0]], prompt[1][s]), rows[s, args.prefill : -1], rows[s, args.prefill :])
    if args.tune:  # on the first half of the rows; the table is measured on the other
        half, score = slice(0, len(rows) // 2), slice(len(rows) // 2, len(rows))
        some, given, target = part(half)
        base = decoded(model, ("bf16", {}), some, given)
        pairs = tuned(model, args.tune, lambda fakes: text_metrics(decoded(model, fakes, some, given), base, target)["kl"])
        file = Path(args.tuned or f"kvtuner-{args.tune:g}.yaml")
        file.write_text("".join(f"{i}:\n  nbits_key: {k}\n  nbits_value: {v}\n" for i, (k, v) in enumerate(pairs)), encoding="utf-8")
        say(f"wrote {file} {clock()}")
        caches[f"tuned, {sum(map(sum, pairs)) / 2 / len(pairs):g} bits"] = (f"kvtuner:{file}", {})
    fakes = STUDY if args.study else {}

    some, given, target = part(score)
    lengths, base, results = [n for n in args.lengths if n <= model.config.max_len], None, {}
    done = args.done.setdefault("rows", [])
    for label, cache in {**caches, **fakes}.items():
        logp = decoded(model, cache, some, given)
        base = logp if base is None else base
        done.append(r := {"cache": label, "simulated": label in fakes, **text_metrics(logp, base, target), "retrieval": {}, "answer_loss": {}})
        results[label] = r
        longest = lengths[-1] if lengths else rows.shape[1]
        if label in fakes:
            r["bits"] = cache.bits(model.config.head_dim)
            r["bits_whole"] = r["bits"] + (16 - r["bits"]) * (cache.sink + cache.residual) / longest
        else:  # measured again at every length of the retrieval prompts; the longest stays
            r["bits"], r["bits_whole"] = stored_bits(model, rows.shape[1])
        say(f"  {label}: perplexity {r['perplexity']:.3f}, KL {r['kl']:.4f} {clock()}")

    rng = random.Random(args.seed)
    for length in lengths:
        for task in args.tasks:
            cases = needles(tokenizer, text, task, length, args.trials, rng)
            for i in range(0, len(cases), 8):  # rows of one prefill
                batch = cases[i : i + 8]
                n = max(len(a) for _, a, _ in batch)
                short = min(len(p) for p, _, _ in batch)
                if any(len(p) != short for p, _, _ in batch):  # answers of unequal lengths: the prompts too
                    batch = [(p[:1] + p[1 + len(p) - short :], a, d) for p, a, d in batch]
                # The last token of the question is decoded: the answer's first token must come through the cache as well.
                question = prefilled(model, torch.tensor([p[:-1] for p, _, _ in batch], device=device))
                given_answer = torch.tensor([p[-1:] + a[:-1] + a[-1:] * (n - len(a)) for p, a, _ in batch], device=device)
                for label, cache in {**caches, **fakes}.items():
                    logp = decoded(model, cache, question, given_answer)[:, 1:]
                    if label in caches:
                        results[label]["bits"], results[label]["bits_whole"] = stored_bits(model, short + n)
                    table = results[label]["retrieval"].setdefault(task, {}).setdefault(length, {d: [0, 0] for d in DEPTHS})
                    losses = results[label]["answer_loss"].setdefault(task, {}).setdefault(length, [])
                    for x, (_, a, depth) in zip(logp, batch):
                        table[depth][0] += x[: len(a)].argmax(-1).tolist() == a  # what greedy decoding would have to say
                        table[depth][1] += 1
                        losses.append(-x[: len(a)].gather(-1, torch.tensor(a, device=device)[:, None]).sum().item())
            say(f"  {task} at {length}: " + ", ".join(f"{label} {found(results[label], task, length)}" for label in results) + f" {clock()}")
    for r in results.values():
        r["answer_loss"] = {task: {n: statistics.mean(x) for n, x in by.items()} for task, by in r["answer_loss"].items()}
    columns = [(task, n) for task in args.tasks for n in lengths]
    print("\n| cache | stored bits | whole cache | perplexity | mean KL | 99th percentile | top-1 |" + "".join(f" {t}, {n:,} |" for t, n in columns))
    print("|---" * (7 + len(columns)) + "|")
    for r in results.values():
        print(f"| {r['cache']} | {r['bits']:.2f} | {r['bits_whole']:.2f} | {r['perplexity']:.3f} | {r['kl']:.4f} | {r['kl_p99']:.3f} | {r['top1']:.3f} |"
              + "".join(f" {found(r, t, n)} |" for t, n in columns))
    if args.plot:
        pictures(list(results.values()), Path(args.plot), lengths)
    return {"checkpoint": args.checkpoint or "tiny", "weights": args.weights, "rows_of_text": len(target), "prefill": args.prefill, "scored": target.numel(),
            "seconds": time.perf_counter() - begin, "rows": done}


def found(row, task, length):
    hits, trials = (sum(x) for x in zip(*row["retrieval"][task][length].values()))
    return f"{hits}/{trials}"


def pictures(rows, folder, lengths):
    """Two pictures: retrieval by depth and length, and stored bits against KL."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return say("no pictures: matplotlib is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    for task in rows[0]["retrieval"]:
        shown = [r for r in rows if not r["simulated"]]
        figure, axes = pyplot.subplots(1, len(shown), figsize=(2.4 * len(shown), 2.6), sharey=True, squeeze=False)
        for axis, r in zip(axes[0], shown):
            grid = [[r["retrieval"][task][n][d][0] / r["retrieval"][task][n][d][1] for n in lengths] for d in DEPTHS]
            axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set(title=r["cache"], xlabel="tokens", ylabel="depth", xticks=range(len(lengths)), yticks=range(len(DEPTHS)))
            axis.set_xticklabels(lengths), axis.set_yticklabels(DEPTHS)
        figure.savefig(folder / f"quality-{task.replace(' ', '-')}.png", dpi=150, bbox_inches="tight")
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for r in rows[1:]:
        axis.plot(r["bits"], r["kl"], "o" if r["simulated"] else "s", color="tab:blue" if r["simulated"] else "tab:red")
        axis.annotate(r["cache"], (r["bits"], r["kl"]), fontsize=6, xytext=(4, 2), textcoords="offset points")
    axis.set(xlabel="stored bits per element", ylabel="mean KL to full precision", yscale="log")
    figure.savefig(folder / "quality-bits.png", dpi=150, bbox_inches="tight")
    say(f"pictures in {folder}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--json", metavar="FILE", help="write the result to this file")
    what = p.add_subparsers(dest="what", required=True, metavar="what")

    def command(name):
        c = what.add_parser(name, parents=[common], help=globals()[name].__doc__.splitlines()[0])
        return c.add_argument

    add = command("attention")
    add("--shapes", nargs="+", choices=SHAPES, help="which shapes (default: those of the device)")
    add("--caches", nargs="+", choices=CACHES, help="which caches (default: all)")

    add = command("decode")
    add("--models", nargs="+", choices=[*MODELS, *LARGE], help=f"which models (default: {' '.join(MODELS)})")
    add("--weights", nargs="+", default=["bf16"], help="bf16, int8, int4 or int4:G (default bf16)")
    add("--caches", nargs="+", metavar="KV", help="which caches, as --kv of generate.py (default bf16 kivi2 kivi2+ kivi4)")
    add("--batch", type=int)
    add("--tokens", type=int, help="tokens present")
    add("--capacity", type=int, help="capacity of the cache (default: a little more than the tokens present)")
    add("--layers", type=int, help="fewer layers than the model has")

    for name in ("throughput", "memory"):
        add = command(name)
        add("--models", nargs="+", choices=[*MODELS, "tiny"], help="which models (default: all but tiny)")
        add("--caches", nargs="+", choices=REQUESTS, help="which caches (default: all)")
        add("--layers", type=int, help="fewer layers than the model has")
        add("--loads", nargs="+", type=load, default=[(161, 338), (4096, 256), (32768, 256)], help="prompt/output tokens (default 161/338 4096/256 32768/256)")
        add("--budget-gb", type=float, default=80.0, help="1e9 bytes that a run may take, enforced on CUDA (default 80)")
        if name == "throughput":
            add("--batches", nargs="+", type=int, help="these instead of the largest")
            add("--curve", action="store_true", help="also powers of four below the largest batch, and the largest of full precision")
            add("--verify", action="store_true", help="run the largest batch of the last cache from end to end as well")
            add("--outside", action="store_true", help="also transformers' Llama of that shape with its DynamicCache and its 2-bit QuantizedCache "
                "(where transformers and optimum-quanto are installed)")
            add("--plot", metavar="PREFIX", help="write PREFIX-model-prompt.png (needs matplotlib)")
        else:
            add("--batch", type=int, help="rows of a run (default: the largest batch of the first cache)")
            add("--prefill", type=int, help="one prompt of this length instead of --loads")
            add("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768, 131072], help="tokens of a row")

    add = command("quality")
    add("--checkpoint", help="as in generate.py")
    add("--weights", help="as in generate.py")
    add("--caches", nargs="+", help="names of its table, other names of --kv or kvtuner:FILE")
    add("--text", help="text file (default: a held-out excerpt)")
    add("--rows", type=int, default=8, help="rows of text")
    add("--tokens", type=int, default=512, help="at most scored a row")
    add("--prefill", type=int, default=256, help="tokens of exact prefill")
    add("--lengths", type=int, nargs="*", default=[1024, 2048, 4096], help="tokens of the retrieval prompts")
    add("--trials", type=int, default=2, help="prompts a length and depth")
    add("--tasks", nargs="*", choices=RETRIEVAL, default=list(RETRIEVAL), help="retrieval tasks")
    add("--seed", type=int, default=0, help="of the retrieval prompts")
    add("--study", action="store_true", help="also simulate the paper's variants and the ideas beyond it")
    add("--tune", type=float, metavar="BITS", help="search bits a layer, BITS in the mean, and write them for --kv kvtuner:FILE")
    add("--tuned", metavar="FILE", help="where --tune writes (default kvtuner-BITS.yaml)")
    add("--plot", metavar="DIR", help="draw the results (needs matplotlib)")
    add("--dtype", choices=generate.DTYPES, default="float32", help="of the model")
    args, result = p.parse_args(argv), {}
    args.done = {}  # the rows so far
    try:
        try:
            device = torch.device(args.device)
            if generate.processes() > 1:
                device = generate.join(device, args)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if args.what == "decode" and device.type != "cuda":
            raise ValueError("decode measures CUDA graphs: it needs --device cuda")
        if args.json:
            open(args.json, "ab").close()  # what cannot be written should be known before hours of measuring
        torch.manual_seed(0)
        result = {"what": args.what, **machine(device)}
        with torch.no_grad():
            result |= globals()[args.what](args, device)
    except KeyboardInterrupt:
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.SIG_IGN)  # `timeout` sends two
        result |= {**args.done, "unfinished": True}
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    result |= {"processes": generate.processes()} if generate.processes() > 1 else {}
    if args.json and int(os.environ.get("RANK", 0)) == 0 and (any(args.done.values()) or "unfinished" not in result):  # what is there may be better
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    generate.leave()
    if "unfinished" in result:
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of `timeout`, as Ctrl-C
    main()
