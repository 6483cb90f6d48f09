"""KIVI's cache, of which a step reads only the pages that its query can use.

A page is the smallest number of tokens that shares no byte with others: 4 groups. Its bound is the
most that any of its keys can score: zero and zero + (2^bits - 1) * scale are the smallest and the
largest number of a channel in a group, so q . k <= sum_d max(q_d min_d, q_d max_d). Each KV head
reads the pages with the largest bounds, all that is exact, and where no sinks are exact the first
page; of a sliding window's tokens alone. Nothing is dropped, so a later query may read what an
earlier one did not need.

With by=loud a page counts by its best key: of boosted channels by its codes, of the others by the
middle of their range. Bounds say little of channels that RoPE turns around within a group.

Quest (arXiv 2406.10774) keeps such bounds beside a full-precision cache; KIVI has them already.
As published: the bound, and a fixed number of tokens a step. Not: its pages are 16 tokens, and its
first two layers read everything. With by=mean a page counts by its mean key (over its groups, of
the middle of a channel's range), as a block does in ReKV (arXiv 2503.00540). Not of ReKV: one
choice for all heads and a whole answer, new positions, blocks on the host (`state` is there).

    --kv kivi2:read=2048, kivi2+:read=4096 (means by=loud), kivi2+:read=4096,by=mean
"""
from dataclasses import dataclass
from functools import partial, reduce
from math import gcd

import torch
from torch.nn import functional as F

from fused.attention import (
    NEVER, attention, first, joined, middle, numbers, packed_scores, product, query_rows,
    slot_tokens, softmax_of_blocks, softmax_of_window, stored, tokens_of,
)
from kivi import KiviCache
from quantize import KVConfig, dequantize_groups, take

GROUPS, PAGES = 4, 4  # of a page, and pages of a block: sums over one page would be short
FAR = 2**30  # the token where a page begins that is not there


@dataclass(frozen=True)
class ReadConfig(KVConfig):
    read: int = 2048  # quantized tokens that a step reads
    by: str = "bound"  # or "mean", "loud": what a page counts by

    @property
    def page(self):
        return GROUPS * self.group_size

    def check(self, head_dim):
        super().check(head_dim)
        if self.read < self.page or self.read % self.page:
            raise ValueError(f"read must be a multiple of {self.page} tokens, got {self.read}")
        if self.by not in ("bound", "mean", "loud"):
            raise ValueError(f"by must be bound, mean or loud, got {self.by!r}")
        if self.by == "loud" and not self.boosted(head_dim):
            raise ValueError("by=loud needs boosted channels: use kivi2+, or by=bound")

    def make(self, *shape, **kind):
        return RetrieveCache(*shape, **vars(self), **kind)


def bounds(cache, rows, n_pages):
    """The most that a key of each of the first pages can score, of all queries of a KV head, or
    what `by` has in its place: rows [B, Hk, M, D] -> [B, Hk, pages]."""
    c, D = cache.config, cache.head_dim
    scale, zero = (first(x, n_pages, GROUPS).flatten(2, 4).to(rows.dtype)  # [B, Hk, groups, D]
                   for x in (cache.k_scale, cache.k_zero))
    if c.boost:
        rows = stored(rows.gather(-1, cache.k_order.long()[:, :, None].expand_as(rows)))
    # max(q min, q max) = q zero + 2 max(q, 0) half scale, and of the middle q zero + q half scale.
    half = middle(c.k_bits, c.boosted(D), D, rows.device)  # (2^bits - 1) / 2
    if cache.by == "loud" and rows.dtype == torch.float16:
        # `numbers` gives codes from 0 instead of centred ones: their middle is not added here.
        loudest = torch.arange(D, device=rows.device) < c.boosted(D)
        half = half - torch.where(loudest, (2**c.k_bits - 1) / 2, 0)
    reach = (2 * rows.clamp(min=0) if cache.by == "bound" else rows) * half
    scores = product((rows, zero, 1.0), (reach.to(rows.dtype), scale, 1.0))
    scores = scores.unflatten(-1, (n_pages, GROUPS))
    if cache.by == "loud":
        return with_loudest(cache, rows, scores)
    return (scores.mean(4) if cache.by == "mean" else scores.amax(4)).amax(2)


