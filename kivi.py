"""KIVI: a KV cache in 2 bits (arXiv 2402.02750), with attention over it in plain PyTorch.

Keys have a few large channels, so they are quantized per channel: a group is G consecutive tokens
of one channel. Values have no such channels, so they are quantized per token: a group is G
consecutive channels of one token. The newest tokens stay in full precision, in a window.

Schedule. At length T these tokens of a row have codes, whether they came by prefill or by append:

    K   0 .. T - T % R - 1     R keys at once, a *key block*, when T becomes a multiple of R
    V   0 .. T - R - 1         one value a step, as soon as T exceeds R

The official code attends first and quantizes then. So at length T attention still reads exactly: K
from token (T - 1) // R * R on, and V of the last R + 1 tokens. Hence the window is a ring of R + 1
slots: a new token does not overwrite the one that its step quantizes, and the order does not matter
here. S sink tokens, the first of a row, have slots of their own and are always read from there.

Packing. A byte holds P = 8 / bits codes, of tokens that lie G apart. P groups of G tokens that
share bytes are a *stack*. Of one row and KV head:

    k_packed [stacks, G, D]    byte [j, i, d]: channel d of the tokens (j P + a) G + i,
                               a = 0 .. P - 1, each in the bits from a * bits on
    v_packed [stacks, D, G]    byte [j, d, i]: the same, transposed

With 2 bits and G = 32, byte [0, 0, 0] holds channel 0 of tokens 0, 32, 64 and 96, in bits 0-1, 2-3,
4-5 and 6-7; byte [0, 1, 0] that of tokens 1, 33, 65 and 97; byte [1, 0, 0] of 128, 160, 192, 224.
Field a of all bytes of a stack is one group of tokens. K has a scale and a zero for each of its
channels, V for each of its tokens and Gv (mostly G) channels. Attention reads code * scale + zero.

Boost (not the paper's): the n loudest key channels of a row and KV head have codes of twice the
bits. Their high half stands in the channel's column, the low half in one of n columns behind the
others: k_packed [stacks, G, D + n]. The columns have the order of k_order, loudest first.

B rows, Hk KV heads, D channels, M query heads a KV head. `fused/attention.py` computes the same.
"""
from math import prod

import torch
from torch import nn
from torch.nn import functional as F

from quantize import PRESETS, KVConfig, channel_order, dequantize, key_codes  # noqa: F401
from quantize import quantize_groups, round_up, slices, unpack, value_codes

PORTION = 2**21, 2**26  # elements read at once on a CPU, whose caches hold 8 MB, and on CUDA


