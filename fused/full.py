"""Attention in full precision: of prompts, and compiled over `FullCache`, in the strongest form
that the library has."""
from functools import lru_cache, partial

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right

from fused.attention import dynamic, first


def causal(q, k, v, window=None, chunk=512):
    """Exact attention of the last c of T tokens, over the newest `window` of them if given.

    q [B, H, c, D]; k, v [B, Hk, T, D] -> [B, H, c, D]
    """
    c, T = q.shape[2], k.shape[2]
    attend = partial(F.scaled_dot_product_attention, enable_gqa=q.shape[1] != k.shape[1])
    window = window or T
    if c == T <= window:
        return attend(q, k, v, is_causal=True)
    if q.is_cuda and T <= window:
        # A flag of the flash kernel, not a tensor.
        return attend(q, k, v, attn_mask=causal_lower_right(c, T))
    t = torch.arange(T, device=q.device)
    out = torch.empty_like(q)
    for first in range(T - c, T, chunk):  # only keys that these queries see; no mask of T x T
        end = min(first + chunk, T)
        keys = slice(max(0, first - window + 1), end)
        queries = slice(first - T + c, end - T + c)
        own = t[first:end, None]
        seen = (t[keys] <= own) & (t[keys] > own - window)
        out[:, :, queries] = attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=seen)
    return out


def compiled_full_attention():
    """attend(cache, q, pos, t) as `FullCache.attention`, or of several tokens from pos on."""
    compiled = torch.compile(full_attention, fullgraph=True)

    def attend(cache, q, pos, t, *_):
        return compiled(cache, q, pos, dynamic(t), has_grouped_kernel(q))

    return attend


@lru_cache
def _grouped_kernel(dtype, device, head_dim):
    q = torch.empty(1, 2, 1, head_dim, dtype=dtype, device=device)
    k = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device)
    mask = torch.empty(1, 1, 1, 128, dtype=torch.bool, device=device)
    choice = torch._fused_sdp_choice(q, k, k, attn_mask=mask, enable_gqa=True)
    return choice != SDPBackend.MATH.value


def has_grouped_kernel(q):
    """Has the library a kernel for groups of query heads with a mask? cuDNN's is up to 15 times as
    fast as query heads as rows; without one, K and V would be copied for every query head."""
    return q.is_cuda and _grouped_kernel(q.dtype, q.device, q.shape[-1])


def full_attention(cache, q, pos, t, grouped):
    """`FullCache.attention`, by the library's grouped kernel where it has one; q [B, H, n, D] are
    of the tokens from pos on."""
    k, v = (first(x, t.shape[0]) for x in (cache.k_window, cache.v_window))
    now = pos[:, None] + torch.arange(q.shape[2], device=q.device)
    seen, rows = cache.seen(now[..., None], t)[:, None], q  # [B, 1, n, tokens]
    if not grouped:
        rows = q.reshape(len(q), k.shape[1], -1, k.shape[3])
        seen = seen.repeat(1, 1, rows.shape[2] // q.shape[2], 1)
    elif q.shape[2] > 1:
        # As heads with one query each. With several a head the kernel is up to 9 times as slow.
        rows = q.flatten(1, 2)[:, :, None]
        seen = seen.expand(-1, q.shape[1], -1, -1).flatten(1, 2)[:, :, None]
    out = F.scaled_dot_product_attention(rows, k, v, seen, enable_gqa=grouped)
    return out.reshape(q.shape)
