"""A Llama-shaped transformer that reads Hugging Face checkpoints and decodes through a KV cache (kivi.py).

One file, one architecture: what differs between Llama, Mistral, Falcon, Qwen and their kin is data in `ModelConfig`, read
from `config.json`. Weights come straight from safetensors, one tensor at a time, without a conversion step.

Three ways through the same layers: `model(tokens)` is the plain causal forward (scoring, parity), `prefill` runs whole
prompts with exact attention and fills the caches, `decode` runs one token a row through the caches and is what gets
compiled.
"""
import json
import re
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import ceil, floor, log, pi
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from kivi import PRESETS, FullCache, KiviCache, KVConfig, compiled_attention, is_product, launches, quantized_groups, slices
from quantize import CHUNK, QuantizedLinear, few, quantize_weight, tile_rows, weight_format

SUPPORTED = {  # architectures entry of config.json -> what counts where it says nothing, and what it never says
    "LlamaForCausalLM": ({"use_sliding_window": False}, {}),
    "MistralForCausalLM": ({"sliding_window": 4096, "max_position_embeddings": 131072}, {}),
    "FalconForCausalLM": ({"tie_word_embeddings": True}, {}),  # and _falcon
    "Qwen2ForCausalLM": ({"use_sliding_window": False, "max_window_layers": 28}, {"qkv_bias": True, "o_bias": False}),
    "Qwen3ForCausalLM": ({"use_sliding_window": False, "max_window_layers": 28}, {"qk_norm": True}),
    "Phi3ForCausalLM": ({}, {"names": "phi3"}),
}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), partial(F.gelu, approximate="tanh"))}


@dataclass
class ModelConfig:
    """The numbers of a `config.json` under this project's names."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_norm: bool = False  # LayerNorm with bias instead of RMSNorm
    parallel: bool = False  # attention and MLP read the same x (Falcon)
    norms: int = 2  # of a layer; with one, both halves read the same normed x
    act: str = "silu"
    gated: bool = True  # w_out(act(gate) * up), else w_out(act(x))
    windows: tuple = ()  # of attention, layer by layer, in tokens; None reads everything
    names: str = "llama"  # key of NAMES
    eos: tuple = ()
    ranks: tuple = (0, 1)  # this process and how many share the heads and the hidden channels, see `shard`
    whole: tuple = ()  # heads, KV heads and hidden channels of all processes together
    weights: tuple = None  # (bits, group size) of the layers' linear weights, None for full precision

    @classmethod
    def from_folder(cls, folder):
        """Reads `config.json` (and `generation_config.json` when present) of a Hugging Face checkpoint folder.

        raises ValueError: no such file, not JSON, an unknown architecture or a missing entry; one line that says which
        """
        raw = read_json(Path(folder) / "config.json")
        arch = raw.get("architectures")
        arch = arch[0] if arch and isinstance(arch, list) else "none named"
        if arch not in list(SUPPORTED):
            raise ValueError(f"architecture {arch} is not supported; supported: {', '.join(SUPPORTED)}")
        defaults, own = SUPPORTED[arch]
        raw = {**defaults, **raw}
        try:
            if arch == "FalconForCausalLM":
                words, own = _falcon(raw)
                raw |= words
            heads, n_layers, bias = raw["num_attention_heads"], raw["num_hidden_layers"], raw.get("attention_bias", False)
            max_len, rope = raw.get("max_position_embeddings", 2048), _rope(raw)
            if rope["rope_type"] in ("dynamic", "yarn"):  # the two that are meant to carry a model beyond what its config says
                max_len = max(max_len, int(rope["factor"] * rope["original_max_position_embeddings"]))
            window = (raw.get("sliding_window") or None) if raw.get("use_sliding_window", True) else None
            full = raw.get("max_window_layers", 0)
            kinds = raw.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in range(min(n_layers, 1000))]
            config = cls(
                vocab_size=raw["vocab_size"], dim=raw["hidden_size"], n_layers=n_layers, n_heads=heads,
                n_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                hidden_dim=raw["intermediate_size"], max_len=max_len, norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=rope["rope_theta"], rope_scaling=rope, tied=raw.get("tie_word_embeddings", False),
                act=raw.get("hidden_act", "silu"), windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
                **{"qkv_bias": bias, "o_bias": bias, "mlp_bias": raw.get("mlp_bias", False), **own},
            )
            config.check()
            config.weights = _quantization(raw.get("quantization_config"))
            rope_frequencies(config)  # a missing entry should be known before the weights are read
        except KeyError as error:
            raise ValueError(f"{folder}/config.json has no entry {error}") from None
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{folder}/config.json holds an entry of the wrong kind: {error}") from None
        generation = Path(folder) / "generation_config.json"
        eos = (read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
        config.eos = tuple(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
        return config

    def check(self):
        """Raises ValueError for numbers that describe no model, so that a damaged config.json cannot fail further on."""
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_len"):
            value, limit = getattr(self, name), {"n_layers": 1000, "head_dim": 65536}.get(name, 2**31)
            if type(value) is not int or not 0 < value < limit:
                raise ValueError(f"config.json: {name} must be an integer from 1 to {limit - 1}, got {value!r}")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(f"config.json: {self.n_heads} heads of {self.head_dim} channels on {self.n_kv_heads} KV heads cannot be divided evenly")
        if len(self.windows) != self.n_layers or any(w is not None and (type(w) is not int or w < 1) for w in self.windows):
            raise ValueError(f"config.json: sliding windows {self.windows[:4]} of {len(self.windows)} layers do not fit {self.n_layers} layers")
        if self.act not in list(ACTIVATIONS):
            raise ValueError(f"hidden_act {self.act} is not supported; supported: {', '.join(ACTIVATIONS)}")


def _falcon(raw):
    """What Falcon's config.json says: in the words of the others, and what those have no word for."""
    if raw.get("alibi"):
        raise ValueError("alibi position biases (the falcon-rw models) are not supported: use a Falcon with rotary embeddings")
    new, heads, bias = raw.get("new_decoder_architecture", False), raw["num_attention_heads"], raw.get("bias", False)
    parallel = new or raw.get("parallel_attn", True)
    norms = (raw.get("num_ln_in_parallel_attn") or 2) if new else 1 if parallel else 2
    grouped = (raw.get("num_kv_heads") or heads) if new else 1 if raw.get("multi_query", True) else heads
    words = {
        "num_key_value_heads": grouped, "intermediate_size": raw.get("ffn_hidden_size") or 4 * raw["hidden_size"], "head_dim": None,
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-5), "hidden_act": raw.get("activation", "gelu"), "sliding_window": None,
    }
    return words, {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias, "layer_norm": True, "parallel": parallel, "norms": norms,
                   "gated": False, "names": "falcon 2" if parallel and norms == 2 else "falcon"}


