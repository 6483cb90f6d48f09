"""A cache of constant size: N slots a KV head, where a new token takes the place of the one that is
worth least. What was dropped is forgotten. Keys stay rotated for the place where they stood.

A token is never dropped while it is one of the first S, *sinks*, or of the newest R. Beyond these

    H2O (arXiv 2306.14048)             it is worth the attention of all queries so far,
      the same, `mean`                 .. divided by the queries that could see it (ZipCache's)
    PrefixKV (arXiv 2412.03409)        as H2O, and the layers have slots of their own
    Attention-Gate (arXiv 2410.12876)  a linear estimate of the logarithm of that mean, from its
                                       value and the sizes of its key's rotary pairs alone

As published  H2O: sums by KV head, half of the slots for the newest, prompts read exactly first.
              PrefixKV: the search for the slots of the layers, the first token kept.
Not           H2O: slots are a share of the row's capacity, as buffers are static. PrefixKV: each
              KV head chooses, by sums that decoding goes on with; the paper's one choice a layer,
              and then a sliding window, measured worse. Attention-Gate: a stand-in without
              training; the paper trains a block in front of every layer, and none is public.

Tokens take the slots in turn until all are full; the order of slots means nothing."""
import re
from dataclasses import dataclass, field

import torch

from fused.full import causal
from kivi import Cache
from neighbours.observed import column_sums
from quantize import KVConfig


