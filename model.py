"""A Llama-shaped transformer that decodes through a KV cache (kivi.py).

What differs between Llama, Mistral, Falcon, Qwen and their kin is data in `ModelConfig`
(checkpoint/config.py). There are three ways through the same layers: `model(tokens)` is the plain
causal forward; `extend` reads prompts, exactly but for what the caches hold already, into them;
`decode` runs one token a row through the caches, and is what gets compiled (fused/step.py).
"""
from dataclasses import replace
from itertools import pairwise, takewhile

import torch
from torch import nn
from torch.distributed._functional_collectives import all_reduce

from checkpoint.config import ACTIVATIONS, ModelConfig, layer_bits
from checkpoint.rope import dynamic_frequencies, rope_frequencies, rotate
from checkpoint.shares import shard
from checkpoint.weights import load_weights
from fused.full import causal
from fused.linear import QuantizedLinear, weight_format
from fused.step import Step, compiled_quantizer, compiled_step, warm_quantizer
from kivi import FullCache, KiviCache, quantize_groups
from quantize import PRESETS, KVConfig

OTHERS = {}  # caches by name, see neighbours/registry.py: (text behind the colon, model) -> configs


def make_cache(config, *shape, **kind):
    """The cache of a config; None is full precision. The other arguments are those of FullCache."""
    if config is None:
        return FullCache(*shape, **kind)
    if type(config) is KVConfig:
        return KiviCache(*shape, **vars(config), **kind)
    return config.make(*shape, **kind)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def make_norm(c):
    """A norm over the `dim` numbers of a token, of the config's kind."""
    kind = nn.LayerNorm if c.layer_norm else RMSNorm
    return kind(c.dim, eps=c.norm_eps)