def _rope(raw):
    """The rotary embedding that a config.json describes, in one spelling, with the defaults filled in."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    old = raw.get("max_position_embeddings", 2048)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if rope["rope_type"] == "dynamic" or not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = old
    if rope["rope_type"] == "yarn" and not rope.get("factor"):
        rope["factor"] = old / rope["original_max_position_embeddings"]
    part = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    if part != 1:
        raise ValueError(f"partial_rotary_factor {part} is not supported: only models that rotate whole heads (1.0) are")
    return rope


def _quantization(entry):
    """(bits, group size) of a checkpoint that `python quantize.py` wrote, None for full precision."""
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if method != "kivi-weights":
        raise ValueError(f"weights quantized by {method} are not supported: use the model's original checkpoint, and --weights int8 or int4")
    bits, group_size = entry["bits"], entry["group_size"]
    return weight_format(f"int{bits}" if group_size is None else f"int{bits}:{group_size}")


def read_json(path):
    """The object in a JSON file. raises ValueError: no such file, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a checkpoint is a folder in the Hugging Face layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def rope_frequencies(config):
    """Rotation per token of each channel pair, float32 [D / 2], after the config's `rope_scaling`, and the factor of cos and sin.

    source  linear, llama3: Llama 3.1 reference code; yarn: arXiv 2309.00071; dynamic (the growth is in `Transformer.rope`)
    """
    D, scaling, theta = config.head_dim, config.rope_scaling, config.rope_theta
    freq = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    kind, old = scaling.get("rope_type", "default"), scaling.get("original_max_position_embeddings")
    if kind in ("default", "dynamic"):
        return freq, 1.0
    if kind == "linear":
        return freq / scaling["factor"], 1.0
    # Slow pairs are stretched by `factor`, fast ones kept, those in between blended.
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept, scale = ((old * freq / (2 * pi) - low) / (high - low)).clamp(0, 1), 1.0
    elif kind == "yarn":
        pair = lambda turns: D * log(old / (turns * 2 * pi)) / (2 * log(theta))  # that turns so often in the old context
        low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        kept = 1 - ((torch.arange(D // 2) - low) / (high - low or 0.001)).clamp(0, 1)
        growth = lambda m: 0.1 * m * log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = scaling.get("attention_factor") or (growth(m) / growth(m_all) if m and m_all else growth(1))
    else:
        raise ValueError(f"rope_scaling of type {kind} is not supported; supported: default, linear, dynamic, llama3, yarn")
    return (1 - kept) * freq / scaling["factor"] + kept * freq, scale


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def norm(c):
    """A new norm over a token's `dim` numbers, of the config's kind."""
    return (nn.LayerNorm if c.layer_norm else RMSNorm)(c.dim, eps=c.norm_eps)


def rotate(x, cos, sin):
    """Rotary embedding, Hugging Face convention (halves, not interleaved pairs): x [B, H, T, D]; cos, sin [B, 1, T, D / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


def causal(q, k, v, window=None, chunk=512):
    """Exact attention of the last c of T tokens, over the newest `window` only if given: q [B, H, c, D]; k, v [B, Hk, T, D] -> [B, H, c, D]."""
    c, T, attend = q.shape[2], k.shape[2], partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])
    window = window or T
    if c == T <= window:
        return attend(q, k, v, is_causal=True)
    if q.is_cuda and T <= window:
        return attend(q, k, v, attn_mask=causal_lower_right(c, T))  # a flag of the flash kernel, not a tensor
    t, out = torch.arange(T, device=q.device), torch.empty_like(q)
    for first in range(T - c, T, chunk):  # only the keys that a chunk of queries sees, and never a mask of T x T
        seen = slice(max(0, first - window + 1), min(first + chunk, T))
        own = t[first : seen.stop, None]
        part = slice(first - T + c, seen.stop - T + c)
        out[:, :, part] = attend(q[:, :, part], k[:, :, seen], v[:, :, seen], attn_mask=(t[seen] <= own) & (t[seen] > own - window))
    return out


def shard(c, rank, n):
    """The config of one of n processes: its share of the heads, KV heads and hidden channels. KV heads fewer than processes are kept by several."""
    if n == 1:
        return c
    if c.n_heads % n or c.hidden_dim % n or c.n_kv_heads % n and (n % c.n_kv_heads or c.names.startswith("falcon")):
        raise ValueError(f"{c.n_heads} heads, {c.n_kv_heads} KV heads and {c.hidden_dim} hidden channels cannot be divided among {n} processes")
    if c.weights:
        raise ValueError(f"quantized weights run in one process, not in {n}: leave out torchrun or --weights")
    return replace(c, n_heads=c.n_heads // n, n_kv_heads=max(1, c.n_kv_heads // n), hidden_dim=c.hidden_dim // n, ranks=(rank, n),
                   whole=(c.n_heads, c.n_kv_heads, c.hidden_dim))


def linear(c, inputs, outputs, bias):
    """A linear layer in the precision of the config."""
    return nn.Linear(inputs, outputs, bias=bias) if c.weights is None else QuantizedLinear(inputs, outputs, *c.weights, bias)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.sizes = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.wqkv = linear(c, c.dim, sum(self.sizes), c.qkv_bias)
        self.wo = linear(c, self.sizes[0], c.dim, c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)

    def qkv(self, x, cos, sin):
        """x [B, T, dim] -> q [B, H, T, D], k, v [B, Hk, T, D], rotated."""
        q, k, v = (y.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2) for y in self.wqkv(x).split(self.sizes, -1))
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def out(self, y):
        return self.wo(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act, self.gated = ACTIVATIONS[c.act], c.gated
        self.w_in = linear(c, c.dim, (1 + c.gated) * c.hidden_dim, c.mlp_bias)  # gate and up in one product
        self.w_out = linear(c, c.hidden_dim, c.dim, c.mlp_bias)

    def forward(self, x):
        if not self.gated:
            return self.w_out(self.act(self.w_in(x)))
        gate, up = self.w_in(x).chunk(2, -1)
        return self.w_out(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self, c, window=None):
        super().__init__()
        self.attention_norm, self.attention = norm(c), Attention(c)
        self.mlp_norm, self.mlp = norm(c) if c.norms == 2 else self.attention_norm, MLP(c)
        self.parallel, self.window, self.cache = c.parallel, window, None

    def forward(self, x, cos, sin):
        """Exact causal attention over x [B, T, dim]. Reads no cache."""
        return self.after(x, causal(*self.attention.qkv(self.attention_norm(x), cos, sin), self.window))

    def prefill(self, x, cos, sin, lengths, row, chunk, quantize):
        """`forward` in place, `chunk` tokens of every row at a time; K and V go into the rows of the cache from `row` on.

        x [B, T, dim], lengths [B] -> x and whether K and V are finite (softmax may swallow a NaN)
        """
        (B, T, _), c, finite = x.shape, self.attention.c, []
        k, v = (x.new_empty(B, c.n_kv_heads, T, c.head_dim) for _ in range(2))
        for a in range(0, T, chunk):
            part = x[:, a : a + chunk]
            b = a + part.shape[1]
            q, k[:, :, a:b], v[:, :, a:b] = self.attention.qkv(self.attention_norm(part), cos[:, :, a:b], sin[:, :, a:b])
            finite += [torch.isfinite(y[:, :, a:b]).all() for y in (k, v)]
            x[:, a:b] = self.after(part, causal(q, k[:, :, :b], v[:, :, :b], self.window))
        self.cache.fill(k, v, lengths, row, quantize)
        return x, torch.stack(finite).all()

    def before(self, x, cos, sin, pos):
        """What precedes attention in a decode step: x [B, 1, dim], pos [B]; puts the token's K and V into the cache and returns q [B, H, 1, D]."""
        q, k, v = self.attention.qkv(self.attention_norm(x), cos, sin)
        self.cache.update(k, v, pos)
        return q

    def after(self, x, y):
        """What follows attention: x [B, T, dim], y [B, H, T, D] -> [B, T, dim]."""
        if self.parallel:
            return x + self.reduce(self.attention.out(y) + self.mlp(self.mlp_norm(x)))
        x = x + self.reduce(self.attention.out(y))
        return x + self.reduce(self.mlp(self.mlp_norm(x)))

    def reduce(self, x):
        """The sum over the processes that share a layer."""
        return x if self.attention.c.ranks[1] == 1 else all_reduce(x, "sum", "0")  # the group of all processes


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c, window) for window in c.windows or [None] * c.n_layers)
        self.norm, self.rope_scale = norm(c), 1.0
        # Of small weights a head in full precision would be the largest part; one tied to the embedding stays as it is.
        self.head = QuantizedLinear(c.dim, c.vocab_size, 8) if c.weights and not c.tied else nn.Linear(c.dim, c.vocab_size, bias=False)
        # The units of compilation: `compile` replaces them.
        self.start, self.before, self.attend, self.between, self.last = _start, Block.before, _attend, _between, _last
        self.flush_block, self.quantize, self.compiled = _flush, quantized_groups, False

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, weights=None, progress=None, ranks=(0, 1)):
        """Loads a Hugging Face checkpoint folder (single or sharded safetensors) onto `device` in `dtype`.

        weights  "int8", "int4" or "int4:G" (see quantize.py) quantizes the linear weights of the layers as they are read, one
                 tensor at a time; a checkpoint that `python quantize.py` wrote has its own
        progress called with the share of the tensors that are there, 0 .. 1, after each of them
        ranks    this process and how many share the model, see `shard`; torch.distributed must be set up for them
        raises   ValueError: a file is missing, truncated or holds other tensors than `config.json` describes
        """
        config = ModelConfig.from_folder(folder)
        if weights and config.weights:
            raise ValueError(f"{folder} holds quantized weights already: leave out --weights {weights}")
        config.weights = weight_format(weights) if weights else config.weights
        config = shard(config, *ranks)
        try:
            with torch.device("meta"):
                model = cls(config)
            if config.tied:
                model.head.weight = None  # or it would be allocated
            model.to(dtype).to_empty(device=device)
        except RuntimeError as error:
            raise ValueError(f"{folder} needs more memory than {device} has: {str(error).splitlines()[0]}") from None
        _load(model, Path(folder), progress)
        if config.tied:
            model.head.weight = model.embed.weight
        freq, model.rope_scale = rope_frequencies(config)
        model.register_buffer("freq", freq.to(device), persistent=False)
        return model.eval().requires_grad_(False)

    def rope(self, pos, lengths=None):
        """cos, sin [B, 1, T, D / 2] float32 of positions pos [B, T] in rows of `lengths` [B] tokens (up to the last when None)."""
        freq, scaling = self.freq, self.config.rope_scaling
        if scaling.get("rope_type") == "dynamic":  # beyond the trained context, slower with every token (as transformers does)
            lengths, old, factor = pos[:, -1] + 1 if lengths is None else lengths, scaling["original_max_position_embeddings"], scaling["factor"]
            growth = (factor * lengths.clamp(min=old) / old - (factor - 1))[:, None, None, None]
            freq = freq * growth ** -(torch.arange(0, 2 * len(freq), 2, device=pos.device) / (2 * len(freq) - 2))
        angle = pos[:, None, :, None].float() * freq
        cos, sin, scale = angle.cos(), angle.sin(), self.rope_scale
        return (cos, sin) if scale == 1 else (cos * scale, sin * scale)

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

        kv      "bf16" (full precision, in the model's dtype), a name of kivi.PRESETS, or "kvtuner:FILE" (see `layer_bits`)
        options override the preset: k_bits, v_bits, group_size, residual, sink, shrink
        raises  ValueError: unknown kv, a combination the cache refuses, or max_len beyond the model's context
        """
        c = self.config
        if max_len > c.max_len:
            raise ValueError(f"{max_len} tokens exceed the model's context of {c.max_len}: shorten the prompt or --max-new-tokens")
        where = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        configs = self.kv_configs(kv, **options)
        for layer, config in zip(self.layers, configs):
            where["sliding"] = layer.window if layer.window and layer.window < max_len else None
            if config is None:
                layer.cache = FullCache(batch, c.n_kv_heads, max_len, c.head_dim, **where)
            else:
                layer.cache = KiviCache(batch, c.n_kv_heads, max_len, c.head_dim, **vars(config), **where)
        first = self.layers[0].cache
        for layer in self.layers[1:]:  # one schedule for all layers
            layer.cache.pos, layer.cache.index, layer.cache.lengths = first.pos, first.index, first.lengths
        if self.quantize is not quantized_groups and kv != "bf16":  # compiles here, not in the middle of the first prompt
            for config, layer in dict(zip(configs, self.layers)).items():
                n = min(max_len, 4 * config.group_size + 1)  # more than one block of bytes, see `compile`
                nothing = torch.zeros(1, c.n_kv_heads, n, c.head_dim, **{k: where[k] for k in ("dtype", "device")})
                layer.cache.fill(nothing, nothing, torch.ones(1, dtype=torch.int64, device=nothing.device), 0, self.quantize)

    def kv_configs(self, kv, **options):
        """The KVConfig of every layer, None for full precision. Arguments and errors as in `setup_caches`."""
        n = self.config.n_layers
        if kv.startswith("kvtuner:"):
            configs = [{"k_bits": k, "v_bits": v} for k, v in layer_bits(kv.removeprefix("kvtuner:"), n)]
        elif kv in PRESETS:
            configs = [vars(PRESETS[kv])] * n
        elif kv == "bf16":
            return [None] * n
        else:
            raise ValueError(f"unknown kv {kv!r}; known: bf16, {', '.join(PRESETS)}, kvtuner:FILE")
        configs = [KVConfig(**{**c, **options}) for c in configs]
        for c in configs:
            c.check(self.config.head_dim)
        return configs

    def memory(self, batch, prompt, max_len, kv="kivi2", **options):
        """Bytes of a run by part, from shapes alone: weights, codes, metadata, window, activations.

        prompt   tokens of the longest prompt; max_len capacity of the caches; kv, options as in `setup_caches`
        returns  dict; full precision counts as codes. The caches' parts equal the allocation; activations estimate what
                 prefill or a decode step allocates beside weights and caches, whichever is more: nearly all of it on a CPU,
                 on an H200 runs took up to 0.5 GB more
        """
        c, dtype = self.config, self.embed.weight.dtype
        weights = [*self.parameters(), *(b for name, b in self.named_buffers() if ".cache." not in name)]
        parts = {"weights": sum(w.nbytes for w in weights), "codes": 0, "metadata": 0, "window": 0}
        configs = self.kv_configs(kv, **options)
        for config in configs:
            if config is None:
                parts["codes"] += FullCache.bytes(batch, c.n_kv_heads, max_len, c.head_dim, dtype)
                continue
            layer = config.parts(batch, c.n_kv_heads, max_len, c.head_dim, dtype)
            layer["window"] += layer.pop("positions")
            for name, n in layer.items():
                parts[name] += n
        rest = batch * c.vocab_size * (2 * dtype.itemsize + 12)  # logits, and sampling in float32
        rest += min(CHUNK, c.dim * max(c.hidden_dim * 2, c.vocab_size)) * (2 * dtype.itemsize + 4) if c.weights else 0  # written out
        rest += 2**27 if self.embed.weight.is_cuda else 0  # workspaces of the libraries
        step = self._decode_bytes(batch, max_len, configs[0])
        return parts | {"activations": int(max(self._prefill_bytes(batch, prompt, configs[0]), step) + rest)}

    def _prefill_bytes(self, batch, prompt, config):
        """Upper bound of what `prefill` allocates, without logits: the temporaries that live at the same time, in `Block.prefill`."""
        c, e = self.config, self.embed.weight.dtype.itemsize
        Q, K = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        rows, chunk = self.groups(prompt)
        rows, part = min(rows, batch), min(chunk, prompt)
        rotation = (c.dim + Q + 2 * K) * e + max(12 * Q, Q * e + 12 * K)  # bytes a token: norm, q, k, v; halves in float32
        attention = 4 * Q * e + 2 * c.dim * e
        mlp = 2 * Q * e + max((4 * c.hidden_dim + 2 * c.dim) * e, (8 + 3 * e) * c.dim)  # gate and up, silu, product; or the norm
        mask = 0 if self.embed.weight.is_cuda or part == prompt else part * prompt * (1 + e)
        first, end = slices(prompt, rows * K, 1 if config is None else 4 * config.group_size)[0]
        fill = rows * (end - first) * K * (e + 16)
        kept = prompt * (rows * (c.dim + 2 * K) * e + 8 * c.head_dim)  # x, the layer's K and V, cos and sin
        return kept + max(rows * part * max(rotation, mlp), rows * part * attention + mask, fill)

    def _decode_bytes(self, batch, max_len, config):
        """The same for one decode step at full length."""
        c = self.config
        rest = batch * (4 * c.hidden_dim + 8 * c.dim) * 4
        if config is None:
            return rest + batch * max_len * 8  # the mask
        scores = batch * c.n_heads * max_len * 16  # of a block and its softmax, in float32 and in the type of the product
        partial = batch * c.n_heads * c.head_dim * 8 * config.blocks(max_len)  # every block's result
        # Uncompiled attention writes one layer's K or V out in float32 beside the codes; a flush does with a group, and what its steps make of it.
        if not self.compiled:
            rest += batch * c.n_kv_heads * c.head_dim * max(5.5 * max_len, 28 * config.group_size)
        return rest + scores + partial

    @property
    def cache(self):
        """The first layer's cache, which holds the schedule of all."""
        return self.layers[0].cache

    def groups(self, L, chunk=None):
        """(rows, tokens of each row) that `prefill` computes at once for prompts of L tokens."""
        if chunk is None and self.embed.weight.device.type == "cpu":
            return 1, 1024
        chunk = chunk or 4096
        return max(1, chunk // max(L, 128)), chunk  # quantizing rounds short rows up to that

    @torch.no_grad()
    def prefill(self, tokens, lengths=None, chunk=None):
        """Whole prompts at once: tokens [B, L] right-padded, lengths [B] ints -> logits [B, V] of each row's last token.

        chunk   tokens computed at once, which bounds the memory: short rows together, a long row in parts. By default 4096;
                on a CPU 1024 and every row by itself, so that its bytes do not depend on the rows beside it
        raises  ValueError: NaN or inf in K, V or the logits (one sync for all layers)
        """
        B, L = tokens.shape
        lengths = [L] * B if lengths is None else [int(n) for n in lengths]
        rows, chunk = self.groups(L, chunk)
        self.cache.pos.copy_(torch.tensor(lengths))
        parts = [self.prefill_rows(tokens[r : r + rows, : max(lengths[r : r + rows])], r, chunk) for r in range(0, B, rows)]
        self.cache.lengths[:] = lengths
        logits = torch.cat([x for x, _ in parts])
        if not torch.stack([torch.isfinite(logits).all(), *(ok for _, ok in parts)]).all():
            raise ValueError(f"the model computes NaN or inf: its weights are damaged or {logits.dtype} is too narrow for it")
        return logits

    @torch.no_grad()
    def prefill_rows(self, tokens, row, chunk):
        """`prefill` of some rows: tokens [b, L] of the rows from `row` on, whose lengths `cache.pos` holds -> logits [b, V], finite."""
        pos = self.cache.pos[row : row + len(tokens)]
        x, finite = self.embed(tokens), []
        cos, sin = self.rope(torch.arange(x.shape[1], device=x.device)[None], pos)
        for layer in self.layers:
            x, ok = layer.prefill(x, cos, sin, pos, row, chunk, self.quantize)
            finite.append(ok)
        # The head runs on one position a row: all of them would be L x vocabulary numbers that nobody reads.
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), pos - 1])), torch.stack(finite).all()

    @torch.no_grad()
    def decode(self, tokens, blocks):
        """One token a row: tokens [B, 1] at cache.pos -> logits [B, V]; advances the positions. Tensors only, no sync.

        The host calls `cache.advance()` before, passes `blocks = cache.blocks(cache.length)`, and `flush` when `cache.due()`.
        """
        pos = self.cache.pos
        x, cos, sin = self.start(self, tokens, pos)
        q = self.before(self.layers[0], x, cos, sin, pos)
        for layer, following in pairwise(self.layers):
            x, q = self.between(layer, following, x, self.attend(layer.cache, q, pos, blocks), cos, sin, pos)
        y = self.attend(self.layers[-1].cache, q, pos, blocks)
        pos += 1
        return self.last(self.layers[-1], self.norm, self.head, x, y)

    @torch.no_grad()
    def flush(self):
        """Quantizes the blocks of K that the last decode step completed."""
        for layer in self.layers:
            self.flush_block(layer, self.cache.pos - 1)

    def compile(self, prefill=False):
        """Compiles the decode step: one compilation serves every layer, so that its time does not grow with depth.

        prefill  also what quantizes the prompts; it takes longer than it saves, unless the prompts are many
        """
        cuda = self.embed.weight.device.type == "cuda"
        compiled = lambda fn: torch.compile(fn, fullgraph=True, options=SMALL if cuda else None)
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # a compilation for every pair of bits
        self.start, self.flush_block, self.compiled = compiled(_start), compiled(_flush), True
        linear = partial(compiled_weights, joined=not self.config.parallel) if cuda and self.config.weights is not None else compiled
        self.before, self.between, self.last = map(linear, (Block.before, _between, _last))
        attention = {}

        def attend(cache, *args):  # apart from the linear layers: it has options of its own. A CUDA graph joins the parts, so the seams cost nothing
            kind = type(cache)
            if kind not in attention:
                attention[kind] = compiled_attention(kind, "cuda" if cuda else "cpu")
            return attention[kind](cache, *args)

        self.attend = attend
        if prefill:
            groups = compiled(quantized_groups)

            def quantize(x, keep, *how):
                if len(x) == 1:  # the compiler would take it for a constant
                    return quantized_groups(x, keep, *how)
                for y in (x, keep):  # one compilation for all lengths
                    torch._dynamo.maybe_mark_dynamic(y, 0)
                return groups(x, keep, *how)

        self.quantize = quantize if prefill else quantized_groups


