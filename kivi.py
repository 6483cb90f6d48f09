"""KIVI: a 2-bit KV cache whose decode attention reads the packed codes directly (arXiv 2402.02750).

Keys have a few large channels, so they are quantized per channel (groups of G consecutive tokens of one channel); values
have none, so they are quantized per token (groups of G consecutive channels of one token). The most recent tokens stay in
full precision: keys until a block of R is complete, values for R tokens.

Compiled, neither K nor V is ever written out at full precision. With codes c, scale s and zero z (quantize.py), for a query q and
attention weights p, and g the group of token t (K) or of channel d (V):

    q . k_t = sum_d (q_d s_dg) c_td + sum_d q_d z_dg         the second sum is one number per group
    out_d   = sum_t (p_t s_tg) c_dt + sum_t p_t z_tg         the second sum is one number per group

Both inner sums are products of packed codes with a few rows of numbers, `_product`, which unpacks on the fly. A byte holds
one code of each of P = 8 / bits *planes*, and a plane is a group of G tokens, so that it has one scale a channel:

    K  byte [j, i, d], plane a: channel d of token (j P + a) G + i        rows are tokens, the sum runs along channels
    V  byte [j, d, i], plane a: the same, transposed                      rows are channels, the sum runs along tokens

State after a row reaches length T, a function of T alone however the tokens came (as in the official code):

    packed K holds tokens [0, T - T % R)      attention at length T reads K exactly from token (T-1) // R * R on,
    packed V holds tokens [0, max(0, T-R))    and V exactly for the last R + 1 tokens: it runs before the flush of its step

The window of exact tokens is S pinned sink slots and a ring of R + 1; it still holds what the step flushes, so the flush
may run before or after the attention. Deliberately absent: eviction, paging, rollback, several tokens per step.
"""
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import lcm, prod

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from quantize import BITS, dequantize, group_codes, pack, stored, unpack

LAUNCH = {  # of the CUDA kernels, see `launches`; y: rows of packed codes, x: rows of q or p (of scores, in softmax), r: the sum
    "packed": {"ZBLOCK": 1, "YBLOCK": 32, "XBLOCK": 8, "R0_BLOCK": 64, "num_warps": 1, "num_stages": 3},
    "plain": {"ZBLOCK": 1, "YBLOCK": 32, "XBLOCK": 8, "num_warps": 1, "num_stages": 1},  # zeros, keys of the window (and its values when few); no loop
    "window": {"ZBLOCK": 1, "YBLOCK": 128, "XBLOCK": 8, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 3},  # its values
    "softmax": {"XBLOCK": 2, "num_warps": 4, "num_stages": 1},
    "blocks": {"YBLOCK": 1, "XBLOCK": 32, "R0_BLOCK": 8, "num_warps": 2, "num_stages": 1},  # weighing them
}
FILL = 2**24  # elements of K that `fill` quantizes at once: all of a long prompt would be several float32 copies of it
NEVER = -1e30  # the score of a token that is not there; finite, so that a block without any token gives no NaN


