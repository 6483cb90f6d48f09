"""Measurements. Every time stands beside its ceiling: bytes over the measured copy bandwidth.

    python bench.py attention      one layer's decode attention: the library's best, and the caches
    python bench.py decode         a whole decode step: Llama shapes, or a --checkpoint
    python bench.py throughput     tokens/s against the batch within --budget-gb, random weights
    python bench.py memory         bytes a token of KIVI's caches, by the formula (others: quality)
    python bench.py quality        perplexity, KL, greedy choices and answers through the cache

decode and throughput need CUDA, and refuse another machine at once; only throughput --models tiny
runs on a CPU, to test the program. Times are medians of CUDA-graph replays over enough caches to
exceed the L2; on a CPU, medians by the clock. The last line of stdout is one JSON object. --json
FILE writes it too: after Ctrl-C or SIGTERM, what has been measured until then.
"""
from program import console

if __name__ == "__main__":
    console.begin()

import argparse
import itertools
import json
import math
import signal
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from fused.attention import compiled_attention
from generate import load
from kivi import PRESETS, FullCache, KiviCache, KVConfig
from program.cli import usable_device
from program.memory import kv_read, weights_read
from program.parallel import rank
from study import memory, quality, throughput
from study.measure import (
    Results, add_ratios, clock_calls, copy_bandwidth, print_table, say,
)
from study.models import (
    LARGE, MODELS, clear, compile_step, library_attention, random_caches, random_model,
    step_seconds,
)

SHAPES = {  # name -> batch, heads, KV heads, tokens, head_dim
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
CONFIGS = {
    "kivi2": PRESETS["kivi2"],
    "kivi2+": PRESETS["kivi2+"],
    "kivi2-": PRESETS["kivi2-"],
    "kivi2 G64": KVConfig(group_size=64),
    "kivi2 G128": KVConfig(group_size=128),
    "kivi4": PRESETS["kivi4"],
}
STEPS = {  # model -> rows and tokens of a decode step
    "llama-2-7b": (16, 8192),
    "llama-3.1-8b": (32, 16384),
    "llama-3.1-70b": (16, 8192),
}


# ---- one attention ------------------------------------------------------------------------------


def add_attention_arguments(add):
    add("--shapes", nargs="+", choices=SHAPES, help="which shapes (default: those of the device)")
    add("--caches", nargs="+", choices=CONFIGS, default=list(CONFIGS),
        help="which packed caches (default: all)")


def attention(results, device, shapes, caches):
    """one layer's decode attention: the library's best, and the caches"""
    bandwidth = copy_bandwidth(results, device)
    on_cpu = device.type == "cpu"
    for shape in shapes or [name for name in SHAPES if name.startswith("cpu") == on_cpu]:
        batch, n_heads, n_kv_heads, length, head_dim = SHAPES[shape]
        kind = {"dtype": torch.bfloat16, "device": device}
        q = torch.randn(batch, n_heads, 1, head_dim, **kind)
        k, v = torch.randn(2, batch, n_kv_heads, length, head_dim, **kind)
        k[..., torch.randperm(head_dim)[:4]] *= 20  # some channels are large, as in real keys
        for form, start in forms(device, caches).items():
            clear()
            try:
                seconds, n_bytes, error = time_form(start, q, k, v)
            except Exception as failure:  # one form must not end the table
                say(f"  {shape:9} {form:20} failed: {type(failure).__name__}: {failure!s:.300}")
                continue
            floor = n_bytes / bandwidth
            results.add({"shape": shape, "form": form, "us": seconds * 1e6, "bytes": n_bytes,
                         "GB/s": n_bytes / seconds / 1e9, "floor_us": floor * 1e6, "error": error})
            say(f"  {shape:9} {form:20} {seconds * 1e6:9.1f} us, {floor / seconds:6.1%} of its "
                f"floor, error {error:.1e}")
    rows = results.rows()
    add_ratios(rows, "us", "shape", lambda row: row["form"] not in CONFIGS)
    print_table(
        "shape (B, H, Hk, T, D) | form | us | GB/s | of its floor | against best bf16 | error",
        [f"{row['shape']} {SHAPES[row['shape']]} | {row['form']} | {row['us']:.1f} | "
         f"{row['GB/s']:.0f} | {100 * row['floor_us'] / row['us']:.0f} % | "
         f"{row['ratio'] or math.nan:.2f} | {row['error']:.1e}" for row in rows])


def forms(device, caches):
    """The rows of the table: name -> function of q, k, v, see `over_tensors` and `over_cache`."""
    attend = compiled_attention(device)
    return {
        "SDPA, heads as rows": partial(over_tensors, heads_as_rows),
        "SDPA, enable_gqa": partial(over_tensors, library_attention),
        "FullCache, masked": partial(over_cache, attend, FullCache, 0),  # what --kv bf16 runs
        **{name: partial(over_cache, attend, partial(KiviCache, **vars(CONFIGS[name])), 256)
           for name in caches},
    }


def heads_as_rows(q, k, v):
    """The library's attention, with the query heads of a KV head as the rows of one product."""
    rows = q.view(*k.shape[:2], -1, k.shape[3])
    return F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)


