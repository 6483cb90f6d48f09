"""Bytes a token of every cache, by the formula and as it is; and the peak of whole runs."""
from program.memory import cache_bytes, cache_parts
from study.measure import print_table, say
from study.models import (
    REQUESTS, Load, add_load_arguments, clear, compile_step, largest_batch, limit_memory,
    model_config, random_model, run_bytes,
)
from study.throughput import peak, run, told

CACHES = [("kivi4", 32, 128), ("k4v2", 32, 128), ("kivi2+", 32, 128), ("kivi2", 32, 128),
          ("kivi2", 32, 32), ("kivi2", 64, 128), ("kivi2", 128, 128)]  # kv, group size, residual


def add_arguments(add):
    add_load_arguments(add)
    add("--batch", type=int, help="rows of a run (default: the largest batch of the first cache)")
    add("--prefill", type=int, help="one prompt of this length instead of --loads")
    add("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768, 131072],
        help="tokens of a row")


def memory(results, device, models, caches, layers, loads, budget_gb, batch, prefill, lengths):
    """bytes a token of every cache, and the peak of whole runs"""
    for name in models:
        add_bytes_per_token(results, name, layers, device, lengths)
    print("\nOne row's cache, bytes a token, all layers (measured on one)")
    print_table(
        "model | tokens | cache | formula | buffers | smaller than bf16",
        [f"{row['model']} | {row['tokens']} | {row['cache']} | {row['formula']:.0f} | "
         f"{row['buffers']:.0f} | {row['ratio']:.2f}×" for row in results.rows("bytes_per_token")])
    limit_memory(results, device, budget_gb)
    for name in models:
        clear(device)
        model = random_model(model_config(name, layers), device)
        for load in [Load(prefill, 64)] if prefill else loads:
            add_runs(results, model, name, load, caches, batch or prefill and 1, budget_gb)
        del model
    print(f"\nWhole runs within {budget_gb:g} GB, weights included, "
          "at the batch that fits with the first cache")
    print_table(
        "model | prompt/output | batch | cache | weights | K and V | activations | formula, GB | "
        "peak, GB | reserved, GB | less than the first | largest batch",
        [f"{row['model']} | {row['prompt']}/{row['output']} | {row['batch']} | {row['cache']} | "
         f"{row['weights'] / 1e9:.3f} | "
         f"{(row['codes'] + row['metadata'] + row['window']) / 1e9:.3f} | "
         f"{row['activations'] / 1e9:.3f} | {row['formula_bytes'] / 1e9:.3f} | "
         f"{measured(row, 'peak_bytes')} | {measured(row, 'reserved_bytes')} | "
         f"{row['less'] and round(row['less'], 2)} | {row['largest_batch']}"
         for row in results.rows("runs")])


def add_bytes_per_token(results, name, layers, device, lengths):
    """Adds a row for each length and cache, from a model of one layer."""
    model = random_model(model_config(name, 1), device)
    n_layers = model_config(name, layers).n_layers
    forms = {"bf16": ("bf16", {})}
    for kv, group_size, residual in CACHES:
        if model.config.head_dim % group_size == 0:
            options = {"group_size": group_size, "residual": residual}
            forms[f"{kv} G{group_size} R{residual}"] = (kv, options)
    for length in lengths:
        full = sum(cache_parts(model, 1, length, "bf16").values())
        for label, (kv, options) in forms.items():
            model.setup_caches(1, length, kv, **options)
            formula = sum(cache_parts(model, 1, length, kv, **options).values())
            row = {"model": name, "tokens": length, "cache": label, "ratio": full / formula,
                   "formula": n_layers * formula / length,
                   "buffers": n_layers * cache_bytes(model) / length}
            results.add(row, "bytes_per_token")


def add_runs(results, model, name, load, caches, batch, budget_gb):
    """Adds a row for each of the caches: bytes of a run by the formula, and its peak.

    batch  None: what fits with the first cache
    """
    first = None
    for label in caches:
        compile_step(model, REQUESTS[label]["kv"])  # which needs less memory
        top = largest_batch(model, load, label, budget_gb)
        batch = batch or max(1, top)
        row = {"model": name, **load._asdict(), "cache": label, "batch": batch,
               "largest_batch": top, **run_bytes(model, batch, load, label)}
        row |= run(model, batch, load, label)
        first = first or row
        failed = "failed" in row or "failed" in first
        row["less"] = None if failed else peak(first) / peak(row)
        results.add(row, "runs")
        say(f"  {name} {load.prompt}/{load.output} {label} B={batch}: "
            f"{row.get('failed') or told(row)}")


def measured(row, key):
    return f"{row[key] / 1e9:.2f}" if key in row else "failed" if "failed" in row else "-"