def layer_bits(file, n_layers):
    """(k_bits, v_bits) of every layer from a KVTuner preset (arXiv 2502.04420) or from plain text.

    A preset names each layer by its number, then `nbits_key` and `nbits_value`; plain text has one line "K-bits V-bits" a layer.
    raises ValueError: unreadable, or not exactly one pair a layer
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    preset = re.findall(r"(\d+)\W+nbits_key\W+(\d+)\W+nbits_value\W+(\d+)", text)
    pairs = sorted([int(x) for x in line] for line in preset)  # by layer
    pairs = pairs or [[i, *map(int, line)] for i, line in enumerate(re.findall(r"(?m)^\s*(\d+)[\s,]+(\d+)\s*$", text))]
    if [layer for layer, *_ in pairs] != list(range(n_layers)):
        raise ValueError(f"{file} gives bits for {len(pairs)} layers, the model has {n_layers} (one pair each, numbered from 0)")
    return [(k_bits, v_bits) for _, k_bits, v_bits in pairs]


def _flush(layer, pos):
    layer.cache.flush(pos)


def _start(model, tokens, pos):
    """x [B, 1, dim] and the rotation of the tokens [B, 1] at pos [B]."""
    return model.embed(tokens), *model.rope(pos[:, None])


def _attend(cache, q, pos, blocks):
    return cache.attention(q, pos, blocks)


def _between(layer, following, x, y, cos, sin, pos):
    """From the attention y of one layer to the query of the next: x, q. One function, so that a row's last sum and the next norm are one kernel."""
    x = layer.after(x, y)
    return x, following.before(x, cos, sin, pos)


