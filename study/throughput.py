"""Tokens a second against the batch, until a memory budget is full: the paper's Figure 5, and long
contexts. Random weights.

A row's tokens/s count the prefill and the decoding of its whole load. Prefill runs in groups of
rows: one group is timed, and counted as often as the batch holds it. A decode step is timed at
four lengths, and integrated over all of them.
"""
import itertools
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch

from kivi import KiviCache
from program.memory import SAFE, kv_read, largest, needs, weights_read
from study.measure import clock, copy_bandwidth, print_table, say
from study.models import (
    LARGE, MODELS, clear, compile_step, random_caches, random_model, step_seconds,
)

REQUESTS = {  # caches of many rows, as arguments of setup_caches
    "bf16": {"kv": "bf16"},
    "kivi2 R32": {"kv": "kivi2", "residual": 32},
    "kivi2 R128": {"kv": "kivi2"},
    "kivi2+": {"kv": "kivi2+"},
}
LOADS = ["161/338", "4096/256", "32768/256"]


class Load(NamedTuple):
    """Tokens of a prompt, and new tokens after it."""

    prompt: int
    output: int


def load(text):
    """The Load of "prompt/output". raises ValueError: not two numbers, or nothing to decode"""
    prompt, output = map(int, text.split("/"))
    if prompt < 1 or output < 2:
        raise ValueError
    return Load(prompt, output)


def add_arguments(add):
    add("--models", nargs="+", choices=[*LARGE, "tiny"], default=LARGE,
        help="which models (default: all but tiny)")
    add("--caches", nargs="+", choices=REQUESTS, default=list(REQUESTS),
        help="which caches (default: all)")
    add("--layers", type=int, help="fewer layers than the model has")
    add("--loads", nargs="+", type=load, default=[load(text) for text in LOADS],
        help=f"prompt/output tokens (default {' '.join(LOADS)})")
    add("--budget-gb", type=float, default=80.0,
        help="1e9 bytes that a run may take, enforced on CUDA (default 80)")
    add("--batches", nargs="+", type=int, help="these instead of the largest")


def throughput(results, device, models, caches, layers, loads, budget_gb, batches):
    """tokens/s against the batch within --budget-gb, random weights (CUDA, or --models tiny)"""
    copy_bandwidth(results, device)
    limit_memory(results, device, budget_gb)
    for name in models:
        clear()
        model = random_model(MODELS[name], device, layers)
        for load, label in itertools.product(loads, caches):
            compile_step(model, REQUESTS[label]["kv"])  # which needs less memory
            most = SAFE * budget_gb * 1e9
            top = largest(2**16, lambda rows: run_bytes(model, rows, load, label) <= most)
            for batch in batches or [top]:
                add_row(results, model, name, load, label, batch, batch == top)
        del model
    rows = [row for row in results.rows() if "failed" not in row]
    print_table(
        "model | prompt/output | cache | batch | tokens/s | decoding only | peak, GB | "
        "prefill, s | step, ms | roofline, ms: weights, KV",
        [f"{row['model']} | {row['prompt']}/{row['output']} | {row['cache']} | "
         f"{row['batch']}{' (largest)' if row['largest'] else ''} | {row['tokens_per_s']:.1f} | "
         f"{row['decode_tokens_per_s']:.1f} | "
         f"{row.get('peak_bytes', row['formula_bytes']) / 1e9:.2f} | {row['prefill_s']:.2f} | "
         f"{statistics.mean(row['step_ms']):.2f} | "
         f"{', '.join(f'{ms:.2f}' for ms in row['roofline_ms'].values())}" for row in rows])
    print_ratios(results, rows)


def limit_memory(results, device, budget_gb):
    """Lets allocations beyond the budget fail, as on a card of that size (and its CUDA context)."""
    results.data["budget_GB"] = budget_gb
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))


def run_bytes(model, batch, load, label):
    """Bytes of a run, by the formula."""
    return sum(needs(model, batch, load.prompt, sum(load), **REQUESTS[label]).values())