@dataclass(frozen=True)
class EvictConfig(KVConfig):
    k_bits: int = 16
    v_bits: int = 16
    group_size: int = 1
    residual: int = 0  # R; 0: half of the slots
    slots: int = 0  # N
    share: float = 1  # of a row's capacity, where N is not given
    mean: bool = False
    gate: torch.Tensor = field(default=None, compare=False)  # [Hk, features], see `features`

    def check(self, head_dim):
        if (self.k_bits, self.v_bits, self.group_size, self.boost) != (16, 16, 1, 0):
            raise ValueError("a cache that evicts holds exact tokens: leave out --group-size and "
                             "other options of quantization")
        if min(self.sink, self.residual, self.slots) < 0 or not 0 < self.share <= 1:
            raise ValueError(f"sink, residual and slots must be 0 or more tokens and the share lie "
                             f"in 0 .. 1: {self.sink}, {self.residual}, {self.slots}, {self.share}")
        if self.slots and self.slots <= self.sink + self.residual:
            raise ValueError(f"{self.slots} slots leave none for others than {self.sink} sinks and "
                             f"the {self.residual} newest tokens: use more slots")

    def sizes(self, max_len):
        """(N, R) of a cache for rows of up to max_len tokens."""
        slots = self.slots or max(int(self.share * max_len), self.sink + self.residual + 1)
        return slots, self.residual or min(slots // 2, slots - self.sink)

    def stored_bits(self, head_dim):
        """Numbers of 16 bits, and three of 32 a slot; a share also counts what has no slot."""
        return (1 if self.slots else self.share) * (16 + 96 / (2 * head_dim))

    def make(self, *shape, sliding=None, **kind):
        if sliding is not None:
            raise ValueError("a cache that evicts has no sliding window: use another --kv")
        return EvictCache(self, *shape, **kind)


class EvictCache(Cache):
    """One layer's cache. Attention writes as well: what it gave to a slot, the next step counts."""

    @torch.inference_mode(False)
    def __init__(self, config, batch, n_kv_heads, max_len, head_dim, dtype=torch.float32,
                 device="cpu"):
        config.check(head_dim)
        N, R = config.sizes(max_len)
        # Its block is a whole row: all slots are read at any length, and one graph serves all.
        super().__init__(batch, n_kv_heads, max_len, head_dim, max_len, None, dtype, device)
        self.config, self.slots, self.recent = config, N, R
        self.gate = None if config.gate is None else config.gate.to(device)
        self.sums = None  # of the prompt that is being read: attention by token, held ones first
        slots = batch, n_kv_heads, N
        self.add("k_window", (*slots, head_dim), dtype)
        self.add("v_window", (*slots, head_dim), dtype)
        self.add("born", slots, torch.int32)  # token + 1; 0: the slot is empty
        self.add("score", slots, torch.float32)
        self.add("newest", slots, torch.float32)  # attention of the last step, not yet in score

    def used(self, name, length):
        return min(length, self.slots)

    def traffic(self, length):
        slot = 2 * self.head_dim * self.dtype.itemsize + self.born.itemsize
        return self.n_kv_heads * min(length, self.slots) * slot

    def options(self):
        return super().options() | {"slots": self.slots, "gate": self.gate is not None}

    def quantize_keys(self, pos):
        """There is nothing to do."""

    def worth(self, score, born, queries, length):
        """[B, Hk, n]: the least goes first, where so many queries were and the row is so long."""
        if self.config.mean:
            score = score / (queries + 1 - born)
        kept = (born <= self.config.sink) | (born > length - self.recent)
        return torch.where(kept, torch.inf, score)

    def estimate(self, k, v):
        """The first scores [B, Hk, n] of tokens: by the gate, or 0, to be counted up."""
        if self.gate is None:
            return torch.zeros(k.shape[:3], device=k.device)
        return (features(k, v) * self.gate[:, None]).sum(-1)

    def write(self, k, v, pos):
        """Writes token pos [B, 1] of every row, twice to the same slot: k, v [B, Hk, 1, D]."""
        pos = pos[:, :, None]
        born = torch.where(pos == 0, 0, self.born)  # the row begins anew
        again = born == pos + 1
        score = torch.where(again.any(2, True), self.score, self.score + self.newest)
        worth = self.worth(score, born, pos, pos + 1).masked_fill(again, -torch.inf)
        slot = torch.where(pos < self.slots, pos, worth.argmin(2, keepdim=True))  # [B, Hk, 1]
        here = slot == torch.arange(self.slots, device=pos.device)
        self.born.copy_(torch.where(here, pos + 1, born))
        self.score.copy_(torch.where(here, self.estimate(k, v), score))
        place = self.rows[:, None], torch.arange(self.n_kv_heads, device=pos.device), slot[..., 0]
        self.k_window[place], self.v_window[place] = k[:, :, 0], v[:, :, 0]

    def attention(self, q, pos, t):
        """As `Cache.attention`, over all slots; the next `write` counts what it gave to each."""
        rows = q.reshape(len(q), self.n_kv_heads, -1, self.head_dim).float()
        scores = rows @ self.k_window.float().mT * self.head_dim**-0.5
        p = scores.masked_fill((self.born == 0)[:, :, None], -1e30).softmax(-1)  # [B, Hk, M, N]
        if self.gate is None:
            self.newest.copy_(p.sum(2))
        return (p @ self.v_window.float()).view(q.shape).to(q.dtype)

    def dequantized(self, rows=slice(None)):
        """(k, v) [B, Hk, n, D] of the tokens that are held, n = min(L, N); zeros in empty slots."""
        n = self.used("born", max(self.lengths[rows]))
        empty = (self.index[:n] >= self.pos[rows, None])[:, None, :, None]
        return tuple(x[rows, :, :n].masked_fill(empty, 0) for x in (self.k_window, self.v_window))

    def observe(self, q, k, row, real):
        """See neighbours/registry.py."""
        if self.gate is not None:
            return
        past, before = self.sums, k.shape[2] - q.shape[2]
        self.sums = torch.zeros(k.shape[:3], device=k.device)
        for i, n in enumerate(real.clamp(0, q.shape[2]).tolist()):
            own, seen = slice(i, i + 1), slice(0, before + n)
            if n:
                self.sums[own, :, seen] = column_sums(q[own, :, :n], k[own, :, seen])
        if past is not None and past.shape[2] == before:  # else of a prompt that came to no end
            self.sums[:, :, :before] += past

    def fill(self, k, v, start, ends, row=0):
        """As `KiviCache.fill`: of the tokens that are held and the new ones the best N stay.

        raises ValueError: no query was observed, by which to choose
        """
        (b, Hk, n, _), rows = k.shape, slice(row, row + len(k))
        held, length = self.used("born", max(self.lengths[rows])), ends[:, None, None]
        score = torch.cat([(self.score + self.newest)[rows, :, :held], self.estimate(k, v)], 2)
        if self.gate is None:
            if self.sums is None:
                raise ValueError("this cache keeps the tokens that get most attention: give it the "
                                 "queries, too, with extend(q, k, v)")
            score, self.sums = score + self.sums, None
        t = start[:, None] + torch.arange(n, device=start.device)
        new = torch.where(t < ends[:, None], t + 1, 0)[:, None].expand(-1, Hk, -1)
        born = torch.cat([self.born[rows, :, :held], new], 2)
        worth = self.worth(score, born, length, length).masked_fill(born == 0, -torch.inf)
        best = worth.sort(dim=2, descending=True, stable=True).indices[:, :, : self.slots]
        place = self.rows[:b, None, None], torch.arange(Hk, device=best.device)[:, None], best
        there = born[place] > 0
        k, v = (torch.cat([window[rows, :, :held], x], 2)
                for window, x in ((self.k_window, k), (self.v_window, v)))
        for buffer, x, kept in ((self.k_window, k, there[..., None]), (self.score, score, there),
                                (self.v_window, v, there[..., None]), (self.born, born, there)):
            buffer[rows] = 0
            buffer[rows, :, : best.shape[2]] = torch.where(kept, x[place], 0)
        self.newest[rows] = 0

    @torch.no_grad()
    def extend(self, q, k, v, lengths=None):
        """As `Cache.extend`, but the tokens that stay are chosen once, at the end."""
        ends = self.check_new(0, lengths, k=k, v=v, q=q)
        out = torch.zeros_like(q)
        for row, n in enumerate((ends - self.pos).tolist()):
            if n:
                own = slice(row, row + 1)
                queries, *new = (x[own, :, :n] for x in (q, k, v))
                keys, values = (torch.cat(pair, 2) for pair in zip(self.dequantized(own), new))
                out[own, :, :n] = causal(queries, keys, values)
                self.observe(queries, keys, row, ends[own])
                self.fill(*new, self.pos[own], ends[own], row)
        self.set_lengths(ends.tolist())
        return out


def features(k, v):
    """What a gate sees of tokens k, v [.., D]: [.., D + D / 2 + 3], the value, the sizes of the
    pairs of channels that a rotary embedding turns, the sizes of both, and 1."""
    v, pairs = v.float(), k.float().unflatten(-1, (2, -1)).norm(dim=-2)
    sizes = [x.norm(dim=-1, keepdim=True) for x in (v, pairs)]
    return torch.cat([v, pairs, *sizes, torch.ones_like(sizes[0])], -1)


def h2o(argument, model):
    form = re.fullmatch(r"(?:slots=([1-9]\d{0,8})|(?:share=)?([01]|[01]?\.\d+))(,mean)?", argument)
    if not form:
        raise ValueError(f"h2o:{argument} says neither a share of the tokens nor slots: write "
                         "h2o:0.2 or h2o:slots=256, and ,mean behind it if you like")
    slots, share, mean = form.groups()
    size = {"slots": int(slots)} if slots else {"share": float(share)}
    return [EvictConfig(mean=bool(mean), **size)] * model.config.n_layers
