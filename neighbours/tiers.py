"""Two tiers: of every R tokens of a KV head the most attended share is kept in more bits.

When R tokens leave the window, those that got the most attention go to the `hi` tier (4 bits), the
others to the `lo` tier (2 bits), both in KIVI's layout: K per channel in groups of G tokens of one
tier, V per token. The widest key channels of the `lo` tier have twice its bits. Exact are the
first S tokens, and all from the last multiple of R on, as it was `lag` tokens ago. Shapes never
depend on the data: of R tokens a tier gets as many every time. The papers rank the whole text.

ZipCache (arXiv 2405.14256), `tiers`. As published: ranks by the mean attention of the queries that
    could see a token. Not: KIVI's axes, 25 % in 4 bits and not 60 %, exact sinks and boosted keys
    measured better; all queries count, not a tenth (see `every`); codes are final, or they would
    drift.
MiKV (2402.18096), `mikv`. As published: summed attention, 8 and 2 bits. Not: KIVI's axes leave its
    balancer of key channels nothing to do; no token moves down later.
ZipVL (2410.08584), `zipvl:FILE` in fit.py. As published: a share for each layer. Not: it comes from
    a file, as one for each prompt would need buffers of the largest; prefill stays dense.
"""
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import nn

from fused.attention import NEVER, joined, packed_scores, product, query_rows, slot_tokens
from fused.attention import softmax_of, softmax_of_blocks, tokens_of
from neighbours.observed import NAMES, ObservedCache
from neighbours.packed import Tier, by_tier
from quantize import BITS, KVConfig, slices, take


@dataclass(frozen=True)
class TierConfig(KVConfig):
    """What the tiers store; k_bits, v_bits and boost are those of the `lo` tier."""

    sink: int = 4
    boost: float = 0.25
    v_group_size: int = 64
    hi: int = 4  # bits of K and V in the `hi` tier
    share: float = 0.25  # of R tokens in the `hi` tier, rounded to whole groups
    mean: int = 1  # rank tokens by attention a query that could see them; 0: by the sum
    lag: int = 0  # newest tokens that never have codes
    every: int = 1  # one in so many of a prompt's queries counts, see neighbours/observed.py
    observes = True  # no field: a cache of it has `observe`

    @property
    def sizes(self):
        """Tokens of every R in the `hi` and in the `lo` tier."""
        groups = round(self.share * self.residual / self.group_size) if 0 < self.share < 1 else 0
        return groups * self.group_size, self.residual - groups * self.group_size

    @property
    def unit(self):
        """Tokens of whole residuals and, in both tiers, whole stacks of groups."""
        return self.residual * 8 // min(self.k_bits, self.v_bits)

    def check(self, head_dim):
        super().check(head_dim)
        (hi, lo), G, low = self.sizes, self.group_size, max(self.k_bits, self.v_bits)
        for wrong, message in (
            (not low < self.hi in BITS, f"hi must be 4 or 8 bits, above {low}, got {self.hi}"),
            (min(hi, lo) < G, f"share {self.share} of residual {hi + lo} leaves a tier without a "
                              f"group of {G} tokens: use another share, or a larger residual"),
            (self.sink > lo, f"sink must be at most {lo} tokens here, got {self.sink}"),
            (self.lag < 0 or self.every < 1 or self.mean not in (0, 1),
             "lag must be 0 or more, every 1 or more, mean 0 or 1"),
        ):
            if wrong:
                raise ValueError(message)

    def make(self, *shape, **kind):
        return TierCache(self, *shape, **kind)

    def stored_bits(self, head_dim):
        """Bits of a number, codes and all that goes with them, K and V averaged."""
        hi, lo = self.sizes
        k_bits = self.k_bits * (1 + self.boosted(head_dim) / head_dim)
        codes = (hi * self.hi + lo * (k_bits + self.v_bits) / 2) / self.residual
        return codes + 16 / self.group_size + 16 / self.value_group(head_dim)