def over_tensors(run, q, k, v):
    """The library's attention: (a call over a copy of K and V, bytes it reads, what it reads)."""
    return partial(run, q, k.clone(), v.clone()), k.nbytes + v.nbytes, (k, v)


def over_cache(attend, make, room, q, k, v):
    """The same of a new cache that holds K and V. room: for so many tokens more"""
    batch, n_kv_heads, length, head_dim = k.shape
    cache = make(batch, n_kv_heads, length + room, head_dim, dtype=k.dtype, device=k.device)
    cache.prefill(k, v)
    call = partial(attend, cache, q, cache.pos - 1, cache.tokens(length))
    return call, cache.nbytes, cache.dequantized()


def time_form(start, q, k, v):
    """(seconds of a call, bytes that it reads, its error)."""
    torch.compiler.reset()  # or what differs from the form before would become a variable
    call, n_bytes, read = start(q, k, v)
    expected = heads_as_rows(*(x.float() for x in (q, *read)))
    error = (call().float() - expected).norm() / expected.norm()
    n_calls = math.ceil(2e8 / n_bytes) if q.is_cuda else 1  # together more than the L2 holds
    calls = [call] + [start(q, k, v)[0] for _ in range(n_calls - 1)]
    return clock_calls(calls, q.device), n_bytes, error.item()


# ---- a decode step ------------------------------------------------------------------------------


def add_decode_arguments(add):
    add("--models", nargs="+", choices=STEPS, default=LARGE,
        help=f"which models (default: {' '.join(LARGE)})")
    add("--checkpoint", help="a model with weights in place of these, as in generate.py")
    add("--weights", nargs="+", default=["bf16"], help="bf16, int8, int4 or int4:G (default bf16)")
    add("--caches", nargs="+", metavar="KV", default=["bf16", "kivi2", "kivi2+", "kivi4"],
        help="which caches, as --kv of generate.py (default bf16 kivi2 kivi2+ kivi4)")
    add("--batch", type=int, help="rows")
    add("--tokens", type=int, help="tokens present")
    add("--capacity", type=int,
        help="capacity of the cache (default: a little more than the tokens present)")
    add("--layers", type=int, help="fewer layers than the model has")


