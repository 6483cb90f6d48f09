"""What a run takes in memory, and what there is: a run that cannot fit is refused beforehand."""
from bisect import bisect_left
from collections import Counter
from functools import partial

import torch

from checkpoint.room import free_bytes, size
from fused import linear
from kivi import PORTION, FullCache, slices
from model import make_cache
from program.parallel import least_of_all

SAFE = 0.97  # share of the free memory that a batch is chosen for: allocators round and fragment
FLOAT = 4  # bytes of a float32, in which norms, rotations, softmax and quantization are computed
LIBRARIES = 2**27  # bytes: workspaces of CUDA's libraries
MASKED = 512  # queries that share a mask, see `causal` in fused/full.py
BLOCK = 256  # tokens: attention over a packed cache has at most one partial result for so many
PAST = 4 * FLOAT  # bytes for each channel of a KV head of a token that is held, see `extend`
OBSERVED = 13  # bytes for each probability that `observe` computes: three in float32, and a mask
# Bytes for each channel of a KV head that uncompiled code takes beside the cache.
WRITTEN_OUT = 14  # a token that is read: K and V in float32, and the codes of one
FLUSHED = 17  # a token of a key block: float32 copies of it, while it is quantized
DIVIDED = 23  # the same of a cache with tiers: K and V are quantized together
RANKED = 10  # bytes for each token with which a token of a key block is compared, see neighbours/


def weight_bytes(model):
    buffers = [buffer for name, buffer in model.named_buffers() if ".cache." not in name]
    return sum(weight.nbytes for weight in [*model.parameters(), *buffers])


def cache_bytes(model):
    """Bytes of the caches that are set up."""
    return sum(layer.cache.nbytes for layer in model.layers if layer.cache)


def cache_sizes(kind, *shape, **options):
    """Bytes by part of the cache that kind(*shape, **options) makes, without allocating it."""
    parts = {"codes": 0, "metadata": 0, "window": 0, "positions": 0}
    names = {"packed": "codes", "window": "window"}
    names |= dict.fromkeys(("scale", "zero", "outlier", "channel"), "metadata")
    for name, buffer in kind(*shape, **options, device="meta").named_buffers():
        part = names.get(name.split(".")[-1][2:], "positions")
        parts[part] += buffer.untyped_storage().nbytes()
    return parts


def cache_parts(model, batch, max_len, kv, **options):
    """Bytes of the caches of a model: codes, metadata, window. Full precision counts as codes."""
    c, dtype = model.config, model.embed.weight.dtype
    shape = batch, c.n_kv_heads, max_len, c.head_dim
    parts = {"codes": 0, "metadata": 0, "window": 0}
    for config, n_layers in Counter(model.kv_configs(kv, **options)).items():
        sizes = cache_sizes(partial(make_cache, config), *shape, dtype=dtype)
        layer = sizes if config else {"codes": sum(sizes.values())}
        for name, n_bytes in layer.items():
            parts["window" if name == "positions" else name] += n_layers * n_bytes
    return parts


def traffic_of(cache, length):
    """Bytes of one layer's cache that attention must read for a row of `length` tokens."""
    D = cache.head_dim
    seen = min(length, cache.sliding or length)
    if hasattr(cache, "traffic"):
        return cache.traffic(length)
    if isinstance(cache, FullCache):
        return 2 * cache.n_kv_heads * seen * D * cache.dtype.itemsize
    c = cache.config
    total = 0
    for codes, group, newest in (
        ((D + c.boosted(D)) * c.k_bits, c.group_size, (length - 1) % c.residual),
        (D * c.v_bits, c.value_group(D), c.residual),
    ):
        exact = min(seen, newest + 1 + c.sink)
        packed = codes // 8 + D // group * 2 * cache.k_scale.itemsize  # of a token
        total += exact * D * cache.dtype.itemsize + (seen - exact) * packed
    return cache.n_kv_heads * total


def weights_read(model):
    """Bytes of weights that a decode step reads."""
    unread = 0 if model.config.tied else model.embed.weight.nbytes  # one row of it is read
    path = model.path()
    for layer in model.layers:
        if layer not in path:
            unread += sum(weight.nbytes for weight in layer.parameters())
    return weight_bytes(model) - unread


def kv_read(model, length):
    """Bytes of the caches that a decode step reads for a row of `length` tokens."""
    return sum(traffic_of(layer.cache, length) for layer in model.path())


def needs(model, batch, prompt, max_len, kv, *, held=0, drafts=0, **options):
    """Bytes of a run by part, from shapes alone: weights, codes, metadata, window, activations.

    prompt   tokens of the longest prompt, of which `held` are in the caches before it is read
    max_len  capacity of the caches; kv, options as in `Transformer.setup_caches`
    drafts   so many are verified a step

    The parts of the caches equal the allocation. Activations estimate what a prefill or a decode
    step allocates beside weights and caches, whichever is more: nearly all of it on a CPU, on an
    H200 runs took up to 0.5 GB more.
    """
    c = model.config
    weight = model.embed.weight
    config = model.kv_configs(kv, **options)[0]
    activations = max(_prefill_bytes(model, batch, prompt, held, config),
                      (1 + drafts) * _decode_bytes(model, batch, max_len, config))
    # Logits, and sampling in float32 and int64.
    activations += (1 + drafts) * batch * c.vocab_size * (2 * weight.itemsize + 12)
    if c.weights:  # quantized, and written out a chunk at a time
        widest = c.dim * max(2 * c.hidden_dim, c.vocab_size)
        activations += min(linear.CHUNK, widest) * (2 * weight.itemsize + FLOAT)
    if weight.is_cuda:
        activations += LIBRARIES
    caches = cache_parts(model, batch, max_len, kv, **options)
    return {"weights": weight_bytes(model), **caches, "activations": int(activations)}


