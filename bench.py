"""Measurements. Every time stands beside its ceiling (bytes over the measured copy bandwidth) and its error.

    python bench.py attention        one layer's decode attention: SDPA, FlexAttention, FullCache, kivi4, kivi2
    python bench.py decode           a whole decode step of Llama-2-7B and Llama-3.1-8B shapes, random weights
    python bench.py quality          perplexity through the cache, teacher-forced, on the embedded checkpoint

Times are medians of CUDA-graph replays over enough caches to exceed the L2 (wall-clock medians on a CPU). The last line of
stdout is one JSON object; --json FILE writes it.
"""
import argparse
import json
import math
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F

import generate
from kivi import PRESETS, FullCache, KiviCache, KVConfig, compiled_attention
from model import ModelConfig, Transformer

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
    "kivi2 G64": KVConfig(2, 2, 64, 128),
    "kivi2 G128": KVConfig(2, 2, 128, 128),
    "kivi4": PRESETS["kivi4"],
}
MODELS = {
    "llama-2-7b": (ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 1 << 17), 16, 8192),
    "llama-3.1-8b": (ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 1 << 17, rope_theta=500000.0), 32, 16384),
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
    stream = torch.cuda.Stream()
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
    from torch.nn.attention.flex_attention import flex_attention

    dtype, results = torch.bfloat16, []
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
            rows[label] = {"shape": name, "form": label, "us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9, "bytes": nbytes,
                           "floor_us": nbytes / bandwidth * 1e6, "error": error}
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
        results += rows.values()
        del k, v, ref
        torch.compiler.reset()
    print(f"\ncopy bandwidth {bandwidth / 1e9:.0f} GB/s\n\n| shape (B, H, Hk, T, D) | form | us | GB/s | of its floor | against best bf16 | error |\n|---|---|---|---|---|---|---|")
    for r in results:
        print(f"| {r['shape']} {SHAPES[r['shape']]} | {r['form']} | {r['us']:.1f} | {r['GB/s']:.0f} | {100 * r['floor_us'] / r['us']:.0f} % "
              f"| {r['ratio']:.2f} | {r['error']:.1e} |")
    return {"copy_GB/s": bandwidth / 1e9, "rows": results}


class ExactFullCache(FullCache):
    """The strongest baseline: attention over exactly the tokens present in all rows, without a mask (flash attention)."""

    tokens = 0

    def attention(self, q, pos, blocks):
        n = self.tokens
        k, v = self.k[:, :, :n], self.v[:, :, :n]
        return F.scaled_dot_product_attention(q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]), k, v).reshape(q.shape)


def random_model(config, device):
    with torch.device("meta"):
        model = Transformer(config)
    model.to(torch.bfloat16).to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(1)
    freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    model.register_buffer("freq", freq, persistent=False)
    return model.eval().requires_grad_(False)


def decode(args, device):
    bandwidth, results = copy_bandwidth(device), []
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    for name in args.models or MODELS:
        config, B, T = MODELS[name]
        B, T = args.batch or B, args.tokens or T
        if args.layers:
            config.n_layers = args.layers
        model = random_model(config, device)
        weights = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("embed"))
        k, v = random_kv(B, config.n_kv_heads, T, config.head_dim, device, torch.bfloat16)
        for kv in args.caches or ["bf16", "kivi2", "kivi4"]:
            torch.compiler.reset()
            for layer in model.layers:
                layer.cache = None
            torch.cuda.empty_cache()
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
            kv_bytes = sum(layer.cache.nbytes for layer in model.layers) if capacity <= T + 256 else None
            floor = (weights + (kv_bytes or 0)) / bandwidth * 1e3
            results.append({"model": name, "batch": B, "tokens": T, "capacity": capacity, "kv": kv, "ms": ms, "tokens_per_s": B / ms * 1e3,
                            "weights": weights, "kv_bytes": kv_bytes, "floor_ms": floor, "first_step_s": cold,
                            "peak_GB": torch.cuda.max_memory_allocated() / 1e9})
            say(f"  {name} B={B} T={T} {kv}: {ms:.2f} ms, {B / ms * 1e3:.0f} tokens/s, {100 * floor / ms:.0f} % of its roofline, first step {cold:.0f} s")
        del model, k, v, layer, decoder, graph
        torch.cuda.empty_cache()
    print("\n| model | B | T | cache | ms | tokens/s | of its roofline | against bf16 | first step, s |\n|---|---|---|---|---|---|---|---|---|")
    for r in results:
        base = [x["ms"] for x in results if x["kv"] == "bf16" and x["model"] == r["model"]]
        r["ratio"] = base[0] / r["ms"] if base else None
        print(f"| {r['model']} | {r['batch']} | {r['tokens']} | {r['kv']} | {r['ms']:.2f} | {r['tokens_per_s']:.0f} | {100 * r['floor_ms'] / r['ms']:.0f} % "
              f"| {r['ratio'] and round(r['ratio'], 2)} | {r['first_step_s']:.0f} |")
    return {"copy_GB/s": bandwidth / 1e9, "rows": results}


