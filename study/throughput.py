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

import torch

from generate import Decoder
from kivi import KiviCache
from study.measure import clock, copy_bandwidth, peak_memory, print_table, say
from study.models import (
    REQUESTS, add_load_arguments, clear, compile_step, largest_batch, limit_memory, model_config,
    random_caches, random_model, run_bytes, step_bytes, step_seconds,
)


def add_arguments(add):
    add_load_arguments(add)
    add("--batches", nargs="+", type=int, help="these instead of the largest")
    add("--curve", action="store_true", help="also powers of four below the largest batch")


def throughput(results, device, models, caches, layers, loads, budget_gb, batches, curve):
    """tokens/s against the batch within --budget-gb, random weights (CUDA, or --models tiny)"""
    copy_bandwidth(results, device)
    limit_memory(results, device, budget_gb)
    for name in models:
        clear(device)
        model = random_model(model_config(name, layers), device)
        for load, label in itertools.product(loads, caches):
            compile_step(model, REQUESTS[label]["kv"])  # which needs less memory
            top = largest_batch(model, load, label, budget_gb)
            powers = [4**i for i in range(8) if curve and 4**i < top]
            for batch in batches or [*powers, top]:
                add_row(results, model, name, load, label, batch, batch == top)
        del model
    rows = [row for row in results.rows() if "failed" not in row]
    print_rows(rows)
    print_ratios(results, rows)


def add_row(results, model, name, load, label, batch, largest):
    """Measures a batch; one more where the largest by the formula was too large."""
    row = {"model": name, **load._asdict(), "cache": label, "batch": batch, "largest": largest}
    row["formula_bytes"] = run_bytes(model, batch, load, label)["formula_bytes"]
    row |= run(model, batch, load, label) if batch else {"failed": "not one row fits"}
    if "failed" not in row:
        weights, kv = step_bytes(model, batch, load.prompt + load.output // 2)
        bandwidth = results.data["copy_GB/s"] * 1e6  # bytes a millisecond
        row["roofline_ms"] = {"weights": weights / bandwidth, "kv": kv / bandwidth}
    results.add(row)
    say(f"  {name} {load.prompt}/{load.output} {label} B={batch}: {row.get('failed') or told(row)}")
    if "failed" in row and largest and batch > 1:
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
        steps = decode_seconds(model, batch, lengths)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error)[:200]}"}
    decode = torch.trapezoid(torch.tensor(steps), torch.tensor(lengths)).item()
    return {
        "prefill_s": prefill,
        "step_ms": [1e3 * step for step in steps],
        "decode_s": decode,
        "tokens_per_s": batch * load.output / (prefill + decode),
        "decode_tokens_per_s": batch * (load.output - 1) / decode,
        "took_s": time.perf_counter() - begin,
        **peak_memory(model.embed.weight.device),
    }


def prefill_seconds(model, batch, prompt):
    """Seconds of a prefill of `batch` rows, from its first group of rows."""
    device = model.embed.weight.device
    rows, chunk = model.groups(prompt)
    rows = min(rows, batch)
    tokens = torch.randint(model.config.vocab_size, (rows, prompt), device=device)
    model.cache.pos.fill_(prompt)
    group = partial(model.prefill_rows, tokens, 0, chunk)
    group()  # the first of a process takes 0.2 s longer, and counts as often as there are groups
    return clock(group, device, 5 if prompt <= 4096 else 1) * batch / rows


def decode_seconds(model, batch, lengths):
    """Seconds of a decode step at each of the lengths, with its share of quantizing the keys."""
    device = model.embed.weight.device
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    steps = [step_seconds(Decoder(model, token, temperature=0.0), n, 9) for n in lengths]
    if isinstance(model.cache, KiviCache):
        residual = model.cache.config.residual
        model.cache.pos.fill_(residual)  # every row has completed a block
        model.flush()
        flush = clock(model.flush, device, 3) / residual
        steps = [step + flush for step in steps]
    return steps


def told(row):
    return (f"{row['tokens_per_s']:.0f} tokens/s, prefill {row['prefill_s']:.1f} s, "
            f"step {row['step_ms'][0]:.2f} to {row['step_ms'][-1]:.2f} ms, "
            f"peak {row.get('peak_bytes', 0) / 1e9:.1f} GB of {row['formula_bytes'] / 1e9:.1f} "
            f"by the formula ({row['took_s']:.0f} s)")


def peak(row):
    """Peak memory as measured, or where nothing measures it by the formula."""
    return row.get("peak_bytes", row["formula_bytes"])


def print_rows(rows):
    print_table(
        "model | prompt/output | cache | batch | tokens/s | decoding only | peak, GB | "
        "prefill, s | step, ms | roofline, ms: weights, KV",
        [f"{row['model']} | {row['prompt']}/{row['output']} | {row['cache']} | "
         f"{row['batch']}{' (largest)' if row['largest'] else ''} | {row['tokens_per_s']:.1f} | "
         f"{row['decode_tokens_per_s']:.1f} | {peak(row) / 1e9:.2f} | {row['prefill_s']:.2f} | "
         f"{statistics.mean(row['step_ms']):.2f} | "
         f"{', '.join(f'{ms:.2f}' for ms in row['roofline_ms'].values())}" for row in rows])


def print_ratios(results, rows):
    """What every cache gains over full precision, at the largest batch of each."""
    for full, row in itertools.product(rows, rows):
        same = {key: row[key] for key in ("model", "prompt", "output", "largest")}
        pair = full["cache"] == "bf16" != row["cache"]
        if pair and row["largest"] and same.items() <= full.items():
            gains = {key: row[key] / full[key]
                     for key in ("batch", "tokens_per_s", "decode_tokens_per_s")}
            results.add(same | {"cache": row["cache"], **gains}, "ratios")
    print_table(
        "model | prompt/output | cache | batch against bf16 | tokens/s | decoding only",
        [f"{row['model']} | {row['prompt']}/{row['output']} | {row['cache']} | "
         f"{row['batch']:.2f}× | {row['tokens_per_s']:.2f}× | {row['decode_tokens_per_s']:.2f}×"
         for row in results.rows("ratios")])
