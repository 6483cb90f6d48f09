"""KIVI: a KV cache in 2 bits (arXiv 2402.02750), with attention over it in plain PyTorch.

Keys have a few large channels, so they are quantized per channel: a group is G consecutive tokens
of one channel. Values have no such channels, so they are quantized per token: a group is G
consecutive channels of one token. The newest tokens stay in full precision, in a window.

Schedule. At length T these tokens of a row have codes, whether they came by prefill or by append:

    K   0 .. T - T % R - 1     R keys at once, a *key block*, when T becomes a multiple of R
    V   0 .. T - R - 1         one value a step, as soon as T exceeds R

The official code attends first and quantizes then: a step does not read the codes it makes. So at
length T attention reads exactly: K from token (T - 1) // R * R on, 1 to R of them, and V of the
last R + 1 tokens. Hence the window is a ring of R + 1 slots: no token overwrites the one that its
step quantizes. The first S tokens, *sinks*, have slots of their own, always read from there.

Packing. A byte holds P = 8 / bits codes, of tokens that lie G apart. P groups of G tokens that
share bytes are a *stack*. Of one row and KV head:

    k_packed [stacks, G, D]    byte [j, i, d]: channel d of the tokens (j P + a) G + i,
                               a = 0 .. P - 1, each in the bits from a * bits on
    v_packed [stacks, D, G]    byte [j, d, i]: the same, transposed

With 2 bits and G = 32, byte [0, 0, 0] holds channel 0 of tokens 0, 32, 64 and 96, in bits 0-1, 2-3,
4-5 and 6-7; byte [0, 1, 0] that of tokens 1, 33, 65 and 97; byte [1, 0, 0] of 128, 160, 192, 224.
Field a of all bytes of a stack is one group. K has a scale and a zero for each of its channels, V
for each of its tokens and Gv (mostly G) channels. Attention reads code * scale + zero.

Boost (not the paper's): the n key channels with the widest range in any group of a row's first R
keys have codes of twice the bits, the high half in the channel's column, the low half in one of n
columns behind the others: k_packed [stacks, G, D + n], in the order of k_order, the widest first.

B rows, Hk KV heads, D channels, M query heads a KV head. fused/attention.py computes the same."""
import torch
from torch.nn import functional as F

from quantize import PRESETS, Buffers, KVConfig, channel_order, dequantize_groups  # noqa: F401
from quantize import key_codes, merge, quantize_groups, round_up, slices, take, value_codes

PORTION = 2**21, 2**26  # elements read at once on a CPU, whose caches hold 8 MB, and on CUDA