def _last(layer, norm, head, x, y):
    return head(norm(layer.after(x, y)[:, 0]))


# Inductor's options for the small kernels between products: those that need nothing of each other are one launch, and each starts while the
# one before it ends. Without, a layer of one row takes 5 us more.
SMALL = {"combo_kernels": True, "triton.enable_pdl": True}
# The fastest of those timed on an H200, see results/weights-forms.md
SUMS = {"XBLOCK": 4, "R0_BLOCK": 128, "num_warps": 1, "num_stages": 1}  # launch of a QuantizedLinear with one row, see `weight_launches`
PRODUCTS = {  # and with more, by bits and XBLOCK: x rows, y outputs. 16 outputs a warp: with more the weights go through shared memory one by one
    (8, 8): {"YBLOCK": 32, "R0_BLOCK": 64, "num_warps": 2, "num_stages": 3},
    (8, 16): {"YBLOCK": 32, "R0_BLOCK": 32, "num_warps": 2, "num_stages": 3},
    (8, 32): {"YBLOCK": 64, "R0_BLOCK": 64, "num_warps": 4, "num_stages": 3},
    (8, 64): {"YBLOCK": 64, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 4},
    (8, 128): {"YBLOCK": 64, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 3},
    (4, 8): {"YBLOCK": 32, "R0_BLOCK": 64, "num_warps": 2, "num_stages": 3},
    (4, 16): {"YBLOCK": 32, "R0_BLOCK": 32, "num_warps": 2, "num_stages": 3},
    (4, 32): {"YBLOCK": 64, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 3},
    (4, 64): {"YBLOCK": 64, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 3},
    (4, 128): {"YBLOCK": 64, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 3},
}


