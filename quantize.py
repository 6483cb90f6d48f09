"""Group-wise asymmetric quantization and bit packing, as pure functions (KIVI, arXiv 2402.02750, section 3).

A group of G consecutive elements is stored as integers 0 .. 2^bits - 1 plus two numbers in the model's dtype:

    zero  = min(group)                           exact: it is an element of the group
    scale = (max(group) - min(group)) / (2^bits - 1)
    codes = round((x - zero) / scale)            half to even
    x_hat = codes * scale + zero

Keys are grouped along tokens (per channel), values along channels (per token): `dim` says which.
All arithmetic runs in float32 against the *stored* (rounded) scale, so bfloat16 metadata costs no systematic error.

The weights of linear layers go through the same quantizer (`QuantizedLinear`), in groups along the inputs of an output:

    python quantize.py --checkpoint FOLDER --weights int4 --out DIR       writes a checkpoint that loads like any other
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

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


# ---- weights ------------------------------------------------------------------------------------------------------------

CHUNK = 2**24  # weights that are handled at once: of a large layer all of them, written out, would be the peak of the memory
CLIPS = tuple(i / 40 for i in range(7))  # shares of a group's range
DOTS = 128  # most rows that a compiled layer on CUDA takes through `_dots`; for more, the library's products pay for writing weights out


def weight_format(text):
    """(bits, group size) of "int8" (a group is a whole row), "int4" (groups of 32) or "int4:G" (G = 32, 64 or 128)."""
    formats = {"int8": (8, None), "int4": (4, 32), **{f"int4:{G}": (4, G) for G in (32, 64, 128)}}
    if text not in formats:
        raise ValueError(f"weights must be one of {', '.join(formats)}, got {text!r}")
    return formats[text]


def _check_group(K, bits, group_size):
    G = group_size or K
    if K % G or G * bits % 32:
        raise ValueError(f"int{bits} weights in groups of {G} do not fit {K} inputs: use int8 or full precision")
    return G


def quantize_weight(w, bits, group_size=None):
    """The three tensors of a QuantizedLinear from w [N, K]. group_size None: a row is one group. raises ValueError as `quantize`.

    4 bits: each group is clipped by one of CLIPS at both ends where that makes its squared error least.
    """
    N, K = w.shape
    G, out = _check_group(K, bits, group_size), []
    for x in w.split(max(1, CHUNK // 8 // K)):
        groups, best = x.unflatten(-1, (-1, G)), None
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        for clip in CLIPS if bits == 4 else (0,):
            cut = (high - low) * clip
            new = quantize(groups.clamp(low + cut, high - cut).flatten(-2), bits, G)
            error = (dequantize(*new) - x).float().square().unflatten(-1, (-1, G)).sum(-1)
            new = new[0].unflatten(-1, (-1, G)), *new[1:], error
            better = None if best is None else error < best[3]
            best = new if best is None else [torch.where(better.view(*better.shape, *[1] * (a.dim() - 2)), a, b) for a, b in zip(new, best)]
        codes, scale, zero, _ = best
        fields = codes.unflatten(-1, (32 // bits, -1)).int()
        out.append((sum(fields[:, :, i] << i * bits for i in range(32 // bits)).flatten(1), scale, zero))
    return tuple(torch.cat(parts) for parts in zip(*out))


class QuantizedLinear(nn.Module):
    """A linear layer whose weights [N, K] are codes of 8 or 4 bits in groups of G consecutive inputs; group_size None: of all K.

    packed       int32 [N, K * bits / 32], group after group: word i of the W words of a group holds its codes i, W + i, 2W + i ..,
                 from the low bits up. So neighbouring words take neighbouring inputs in every field, which loads well
    scale, zero  [N, K / G] in the model's dtype
    raises       ValueError: groups that do not divide K or do not fill whole words

    Compiled, one row is one sum over the packed words, in float32, and up to DOTS rows on CUDA are products on the tensor cores
    (Inductor's native_matmul, see `compiled_weights` in model.py): neither writes a weight out. Otherwise weights are written
    out for the library's product, uncompiled CHUNK of them at a time.
    """

    def __init__(self, inputs, outputs, bits, group_size=None, bias=False):
        super().__init__()
        G = _check_group(inputs, bits, group_size)
        self.bits = bits
        self.register_buffer("packed", torch.empty(outputs, inputs * bits // 32, dtype=torch.int32))
        self.register_buffer("scale", torch.empty(outputs, inputs // G))
        self.register_buffer("zero", torch.empty(outputs, inputs // G))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        """x [.., K] -> [.., N]"""
        rows = x.flatten(0, -2)
        if not torch.compiler.is_compiling():
            y, step = x.new_empty(len(rows), len(self.packed)), max(1, CHUNK // x.shape[-1])
            for a in range(0, len(self.packed), step):
                y[:, a : a + step] = rows @ self.dequantized(a, a + step).type_as(x).mT
        else:
            rows = rows.as_strided(rows.shape, rows.stride())  # needs real strides: x is stored, not computed again for every output
            y = self._sum(rows) if len(rows) == 1 else self._dots(rows) if x.is_cuda and len(rows) <= DOTS else rows @ self.dequantized().mT
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])

    def dequantized(self, first=0, last=None):
        """The weights of outputs first .. last - 1: [last - first, K], rounded once to the type of the scale."""
        packed, scale, zero = (x[first:last].unflatten(1, (self.scale.shape[1], -1)) for x in (self.packed, self.scale, self.zero))
        codes = torch.stack([(packed >> i & 2**self.bits - 1).to(scale.dtype) for i in range(0, 32, self.bits)], 2)  # [N, K / G, fields, W]
        return torch.addcmul(zero, codes.flatten(2), scale).flatten(1)

    def _fields(self):
        """The codes of each field of the words, float32 [N, K / G, W]."""
        words = self.packed.unflatten(1, (self.scale.shape[1], -1))
        return [(words >> i & 2**self.bits - 1).float() for i in range(0, 32, self.bits)]

    def _sum(self, x):
        """The product for x [1, K]: per word, s * sum(codes * x) + z * sum(x)."""
        x = x.float().view(self.scale.shape[1], 32 // self.bits, -1)  # [K / G, fields, W]
        product = sum(codes * x[:, i] for i, codes in enumerate(self._fields()))
        total = sum(x.unbind(1))  # unlike a sum over a dimension no kernel of its own
        y = product * self.scale.float()[..., None] + total * self.zero.float()[..., None]
        return y.flatten(1).sum(-1)[None].to(self.scale.dtype)

    def _dots(self, x):
        """The product for a few rows x [M, K]: one dot a field, in the type of x, with float32 sums."""
        scale, zero = self.scale.float()[..., None], self.zero.float()[..., None]
        fields = x.view(len(x), self.scale.shape[1], 32 // self.bits, -1)
        weights = [(codes * scale + zero).to(x.dtype).flatten(1) for codes in self._fields()]
        y = sum((w @ fields[:, :, i].flatten(1).mT).float() for i, w in enumerate(weights)).to(x.dtype)
        return y.as_strided(y.shape, y.stride()).mT  # stored by the kernel of the products, or they would be added up outside it


def main(argv=None):
    p = argparse.ArgumentParser(description="Write a checkpoint with quantized linear weights; the embedding stays, an untied head becomes int8.")
    p.add_argument("--checkpoint", required=True, help="folder in the Hugging Face layout, with safetensors")
    p.add_argument("--weights", default="int4", help="int8, int4 (groups of 32) or int4:G with G = 32, 64 or 128 (default int4)")
    p.add_argument("--out", required=True, help="folder to write, new or empty")
    args = p.parse_args(argv)
    try:
        write_quantized(Path(args.checkpoint), args.weights, Path(args.out))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def write_quantized(folder, weights, out):
    """Writes a copy of a checkpoint whose linear weights have become the three tensors of a QuantizedLinear, one file at a time.

    raises ValueError, OSError: not a checkpoint, weights that do not fit `weights`, or `out` holds files
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    bits, group_size = weight_format(weights)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder")
    index, files, names, size = folder / "model.safetensors.index.json", [folder / "model.safetensors"], {}, 0
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantized = config.get("quantization_config")
        if index.exists():
            files = sorted({folder / Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has a config.json or an index that cannot be read ({error}): download it again") from None
    if quantized:
        raise ValueError(f"{folder} holds quantized weights already: use the model's original checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated ({error}): download it again") from None
        for name in [n for n, x in tensors.items() if x.dim() == 2 and n.endswith(".weight") and "embed" not in n]:
            layer, w = name.removesuffix("weight"), tensors.pop(name)
            form = (8, None) if layer == "lm_head." else (bits, group_size)
            tensors |= {layer + kind: x for kind, x in zip(("packed", "scale", "zero"), quantize_weight(w, *form))}
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file.name)
        size += sum(x.nbytes for x in tensors.values())
        print(f"{out / file.name}: {len(tensors)} tensors", file=sys.stderr)
    if index.exists():
        (out / index.name).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1) + "\n")
    config["quantization_config"] = {"quant_method": "kivi-weights", "bits": bits, "group_size": group_size}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in folder.iterdir():  # the tokenizer and the like
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in ("config.json", index.name):
            shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    main()
