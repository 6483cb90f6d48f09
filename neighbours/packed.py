"""Packed tokens without a window or a schedule: whole groups, wherever a cache puts them.

They are laid out as in a KiviCache, so that fused/attention.py reads them, too.
"""
import torch

from kivi import KiviCache
from quantize import Buffers, key_codes, take, value_codes


def by_tier(rank, n):
    """The places [.., R] of the n largest of rank [.., R], in order, then those of the others.

    By comparisons: Inductor's own sort does not compile at every shape.
    """
    i = torch.arange(rank.shape[-1], device=rank.device)
    earlier, other, own = i < i[:, None], rank[..., None, :], rank[..., None]
    hi = ((other > own) | (other == own) & earlier).sum(-1) < n
    before = (earlier & (hi[..., None, :] == hi[..., None])).sum(-1)  # of the same tier
    place = torch.where(hi, before, n + before)
    return torch.zeros_like(place).scatter(-1, place, i.expand_as(place))


class Tier(Buffers):
    """Room for max_len packed tokens a row.

    config  a KVConfig: bits, groups, and how many first tokens are sinks, read elsewhere
    size    tokens that come at a time, whole groups
    block   tokens that attention reads at a time, whole stacks

    Boosted are the channels of the widest range in a row's first `size` tokens, sinks left out.
    """

    sliding = None

    def __init__(self, batch, n_kv_heads, max_len, head_dim, block, dtype, device,
                 config, size):
        super().__init__(batch, n_kv_heads, max(1, max_len), head_dim, dtype, device)
        self.rows = self.pos = None  # those of the cache serve
        self.config, self.size, self.block = config, size, block
        self.capacity = config.capacity(max_len)
        G, D, Gv = config.group_size, head_dim, config.value_group(head_dim)
        n_groups, spare = self.capacity // G, -self.capacity % block // G
        metadata = dtype if dtype == torch.float32 else torch.float16
        for name, bits, codes, scale in (("k", config.k_bits, (G, D + config.boosted(D)), (1, D)),
                                         ("v", config.v_bits, (D, G), (D // Gv, G))):
            shape = (batch, n_kv_heads, n_groups * bits // 8, *codes)
            self.add(f"{name}_packed", shape, torch.uint8, spare * bits // 8)
            for part in ("scale", "zero"):
                self.add(f"{name}_{part}", (batch, n_kv_heads, n_groups, *scale), metadata, spare)
        self.add("k_order", (batch, n_kv_heads, D if config.boost else 0), torch.int16)

    def put(self, k, v, number, chosen, rows):
        """Quantizes tokens k, v [b, Hk, n size, D] into these rows [b], where `chosen` [b, n]. They
        are those from number * size on; number [b, n] counts up."""
        c, G, n = self.config, self.config.group_size, self.size // self.config.group_size
        group = (number[..., None] * n + torch.arange(n, device=k.device)).flatten(1)
        place = (group[..., None] * G + torch.arange(G, device=k.device)).flatten(1)
        keys = take(k, c.grouped_as(place) - place[:, :1]).unflatten(2, (-1, G))
        if c.boost:
            self.choose(keys[:, :, :n], (chosen & (number == 0))[:, 0], rows)
        values = [x.unflatten(2, (-1, G)).mT for x in value_codes(v, c)]
        chosen = chosen.repeat_interleave(n, 1)
        self.store("k", c.k_bits, group, chosen, rows, key_codes(keys, c, self.order(rows)))
        self.store("v", c.v_bits, group, chosen, rows, values)

    def store(self, name, bits, group, chosen, rows, new):
        """Stores codes, scale and zero [b, Hk, n, ..] of groups [b, n] into rows [b]."""
        P = 8 // bits
        for part, x in zip(("packed", "scale", "zero"), new):
            buffer = getattr(self, f"{name}_{part}")
            for a in range(min(P, x.shape[2])):  # groups that share bytes, one after the other
                entry, y = group[:, a::P], x[:, :, a::P].transpose(1, 2)
                ok, shift = (z[:, a::P, None, None, None] for z in (chosen, group % P * bits))
                place = (rows[:, None], slice(None), entry // P if part == "packed" else entry)
                old = buffer[place]
                if part == "packed":
                    y = old & ~(2**bits - 1 << shift) | y << shift  # this field of the bytes alone
                buffer[place] = torch.where(ok, y.to(old.dtype), old)

    parts, from_codes = KiviCache.parts, KiviCache.from_codes
    choose, order = KiviCache.choose, KiviCache.order
