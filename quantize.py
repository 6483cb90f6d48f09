"""Group-wise asymmetric quantization and bit packing (KIVI, arXiv 2402.02750, section 3).

A group of G consecutive elements is stored as integers 0 .. 2^bits - 1 and two numbers of x.dtype:

    zero  = min(group)                           exact: it is an element of the group
    scale = (max(group) - min(group)) / (2^bits - 1)
    codes = round((x - zero) / scale)            half to even
    x_hat = codes * scale + zero

Keys are grouped along tokens (per channel), values along channels (per token): `dim` says which.
All arithmetic runs in float32 against the *stored* (rounded) scale, so that a scale in bfloat16
adds no systematic error.
"""
from dataclasses import dataclass
from math import lcm

import torch

BITS = (2, 4, 8)
FILL = 2**24  # elements of K that are quantized at once: temporaries are several times that


def group_codes(x, bits, dim=-1, shrink=1.0):
    """`quantize` where all of dimension `dim` is one group, and without any check.

    x [.., G, ..] -> codes uint8 like x; scale, zero in x.dtype with G -> 1
    shrink  the codes span this part of the range, around its middle: what lies outside is clipped,
            the rest is rounded more finely
    """
    top = 2**bits - 1
    low = x.amin(dim, keepdim=True)
    high = x.amax(dim, keepdim=True)
    if shrink != 1:
        margin = (high.float() - low.float()) * ((1 - shrink) / 2)
        low = (low.float() + margin).to(x.dtype)
        high = (high.float() - margin).to(x.dtype)
    scale = ((high.float() - low.float()) / top).to(x.dtype)
    # A constant group would divide 0 by 0, which gives NaN codes. A range so small that its scale
    # rounds to 0 keeps the smallest number of the dtype as its scale.
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    scale = torch.where(high > low, scale.clamp_min(smallest), torch.ones_like(scale))
    steps = (x.float() - low.float()) / scale.float()
    codes = steps.clamp(0, top).round().to(torch.uint8)
    return codes, scale, low


