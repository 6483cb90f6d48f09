"""Column sums of causal attention: how much attention each token of a prompt got.

Attention itself runs in kernels that never write its probabilities out, so these are computed once
more, with every query or, at a fraction of the work, with some of them.
"""
import torch

CHUNK = 2**24  # probabilities that are in memory at once
NEWEST = 64  # queries at the end that are never left out


def column_sums(q, k, every=1):
    """For each KV head and token, the sum of the attention it got: [b, Hk, T] float32.

    q [b, H, n, D] are the last n of the T tokens of k [b, Hk, T, D], and attend causally; the sum
    is over these queries and the query heads of the KV head.

    every   1 is exact. With more, only the newest 64 queries and one in so many of the others are
            computed: each of these stands for `every`, and a column is scaled by the number of the
            queries that see its token
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
        scores = rows[:, :, :, taken[i]].float() @ k[:, :, None, :end].mT * D**-0.5
        hidden = token[:end] > own[part, None]
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)  # [B, Hk, M, queries, end]
        sums[:, :, :end] += (weight[part] @ p).sum(2)
    if every == 1:
        return sums
    seen_by = torch.zeros(2, T, device=q.device)  # queries from a token on: all, and the weighted
    seen_by[0, T - n :] = 1
    seen_by[1, own] = weight
    every_one, counted = seen_by.flip(1).cumsum(1).flip(1)
    return sums * (every_one / counted)