def compiled_weights(fn, joined=True):
    """`fn`, compiled so that a QuantizedLinear reads its packed words in the kernel that multiplies (Inductor's native_matmul).

    joined  small kernels that do not depend on each other as one launch: not where two such layers do not, which would lose their launches
    """
    from torch._inductor.virtualized import V

    limits = dict.fromkeys(("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold", "max_fusion_size"), 2048)
    options = {**SMALL, "combo_kernels": joined, "inductor_choices_class": weight_launches, "triton.native_matmul": True, "shape_padding": False,
               "loop_ordering_after_fusion": False, **limits, "pick_loop_orders": False}  # or the parts of a sum would lie innermost, and be added up outside the products' kernel
    packed, written = (torch.compile(fn, fullgraph=True, dynamic=False, options=o) for o in (options, SMALL))
    choices = weight_launches()

    def call(*args):
        x = next(x for x in args if torch.is_tensor(x))
        with V.set_choices_handler(choices):  # attention, compiled in between, has its own
            return (packed if few(x) else written)(*args)

    return call


def weight_launches():
    """Inductor's choices for `compiled_weights`: its own, but for fixed launches of the kernels that read packed words, and what may join them."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.triton import FixedTritonConfig
    from torch._inductor.virtualized import V

    def packed(features):  # a reduction over an int32 tensor from outside; the pairs of scale and zero are views, made inside
        reads = {r.name for n in features.scheduler_nodes() if n.is_reduction() for r in n.read_writes.reads}
        return any(V.graph.get_dtype(name) == torch.int32 for name in reads if name in V.graph.graph_inputs)

    def sources(node):
        """The nodes of Inductor's scheduler whose results `node` reads."""
        buffers = (node.scheduler.name_to_buf.get(dep.name) for dep in node.read_writes.reads)
        return [b.defining_op for b in buffers if b is not None and b.defining_op is not None]

    def turns(node):
        """Does it read what products leave, columns, and so make rows of them?"""
        return any(is_product(n) or any(map(is_product, sources(n))) for n in sources(node))

    attention = type(launches())

    class WeightLaunches(InductorChoices):
        @staticmethod
        def can_fuse(scheduler, node1, node2, shared_data_score):
            # What turns columns into rows is a kernel of its own, of 2 us: inside that of a norm or a sum, one program a row reads
            # single numbers, for 11 to 60 us at 16 rows.
            if any(a.is_reduction() and not is_product(a) and turns(b) for a, b in ((node1, node2), (node2, node1))):
                return False
            return attention.can_fuse(scheduler, node1, node2, shared_data_score)

        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            if not packed(features):
                if "y" in groups[0] and any(map(turns, features.scheduler_nodes())):  # of Inductor's candidates one takes 12.6 us instead of 3, and it chose that
                    rows = min(32, tile_rows(int(groups[0]["y"])))
                    launch = {"YBLOCK": rows, "XBLOCK": 1024 // rows, "num_warps": 4, "num_stages": 1}
                    kernel_kwargs = {**kernel_kwargs, "fixed_config": FixedTritonConfig(launch)}
                return kernel_kwargs
            launch = SUMS
            if "y" in groups[0]:  # a product; a sum has outputs in x
                reads = {r.name for n in features.scheduler_nodes() for r in n.read_writes.reads}
                pairs = any(V.graph.get_dtype(r) == torch.int32 and V.graph.get_numel(r) == groups[0]["y"] for r in reads)
                bits = 8 if pairs else 4  # of 8 bits, an output has one scale and zero
                rows = tile_rows(int(groups[0]["x"]))
                launch = {"XBLOCK": rows, **({"ZBLOCK": 1} if "z" in groups[0] else {}), **PRODUCTS[bits, rows]}
            return {**kernel_kwargs, "fixed_config": FixedTritonConfig(dict(launch))}

        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            return not packed(features) and InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

        @staticmethod
        def reduction_split_factor(device, reduction_numel, numel, inner_reduction):
            return 1  # a norm stays one kernel

        def uuid(self):
            return f"kivi-weights-9 {SUMS} {PRODUCTS}"  # part of the key of the compile caches

    return WeightLaunches()


# ---- loading ------------------------------------------------------------------------------------------------------------

LLAMA = {  # Hugging Face name inside a layer -> parameter of Block, part of a fused one
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("mlp_norm", None),
    "self_attn.q_proj": ("attention.wqkv", 0),
    "self_attn.k_proj": ("attention.wqkv", 1),
    "self_attn.v_proj": ("attention.wqkv", 2),
    "self_attn.o_proj": ("attention.wo", None),
    "self_attn.q_norm": ("attention.q_norm", None),
    "self_attn.k_norm": ("attention.k_norm", None),
    "mlp.gate_proj": ("mlp.w_in", 0),
    "mlp.up_proj": ("mlp.w_in", 1),
    "mlp.down_proj": ("mlp.w_out", None),
}
PHI3 = {name: to for name, to in LLAMA.items() if to[1] is None} | {
    "self_attn.qkv_proj": ("attention.wqkv", None),
    "mlp.gate_up_proj": ("mlp.w_in", None),
}
FALCON = {
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("mlp_norm", None),
    "self_attention.query_key_value": ("attention.wqkv", "groups"),
    "self_attention.dense": ("attention.wo", None),
    "mlp.dense_h_to_4h": ("mlp.w_in", None),
    "mlp.dense_4h_to_h": ("mlp.w_out", None),
}
FALCON_2 = {{"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}.get(name, name): to for name, to in FALCON.items()}
TOP = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}
FALCON_TOP = {"transformer.word_embeddings": "embed", "transformer.ln_f": "norm", "lm_head": "head"}
NAMES = {  # outside the layers, prefix of a layer, inside it
    "llama": (TOP, "model.layers", LLAMA),
    "phi3": (TOP, "model.layers", PHI3),
    "falcon": (FALCON_TOP, "transformer.h", FALCON),
    "falcon 2": (FALCON_TOP, "transformer.h", FALCON_2),
}


def _targets(model):
    """Where each tensor of a checkpoint goes: Hugging Face name -> views of a parameter, in the order of the tensor's rows."""
    params, c, targets, shares = {**dict(model.named_parameters()), **dict(model.named_buffers())}, model.config, {}, {}
    splits = {"attention.wqkv": model.layers[0].attention.sizes, "mlp.w_in": (c.hidden_dim, c.hidden_dim)}

    def add(hf, name, part, split):
        if c.ranks[1] > 1:
            shares[f"{hf}.weight"] = shares[f"{hf}.bias"] = _share(c, name.split(".", 2)[-1], part)
        for kind in ("weight", "bias", "packed", "meta"):
            if f"{name}.{kind}" in params:
                p = params[f"{name}.{kind}"].data
                parts = [p] if part is None else p.split(split)
                if part == "groups":  # Falcon: the queries of one KV head, its key, its value, then the next
                    parts = [x for group in zip(*(x.chunk(c.n_kv_heads) for x in parts)) for x in group]
                targets[f"{hf}.{kind}"] = [parts[part]] if isinstance(part, int) else parts

    top, prefix, inside = NAMES[c.names]
    for hf, name in top.items():
        if not (c.tied and name == "head"):
            add(hf, name, None, None)
    for i in range(c.n_layers):
        for hf, (name, part) in inside.items():
            add(f"{prefix}.{i}.{hf}", f"layers.{i}.{name}", part, splits.get(name))
    return targets, shares


def _share(c, name, part):
    """Where the rows of this process lie in a tensor of the checkpoint, one first row for every view that `add` fills; "columns" where
    its columns do; None for a tensor that every process holds."""
    (rank, n), (H, Hk, hidden), D = c.ranks, c.whole, c.head_dim
    if name in ("attention.wo", "mlp.w_out"):
        return "columns"
    if name not in ("attention.wqkv", "mlp.w_in"):
        return None
    if part == "groups":
        return [rank * c.n_kv_heads * (H // Hk + 2) * D]
    sizes, first = ((H * D, Hk * D, Hk * D), [rank * c.n_heads * D, *[rank * Hk // n * D] * 2]) if name == "attention.wqkv" else (
        (hidden,) * (1 + c.gated), [rank * c.hidden_dim] * (1 + c.gated))
    return [first[part]] if isinstance(part, int) else [sum(sizes[:i]) + x for i, x in enumerate(first)]


def _weight_files(folder):
    """The safetensors files that a checkpoint should have. raises ValueError: its index names others."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):  # none outside the folder
        raise ValueError(f"{index} has no weight_map of file names in its folder: download it again")
    return [folder / f for f in sorted(set(names.values()))]


def _load(model, folder, progress=None):
    """Copies every tensor of the checkpoint into the model, one at a time; reports all missing and unexpected names at once."""
    (targets, shares), device = _targets(model), str(model.embed.weight.device)
    missing, unexpected = set(targets), []
    for file in _weight_files(folder):
        if not file.exists():
            other = "".join(f", only {p.name}" for p in sorted(folder.glob("*.bin"))[:1])  # a pickle: reading it can run its code
            raise ValueError(f"{file} does not exist{other}: download it again; if the checkpoint has no safetensors and you trust it, write them "
                             "with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)")
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                layer = name.removesuffix("weight")
                small = name not in targets and layer + "packed" in targets  # to be quantized
                views = targets.get(layer + "packed" if small else name)
                if views is None:
                    if not name.endswith("rotary_emb.inv_freq") and not (model.config.tied and name.startswith("lm_head.")):
                        unexpected.append(name)
                    continue
                with safe_open(file, framework="pt", device=device) as tensors:  # anew: what is mapped counts as our memory
                    tensor = _slice(tensors.get_slice(name), views, shares[name], model.config.ranks) if shares.get(name) else tensors.get_tensor(name)
                bits, group_size = (32, None) if not small else (8, None) if layer == "lm_head." else model.config.weights
                shape = (sum(map(len, views)), *(n * 32 // bits for n in views[0].shape[1:]))
                if tensor.shape != shape or tensor.is_floating_point() != (small or views[0].is_floating_point()):
                    raise ValueError(f"{name} in {file.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, config.json asks for {shape}")
                parts = {name: tensor}
                if small:
                    parts = quantize_weight(tensor.to(model.embed.weight.dtype), bits, group_size)
                    parts = {layer + kind: part for kind, part in zip(("packed", "meta"), parts)}
                for target, part in parts.items():
                    for view, rows in zip(targets[target], part.split([len(view) for view in targets[target]])):
                        view.copy_(rows)
                    missing.discard(target)
                if progress:
                    progress(1 - len(missing) / len(targets))
                del tensor, parts, part, rows
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated ({error}): download it again") from None
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its config.json; missing: {_some(missing)}; unexpected: {_some(unexpected)}")


def _slice(tensor, views, share, ranks):
    """What this process holds of a tensor in a file, read from there alone. raises ValueError: the tensor ends before it"""
    shape, (rank, n) = tensor.get_shape(), ranks
    if share == "columns":
        if len(shape) == 1:  # the bias of a sum over processes counts once
            return tensor[:] if rank == 0 else torch.zeros_like(tensor[:])
        if shape[1] % n:
            raise ValueError(f"{shape[1]} columns of a tensor cannot be divided among {n} processes")
        width = shape[1] // n
        return tensor[:, rank * width : (rank + 1) * width]
    rows = [len(view) for view in views]
    if len(share) < len(rows):  # the groups of Falcon lie together
        share = [share[0] + sum(rows[:i]) for i in range(len(rows))]
    return torch.cat([tensor[a : a + b] for a, b in zip(share, rows)])


def _some(names):
    names = sorted(names)
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"
