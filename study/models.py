"""Models with random weights, at any number of tokens: what decode, throughput and memory run."""
import dataclasses
import gc
from typing import NamedTuple

import torch
from torch.nn import functional as F

from checkpoint.shares import shard
from fused.linear import QuantizedLinear, weight_format
from model import ModelConfig, Transformer
from program.memory import SAFE, largest, needs, traffic_of, weight_bytes
from program.parallel import processes, rank
from study.measure import clock, clock_replays

MODELS = {  # vocabulary, dim, layers, heads, KV heads, head_dim, hidden_dim, context
    "llama-2-7b": ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 2**17),
    "llama-3.1-8b": ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 2**17, rope_theta=5e5),
    "llama-3.1-70b": ModelConfig(128256, 8192, 80, 64, 8, 128, 28672, 2**17, rope_theta=5e5),
    "tiny": ModelConfig(512, 64, 2, 4, 2, 32, 128, 2**17),  # runs anywhere, in tests
}
LARGE = ["llama-2-7b", "llama-3.1-8b"]  # what is measured where no model is named
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


def add_load_arguments(add):
    """The arguments that throughput and memory share. add: `add_argument` of their parser."""
    add("--models", nargs="+", choices=[*LARGE, "tiny"], default=LARGE,
        help="which models (default: all but tiny)")
    add("--caches", nargs="+", choices=REQUESTS, default=list(REQUESTS),
        help="which caches (default: all)")
    add("--layers", type=int, help="fewer layers than the model has")
    add("--loads", nargs="+", type=load, default=[load(text) for text in LOADS],
        help=f"prompt/output tokens (default {' '.join(LOADS)})")
    add("--budget-gb", type=float, default=80.0,
        help="1e9 bytes that a run may take, enforced on CUDA (default 80)")


def run_bytes(model, batch, load, label):
    """Bytes of a run by part, by the formula; formula_bytes is their sum."""
    parts = needs(model, batch, load.prompt, sum(load), **REQUESTS[label])
    return parts | {"formula_bytes": sum(parts.values())}


def largest_batch(model, load, label, budget_gb):
    """Rows that fit the budget, by the formula."""
    most = SAFE * budget_gb * 1e9
    return largest(2**16, lambda n: run_bytes(model, n, load, label)["formula_bytes"] <= most)


def limit_memory(results, device, budget_gb):
    """Lets allocations beyond the budget fail, as on a card of that size (and its CUDA context)."""
    results.data["budget_GB"] = budget_gb
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))


def model_config(name, layers=None):
    """The ModelConfig of that name, or fewer layers of it."""
    return dataclasses.replace(MODELS[name], n_layers=layers or MODELS[name].n_layers)


@torch.no_grad()
def random_model(config, device, weights=None):
    """A bfloat16 model with random weights. weights: None, or a format of fused/linear.py."""
    config = dataclasses.replace(config, weights=weight_format(weights) if weights else None)
    config = shard(config, rank(), processes())
    with torch.device("meta"):
        model = Transformer(config)
    model.to(torch.bfloat16).to_empty(device=device)
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):  # any codes, of weights from -0.03 to 0.03
            layer.packed.random_(-(2**31), 2**31)
            layer.meta[..., 0] = 0.06 / (2**layer.bits - 1)
            layer.meta[..., 1] = -0.03
    model.set_rope()
    return model.eval().requires_grad_(False)


def step_bytes(model, batch, length):
    """Bytes that a decode step reads: weights, K and V of rows that end with `length` tokens."""
    weights = weight_bytes(model) - model.embed.weight.nbytes  # one row of it is read
    return weights, batch * sum(traffic_of(layer.cache, length) for layer in model.layers)


def library_attention(cache, q, pos, t):
    """The strongest baseline for rows of one length: the library's attention over the tokens that
    a FullCache holds, without a mask."""
    k, v = cache.dequantized()
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def compile_step(model, kv, prefill=False):
    """Compiles the decode step on CUDA; full precision calls the library's attention instead."""
    torch.compiler.reset()
    if model.embed.weight.is_cuda:
        model.compile(prefill=prefill)
        if kv == "bf16":
            model.step.attend = library_attention


def random_caches(model, batch, capacity, kv, **options):
    """Caches full of random numbers: with zeros a GPU would run at a higher clock."""
    for layer in model.layers:
        layer.cache = None
    clear(model.embed.weight.device)
    model.setup_caches(batch, capacity, kv, **options)
    for layer in model.layers:
        for buffer in layer.cache.buffers():
            if buffer.dtype == torch.uint8:
                buffer.random_(0, 256)
            elif buffer.is_floating_point():
                buffer.normal_(0, 0.1)


def clear(device):
    """Frees what nothing refers to, and lets the peak of memory start anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def at_length(model, n):
    """Puts the end of every row at n tokens. The cost of a step depends on that alone."""
    model.cache.pos.fill_(n)
    model.cache.lengths[:] = [n] * model.cache.batch


def step_seconds(decoder, n, repeats):
    """Median seconds of a step of a new decoder whose rows hold n tokens: replays of its CUDA
    graph, or on a CPU whole calls."""
    model = decoder.model

    def step():
        at_length(model, n)
        decoder()

    step()
    for graph in decoder.graphs.values():
        return clock_replays(graph, repeats, before=lambda: model.cache.pos.fill_(n))
    return clock(step, model.embed.weight.device, repeats)
