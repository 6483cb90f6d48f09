"""KVQuant: codes of 2 or 3 bits at levels that suit the model, outliers apart (arXiv 2401.18079).

Keys are stored as they are before RoPE, where their channels keep their ranges: those are measured
once, on some text, and V has a range for each token. In a range lie 2^bits levels, of one codebook
a layer for K and one for V, fitted to the same text. The outermost numbers of a token are stored by
themselves, and so is its first token, to which models attend as to a sink. Attention reads

    level[code] * scale + zero + outlier       zero: the middle of a range; scale: half of it

and turns K by its position. Every token gets codes as it comes: no window of newest ones is exact.

As published: ranges (99 % of a channel), codebooks, K before RoPE, the exact first token.
Not: a token has a fixed number of outliers, the even one nearest to 1 % of its channels and at
     least 2, since shapes are static: what its codes miss most, which measured better. In the paper
     they are all that lies beyond a range. At its ends lie keys of frequent tokens, many in a tie.
Not: levels are plain k-means, without weights of gradients, and 2 bits have no Q-Norm. On a small
     model neither made a difference, and so forward passes calibrate.
Beyond: `residual` newest tokens are exact if it is above 0."""
from dataclasses import dataclass, field
from hashlib import sha256

import torch

from checkpoint.rope import rotate
from kivi import Cache
from neighbours import fitted
from neighbours.nuq_levels import (
    BITS, largest, nearest, outliers, pack, rotation, tokenwise, unpack, value_range,
)
from quantize import KVConfig, slices, take


@dataclass(frozen=True)
class NuqConfig(KVConfig):
    """What a NuqCache stores, and the constants of its layer."""

    group_size: int = 1  # there are no groups
    residual: int = 0
    sink: int = 1
    # freq [D / 2]; k_zero, k_scale [Hk, 1, D]; k_levels, v_levels [2^bits]; all float32
    tables: dict = field(default=None, compare=False, repr=False)

    def check(self, head_dim):
        """Raises ValueError for what cannot be stored."""
        if (self.group_size, self.boost, self.v_group_size) != (1, 0, 0):
            raise ValueError("nuq has ranges of whole channels of K and whole tokens of V: "
                             "leave out group_size, v_group_size and boost")
        if min(self.residual, self.sink) < 0:
            raise ValueError("residual and sink must be 0 or more tokens, got "
                             f"{self.residual} and {self.sink}")
        if head_dim % 8:
            raise ValueError(f"nuq packs 8 channels at a time, and head_dim {head_dim} is no "
                             "multiple of 8: choose another kv")

    def make(self, *shape, **kind):
        return NuqCache(self, *shape, **kind)

    def stored_bits(self, head_dim):
        """Bits of a number with its share of outliers, scale and zero; K and V averaged."""
        channels = self.tables["k_zero"].numel()
        outlier = 16 + 8 * number_of(channels).itemsize
        return (self.k_bits + self.v_bits) / 2 + (outliers(channels) * outlier + 16) / channels


def number_of(channels):
    """The dtype of a channel's number."""
    return torch.uint8 if channels <= 256 else torch.int16


