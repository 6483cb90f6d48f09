"""Attention over `FullCache`, compiled: the strongest form that the library has."""
from functools import lru_cache

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from fused.attention import dynamic, first


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
    out = F.scaled_dot_product_attention(rows, k, v, seen, enable_gqa=grouped)
    return out.reshape(q.shape)
