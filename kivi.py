"""KIVI: a 2-bit KV cache whose decode attention reads the packed codes directly (arXiv 2402.02750).

Keys have a few large channels, so they are quantized per channel (groups of G consecutive tokens of one channel); values
have none, so they are quantized per token (groups of G consecutive channels of one token). The most recent tokens stay in
full precision: keys until a block of R is complete, values for R tokens.

Neither K nor V is ever rebuilt at full precision. With codes c, scale s and zero z (quantize.py), for a query q and
attention weights p, and g the group of token t (K) or of channel d (V):

    q . k_t = sum_d (q_d s_dg) c_dt + sum_d q_d z_dg         the second sum is one number per group
    out_d   = sum_t (p_t s_tg) c_td + sum_t p_t z_tg         the second sum is one number per group

and the inner sums unpack the codes on the fly: a byte holds one code of each of 8 / bits *planes*, masked in place
(`byte & 3 << 2j` is 4^j times code j; the power of four is divided out after the sum).

State after a row reaches length T, a function of T alone however the tokens came (kivi-algorithm: official code):

    packed K holds tokens [0, T - T % R)      attention at length T reads K exactly from token (T-1) // R * R on,
    packed V holds tokens [0, max(0, T-R))    and V exactly for the last R + 1 tokens: it runs before the flush of its step

The window of exact tokens is S pinned sink slots and a ring of R + 1; it still holds what the step flushes, so the flush
may run before or after the attention. Deliberately absent: eviction, paging, rollback, several tokens per step.
"""
from dataclasses import dataclass
from math import lcm

import torch
from torch import nn
from torch.nn import functional as F

from quantize import BITS, dequantize, group_codes, pack, unpack

NEVER = float("-inf")