def with_loudest(cache, rows, scores):
    """The most that a key of each page scores, [B, Hk, pages]: by its codes of boosted channels and
    by `scores` [B, Hk, M, pages, groups] for the rest. Columns of rows are in the cache's order."""
    c, P, n_pages = cache.config, 8 // cache.config.k_bits, scores.shape[3]
    n, U = c.boosted(cache.head_dim), GROUPS // P
    packed = first(cache.k_packed, n_pages, U)[..., :n]  # [B, Hk, pages, U, G, n], high halves
    scale = first(cache.k_scale, n_pages, U, P)[..., :n]  # [B, Hk, pages, U, P, 1, n]
    rows = rows[:, :, None, None, :, :n]
    rest = scores.permute(0, 1, 3, 4, 2).unflatten(3, (U, P))[..., None]  # [.., U, P, M, 1]
    # Products of all planes and their maximum in one kernel: it writes one score for P codes.
    planes = (product((rows * scale[:, :, :, :, a], *plane), store=False) + rest[..., a, :, :]
              for a, plane in enumerate(numbers(cache, packed, c.k_bits, rows.dtype)))
    return stored(reduce(torch.maximum, planes)).amax((3, 4, 5))  # [B, Hk, pages, U, M or 2, G]


def pages_of(cache, rows, pos, n_pages):
    """The pages that a step reads, [B, Hk, chosen + newest], and the first of the newest, [B].

    rows [B, Hk, M, D] of queries at pos [B]; of the first n_pages are chosen, -1 where there are
    fewer. The newest hold keys of exact values: they come last, in order, and are always read."""
    device = pos.device
    page = torch.arange(n_pages, dtype=torch.int32, device=device)
    newest = (pos - cache.config.residual).clamp(min=0).int() // cache.page  # [B]
    there = (page < newest[:, None, None]) & cache.seen(  # [B, 1, pages]: its last token
        pos[:, None, None], (page + 1) * cache.page - 1)
    # Without NaN, all of which would have the same rank, and the place beyond the last page.
    bound = torch.where(there, bounds(cache, rows, n_pages).nan_to_num(), NEVER)  # [B, Hk, pages]
    if not cache.config.sink:  # the first tokens get much attention in most models, small bounds
        bound = torch.where(there & (page == 0), -NEVER, bound)
    bound = stored(bound)
    # Ranks by comparison: a sort would be a call of the library, which nothing fuses with.
    other, own = bound[..., None, :], bound[..., None]
    above = (other > own) | (other == own) & (page < page[:, None])
    rank = torch.where(there, stored(above.sum(-1, dtype=torch.int32)), -1)  # [B, Hk, pages]
    place = torch.arange(cache.n_chosen, device=device)[:, None]
    chosen = (rank[:, :, None] == place) * (page + 1)  # [B, Hk, chosen, pages], one is not 0:
    chosen = chosen.sum(-1, dtype=torch.int32) - 1  # the page whose rank is `place`, -1 if none
    always = newest[:, None] + torch.arange(cache.n_newest, dtype=torch.int32, device=device)
    always = torch.where(always < n_pages, always, -1)[:, None].expand(-1, cache.n_kv_heads, -1)
    return torch.cat([chosen, always], 2), newest


