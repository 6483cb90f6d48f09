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
from torch.nn.attention.bias import causal_lower_right

from kivi import PRESETS, FullCache, KiviCache, KVConfig, compiled_attention, slices

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


def causal_attention(q, k, v):
    """Exact attention of the last c of T tokens: q [B, H, c, D], k, v [B, Hk, T, D] -> [B, H, c, D]. No [T, T] mask."""
    c, T = q.shape[2], k.shape[2]
    if c == T:
        how = {"is_causal": True}
    elif q.is_cuda:
        how = {"attn_mask": causal_lower_right(c, T)}  # a flag of the flash kernel, not a tensor
    else:
        how = {"attn_mask": torch.ones(c, T, dtype=torch.bool, device=q.device).tril(T - c)}  # bounded by the chunk of queries
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)


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

    def forward(self, x, cos, sin):
        """Exact causal attention over x [B, T, dim]. Reads no cache."""
        return self.after(x, causal_attention(*self.attention.qkv(self.attention_norm(x), cos, sin)))

    def prefill(self, x, cos, sin, lengths, row, chunk):
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
            x[:, a:b] = self.after(part, causal_attention(q, k[:, :, :b], v[:, :, :b]))
        self.cache.fill(k, v, lengths, row)
        return x, torch.stack(finite).all()

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
        options override the preset: k_bits, v_bits, group_size, residual, sink
        raises  ValueError: unknown kv, a combination the cache refuses, or max_len beyond the model's context
        """
        c = self.config
        if max_len > c.max_len:
            raise ValueError(f"{max_len} tokens exceed the model's context of {c.max_len}: shorten the prompt or --max-new-tokens")
        where = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        for layer, config in zip(self.layers, self.kv_configs(kv, **options)):
            if config is None:
                layer.cache = FullCache(batch, c.n_kv_heads, max_len, c.head_dim, **where)
            else:
                layer.cache = KiviCache(batch, c.n_kv_heads, max_len, c.head_dim, **vars(config), **where)
        first = self.layers[0].cache
        for layer in self.layers[1:]:  # one schedule for all layers
            layer.cache.pos, layer.cache.index, layer.cache.lengths = first.pos, first.index, first.lengths

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
        returns  dict; full precision counts as codes. The caches' parts equal the allocation; activations are an upper bound
                 of what prefill or a decode step allocates beside weights and caches, whichever is more
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
        eager = self.decode_block is Block.decode  # then attention writes one layer's K or V out in float32
        return rest + scores + partial + eager * batch * c.n_kv_heads * max_len * c.head_dim * 5.5

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
        cos, sin = self.rope(torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x, ok = layer.prefill(x, cos, sin, pos, row, chunk)
            finite.append(ok)
        # The head runs on one position a row: all of them would be L x vocabulary numbers that nobody reads.
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), pos - 1])), torch.stack(finite).all()

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

    A preset names `nbits_key` and `nbits_value` once a layer, in order; plain text has one line "K-bits V-bits" a layer.
    raises ValueError: unreadable, or not exactly one pair a layer
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    pairs = re.findall(r"nbits_key\W+(\d+)\W+nbits_value\W+(\d+)", text) or re.findall(r"(?m)^\s*(\d+)[\s,]+(\d+)\s*$", text)
    if len(pairs) != n_layers:
        raise ValueError(f"{file} gives bits for {len(pairs)} layers, the model has {n_layers}")
    return [(int(k), int(v)) for k, v in pairs]


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
