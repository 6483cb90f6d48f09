"""A Llama-shaped transformer that reads Hugging Face checkpoints and decodes through a KV cache (kivi.py).

One file, one architecture: what differs between Llama, Mistral, Qwen and their kin is data in `ModelConfig`, read from
`config.json`. Weights come straight from safetensors, one tensor at a time, without a conversion step.

Three ways through the same layers: `model(tokens)` is the plain causal forward (scoring, parity), `prefill` runs whole
prompts with exact attention and fills the caches, `decode` runs one token a row through the caches and is what gets
compiled.
"""
import json
import re
from dataclasses import dataclass, field
from math import log, pi
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F

from kivi import PRESETS, FullCache, KiviCache, compiled_attention

SUPPORTED = {  # architectures entry of config.json -> what its config.json leaves unsaid
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}


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
    eos: tuple = ()

    @classmethod
    def from_folder(cls, folder):
        """Reads `config.json` (and `generation_config.json` when present) of a Hugging Face checkpoint folder.

        raises ValueError: no such file, not JSON, an unknown architecture or a missing entry; one line that says which
        """
        raw = _read_json(Path(folder) / "config.json")
        arch = (raw.get("architectures") or ["none named"])[0]
        if arch not in SUPPORTED:
            raise ValueError(f"architecture {arch} is not supported; supported: {', '.join(SUPPORTED)}")
        try:
            heads = raw["num_attention_heads"]
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            config = cls(
                vocab_size=raw["vocab_size"], dim=raw["hidden_size"], n_layers=raw["num_hidden_layers"], n_heads=heads,
                n_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                hidden_dim=raw["intermediate_size"], max_len=raw.get("max_position_embeddings", 2048),
                norm_eps=raw.get("rms_norm_eps", 1e-5), rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
                rope_scaling=rope, tied=raw.get("tie_word_embeddings", False),
                qkv_bias=raw.get("attention_bias", False), o_bias=raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
            )
        except KeyError as error:
            raise ValueError(f"{folder}/config.json has no entry {error}") from None
        for name, value in SUPPORTED[arch].items():
            setattr(config, name, value)
        if raw.get("sliding_window") and raw.get("use_sliding_window", True):
            config.max_len = min(config.max_len, raw["sliding_window"])  # up to here the window changes nothing; beyond is refused
        generation = Path(folder) / "generation_config.json"
        eos = (_read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
        config.eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        return config


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: a checkpoint is a folder in the Hugging Face layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def rope_frequencies(config):
    """Rotation per token of each channel pair, float32 [D / 2], after the config's `rope_scaling`."""
    D, scaling = config.head_dim, config.rope_scaling
    freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return freq / scaling["factor"]
    if kind == "llama3":
        # Slow pairs are stretched by `factor`, fast ones kept, those in between blended (Llama 3.1 reference code).
        old, low, high = scaling["original_max_position_embeddings"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((old * freq / (2 * pi) - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * freq / scaling["factor"] + smooth * freq
    if kind != "default":
        raise ValueError(f"rope_scaling of type {kind} is not supported; supported: default, linear, llama3")
    return freq


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotate(x, cos, sin):
    """Rotary embedding, Hugging Face convention (halves, not interleaved pairs): x [B, H, T, D]; cos, sin [B, 1, T, D / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.sizes = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.wqkv = nn.Linear(c.dim, sum(self.sizes), bias=c.qkv_bias)
        self.wo = nn.Linear(self.sizes[0], c.dim, bias=c.o_bias)
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
        self.w_in = nn.Linear(c.dim, 2 * c.hidden_dim, bias=c.mlp_bias)  # gate and up in one product
        self.w_out = nn.Linear(c.hidden_dim, c.dim, bias=c.mlp_bias)

    def forward(self, x):
        gate, up = self.w_in(x).chunk(2, -1)
        return self.w_out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(c.dim, c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.dim, c.norm_eps), MLP(c)
        self.cache = None

    def forward(self, x, cos, sin, lengths=None):
        """Exact causal attention over x [B, T, dim]; with lengths [B], K and V also go into the cache."""
        q, k, v = self.attention.qkv(self.attention_norm(x), cos, sin)
        if lengths is not None:
            self.cache.fill(k, v, lengths)
            self.finite = torch.isfinite(k).all() & torch.isfinite(v).all()  # softmax may swallow a NaN; asked in `prefill`
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.attention.out(y)
        return x + self.mlp(self.mlp_norm(x))

    def decode(self, x, cos, sin, pos, blocks):
        """One token a row through the cache: x [B, 1, dim], pos [B] -> [B, 1, dim]. The unit of compilation."""
        return self.after(x, self.cache.attention(self.before(x, cos, sin, pos), pos, blocks))

    def before(self, x, cos, sin, pos):
        """The part of `decode` before attention: puts the token's K and V into the cache and returns q [B, H, 1, D]."""
        q, k, v = self.attention.qkv(self.attention_norm(x), cos, sin)
        self.cache.update(k, v, pos)
        return q

    def after(self, x, y):
        """The part of `decode` after attention: x [B, 1, dim], y [B, H, 1, D] -> [B, 1, dim]."""
        x = x + self.attention.out(y)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.decode_block, self.flush_block = Block.decode, _flush

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """Loads a Hugging Face checkpoint folder (single or sharded safetensors) onto `device` in `dtype`.

        raises ValueError: a file is missing, truncated or holds other tensors than `config.json` describes
        """
        config = ModelConfig.from_folder(folder)
        with torch.device("meta"):
            model = cls(config)
        model.to(dtype).to_empty(device=device)
        _load(model, Path(folder))
        if config.tied:
            model.head.weight = model.embed.weight
        model.register_buffer("freq", rope_frequencies(config).to(device), persistent=False)
        return model.eval().requires_grad_(False)

    def rope(self, pos):
        """cos, sin [B, 1, T, D / 2] float32 of positions pos [B, T]."""
        angle = pos[:, None, :, None].float() * self.freq
        return angle.cos(), angle.sin()

    def forward(self, tokens):
        """Plain causal forward: tokens [B, T] -> logits [B, T, V]. Reads no cache."""
        x = self.embed(tokens)
        cos, sin = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))

    def setup_caches(self, batch, max_len, kv="kivi2", **options):
        """Allocates one cache a layer.

        kv      "bf16" (full precision, in the model's dtype), a name of kivi.PRESETS, or "kvtuner:FILE" (see `layer_bits`)
        options override the preset: k_bits, v_bits, group_size, residual, sink, shrink
        raises  ValueError: unknown kv, a combination the cache refuses, or max_len beyond the model's context
        """
        c = self.config
        if max_len > c.max_len:
            raise ValueError(f"{max_len} tokens exceed the model's context of {c.max_len}: shorten the prompt or --max-new-tokens")
        if kv.startswith("kvtuner:"):
            configs = [{"k_bits": k, "v_bits": v} for k, v in layer_bits(kv.removeprefix("kvtuner:"), c.n_layers)]
        elif kv in PRESETS:
            configs = [vars(PRESETS[kv])] * c.n_layers
        elif kv != "bf16":
            raise ValueError(f"unknown kv {kv!r}; known: bf16, {', '.join(PRESETS)}, kvtuner:FILE")
        where = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        for i, layer in enumerate(self.layers):
            if kv == "bf16":
                layer.cache = FullCache(batch, c.n_kv_heads, max_len, c.head_dim, **where)
            else:
                layer.cache = KiviCache(batch, c.n_kv_heads, max_len, c.head_dim, **{**configs[i], **options}, **where)
        first = self.layers[0].cache
        for layer in self.layers[1:]:  # one schedule for all layers
            layer.cache.pos, layer.cache.index, layer.cache.lengths = first.pos, first.index, first.lengths

    @property
    def cache(self):
        """The first layer's cache, which holds the schedule of all."""
        return self.layers[0].cache

    @torch.no_grad()
    def prefill(self, tokens, lengths=None):
        """Whole prompts at once: tokens [B, L] right-padded, lengths [B] ints -> logits [B, V] of each row's last token.

        raises ValueError: NaN or inf in K, V or the logits (one sync for all layers)
        """
        B, L = tokens.shape
        lengths = [L] * B if lengths is None else [int(n) for n in lengths]
        self.cache.pos.copy_(torch.tensor(lengths))
        x = self.embed(tokens)
        cos, sin = self.rope(torch.arange(L, device=tokens.device)[None])
        for layer in self.layers:
            x = layer(x, cos, sin, self.cache.pos)
        self.cache.lengths[:] = lengths
        # The head runs on one position a row: all of them would be L x vocabulary numbers that nobody reads.
        logits = self.head(self.norm(x[torch.arange(B, device=x.device), self.cache.pos - 1]))
        if not torch.stack([torch.isfinite(logits).all(), *(layer.finite for layer in self.layers)]).all():
            raise ValueError(f"the model computes NaN or inf: its weights are damaged or {x.dtype} is too narrow for it")
        return logits

    @torch.no_grad()
    def decode(self, tokens, blocks):
        """One token a row: tokens [B, 1] at cache.pos -> logits [B, V]; advances the positions. Tensors only, no sync.

        The host calls `cache.advance()` before, passes `blocks = cache.blocks(cache.length)`, and `flush` when `cache.due()`.
        """
        pos = self.cache.pos
        x = self.embed(tokens)
        cos, sin = self.rope(pos[:, None])
        for layer in self.layers:
            x = self.decode_block(layer, x, cos, sin, pos, blocks)
        pos += 1
        return self.head(self.norm(x[:, 0]))

    @torch.no_grad()
    def flush(self):
        """Quantizes the blocks of K that the last decode step completed."""
        for layer in self.layers:
            self.flush_block(layer, self.cache.pos - 1)

    def compile(self):
        """Compiles the decode step: one compilation serves every layer, so that its time does not grow with depth."""
        compiled = lambda fn: torch.compile(fn, fullgraph=True)
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # a compilation for every pair of bits
        self.flush_block = compiled(_flush)
        if self.embed.weight.device.type != "cuda":
            self.decode_block = compiled(Block.decode)
            return
        # Attention alone gets the options that suit it; a CUDA graph joins the parts, so the seams cost nothing.
        before, after, attention = compiled(Block.before), compiled(Block.after), {}

        def decode_block(layer, x, cos, sin, pos, blocks):
            kind = type(layer.cache)
            if kind not in attention:
                attention[kind] = compiled_attention(kind, "cuda")
            q = before(layer, x, cos, sin, pos)
            return after(layer, x, attention[kind](layer.cache, q, pos, blocks))

        self.decode_block = decode_block


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


# ---- loading ------------------------------------------------------------------------------------------------------------

NAMES = {  # Hugging Face name inside a layer -> parameter of Block, part of a fused one
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
TOP = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}


def _targets(model):
    """Where each tensor of a checkpoint goes: Hugging Face name -> view of a parameter."""
    params, c, targets = dict(model.named_parameters()), model.config, {}
    splits = {"attention.wqkv": model.layers[0].attention.sizes, "mlp.w_in": (c.hidden_dim, c.hidden_dim)}

    def add(hf, name, part, split):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in params:
                p = params[f"{name}.{kind}"].data
                targets[f"{hf}.{kind}"] = p if part is None else p.split(split)[part]

    for hf, name in TOP.items():
        if not (c.tied and name == "head"):
            add(hf, name, None, None)
    for i in range(c.n_layers):
        for hf, (name, part) in NAMES.items():
            add(f"model.layers.{i}.{hf}", f"layers.{i}.{name}", part, splits.get(name))
    return targets


def _load(model, folder):
    """Copies every tensor of the checkpoint into the model, one at a time; reports all missing and unexpected names at once."""
    targets = _targets(model)
    index = folder / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    missing, unexpected = set(targets), []
    for file in files:
        if not (folder / file).exists():
            other = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"found only {other[0]}: convert it to safetensors first" if other else "is the download complete?"
            raise ValueError(f"{folder / file} does not exist; {hint}")
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name not in targets:
                        if not name.endswith("rotary_emb.inv_freq") and not (model.config.tied and name == "lm_head.weight"):
                            unexpected.append(name)
                        continue
                    tensor = tensors.get_tensor(name)
                    if tensor.shape != targets[name].shape:
                        raise ValueError(f"{name} in {file} has shape {tuple(tensor.shape)}, config.json asks for {tuple(targets[name].shape)}")
                    targets[name].copy_(tensor)
                    missing.discard(name)
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is damaged or truncated ({error}): download it again") from None
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its config.json; missing: {_some(missing)}; unexpected: {_some(unexpected)}")


def _some(names):
    names = sorted(names)
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"
