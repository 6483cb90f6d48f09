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
channels, V for each of its tokens and G channels. Attention reads x = code * scale + zero.

B rows, Hk KV heads, D channels, M query heads a KV head. `fused/attention.py` computes the same.
"""
import torch
from torch import nn
from torch.nn import functional as F

from quantize import PRESETS, KVConfig, group_codes, planes  # noqa: F401  (PRESETS: to be at hand)
from quantize import quantize_groups, round_up, slices, value_codes


class Cache(nn.Module):
    """The interface of both caches: `prefill`, `append` and `attend` check what they get.

    A decode step that must never wait for the device calls their parts: `advance` counts on the
    host; `write`, `quantize_value`, `quantize_keys` and `attention` work on tensors alone.
    """

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
        self.add("pos", (batch,), torch.int64)  # the same on the device: the next token's number
        self.add("index", (round_up(max_len, block),), torch.int64)
        torch.arange(len(self.index), out=self.index)

    def add(self, name, shape, dtype, spare=0):
        """A buffer of zeros, whose address never changes, so that a CUDA graph may be replayed.

        Fused kernels read whole blocks of tokens. The last may end behind a head's entries, in the
        next head or in the `spare` entries at the end; what is there is masked. 128 unused bytes
        behind every head keep all slices from being contiguous: a compiler meets one case only.
        """
        strides = list(torch.empty(shape, device="meta").stride())
        if len(shape) > 3:
            strides[1] += 128 // dtype.itemsize
            strides[0] = shape[1] * strides[1]
        size = shape[0] * strides[0] + (spare * strides[2] if spare else 0)
        storage = torch.zeros(size, dtype=dtype, device=self.device).untyped_storage()
        buffer = torch.empty(0, dtype=dtype, device=self.device).set_(storage, 0, shape, strides)
        self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def sizes(cls, *shape, **options):
        """Bytes by part of the cache that these arguments make, without allocating it."""
        parts = {"codes": 0, "metadata": 0, "window": 0, "positions": 0}
        names = {"packed": "codes", "scale": "metadata", "zero": "metadata", "window": "window"}
        for name, buffer in cls(*shape, **options, device="meta").named_buffers():
            part = names.get(name[2:], "positions")
            parts[part] += buffer.untyped_storage().nbytes()
        return parts

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a cache cannot be moved or cast: make another of that device and dtype")

    @property
    def length(self):
        """Tokens in the longest row."""
        return max(self.lengths)

    @property
    def nbytes(self):
        """Bytes of all buffers."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    def reset(self):
        """Empties the cache and leaves no trace of the old contents."""
        self.lengths[:] = [0] * self.batch  # in place: the layers of a model share the list
        for name, buffer in self.named_buffers():
            if name != "index":
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

    def tokens(self, length):
        """t [n], 0 .. n - 1: the tokens to read when the longest row has `length`."""
        return self.index[: round_up(max(1, length), self.block)]

    def seen(self, pos, t):
        """bool [B, n]: does the query at pos [B] attend to token t [n]?"""
        seen = t <= pos[:, None]
        return seen if self.sliding is None else seen & (t > pos[:, None] - self.sliding)

    def write(self, k, v, pos):
        """Writes token pos [B] of every row into the window: k, v [B, Hk, 1, D]."""
        row = torch.arange(self.batch, device=pos.device)
        slot = self.slot(pos)
        self.k_window[row, :, slot] = k[:, :, 0]
        self.v_window[row, :, slot] = v[:, :, 0]

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

    def attention(self, q, pos, t):
        """q [B, H, 1, D] at pos [B] over the tokens t (see `tokens`) -> [B, H, 1, D]."""
        # The query heads of a KV head are the rows of one product: each key is read once.
        rows = q.reshape(self.batch, self.n_kv_heads, -1, self.head_dim)
        k, v = (window[:, :, : len(t)] for window in (self.k_window, self.v_window))
        seen = self.seen(pos, t)[:, None, None]  # [B, 1, 1, n]
        return F.scaled_dot_product_attention(rows, k, v, seen).reshape(q.shape)

    def dequantized(self):
        """(k, v) [B, Hk, L, D]: what attend reads."""
        return self.k_window[:, :, : self.length], self.v_window[:, :, : self.length]


