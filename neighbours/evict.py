"""A cache of constant size: N slots a KV head, where a new token takes the place of the one that is
worth least. What was dropped is forgotten. Keys stay rotated for the place where they stood.

A token is never dropped while it is one of the first S, *sinks*, or of the newest R. Beyond these

    H2O (arXiv 2306.14048)             it is worth the attention of all queries so far,
      the same, `mean`                 .. divided by the queries that could see it (ZipCache's)
    PrefixKV (arXiv 2412.03409)        as H2O, and the layers have slots of their own
    Attention-Gate (arXiv 2410.12876)  a linear estimate of the logarithm of that mean, by K and V

As published  H2O: sums by KV head, half of the slots for the newest, prompts read exactly first.
              PrefixKV: the search for the slots of the layers, the first token kept.
Not           H2O: slots are a share of the row's capacity, as buffers are static. PrefixKV: slots
              come in 64s, and each KV head chooses, by sums that decoding goes on with; the paper's
              one choice a layer, and then a sliding window, measured worse. Attention-Gate: not
              trained; the paper trains a block in front of every layer, and none is public.

Tokens take the slots in turn until all are full; the order of slots means nothing."""
import re
from dataclasses import dataclass, field, replace

import torch

from kivi import Cache
from neighbours.observed import ObservedCache, sums_of_rows
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

    @property
    def by_capacity(self):
        """Does the number of slots depend on the capacity?"""
        return not self.slots

    @property
    def observes(self):
        return self.gate is None

    def check(self, head_dim):
        if (self.k_bits, self.v_bits, self.group_size, self.boost) != (16, 16, 1, 0):
            raise ValueError("a cache that evicts holds exact tokens: leave out --group-size and "
                             "other options of quantization")
        if min(self.sink, self.residual, self.slots) < 0 or not 0 < self.share <= 1:
            raise ValueError(f"sink, residual and slots must be 0 or more tokens and the share lie "
                             f"in 0 .. 1: {self.sink}, {self.residual}, {self.slots}, {self.share}")
        if 0 < self.slots <= self.sink + self.residual:
            raise ValueError(f"{self.sink} sinks and the {self.residual} newest tokens leave none "
                             f"of {self.slots} slots: use more slots, or a larger share")

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
        # `Cache` reads whole blocks of tokens: with one of max_len, every step reads all slots.
        super().__init__(batch, n_kv_heads, max_len, head_dim, max_len, None, dtype, device)
        slots = config.slots or max(1, int(config.share * max_len))
        if config.residual:
            replace(config, slots=slots).check(head_dim)
        self.config, self.slots = config, max(slots, config.sink + 1)
        self.recent = config.residual or min(self.slots // 2, self.slots - config.sink)
        self.gate = None if config.gate is None else config.gate.to(device)
        self.sums = None  # of the prompt that is being read: attention by token, held ones first
        slots = batch, n_kv_heads, self.slots
        self.add("k_window", (*slots, head_dim), dtype)
        self.add("v_window", (*slots, head_dim), dtype)
        self.add("born", slots, torch.int32)  # token + 1; 0: the slot is empty
        self.add("score", slots, torch.float32)
        self.add("newest", slots, torch.float32)  # attention of the last step, not yet in score

    def used(self, name, length):
        return min(length, self.slots)

    def traffic(self, length):
        slot = 2 * self.head_dim * self.dtype.itemsize + 4
        return self.n_kv_heads * min(length, self.slots) * slot

    def options(self):
        return super().options() | {"slots": self.slots, "gate": self.gate is not None}

    def quantize_keys(self, pos):
        """There is nothing to do."""

    def worth(self, score, born, queries, length):
        """[B, Hk, n]: the least goes first, where so many queries were and the row is so long."""
        if self.config.mean:  # token born - 1 was seen by queries - (born - 1) queries
            score = score / (queries + 1 - born)
        kept = (born <= self.config.sink) | (born > length - self.recent)
        return torch.where(kept, torch.inf, score)

    def estimate(self, k, v):
        """The first scores [B, Hk, n] of tokens: by the gate, or 0, to be counted up."""
        if self.gate is None:
            return torch.zeros(k.shape[:3], device=k.device)
        return (features(k, v) * self.gate[:, None]).sum(-1)

    def write(self, k, v, pos):
        """Writes token pos [B, 1] of every row: k, v [B, Hk, 1, D]. A step may run twice: then
        it finds its token there (`again`), takes that slot and does not count `newest` again."""
        pos = pos[:, :, None]
        born = torch.where(pos == 0, 0, self.born)  # the row begins anew
        again = born == pos + 1
        score = torch.where(again.any(2, True), self.score, self.score + self.newest)
        worth = self.worth(score, born, pos, pos + 1).masked_fill(again, -torch.inf)
        slot = torch.where(pos < self.slots, pos, worth.argmin(2, keepdim=True))  # [B, Hk, 1]
        self.born.copy_(born).scatter_(2, slot, (pos + 1).int().expand_as(slot))
        self.score.copy_(score).scatter_(2, slot, self.estimate(k, v))
        for window, x in ((self.k_window, k), (self.v_window, v)):
            window.scatter_(2, slot[..., None].expand_as(x), x)

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
        return self.k_window[rows, :, :n].clone(), self.v_window[rows, :, :n].clone()

    def observe(self, q, k, row, real):
        """See neighbours/registry.py."""
        if self.gate is not None:
            return
        past, before = self.sums, k.shape[2] - q.shape[2]
        self.sums = sums_of_rows(q, k, real)
        if past is not None and past.shape[2] == before:  # another length: of an interrupted prompt
            self.sums[:, :, :before] += past

    def fill(self, k, v, start, ends, row=0):
        """As `KiviCache.fill`: of the tokens that are held and the new ones the best N stay.

        raises ValueError: no query was observed, by which to choose
        """
        if self.gate is None and self.sums is None:
            raise ValueError("this cache keeps the tokens that get most attention: give it the "
                             "queries, too, with extend(q, k, v)")
        (b, Hk, n, _), rows = k.shape, slice(row, row + len(k))
        held, length = self.used("born", max(self.lengths[rows])), ends[:, None, None]
        t = start[:, None] + torch.arange(n, device=start.device)
        there = (t < ends[:, None])[:, None]  # [b, 1, n]: not padding
        k, v = (torch.where(there[..., None], x, 0) for x in (k, v))
        score = torch.where(there, self.estimate(k, v), 0)
        born = torch.where(there, t[:, None] + 1, 0).expand(-1, Hk, -1)
        self.score[rows] += self.newest[rows]
        self.newest[rows] = 0
        entries = {"k_window": k, "v_window": v, "score": score, "born": born}
        for name, x in entries.items():
            entries[name] = torch.cat([getattr(self, name)[rows, :, :held], x], 2)
        score, born = entries["score"], entries["born"]
        if self.gate is None:
            score += self.sums
            self.sums = None
        worth = self.worth(score, born, length, length).masked_fill(born == 0, -torch.inf)
        best = worth.sort(dim=2, descending=True, stable=True).indices[:, :, : self.slots]
        place = self.rows[:b, None, None], torch.arange(Hk, device=best.device)[:, None], best
        for name, x in entries.items():
            buffer = getattr(self, name)
            buffer[rows] = 0
            buffer[rows, :, : best.shape[2]] = x[place]

    extend = ObservedCache.extend  # the tokens that stay are chosen once, at the end


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