def decode(results, device, models, checkpoint, weights, caches, batch, tokens, capacity, layers):
    """a whole decode step, of Llama shapes with random weights or a checkpoint (needs CUDA)"""
    if checkpoint and layers:
        raise ValueError("a --checkpoint runs with all its layers: leave out --layers")
    bandwidth = copy_bandwidth(results, device)
    for name, form in itertools.product([checkpoint] if checkpoint else models, weights):
        clear()
        if checkpoint:
            given = None if form == "bf16" else form
            model, _ = load(checkpoint, device, torch.bfloat16, weights=given)
            form = "as stored" if model.config.weights and not given else form
        else:
            model = random_model(MODELS[name], device, layers, form)
        for kv in caches:
            model.kv_configs(kv)  # what is wrong with one should be known before all is measured
        rows, present = STEPS.get(name, (1, model.config.max_len - 256))
        rows, present = batch or rows, tokens or present
        for kv in caches:
            row = {"model": Path(name).name, "batch": rows, "tokens": present,
                   "capacity": capacity or present + 256, "form": form, "kv": kv}
            try:
                results.add(row | step_of(model, row, bandwidth))
            except Exception as failure:  # one cache must not end the table
                say(f"  {name} {kv} failed: {type(failure).__name__}: {failure!s:.300}")
        del model
    rows = results.rows()
    if not rows:
        raise ValueError("no step could be measured: what failed is said above")
    add_ratios(rows, "ms", "model", lambda row: row["kv"] == row["form"] == "bf16")
    print_table(
        "model | B | T | weights | cache | ms | tokens/s | of its roofline | against bf16 | "
        "peak, GB | first step, s",
        [f"{row['model']} | {row['batch']} | {row['tokens']} | {row['form']} | {row['kv']} | "
         f"{row['ms']:.2f} | {row['tokens_per_s']:.0f} | "
         f"{100 * row['floor_ms'] / row['ms']:.0f} % | {row['ratio'] or math.nan:.2f} | "
         f"{row['peak_GB']:.1f} | {row['first_step_s']:.0f}" for row in rows])


def step_of(model, row, bandwidth):
    """What is measured of a step: to be added to its row."""
    random_caches(model, row["batch"], row["capacity"], row["kv"])
    compile_step(model, row["kv"])
    seconds, first = step_seconds(model, row["tokens"] - 1, 20)
    weights, kv_bytes = weights_read(model), row["batch"] * kv_read(model, row["tokens"])
    floor = (weights + kv_bytes) / bandwidth
    say(f"  {row['model']} B={row['batch']} T={row['tokens']} weights {row['form']} {row['kv']}: "
        f"{1e3 * seconds:.2f} ms, {row['batch'] / seconds:.0f} tokens/s, {floor / seconds:.0%} of "
        f"its roofline, first step {first:.0f} s")
    return {"first_step_s": first, "ms": 1e3 * seconds, "tokens_per_s": row["batch"] / seconds,
            "weights": weights, "kv_bytes": kv_bytes, "floor_ms": 1e3 * floor,
            "peak_GB": torch.cuda.max_memory_allocated() / 1e9}


# ---- the program --------------------------------------------------------------------------------

COMMANDS = {
    "attention": (attention, add_attention_arguments),
    "decode": (decode, add_decode_arguments),
    "throughput": (throughput.throughput, throughput.add_arguments),
    "memory": (memory.memory, memory.add_arguments),
    "quality": (quality.quality, quality.add_arguments),
}


def parse(argv):
    """The values of the command line, by name."""
    parser = console.Parser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.type = str  # else an empty value is refused under the command's name
    for name, (run, add_arguments) in COMMANDS.items():
        add = commands.add_parser(name, help=run.__doc__, description=run.__doc__).add_argument
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        add("--json", metavar="FILE", help="write the result to this file")
        add_arguments(add)
    return vars(parser.parse_args(argv))


@torch.no_grad()
def measure(argv):
    """Runs a command and writes what it measured, also where it is interrupted."""
    options = parse(argv)
    command, device, file = (options.pop(name) for name in ("command", "device", "json"))
    device = usable_device(device)
    tested = command == "throughput" and options["models"] == ["tiny"]
    if command in ("decode", "throughput") and device.type != "cuda" and not tested:
        raise ValueError(f"{command} measures CUDA graphs: it needs --device cuda")
    if file:
        console.check_writable(file)  # before hours of measuring
    torch.manual_seed(0)
    results = Results(command, device)
    unfinished = False
    try:
        COMMANDS[command][0](results, device, **options)
    except KeyboardInterrupt:
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.SIG_IGN)  # `timeout` sends two
        unfinished = results.data["unfinished"] = True
    if file and rank() == 0 and (results.rows() or not unfinished):
        results.write(file)
    print(json.dumps(results.data))
    if unfinished:
        raise KeyboardInterrupt


def main(argv=None):
    console.guarded(measure, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of `timeout`, as Ctrl-C
    main()
