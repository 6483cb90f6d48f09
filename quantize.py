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


def stored(x):
    """x, written to memory by the kernel that computes it.

    Inductor lays out the result of a product in the type of its operands, 16 bits here, unless float32 arithmetic on it ends
    in a store of the same kernel; and what it does not store it evaluates again for every reader. `as_strided` is the one
    operation that needs real strides and so forces the store.
    """
    return x.as_strided(x.shape, x.stride())


# ---- weights ------------------------------------------------------------------------------------------------------------

CHUNK = 2**24  # weights that are handled at once: of a large layer all of them, written out, would be the peak of the memory
CLIPS = tuple(i / 40 for i in range(7))  # shares of a group's range
ACCUMULATORS = 256  # most sums, dots times rows, that a kernel of dots keeps for an output: more do not fit the registers
SPLIT = 16384  # most partial sums, outputs times parts, that dots are cut into
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
    """The two tensors of a QuantizedLinear from w [N, K]. group_size None: a row is one group. raises ValueError as `quantize`.

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
        fields = codes.unflatten(-1, (32 // bits, -1)).int()  # [n, K / G, fields, W]
        words = sum(fields[:, :, i] << i * bits for i in range(32 // bits))
        out.append((words.mT.flatten(1), torch.stack((scale, zero), -1)))
    return tuple(torch.cat(parts) for parts in zip(*out))


def few(x):
    """Does a compiled layer on CUDA read its packed words for x [M, ..]? Otherwise it writes weights out for the library's product."""
    return len(x) == 1 or len(x) <= DOTS and x.dtype == torch.bfloat16


def tile_rows(n):
    """Rows that a tile of a kernel of products has for n rows of x."""
    return max(8, 1 << (n - 1).bit_length())


