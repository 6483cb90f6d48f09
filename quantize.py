"""Group-wise asymmetric quantization and bit packing (KIVI, arXiv 2402.02750, section 3).

A group of G consecutive elements is stored as integers 0 .. 2^bits - 1 and two numbers of x.dtype:

    zero  = min(group)                           exact: it is an element of the group
    scale = (max(group) - min(group)) / (2^bits - 1)
    codes = round((x - zero) / scale)            half to even
    x_hat = codes * scale + zero

Keys are grouped along tokens (per channel), values along channels (per token): `dim` says which.
All arithmetic runs in float32 against the *stored* scale, so that rounding it adds no bias.

`quantize` is the checked form of `group_codes`, which a cache calls. The cache's options and
buffers stand below; kivi.py explains stacks, sinks and boosted channels.
"""
from dataclasses import dataclass
from math import gcd, lcm, prod

import torch
from torch import nn

BITS = (2, 4, 8)
FILL = 2**24  # elements of K that are quantized at once: temporaries are several times that


def group_codes(x, bits, dim=-1):
    """`quantize` where all of dimension `dim` is one group, and without any check.

    x [.., G, ..] -> codes uint8 like x; scale, zero in x.dtype with G -> 1
    """
    top = 2**bits - 1
    zero = x.amin(dim, keepdim=True)
    high = x.amax(dim, keepdim=True)
    scale = ((high.float() - zero.float()) / top).to(x.dtype)
    # A constant group would divide 0 by 0, which gives NaN codes. A range so small that its scale
    # rounds to 0 keeps the smallest number of the dtype as its scale.
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    scale = torch.where(high > zero, scale.clamp_min(smallest), 1)
    steps = (x.float() - zero.float()) / scale.float()
    return steps.clamp(0, top).round().to(torch.uint8), scale, zero


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
    dim, n = dim % x.dim(), x.shape[dim]
    if group_size < 1 or n % group_size:
        raise ValueError(f"cannot cut {n} elements into groups of {group_size}: "
                         f"use a group size that divides {n}")
    groups = x.unflatten(dim, (n // group_size, group_size))
    codes, scale, zero = group_codes(groups, bits, dim + 1)
    if not (torch.isfinite(x).all() and torch.isfinite(scale).all()):
        raise ValueError("cannot quantize NaN, inf or a group whose range overflows float32: "
                         "check the tensor's values")
    return codes.flatten(dim, dim + 1), scale.squeeze(dim + 1), zero.squeeze(dim + 1)


def dequantize(codes, scale, zero, dim=-1):
    """x_hat = codes * scale + zero, in float32, then rounded once to scale.dtype.

    codes   uint8 [.., N, ..]; scale, zero [.., N / G, ..] along `dim`: G follows from the shapes
    returns x_hat like codes, clamped to the finite range of scale.dtype
    raises  ValueError: N is not a multiple of the number of groups"""
    dim, n, n_groups = dim % codes.dim(), codes.shape[dim], scale.shape[dim]
    if n_groups == 0 or n % n_groups:
        raise ValueError(f"{n} codes cannot belong to {n_groups} groups: "
                         f"dim {dim} of codes and scale do not fit together")
    groups = codes.unflatten(dim, (n_groups, n // n_groups)).float()
    scale, zero = scale.unsqueeze(dim + 1), zero.unsqueeze(dim + 1)
    x_hat = (groups * scale.float()).add_(zero.float())
    limit = torch.finfo(scale.dtype).max  # a float16 group that ends at 65504 would round to inf
    x_hat = x_hat.clamp_(-limit, limit).to(scale.dtype)
    return x_hat.flatten(dim, dim + 1)


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
    dim %= codes.dim()
    fields = codes.unflatten(dim, (n // per_byte, per_byte)).unbind(dim + 1)
    packed = fields[0]
    for j in range(1, per_byte):
        packed = packed | fields[j] << j * bits
    return packed


def unpack(packed, bits, dim=-1):
    """The inverse of `pack`: bytes [.., N, ..] -> codes uint8 [.., N * 8 / bits, ..]."""
    _check_bits(bits)
    dim %= packed.dim()
    fields = [packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)]  # lowest bits first
    return torch.stack(fields, dim + 1).flatten(dim, dim + 1)


def _check_bits(bits):
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")


def value_codes(x, config):
    """Quantizes V, x [.., D], per token: codes like x; scale, zero [.., D / Gv]."""
    groups = x.unflatten(-1, (-1, config.value_group(x.shape[-1])))
    codes, scale, zero = group_codes(groups, config.v_bits)
    return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)


def key_codes(x, config, order=None):
    """Quantizes K, x [.., G, D], per channel.

    order   [.., D], of boosted keys: their channels, those in twice the bits first; codes, scale
            and zero have this order
    returns codes [.., G, D + n]; scale, zero [.., 1, D]. Of the n boosted channels the high half of
            a code stands in the channel's column, the low half behind all columns, and the scale
            counts steps of the high half: x = (high + low / 2^k_bits) * scale + zero
    """
    bits = config.k_bits
    if order is None:
        return group_codes(x, bits, -2)
    x = x.gather(-1, order.long().unsqueeze(-2).expand_as(x))
    n = config.boosted(x.shape[-1])  # columns of codes and scale that `fine` replaces
    codes, scale, zero = group_codes(x, bits, -2)
    fine, fine_scale, _ = group_codes(x[..., :n], 2 * bits, -2)
    codes = torch.cat([fine >> bits, codes[..., n:], fine & 2**bits - 1], -1)
    scale = torch.cat([fine_scale * 2**bits, scale[..., n:]], -1)
    return codes, scale, zero


def channel_order(groups):
    """The channels of keys [B, Hk, groups, G, D] by their widest group, the widest first.

    returns int64 [B, Hk, D]; of equal ones the lower number comes first
    """
    groups = groups.float()
    width = (groups.amax(3) - groups.amin(3)).amax(2)
    return width.sort(dim=-1, descending=True, stable=True).indices


def slices(begin, end, width, unit):
    """Cuts tokens of `width` elements into ranges (first, last + 1) of whole units, FILL at a time;
    begin is a multiple of `unit`, end is rounded up to one."""
    step, end = max(1, FILL // width // unit) * unit, round_up(end, unit)
    return [(first, min(first + step, end)) for first in range(begin, end, step)]


def quantize_groups(x, due, config, name, order=None):
    """Quantizes whole stacks of tokens; what is not `due` gets 0 for codes, scale and zero.

    x [B, Hk, groups, G, D], due [B, 1, groups, G, 1]; name "k" or "v"; order [B, Hk, 1, D]
    returns bytes [B, Hk, stacks, G, D (+ n)], and scale, zero [B, Hk, groups, 1, D] (K) or
            [B, Hk, groups, G, D / Gv] (V); a stack is 8 / bits groups that share bytes"""
    if name == "k":
        bits, due_groups = config.k_bits, due[:, :, :, :1]
        codes, scale, zero = key_codes(x, config, order)
    else:
        bits, due_groups = config.v_bits, due
        codes, scale, zero = value_codes(x, config)
    codes = torch.where(due, codes, 0).unflatten(2, (-1, 8 // bits))
    scale, zero = (torch.where(due_groups, y, 0) for y in (scale, zero))
    return pack(codes, bits, 3).squeeze(3), scale, zero


def take(x, index):
    """Entries index [B, n] of x [B, Hk, N, D] in dimension 2; beyond its ends the first or last."""
    index = index.clamp(0, x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def merge(stored, new, old, bits):
    """Writes `new` bytes, scales or zeros [B, Hk, stacks or groups, .., ..] over `stored` ones, but
    for those of `old` tokens, bool [B, 1, groups, G, 1], where new codes are 0."""
    if new.dtype == torch.uint8:
        fields = (old * (2**bits - 1)).to(torch.uint8).unflatten(2, (-1, 8 // bits))
        stored.copy_(new | stored & pack(fields, bits, 3).squeeze(3))
    else:  # a group of keys is old as a whole, so its first token tells
        stored.copy_(torch.where(old[:, :, :, : new.shape[3]], stored, new))


def dequantize_groups(packed, scale, zero, config, name, order=None):
    """The inverse of `quantize_groups`, from what it returns: float32 [B, Hk, tokens, D]."""
    bits = getattr(config, f"{name}_bits")
    codes = unpack(packed.unsqueeze(3), bits, 3).flatten(2, 4)
    scale, zero = (x.flatten(2, 3).float() for x in (scale, zero))
    if order is None:
        return dequantize(codes, scale, zero, 2 if name == "k" else 3)
    codes, low = codes.float().tensor_split([scale.shape[3]], 3)
    codes[..., : low.shape[3]] += low / 2**bits
    x = dequantize(codes, scale, zero, 2)
    return x.gather(3, order.argsort(3).expand_as(x))


def round_up(n, unit):
    return -(-n // unit) * unit


@dataclass(frozen=True)
class KVConfig:
    """What a KIVI cache stores, and where."""

    k_bits: int = 2
    v_bits: int = 2
    group_size: int = 32  # G: elements that share a scale and a zero
    residual: int = 128  # R: keys that get codes at once, and newest values that have none
    sink: int = 0  # S: first tokens of a row in full precision
    boost: float = 0  # key channels of a head in twice the bits: so many, or below 1 this share
    v_group_size: int = 0  # Gv, at most so many channels of a value are a group; 0: G

    def value_group(self, head_dim):
        """Gv: channels of a value that share a scale and a zero."""
        return gcd(self.v_group_size, head_dim) if self.v_group_size else self.group_size

    def boosted(self, head_dim):
        """Key channels of a head in twice the bits; a share gives whole eights."""
        return int(self.boost if self.boost >= 1 else self.boost * head_dim // 8 * 8)

    def check(self, head_dim):
        """Raises ValueError, naming the value and the fix, for what cannot be stored."""
        G, R = self.group_size, self.residual
        for name in ("k_bits", "v_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"{name} must be one of {BITS}, got {getattr(self, name)}")
        for name, size in (("group_size", G), ("v_group_size", self.v_group_size or G)):
            if size < 8 or size & size - 1:
                raise ValueError(f"{name} must be a power of two of at least 8, got {size}")
        if head_dim % self.value_group(head_dim) or self.value_group(head_dim) < 8:
            raise ValueError(f"group_size {G} does not divide head_dim {head_dim}: "
                             "use a group size that does, or v_group_size beside it")
        if R < G or R % G:
            fix = max(1, round(R / G)) * G
            raise ValueError(f"residual {R} is not a multiple of group_size {G}: use {fix}")
        if self.sink < 0:
            raise ValueError(f"sink must be 0 or more tokens, got {self.sink}")
        if not 0 <= self.boost <= head_dim or self.boost >= 1 and self.boost % 8:
            raise ValueError(f"boost must be a multiple of 8 up to head_dim {head_dim}, or a share "
                             f"below 1, got {self.boost}")
        if self.boost and self.k_bits == 8:
            raise ValueError("boost doubles the bits of a key: use k_bits 2 or 4 with it")

    def slot(self, t):
        """Slot of the window where token t lies while it is there: sinks first, then the ring."""
        S, R = self.sink, self.residual
        return torch.where(t < S, t, S + (t - S) % (R + 1))

    def in_window(self, pos):
        """[B, slots]: tokens of the window, sinks first, then from pos [B] back to pos - R. Where
        they are fewer than slots, some are there several times."""
        newest, slots = pos[:, None], torch.arange(self.sink + self.residual + 1, device=pos.device)
        t = torch.where(slots < self.sink, slots, newest - slots + self.sink)
        return t.minimum(newest).clamp(min=0)

    def grouped_as(self, t):
        """The token whose key is used for t in its group: t itself, or another one for a sink.

        A sink is read from the window and would stretch the range of its group, so the group's
        first token that is no sink takes its place (if all are, nobody reads them)."""
        return torch.maximum(t, (t | self.group_size - 1).clamp(max=self.sink))

    def capacity(self, max_len):
        """Tokens of a row of up to max_len that have room for codes: whole key blocks, stacks."""
        tokens = max(1, max_len // self.residual) * self.residual
        return round_up(tokens, self.unit)

    @property
    def unit(self):
        """Tokens of whole key blocks and, at any number of bits, whole stacks of groups."""
        return lcm(self.residual, 8 // min(BITS) * self.group_size)

    def block(self, max_len):
        """Tokens that attention reads at a time, whole key blocks; all, if at most 512."""
        tokens = self.capacity(max_len)
        if tokens <= 512:
            return tokens
        size = 2048 if tokens > 65536 else 1024 if tokens > 8192 else 512 if tokens > 4096 else 256
        return max(1, size // self.unit) * self.unit


class Buffers(nn.Module):
    """Tensors of B rows at addresses that never change: what a cache stands on.

    `lengths` are the tokens in each row as the host counts them, `pos` the same on the device, so
    the next token's number; a step raises `pos` last. As an argument it is a token's own number.
    """

    config = None

    def __init__(self, batch, n_kv_heads, max_len, head_dim, dtype, device):
        super().__init__()
        sizes = batch, n_kv_heads, max_len, head_dim
        if min(sizes) < 1:
            raise ValueError("sizes of a cache must be at least 1: batch, n_kv_heads, max_len, "
                             f"head_dim = {sizes}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"a cache holds float32, bfloat16 or float16, not {dtype}")
        self.batch, self.n_kv_heads, self.max_len, self.head_dim = sizes
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = [0] * batch
        self.register_buffer("rows", torch.arange(batch, device=device), persistent=False)
        self.register_buffer("pos", torch.zeros_like(self.rows), persistent=False)

    @property
    def length(self):
        """Tokens in the longest row."""
        return max(self.lengths)

    def set_lengths(self, lengths, row=0):
        """Sets the tokens in the rows from `row` on. In place: the layers of a model share both."""
        rows = slice(row, row + len(lengths))
        self.pos[rows] = torch.tensor(lengths, device=self.pos.device)
        self.lengths[rows] = lengths

    def add(self, name, shape, dtype, spare=0):
        """A buffer of zeros [B, Hk, entries, ..]. Fused kernels read whole blocks, into the next
        head or `spare` entries behind all, and mask what they find. 128 bytes between heads keep
        the whole buffer as strided as a slice of it: one compiled kernel serves both."""
        heads, head = prod(shape[:2]), prod(shape[2:])
        stride = head + 128 // dtype.itemsize
        n = heads * stride + spare * prod(shape[3:])
        buffer = torch.zeros(n, dtype=dtype, device=self.device)[: heads * stride]
        buffer = buffer.view(*shape[:2], stride)[..., :head].unflatten(2, shape[2:])
        self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a cache cannot be moved or cast: make another of that device and dtype")

    @property
    def nbytes(self):
        """Bytes that are allocated, however many tokens there are."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    def contents(self):
        """The buffers that belong to rows, by name."""
        return {name: x for name, x in self.named_buffers() if name not in ("index", "rows")}

    def reset(self):
        """Empties the cache and leaves no trace of the old contents."""
        self.set_lengths([0] * self.batch)
        for buffer in self.contents().values():
            buffer.zero_()

    def fork(self, row, rows):
        """Copies what a row holds into other rows: `rows` are their numbers."""
        rows = list(map(int, rows))
        if {row, *rows} - {*range(self.batch)}:
            raise ValueError(f"rows are 0 .. {self.batch - 1}, got {row} and {rows}")
        for buffer in self.contents().values():
            buffer[rows] = buffer[row].clone()
        for other in rows:
            self.lengths[other] = self.lengths[row]

    def options(self):
        """What two caches must share to hold the same bytes."""
        config = vars(self.config) if self.config else {}
        return {"kind": type(self).__name__, "n_kv_heads": self.n_kv_heads,
                "head_dim": self.head_dim, "dtype": str(self.dtype), **config}

    def state(self, rows=slice(None)):
        """What continues these rows elsewhere: a dict of the cache's options, `lengths`, and
        tensors, clones of what is in use. rows is a slice."""
        lengths = self.lengths[rows]
        tensors = {name: x.clone() for name, x in self.in_use(rows, max(lengths)).items()}
        return {**self.options(), "lengths": lengths, **tensors}

    def in_use(self, rows, length):
        """The parts of the buffers that `length` tokens of these rows use, by name."""
        return {name: x[rows, :, : self.used(name, length)]
                for name, x in self.contents().items() if name != "pos"}

    def load_state(self, state, row=0):
        """Puts the rows of a `state` into the rows from `row` on. max_len may be another.

        raises ValueError: the state is of a cache with other options, or does not fit"""
        for name, value in self.options().items():
            if state.get(name) != value:
                raise ValueError(f"the state is of another cache: its {name} is "
                                 f"{state.get(name)}, this one has {value}")
        lengths = state.get("lengths")
        usable = isinstance(lengths, list) and 0 <= row < row + len(lengths) <= self.batch
        if not usable or any(n not in range(self.max_len + 1) for n in lengths):
            raise ValueError(f"rows of lengths {lengths}, from row {row} on, do not fit into a "
                             f"cache of {self.batch} rows and {self.max_len} tokens")
        rows = slice(row, row + len(lengths))
        places = self.in_use(rows, max(lengths))
        for name, place in places.items():
            x = state.get(name)
            if not torch.is_tensor(x) or x.shape != place.shape or x.dtype != place.dtype:
                raise ValueError(f"the state's {name} is missing or damaged")
        for name, place in places.items():
            self.get_buffer(name)[rows] = 0
            place.copy_(state[name])
        self.set_lengths(lengths, row)


PRESETS = {  # kivi2 is the paper's; the others are better or smaller, see docs/quality.md
    "kivi2": KVConfig(2, 2),
    "kivi2+": KVConfig(2, 2, sink=4, boost=1 / 4, v_group_size=64),
    "kivi2-": KVConfig(2, 2, sink=4, boost=1 / 4, group_size=64, v_group_size=64),
    "kivi4": KVConfig(4, 4),
    "k4v2": KVConfig(4, 2),
}