def _prefill_bytes(model, batch, prompt, held, config):
    """Upper bound of what a prefill allocates, without logits: see `Block.extend`."""
    c, weight = model.config, model.embed.weight
    item = weight.itemsize
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    new = prompt - held
    rows, chunk = model.groups(new, held)
    rows, chunk = min(rows, batch), min(chunk, new)
    # Bytes a token of a chunk: x and its norm, q, k, v, the result of attention, and beside them
    # gate, up, silu and product, or a rotation in float32, or a norm in float32.
    narrow = 2 * (c.dim + queries + keys) * item
    widest = max(4 * c.hidden_dim * item, 3 * FLOAT * max(queries, keys), 2 * FLOAT * c.dim)
    mask = MASKED * prompt * (1 + item) if chunk < prompt and not weight.is_cuda else 0
    stack = 1 if config is None else 4 * config.group_size
    first, end = slices(0, new, rows * keys, stack)[0]
    fill = rows * (end - first) * keys * (item + 4 * FLOAT)
    past = rows * held * keys * (PAST if config else 2 * item)  # as it is dequantized
    observed = 0
    if getattr(config, "observes", False):
        observed = OBSERVED * min(2**24, c.n_heads * chunk * prompt)
        observed += FLOAT * prompt * keys  # K of a row in float32
    # All along: x, the layer's K and V; cos and sin.
    kept = rows * (new * c.dim + 2 * prompt * keys) * item + 2 * FLOAT * new * c.head_dim
    layer = rows * chunk * narrow + max(rows * chunk * widest + mask, observed)
    return kept + max(layer, fill, past)


def _decode_bytes(model, batch, max_len, config):
    """The same for one decode step at full length."""
    c = model.config
    row = (4 * c.hidden_dim + 8 * c.dim) * FLOAT
    if config is None:
        return batch * (row + 16 * max_len)  # the mask
    # Scores and their softmax, in float32 and in the type of the product; partial results.
    row += c.n_heads * max_len * 4 * FLOAT
    row += c.n_heads * c.head_dim * 2 * FLOAT * (max_len // BLOCK + 1)
    if model.compiled:
        return batch * row
    one_head = batch * max_len * c.head_dim
    heads = min(c.n_kv_heads, max(1, PORTION[model.embed.weight.is_cuda] // one_head))
    flushed = FLUSHED * c.head_dim
    if getattr(config, "observes", False):
        flushed = max(DIVIDED * c.head_dim, RANKED * config.residual)
    flushed *= batch * c.n_kv_heads * config.residual
    return batch * row + max(WRITTEN_OUT * heads * one_head, flushed)


def largest(high, fits):
    """The largest n of 0 .. high with fits(n), where fits is true up to some n and false beyond."""
    return bisect_left(range(1, high + 1), True, key=lambda n: not fits(n))


class Budget:
    """Do caches for prompts of up to `prompt` tokens fit? `run` is a program.chat.Run.

    kept  bytes of the states of other caches, which stay beside them
    held  tokens of a prompt that the caches hold before it is read
    """

    def __init__(self, run, prompt, kept=0, held=0):
        self.run = run
        self.prompt, self.held = prompt, held
        self.kept = kept
        device = run.model.embed.weight.device
        # The weights are loaded already, and the caches of an answer before will be replaced.
        free = free_bytes(device)
        for model in filter(None, (run.model, run.draft)):
            free += weight_bytes(model) + cache_bytes(model)
        self.free = least_of_all(free, device)  # all processes must choose the same batch
        if run.memory_gb is not None:
            self.free = min(self.free, run.memory_gb * 2**30)

    def parts(self, batch, capacity):
        """What `needs` says, and the total, for rows of up to `capacity` tokens at their end."""
        run, prompt = self.run, min(self.prompt, capacity)
        held = min(self.held, prompt - 1)
        parts = needs(run.model, batch, prompt, capacity, run.kv, held=held,
                      drafts=run.speculate or 0, **run.options)
        if self.kept:
            parts["kept"] = self.kept
        if run.draft:
            caches = cache_parts(run.draft, batch, capacity, "bf16")
            parts["draft model"] = weight_bytes(run.draft) + sum(caches.values())
        return parts | {"total": sum(parts.values())}

    def fits(self, batch, capacity, share=1.0):
        return self.parts(batch, capacity)["total"] <= share * self.free

    def largest_batch(self, most, capacity):
        """Rows to run at once, 1 .. most, where the user does not say how many."""
        return max(1, largest(most, lambda batch: self.fits(batch, capacity, SAFE)))

    def check(self, batch, capacity):
        """Raises ValueError where this does not fit, which names what does."""
        if self.fits(batch, capacity):
            return
        rows = largest(batch, lambda n: self.fits(n, capacity))
        tokens = largest(capacity, lambda n: self.fits(1, n))
        if rows:
            best = f"a batch of {rows} fits"
        elif tokens:
            best = f"{tokens} tokens fit, prompt included"
        else:
            best = "not even the weights and one token fit"
        total = size(self.parts(batch, capacity)["total"])
        raise ValueError(f"a batch of {batch} with {capacity} tokens a row needs {total}, "
                         f"{size(self.free)} are free: {best}")

    def table(self, batch, capacity):
        """The parts as lines of text."""
        parts = self.parts(batch, capacity) | {"free": self.free}
        names = {"codes": "K and V" if self.run.kv == "bf16" else "packed codes"}
        lines = [f"  {names.get(name, name):12} {size(n):>12}" for name, n in parts.items()]
        return "\n".join([*lines, f"batch {batch}, {capacity} tokens a row"])
