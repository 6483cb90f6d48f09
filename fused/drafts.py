"""Attention of a few drafted tokens, which a packed cache does not hold and may never hold.

Each query gets what it would get in a decode step of its own, after the steps of the drafts before
it. Meanwhile values leave the window: at every step one becomes quantized. So the window is read
with n copies beside it, quantized, of the values that will leave, and each query reads of every
token the one or the other. Keys change only where a key block is completed, and so drafts must not
go beyond the end of one.

A full-precision cache needs nothing of this: drafts are written behind what it holds, where they
can be overwritten.

n drafts, the first of them token pos; M query heads share a KV head.
"""
import torch
from torch.nn import functional as F

from fused.attention import NEVER, joined, packed_scores, product, query_rows, slot_tokens
from fused.attention import softmax_of, softmax_of_blocks, tokens_of, window_scores
from fused.full import full_attention, has_grouped_kernel
from kivi import FullCache
from quantize import dequantize, take, value_codes


def drafted(cache, q, pos, t, k, v, left):
    """q [B, H, n, D] of drafts k, v [B, Hk, n, D] from token pos [B] on -> [B, H, n, D], over the
    tokens t (see `Cache.tokens`); left is what `leaving` returns."""
    if isinstance(cache, FullCache):
        return full_attention(cache, q, pos, t, has_grouped_kernel(q))
    now = pos[:, None] + torch.arange(q.shape[2], device=q.device)  # [B, n]
    out = []
    for heads in cache.portions(len(t)):
        part = q.unflatten(1, (cache.n_kv_heads, -1))[:, heads].flatten(2, 3)  # [B, heads, M n, D]
        held_k, held_v = cache.read(pos, len(t), heads)
        tokens = t.expand(len(q), -1).masked_fill(t >= pos[:, None], -1)
        parts = ((tokens, held_k, held_v),
                 (left[0], take(held_k, left[0]), left[1][:, heads]),
                 (now, k[:, heads], v[:, heads]))
        tokens = torch.cat([x[0] for x in parts], 1)
        keys, values = (torch.cat([x[i].to(held_k.dtype) for x in parts], 2) for i in (1, 2))
        seen = seen_of(cache, tokens, now, q.shape[2], part.shape[2])
        with torch.autocast(q.device.type, enabled=False):
            y = F.scaled_dot_product_attention(part.to(keys.dtype), keys, values, seen[:, None])
        out.append(y)
    return torch.cat(out, 1).reshape(q.shape).to(q.dtype)


def fused_drafted(cache, q, pos, starts, k, v, left):
    """The same over packed codes, see fused/attention.py: starts [nb]."""
    rows = query_rows(cache, q)  # [B, Hk, M n, D]
    n, D = q.shape[2:]
    now = pos[:, None] + torch.arange(n, device=q.device)
    scores = packed_scores(cache, rows, starts.shape[0])
    every = now.repeat(1, rows.shape[2] // n)  # [B, M n]
    blocks = softmax_of_blocks(cache, scores, pos, every, tokens_of(starts, cache.block))
    t = slot_tokens(cache.config, pos)  # [B, slots]
    t = torch.where(t == now[:, :1], -1, t)  # the slot of the first draft is still another's
    recent = window_scores(cache, rows, scores, pos, t)
    slot = cache.slot(left[0].clamp(min=0))[:, None, None].expand(-1, *rows.shape[1:3], -1)
    new = product((rows, k.to(rows.dtype), D**-0.5))
    recent = torch.cat([recent, recent.gather(3, slot), new], 3)
    seen = seen_of(cache, torch.cat([t, left[0], now], 1), now, n, rows.shape[2])
    values = torch.cat([x.to(rows.dtype) for x in (cache.v_window, left[1], v)], 2)
    window = softmax_of(recent.masked_fill(~seen[:, None], NEVER), values)
    return joined(blocks, window).view(q.shape).to(q.dtype)


def leaving(cache, pos, n):
    """Tokens [B, n] whose values leave the window while n drafts come from pos on, -1 where there
    is none, and these values [B, Hk, n, D] as they will be read.

    Apart from the fused attention, because these codes must be those of the cache, bit for bit.
    """
    c = cache.config
    t = pos[:, None] - c.residual + torch.arange(n, device=pos.device)
    codes, scale, zero = value_codes(take(cache.v_window, cache.slot(t.clamp(min=0))), c)
    kind = cache.v_scale.dtype
    values = dequantize(codes, scale.to(kind).float(), zero.to(kind).float())
    return torch.where(t < c.sink, -1, t), values


def seen_of(cache, t, now, n, n_rows):
    """bool [B, rows, tokens]: does a query of token `now` [B, n] read this one of the tokens t [B,
    held + n + n]? Rows are M times n."""
    now = now[:, :, None]
    t, place = t[:, None], torch.arange(t.shape[1], device=t.device)
    is_copy = (place >= t.shape[2] - 2 * n) & (place < t.shape[2] - n)
    has_copy = (t >= cache.config.sink) & (t >= now[:, :1] - cache.config.residual)
    seen = (t >= 0) & cache.seen(now, t)
    seen = seen & (is_copy == (has_copy & (t < now - cache.config.residual)))
    return seen.repeat(1, n_rows // n, 1)