def newest_pages(residual, page):
    """Pages that can hold the tokens with an exact value and a quantized key."""
    return -(-residual // page) + bool(residual % page and page % residual)


def gathered(pages, n_pages, x, n, entries, *inner):
    """As `fused.attention.first`, but n blocks of the pages [B, Hk, n, W] of the first n_pages.

    n_pages is no constant to the compiler. With one, Inductor (2.11) gives the loads of pages a
    mask with which they have no shape for a product."""
    B, Hk = (torch.arange(size, device=x.device) for size in x.shape[:2])
    x = first(x, n_pages, entries // pages.shape[3], *inner)
    return x[B[:, None, None, None], Hk[:, None, None], pages.clamp(min=0)].flatten(3, 4)


def fused_attention(cache, q, pos, starts):
    """`RetrieveCache.attention` as `fused.attention.attention` has it: a block is W pages."""
    if cache.reads_all:
        return attention(cache, q, pos, starts)
    rows, W = query_rows(cache, q), cache.block // cache.page
    n_pages = starts.shape[0] * W
    pages, newest = pages_of(cache, rows, pos, n_pages)
    pages = stored(F.pad(pages, (0, -pages.shape[2] % W), value=-1))
    pages = pages.unflatten(2, (-1, W))  # [B, Hk, nb, W]
    part = partial(gathered, pages, n_pages)
    scores = packed_scores(cache, rows, pages.shape[2], part)
    t = tokens_of(torch.where(pages < 0, FAR, pages * cache.page), cache.page).flatten(3)
    blocks = softmax_of_blocks(cache, scores, pos, pos[:, None], t, part)
    begin = (newest - cache.n_chosen)[:, None] * cache.page  # if the chosen stood right before them
    window = softmax_of_window(cache, rows, scores, pos, begin)
    return joined(blocks, window).view(q.shape).to(q.dtype)


class RetrieveCache(KiviCache):
    """A KiviCache: a step reads `read` quantized tokens, `extend` and a further prompt all."""

    fused = staticmethod(fused_attention)

    def __init__(self, *shape, read, by, **options):
        super().__init__(*shape, **options)
        self.page, self.by = GROUPS * self.config.group_size, by
        self.n_chosen = read // self.page
        self.n_newest = newest_pages(self.config.residual, self.page)
        n_read = self.n_chosen + self.n_newest
        self.reads_all = n_read >= self.capacity // self.page
        if not self.reads_all:
            # A part of the block before: buffers have room behind them for whole ones.
            self.block = self.page * (gcd(PAGES, self.block // self.page) if n_read > PAGES else 1)

    def attention(self, q, pos, t, seen=None, beside=None):
        if self.reads_all or seen is not None:
            return super().attention(q, pos, t, seen, beside)
        c, rows = self.config, q.float().reshape(len(q), self.n_kv_heads, -1, self.head_dim)
        n_pages = min(len(t), self.capacity) // self.page
        pages, newest = pages_of(self, rows, pos, n_pages)
        k, v = (self.from_pages(name, pages, n_pages) for name in "kv")  # [B, Hk, tokens, D]
        held = tokens_of(torch.where(pages < 0, FAR, pages * self.page), self.page).flatten(2)
        recent = slot_tokens(c, pos)  # [B, slots]
        exact = (recent >= (pos // c.residual * c.residual)[:, None]) | (recent < c.sink)
        place = recent - ((newest - self.n_chosen) * self.page)[:, None]
        recent_k = torch.where(exact[:, None, :, None], self.k_window.float(), take(k, place))
        oldest = (pos - c.residual)[:, None, None]
        seen = self.seen(pos[:, None, None], held) & (held >= c.sink) & (held < oldest)
        in_window = (recent >= 0) & self.seen(pos[:, None], recent)
        seen = torch.cat([seen, in_window[:, None].expand(-1, k.shape[1], -1)], 2)[:, :, None]
        k, v = torch.cat([k, recent_k], 2), torch.cat([v, self.v_window.float()], 2)
        return F.scaled_dot_product_attention(rows, k, v, seen).reshape(q.shape).to(q.dtype)

    def from_pages(self, name, pages, n_pages):
        """code * scale + zero of the tokens of these pages, float32 [B, Hk, tokens, D]."""
        parts = (gathered(pages[..., None], n_pages, x, 0, x.shape[2] * self.page // self.capacity)
                 .flatten(2, 3) for x in self.parts(name)[1:])
        order = self.order() if name == "k" else None
        return dequantize_groups(*parts, self.config, name, order)

    def traffic(self, length):
        """Bytes that attention reads: window and pages, and what pages are chosen by."""
        size = {name: x.nbytes // self.batch for name, x in self.contents().items()}
        seen = min(length, self.sliding or length, self.n_chosen * self.page + self.config.residual)
        read = seen * sum(size[a + b] for a in "kv" for b in ("_packed", "_scale", "_zero"))
        if not self.reads_all:
            read += length * (size["k_scale"] + size["k_zero"])
            n = self.config.boosted(self.head_dim) if self.by == "loud" else 0
            read += length * size["k_packed"] * n // (self.head_dim + n)
        return size["k_window"] + size["v_window"] + read // self.capacity


def configs(preset, argument, model):
    """The configs of `PRESET:read=N,by=KIND` for every layer; by loud channels if it has them."""
    options, by = {}, "loud" if preset.boost else "bound"
    for part in argument.split(","):
        name, _, value = part.partition("=")
        if name not in {"read", "by"} - {*options} or name == "read" and not value.isdecimal():
            raise ValueError(f"--kv cannot use {part!r}: use read=TOKENS, by=KIND, each once")
        options[name] = int(value) if name == "read" else value
    return [ReadConfig(**vars(preset), **{"by": by} | options)] * model.config.n_layers