class NuqCache(Cache):
    """One layer's cache. The arguments behind the config are those of `kivi.FullCache`."""

    @torch.inference_mode(False)
    def __init__(self, config, batch, n_kv_heads, max_len, head_dim, *, sliding=None,
                 dtype=torch.float32, device="cpu"):
        config.check(head_dim)
        super().__init__(batch, n_kv_heads, max_len, head_dim, 128, sliding, dtype, device)
        self.config, self.slot = config, config.slot
        for name, x in config.tables.items():  # no buffers, which `reset` empties
            setattr(self, name, x.to(device))
        self.metadata = dtype if dtype == torch.float32 else torch.float16  # of outliers and ranges
        tokens, channels = len(self.index), n_kv_heads * head_dim
        heads, of_token = (batch, n_kv_heads), (batch, 1, tokens)
        for name, bits in (("k", config.k_bits), ("v", config.v_bits)):
            self.add(f"{name}_packed", (*heads, tokens, head_dim * bits // 8), torch.uint8)
            self.add(f"{name}_outlier", (*of_token, outliers(channels)), self.metadata)
            self.add(f"{name}_channel", (*of_token, outliers(channels)), number_of(channels))
            self.add(f"{name}_window", (*heads, config.sink + config.residual + 1, head_dim), dtype)
        self.add("v_scale", (*of_token, 1), self.metadata)
        self.add("v_zero", (*of_token, 1), self.metadata)

    def used(self, name, length):
        return getattr(self, name).shape[2] if name.endswith("window") else length

    def options(self):
        tables = repr([x.tolist() for x in self.config.tables.values()])
        return super().options() | {"tables": sha256(tables.encode()).hexdigest()}

    def traffic(self, length):
        seen = min(length, self.sliding or length)
        return sum(x[0, :, : self.used(name, seen)].nbytes
                   for name, x in self.contents().items() if name != "pos")

    def quantize_keys(self, pos):
        """Nothing: `write` has done it."""

    def write(self, k, v, pos):
        super().write(k, v, pos)
        for name, x in self.encoded(k, v, pos).items():
            getattr(self, name)[self.rows[:, None], :, pos] = x.transpose(1, 2)

    def fill(self, k, v, start, ends, row=0):
        rows, starts, stops = slice(row, row + len(k)), start[:, None], ends[:, None]
        end = min(max(self.lengths[rows]) + k.shape[2], self.max_len)
        width = 16 * k[:, :, 0].numel()  # numbers of temporaries a token: about 16 times those of K
        for first, last in slices(min(self.lengths[rows]), end, width, 1):
            t = self.index[None, first:last]
            new = ((t >= starts) & (t < stops))[:, None, :, None]
            for name, x in self.encoded(take(k, t - starts), take(v, t - starts), t).items():
                place = getattr(self, name)[rows, :, first:last]
                place.copy_(torch.where(new, x, place))
        t = self.config.in_window(ends - 1)  # [B, slots]
        place = self.rows[rows, None], slice(None), self.slot(t)
        new = ((t >= starts) & (t < stops))[..., None, None]
        for window, x in ((self.k_window, k), (self.v_window, v)):
            x = take(x, t - starts).transpose(1, 2)  # [B, slots, Hk, D]
            window[place] = torch.where(new, x, window[place])

    def encoded(self, k, v, t):
        """What is stored of tokens t [B or 1, n], by buffer: k, v [B, Hk, n, D] -> [B, .., n, ..].
        """
        cos, sin = rotation(t, self.freq)
        k, v = rotate(k.float(), cos, -sin), v.float()
        zero, scale = (x.to(self.metadata) for x in value_range(v))
        return {"v_zero": zero, "v_scale": scale,
                **self.coded("v", v, zero.float(), scale.float()),
                **self.coded("k", k, self.k_zero, self.k_scale)}

    def coded(self, name, x, zero, scale):
        """Codes of x [B, Hk, n, D]. The numbers of a token with the largest errors are outliers,
        stored as that error beside their code (KVQuant: the number itself, and no code)."""
        levels, limit = getattr(self, f"{name}_levels"), torch.finfo(self.metadata).max
        codes = nearest((x - zero) / scale, levels)
        missed = tokenwise(x - (levels[codes.int()] * scale + zero))
        channel = largest(missed.abs(), outliers(missed.shape[-1]))
        missed = missed.gather(-1, channel)
        return {f"{name}_packed": pack(codes, getattr(self.config, f"{name}_bits")),
                f"{name}_outlier": missed.clamp(-limit, limit).to(self.metadata),
                f"{name}_channel": channel.to(self.k_channel.dtype)}

    def read(self, pos, n, heads, rows=slice(None)):
        """(k, v) float32 [B, heads, n, D]: the first n tokens as a query at pos [B] reads them."""
        zero, scale = (x[rows, :, :n].float() for x in (self.v_zero, self.v_scale))
        v = self.decoded("v", zero, scale, n, heads, rows)
        k = self.decoded("k", self.k_zero[heads], self.k_scale[heads], n, heads, rows)
        k = rotate(k, *rotation(self.index[None, :n], self.freq))
        c, row = self.config, self.rows[: len(pos), None]
        t = c.in_window(pos)  # [B, slots]
        exact = ((t < c.sink) | (t > pos[:, None] - c.residual))[..., None, None]
        for x, window in ((k, self.k_window), (v, self.v_window)):
            place, slot = (row, slice(None), t), (row, slice(None), self.slot(t))
            x[place] = torch.where(exact, window[rows, heads][slot].float(), x[place])
        return k, v

    def decoded(self, name, zero, scale, n, heads, rows):
        """The first n tokens by their codes and outliers: float32 [B, heads, n, D]."""
        packed, outlier, channel = (getattr(self, f"{name}_{part}")[rows, :, :n]
                                    for part in ("packed", "outlier", "channel"))
        codes = unpack(packed[:, heads], getattr(self.config, f"{name}_bits")).int()
        x = tokenwise(getattr(self, f"{name}_levels")[codes] * scale + zero)
        channel = channel.long() - (heads.start or 0) * self.head_dim
        ours = (channel >= 0) & (channel < x.shape[-1])  # and not of other heads
        x = x.scatter_add(-1, torch.where(ours, channel, 0), torch.where(ours, outlier.float(), 0))
        return x[:, 0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def portions(self, n):
        if not torch.compiler.is_compiling():
            return super().portions(n)
        # Not by n, of which one compilation serves all. Two, as joining them makes the result one
        # piece of memory: what CUDA's attention returns is not, and `view` needs it.
        middle = self.n_kv_heads // 2
        return [slice(0, middle), slice(middle, self.n_kv_heads)][middle == 0 :]


def configs(bits, file, model):
    """The configs of nuq2:FILE or nuq3:FILE, one a layer; the file holds what `calibrate` found.

    raises ValueError: the file cannot be used, or the model has no such cache
    """
    c = model.config
    if c.rope_scaling.get("rope_type") == "dynamic":
        raise ValueError("nuq does not work with a rotary embedding of type dynamic, whose angles "
                         "depend on how many tokens there are: choose another kv")
    ranges = [c.n_layers, c.n_kv_heads, 1, c.head_dim]
    shapes = {"k_zero": ranges, "k_scale": ranges}
    shapes |= {f"{name}_levels{n}": [c.n_layers, 2**n] for name in "kv" for n in BITS}
    tensors = fitted.read(file, model, "nuq", shapes)
    tables = {"k_zero": tensors["k_zero"], "k_scale": tensors["k_scale"],
              "k_levels": tensors[f"k_levels{bits}"], "v_levels": tensors[f"v_levels{bits}"]}
    return [NuqConfig(bits, bits, tables={name: x[layer] for name, x in tables.items()}
                      | {"freq": model.freq}) for layer in range(c.n_layers)]