class Cache(Buffers):
    """The interface of both caches. A decode step that must never wait for the device calls the
    parts of `append` and `attend`, which check nothing: `advance` counts on the host; `write`,
    `quantize_value`, `quantize_keys` and `attention` work on tensors alone."""

    def __init__(self, batch, n_kv_heads, max_len, head_dim, block, sliding, dtype, device):
        super().__init__(batch, n_kv_heads, max_len, head_dim, dtype, device)
        if sliding is not None and sliding < 1:
            raise ValueError(f"sliding must be at least 1 token, got {sliding}")
        self.block, self.sliding = block, sliding
        self.register_buffer("index", torch.arange(round_up(max_len, block), device=device), False)

    def check(self, n_tokens, **tensors):
        """Raises ValueError unless every tensor is [B, heads, n_tokens, D] as this cache has it."""
        B, Hk, D, device = self.batch, self.n_kv_heads, self.head_dim, self.pos.device
        if not self.length and "k" not in tensors:
            raise ValueError("attend needs a token in the cache: call prefill or append first")
        for name, x in tensors.items():
            heads = x.shape[1] if x.dim() == 4 else 0
            fits = heads and heads % Hk == 0 if name == "q" else heads == Hk
            same = x.dtype == self.dtype and x.device == device
            if not fits or not same or x.shape != (B, heads, n_tokens, D):
                wanted = f"a multiple of {Hk}" if name == "q" else Hk
                raise ValueError(f"{name} must be [{B}, {wanted}, {n_tokens}, {D}] in {self.dtype} "
                                 f"on {device}, got {list(x.shape)} in {x.dtype} on {x.device}")

    def storable(self, x):
        """bool: can all of x be stored, and the range of any group of it?"""
        if self.config:  # a range is up to 2 max|x|; float16 scales hold that of all float16 x
            x = 2 * x if self.dtype == torch.float32 else x.half()
        return torch.isfinite(x).all()

    def check_finite(self, tokens, **tensors):
        """Raises ValueError if a number among these `tokens` of a tensor cannot be stored."""
        for name, x in tensors.items():
            if not self.storable(x.transpose(1, 2)[tokens]):
                raise ValueError(f"{name} holds NaN, inf or numbers too large for the cache")

    def check_new(self, low, lengths, **tensors):
        """Raises ValueError unless n or `lengths` tokens a row, of [B, heads, n, D], can be stored.
        Returns the tokens that a row will hold, [B], and which of n are real, [B, n]."""
        n = tensors["k"].shape[2] if tensors["k"].dim() == 4 else 1
        self.check(n, **tensors)
        lengths = [n] * self.batch if lengths is None else list(lengths)
        if len(lengths) != self.batch or not n or any(x not in range(low, n + 1) for x in lengths):
            raise ValueError(f"lengths must be {self.batch} numbers of {low} .. {n}: {lengths}")
        longest = max(old + int(new) for old, new in zip(self.lengths, lengths))
        if longest > self.max_len:
            raise ValueError(f"{longest} tokens exceed the cache's max_len of {self.max_len}")
        new = torch.tensor([int(x) for x in lengths], device=self.pos.device)
        real = torch.arange(n, device=new.device) < new[:, None]
        self.check_finite(real, k=tensors["k"], v=tensors["v"])
        return self.pos + new, real

    @torch.no_grad()
    def prefill(self, k, v, lengths=None):
        """Fills the empty cache with whole prompts.

        k, v [B, Hk, L, D], rows right-padded; lengths [B] ints, tokens of each row (None: all L)
        raises ValueError: not empty; wrong shape, dtype, device or length; NaN or inf
        """
        if self.length:
            raise ValueError(f"prefill needs an empty cache, this one holds {self.length} tokens: "
                             "call reset() first, or extend() instead")
        ends, _ = self.check_new(1, lengths, k=k, v=v)
        self.fill(k, v, self.pos, ends)
        self.set_lengths(ends.tolist())

    @torch.no_grad()
    def extend(self, q, k, v, lengths=None):
        """Appends n tokens to every row and attends from each of them: `prefill` if it was empty.

        A query sees what the cache held before, as `attend` reads it, and the new tokens up to its
        own exactly. Afterwards the cache is, byte for byte, as after n appends.

        q [B, H, n, D]; k, v [B, Hk, n, D], rows right-padded; lengths [B] ints (None: all n)
        returns [B, H, n, D], of no meaning where a row is padded
        raises ValueError: a row is full; wrong shape, dtype, device or length; NaN or inf"""
        ends, real = self.check_new(0, lengths, k=k, v=v, q=q)
        if lengths is not None:  # padding may hold NaN
            k, v = (torch.where(real[:, None, :, None], x, 0) for x in (k, v))
        start, held, out = self.pos[:, None, None], self.tokens(self.length), []
        for i in torch.arange(k.shape[2], device=q.device).split(512):  # queries at a time
            own, last = start + i[:, None], int(i[-1]) + 1  # none sees new tokens from `last` on
            new = start + torch.arange(last, device=q.device)
            seen = torch.cat([self.seen(own, held) & (held < start), self.seen(own, new)], 2)
            new_kv = k[:, :, :last], v[:, :, :last]
            out.append(self.attention(q[:, :, i], self.pos - 1, held, seen, new_kv))
        self.fill(k, v, self.pos, ends)
        self.set_lengths(ends.tolist())
        return torch.cat(out, 2)

    @torch.no_grad()
    def append(self, k, v):
        """Appends one token to every row: k, v [B, Hk, 1, D].

        raises ValueError: wrong shape, dtype or device; a row is full; NaN or inf (on a CPU only:
               elsewhere the check would wait for the device, and NaN spreads in its row)
        """
        self.check(1, k=k, v=v)
        if self.pos.device.type == "cpu":
            self.check_finite(slice(None), k=k, v=v)
        self.advance()
        self.write(k, v, self.pos[:, None])
        if self.evicts_value():  # V: some row is longer than R
            self.quantize_value(self.pos[:, None])
        if self.completes_key_block():  # K: some row's length is a multiple of R
            self.quantize_keys(self.pos)
        self.pos += 1

    def advance(self):
        """The host's share of a step, once for all layers: counts the token, refuses a full row."""
        if self.length >= self.max_len:
            raise ValueError(f"the cache is full: max_len is {self.max_len} tokens a row")
        self.lengths[:] = [n + 1 for n in self.lengths]

    def park(self, row):
        """Empties a finished row, which goes on beside the others; what it reads means nothing."""
        self.pos[row] = 0
        self.lengths[row] = 0

    def attend(self, q):
        """softmax(q · K / sqrt(D)) · V over the tokens present in each row.

        q [B, H, 1, D], H a multiple of Hk -> [B, H, 1, D]; gradients reach q
        raises ValueError: wrong shape, dtype or device; an empty cache"""
        self.check(1, q=q)
        return self.attention(q, self.pos - 1, self.tokens(self.length))

    def attention(self, q, pos, t, seen=None, beside=None):
        """`attend` without its checks: q over the tokens t (see `tokens`), read as at pos [B].

        seen    [B, n, tokens], of n queries of a head: which they attend to; None: up to pos
        beside  k, v [B, Hk, new, D]: tokens beside those of the cache
        """
        # The query heads of a KV head are the rows of one product: each key is read once.
        rows, out = q.reshape(self.batch, self.n_kv_heads, -1, self.head_dim), []  # [B, Hk, M n, D]
        if seen is None:
            seen = self.seen(pos[:, None, None], t)
        elif rows.shape[2] > seen.shape[1]:
            seen = seen.repeat(1, rows.shape[2] // seen.shape[1], 1)
        for heads in self.portions(len(t)):
            k, v = self.read(pos, len(t), heads)
            if beside:
                k, v = (torch.cat([x, y[:, heads]], 2) for x, y in zip((k, v), beside))
            with torch.autocast(q.device.type, enabled=False):  # would round to half precision
                part = rows[:, heads].to(k.dtype)
                out.append(F.scaled_dot_product_attention(part, k, v, seen[:, None]))
            del k, v  # or the next would be read beside them
        return torch.cat(out, 1).view(q.shape).to(q.dtype)

    def portions(self, n):
        """Slices of the KV heads: how many are read at a time, of n tokens."""
        step = max(1, PORTION[self.pos.is_cuda] // (self.batch * n * self.head_dim))
        return [slice(first, first + step) for first in range(0, self.n_kv_heads, step)]

    def dequantized(self, rows=slice(None)):
        """(k, v) [B, Hk, L, D] of all or some rows: what attend reads; zeros beyond a length."""
        pos, n = self.pos[rows] - 1, max(self.lengths[rows])
        present = (self.index[:n] <= pos[:, None])[:, None, :, None]
        k_and_v = self.read(pos, len(self.tokens(n)), slice(None), rows)
        return tuple(torch.where(present, x[:, :, :n], 0) for x in k_and_v)

    def tokens(self, length):
        """t [n], 0 .. n - 1: the tokens to read when the longest row has `length`."""
        return self.index[: round_up(max(1, length), self.block)]

    def seen(self, pos, t):
        """Does the query of token pos attend to token t?"""
        return t <= pos if self.sliding is None else (t <= pos) & (t > pos - self.sliding)

    def write(self, k, v, pos):
        """Writes tokens pos [B, n] of every row into the window: k, v [B, Hk, n, D]."""
        place = self.rows[:, None], slice(None), self.slot(pos)
        self.k_window[place] = k.transpose(1, 2)
        self.v_window[place] = v.transpose(1, 2)

    def completes_key_block(self):
        return False  # nothing is quantized, unless a subclass says so

    evicts_value = completes_key_block


class FullCache(Cache):
    """The same interface in full precision: a window of every token, of which 128 are a block."""

    @torch.inference_mode(False)  # or nobody could write to its buffers outside that mode
    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, sliding=None,
                 dtype=torch.float32, device="cpu"):
        super().__init__(batch, n_kv_heads, max_len, head_dim, 128, sliding, dtype, device)
        for name in ("k_window", "v_window"):
            self.add(name, (batch, n_kv_heads, len(self.index), head_dim), dtype)

    def slot(self, t):
        return t

    def used(self, name, length):
        return length

    def fill(self, k, v, start, ends, row=0):
        rows, starts = slice(row, row + len(k)), start[:, None]
        end = min(max(self.lengths[rows]) + k.shape[2], self.max_len)
        for first, last in slices(min(self.lengths[rows]), end, k[:, :, 0].numel(), 1):
            t = self.index[first:last]
            is_new = ((t >= starts) & (t < ends[:, None]))[:, None, :, None]
            for window, x in ((self.k_window, k), (self.v_window, v)):
                window = window[rows, :, first:last]
                window.copy_(torch.where(is_new, take(x, t - starts), window))

    def read(self, pos, n, heads, rows=slice(None)):
        return self.k_window[rows, heads, :n], self.v_window[rows, heads, :n]


class KiviCache(Cache):
    """One layer's KIVI cache. Buffers are allocated once, and each token is quantized once.

    batch, n_kv_heads, max_len (most tokens of a row), head_dim; dtype and device of q, k and v
    options  of `KVConfig`: k_bits, v_bits, group_size (G), residual (R), sink (S), boost, ..
    sliding  attention reads only that many of the newest tokens, no older sink (None: all)
    raises   ValueError: see KVConfig.check; source: arXiv 2402.02750, schedule of jy-yuan/KIVI
    """

    @torch.inference_mode(False)
    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, sliding=None,
                 dtype=torch.float32, device="cpu", **options):
        c = KVConfig(**options)
        c.check(head_dim)
        block = c.block(max_len)
        super().__init__(batch, n_kv_heads, max_len, head_dim, block, sliding, dtype, device)
        self.config, self.slot = c, c.slot
        self.capacity = c.capacity(max_len)  # tokens with room for codes
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

    def used(self, name, length):
        n, whole = getattr(self, name).shape[2], name.endswith(("window", "order"))
        return n if whole else n * self.config.capacity(length) // self.capacity

    def parts(self, name):
        """(bits, bytes, scale, zero) of K or V, tokens before channels: [B, Hk, stacks, G, D] and
        [B, Hk, groups, 1, D] twice (K, bytes with D + n), [B, Hk, groups, G, D / Gv] twice (V)."""
        if name == "k":
            return self.config.k_bits, self.k_packed, self.k_scale, self.k_zero
        return self.config.v_bits, self.v_packed.mT, self.v_scale.mT, self.v_zero.mT

    def fill(self, k, v, start, ends, row=0):
        """Stores new tokens in the rows from `row` on: the work of `extend`, without its checks.

        k, v [B, Hk, n, D] follow the `start` [B] tokens of a row, and it gets `ends` [B] in all.
        """
        c, G, R, (B, Hk, n, D) = self.config, self.config.group_size, self.config.residual, k.shape
        rows, starts, stops = slice(row, row + B), start[:, None], ends[:, None]
        if c.boost:
            x = self.pick("k", k, c.grouped_as(self.index[:R]), starts, rows)
            self.choose(x.unflatten(2, (-1, G)), (start < R) & (ends >= R), rows)
        # Tokens below `coded` have codes, those up to `stop` get them, the window has the rest.
        begin = max(0, min(self.lengths[rows]) - R) // c.unit * c.unit
        end = min(max(self.lengths[rows]) + n, self.capacity)
        for first, last in slices(begin, end, B * Hk * D, c.unit):
            t = torch.arange(first, last, device=k.device)
            keys = "k", k, c.grouped_as(t), starts // R * R, stops // R * R
            values = "v", v, t, starts - R, stops - R
            for name, x, source, coded, stop in (keys, values):
                old, due = (y.view(B, 1, -1, G, 1) for y in (t < coded, (t >= coded) & (t < stop)))
                x = self.pick(name, x, source, starts, rows).unflatten(2, (-1, G))
                bits, *buffers = self.parts(name)
                for buffer, y in zip(buffers, self.quantizer(x, due, c, name, self.order(rows))):
                    size = (last - first) // y.shape[2]  # tokens of a stack, or of a group
                    merge(buffer[rows, :, first // size : last // size], y, old, bits)
        t = c.in_window(ends - 1)
        place, full = (self.rows[rows, None], slice(None), c.slot(t)), (ends > 0).view(B, 1, 1, 1)
        for name, x, window in (("k", k, self.k_window), ("v", v, self.v_window)):
            x = self.pick(name, x, t, starts, rows).transpose(1, 2)  # [B, slots, Hk, D]
            window[place] = torch.where(full, x, window[place])

    def pick(self, name, x, t, starts, rows):
        """Tokens t [B, n] of K or V: the window's up to `starts` [B, 1], then x [B, Hk, n, D]."""
        t = t.expand(len(x), -1)
        new = take(x, t - starts)
        if max(self.lengths[rows]) == 0:
            return new
        window = take(getattr(self, f"{name}_window")[rows], self.slot(t))
        return torch.where((t < starts)[:, None, :, None], window, new)

    def choose(self, groups, chosen, rows=slice(None)):
        """Sets k_order of the `chosen` rows [B] by their first keys [B, Hk, groups, G, D]."""
        old = self.k_order[rows]
        self.k_order[rows] = torch.where(chosen[:, None, None], channel_order(groups).short(), old)

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
        """Quantizes the value of token pos - R, where there is one, for each of the newest tokens
        pos [B, n]: consecutive ones, n <= G, so that no two share a byte."""
        G, evicted = self.config.group_size, pos >= self.config.residual
        t = (pos - self.config.residual).clamp(min=0)
        values = self.v_window[self.rows[:, None], :, self.slot(t)]  # [B, n, Hk, D]
        self.store("v", t // G, (slice(None), t % G), evicted, value_codes(values, self.config))

    def quantize_keys(self, pos):
        """Quantizes the last R keys of the rows whose newest token pos [B] completes a block."""
        c, G, R = self.config, self.config.group_size, self.config.residual
        t = pos[:, None] // R * R + torch.arange(R, device=pos.device)  # [B, R]
        keys = self.k_window[self.rows[:, None], :, self.slot(c.grouped_as(t))]  # [B, R, Hk, D]
        keys = keys.transpose(1, 2).unflatten(2, (-1, G))
        if c.boost:
            self.choose(keys, pos + 1 == R)
        new = key_codes(keys, c, self.order())
        for i in range(R // G):  # one group at a time: those of a stack share bytes
            # A last key block that max_len cuts off has no room for codes, and never completes.
            group = (t[:, i * G, None] // G).clamp(max=self.capacity // G - 1)
            self.store("k", group, (), (pos[:, None] + 1) % R == 0, [x[:, None, :, i] for x in new])

    def store(self, name, group, inside, chosen, new):
        """Stores codes, scale and zero [B, n, ..] in groups `group` [B, n]: whole ones, or what the
        index `inside` picks there. What is not `chosen` [B, n] stays: an `if` would wait for the
        device."""
        bits = getattr(self.config, f"{name}_bits")
        for part, x in zip(("packed", "scale", "zero"), new):
            buffer = getattr(self, f"{name}_{part}")
            shape = (*group.shape, *[1] * (x.dim() - 2))
            entry = group * bits // 8 if part == "packed" else group  # a stack, or a group
            place = (self.rows[:, None], slice(None), entry, *inside)
            old = buffer[place]
            if part == "packed":
                shift = (group * bits % 8).view(shape)
                x = old & ~(2**bits - 1 << shift) | x << shift  # this field of the bytes alone
            buffer[place] = torch.where(chosen.view(shape), x.to(old.dtype), old)

    def read(self, pos, n, heads, rows=slice(None)):
        """(k, v) float32 [B, heads, n, D]: the first n tokens as a query at pos [B] reads them."""
        k, v = (self.from_codes(name, n, heads, rows) for name in "kv")
        t, row = self.config.in_window(pos), self.rows[: len(pos), None]  # [B, slots], [B, 1]
        place, slot = (row, slice(None), t), (row, slice(None), self.slot(t))
        v[place] = self.v_window[rows, heads][slot].float()
        key_block = pos[:, None] // self.config.residual * self.config.residual
        exact = ((t >= key_block) | (t < self.config.sink))[..., None, None]
        k[place] = torch.where(exact, self.k_window[rows, heads][slot].float(), k[place])
        return k, v

    def from_codes(self, name, n, heads, rows):
        """code * scale + zero of the first n tokens, or 0 of those that never have codes."""
        c, (bits, packed, scale, zero) = self.config, self.parts(name)
        if n <= c.residual:  # all lie in the window
            return torch.zeros_like(self.k_window[rows, heads, :n], dtype=torch.float32)
        stacks = min(-(-n * bits // (8 * c.group_size)), packed.shape[2])
        order = self.k_order[rows, heads, None] if name == "k" and c.boost else None
        scale, zero = (x[rows, heads, : stacks * 8 // bits] for x in (scale, zero))
        x = dequantize_groups(packed[rows, heads, :stacks], scale, zero, c, name, order)
        missing = n - x.shape[2]  # negative where whole stacks are more
        return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x[:, :, :n]