class Cache(nn.Module):
    """The interface of both caches. `prefill`, `append` and `attend` check what they get. A decode
    step that must never wait for the device calls their parts: `advance` counts on the host;
    `write`, `quantize_value`, `quantize_keys` and `attention` work on tensors alone."""

    def __init__(self, batch, n_kv_heads, max_len, head_dim, block, sliding, dtype, device):
        super().__init__()
        if min(batch, n_kv_heads, max_len, head_dim, 1 if sliding is None else sliding) < 1:
            sizes = f"{batch}, {n_kv_heads}, {max_len}, {head_dim} and {sliding}"
            raise ValueError(f"batch, n_kv_heads, max_len, head_dim, sliding must be > 0: {sizes}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"a cache holds float32, bfloat16 or float16, not {dtype}")
        self.batch, self.n_kv_heads, self.head_dim = batch, n_kv_heads, head_dim
        self.max_len, self.block, self.sliding = max_len, block, sliding
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = [0] * batch  # tokens in each row, as the host counts them
        # On the device: the next token's number in each row, all numbers of tokens, and of rows.
        for name, n in (("pos", batch), ("index", round_up(max_len, block)), ("rows", batch)):
            self.register_buffer(name, torch.arange(n, device=device), persistent=False)
        self.pos.zero_()

    def add(self, name, shape, dtype, spare=0):
        """A buffer of zeros [B, Hk, entries, ..] at an address that never changes.

        Fused kernels read whole blocks of tokens, into the next head or the `spare` entries behind
        all, and mask what they find. 128 bytes between heads make any slice alike to them: strided.
        """
        heads, head = prod(shape[:2]), prod(shape[2:])
        stride = head + 128 // dtype.itemsize
        n = heads * stride + spare * prod(shape[3:])
        buffer = torch.zeros(n, dtype=dtype, device=self.device)[: heads * stride]
        buffer = buffer.view(*shape[:2], stride)[..., :head].unflatten(2, shape[2:])
        self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a cache cannot be moved or cast: make another of that device and dtype")

    @property
    def length(self):
        """Tokens in the longest row."""
        return max(self.lengths)

    @property
    def nbytes(self):
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    def reset(self):
        """Empties the cache and leaves no trace of the old contents."""
        self.lengths[:] = [0] * self.batch  # in place: the layers of a model share the list
        for name, buffer in self.named_buffers():
            if name not in ("index", "rows"):
                buffer.zero_()

    def check(self, n_tokens, **tensors):
        """Raises ValueError unless every tensor is [B, heads, n_tokens, D] as this cache has it."""
        B, Hk, D, device = self.batch, self.n_kv_heads, self.head_dim, self.pos.device
        if "q" in tensors and not self.length:
            raise ValueError("attend needs a token in the cache: call prefill or append first")
        for name, x in tensors.items():
            heads = x.shape[1] if x.dim() == 4 else 0
            fits = heads and heads % Hk == 0 if name == "q" else heads == Hk
            same = x.dtype == self.dtype and x.device == device
            if not fits or not same or x.shape != (B, heads, n_tokens, D):
                wanted = f"a multiple of {Hk}" if name == "q" else Hk
                raise ValueError(f"{name} must be [{B}, {wanted}, {n_tokens}, {D}] in {self.dtype} "
                                 f"on {device}, got {list(x.shape)} in {x.dtype} on {x.device}")

    def check_finite(self, tokens, **tensors):
        """Raises ValueError if a number among these `tokens` of a tensor cannot be stored."""
        for name, x in tensors.items():
            x = 2 * x if self.dtype == torch.float32 else x.half()  # ranges, and scales as stored
            if not torch.isfinite(x.transpose(1, 2)[tokens]).all():
                raise ValueError(f"{name} holds NaN, inf or numbers too large for the cache")

    def prefill(self, k, v, lengths=None):
        """Fills the empty cache with whole prompts.

        k, v [B, Hk, L, D], rows right-padded; lengths [B] ints, tokens of each row (None: all L)
        raises ValueError: not empty; wrong shape, dtype, device or length; NaN or inf
        """
        if self.length:
            raise ValueError(f"prefill needs an empty cache, this one holds {self.length} tokens: "
                             "call reset() first")
        L = k.shape[2] if k.dim() == 4 else 1
        self.check(L, k=k, v=v)
        lengths = [L] * self.batch if lengths is None else list(lengths)
        if len(lengths) != self.batch or not all(n in range(1, L + 1) for n in lengths):
            raise ValueError(f"lengths must be {self.batch} numbers in 1 .. {L}, got {lengths}")
        if max(lengths) > self.max_len:
            raise ValueError(f"{max(lengths)} tokens exceed the cache's max_len of {self.max_len}")
        ends = torch.tensor(lengths, device=self.pos.device)
        self.check_finite(torch.arange(L, device=ends.device) < ends[:, None], k=k, v=v)
        self.fill(k, v, ends)
        self.pos.copy_(ends)
        self.lengths[:] = map(int, lengths)

    def append(self, k, v):
        """Appends one token to every row: k, v [B, Hk, 1, D].

        raises ValueError: wrong shape, dtype or device; a row is full; NaN or inf (on a CPU only:
               elsewhere the check would wait for the device, and NaN spreads in its row)
        """
        self.check(1, k=k, v=v)
        if self.pos.device.type == "cpu":
            self.check_finite(slice(None), k=k, v=v)
        self.advance()
        self.write(k, v, self.pos)
        if self.evicts_value():  # V: some row is longer than R
            self.quantize_value(self.pos)
        if self.completes_key_block():  # K: some row's length is a multiple of R
            self.quantize_keys(self.pos)
        self.pos += 1

    def advance(self):
        """The host's share of a step, once for all layers: counts the token, refuses a full row."""
        if self.length >= self.max_len:
            raise ValueError(f"the cache is full: it holds max_len, {self.max_len} tokens a row")
        self.lengths[:] = [n + 1 for n in self.lengths]

    def park(self, row):
        """Lets a finished row go on beside the others, from token 0; its results mean nothing."""
        self.pos[row] = 0
        self.lengths[row] = 0

    def attend(self, q):
        """softmax(q · K / sqrt(D)) · V over the tokens present in each row.

        q [B, H, 1, D], H a multiple of Hk -> [B, H, 1, D]
        raises ValueError: wrong shape, dtype or device; an empty cache
        """
        self.check(1, q=q)
        return self.attention(q, self.pos - 1, self.tokens(self.length))

    def attention(self, q, pos, t):
        """`attend` without its checks, of q at pos [B] over the tokens t (see `tokens`)."""
        # The query heads of a KV head are the rows of one product: each key is read once.
        rows = q.reshape(self.batch, self.n_kv_heads, -1, self.head_dim)  # [B, Hk, M, D]
        seen, out = self.seen(pos, t)[:, None, None], []  # [B, 1, 1, n]
        for heads in self.portions(len(t)):
            k, v = self.read(pos, len(t), heads)
            part = rows[:, heads].to(k.dtype)
            out.append(F.scaled_dot_product_attention(part, k, v, seen))
            del k, v  # or the next would be read beside them
        return torch.cat(out, 1).view(q.shape).to(q.dtype)

    def portions(self, n):
        return [slice(None)]  # of the KV heads, those that are read at a time

    def dequantized(self):
        """(k, v) [B, Hk, L, D]: what attend reads; zeros beyond a row's length."""
        pos, t = self.pos - 1, self.tokens(self.length)
        present = (t <= pos[:, None])[:, None, :, None]
        return tuple(torch.where(present, x, 0)[:, :, : self.length]
                     for x in self.read(pos, len(t), slice(None)))

    def tokens(self, length):
        """t [n], 0 .. n - 1: the tokens to read when the longest row has `length`."""
        return self.index[: round_up(max(1, length), self.block)]

    def seen(self, pos, t):
        """bool [B, n]: does the query at pos [B] attend to token t [n]?"""
        seen = t <= pos[:, None]
        return seen if self.sliding is None else seen & (t > pos[:, None] - self.sliding)

    def write(self, k, v, pos):
        """Writes token pos [B] of every row into the window: k, v [B, Hk, 1, D]."""
        slot = self.slot(pos)
        self.k_window[self.rows, :, slot] = k[:, :, 0]
        self.v_window[self.rows, :, slot] = v[:, :, 0]

    def evicts_value(self):
        return False  # a full-precision cache quantizes nothing

    def completes_key_block(self):
        return False


class FullCache(Cache):
    """The full-precision cache behind the same interface: a window that holds every token."""

    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, sliding=None,
                 dtype=torch.float32, device="cpu"):
        super().__init__(batch, n_kv_heads, max_len, head_dim, 128, sliding, dtype, device)
        for name in ("k_window", "v_window"):
            self.add(name, (batch, n_kv_heads, len(self.index), head_dim), dtype)

    def slot(self, t):
        return t

    def fill(self, k, v, lengths, row=0):
        """`prefill` without its checks, into the rows from `row` on; lengths [B] on the device."""
        n = min(k.shape[2], len(self.index))
        present = (self.index[:n] < lengths[:, None])[:, None, :, None]  # [B, 1, n, 1]
        for window, x in ((self.k_window, k), (self.v_window, v)):
            window[row : row + len(x), :, :n] = torch.where(present, x[:, :, :n], 0)

    def read(self, pos, n, heads):
        return self.k_window[:, heads, :n], self.v_window[:, heads, :n]