def make_linear(c, inputs, outputs, bias):
    """A linear layer in the precision of the config."""
    if c.weights is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return QuantizedLinear(inputs, outputs, *c.weights, bias)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.sizes = (
            c.n_heads * c.head_dim,
            c.n_kv_heads * c.head_dim,
            c.n_kv_heads * c.head_dim,
        )
        self.wqkv = make_linear(c, c.dim, sum(self.sizes), c.qkv_bias)
        self.wo = make_linear(c, self.sizes[0], c.dim, c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def qkv(self, x, cos, sin):
        """x [B, T, dim] -> q [B, H, T, D], k and v [B, Hk, T, D]; q and k rotated."""
        parts = self.wqkv(x).split(self.sizes, -1)
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in parts)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def out(self, y):
        """y [B, H, T, D] -> [B, T, dim]."""
        return self.wo(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act = ACTIVATIONS[c.act]
        self.gated = c.gated
        inner = (1 + c.gated) * c.hidden_dim  # gate and up in one product
        self.w_in = make_linear(c, c.dim, inner, c.mlp_bias)
        self.w_out = make_linear(c, c.hidden_dim, c.dim, c.mlp_bias)

    def forward(self, x):
        if not self.gated:
            return self.w_out(self.act(self.w_in(x)))
        gate, up = self.w_in(x).chunk(2, -1)
        return self.w_out(self.act(gate) * up)


class Block(nn.Module):
    """One layer, and its cache."""

    def __init__(self, c, window=None):
        super().__init__()
        self.config = c
        self.attention_norm = make_norm(c)
        self.attention = Attention(c)
        self.mlp_norm = make_norm(c) if c.norms == 2 else self.attention_norm
        self.mlp = MLP(c)
        self.window = window
        self.cache = None

    def forward(self, x, cos, sin):
        """Exact causal attention over x [B, T, dim]. Reads no cache."""
        q, k, v = self.attention.qkv(self.attention_norm(x), cos, sin)
        return self.after(x, causal(q, k, v, self.window))

    def extend(self, x, cos, sin, start, ends, row, chunk):
        """`forward` in place, `chunk` tokens at a time, behind what the cache holds in the rows
        from `row` on, the same number of tokens in each; puts the new ones there.

        x [B, T, dim], start and ends [B] tokens of each row before and after -> x, and whether q, K
        and V are finite (softmax may hide a NaN)
        """
        c = self.config
        B, T, _ = x.shape
        P, past = self.cache.lengths[row], ()
        if P:
            past = self.cache.dequantized(slice(row, row + B))
            P = past[0].shape[2]  # a cache may have dropped tokens
        k = x.new_empty(B, c.n_kv_heads, P + T, c.head_dim)
        v = torch.empty_like(k)
        for new, held in zip((k, v), past):
            new[:, :, :P] = held
        finite = []
        for first in range(0, T, chunk):
            part = x[:, first : first + chunk]
            end = first + part.shape[1]
            rotation = cos[:, :, first:end], sin[:, :, first:end]
            q, new_k, new_v = self.attention.qkv(self.attention_norm(part), *rotation)
            k[:, :, P + first : P + end] = new_k
            v[:, :, P + first : P + end] = new_v
            finite += [torch.isfinite(q).all(), *map(self.cache.storable, (new_k, new_v))]
            if hasattr(self.cache, "observe"):  # it ranks tokens by the attention they get
                self.cache.observe(q, k[:, :, : P + end], row, ends - start - first)
            y = causal(q, k[:, :, : P + end], v[:, :, : P + end], self.window)
            del q, new_k, new_v  # else a fifth more memory: they would stay beside the MLP
            x[:, first:end] = self.after(part, y)
        self.cache.fill(k[:, :, P:], v[:, :, P:], start, ends, row)
        return x, torch.stack(finite).all()

    def after(self, x, y):
        """What follows attention: x [B, T, dim], y [B, H, T, D] -> [B, T, dim]."""
        if self.config.parallel:
            return x + self.reduce(self.attention.out(y) + self.mlp(self.mlp_norm(x)))
        x = x + self.reduce(self.attention.out(y))
        return x + self.reduce(self.mlp(self.mlp_norm(x)))

    def reduce(self, x):
        """The sum over the processes that share a layer; "0" is the group of all processes."""
        return x if self.config.ranks[1] == 1 else all_reduce(x, "sum", "0")


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        windows = c.windows or [None] * c.n_layers
        self.layers = nn.ModuleList(Block(c, window) for window in windows)
        self.norm = make_norm(c)
        if c.weights and not c.tied:  # in full precision it would be the largest of small weights
            self.head = QuantizedLinear(c.dim, c.vocab_size, 8)
        else:
            self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.rope_scale = 1.0
        self.step = Step()
        self.quantizer = quantize_groups
        self.compiled = False

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, weights=None,
                        progress=None, ranks=(0, 1)):
        """Loads a Hugging Face checkpoint folder (safetensors, in one file or several).

        weights  "int8", "int4" or "int4:G" (fused/linear.py) quantizes the linear weights of the
                 layers as they are read; a checkpoint of `checkpoint.write` has its own
        progress called with the share of the tensors that are there, 0 .. 1, after each of them
        ranks    this process and how many share the model; torch.distributed must be set up
        raises   ValueError: a file is missing, truncated or holds other tensors than config.json
        """
        config = ModelConfig.from_folder(folder)
        if weights and config.weights:
            raise ValueError(f"{folder} holds quantized weights already: "
                             f"leave out --weights {weights}")
        if weights:
            config.weights = weight_format(weights)
        config = shard(config, *ranks)
        try:
            with torch.device("meta"):
                model = cls(config)
            if config.tied:
                model.head.weight = None  # or it would be allocated
            model.to(dtype).to_empty(device=device)
        except RuntimeError as error:
            raise ValueError(f"{folder} needs more memory than {device} has: "
                             f"{str(error).splitlines()[0]}") from None
        load_weights(model, folder, progress)
        if config.tied:
            model.head.weight = model.embed.weight
        model.set_rope()
        return model.eval().requires_grad_(False)

    def set_rope(self):
        """Computes the frequencies of the rotary embedding."""
        freq, self.rope_scale = rope_frequencies(self.config)
        self.register_buffer("freq", freq.to(self.embed.weight.device), persistent=False)

    def rope(self, pos, lengths=None):
        """cos, sin [B, 1, T, D / 2] float32 of positions pos [B, T].

        lengths  [B] tokens of each row (None: up to the last position)
        """
        freq, scaling = self.freq, self.config.rope_scaling
        if scaling.get("rope_type") == "dynamic":
            lengths = pos[:, -1] + 1 if lengths is None else lengths
            freq = dynamic_frequencies(freq, scaling, lengths)
        angle = pos[:, None, :, None].float() * freq
        cos, sin = angle.cos(), angle.sin()
        if self.rope_scale == 1:
            return cos, sin
        return cos * self.rope_scale, sin * self.rope_scale

    def forward(self, tokens):
        """Plain causal forward: tokens [B, T] -> logits [B, T, V]. Reads no cache."""
        x = self.embed(tokens)
        cos, sin = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))

    @torch.no_grad()
    def setup_caches(self, batch, max_len, kv="kivi2", **options):
        """Allocates one cache a layer.

        kv      "bf16" (full precision, in the model's dtype), a name of PRESETS, "kvtuner:FILE", or
                a name of OTHERS, with what it asks for behind a colon
        options override the preset, see KVConfig
        raises  ValueError: unknown kv, what the cache refuses, or more than the model's context
        """
        c = self.config
        if max_len > c.max_len:
            raise ValueError(f"{max_len} tokens exceed the model's context of {c.max_len}: "
                             "shorten the prompt or --max-new-tokens")
        shape = (batch, c.n_kv_heads, max_len, c.head_dim)
        kind = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        for layer, config in zip(self.layers, self.kv_configs(kv, **options)):
            window = layer.window if layer.window and layer.window < max_len else None
            layer.cache = make_cache(config, *shape, sliding=window, **kind)
            if config is not None:
                layer.cache.quantizer = self.quantizer
        for layer in self.layers[1:]:  # one schedule for all layers
            layer.cache.pos = self.cache.pos
            layer.cache.index = self.cache.index
            layer.cache.lengths = self.cache.lengths
        if self.quantizer is not quantize_groups:
            warm_quantizer(layer.cache for layer in self.layers)

    def kv_configs(self, kv, **options):
        """The KVConfig of every layer, None for full precision; see `setup_caches`."""
        n_layers, (name, _, argument) = self.config.n_layers, kv.partition(":")
        if kv == "bf16":
            return [None] * n_layers
        if name == "kvtuner":
            configs = [KVConfig(*bits) for bits in layer_bits(argument, n_layers)]
        elif kv in PRESETS:
            configs = [PRESETS[kv]] * n_layers
        elif name in OTHERS:
            configs = OTHERS[name](argument, self)
        else:
            known = ["bf16", *PRESETS, "kvtuner:FILE", *OTHERS]
            raise ValueError(f"unknown kv {kv!r}; known: {', '.join(known)}")
        configs = [replace(config, **options) for config in configs]
        for config in configs:
            config.check(self.config.head_dim)
        return configs

    @property
    def cache(self):
        """The first layer's cache, which holds the schedule of all."""
        return self.layers[0].cache

    def groups(self, L, held=0, chunk=None):
        """(rows, tokens of each) that `extend` computes at once: L behind `held` ones."""
        if chunk is None and self.embed.weight.device.type == "cpu":
            return 1, 1024
        chunk = chunk or 4096
        # Quantizing rounds short rows up to 128 tokens; what is held is written out.
        return max(1, min(chunk // max(L, 128), 16 * chunk // (held + L))), chunk

    def prefill(self, tokens, lengths=None, chunk=None):
        """Empties the caches and reads whole prompts into them: see `extend`."""
        for layer in self.layers:
            layer.cache.reset()
        return self.extend(tokens, lengths, chunk)

    @torch.no_grad()
    def extend(self, tokens, lengths=None, chunk=None):
        """Reads tokens [B, L], right-padded, behind what the caches hold.

        lengths [B] ints, 1 .. L new tokens of each row (None: all L)
        chunk   tokens computed at once, which bounds the memory: short rows together, a long row in
                parts. By default 4096; on a CPU 1024, and every row by itself, so that its bytes do
                not depend on the rows beside it
        returns logits [B, V] of each row's last token
        raises  ValueError: NaN or inf in q, K, V or the logits (one sync for all layers); more
                tokens than the caches hold
        """
        B, L = tokens.shape
        lengths = [L] * B if lengths is None else [int(n) for n in lengths]
        held = list(self.cache.lengths)
        if len(held) != B or len(lengths) != B or not all(1 <= n <= L for n in lengths):
            raise ValueError(f"{len(held)} rows of caches need as many rows of tokens and lengths "
                             f"of 1 .. {L}, got {B} rows and {lengths}")
        ends = [n + more for n, more in zip(held, lengths)]
        if max(ends) > self.cache.max_len:
            raise ValueError(f"{max(ends)} tokens exceed the caches' {self.cache.max_len}")
        rows, chunk = self.groups(L, max(held), chunk)
        logits, finite, row = [], [], 0
        while row < B:
            same = len(list(takewhile(lambda n: n == held[row], held[row : row + rows])))
            part = tokens[row : row + same, : max(lengths[row : row + same])]
            part_logits, part_finite = self.extend_rows(part, ends[row : row + same], row, chunk)
            logits.append(part_logits)
            finite += [part_finite, torch.isfinite(part_logits).all()]
            row += same
        self.cache.set_lengths(ends)
        if not torch.stack(finite).all():
            raise ValueError("the model computes NaN, inf or numbers too large for the cache: its "
                             f"weights are damaged or {part_logits.dtype} is too narrow for it")
        return torch.cat(logits)

    def extend_rows(self, tokens, ends, row, chunk):
        """`extend` of rows that hold the same number of tokens, from `row` on.

        tokens [b, L], ends b ints: tokens of each row afterwards -> logits [b, V], finite
        """
        x, finite = self.embed(tokens), []
        P = self.cache.lengths[row]
        ends = torch.tensor(ends, device=x.device)
        cos, sin = self.rope(torch.arange(P, P + x.shape[1], device=x.device)[None], ends)
        start = torch.full_like(ends, P)
        for layer in self.layers:
            x, ok = layer.extend(x, cos, sin, start, ends, row, chunk)
            finite.append(ok)
        # The head runs on one position a row: all of them would be numbers that nobody reads.
        newest = x[torch.arange(len(x), device=x.device), ends - P - 1]
        return self.head(self.norm(newest)), torch.stack(finite).all()

    @torch.no_grad()
    def decode(self, tokens, t):
        """One token a row, tokens [B, 1] at cache.pos -> logits [B, V]; moves the positions on.

        The host calls `cache.advance()` before, passes t = `cache.tokens(cache.length)`, and calls
        `flush` if `cache.completes_key_block()`. Nothing here waits for the device.
        """
        step, pos, layers = self.step, self.cache.pos, self.path()
        x, cos, sin = step.start(self, tokens, pos)
        q = step.before(layers[0], x, cos, sin, pos)
        for layer, following in pairwise(layers):
            y = step.attend(layer.cache, q, pos, t)
            x, q = step.between(layer, following, x, y, cos, sin, pos)
        y = step.attend(layers[-1].cache, q, pos, t)
        pos += 1
        return step.last(layers[-1], self.norm, self.head, x, y)

    def path(self):
        """The layers of the next decode step."""
        return self.layers

    @torch.no_grad()
    def flush(self):
        """Quantizes the blocks of K that the last decode step completed."""
        for layer in self.layers:
            if not isinstance(layer.cache, FullCache):
                self.step.flush(layer, self.cache.pos - 1)

    def compile(self, prefill=False):
        """Compiles the decode step, and with `prefill` what quantizes the prompts.

        The latter takes longer than it saves, unless the prompts are many.
        """
        self.step = compiled_step(self.config, self.embed.weight.device)
        self.compiled = True
        if prefill:
            self.quantizer = compiled_quantizer()