def quantize(x, bits, group_size, dim=-1):
    """Asymmetric min/max quantization of groups of `group_size` consecutive elements along `dim`.

    x       [.., N, ..] float32, bfloat16 or float16; N = x.shape[dim]
    returns codes uint8, shape of x, 0 .. 2^bits - 1;
            scale, zero in x.dtype, shape of x with N -> N / group_size
    bound   |x - x_hat| <= max(scale / 2, top * max(scale * u, t / 2)) + |x_hat| * u with
            top = 2^bits - 1, u = eps / 2 and t the smallest subnormal of x.dtype: half a step, or
            what the rounding of the stored scale cuts off at the top of the range, and the
            rounding of x_hat. The zero is exact, and so is a constant group
    raises  ValueError: bits not in {2, 4, 8}; N not a multiple of group_size; NaN, inf or a range
            that overflows
    source  KIVI, arXiv 2402.02750, section 3; jy-yuan/KIVI, quant/new_pack.py
    """
    _check_bits(bits)
    n = x.shape[dim]
    if group_size < 1 or n % group_size:
        raise ValueError(f"cannot cut {n} elements into groups of {group_size}: "
                         f"use a group size that divides {n}")
    groups = x.movedim(dim, -1).unflatten(-1, (n // group_size, group_size))
    codes, scale, zero = group_codes(groups, bits)
    finite = torch.isfinite(x).all() and torch.isfinite(scale).all()
    if not finite:
        raise ValueError("cannot quantize NaN, inf or a group whose range overflows float32: "
                         "check the tensor's values")
    return (
        codes.flatten(-2).movedim(-1, dim),
        scale.squeeze(-1).movedim(-1, dim),
        zero.squeeze(-1).movedim(-1, dim),
    )


def dequantize(codes, scale, zero, dim=-1):
    """x_hat = codes * scale + zero, in float32, then rounded once to scale.dtype.

    codes   uint8 [.., N, ..]; scale, zero [.., N / G, ..] along `dim`: G follows from the shapes
    returns x_hat like codes, clamped to the finite range of scale.dtype
    raises  ValueError: N is not a multiple of the number of groups
    """
    n = codes.shape[dim]
    n_groups = scale.shape[dim]
    if n_groups == 0 or n % n_groups:
        raise ValueError(f"{n} codes cannot belong to {n_groups} groups: "
                         f"dim {dim} of codes and scale do not fit together")
    groups = codes.movedim(dim, -1).unflatten(-1, (n_groups, n // n_groups))
    scale = scale.movedim(dim, -1).unsqueeze(-1)
    zero = zero.movedim(dim, -1).unsqueeze(-1)
    x_hat = groups.float() * scale.float() + zero.float()
    limit = torch.finfo(scale.dtype).max  # a float16 group that ends at 65504 would round to inf
    x_hat = x_hat.clamp(-limit, limit).to(scale.dtype)
    return x_hat.flatten(-2).movedim(-1, dim)


def pack(codes, bits, dim=-1):
    """Packs consecutive codes along `dim` into bytes, the first into the lowest bits.

    codes   uint8 [.., N, ..], values below 2^bits
    returns uint8 [.., N * bits / 8, ..]; code j of a byte lies in its bits j * bits and up
    raises  ValueError: bits not in {2, 4, 8}; N does not fill whole bytes
    """
    _check_bits(bits)
    n = codes.shape[dim]
    per_byte = 8 // bits
    if n % per_byte:
        raise ValueError(f"cannot pack {n} codes of {bits} bits into bytes of {per_byte}: "
                         f"pad dim {dim} to a multiple of {per_byte}")
    codes = codes.movedim(dim, -1)
    packed = codes[..., ::per_byte]
    for j in range(1, per_byte):
        packed = packed | codes[..., j::per_byte] << j * bits
    return packed.movedim(-1, dim)


def unpack(packed, bits, dim=-1):
    """The inverse of `pack`: bytes [.., N, ..] -> codes uint8 [.., N * 8 / bits, ..]."""
    _check_bits(bits)
    codes = torch.stack(planes(packed.movedim(dim, -1), bits), -1)
    return codes.flatten(-2).movedim(-1, dim)


def planes(packed, bits):
    """The codes of every field of the bytes, lowest bits first: 8 / bits tensors like `packed`."""
    return [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]


def _check_bits(bits):
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")


def value_codes(x, config):
    """Quantizes V, x [.., D], per token: codes like x; scale, zero [.., D / G]."""
    groups = x.unflatten(-1, (-1, config.group_size))
    codes, scale, zero = group_codes(groups, config.v_bits, -1, config.shrink)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def slices(n, width, unit):
    """Cuts n tokens of `width` elements into ranges (first, end) of whole units, FILL at a time."""
    step, n = max(1, FILL // width // unit) * unit, round_up(n, unit)
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def quantize_groups(x, keep, config, name):
    """Quantizes whole stacks of tokens; where `keep` is False, codes, scale and zero are 0.

    x [B, Hk, groups, G, D], keep [B, 1, groups, G, 1]; name "k" or "v"
    returns bytes [B, Hk, stacks, G, D], and scale, zero [B, Hk, groups, 1, D] (K) or
            [B, Hk, groups, G, D / G] (V); a stack is 8 / bits groups that share bytes
    """
    if name == "k":
        bits, kept_groups = config.k_bits, keep[:, :, :, :1]
        codes, scale, zero = group_codes(x, bits, -2, config.shrink)
    else:
        bits, kept_groups = config.v_bits, keep
        codes, scale, zero = value_codes(x, config)
    codes = torch.where(keep, codes, 0).unflatten(2, (-1, 8 // bits))
    scale, zero = (torch.where(kept_groups, y, 0) for y in (scale, zero))
    return pack(codes, bits, 3).squeeze(3), scale, zero


def round_up(n, unit):
    return -(-n // unit) * unit


@dataclass(frozen=True)
class KVConfig:
    """What a KIVI cache stores."""

    k_bits: int = 2
    v_bits: int = 2
    group_size: int = 32  # G: elements that share a scale and a zero
    residual: int = 128  # R: recent tokens in full precision
    sink: int = 0  # S: first tokens of a row in full precision
    shrink: float = 1.0  # part of a group's range that its codes span, see `group_codes`

    def check(self, head_dim):
        """Raises ValueError, naming the value and the fix, for what cannot be stored."""
        G, R = self.group_size, self.residual
        for name in ("k_bits", "v_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name} must be one of {BITS}, got {getattr(self, name)}")
        if G < 8 or G & G - 1:
            raise ValueError(f"group_size must be a power of two of at least 8, got {G}")
        if head_dim % G:
            raise ValueError(f"group_size {G} does not divide head_dim {head_dim}: "
                             "use a group size that does")
        if R < G or R % G:
            fix = max(1, round(R / G)) * G
            raise ValueError(f"residual {R} is not a multiple of group_size {G}: use {fix}")
        if self.sink < 0:
            raise ValueError(f"sink must be 0 or more tokens, got {self.sink}")
        if not 0.5 <= self.shrink <= 1:
            raise ValueError(f"shrink must lie in 0.5 .. 1 (all of the range), got {self.shrink}")

    def capacity(self, max_len):
        """Tokens of a row of up to max_len that have room for codes: whole residuals and stacks."""
        tokens = max(1, max_len // self.residual) * self.residual
        return round_up(tokens, self.unit)

    @property
    def unit(self):
        """Tokens of whole residuals and, at any number of bits, whole stacks of groups."""
        return lcm(self.residual, 8 // min(BITS) * self.group_size)

    def block(self, max_len):
        """Tokens that attention reads at a time: more in longer rows, up to 512 all at once."""
        tokens = self.capacity(max_len)
        if tokens <= 512:
            return tokens
        size = 2048 if tokens > 65536 else 1024 if tokens > 8192 else 512 if tokens > 4096 else 256
        return max(1, size // self.unit) * self.unit


PRESETS = {  # kivi2 is the paper's; kivi2+ is better at nearly the same bytes, see docs/quality.md
    "kivi2": KVConfig(2, 2),
    "kivi2+": KVConfig(2, 2, sink=32, shrink=0.8),
    "kivi4": KVConfig(4, 4),
    "k4v2": KVConfig(4, 2),
}