class QuantizedLinear(nn.Module):
    """A linear layer whose weights [N, K] are codes of 8 or 4 bits in groups of G consecutive inputs; group_size None: of all K.

    packed  int32 [N, K * bits / 32]: the first word of every group, then the second of every group .. A group has W words; word j
            holds its codes j, W + j, 2W + j .., from the low bits up. So neighbouring words take neighbouring inputs (8 bits, one
            group) or neighbouring scales (4 bits), and all of them load as vectors
    meta    [N, K / G, 2] in the model's dtype: scale and zero of every group, which one load brings
    raises  ValueError: groups that do not divide K or do not fill whole words

    Compiled, one row is one sum over the packed words, in float32, and up to DOTS rows on CUDA are products on the tensor cores
    (Inductor's native_matmul, see `compiled_weights` in model.py): neither writes a weight out. Otherwise weights are written
    out for the library's product, uncompiled CHUNK of them at a time.
    """

    def __init__(self, inputs, outputs, bits, group_size=None, bias=False):
        super().__init__()
        G = _check_group(inputs, bits, group_size)
        self.bits = bits
        self.register_buffer("packed", torch.empty(outputs, inputs * bits // 32, dtype=torch.int32))
        self.register_buffer("meta", torch.empty(outputs, inputs // G, 2))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        """x [.., K] -> [.., N]"""
        rows = x.flatten(0, -2)
        if not torch.compiler.is_compiling():
            y, step = x.new_empty(len(rows), len(self.packed)), max(1, CHUNK // x.shape[-1])
            for a in range(0, len(self.packed), step):
                y[:, a : a + step] = rows @ self.dequantized(a, a + step).type_as(x).mT
        elif len(rows) == 1:
            y = self._sum(rows, x.is_cuda)
        else:
            y = self._dots(rows) if x.is_cuda and few(rows) else rows @ self.dequantized().mT
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])

    def dequantized(self, first=0, last=None):
        """The weights of outputs first .. last - 1: [last - first, K], rounded once to the type of the scale."""
        meta = self.meta[first:last, :, None]  # [n, K / G, 1, 2]
        words = self.packed[first:last].unflatten(1, (-1, meta.shape[1])).mT  # [n, K / G, W]
        codes = torch.stack([(words >> i & 2**self.bits - 1).to(meta.dtype) for i in range(0, 32, self.bits)], 2)  # [n, K / G, fields, W]
        return torch.addcmul(meta[..., 1], codes.flatten(2), meta[..., 0]).flatten(1)

    def _sum(self, x, raw):
        """The product for x [1, K]: per group, s * sum(codes * x) + z * sum(x).

        A code is masked where it lies in its word, at bit p: the number is code * 2^p, and x is divided by 2^p beforehand.
        raw  (CUDA) the masked bits are not even converted: seen as a float32 they are code * 2^(p - 149), a denormal or its
             continuation by the first binade, exact up to bit 24, and one shift brings the fields beyond down: 2.1 instructions
             a code instead of 4 to 5. Then x is scaled up by 2^88: products neither underflow nor overflow for inputs from
             2^-65 to 2^39
        """
        R, F, shift = self.meta.shape[1], 32 // self.bits, 24 - self.bits % 8
        W, (up, unit) = x.shape[1] // R // F, (88, -149) if raw else (0, 0)
        # Words of a group that one step takes together: as many as leave rows of 128, 4 words for each thread of a warp, or else of 8 (11008 inputs).
        U = next((u for n in (128, 8) for u in (4, 2) if W % u == 0 and R * W // u % n == 0), 1)
        at = torch.arange(0, 32, self.bits, dtype=torch.int32, device=x.device)
        at = torch.where(at < 24, at, at - shift)
        x = x.float().view(R, F, W) * (127 + up - at << 23).view(torch.float32)[:, None]  # by its bits, 2^(up - at)
        x = stored(x.permute(1, 2, 0).reshape(F, U, -1).contiguous())  # or it would be computed again for every output
        words, product, total = self.packed.view(-1, U, R * W // U), 0, 0
        for u in range(U):
            for i, p in enumerate(range(0, 32, self.bits)):
                w, p = (words[:, u], p) if p < 24 else (words[:, u] >> shift, p - shift)
                w = w & (1 << self.bits) - 1 << p
                product = product + (w.view(torch.float32) if raw else w.float()) * x[i, u]
                total = total + x[i, u] * 2.0 ** (p + unit)  # once for all outputs of a thread
        scale, zero = (m.float() for m in self._meta(W // U, raw))
        y = product * scale + total * zero
        # Few outputs with long sums leave the GPU without enough work at a time: parts of 128, added up by whatever reads the result.
        S = y.shape[-1] // 128 if raw and len(y) <= 8192 and y.shape[-1] in range(512, 1025, 128) else 1
        y = stored(y.unflatten(-1, (S, -1)).transpose(0, 1).sum(-1)).sum(0) if S > 1 else y.sum(-1)
        return (y * 2.0 ** (-up - unit))[None].to(self.meta.dtype)

    def _dots(self, x):
        """The product for a few rows x [M, K] in bfloat16: dots of the fields of a word, all in one kernel, with float32 sums.

        The masked bits, narrowed to 16, are numbers without a conversion as in `_sum`: code * 2^(p - 133) as a bfloat16, up to bit 8.
        From there one fused multiplication and addition makes two weights of two codes, 2^-33 times as large, each rounded once.
        """
        R, F, (M, K), N = self.meta.shape[1], 32 // self.bits, x.shape, len(self.packed)
        W, dtype, up, unit = K // R // F, torch.bfloat16, 100, -133
        H = max(1, F * tile_rows(M) // ACCUMULATORS)  # parts of the fields: every part reads all words
        # And of the words, where outputs alone are too few blocks; 8 parts Inductor would add up in a kernel of their own, and not where they are turned.
        S = next((s for s in (4, 2) if N * s * H <= SPLIT and s * H < 8 and R * W % (64 * s) == 0), 1)
        fields = stored(x.view(M, R, F * W).mT.contiguous()).view(M, H, F // H, S, -1)
        words = self.packed >> torch.arange(0, 32, 32 // H, dtype=torch.int32, device=x.device)[:, None, None]
        scale, zero = self._meta(W, True)
        # Viewed as integers and back, so that it is rounded to 16 bits here: else the kernel goes on in float32, with 1.6 times the instructions.
        rounded = lambda x: x.view(torch.int16).view(dtype)
        zero, y = rounded(zero * 2.0 ** (up + unit)), 0
        for i, p in enumerate(range(0, 32 // H, self.bits)):
            codes = ((words >> p // 8 * 8).to(torch.int16) & 2**self.bits - 1 << p % 8).view(dtype)
            w = rounded(codes * rounded(scale * 2.0 ** (up - p % 8))) + zero  # [H, N, words]
            w = w.view(H, N, S, -1).transpose(1, 2).flatten(0, 1)
            y = y + (w @ fields[:, :, i].permute(1, 2, 3, 0).flatten(0, 1)).float()  # [H * S, N, M]
        y = stored(y * 2.0 ** (-up - unit)).sum(0).mT  # by the kernel of the products, or they would be added up outside it, in their own type
        return stored(y.to(dtype).contiguous())  # rows again: as columns their readers would wait for single numbers

    def _meta(self, repeat, raw):
        """Scale and zero for every word: [N, repeat * K / G], the groups over and over.

        raw  one word brings both. (Apart they are 2 bytes each, a thread would take 8 of them but 4 words, and the way from one
             layout to the other, through shared memory, costs 3 instructions a code.)
        """
        if raw and self.meta.element_size() == 2:
            both = self.meta.view(torch.int32)[..., 0]
            parts = [part.to(torch.int16).view(self.meta.dtype) for part in (both, both >> 16)]
        else:
            parts = self.meta.unbind(-1)
        return [part[:, None].expand(-1, repeat, -1).flatten(1) for part in parts]


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
    """Writes a copy of a checkpoint whose linear weights have become the two tensors of a QuantizedLinear, one file at a time.

    `out` appears when all of it is there.
    raises ValueError, OSError: not a checkpoint, weights that do not fit `weights`, or `out` holds files
    """
    bits, group_size = weight_format(weights)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder")
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantized = config.get("quantization_config")
        if index.exists():
            files = sorted({folder / Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has a config.json or an index that cannot be read ({error}): download it again") from None
    if quantized:
        raise ValueError(f"{folder} holds quantized weights already: use the model's original checkpoint")
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True)
    try:
        _write(folder, part, files, index, config, bits, group_size)
        part.replace(out)
    except BaseException:
        shutil.rmtree(part)
        raise


def _write(folder, out, files, index, config, bits, group_size):
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    names, size = {}, 0
    for file in files:
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated ({error}): download it again") from None
        for name in [n for n, x in tensors.items() if x.dim() == 2 and n.endswith(".weight") and "embed" not in n]:
            layer, w = name.removesuffix("weight"), tensors.pop(name)
            form = (8, None) if layer == "lm_head." else (bits, group_size)
            tensors |= {layer + kind: x for kind, x in zip(("packed", "meta"), quantize_weight(w, *form))}
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        shutil.copymode(file, out / file.name)  # not for its writer alone
        names |= dict.fromkeys(tensors, file.name)
        size += sum(x.nbytes for x in tensors.values())
        print(f"{file.name}: {len(tensors)} tensors", file=sys.stderr)
    if index.exists():
        (out / index.name).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1) + "\n")
    config["quantization_config"] = {"quant_method": "kivi-weights", "bits": bits, "group_size": group_size}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file in folder.iterdir():  # the tokenizer and the like
        if (file.suffix in (".json", ".jinja", ".model") or file.name in ("merges.txt", "vocab.txt")) and file.name not in ("config.json", index.name):
            shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    main()