class KiviCache(Cache):
    """One layer's KIVI cache. Buffers are allocated once, and each token is quantized once.

    batch, n_kv_heads, max_len (most tokens of a row), head_dim
    options  of `KVConfig`: k_bits, v_bits, group_size (G), residual (R), sink (S), shrink
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
        self.quantizer = quantize_groups  # of `fill`; may be replaced by a compiled one
        heads, D, G = (batch, n_kv_heads), head_dim, c.group_size
        n_groups, spare = self.capacity // G, -self.capacity % block // G
        # Of a half-precision cache scales and zeros are float16, which kernels read as they are. It
        # holds bfloat16 numbers from 2^-17 to 65504 exactly, and rounds smaller ones by 2^-25.
        metadata = dtype if dtype == torch.float32 else torch.float16
        for name, bits, entry in (("k", c.k_bits, (G, D)), ("v", c.v_bits, (D, G))):
            shape = (*heads, n_groups * bits // 8, *entry)
            self.add(f"{name}_packed", shape, torch.uint8, spare * bits // 8)
        for name in ("scale", "zero"):
            self.add(f"k_{name}", (*heads, n_groups, D), metadata, spare)
            self.add(f"v_{name}", (*heads, n_groups, D // G, G), metadata, spare)
        for name in ("k_window", "v_window"):
            self.add(name, (*heads, c.sink + c.residual + 1, D), dtype)

    def slot(self, t):
        """Slot of the window where token t lies while it is there: sinks first, then the ring."""
        S, R = self.config.sink, self.config.residual
        return torch.where(t < S, t, S + (t - S) % (R + 1)) if S else t % (R + 1)

    def exact(self, pos, t):
        """Two bools [B, n]: does the query at pos [B] read K, and V, of token t [n] exactly?"""
        S, R, newest = self.config.sink, self.config.residual, pos[:, None]
        exact_k, exact_v = t >= newest // R * R, t >= newest - R
        return (exact_k | (t < S), exact_v | (t < S)) if S else (exact_k, exact_v)

    def grouped_as(self, t):
        """The token whose key is used for t in its group: t itself, or another one for a sink.

        A sink is read from the window. In its group it would stretch the range of the others, so
        the group's first token that is no sink takes its place (if all are, nobody reads them).
        """
        S, G = self.config.sink, self.config.group_size
        return torch.maximum(t, (t | G - 1).clamp(max=S)) if S else t

    def parts(self, name):
        """(bits, bytes, scale, zero) of K or V, tokens before channels: [B, Hk, stacks, G, D] and
        [B, Hk, groups, 1, D] twice (K), [B, Hk, groups, G, D / G] twice (V)."""
        if name == "k":
            scale, zero = self.k_scale.unsqueeze(3), self.k_zero.unsqueeze(3)
            return self.config.k_bits, self.k_packed, scale, zero
        return self.config.v_bits, self.v_packed.mT, self.v_scale.mT, self.v_zero.mT

    def fill(self, k, v, lengths, row=0):
        """`prefill` without its checks, into the rows from `row` on; lengths [B] on the device."""
        c, (B, Hk, L, D) = self.config, k.shape
        rows = torch.arange(B, device=k.device)[:, None]
        # The token of each slot: sinks, then the newest R + 1. Short rows write a token twice.
        slots = torch.arange(c.sink + c.residual + 1, device=k.device)
        newest = lengths[:, None] - 1
        t = torch.where(slots < c.sink, slots, newest - slots + c.sink).minimum(newest).clamp(min=0)
        self.k_window[row + rows, :, self.slot(t)] = k[rows, :, t]  # t [B, slots]
        self.v_window[row + rows, :, self.slot(t)] = v[rows, :, t]
        k_end, v_end = lengths // c.residual * c.residual, lengths - c.residual
        for first, last in slices(min(L, self.capacity), B * Hk * D, 4 * c.group_size):
            t = torch.arange(first, last, device=k.device)
            for name, x, source, end in (("k", k, self.grouped_as(t), k_end), ("v", v, t, v_end)):
                x = x[:, :, source.clamp(max=L - 1)].unflatten(2, (-1, c.group_size))
                keep = (t < end[:, None]).view(B, 1, -1, c.group_size, 1)
                for buffer, y in zip(self.parts(name)[1:], self.quantizer(x, keep, c, name)):
                    n = (last - first) // y.shape[2]  # tokens of a stack or of a group
                    buffer[row : row + B, :, first // n : last // n] = y

    def evicts_value(self):
        """Is some row longer than R, so that its oldest exact value gets codes?"""
        return self.length > self.config.residual

    def completes_key_block(self):
        """Is some row's length a multiple of R, so that its last R keys get codes?"""
        return any(n % self.config.residual == 0 for n in self.lengths)

    def quantize_value(self, pos):
        """Quantizes the value of token pos - R, where there is one; pos [B] is the newest token."""
        c, row = self.config, torch.arange(self.batch, device=pos.device)
        t = (pos - c.residual).clamp(min=0)
        new = value_codes(self.v_window[row, :, self.slot(t)], c)  # codes [B, Hk, D]
        token = (slice(None), t % c.group_size)
        self.store("v", t // c.group_size, token, pos >= c.residual, new)

    def quantize_keys(self, pos):
        """Quantizes the last R keys of the rows whose newest token pos [B] completes a block."""
        c, row = self.config, torch.arange(self.batch, device=pos.device)[:, None]
        complete = (pos + 1) % c.residual == 0
        for first in range(0, c.residual, c.group_size):
            offset = torch.arange(first, first + c.group_size, device=pos.device)
            t = pos[:, None] // c.residual * c.residual + offset  # [B, G]
            keys = self.k_window[row, :, self.slot(self.grouped_as(t))]  # [B, G, Hk, D]
            codes, scale, zero = group_codes(keys.transpose(1, 2), c.k_bits, 2, c.shrink)
            # A last key block that max_len cuts off has no room for codes, and never completes.
            group = (t[:, 0] // c.group_size).clamp(max=self.capacity // c.group_size - 1)
            self.store("k", group, (), complete, (codes, scale[:, :, 0], zero[:, :, 0]))

    def store(self, name, group, token, chosen, new):
        """Stores codes, scale and zero of a `group` [B] of tokens, or of one `token` of it.

        Rows that are not `chosen` [B] stay as they are: an `if` would wait for the device.
        """
        bits = self.config.k_bits if name == "k" else self.config.v_bits
        row, fields = torch.arange(self.batch, device=group.device), 8 // bits
        for part, x in zip(("packed", "scale", "zero"), new):
            buffer = getattr(self, f"{name}_{part}")
            shape = (-1, *[1] * (x.dim() - 1))
            place = (row, slice(None), group // fields if part == "packed" else group, *token)
            old = buffer[place]
            if part == "packed":
                shift = (group % fields * bits).view(shape)
                x = old & ~(2**bits - 1 << shift) | x << shift  # this field of the bytes alone
            buffer[place] = torch.where(chosen.view(shape), x.to(old.dtype), old)

    def attention(self, q, pos, t):
        """Attention: scores from codes and window are put together, in the order of tokens.

        q [B, H, 1, D] at pos [B] over the tokens t (see `tokens`) -> [B, H, 1, D]
        """
        q_rows = q.reshape(self.batch, self.n_kv_heads, -1, self.head_dim).float()  # [B, Hk, M, D]
        exact_k, exact_v = (x[:, None, None] for x in self.exact(pos, t))  # [B, 1, 1, n]
        packed = q_rows.new_zeros(*q_rows.shape[:3], len(t))  # [B, Hk, M, n]
        for part, keys in self.read("k", len(t)):
            packed[..., part] = q_rows @ keys.flatten(2, 3).mT
        window = q_rows @ self.k_window.float().mT  # [B, Hk, M, slots]
        slot = self.slot(t)
        scores = torch.where(exact_k, window[..., slot], packed) * self.head_dim**-0.5
        scores = scores.masked_fill(~self.seen(pos, t)[:, None, None], float("-inf"))
        p = scores.softmax(-1)  # [B, Hk, M, n]
        p_exact = torch.where(exact_v, p, 0)
        p_slots = p_exact.new_zeros(window.shape).index_add_(3, slot, p_exact)  # by slot
        out = p_slots @ self.v_window.float()
        p_packed = p - p_exact
        for part, values in self.read("v", len(t)):
            p_groups = p_packed[..., part].unflatten(3, (-1, self.config.group_size))
            out = out + (p_groups.transpose(2, 3) @ values).sum(2)  # [B, Hk, M, D]
        return out.view(q.shape).to(q.dtype)

    def read(self, name, n):
        """Yields (part, x_hat): x_hat = codes * scale + zero of K or V, for a part of the tokens.

        n  only of the first n tokens, or as many of them as have codes
        yields a slice of the tokens and float32 [B, Hk, groups, G, D]
        """
        bits, packed, scale, zero = self.parts(name)
        G, P = self.config.group_size, 8 // bits
        stacks = min(n // (P * G), packed.shape[2])
        stacks = stacks if n > self.config.residual else 0  # so few tokens are all exact
        step = max(1, 2**22 // (P * packed[:, :, :1].numel()))  # 16 MB, for the CPU's caches
        for first in range(0, stacks, step):
            end = min(first + step, stacks)
            codes = torch.stack(planes(packed[:, :, first:end], bits), 3).flatten(2, 3)
            x = codes.float().unflatten(4, (scale.shape[4], -1))  # K [.., D, 1]; V [.., D / G, G]
            groups = slice(first * P, end * P)
            x = x.mul_(scale[:, :, groups, ..., None]).add_(zero[:, :, groups, ..., None])
            yield slice(first * P * G, end * P * G), x.flatten(4)

    def dequantized(self):
        """(k, v) [B, Hk, L, D] float32: exactly what attend reads; zeros beyond a row's length."""
        t, pos, out = self.index[: self.length], self.pos - 1, []
        for name, exact in zip("kv", self.exact(pos, t)):
            x = getattr(self, f"{name}_window").float()[:, :, self.slot(t)]  # [B, Hk, L, D]
            for part, packed in self.read(name, len(self.index)):
                packed = packed.flatten(2, 3)[:, :, : max(0, len(t) - part.start)]
                window = x[:, :, part]
                x[:, :, part] = torch.where(exact[:, None, part, None], window, packed)
            out.append(torch.where((t <= pos[:, None])[:, None, :, None], x, 0))
        return tuple(out)
