"""Models with random weights, and their decode steps at any number of tokens."""
import gc
from dataclasses import replace

import torch
from torch.nn import functional as F

from checkpoint.shares import shard
from fused.linear import QuantizedLinear, weight_format
from decoding.decoder import Decoder
from model import ModelConfig, Transformer
from program.parallel import processes, rank
from study.measure import clock, clock_replays

MODELS = {  # vocabulary, dim, layers, heads, KV heads, head_dim, hidden_dim, context
    "llama-2-7b": ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 2**17),
    "llama-3.1-8b": ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 2**17, rope_theta=5e5),
    "llama-3.1-70b": ModelConfig(128256, 8192, 80, 64, 8, 128, 28672, 2**17, rope_theta=5e5),
    "tiny": ModelConfig(512, 64, 2, 4, 2, 32, 128, 2**17),  # runs anywhere, in tests
}
LARGE = ["llama-2-7b", "llama-3.1-8b"]  # what is measured where no model is named


@torch.no_grad()
def random_model(config, device, layers=None, weights="bf16"):
    """A bfloat16 model with random weights.

    layers   fewer than the config has
    weights  bf16, or a format of fused/linear.py
    """
    form = None if weights == "bf16" else weight_format(weights)
    config = replace(config, n_layers=layers or config.n_layers, weights=form)
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


def library_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def attend_without_mask(cache, q, pos, t):
    """The strongest baseline for rows of one length: the library's attention over the tokens that
    a FullCache holds."""
    n = cache.length
    return library_attention(q, cache.k_window[:, :, :n], cache.v_window[:, :, :n])


def compile_step(model, kv, prefill=False):
    """Compiles the decode step on CUDA; full precision calls the library's attention instead."""
    torch.compiler.reset()
    if model.embed.weight.is_cuda:
        model.compile(prefill=prefill)
        if kv == "bf16":
            model.step.attend = attend_without_mask


def random_caches(model, batch, capacity, kv, **options):
    """Caches full of random numbers: with zeros a GPU would run at a higher clock."""
    for layer in model.layers:
        layer.cache = None
    clear()
    model.setup_caches(batch, capacity, kv, **options)
    for layer in model.layers:
        for buffer in layer.cache.buffers():
            if buffer.dtype == torch.uint8:
                buffer.random_(0, 256)
            elif buffer.is_floating_point():
                buffer.normal_(0, 0.1)


def clear():
    """Frees what nothing refers to, and lets the peak of memory start anew."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def at_length(model, n):
    """Puts the end of every row at n tokens. The cost of a step depends on that alone."""
    model.cache.pos.fill_(n)
    model.cache.lengths[:] = [n] * model.cache.batch


def step_seconds(model, n, repeats):
    """(median seconds of a step of rows that hold n tokens, seconds of the first, which compiles).

    Medians of replays of its CUDA graph, or on a CPU of whole calls.
    """
    decoder = Decoder(model, torch.zeros_like(model.cache.pos)[:, None])  # tokens [B, 1]

    def step():
        at_length(model, n)
        decoder()

    step()
    if decoder.graphs:
        (graph,) = decoder.graphs.values()
        seconds = clock_replays(graph, repeats, before=lambda: model.cache.pos.fill_(n))
    else:
        seconds = clock(step, repeats)
    return seconds, decoder.counts["compile_s"]
