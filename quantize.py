"""Group-wise asymmetric quantization and bit packing, as pure functions (KIVI, arXiv 2402.02750, section 3).

A group of G consecutive elements is stored as integers 0 .. 2^bits - 1 plus two numbers in the model's dtype:

    zero  = min(group)                           exact: it is an element of the group
    scale = (max(group) - min(group)) / (2^bits - 1)
    codes = round((x - zero) / scale)            half to even
    x_hat = codes * scale + zero

Keys are grouped along tokens (per channel), values along channels (per token): `dim` says which.
All arithmetic runs in float32 against the *stored* (rounded) scale, so bfloat16 metadata costs no systematic error.
"""
import torch

BITS = (2, 4, 8)


def _tiny(dtype):
    """The smallest positive (subnormal) number of `dtype`."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def group_codes(x, bits, dim=-1, shrink=1.0):
    """`quantize` where all of dimension `dim` of x is one group, without any check: safe inside a compiled graph.

    x [.., G, ..] -> codes uint8 like x; scale, zero in x.dtype with G -> 1
    shrink  the codes span this part of the range, around its middle: what lies outside is clipped, the rest rounded more finely
    """
    top = 2**bits - 1
    zero, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if shrink != 1:
        margin = (high.float() - zero.float()) * ((1 - shrink) / 2)
        zero, high = (zero.float() + margin).to(x.dtype), (high.float() - margin).to(x.dtype)
    scale = ((high.float() - zero.float()) / top).to(x.dtype)
    # A constant group would divide 0 by 0 (NaN codes); a range so small that its scale rounds to 0 keeps one subnormal step.
    scale = torch.where(high > zero, scale.clamp_min(_tiny(x.dtype)), torch.ones_like(scale))
    codes = ((x.float() - zero.float()) / scale.float()).clamp(0, top).round().to(torch.uint8)
    return codes, scale, zero


def quantize(x, bits, group_size, dim=-1):
    """Asymmetric min/max quantization of groups of `group_size` consecutive elements along `dim`.

    x       [.., N, ..] float32, bfloat16 or float16; N = x.shape[dim]
    returns codes uint8, shape of x, 0 .. 2^bits - 1; scale, zero in x.dtype, shape of x with N -> N / group_size
    bound   |x - x_hat| <= max(scale / 2, top * max(scale * u, t / 2)) + |x_hat| * u with top = 2^bits - 1, u = eps / 2 and t
            the smallest subnormal of x.dtype: half a step, or what the rounding of the stored scale cuts off at the top of
            the range, and the rounding of x_hat. The zero is exact, and so is a constant group
    raises  ValueError: bits not in {2, 4, 8}; N not a multiple of group_size; NaN, inf or a range that overflows
    source  KIVI, arXiv 2402.02750, section 3; jy-yuan/KIVI, quant/new_pack.py
    """
    _check_bits(bits)
    n = x.shape[dim]
    if group_size < 1 or n % group_size:
        raise ValueError(f"cannot cut {n} elements into groups of {group_size}: use a group size that divides {n}")
    moved = x.movedim(dim, -1)
    codes, scale, zero = group_codes(moved.unflatten(-1, (n // group_size, group_size)), bits)
    if not (torch.isfinite(x).all() and torch.isfinite(scale).all()):
        raise ValueError("cannot quantize NaN, inf or a group whose range overflows float32: check the tensor's values")
    return codes.flatten(-2).movedim(-1, dim), scale.squeeze(-1).movedim(-1, dim), zero.squeeze(-1).movedim(-1, dim)


def dequantize(codes, scale, zero, dim=-1):
    """x_hat = codes * scale + zero, computed in float32, rounded once to scale.dtype and clamped to its finite range.

    codes  uint8 [.., N, ..]; scale, zero [.., N / G, ..] along `dim`; the group size follows from the shapes
    raises ValueError: N is not a multiple of the number of groups
    """
    n, groups = codes.shape[dim], scale.shape[dim]
    if groups == 0 or n % groups:
        raise ValueError(f"{n} codes cannot belong to {groups} groups: dim {dim} of codes and scale do not fit together")
    c = codes.movedim(dim, -1).unflatten(-1, (groups, n // groups))
    s, z = scale.movedim(dim, -1).unsqueeze(-1), zero.movedim(dim, -1).unsqueeze(-1)
    limit = torch.finfo(scale.dtype).max  # a float16 group that ends at 65504 would round to inf
    return (c.float() * s.float() + z.float()).clamp(-limit, limit).to(scale.dtype).flatten(-2).movedim(-1, dim)


def pack(codes, bits, dim=-1):
    """Packs consecutive codes along `dim` into bytes: code j of a byte lies in its bits [j * bits, (j + 1) * bits).

    codes   uint8 [.., N, ..], values below 2^bits
    returns uint8 [.., N * bits / 8, ..]
    raises  ValueError: bits not in {2, 4, 8}; N does not fill whole bytes
    """
    _check_bits(bits)
    per, n = 8 // bits, codes.shape[dim]
    if n % per:
        raise ValueError(f"cannot pack {n} codes of {bits} bits into bytes of {per}: pad dim {dim} to a multiple of {per}")
    c = codes.movedim(dim, -1).unflatten(-1, (n // per, per))
    out = c[..., 0]
    for j in range(1, per):
        out = out | c[..., j] << j * bits
    return out.movedim(-1, dim)


def unpack(packed, bits, dim=-1):
    """The inverse of `pack`: bytes [.., N, ..] -> codes uint8 [.., N * 8 / bits, ..]."""
    _check_bits(bits)
    w = packed.movedim(dim, -1)
    return torch.stack([w >> j & 2**bits - 1 for j in range(0, 8, bits)], -1).flatten(-2).movedim(-1, dim)


def _check_bits(bits):
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