class KiviCache(Cache):
    """One layer's KIVI cache. Buffers are allocated once, and each token is quantized once.

    batch, n_kv_heads, max_len (most tokens of a row), head_dim
    options  of `KVConfig`: k_bits, v_bits, group_size (G), residual (R), sink (S), boost, ..
    sliding  attention reads only that many of the newest tokens, no older sink (None: all)
    raises   ValueError: see KVConfig.check; source: arXiv 2402.02750, schedule of jy-yuan/KIVI
    """

    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, sliding=None,
                 dtype=torch.float32, device="cpu", **options):
        c = KVConfig(**options)
        c.check(head_dim)
        block = c.block(max_len)
        super().__init__(batch, n_kv_heads, max_len, head_dim, block, sliding, dtype, device)
        self.config, self.capacity = c, c.capacity(max_len)  # capacity: tokens with room for codes
        self.quantizer = quantize_groups  # of `fill`; a faster one may take its place
        heads, D, G = (batch, n_kv_heads), head_dim, c.group_size
        columns, Gv = D + c.boosted(D), c.value_group(D)
        n_groups, spare = self.capacity // G, -self.capacity % block // G
        # Of a half-precision cache scales and zeros are float16, which kernels read as they are. It
        # holds bfloat16 numbers from 2^-17 to 65504 exactly, and rounds smaller ones by 2^-25.
        metadata = dtype if dtype == torch.float32 else torch.float16
        for name, bits, entry in (("k", c.k_bits, (G, columns)), ("v", c.v_bits, (D, G))):
            shape = (*heads, n_groups * bits // 8, *entry)
            self.add(f"{name}_packed", shape, torch.uint8, spare * bits // 8)
        for name in ("scale", "zero"):
            self.add(f"k_{name}", (*heads, n_groups, 1, D), metadata, spare)
            self.add(f"v_{name}", (*heads, n_groups, D // Gv, G), metadata, spare)
        self.add("k_order", (*heads, D if c.boost else 0), torch.int16)  # channel of each column
        for name in ("k_window", "v_window"):
            self.add(name, (*heads, c.sink + c.residual + 1, D), dtype)

    def slot(self, t):
        """Slot of the window where token t lies while it is there: sinks first, then the ring."""
        S, R = self.config.sink, self.config.residual
        return torch.where(t < S, t, S + (t - S) % (R + 1)) if S else t % (R + 1)

    def in_window(self, pos):
        """[B, slots]: tokens of the window, sinks first, then from pos [B] back to pos - R. Where
        they are fewer than slots, some are there several times."""
        S, newest = self.config.sink, pos[:, None]
        slots = torch.arange(S + self.config.residual + 1, device=pos.device)
        t = newest - slots + S
        if S:
            t = torch.where(slots < S, slots, t).minimum(newest)
        return t.clamp(min=0)

    def grouped_as(self, t):
        """The token whose key is used for t in its group: t itself, or another one for a sink.

        A sink is read from the window and would stretch the range of its group, so the group's
        first token that is no sink takes its place (if all are, nobody reads them)."""
        S, G = self.config.sink, self.config.group_size
        return torch.maximum(t, (t | G - 1).clamp(max=S)) if S else t

    def parts(self, name):
        """(bits, bytes, scale, zero) of K or V, tokens before channels: [B, Hk, stacks, G, D] and
        [B, Hk, groups, 1, D] twice (K), [B, Hk, groups, G, D / Gv] twice (V)."""
        if name == "k":
            return self.config.k_bits, self.k_packed, self.k_scale, self.k_zero
        return self.config.v_bits, self.v_packed.mT, self.v_scale.mT, self.v_zero.mT

    def fill(self, k, v, lengths, row=0):
        """`prefill` without its checks, into the rows from `row` on; lengths [B] on the device."""
        c, G, (B, Hk, L, D) = self.config, self.config.group_size, k.shape
        rows = slice(row, row + B)
        t = self.in_window(lengths - 1)
        place = (self.rows[rows, None], slice(None), self.slot(t))
        for window, x in ((self.k_window, k), (self.v_window, v)):
            window[place] = x[self.rows[:B, None], :, t]  # [B, slots, Hk, D]
        if c.boost:
            first = self.grouped_as(self.index[: c.residual]).clamp(max=L - 1)
            self.k_order[rows] = self.ordered(k[:, :, first], lengths >= c.residual, 0)
        k_end, v_end = lengths // c.residual * c.residual, lengths - c.residual
        for first, end in slices(min(L, self.capacity), B * Hk * D, 4 * G):
            t = torch.arange(first, end, device=k.device)
            keys, values = (k, self.grouped_as(t), k_end), (v, t, v_end)
            for name, (x, source, kept) in zip("kv", (keys, values)):
                x = x[:, :, source.clamp(max=L - 1)].unflatten(2, (-1, G))
                keep = (t < kept[:, None]).view(B, 1, -1, G, 1)
                new = self.quantizer(x, keep, c, name, self.order(rows))
                for buffer, y in zip(self.parts(name)[1:], new):
                    n = (end - first) // y.shape[2]  # tokens of a stack or of a group
                    buffer[rows, :, first // n : end // n] = y

    def ordered(self, keys, chosen, other):
        """k_order of the `chosen` rows [B] by their first keys [B, Hk, R, D], elsewhere `other`."""
        order = channel_order(keys.unflatten(2, (-1, self.config.group_size)))
        return torch.where(chosen[:, None, None], order, other)

    def order(self, rows=slice(None)):
        """k_order [B, Hk, 1, D] for all groups of these rows, None if no channel is boosted."""
        return self.k_order[rows, :, None] if self.config.boost else None

    def evicts_value(self):
        """Is some row longer than R, so that its oldest exact value gets codes?"""
        return self.length > self.config.residual

    def completes_key_block(self):
        """Is some row's length a multiple of R, so that its last R keys get codes?"""
        return any(n % self.config.residual == 0 for n in self.lengths)

    def quantize_value(self, pos):
        """Quantizes the value of token pos - R, where there is one; pos [B] is the newest token."""
        G, evicted = self.config.group_size, pos >= self.config.residual
        t = (pos - self.config.residual).clamp(min=0)
        new = value_codes(self.v_window[self.rows, :, self.slot(t)], self.config)  # [B, Hk, D]
        self.store("v", t // G, (slice(None), t % G), evicted, new)

    def quantize_keys(self, pos):
        """Quantizes the last R keys of the rows whose newest token pos [B] completes a block."""
        c, G, R = self.config, self.config.group_size, self.config.residual
        t = pos[:, None] // R * R + torch.arange(R, device=pos.device)  # [B, R]
        slot = self.slot(self.grouped_as(t))
        keys = self.k_window[self.rows[:, None], :, slot].transpose(1, 2)  # [B, Hk, R, D]
        if c.boost:
            self.k_order.copy_(self.ordered(keys, pos + 1 == R, self.k_order))
        new = key_codes(keys.unflatten(2, (-1, G)), c, self.order())
        for i, group in enumerate(t[:, ::G].unbind(1)):
            # A last key block that max_len cuts off has no room for codes, and never completes.
            group = (group // G).clamp(max=self.capacity // G - 1)
            self.store("k", group, (), (pos + 1) % R == 0, [x[:, :, i] for x in new])

    def store(self, name, group, token, chosen, new):
        """Stores codes, scale and zero of a `group` [B] of tokens, or of one `token` of it.

        Rows that are not `chosen` [B] stay as they are: an `if` would wait for the device.
        """
        bits = self.config.k_bits if name == "k" else self.config.v_bits
        for part, x in zip(("packed", "scale", "zero"), new):
            buffer = getattr(self, f"{name}_{part}")
            shape = (-1, *[1] * (x.dim() - 1))
            entry = group * bits // 8 if part == "packed" else group  # a stack, or a group
            place = (self.rows, slice(None), entry, *token)
            old = buffer[place]
            if part == "packed":
                shift = (group * bits % 8).view(shape)
                x = old & ~(2**bits - 1 << shift) | x << shift  # this field of the bytes alone
            buffer[place] = torch.where(chosen.view(shape), x.to(old.dtype), old)

    def portions(self, n):
        step = max(1, PORTION[self.pos.is_cuda] // (self.batch * n * self.head_dim))
        return [slice(first, first + step) for first in range(0, self.n_kv_heads, step)]

    def read(self, pos, n, heads):
        """(k, v) float32 [B, heads, n, D]: the first n tokens as a query at pos [B] reads them."""
        k, v = (self.from_codes(name, n, heads) for name in "kv")
        t = self.in_window(pos)  # [B, slots]
        place = (self.rows[:, None], slice(None), t)
        slot = (self.rows[:, None], slice(None), self.slot(t))
        v[place] = self.v_window[:, heads][slot].float()
        key_block = pos[:, None] // self.config.residual * self.config.residual
        exact = ((t >= key_block) | (t < self.config.sink))[..., None, None]
        k[place] = torch.where(exact, self.k_window[:, heads][slot].float(), k[place])
        return k, v

    def from_codes(self, name, n, heads):
        """code * scale + zero of the first n tokens, or 0 of those that never have codes."""
        c, (bits, packed, *scales) = self.config, self.parts(name)
        if n <= c.residual:  # all lie in the window
            return torch.zeros_like(self.k_window[:, heads, :n], dtype=torch.float32)
        stacks = round_up(n, 8 // bits * c.group_size) // (8 // bits * c.group_size)
        codes = unpack(packed[:, heads, :stacks, None], bits, 3).flatten(2, 4)  # [B, heads, n, D]
        scale, zero = (x[:, heads, : stacks * 8 // bits].flatten(2, 3).float() for x in scales)
        boosted = name == "k" and c.boost
        if boosted:
            codes, low = codes.float().tensor_split([self.head_dim], 3)
            codes[..., : low.shape[3]] += low / 2**bits
        x = dequantize(codes, scale, zero, 2 if name == "k" else 3)
        if boosted:
            x = x.gather(3, self.k_order[:, heads, None].argsort(3).expand_as(x))
        missing = n - x.shape[2]  # negative where whole stacks are more
        return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x[:, :, :n]