class TierCache(ObservedCache):
    """One layer's cache of a TierConfig. R tokens get their codes `lag` + 1 steps after the last of
    them came, when its own query has been counted. raises ValueError: a sliding window"""

    @torch.inference_mode(False)
    def __init__(self, config, batch, n_kv_heads, max_len, head_dim, *, sliding=None,
                 dtype=torch.float32, device="cpu"):
        config.check(head_dim)
        if sliding is not None:
            raise ValueError("tiers forget the order of tokens, and a sliding window needs it: "
                             "choose another --kv for this model")
        c, R, G, block = config, config.residual, config.group_size, config.block(max_len)
        super().__init__(batch, n_kv_heads, max_len, head_dim, block, dtype, device,
                         sink=c.sink, newest=R + c.lag + 1)
        self.config, self.capacity = c, c.capacity(max_len)
        low = KVConfig(c.k_bits, c.v_bits, G, G, c.sink, c.boost, c.v_group_size)
        high = replace(low, k_bits=c.hi, v_bits=c.hi, sink=0, boost=0)
        self.tiers = nn.ModuleList(
            Tier(batch, n_kv_heads, max_len // R * size, head_dim, block * size // R, dtype, device,
                 config=tier, size=size)
            for tier, size in zip((high, low), c.sizes))

    def used(self, name, length):
        n = self.get_buffer(name).shape[2]
        if "." not in name or name.endswith("order"):
            return n
        tier = self.tiers[int(name.split(".")[1])]
        return n * tier.config.capacity(length // self.config.residual * tier.size) // tier.capacity

    def traffic(self, length):
        blocks, item = max(0, self.coded(length - 1)), self.k_window.itemsize
        exact = length - blocks * self.config.residual + self.config.sink * (blocks > 0)
        packed = sum(x.nbytes // (self.batch * tier.capacity) * tier.size * blocks
                     for tier in self.tiers
                     for name, x in tier.named_buffers() if name != "k_order")
        return packed + 2 * self.n_kv_heads * exact * self.head_dim * item

    def coded(self, pos):
        """How many times R tokens a query at pos reads from the tiers; negative is none."""
        return (pos - 1 - self.config.lag) // self.config.residual

    def pack(self, new, start, ends, rows):
        """Divides what leaves the window as rows of as many tokens, `start`, grow to `ends` [b]."""
        R, (B, Hk, n, D) = self.config.residual, new["k"].shape
        begin, end = self.lengths[rows][0], min(self.lengths[rows][0] + n, self.max_len)
        begin, end = (max(0, self.coded(length)) * R for length in (begin, end))
        for begin, end in slices(begin, end, B * Hk * max(D, R), R):  # `by_tier` compares R with R
            t = torch.arange(begin, end, device=start.device).expand(B, -1)
            parts = [self.pick(name, x, t, start[:, None], rows) for name, x in new.items()]
            # What is not complete in a shorter row is written again before it is read.
            chosen = torch.ones_like(t[:, ::R], dtype=torch.bool)
            self.divide(*parts, t, ends, chosen, self.rows[rows])

    def divide(self, k, v, sums, t, counted, chosen, rows):
        """Puts tokens t [b, n R] into the tiers of these rows [b], where `chosen` [b, n]: k, v [b,
        Hk, n R, D], and sums [b, Hk, n R, 1] of a row's first `counted` [b] queries."""
        R, n, rank = self.config.residual, chosen.shape[1], sums[..., 0]
        if self.config.mean:
            rank = rank / (counted[:, None] - t)[:, None]
        rank = rank.masked_fill((t < self.config.sink)[:, None], -1)  # the first of the lo tier
        order = by_tier(rank.unflatten(2, (n, R)), self.config.sizes[0])
        for tier, i in zip(self.tiers, order.split(self.config.sizes, -1)):
            i = i + torch.arange(n, device=t.device)[:, None] * R
            i = i.flatten(2)[..., None].expand(-1, -1, -1, k.shape[3])
            tier.put(k.gather(2, i), v.gather(2, i), t[:, ::R] // R, chosen, rows)

    def completes_key_block(self):
        return any((n - 1 - self.config.lag) % self.config.residual == 0 for n in self.lengths)

    def quantize_keys(self, pos):
        """Divides the R tokens up to `lag` before the newest, pos [B], where these are complete."""
        R, done = self.config.residual, pos - self.config.lag
        number = (done // R - 1).clamp(0, max(0, self.max_len // R - 1))
        t = number[:, None] * R + torch.arange(R, device=pos.device)
        parts = [take(getattr(self, f"{name}_window"), self.slot(t)) for name in NAMES]
        self.divide(*parts, t, pos, (done % R == 0)[:, None], self.rows)

    def in_window(self, pos):
        """[b, slots]: the token in each slot that a query at pos reads there, negative for none."""
        t = slot_tokens(self.ring, pos)
        exact = (t < self.config.sink) | (t >= self.coded(pos)[:, None] * self.config.residual)
        return torch.where(exact, t, -1)

    def read(self, pos, n, heads, rows=slice(None)):
        """As KiviCache.read, but for the tokens in the tiers: behind the sinks, in any order."""
        window = self.k_window[rows, heads].float(), self.v_window[rows, heads].float()
        parts, t = [window], [self.in_window(pos)]
        for tier in self.tiers:
            i = torch.arange(n * tier.size // self.config.residual, device=pos.device)
            parts.append([tier.from_codes(name, len(i), heads, rows) for name in "kv"])
            coded = self.coded(pos)[:, None] * tier.size
            t.append(torch.where((i >= tier.config.sink) & (i < coded), self.config.sink, -1))
        t = torch.cat(t, 1)
        order = t.masked_fill(t < 0, self.max_len).argsort(dim=1, stable=True)[:, :n]
        return [take(torch.cat(x, 2), order) for x in zip(*parts)]

    def fused(self, q, pos, starts):
        """`attention` over packed codes: starts [nb] as in fused/attention.py, of both tiers."""
        rows, blocks = query_rows(self, q), []
        for tier in self.tiers:
            scores = packed_scores(tier, rows, starts.shape[0])
            end = self.coded(pos) * tier.size + tier.config.residual  # sees all that are coded
            t = tokens_of(starts // self.block * tier.block, tier.block)
            blocks.append(softmax_of_blocks(tier, scores, end, pos[:, None], t))
        blocks = [torch.cat(x, 2) for x in zip(*blocks)]
        scores = product((rows, self.k_window.to(rows.dtype), self.head_dim**-0.5))
        scores = scores.masked_fill((self.in_window(pos) < 0)[:, None, None], NEVER)
        window = softmax_of(scores, self.v_window.to(rows.dtype))
        nothing = scores.new_zeros(1).expand(*blocks[0].shape, scores.shape[-1])
        paid = joined((*blocks[:2], nothing), (*window[:2], (scores - window[0]).exp()))
        self.pay(paid.sum(2)[..., None], pos)
        return joined(blocks, window).view(q.shape).to(q.dtype)


def tiers(argument, model, method="tiers", **preset):
    """The configs of `tiers` and of `tiers:share=0.5,lag=32`; lo is both bits of that tier."""
    kinds = {"lo": int} | {field.name: type(field.default) for field in fields(TierConfig)}
    for option in filter(None, argument.split(",")):
        name, _, value = option.partition("=")
        try:
            new = kinds[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"{method} cannot use {option!r}: write numbers of {', '.join(kinds)} "
                             f"as in {method}:share=0.5,lag=32, each once") from None
        del kinds[name]
        preset |= {"k_bits": new, "v_bits": new} if name == "lo" else {name: new}
    return [TierConfig(**preset)] * model.config.n_layers


mikv = partial(tiers, method="mikv", hi=8, mean=0, sink=0, boost=0, v_group_size=0)