@dataclass(frozen=True)
class KVConfig:
    """What a KIVI cache stores: bits of K and V, group size G, full-precision window R, sink tokens S, shrink (see `group_codes`)."""

    k_bits: int = 2
    v_bits: int = 2
    group_size: int = 32
    residual: int = 128
    sink: int = 0
    shrink: float = 1.0

    def check(self, head_dim):
        """Raises ValueError, naming the value and the fix, for a combination that cannot be stored."""
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if bits not in BITS:
                raise ValueError(f"{name} must be one of {BITS}, got {bits}")
        G, R = self.group_size, self.residual
        if G < 8 or G & G - 1:
            raise ValueError(f"group_size must be a power of two of at least 8, got {G}")
        if head_dim % G:
            raise ValueError(f"group_size {G} does not divide head_dim {head_dim}: use a group size that does")
        if R < G or R % G:
            raise ValueError(f"residual {R} is not a multiple of group_size {G}: use {max(1, round(R / G)) * G}")
        if self.sink < 0:
            raise ValueError(f"sink must be 0 or more tokens, got {self.sink}")
        if not 0.5 <= self.shrink <= 1:
            raise ValueError(f"shrink must lie in 0.5 .. 1 (1 keeps the whole range), got {self.shrink}")

    @property
    def unit(self):
        """Tokens in the unit that capacity is rounded to: whole residuals, and whole bytes at any number of bits."""
        return lcm(self.residual, 8 // min(BITS) * self.group_size)

    def block(self, max_len):
        """Tokens in a block of attention. Long caches have long blocks: every block of every head writes a partial result.

        Of up to 512 tokens, some of them beyond 256, one: two would also be read whole, see `Cache.blocks`.
        """
        tokens = next((t for t, least in ((2048, 65536), (1024, 8192), (512, 4096), (256, 513), (512, 257 + self.residual)) if max_len >= least), 256)
        return self.unit * max(1, tokens // self.unit)

    def blocks(self, max_len):
        """Blocks that attention can come to read: the codes of K reach up to the last full R before the newest token."""
        return max(1, -(-((max_len - 1) // self.residual * self.residual) // self.block(max_len)))

    def grouped(self, max_len):
        """Tokens whose scales and zeros the buffers of one row hold, in whole residuals: the others are always in the window."""
        return max(1, max_len // self.residual) * self.residual

    def capacity(self, max_len):
        """Tokens whose codes they hold, in whole units."""
        return -(-self.grouped(max_len) // self.unit) * self.unit

    def tails(self, max_len):
        """Tokens of codes, and of scales and zeros, that the last block of the last row reads beyond its buffers; in every other row it reads
        into the next row."""
        return [max(0, self.blocks(max_len) * self.block(max_len) - n) for n in (self.capacity(max_len), self.grouped(max_len))]

    def parts(self, batch, n_kv_heads, max_len, head_dim, dtype):
        """Bytes of one layer's cache by part, from shapes alone: codes, metadata, window, positions."""
        rows = batch * n_kv_heads
        codes, grouped = ((rows * n + tail) * head_dim for n, tail in zip((self.capacity(max_len), self.grouped(max_len)), self.tails(max_len)))
        return {
            "codes": codes * (self.k_bits + self.v_bits) // 8,
            "metadata": grouped // self.group_size * 4 * dtype.itemsize,  # scale and zero of K and of V
            "window": rows * (self.sink + self.residual + 1) * head_dim * 2 * dtype.itemsize,
            "positions": batch * 8 + self.blocks(max_len) * 4,
        }

    def bytes(self, batch, n_kv_heads, max_len, head_dim, dtype):
        """Bytes of one layer's cache: what `KiviCache(...).nbytes` will be."""
        return sum(self.parts(batch, n_kv_heads, max_len, head_dim, dtype).values())


PRESETS = {  # kivi2 is the paper's; kivi2+ adds what paid at (nearly) the same bytes, see README.md, "What 2 bits cost"
    "kivi2": KVConfig(2, 2),
    "kivi2+": KVConfig(2, 2, sink=32, shrink=0.8),
    "kivi4": KVConfig(4, 4),
    "k4v2": KVConfig(4, 2),
}


def _planes(packed, bits, half):
    """The codes of every plane of `packed` as numbers, not yet shifted into place: [(codes * 2^p, 2^-p) ..]."""
    masks = [(p, (1 << bits) - 1 << p) for p in range(0, 8, bits)]
    if not half:
        return [((packed & mask).float(), 2.0**-p) for p, mask in masks]
    # The low bits of a float16 are the mantissa of a denormal: the masked byte already *is* code * 2^(p - 24), exactly, and
    # no shift or conversion is spent on it. The minus makes LLVM mask two codes with one instruction; the tensor core
    # applies it for nothing.
    wide = packed.to(torch.int16)
    return [(-(wide & mask).view(torch.float16), -(2.0 ** (24 - p))) for p, mask in masks]


def _product(*terms):
    """Sum of factor * (rows [.., M, X] . codes [.., Y, X]) over the terms (rows, codes, factor): [.., M, Y] float32.

    The one product of both halves of attention, run in one of three ways:
    CUDA, compiled: one `tl.dot` a term (Inductor's native_matmul), all in one kernel, with `codes` unpacked on the way to the
    tensor core. CPU, compiled: a matrix product would first write `codes` out at full precision, so one sum a row, which
    Inductor fuses with the unpacking into one loop over the packed bytes. Eager: plain matrix products.
    """
    M, codes = terms[0][0].shape[-2], terms[0][1]
    if codes.dtype == torch.float16:
        if M == 1:  # a product with one row would go to the library, with unpacked codes
            return _product(*((r.expand(*r.shape[:-2], 2, -1), *rest) for r, *rest in terms))[..., :1, :]
        return stored(sum((codes @ rows.to(torch.float16).mT).float() * factor for rows, codes, factor in terms)).mT  # `rows` second: padded to 8, not 16
    if torch.compiler.is_compiling() and codes.device.type == "cpu":
        return torch.stack([sum(r[..., m, None, :] * c * factor for r, c, factor in terms).sum(-1) for m in range(M)], -2)
    # Contiguous operands in whole cache lines (not the window's R + 1 slots) always take one algorithm, so that a row's result does not depend on its batch.
    whole = lambda x: (F.pad(x, (0, -x.shape[-1] % 16)) if x.shape[-1] % 16 else x).contiguous()
    return sum((whole(rows) @ whole(codes).mT) * factor for rows, codes, factor in terms)


def _halves(q):
    """q [.., M, D] as float16 tensors that add up to it, so that their products with a scale are exact (or nearly) in float16.

    The first keeps 3 significant bits: times the 8 bits of a bfloat16 scale they fill the 11 of a float16. Rounding q * scale
    as a whole instead moves the score of a key with one large channel by 1 %. One row: both parts become rows of one product.
    """
    keep = -32 if q.dtype == torch.bfloat16 else -256
    high = (q.view(torch.int16) & keep).view(q.dtype)
    parts = [high.to(torch.float16), (q - high).to(torch.float16)]
    return [stored(x) for x in ([torch.cat(parts, -2)] if q.shape[-2] == 1 else parts)]


def _one_row(x, rows):
    """A product of rows, [.., M, Y]. A single row in two parts (see _halves) gives two sums, which this adds up."""
    return x.sum(-2, keepdim=True) if rows[0].dtype == torch.float16 and len(rows) == 1 else x


def _over_blocks(x):
    """Sum of x [B, Hk, nb, ..] over blocks. Eager: in float64, or the last bit would depend on how many empty ones follow."""
    return x.sum(2) if torch.compiler.is_compiling() else x.double().sum(2).float()


class Cache(nn.Module):
    """What both caches share: capacity, positions and the host's copy of every row's length.

    Tensors live in buffers (static addresses, so a CUDA graph may replay the step); the schedule lives on the host in
    `lengths`. The tensor-only methods `update`, `flush` and `attention` never read the host's numbers and can be compiled;
    `prefill`, `append` and `attend` are the checked interface on top of them.
    """

    def __init__(self, batch, max_len, block, blocks, device, sliding=None):
        super().__init__()
        if sliding is not None and sliding < 1:
            raise ValueError(f"sliding must be at least 1 token, got {sliding}")
        if batch < 1 or max_len < 1:
            raise ValueError(f"a cache needs at least one row and one token, got batch {batch} and max_len {max_len}")
        self.batch, self.max_len, self.block, self.sliding = batch, max_len, block, sliding
        self.lengths = [0] * batch
        self.register_buffer("pos", torch.zeros(batch, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("index", torch.arange(blocks, dtype=torch.int32, device=device), persistent=False)

    @property
    def length(self):
        """Tokens present in the longest row."""
        return max(self.lengths)

    @property
    def nbytes(self):
        """Bytes of every buffer this cache owns."""
        return sum(b.nbytes for b in self.buffers())

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a cache cannot be moved or cast: make one with the device and dtype it shall have")

    def reset(self):
        """Empties the cache and leaves no trace of the old contents."""
        self.lengths[:] = [0] * self.batch
        for name, buffer in self.named_buffers():
            if name != "index":
                buffer.zero_()

    def blocks(self, length, bucket=False):
        """Indices [nb] of the blocks that attention must read when the longest row holds `length` tokens.

        Its shape is the one dynamic shape of a decode step.
        bucket  rounds nb up to four sizes an octave (4, 5, 6, 7, 8, 10, ..): one CUDA graph each, at most 25 % read in vain
        """
        nb = max(2, -(-length // self.block))  # the compiler specializes on 1
        if bucket and nb > 8:
            step = 1 << (nb - 1).bit_length() - 3
            nb = -(-nb // step) * step
        blocks = self.index[:nb]
        if not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(blocks, 0)
        return blocks

    def prefill(self, k, v, lengths=None):
        """Fills the empty cache with whole prompts.

        k, v [B, Hk, L, D], rows right-padded; lengths [B] ints, the tokens of each row (all L when omitted)
        raises ValueError: not empty; wrong shape or length; beyond max_len; NaN or inf
        """
        B, L = self.batch, k.shape[2]
        lengths = [L] * B if lengths is None else [int(n) for n in lengths]
        if self.length:
            raise ValueError(f"prefill needs an empty cache, this one holds {self.length} tokens: call reset() first")
        if k.shape != v.shape or k.shape[0] != B or len(lengths) != B:
            raise ValueError(f"prefill expects k and v of {B} rows and as many lengths, got {tuple(k.shape)} and {tuple(v.shape)}")
        if not all(1 <= n <= L for n in lengths):
            raise ValueError(f"lengths must lie in 1 .. {L} (the padded prompt), got {lengths}")
        if L > self.max_len and max(lengths) > self.max_len:
            raise ValueError(f"a prompt of {max(lengths)} tokens exceeds the cache's capacity of {self.max_len}")
        real = torch.arange(L, device=k.device) < torch.tensor(lengths, device=k.device)[:, None]  # [B, L]
        for name, x in (("k", k), ("v", v)):
            if not torch.isfinite(x).transpose(1, 2)[real].all():
                raise ValueError(f"{name} holds NaN or inf: the cache cannot quantize it")
        self.pos.copy_(torch.tensor(lengths))
        self.fill(k, v, self.pos)
        self.lengths[:] = lengths

    def append(self, k, v):
        """Appends one token to every row. k, v [B, Hk, 1, D]. Raises ValueError when a row is full."""
        if k.device.type == "cpu" and not (torch.isfinite(k).all() and torch.isfinite(v).all()):  # elsewhere it would sync
            raise ValueError("k or v holds NaN or inf: the cache cannot quantize it")
        self.advance()
        self.update(k, v, self.pos)
        if self.due():
            self.flush(self.pos)
        self.pos += 1

    def advance(self):
        """The host's share of one decode step: counts the token and refuses it when a row is full."""
        if self.length >= self.max_len:
            raise ValueError(f"the cache is full: a row holds its capacity of {self.max_len} tokens")
        self.lengths[:] = [n + 1 for n in self.lengths]  # in place: the layers of a model share one list

    def park(self, row):
        """Starts a row that is finished again at token 0: it goes on, never beyond its capacity, and costs no length."""
        self.pos[row] = 0
        self.lengths[row] = 0

    def attend(self, q):
        """softmax(q . K / sqrt(D)) . V over the tokens present in each row: q [B, H, 1, D] -> [B, H, 1, D]."""
        return self.attention(q, self.pos - 1, self.blocks(self.length))


def slices(n, width, unit):
    """Cuts n tokens of `width` elements into ranges (first, end) of whole units with few elements: what bounds `fill`'s temporaries.

    The last end is n rounded up to a unit.
    """
    step, end = max(1, FILL // width // unit) * unit, -(-n // unit) * unit
    return [(a, min(a + step, end)) for a in range(0, end, step)]


class FullCache(Cache):
    """The full-precision cache: same interface, K and V [B, Hk, T, D] as they came. The baseline of every measurement.

    sliding  as in KiviCache
    """

    BLOCK = 128

    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, sliding=None, dtype=torch.float32, device="cpu"):
        super().__init__(batch, max_len, self.BLOCK, -(-max_len // self.BLOCK), device, sliding)
        for name in "kv":
            buffer = torch.zeros(batch, n_kv_heads, self.capacity(max_len), head_dim, dtype=dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)
        # Does the library have a kernel for groups of heads with a mask? cuDNN's cuts long rows into parts and is up to 15 times as fast as
        # rows (results/attention-forms.md). Without one, K and V would be copied for every query head.
        q, one, mask = (torch.empty(1, *shape, dtype=t, device=device) for shape, t in (((2, 1, head_dim), dtype), ((1, 128, head_dim), dtype), ((1, 1, 128), torch.bool)))
        self.grouped = q.is_cuda and torch._fused_sdp_choice(q, one, one, attn_mask=mask, enable_gqa=True) != SDPBackend.MATH.value

    @classmethod
    def capacity(cls, max_len):
        return -(-max_len // cls.BLOCK) * cls.BLOCK + 1  # never whole for `narrow`, see KiviCache.first

    @classmethod
    def bytes(cls, batch, n_kv_heads, max_len, head_dim, dtype):
        """Bytes of one layer's cache: what `FullCache(...).nbytes` will be."""
        T = cls.capacity(max_len)
        return batch * n_kv_heads * T * head_dim * 2 * dtype.itemsize + batch * 8 + T // cls.BLOCK * 4

    def fill(self, k, v, lengths, row=0, quantize=None):
        """`prefill` without its checks, into the rows from `row` on: k, v [B, Hk, L, D] and lengths [B] on the device."""
        B, Hk, L, D = k.shape
        for a, b in slices(min(L, self.k.shape[2]), B * Hk * D, 1):
            real = torch.arange(a, b, device=k.device)[:, None] < lengths[:, None, None, None]  # [B, 1, b - a, 1]
            for buffer, x in ((self.k, k), (self.v, v)):
                buffer[row : row + B, :, a:b] = torch.where(real, x[:, :, a:b], 0)

    def update(self, k, v, pos):
        row = torch.arange(self.batch, device=pos.device)
        self.k[row, :, pos] = k[:, :, 0].to(self.k.dtype)
        self.v[row, :, pos] = v[:, :, 0].to(self.v.dtype)

    def due(self):
        return False

    def flush(self, pos):
        """Nothing: full precision has no blocks to complete."""

    def attention(self, q, pos, blocks):
        """q [B, H, 1, D], pos [B] index of the newest token, blocks [nb] -> [B, H, 1, D]."""
        n = blocks.shape[0] * self.block
        k, v = self.k.narrow(2, 0, n), self.v.narrow(2, 0, n)
        B, Hk, _, D = k.shape
        seen = torch.arange(n, device=q.device) <= pos[:, None, None, None]  # [B, 1, 1, n]
        if self.sliding is not None:
            seen = seen & (torch.arange(n, device=q.device) > (pos - self.sliding)[:, None, None, None])
        # The query heads of one KV head become the rows of one product: each key is read once, not H / Hk times.
        rows = q if self.grouped else q.reshape(B, Hk, -1, D)
        return F.scaled_dot_product_attention(rows.to(k.dtype), k, v, attn_mask=seen, enable_gqa=rows.shape[1] != Hk).reshape(q.shape).to(q.dtype)

    def traffic(self, length):
        """As in KiviCache."""
        return 2 * self.k.shape[1] * self.k.shape[3] * min(length, self.sliding or length) * self.k.element_size()

    def dequantized(self):
        """(k, v) [B, Hk, L, D]: what attend reads."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class KiviCache(Cache):
    """One layer's KIVI cache. Buffers are allocated once; nothing is ever re-quantized.

    batch, n_kv_heads, max_len (tokens a row can hold), head_dim; the options are those of `KVConfig`
    sliding  attention reads only that many of the newest tokens, sinks included (a model's sliding window; all when None)
    raises  ValueError: see KVConfig.check
    source  KIVI, arXiv 2402.02750; schedule and order of operations of jy-yuan/KIVI
    """

    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, k_bits=2, v_bits=2, group_size=32, residual=128, sink=0, shrink=1.0,
                 sliding=None, dtype=torch.float32, device="cpu"):
        c = KVConfig(k_bits, v_bits, group_size, residual, sink, shrink)
        c.check(head_dim)
        super().__init__(batch, max_len, c.block(max_len), c.blocks(max_len), device, sliding)
        self.config = c
        B, Hk, D, G, W, T, N = batch, n_kv_heads, head_dim, group_size, sink + residual + 1, c.capacity(max_len), c.grouped(max_len) // group_size

        def buffer(name, *shape, dtype=dtype, tail=0):
            whole = torch.zeros(B * Hk * prod(shape) + tail * D // G, dtype=dtype, device=device)
            x = torch.empty(0, dtype=dtype, device=device)  # no view of `whole`: the compiled step could not write through one in place
            x.set_(whole.untyped_storage(), 0, (B, Hk, *shape))
            self.register_buffer(name, x, persistent=False)
            if tail:
                self.register_buffer(name + "_tail", whole[x.numel() :], persistent=False)

        meta, (tail, meta_tail) = self.meta_dtype(dtype, device), c.tails(max_len)
        buffer("k_packed", T // G * k_bits // 8, G, D, dtype=torch.uint8, tail=tail * G * k_bits // 8)
        buffer("k_scale", N, D, dtype=meta, tail=meta_tail)
        buffer("k_zero", N, D, dtype=meta, tail=meta_tail)
        buffer("v_packed", T // G * v_bits // 8, D, G, dtype=torch.uint8, tail=tail * G * v_bits // 8)
        buffer("v_scale", N, D // G, G, dtype=meta, tail=meta_tail)  # tokens last, as in v_packed
        buffer("v_zero", N, D // G, G, dtype=meta, tail=meta_tail)
        buffer("k_window", W, D)
        buffer("v_window", W, D)

    @staticmethod
    def meta_dtype(dtype, device):
        """bfloat16 scales and zeros lie in float16 on CUDA: the same numbers there, up to float16's range, and the products
        that read them are spared a quarter of their instructions, the conversion."""
        return torch.float16 if dtype == torch.bfloat16 and torch.device(device).type == "cuda" else dtype

    def meta(self, x):
        """A scale or zero in the type it is stored in."""
        return x.clamp(-65504, 65504).half() if self.k_scale.dtype == torch.float16 else x

    # ---- writing ----------------------------------------------------------------------------------------------------

    def slot(self, t):
        """Window slot of token t: the first S are pinned, the others share a ring of R + 1."""
        S, R = self.config.sink, self.config.residual
        return torch.where(t < S, t, S + (t - S) % (R + 1))

    def slot_tokens(self, pos):
        """Token that each window slot holds when the newest is pos [B]: [B, S + R + 1], negative where there is none."""
        S, R = self.config.sink, self.config.residual
        w = torch.arange(S + R + 1, device=pos.device)
        newest = pos[:, None]
        ring = newest - (newest - w) % (R + 1)  # the latest token of slot w: (t - S) % (R + 1) == w - S
        return torch.where(w < S, torch.where(w <= newest, w, -1), torch.where(ring >= S, ring, -1))

    def source(self, t):
        """Token whose key stands in for token t in its group: itself, or for a sink the group's first token that is none.

        Sinks are read from the window; left in their group they would stretch the range of all its other tokens.
        """
        S, G = self.config.sink, self.config.group_size
        return torch.maximum(t, torch.clamp(t | G - 1, max=S)) if S else t

    def fill(self, k, v, lengths, row=0, quantize=None):
        """`prefill` without its checks, into the rows from `row` on: k, v [B, Hk, L, D] and lengths [B] on the device.

        quantize  a compiled `quantized_groups`
        """
        c, (B, Hk, L, D) = self.config, k.shape
        G, dtype, quantize = c.group_size, self.k_window.dtype, quantize or quantized_groups
        L = min(L, c.capacity(self.max_len))
        slots = self.slot_tokens(lengths - 1)  # [B, W]
        for window, x in ((self.k_window, k), (self.v_window, v)):
            held = x.gather(2, slots.clamp(0)[:, None, :, None].expand(B, Hk, -1, D))
            window[row : row + B] = torch.where((slots >= 0)[:, None, :, None], held, 0)
        for a, b in slices(L, B * Hk * D, 8 // min(BITS) * G):  # whole bytes at any number of bits
            t = torch.arange(a, b, device=k.device)
            both = (("k", k, self.source(t), c.k_bits, lengths // c.residual * c.residual), ("v", v, t, c.v_bits, lengths - c.residual))
            for name, x, source, bits, end in both:
                groups = lambda x: x.expand(B, Hk, *x.shape[2:]).unflatten(2, (-1, 8 // bits, G)).flatten(0, 2).contiguous()  # [N, planes, G, ..]
                keep = (t < end[:, None])[:, None, :, None]  # [B, 1, b - a, 1] tokens that are quantized by now
                new = quantize(groups(x[:, :, source.clamp(max=L - 1)].to(dtype)), groups(keep), bits, name == "v", c.shrink)
                for part, y in zip(("packed", "scale", "zero"), new):
                    target = getattr(self, f"{name}_{part}")[row : row + B]
                    y = y.mT if name == "v" else y
                    y = y.reshape(B, Hk, -1, *target.shape[3:])
                    target = target[:, :, a // G * (bits if part == "packed" else 8) // 8 :][:, :, : y.shape[2]]
                    target.copy_((y if part == "packed" else self.meta(y))[:, :, : target.shape[2]])  # there may be fewer groups than whole bytes hold

    def quantize_v(self, v):
        """Values of single tokens, grouped along channels: v [.., D] -> codes [.., D], scale, zero [.., D / G]."""
        codes, scale, zero = group_codes(v.unflatten(-1, (-1, self.config.group_size)), self.config.v_bits, shrink=self.config.shrink)
        # Stored, or a compiler that is told to store as little as it can (`compiled_weights` in model.py) works the codes out once more to write them.
        return stored(codes).flatten(-2), scale.squeeze(-1), zero.squeeze(-1)

    def update(self, k, v, pos):
        """Writes token pos [B] (k, v [B, Hk, 1, D]) into the window and quantizes the value that leaves it."""
        c, row = self.config, torch.arange(self.batch, device=pos.device)
        slot = self.slot(pos)
        self.k_window[row, :, slot] = k[:, :, 0].to(self.k_window.dtype)
        self.v_window[row, :, slot] = v[:, :, 0].to(self.v_window.dtype)
        t = pos - c.residual  # the ring of R + 1 still holds it
        leaves, t = (t >= 0)[:, None, None], t.clamp(0)
        codes, scale, zero = self.quantize_v(self.v_window[row, :, self.slot(t)])  # [B, Hk, D], [B, Hk, D / G] twice
        group, i = t // c.group_size, t % c.group_size
        block, shift = self.place(group, c.v_bits)
        # Where nothing leaves, the old numbers are written back: a branch would need the host or a second graph.
        old = self.v_packed[row, :, block, :, i]
        self.v_packed[row, :, block, :, i] = torch.where(leaves, put(old, codes, shift[:, None, None], c.v_bits), old)
        for buffer, x in ((self.v_scale, scale), (self.v_zero, zero)):
            buffer[row, :, group, :, i] = torch.where(leaves, self.meta(x), buffer[row, :, group, :, i])

    def due(self):
        """Does some row complete a block of R keys with its newest token? Asked after `advance`, answered by the host."""
        return any(n % self.config.residual == 0 for n in self.lengths)

    def flush(self, pos):
        """Quantizes the last R keys of the rows whose newest token pos [B] completes a block of R; others stay as they are."""
        c, row = self.config, torch.arange(self.batch, device=pos.device)
        G = c.group_size
        due = ((pos + 1) % c.residual == 0)[:, None, None]
        start = (pos // c.residual * c.residual).clamp(max=self.k_scale.shape[2] * G - c.residual)  # the last block may stay incomplete for ever
        for first in range(0, c.residual, G):
            t = start + first  # [B] first token of the group
            tokens = self.source(t[:, None] + torch.arange(G, device=pos.device))  # [B, G]
            keys = self.k_window[row[:, None], :, self.slot(tokens)].transpose(1, 2)  # [B, Hk, G, D]
            codes, scale, zero = group_codes(keys, c.k_bits, dim=2, shrink=c.shrink)
            group = t // G
            block, shift = self.place(group, c.k_bits)
            old = self.k_packed[row, :, block]  # [B, Hk, G, D]
            new = put(old, codes, shift[:, None, None, None], c.k_bits)
            self.k_packed[row, :, block] = torch.where(due[..., None], new, old)
            for buffer, x in ((self.k_scale, scale), (self.k_zero, zero)):
                buffer[row, :, group] = torch.where(due, self.meta(x.squeeze(2)), buffer[row, :, group])

    @staticmethod
    def place(group, bits):
        """Where a group of tokens lies in the packed bytes: (block, shift of its plane)."""
        planes = 8 // bits
        return group // planes, group % planes * bits

    # ---- reading ----------------------------------------------------------------------------------------------------

    def attention(self, q, pos, blocks, half=False):
        """Attention of one query per head over the packed cache and the window.

        q [B, H, 1, D], pos [B] index of the newest token, blocks [nb] (see `blocks`) -> [B, H, 1, D]
        half  see `rows`

        Every block of C tokens has a softmax of its own (flash decoding): no pass over a whole row of scores, and enough
        independent work when the batch is 1. The window is one more block.
        """
        rows = self.rows(q, half)
        scores = self.scores(rows, blocks)
        zeros, recent = self.other_scores(rows, blocks)
        return self.merge(q, *self.packed(rows, scores, zeros, pos, blocks), *self.window(rows, scores, zeros, recent, pos))

    def rows(self, q, half=False):
        """q [B, H, 1, D] as the rows of products: parts [B, Hk, M, D] that add up to it, where M query heads share a KV head.

        half  products in float16 with float32 sums: only right when compiled by `compiled_attention`, which sets it
        """
        q = q.reshape(len(q), self.k_window.shape[1], -1, q.shape[-1])
        return _halves(q) if half and q.dtype != torch.float32 else [q.float()]

    def packed(self, rows, scores, zeros, pos, blocks):
        """Attention over the tokens whose values are quantized, block by block.

        scores, zeros  of these rows, see `scores` and `other_scores`
        returns  largest score and sum of weights [B, Hk, nb, M], weighted values as `values` gives them
        """
        c, nb, C, P = self.config, blocks.shape[0], self.block, len(scores)
        t = blocks[:, None] * C + torch.arange(C, dtype=torch.int32, device=pos.device)  # [nb, C]
        seen = (t >= c.sink) & (t < (pos - c.residual).int()[:, None, None])  # [B, nb, C]
        if self.sliding is not None:
            seen = seen & (t > (pos - self.sliding).int()[:, None, None])
        scores = self.planes(rows, scores, zeros)
        scores = [x.masked_fill(~ok, NEVER) for x, ok in zip(scores, self.split(seen[:, None, :, None], P))]
        if c.k_bits != c.v_bits:
            scores = self.split(self.join(scores), 8 // c.v_bits)
        top = reduce(torch.maximum, scores).amax(-1)  # [B, Hk, nb, M]
        p = [(x - top[..., None]).exp() for x in scores]
        return top, sum(p).sum(-1), *self.values(p, nb, rows[0].dtype == torch.float16)

    def window(self, rows, scores, zeros, recent, pos):
        """Attention over the tokens whose values are exact, the sinks and the last R + 1; arguments as in `packed`, and the scores of the window's keys.

        returns  largest score and sum of weights [B, Hk, M, 1], weighted values [B, Hk, M, D]
        """
        c, (B, Hk, nb), number = self.config, scores[0].shape[:3], rows[0].dtype
        held = self.slot_tokens(pos)  # [B, W] token of each window slot
        # Between the V and the K boundary the value is exact and the key quantized: those scores come from the planes.
        exact = (held < c.sink) | (held >= (pos // c.residual * c.residual)[:, None])
        recent, planes = _one_row(recent, rows), self.planes(rows, scores, zeros)
        G, P, C = c.group_size, len(planes), self.block
        t = held.clamp(0, nb * C - 1)
        axis = lambda n, d: torch.arange(n, device=pos.device).view([n if i == d else 1 for i in range(4)])
        place = axis(B, 0), axis(Hk, 1), (t // C)[:, None, None], axis(recent.shape[2], 2), (t % C // (P * G) * G + t % G)[:, None, None]
        plane = (t // G % P)[:, None, None]
        for a, x in enumerate(planes):
            recent = torch.where(exact[:, None, None] | (plane != a), recent, x[place])
        unseen = held < 0 if self.sliding is None else (held < 0) | (held <= pos[:, None] - self.sliding)
        recent = recent.masked_fill(unseen[:, None, None], NEVER)
        top = recent.amax(-1, keepdim=True)
        p = (recent - top).exp()
        total = p.sum(-1, keepdim=True)
        p = stored(p.to(number)) if number == torch.float16 else p
        return top, total, _product((p, self.v_window.to(number).mT, 1.0))

    def merge(self, q, top, total, out, zeros, window_top, window_total, window):
        """The results of `packed` and `window`, weighed against the largest score of all: [B, H, 1, D] in q's dtype."""
        out = (out + zeros[..., None]).transpose(3, 4).flatten(-2)  # [B, Hk, nb, M, D]
        top, total = (x[..., None].expand(out.shape) for x in (top, total))  # expanded, the three reductions are one kernel
        best = torch.maximum(top.amax(2), window_top)  # [B, Hk, M, D]
        weight, window_weight = (top - best[:, :, None]).exp(), (window_top - best).exp()
        total = _over_blocks(weight * total) + window_weight * window_total
        out = (_over_blocks(weight * out) + window_weight * window) / total
        return out.view(q.shape).to(q.dtype)

    @staticmethod
    def first(x, nb, *n):
        """The first nb blocks of n entries of every row of a buffer [B, Hk, T / .., ..], as [B, Hk, nb, *n, ..].

        The last may reach past the row's end, into what attention masks: so a row need not hold whole blocks.
        (`narrow` would also be contiguous for a full cache only, and the compiled step would compile once more then.)
        """
        inner, (b, h, t) = x.shape[3:], x.stride()[:3]
        steps = [t * prod(n[i:]) for i in range(len(n) + 1)]
        return x.as_strided((*x.shape[:2], nb, *n, *inner), (b, h, *steps, *x.stride()[3:]))

    def split(self, x, planes):
        """x [.., C] in the order of tokens -> one tensor [.., C / planes] a plane."""
        return x.unflatten(-1, (-1, planes, self.config.group_size)).movedim(-2, 0).flatten(-2).unbind(0)

    def join(self, planes):
        """The inverse of `split`."""
        return torch.stack([x.unflatten(-1, (-1, self.config.group_size)) for x in planes], -2).flatten(-3)

    def scores(self, rows, blocks):
        """q . codes * scale / sqrt(D) over the packed keys: rows [B, Hk, M, D] -> P of [B, Hk, nb, M, U, G], one a plane; C = U P G tokens."""
        c, nb = self.config, blocks.shape[0]
        G, P = c.group_size, 8 // c.k_bits
        U = self.block // (P * G)  # bytes' blocks in a block of attention
        w = self.first(self.k_packed, nb, U)  # [B, Hk, nb, U, G, D]
        s, out = self.first(self.k_scale, nb, U, P), []  # [B, Hk, nb, U, P, D]
        for a, (codes, factor) in enumerate(_planes(w, c.k_bits, rows[0].dtype == torch.float16)):
            scaled = [r[:, :, None, None] * s[:, :, :, :, a, None] for r in rows]  # [B, Hk, nb, U, M, D]
            out.append(_product(*((r, codes, factor * w.shape[-1] ** -0.5) for r in scaled)).transpose(3, 4))
        return out

    def other_scores(self, rows, blocks):
        """The smaller products of q, / sqrt(D): with the packed keys' zeros, one number a group of tokens, which `scores` lacks
        [B, Hk, nb, M, U, P]; with the window's keys [B, Hk, M, W]."""
        nb, P, unit = blocks.shape[0], 8 // self.config.k_bits, self.k_window.shape[3] ** -0.5
        U = self.block // (P * self.config.group_size)
        z, keys = self.first(self.k_zero, nb, U, P).to(rows[0].dtype).flatten(3, 4), self.k_window.to(rows[0].dtype)  # z [B, Hk, nb, U * P, D]
        zeros = _product(*((r[:, :, None].expand(-1, -1, nb, -1, -1), z, unit) for r in rows))
        return zeros.unflatten(-1, (U, P)), _product(*((r, keys, unit) for r in rows))

    def planes(self, rows, scores, zeros):
        """All of the scores of the packed keys: P of [B, Hk, nb, M, C / P]."""
        return [_one_row((x + zeros[..., a, None]).flatten(-2), rows) for a, x in enumerate(scores)]

    def values(self, p, nb, half):
        """p . (codes * scale) and p . zero over the packed values: p, P of [B, Hk, nb, M, C / P] -> [B, Hk, nb, D / G, M, G] and [B, Hk, nb, D / G, M].

        The second is added to the first by `merge`; here that would be a kernel of its own.
        """
        c, C = self.config, self.block
        G, P = c.group_size, 8 // c.v_bits
        U = C // (P * G)
        w = self.first(self.v_packed, nb, U).unflatten(4, (-1, G))  # [B, Hk, nb, U, D / G, G, G]
        w = w.permute(0, 1, 2, 4, 5, 3, 6).flatten(-2)  # [B, Hk, nb, D / G, G, C / P]: channels of one group, tokens
        s, z = (self.first(x, nb, U, P).permute(0, 1, 2, 4, 5, 3, 6).flatten(-2) for x in (self.v_scale, self.v_zero))  # [B, Hk, nb, P, D / G, C / P]
        if half:
            p = [stored(x.to(torch.float16)) for x in p]
        z = z.float()  # or the sums of p * zero, which largely cancel the others, would be float16
        zero = torch.stack([sum(x * z[:, :, :, a, g, None] for a, x in enumerate(p)).sum(-1) for g in range(z.shape[4])], 3)
        terms = [(x[:, :, :, None] * s[:, :, :, a, :, None], *plane) for a, (x, plane) in enumerate(zip(p, _planes(w, c.v_bits, half)))]
        return _product(*terms), zero

    def traffic(self, length):
        """Bytes that attention must read of one row of `length` tokens: codes and metadata of the packed ones, the others exactly."""
        c, (_, Hk, _, D), seen = self.config, self.k_window.shape, min(length, self.sliding or length)
        total = 0
        for bits, newest in ((c.k_bits, (length - 1) % c.residual + 1), (c.v_bits, c.residual + 1)):
            exact = min(seen, newest + c.sink)
            total += exact * D * self.k_window.element_size()
            total += (seen - exact) * (D * bits // 8 + D // c.group_size * 2 * self.k_scale.element_size())
        return Hk * total

    def dequantized(self):
        """(k, v) [B, Hk, L, D] float32: exactly what attend reads now; zeros beyond a row's own length."""
        c, L = self.config, self.length
        B, Hk, W, D = self.k_window.shape
        codes = lambda name, bits: unpack(getattr(self, f"{name}_packed").unsqueeze(3), bits, dim=3).flatten(2, 3)[:, :, : self.k_scale.shape[2]]
        meta = lambda name: (getattr(self, f"{name}_{part}").float() for part in ("scale", "zero"))
        s, z = (x.unsqueeze(3) for x in meta("k"))
        k = dequantize(codes("k", c.k_bits), s, z, dim=3).flatten(2, 3)
        s, z = (x.mT for x in meta("v"))
        v = dequantize(codes("v", c.v_bits).mT, s, z).flatten(2, 3)
        pos = self.pos - 1
        t = torch.arange(L, device=pos.device)
        slot = self.slot(t)[None].expand(B, L)
        kept = self.slot_tokens(pos).gather(1, slot) == t  # [B, L] tokens that the window holds
        exact_k = kept & ((t < c.sink) | (t >= (pos // c.residual * c.residual)[:, None]))
        present = (t <= pos[:, None])[:, None, :, None]
        out = []
        for x, window, exact in ((k, self.k_window, exact_k), (v, self.v_window, kept)):
            held = window.float().gather(2, slot[:, None, :, None].expand(B, Hk, L, D))
            x = F.pad(x, (0, 0, 0, max(0, L - x.shape[2])))[:, :, :L]
            out.append(torch.where(present, torch.where(exact[:, None, :, None], held, x), 0))
        return tuple(out)


def quantized_groups(x, keep, bits, values, shrink):
    """Quantizes the groups of N blocks of bytes; apart from `fill` because compiled it is one pass over x instead of a dozen.

    x [N, P, G, D] of P groups of G tokens, keep [N, P, G, 1] False for tokens whose codes, scale and zero shall be 0
    values   groups run along the channels of a token (V) instead of the tokens of a channel (K)
    returns  bytes [N, G, D], scale and zero [N, P, D] (K) or [N, P, G, D / G] (V)
    """
    codes, *meta = group_codes(x.unflatten(-1, (-1, x.shape[2])) if values else x, bits, -1 if values else 2, shrink)
    codes, meta = (codes.flatten(-2), [m.squeeze(-1) for m in meta]) if values else (codes, meta)
    meta = [torch.where(keep if values else keep[:, :, :1], m, 0) for m in meta]
    return pack(torch.where(keep, codes, 0), bits, dim=1).squeeze(1), *(meta if values else [m.squeeze(2) for m in meta])


def compiled_attention(kind, device):
    """`attention` of the cache class `kind`, compiled: a function of (cache, q, pos, blocks).

    CUDA: the products of a KiviCache become `tl.dot` inside Inductor's own kernels (native_matmul), so that the unpacking
    fuses with them; the limits let all planes share one kernel, which reads every byte once; `launches` fixes the tiles.
    Keep a model's linear layers out of it: they would become such kernels too, and the library is better at them.
    """
    if not issubclass(kind, KiviCache) or torch.device(device).type != "cuda":
        return torch.compile(kind.attention, fullgraph=True)
    from torch._inductor.virtualized import V

    options = {
        "triton.native_matmul": True,
        "triton.enable_pdl": True,  # a kernel starts while the one before it ends: 5 of 42 us at B = 1
        "inductor_choices_class": launches,
        "max_fusion_size": 2048,
        "realize_opcount_threshold": 10**5,
        "realize_reads_threshold": 1000,
        "realize_acc_reads_threshold": 1000,
        "shape_padding": False,
        "loop_ordering_after_fusion": False,  # else some sums of products stay outside the products' kernel
    }
    choices, stream, compiled = launches(), lru_cache(torch.cuda.Stream), lambda fn: torch.compile(fn, fullgraph=True, options=options)
    whole = compiled(lambda cache, q, pos, blocks: cache.attention(q, pos, blocks, half=True))
    parts = lambda cache, q: cache.rows(q, half=True), kind.scores, kind.other_scores, kind.packed, kind.window, kind.merge
    rows, scores, other_scores, packed, window, merge = map(compiled, parts)

    def dynamic(*tensors):
        for x in tensors:  # their number of blocks
            torch._dynamo.maybe_mark_dynamic(x, 2)
        return tensors

    def call(cache, q, pos, blocks):
        with V.set_choices_handler(choices):  # Inductor keeps the first it meets in a process; and this one is for attention alone
            # The products of codes wait for instructions, the smaller kernels for memory: side by side large caches take 3 to 11 % less
            # time. In small ones (8 KV heads and 32,768 tokens) they wait for nothing, and a second stream costs 2 us.
            if cache.batch * cache.k_window.shape[1] * (cache.max_len + 8192) < 2**19:
                return whole(cache, q, pos, blocks)
            main, side = torch.cuda.current_stream(q.device), stream(q.device)
            r = rows(cache, q)
            side.wait_stream(main)
            s = dynamic(*scores(cache, r, blocks))
            with torch.cuda.stream(side):
                zeros, recent = other_scores(cache, r, blocks)
                main.wait_stream(side)
                side.wait_stream(main)
                exact = window(cache, r, s, *dynamic(zeros), recent, pos)
            quantized = dynamic(*packed(cache, r, s, zeros, pos, blocks))
            main.wait_stream(side)
            return merge(cache, q, *quantized, *exact)

    return call


def is_product(node):
    """Is a node of Inductor's scheduler a `tl.dot`?"""
    return node is not None and not node.is_template() and node.is_native_matmul()


def launches():
    """Inductor's `inductor_choices_class` for `compiled_attention`: fixed launches for the kernels of attention, the fastest of those measured (results/).

    Inductor's own lists start at tiles many times larger, which spill; timing them would take a minute a kernel.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.triton import FixedTritonConfig
    from torch._inductor.virtualized import V

    def kind(features):
        """Key of LAUNCH, or None. The window has R + 1 slots, a sum of odd length; the number of blocks is a symbol.

        Any short reduction counts as a softmax, also those around attention (they are small).
        """
        n = str(features.reduction_numel)  # a number, or a symbol
        nodes = [getattr(n, "node", None) for n in features.scheduler_nodes()]
        if any(hasattr(n, "get_reduction_type") and n.get_reduction_type() == "dot" for n in nodes):
            reads = {r.name for n in features.scheduler_nodes() for r in n.read_writes.reads}
            types = {V.graph.get_dtype(r) for r in reads}
            if torch.uint8 in types:
                return "packed"
            values = n.isdigit() and int(n) % 32 and torch.float32 not in types
            return "window" if values and features.numel > 2**13 else "plain"  # of a few rows one pass is shorter: 2.7 against 3.7 us at B = 1
        if not features.is_reduction() or n.isdigit() and int(n) > 512:
            return None
        return "softmax" if n.isdigit() else "blocks"

    class Launches(InductorChoices):
        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            launch = LAUNCH.get(kind(features))
            if launch is None:
                return kernel_kwargs
            has = lambda name: not name.endswith("BLOCK") or name.lower().removesuffix("block") in groups[0]  # one row of one head has no z
            return {**kernel_kwargs, "fixed_config": FixedTritonConfig({n: x for n, x in launch.items() if has(n)})}

        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            if kind(features) is not None:  # the softmax of a block: one pass over the scores instead of three
                return "R0_BLOCK" not in LAUNCH[kind(features)]
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

        @staticmethod
        def can_fuse(scheduler, node1, node2, shared_data_score):
            if is_product(node1) or is_product(node2):
                # A heuristic against peak memory would leave the sum of two products outside their kernel.
                return shared_data_score > 0
            # What reads a product joins the product's kernel or none: outside it the product is float16 (see `stored`).
            for dep in (*node1.read_writes.reads, *node2.read_writes.reads):
                buffer = scheduler.name_to_buf.get(dep.name)
                if buffer is not None and is_product(buffer.defining_op):
                    return False
            return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)

        @staticmethod
        def reduction_split_factor(device, reduction_numel, numel, inner_reduction):
            # A sum over the window would be cut in two kernels.
            return 1 if reduction_numel <= 8192 else InductorChoices.reduction_split_factor(device, reduction_numel, numel, inner_reduction)

        def uuid(self):
            return "kivi-5"  # part of the key of the compile caches: change it with the tile

    return Launches()


def put(byte, codes, shift, bits):
    """`byte` with the plane at `shift` replaced by codes, all uint8; shift is a tensor."""
    return (byte & ~((1 << bits) - 1 << shift) | codes.to(shift.dtype) << shift).to(torch.uint8)
