"""Bytes a token of KIVI's caches, by the formula of program/memory.py."""
import torch

from program.memory import cache_parts
from study.measure import print_table
from study.models import LARGE, MODELS, random_model
from study.quality import CACHES

LARGE_GROUPS = {f"kivi2, G = {G}": {"kv": "kivi2", "group_size": G} for G in (64, 128)}


def add_arguments(add):
    add("--models", nargs="+", choices=LARGE, default=LARGE, help="which models (default: all)")
    add("--lengths", nargs="+", type=int, default=[512, 2048, 8192, 32768, 131072],
        help="tokens of a row")


def memory(results, device, models, lengths):
    """bytes a token of KIVI's caches, by the formula"""
    rows = results.data["bytes_per_token"] = []
    for name in models:
        model = random_model(MODELS[name], torch.device("meta"))  # its shapes are all that counts
        for length in lengths:
            full = None
            for label, options in (CACHES | LARGE_GROUPS).items():
                n_bytes = sum(cache_parts(model, 1, length, **options).values())
                full = full or n_bytes
                rows.append({
                    "model": name,
                    "tokens": length,
                    "cache": label,
                    "formula": n_bytes / length,
                    "ratio": full / n_bytes,
                })
    print("\nOne row's cache, all layers")
    print_table(
        "model | tokens | cache | bytes a token | smaller than full precision",
        [f"{row['model']} | {row['tokens']} | {row['cache']} | {row['formula']:.0f} | "
         f"{row['ratio']:.2f}×" for row in rows])