@torch.no_grad()
def quality(args, device):
    """Perplexity of a text, teacher-forced through the cache after a full-precision prefill: what decoding really reads."""
    model, tokenizer = generate.load(args.checkpoint, device, torch.float32)
    text = Path(args.text or generate.EMBEDDED / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text).ids[: args.tokens or 2048], device=device)[None]
    n = min(args.prefill, ids.shape[1] // 2)
    results, base = [], None
    for kv, options in (("bf16", {}), ("kivi4", {}), ("k4v2", {}), ("kivi2", {}), ("kivi2", {"residual": 32})):
        start = time.perf_counter()
        model.setup_caches(1, ids.shape[1], kv, **options)
        logits = [model.prefill(ids[:, :n])]
        for t in range(n, ids.shape[1] - 1):
            model.cache.advance()
            logits.append(model.decode(ids[:, t : t + 1], model.cache.blocks(model.cache.length)))
            if model.cache.due():
                model.flush()
        logp = torch.cat(logits).log_softmax(-1)
        base = logp if base is None else base
        nll = -logp.gather(1, ids[0, n:, None]).mean().item()
        kl = (base.exp() * (base - logp)).sum(-1)
        row = {"kv": kv, **options, "tokens": len(logp), "prefill": n, "perplexity": math.exp(nll), "kl": kl.mean().item(),
               "kl_p99": kl.quantile(0.99).item(), "top1": (logp.argmax(-1) == base.argmax(-1)).float().mean().item(),
               "bytes": sum(layer.cache.nbytes for layer in model.layers)}
        results.append(row)
        say(f"  {kv} {options or ''}: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f} ({time.perf_counter() - start:.0f} s)")
    print("\n| cache | perplexity | mean KL | 99th percentile KL | top-1 agreement | bytes |\n|---|---|---|---|---|---|")
    for r in results:
        label = r["kv"] + (f", R = {r['residual']}" if "residual" in r else "")
        print(f"| {label} | {r['perplexity']:.3f} | {r['kl']:.4f} | {r['kl_p99']:.3f} | {r['top1']:.3f} | {r['bytes']} |")
    return {"rows": results}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("attention", "decode", "quality"))
    p.add_argument("--shapes", nargs="+", choices=SHAPES, help="attention: which shapes")
    p.add_argument("--caches", nargs="+", help="attention, decode: which caches")
    p.add_argument("--models", nargs="+", choices=MODELS, help="decode: which models")
    p.add_argument("--batch", type=int)
    p.add_argument("--tokens", type=int, help="tokens present (decode), tokens scored (quality)")
    p.add_argument("--capacity", type=int, help="decode: capacity of the cache (default: a little more than the tokens present)")
    p.add_argument("--layers", type=int, help="decode: fewer layers than the model has")
    p.add_argument("--prefill", type=int, default=256, help="quality: tokens of exact prefill")
    p.add_argument("--checkpoint", help="quality: as in generate.py")
    p.add_argument("--text", help="quality: text file (default: a held-out excerpt)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", help="write the result to this file")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    with torch.no_grad():
        result = {"what": args.what, **machine(device), **globals()[args.what](args, device)}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