@dataclass(frozen=True)
class KVConfig:
    """What a KIVI cache stores: bits of K and V, group size G, full-precision window R, sink tokens S."""

    k_bits: int = 2
    v_bits: int = 2
    group_size: int = 32
    residual: int = 128
    sink: int = 0

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

    @property
    def block(self):
        """Tokens in the unit that attention reads and capacity is rounded to: whole residuals, whole bytes of K at any bits."""
        return lcm(self.residual, 8 // min(BITS) * self.group_size)

    def capacity(self, max_len):
        return -(-max_len // self.block) * self.block

    def parts(self, batch, n_kv_heads, max_len, head_dim, dtype):
        """Bytes of one layer's cache by part, from shapes alone: {"codes", "metadata", "window", "positions"}."""
        rows, T = batch * n_kv_heads, self.capacity(max_len)
        return {
            "codes": rows * T * head_dim * (self.k_bits + self.v_bits) // 8,
            "metadata": rows * T * head_dim // self.group_size * 4 * dtype.itemsize,  # scale and zero of K and of V
            "window": rows * (self.sink + self.residual + 1) * head_dim * 2 * dtype.itemsize,
            "positions": batch * 8 + T // self.block * 8,
        }

    def bytes(self, batch, n_kv_heads, max_len, head_dim, dtype):
        """Bytes of one layer's cache: what `KiviCache(...).nbytes` will be."""
        return sum(self.parts(batch, n_kv_heads, max_len, head_dim, dtype).values())


PRESETS = {"kivi2": KVConfig(2, 2), "kivi4": KVConfig(4, 4), "k4v2": KVConfig(4, 2)}


def _product(a, code, join=False):
    """a [B, Hk, n, M, X] @ code [B, Hk, n, X, Y], with `code` unpacked inside the product; join sums it over the n blocks.

    Compiled for the CPU a matrix product would first write its operand out at full precision: one sum a row of `a`
    instead, which Inductor fuses with the unpacking and with its neighbours into one loop over the packed bytes.
    """
    if torch.compiler.is_compiling() and a.device.type == "cpu":
        dims = (2, -2) if join else -2  # both at once: one partial result a block took six times as long
        return torch.stack([(a[..., m, :, None] * code).sum(dims) for m in range(a.shape[-2])], -2)
    return (a @ code).sum(2) if join else a @ code


class Cache(nn.Module):
    """What both caches share: capacity, positions and the host's copy of every row's length.

    Tensors live in buffers (static addresses, so a CUDA graph may replay the step); the schedule lives on the host in
    `lengths`. The tensor-only methods `update`, `flush` and `attention` never read the host's numbers and can be compiled;
    `prefill`, `append` and `attend` are the checked interface on top of them.
    """

    def __init__(self, batch, max_len, block, capacity, device):
        super().__init__()
        if batch < 1 or max_len < 1:
            raise ValueError(f"a cache needs at least one row and one token, got batch {batch} and max_len {max_len}")
        self.batch, self.max_len, self.block = batch, max_len, block
        self.lengths = [0] * batch
        self.register_buffer("pos", torch.zeros(batch, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("index", torch.arange(capacity // block, device=device), persistent=False)

    @property
    def length(self):
        """Tokens present in the longest row."""
        return max(self.lengths)

    @property
    def nbytes(self):
        """Bytes of every buffer this cache owns."""
        return sum(b.nbytes for b in self.buffers())

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
        nb = max(1, -(-length // self.block))
        if bucket and nb > 8:
            step = 1 << (nb - 1).bit_length() - 3
            nb = -(-nb // step) * step
        blocks = self.index[:nb]
        # A merely dynamic size would recompile at 1, and once more when the blocks fill the whole buffer.
        torch._dynamo.decorators.mark_unbacked(blocks, 0)
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
        self.pos.copy_(torch.tensor(lengths))
        real = torch.arange(L, device=k.device) < self.pos[:, None]  # [B, L]
        for name, x in (("k", k), ("v", v)):
            if not torch.isfinite(x).transpose(1, 2)[real].all():
                raise ValueError(f"{name} holds NaN or inf: the cache cannot quantize it")
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

    def attend(self, q):
        """softmax(q . K / sqrt(D)) . V over the tokens present in each row: q [B, H, 1, D] -> [B, H, 1, D]."""
        return self.attention(q, self.pos - 1, self.blocks(self.length))


class FullCache(Cache):
    """The full-precision cache: same interface, K and V [B, Hk, T, D] as they came. The baseline of every measurement."""

    BLOCK = 128

    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, dtype=torch.float32, device="cpu"):
        super().__init__(batch, max_len, self.BLOCK, self.capacity(max_len), device)
        shape = batch, n_kv_heads, self.capacity(max_len), head_dim
        for name in "kv":
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("row", torch.arange(batch, device=device), persistent=False)

    @classmethod
    def capacity(cls, max_len):
        return -(-max_len // cls.BLOCK) * cls.BLOCK

    @classmethod
    def bytes(cls, batch, n_kv_heads, max_len, head_dim, dtype):
        """Bytes of one layer's cache: what `FullCache(...).nbytes` will be."""
        T = cls.capacity(max_len)
        return batch * n_kv_heads * T * head_dim * 2 * dtype.itemsize + batch * 16 + T // cls.BLOCK * 8

    def fill(self, k, v, lengths):
        L = min(k.shape[2], self.k.shape[2])
        real = torch.arange(L, device=k.device)[:, None] < lengths[:, None, None, None]  # [B, 1, L, 1]
        self.k[:, :, :L] = torch.where(real, k[:, :, :L], 0)
        self.v[:, :, :L] = torch.where(real, v[:, :, :L], 0)

    def update(self, k, v, pos):
        self.k[self.row, :, pos] = k[:, :, 0].to(self.k.dtype)
        self.v[self.row, :, pos] = v[:, :, 0].to(self.v.dtype)

    def due(self):
        return False

    def attention(self, q, pos, blocks):
        """q [B, H, 1, D], pos [B] index of the newest token, blocks [nb] -> [B, H, 1, D]."""
        n = blocks.shape[0] * self.block
        k, v = self.k.narrow(2, 0, n), self.v.narrow(2, 0, n)
        B, Hk, _, D = k.shape
        seen = torch.arange(n, device=q.device) <= pos[:, None, None, None]  # [B, 1, 1, n]
        # The query heads of one KV head become the rows of one product: each key is read once, not H / Hk times.
        return F.scaled_dot_product_attention(q.reshape(B, Hk, -1, D).to(k.dtype), k, v, attn_mask=seen).reshape(q.shape).to(q.dtype)

    def dequantized(self):
        """(k, v) [B, Hk, L, D]: what attend reads."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class KiviCache(Cache):
    """One layer's KIVI cache. Buffers are allocated once; nothing is ever re-quantized.

    batch, n_kv_heads, max_len (tokens a row can hold), head_dim; the options are those of `KVConfig`
    raises  ValueError: see KVConfig.check
    source  KIVI, arXiv 2402.02750; schedule and order of operations of jy-yuan/KIVI

    Codes of K are stored in blocks of P * G tokens, P = 8 / bits: byte [d, i] of a block holds token i of each of its P
    groups, so a plane is a group, has one scale per channel, and the bytes of a plane lie side by side. A byte of V holds
    channels j, j + D / P, j + 2D / P, ... of one token.
    """

    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, k_bits=2, v_bits=2, group_size=32, residual=128, sink=0,
                 dtype=torch.float32, device="cpu"):
        self.config = c = KVConfig(k_bits, v_bits, group_size, residual, sink)
        c.check(head_dim)
        super().__init__(batch, max_len, c.block, c.capacity(max_len), device)
        B, Hk, D, G, R, T = batch, n_kv_heads, head_dim, group_size, residual, c.capacity(max_len)
        self.k_planes, self.v_planes = 8 // k_bits, 8 // v_bits

        def buffer(name, *shape, dtype=dtype):
            self.register_buffer(name, torch.zeros(B, Hk, *shape, dtype=dtype, device=device), persistent=False)

        buffer("k_packed", T // (self.k_planes * G), D, G, dtype=torch.uint8)
        buffer("k_scale", T // G, D)
        buffer("k_zero", T // G, D)
        buffer("v_packed", T, D // self.v_planes, dtype=torch.uint8)
        buffer("v_scale", T, D // G)
        buffer("v_zero", T, D // G)
        buffer("k_window", sink + R + 1, D)
        buffer("v_window", sink + R + 1, D)

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
        """Token whose key stands in for token t in its group: itself, or its first neighbour that is no sink.

        Sinks are read from the window; left in their group they would stretch the range of all its other tokens.
        """
        S, G = self.config.sink, self.config.group_size
        return torch.maximum(t, torch.clamp(t | G - 1, max=S)) if S else t

    def fill(self, k, v, lengths):
        """`prefill` without its checks: k, v [B, Hk, L, D] and lengths [B] on the device."""
        c, (B, Hk, L, D) = self.config, k.shape
        G, P, dtype = c.group_size, self.k_planes, self.k_scale.dtype
        L = min(L, len(self.index) * self.block)
        k, v = k[:, :, :L].to(dtype), v[:, :, :L].to(dtype)
        lengths = lengths[:, None]  # [B, 1]

        slots = self.slot_tokens(lengths[:, 0] - 1)  # [B, W]
        for window, x in ((self.k_window, k), (self.v_window, v)):
            held = x.gather(2, slots.clamp(0)[:, None, :, None].expand(B, Hk, -1, D))
            window.copy_(torch.where((slots >= 0)[:, None, :, None], held, 0))

        blocks = -(-L // (P * G))
        t = torch.arange(blocks * P * G, device=k.device)
        groups = k[:, :, self.source(t).clamp(max=L - 1)].view(B, Hk, blocks, P, G, D).transpose(-1, -2)
        codes, scale, zero = group_codes(groups, c.k_bits)  # codes [B, Hk, blocks, P, D, G], scale [.., D, 1]
        full = torch.arange(blocks * P, device=k.device) * G < lengths // c.residual * c.residual  # [B, blocks * P]
        full = full.view(B, 1, blocks, P, 1, 1)
        self.k_packed[:, :, :blocks] = pack(torch.where(full, codes, 0), c.k_bits, dim=3).squeeze(3)
        self.k_scale[:, :, : blocks * P] = torch.where(full, scale, 0).view(B, Hk, -1, D)
        self.k_zero[:, :, : blocks * P] = torch.where(full, zero, 0).view(B, Hk, -1, D)

        old = torch.arange(L, device=k.device) < lengths - c.residual  # [B, L]
        for buffer, x in zip((self.v_packed, self.v_scale, self.v_zero), self.quantize_v(v)):
            buffer[:, :, :L] = torch.where(old[:, None, :, None], x, 0)

    def quantize_v(self, v):
        """v [..., D] -> packed [..., D / P], scale [..., D / G], zero [..., D / G]."""
        c, D = self.config, v.shape[-1]
        codes, scale, zero = group_codes(v.unflatten(-1, (D // c.group_size, c.group_size)), c.v_bits)
        planes = codes.flatten(-2).unflatten(-1, (self.v_planes, D // self.v_planes))
        return pack(planes, c.v_bits, dim=-2).squeeze(-2), scale.squeeze(-1), zero.squeeze(-1)

    def update(self, k, v, pos):
        """Writes token pos [B] (k, v [B, Hk, 1, D]) into the window and quantizes the value that leaves it."""
        row = torch.arange(self.batch, device=pos.device)
        slot = self.slot(pos)
        self.k_window[row, :, slot] = k[:, :, 0].to(self.k_window.dtype)
        self.v_window[row, :, slot] = v[:, :, 0].to(self.v_window.dtype)
        t = pos - self.config.residual  # the ring of R + 1 still holds it
        leaving, t = (t >= 0)[:, None, None], t.clamp(0)
        new = self.quantize_v(self.v_window[row, :, self.slot(t)])  # each [B, Hk, ..]
        for buffer, x in zip((self.v_packed, self.v_scale, self.v_zero), new):
            # Where nothing leaves, the row is written back as it was: a branch would need the host or a second graph.
            buffer[row, :, t] = torch.where(leaving, x, buffer[row, :, t])

    def due(self):
        """Does some row complete a block of R keys with its newest token? Asked after `advance`, answered by the host."""
        return any(n % self.config.residual == 0 for n in self.lengths)

    def flush(self, pos):
        """Quantizes the last R keys of the rows whose newest token pos [B] completes a block of R; others stay as they are."""
        c = self.config
        G, P = c.group_size, self.k_planes
        row = torch.arange(self.batch, device=pos.device)
        due = ((pos + 1) % c.residual == 0)[:, None, None]
        first = pos // c.residual * c.residual
        for start in range(0, c.residual, G):
            t = first + start  # [B] first token of the group
            tokens = self.source(t[:, None] + torch.arange(G, device=pos.device))  # [B, G]
            keys = self.k_window[row[:, None], :, self.slot(tokens)]  # [B, G, Hk, D]
            codes, scale, zero = group_codes(keys.permute(0, 2, 3, 1), c.k_bits)  # [B, Hk, D, G], [B, Hk, D, 1]
            group = t // G
            old = self.k_packed[row, :, group // P]  # [B, Hk, D, G]
            shift = (group % P * c.k_bits)[:, None, None, None]
            byte = old & ~(2**c.k_bits - 1 << shift) | codes.to(torch.int64) << shift  # one plane of the block's bytes
            self.k_packed[row, :, group // P] = torch.where(due[..., None], byte.to(torch.uint8), old)
            for buffer, x in ((self.k_scale, scale), (self.k_zero, zero)):
                buffer[row, :, group] = torch.where(due, x.squeeze(-1), buffer[row, :, group])

    # ---- reading ----------------------------------------------------------------------------------------------------

    def attention(self, q, pos, blocks):
        """Attention of one query per head over the packed cache and the window.

        q [B, H, 1, D], pos [B] index of the newest token, blocks [nb] (see `blocks`) -> [B, H, 1, D]
        """
        c, nb, C = self.config, blocks.shape[0], self.block
        S, R, (B, H, _, D), Hk = c.sink, c.residual, q.shape, self.k_window.shape[1]
        qs = q.reshape(B, Hk, H // Hk, D).float() * D**-0.5  # [B, Hk, M, D]
        start = (pos // R * R)[:, None]  # [B, 1] keys from here on are exact
        codes = self.scores(qs, nb)  # [B, Hk, M, nb * C]

        held = self.slot_tokens(pos)  # [B, W]
        exact = (held < S) | (held >= start)
        window = qs @ self.k_window.float().transpose(-1, -2)  # [B, Hk, M, W]
        # Tokens between the K and the V boundary: their value is exact, their key is quantized.
        between = codes.gather(-1, held.clamp(0, nb * C - 1)[:, None, None].expand(*window.shape))
        window = torch.where(exact[:, None, None], window, between)
        window = window.masked_fill((held < 0)[:, None, None], NEVER)

        t = (blocks[:, None] * C + torch.arange(C, device=q.device)).flatten()
        packed = (t >= S) & (t < (pos - R)[:, None])  # [B, nb * C] tokens whose value is quantized
        codes = codes.masked_fill(~packed[:, None, None], NEVER)

        top = torch.maximum(codes.amax(-1, keepdim=True), window.amax(-1, keepdim=True))
        p, w = (codes - top).exp(), (window - top).exp()
        out = self.values(p, nb) + w @ self.v_window.float()  # [B, Hk, M, D]
        return (out / (p.sum(-1, keepdim=True) + w.sum(-1, keepdim=True))).view(B, H, 1, D).to(q.dtype)

    def scores(self, q, nb):
        """q . K over the packed keys of nb blocks: q [B, Hk, M, D] float32 -> [B, Hk, M, nb * C]."""
        bits, G, P = self.config.k_bits, self.config.group_size, self.k_planes
        n = nb * (self.block // (P * G))
        w = self.k_packed.narrow(2, 0, n)  # [B, Hk, n, D, G]
        s = self.k_scale.narrow(2, 0, n * P).unflatten(2, (n, P))  # [B, Hk, n, P, D]
        z = self.k_zero.narrow(2, 0, n * P).unflatten(2, (n, P))
        planes = []
        for j in range(P):
            code = (w & (2**bits - 1 << bits * j)).float()  # [B, Hk, n, D, G], 2^(bits j) times the code
            a = q[:, :, None] * (s[:, :, :, j, None] * 2.0 ** (-bits * j))  # [B, Hk, n, M, D]
            planes.append(_product(a, code))
        zero = (q[:, :, None, :, None] * z[:, :, :, None]).sum(-1)  # [B, Hk, n, M, P]
        return (torch.stack(planes, -2) + zero[..., None]).movedim(3, 2).flatten(3)

    def values(self, p, nb):
        """p . V over the packed values of nb blocks: p [B, Hk, M, nb * C] float32 -> [B, Hk, M, D]."""
        bits, C, P, D = self.config.v_bits, self.block, self.v_planes, self.v_window.shape[-1]
        p = p.unflatten(-1, (nb, C)).movedim(2, 3)  # [B, Hk, nb, M, C]
        w, s, z = (x.narrow(2, 0, nb * C).unflatten(2, (nb, C)) for x in (self.v_packed, self.v_scale, self.v_zero))
        width = min(self.config.group_size, D // P)  # channels of one plane that share a scale
        out = []
        for d in range(0, D, width):
            j, first, g = d // (D // P), d % (D // P), d // self.config.group_size
            code = (w[..., first : first + width] & (2**bits - 1 << bits * j)).float()  # [B, Hk, nb, C, width]
            a = p * (s[..., g] * 2.0 ** (-bits * j))[:, :, :, None]  # [B, Hk, nb, M, C]
            out.append(_product(a, code, join=True))  # [B, Hk, M, width]
        zero = (p[..., None] * z[:, :, :, None]).sum(-2).sum(2)  # [B, Hk, M, D / G]
        return torch.cat(out, -1) + zero.repeat_interleave(self.config.group_size, -1)

    def dequantized(self):
        """(k, v) [B, Hk, L, D] in the cache's dtype: exactly what attend reads now; zeros beyond a row's own length."""
        c, L = self.config, self.length
        B, Hk, W, D = self.k_window.shape
        codes = unpack(self.k_packed.unsqueeze(3), c.k_bits, dim=3)  # [B, Hk, blocks, P, D, G]
        k = dequantize(codes.transpose(-1, -2).reshape(B, Hk, -1, D), self.k_scale, self.k_zero, dim=2)
        codes = unpack(self.v_packed.unsqueeze(-2), c.v_bits, dim=-2).flatten(-2)
        v = dequantize(codes, self.v_scale, self.v_zero)
        pos = self.pos - 1
        t = torch.arange(L, device=pos.device)
        slot = self.slot(t)[None].expand(B, L)
        kept = self.slot_tokens(pos).gather(1, slot) == t  # [B, L] tokens that the window holds
        exact_k = kept & ((t < c.sink) | (t >= (pos // c.residual * c.residual)[:, None]))
        present = (t <= pos[:, None])[:, None, :, None]
        out = []
        for x, window, exact in ((k, self.k_window, exact_k), (v, self.v_window, kept)):
            held = window.gather(2, slot[:, None, :, None].expand(B, Hk, L, D))
            out.append(torch.where(present, torch.where(exact[:, None, :, None], held, x[:, :, :L]), 0))
        return tuple(out)
