"""How much attention each token got: of a prompt, and of the newest tokens while decoding goes on.

Attention runs in kernels that never write its probabilities out, so those of a prompt are computed
once more, with every query or, at a fraction of the work, with some of them.
"""
import torch

from fused.attention import slot_tokens
from fused.full import causal
from kivi import Cache, KiviCache
from quantize import KVConfig, take

NAMES = ("k", "v", "sum")  # of windows: K, V, and the attention that a token got so far
CHUNK = 2**24  # probabilities that are in memory at once
NEWEST = 64  # queries at the end that are never left out


def column_sums(q, k, every=1):
    """For each KV head and token, the sum of the attention it got: [b, Hk, T] float32.

    q [b, H, n, D] are the last n of the T tokens of k [b, Hk, T, D], and attend causally; the sum
    is over these queries and the query heads of the KV head.

    every   1 is exact. With more, only the newest 64 queries and one in so many of the others are
            computed: each of these stands for `every`, and a column is scaled by the number of the
            queries that see its token. With 8, a ninth to a quarter of the time; KL of `tiers` to
            full precision is 0.0081 and not 0.0072 (SmolLM2-135M, 3 prompts of 1,024 tokens, 192
            decoded behind each, standard error 0.0007)
    """
    (B, H, n, D), (Hk, T) = q.shape, k.shape[1:3]
    older = max(0, n - NEWEST)
    taken = torch.cat([torch.arange(0, older, every), torch.arange(older, n)])
    weight = torch.where(taken < older, float(every), 1.0).to(q.device)
    own, token = (taken + T - n).to(q.device), torch.arange(T, device=q.device)
    rows, k = q.unflatten(1, (Hk, -1)), k.float()
    sums = torch.zeros(B, Hk, T, device=q.device)
    for i in torch.arange(len(taken)).split(max(1, CHUNK // (B * H * T))):
        end = T - n + int(taken[i[-1]]) + 1  # the newest of these queries sees no token from here
        part = slice(int(i[0]), int(i[-1]) + 1)
        # The queries of all heads as rows of one product: else it would write K out for each.
        scores = rows[:, :, :, taken[i]].flatten(2, 3).float() @ k[:, :, :end].mT
        scores = scores.unflatten(2, (-1, len(i))) * D**-0.5  # [B, Hk, M, queries, end]
        p = scores.masked_fill(token[:end] > own[part, None], -torch.inf).softmax(-1)
        sums[:, :, :end] += (weight[part] @ p).sum(2)
    if every == 1:
        return sums
    seen_by = torch.zeros(2, T, device=q.device)  # queries from a token on: all, and the weighted
    seen_by[0, T - n :] = 1
    seen_by[1, own] = weight
    every_one, counted = seen_by.flip(1).cumsum(1).flip(1)
    return sums * (every_one / counted)


def sums_of_rows(q, k, real, every=1):
    """`column_sums` of rows in which only the first real [b] of the queries are no padding."""
    sums, before = torch.zeros(k.shape[:3], device=k.device), k.shape[2] - q.shape[2]
    for i, n in enumerate(real.clamp(0, q.shape[2]).tolist()):
        own, seen = slice(i, i + 1), slice(before + n)
        if n:
            sums[own, :, seen] = column_sums(q[own, :, :n], k[own, :, seen], every)
    return sums


class ObservedCache(Cache):
    """A cache with a window of exact tokens, and of the attention that they got so far.

    The window holds the first `sink` tokens and the `newest` ones. What a query pays is held back
    and joins the sums when the next token is written, so that a step may run twice. A subclass has

    pack(new, start, ends, rows)   stores what leaves the window: see `fill`
    in_window(pos)                 [b, slots], the token that a query at pos [b] reads in each slot,
                                   negative where it reads none
    read                           see KiviCache; the tokens of the window stand in their places
    """

    observed = None  # [b, Hk, T, 1]: column sums of a prompt that is being read

    def __init__(self, batch, n_kv_heads, max_len, head_dim, block, dtype, device, sink, newest):
        super().__init__(batch, n_kv_heads, max_len, head_dim, block, None, dtype, device)
        self.ring = KVConfig(sink=sink, residual=newest - 1)  # the places of its slots
        slots = (batch, n_kv_heads, sink + newest)
        for name, width, kind in (("k_window", head_dim, dtype), ("v_window", head_dim, dtype),
                                  ("sum_window", 1, torch.float32), ("paid", 1, torch.float32)):
            self.add(name, (*slots, width), kind)
        self.add("payer", (batch, 1, 1), torch.int64)  # 1 + the token whose query paid

    def slot(self, t):
        return self.ring.slot(t)

    def observe(self, q, k, row, real):
        """See neighbours/registry.py."""
        sums = sums_of_rows(q, k, real, self.config.every)[..., None]
        if k.shape[2] - q.shape[2] > self.lengths[row]:  # others of this prompt came before
            sums[:, :, : self.observed.shape[2]] += self.observed
        self.observed = sums

    def prefill(self, k, v, lengths=None):
        raise ValueError("this cache ranks tokens by attention: call extend(q, k, v), not prefill")

    @torch.no_grad()
    def extend(self, q, k, v, lengths=None):
        """`Cache.extend`, row by row, each as `model.Block.extend` reads a prompt."""
        ends, _ = self.check_new(0, lengths, k=k, v=v, q=q)
        out = torch.zeros_like(q)
        for row, (held, end) in enumerate(zip(self.lengths, ends.tolist())):
            one = slice(row, row + 1)
            new_q, new_k, new_v = (x[one, :, : end - held] for x in (q, k, v))
            if end > held:
                keys, values = (torch.cat([x.to(self.dtype), new], 2)
                                for x, new in zip(self.dequantized(one), (new_k, new_v)))
                self.observe(new_q, keys, row, ends[one] - held)
                out[one, :, : end - held] = causal(new_q, keys, values)
                self.fill(new_k, new_v, self.pos[one], ends[one], row)
        self.set_lengths(ends.tolist())
        return out

    def fill(self, k, v, start, ends, row=0):
        """Stores new tokens in the rows from `row` on, after `observe`: see KiviCache.fill."""
        rows, starts = slice(row, row + len(k)), start[:, None]
        self.count(start, rows)
        held = slot_tokens(self.ring, start - 1)  # [b, slots], negative where there is none
        more = take(self.observed, held)
        self.sum_window[rows] += torch.where((held >= 0)[:, None, :, None], more, 0)
        new = dict(zip(NAMES, (k, v, self.observed[:, :, -k.shape[2] :])))
        self.pack(new, start, ends, rows)
        t = self.ring.in_window(ends - 1)
        place, is_new = (self.rows[rows, None], slice(None), self.slot(t)), t < ends[:, None]
        for name, x in new.items():
            window = getattr(self, f"{name}_window")
            x = self.pick(name, x, t, starts, rows).transpose(1, 2)
            window[place] = torch.where(is_new[..., None, None], x, window[place])
        self.payer[rows], self.observed = 0, None

    pick = KiviCache.pick

    def write(self, k, v, pos):
        super().write(k, v, pos)
        self.count(pos[:, 0])
        place = self.rows[:, None], slice(None), self.slot(pos)
        # Not 0.0: a number would be copied to the device, which a CUDA graph cannot hold.
        self.sum_window[place] = torch.zeros_like(self.sum_window[place])

    def count(self, pos, rows=slice(None)):
        """Adds what the query before token pos [b] paid to the sums, unless it is a later one."""
        is_new = self.payer[rows] == pos[:, None, None]
        self.sum_window[rows] += torch.where(is_new[..., None], self.paid[rows], 0)

    def attention(self, q, pos, t):
        """`Cache.attention` of one query a head, which pays the window's tokens."""
        rows, out, sums = q.reshape(self.batch, self.n_kv_heads, -1, self.head_dim), [], []
        for heads in self.portions(len(t)):
            k, v = self.read(pos, len(t), heads)
            unseen = t > pos[:, None, None, None]
            with torch.autocast(q.device.type, enabled=False):  # would round to half precision
                scores = rows[:, heads].float() @ k.mT * self.head_dim**-0.5
                p = scores.masked_fill(unseen, -torch.inf).softmax(-1)
                out.append(p @ v)
            sums.append(p.sum(2)[..., None])
        token = self.in_window(pos)
        self.pay(take(torch.cat(sums, 1), token) * (token >= 0)[:, None, :, None], pos)
        return torch.cat(out, 1).view(q.shape).to(q.dtype)

    def pay(self, paid, pos):
        """Holds the attention [B, Hk, slots, 1] that the queries at pos [B] pay to the window."""
        self.paid.copy_(paid)
        self.payer.copy_(pos[:, None, None] + 1)