def add_row(results, model, name, load, label, batch, is_largest):
    """Measures a batch; one more where the largest by the formula was too large."""
    row = {"model": name, **load._asdict(), "cache": label, "batch": batch,
           "largest": is_largest, "formula_bytes": run_bytes(model, batch, load, label)}
    row |= run(model, batch, load, label) if batch else {"failed": "not one row fits"}
    if "failed" not in row:
        bandwidth = results.data["copy_GB/s"] * 1e6  # bytes a millisecond
        kv = batch * kv_read(model, load.prompt + load.output // 2)
        row["roofline_ms"] = {"weights": weights_read(model) / bandwidth, "kv": kv / bandwidth}
    results.add(row)
    say(f"  {name} {load.prompt}/{load.output} {label} B={batch}: {row.get('failed') or told(row)}")
    if "failed" in row and is_largest and batch > 1:
        add_row(results, model, name, load, label, int(0.95 * batch), True)


def run(model, batch, load, label):
    """Times and peak memory of a batch of a load as a row notes them."""
    begin = time.perf_counter()
    compile_step(model, REQUESTS[label]["kv"], prefill=True)
    # The first step, the last, and two between them.
    lengths = [load.prompt + round(i * (load.output - 1) / 3) for i in range(4)]
    try:
        random_caches(model, batch, sum(load), **REQUESTS[label])
        prefill = prefill_seconds(model, batch, load.prompt)
        steps = decode_seconds(model, lengths)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error)[:200]}"}
    decode = torch.trapezoid(torch.tensor(steps), torch.tensor(lengths)).item()
    times = {
        "prefill_s": prefill,
        "step_ms": [1e3 * step for step in steps],
        "decode_s": decode,
        "tokens_per_s": batch * load.output / (prefill + decode),
        "decode_tokens_per_s": batch * (load.output - 1) / decode,
        "took_s": time.perf_counter() - begin,
    }
    if model.embed.weight.is_cuda:
        times["peak_bytes"] = torch.cuda.max_memory_allocated()
        times["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return times


def prefill_seconds(model, batch, prompt):
    """Seconds of a prefill of `batch` rows, from its first group of rows."""
    rows, chunk = model.groups(prompt)
    rows = min(rows, batch)
    device = model.cache.pos.device
    tokens = torch.randint(model.config.vocab_size, (rows, prompt), device=device)
    group = partial(model.extend_rows, tokens, [prompt] * rows, 0, chunk)
    group()  # the first of a process takes 0.2 s longer, and counts as often as there are groups
    return clock(group, 5 if prompt <= 4096 else 1) * batch / rows


def decode_seconds(model, lengths):
    """Seconds of a decode step at each of the lengths, with its share of quantizing the keys."""
    steps = [step_seconds(model, n, 9)[0] for n in lengths]
    if isinstance(model.cache, KiviCache):
        residual = model.cache.config.residual
        model.cache.pos.fill_(residual)  # every row has completed a block
        model.flush()
        flush = clock(model.flush, 3) / residual
        steps = [step + flush for step in steps]
    return steps


def told(row):
    return (f"{row['tokens_per_s']:.0f} tokens/s, prefill {row['prefill_s']:.1f} s, "
            f"step {row['step_ms'][0]:.2f} to {row['step_ms'][-1]:.2f} ms, "
            f"peak {row.get('peak_bytes', 0) / 1e9:.1f} GB of {row['formula_bytes'] / 1e9:.1f} "
            f"by the formula ({row['took_s']:.0f} s)")


def print_ratios(results, rows):
    """What every cache gains over full precision, at the largest batch of each."""
    ratios = results.data["ratios"] = []
    largest = [row for row in rows if row["largest"]]
    for full, row in itertools.product(largest, largest):
        same = {key: row[key] for key in ("model", "prompt", "output", "largest")}
        if full["cache"] == "bf16" != row["cache"] and same.items() <= full.items():
            gains = {key: row[key] / full[key]
                     for key in ("batch", "tokens_per_s", "decode_tokens_per_s")}
            ratios.append(same | {"cache": row["cache"], **gains})
    print_table(
        "model | prompt/output | cache | batch against bf16 | tokens/s | decoding only",
        [f"{row['model']} | {row['prompt']}/{row['output']} | {row['cache']} | "
         f"{row['batch']:.2f}× | {row['tokens_per_s']:.2f}× | {row['decode_tokens_per_s']:.2f}×"
         for row in ratios])
