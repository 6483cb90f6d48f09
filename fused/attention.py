"""The attention of `KiviCache`, written so that `torch.compile` fuses the unpacking into it.

It computes what `kivi.KiviCache.attention` computes, from the same buffers, and never writes K or V
out at full precision. Three things make the difference:

Folding. With codes c, scale s, zero z, a query q, weights p, and the group g of the token (K) or of
the channel (V), the scales fold into q and p, and the zeros into one number a group:

    q . k_t = sum_d (q_d s_dg) c_td + sum_d q_d z_dg
    out_d   = sum_t (p_t s_tg) c_dt + sum_t p_t z_tg

so that both products are products of bare codes, which `product` unpacks on the fly.

Planes. Field a of all bytes is plane a: of P planes each has its own groups, so its own scales, and
no code is ever moved to another place. Scores stay apart by plane, P tensors [.., C / P].

Blocks. Every block of C tokens has a softmax of its own (flash decoding). Else a pass over a whole
row of scores would stand between the products, and one row would be too little work for a GPU. The
window is one more block; `joined` weighs them all.

Shapes: nb blocks, of U stacks each; M query heads share a KV head.
"""
from contextlib import nullcontext
from functools import partial, reduce
from math import prod

import torch

from kivi import Cache, FullCache

NEVER = -1e30  # score of a token that is not there; finite, or an empty block would give NaN
LAUNCH = {  # of the CUDA kernels, see `launches`: y rows of codes, x rows of q or p, r0 the sum
    "packed": {"YBLOCK": 32, "XBLOCK": 8, "R0_BLOCK": 64, "num_warps": 1, "num_stages": 3},
    # Sums that 64 does not divide, as of boosted keys: masks would undo the cheap unpacking.
    "uneven": {"YBLOCK": 32, "XBLOCK": 8, "R0_BLOCK": 32, "num_warps": 2, "num_stages": 3},
    "plain": {"YBLOCK": 32, "XBLOCK": 8, "num_warps": 1, "num_stages": 1},
    "window": {"YBLOCK": 128, "XBLOCK": 8, "R0_BLOCK": 32, "num_warps": 4, "num_stages": 3},
    "softmax": {"num_warps": 4, "num_stages": 1},  # XBLOCK: as many rows as have 512 numbers
    "blocks": {"XBLOCK": 16, "R0_BLOCK": 128, "num_warps": 4, "num_stages": 1},  # ranks of pages
}
JOINED = {  # the same kinds in `joined`: its number of blocks is constant, or it is not
    "softmax": {"YBLOCK": 1, "XBLOCK": 32, "num_warps": 4, "num_stages": 1},
    "blocks": {"YBLOCK": 1, "XBLOCK": 32, "R0_BLOCK": 8, "num_warps": 2, "num_stages": 1},
}


def compiled_attention(device, form=None, plain=Cache.attention):
    """attend(cache, q, pos=None, t=None): the `attention` of KiviCache, compiled for `device`.

    q [B, H, 1, D] -> [B, H, 1, D]; pos [B] index of the newest token and t, the tokens to read, as
    in `kivi.Cache.attend` unless given. Caches of one batch, max_len, dtype and options share a
    compilation, at all lengths, which a CUDA graph can capture. Linear layers stay out of it: the
    library is better at them. A `form` replaces `attention`; `plain`, of t, computes the same."""
    cuda = torch.device(device).type == "cuda"
    # Other caches are further compilations, of which the compiler allows 8 in a process by itself.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    quantized = torch.compile(form or attention, fullgraph=True, options=OPTIONS if cuda else None)
    context = nullcontext
    if cuda:
        from torch._inductor.virtualized import V

        context = partial(V.set_choices_handler, launches())

    def attend(cache, q, pos=None, t=None, *new):
        if pos is None:
            cache.check(1, q=q)
            pos = cache.pos - 1
        n = cache.length if t is None else len(t)
        if isinstance(cache, FullCache) or cuda and q.dtype == torch.float32:  # no such `product`
            return plain(cache, q, pos, cache.tokens(n), *new)
        # At least two blocks, if there are two: the compiler takes a length of 1 for a constant.
        end = min(max(n, 2 * cache.block), cache.capacity)
        starts = cache.index[: end : cache.block]
        with context():  # for each call, or Inductor keeps the choices that it meets first
            return quantized(cache, q, pos, dynamic(starts), *new)

    return attend


def dynamic(x):
    """x [n] with a length that the compiler does not take for a constant."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def first(x, n, *inner):
    """The first n * prod(inner) entries of dimension 2 of a buffer, as [B, Hk, n, *inner, ..]."""
    batch, head, entry, *rest = x.stride()
    steps = [entry * prod(inner[i:]) for i in range(len(inner) + 1)]
    return x.as_strided((*x.shape[:2], n, *inner, *x.shape[3:]), (batch, head, *steps, *rest))


def attention(cache, q, pos, starts):
    """Attention of one query per head: q [B, H, 1, D], pos [B] index of the newest token.

    starts  [nb] first token of every block to read; the one dynamic shape of a decode step"""
    rows = query_rows(cache, q)
    scores = packed_scores(cache, rows, starts.shape[0])
    blocks = softmax_of_blocks(cache, scores, pos, pos[:, None], tokens_of(starts, cache.block))
    return joined(blocks, softmax_of_window(cache, rows, scores, pos)).view(q.shape).to(q.dtype)


def query_rows(cache, q):
    """q [B, H, n, D] as the rows of one product for each KV head: [B, Hk, M n, D]."""
    rows = q.reshape(len(q), cache.n_kv_heads, -1, cache.head_dim)
    return rows.to(torch.float16) if q.is_cuda else rows.float()


def tokens_of(starts, n):
    """[.., n]: the n tokens from each of `starts` on."""
    return starts.int()[..., None] + torch.arange(n, dtype=torch.int32, device=starts.device)


def joined(blocks, window):
    """The attention of all blocks and of the window, from those of each: [B, Hk, M, D]."""
    (top, total, out), (window_top, window_total, window_out) = blocks, window
    top, total = (x[..., None].expand(out.shape) for x in (top, total))  # so it is one kernel
    best = torch.maximum(top.amax(2), window_top)  # [B, Hk, M, D]
    weight = (top - best[:, :, None]).exp()
    window_weight = (window_top - best).exp()
    total = (weight * total).sum(2) + window_weight * window_total
    return ((weight * out).sum(2) + window_weight * window_out) / total


def packed_scores(cache, rows, n_blocks, part=first):
    """q . K / sqrt(D) of the packed keys: rows [B, Hk, M, D] -> P of [B, Hk, nb, M, C / P]. `part`
    takes the blocks out of a buffer."""
    bits, G, D = cache.config.k_bits, cache.config.group_size, cache.head_dim
    P = 8 // bits
    U = cache.block // (P * G)
    packed = part(cache.k_packed, n_blocks, U)  # [B, Hk, nb, U, G, D + n]
    scale = part(cache.k_scale, n_blocks, U, P)  # [B, Hk, nb, U, P, 1, D]
    zero = part(cache.k_zero, n_blocks, U, P)  # [B, Hk, nb, U, P, 1, D]
    if rows.dtype == torch.float32:
        zero = zero + scale.float() * middle(bits, cache.config.boosted(D), D, zero.device)
    zero = zero.flatten(3, 5).to(rows.dtype)  # [B, Hk, nb, U * P, D]
    if cache.config.boost:
        rows, scale = by_column(cache, rows, scale)
    # One number for a group, which its codes' product lacks.
    of_zero = rows[:, :, None, :, :D].expand(-1, -1, n_blocks, -1, -1)
    of_zero = product((of_zero, zero, D**-0.5)).unflatten(-1, (U, P))  # [B, Hk, nb, M, U, P]
    scores = []
    for a, (codes, factor) in enumerate(numbers(cache, packed, bits, rows.dtype)):
        parts = fold(rows[:, :, None, None], scale[:, :, :, :, a], cache.dtype)
        of_codes = product(*((part, codes, factor * D**-0.5) for part in parts))
        scores.append((of_codes.transpose(3, 4) + of_zero[..., a, None]).flatten(-2))
    return scores


def middle(bits, n_boosted, head_dim, device):
    """[D]: the middle of the range of a channel's codes, of the first n in twice the bits."""
    boosted = torch.arange(head_dim, device=device) < n_boosted
    return (2**bits - 1) / 2 * torch.where(boosted, 1 + 2.0**-bits, 1.0)


def by_column(cache, rows, scale):
    """rows [.., D] and scale [.., D] for the columns of boosted keys [.., D + n], see kivi.py."""
    D, n = cache.head_dim, cache.config.boosted(cache.head_dim)
    order = cache.k_order.long()
    order = torch.cat([order, order[..., :n]], -1)[:, :, None]  # [B, Hk, 1, D + n]
    low = torch.arange(D + n, device=rows.device) >= D
    rows = rows.gather(-1, order.expand(*rows.shape[:-1], -1))
    rows = rows * torch.where(low, 2.0**-cache.config.k_bits, 1.0).to(rows.dtype)
    scale = scale[..., None, :].expand(*scale.shape[:-1], 2, -1).flatten(-2)[..., : D + n]
    return stored(rows), scale


def fold(rows, scale, dtype):
    """rows * scale [B, Hk, nb, U, M, D], in parts that add up to it.

    Rounded to float16 once, a score is 5e-4 off where keys have loud channels: more than the
    rounding of a float16 result, which gets two parts."""
    if dtype != torch.float16 or not rows.is_cuda:
        return [rows * scale]
    exact = rows.float() * scale.float()
    # By its bits: Inductor would not round on the way to float16 and back.
    high = (exact.view(torch.int32) & -(2**13)).view(torch.float32)
    return [high.to(torch.float16), (exact - high).to(torch.float16)]


def softmax_of_blocks(cache, scores, pos, own, t, part=first):
    """Attention over the tokens whose values are quantized, block by block.

    t        tokens of every block, [nb, C] or [B, Hk, nb, C]
    returns  largest score and sum of weights [B, Hk, nb, M], weighted values [B, Hk, nb, M, D]
    """
    c, t = cache.config, t[..., None, :]  # [.., nb, 1, C]
    newest = pos.int()[:, None, None, None, None]
    seen = (t >= c.sink) & (t < newest - c.residual)  # [B, 1 or Hk, nb, 1, C]
    if cache.sliding is not None:
        seen = seen & (t > own.int()[:, None, None, :, None] - cache.sliding)
    seen = by_plane(seen, len(scores), c.group_size)
    scores = [x.masked_fill(~ok, NEVER) for x, ok in zip(scores, seen)]
    if c.k_bits != c.v_bits:  # other planes for V: through the order of tokens
        scores = [x.unflatten(-1, (-1, c.group_size)) for x in scores]
        scores = by_plane(torch.stack(scores, -2).flatten(-3), 8 // c.v_bits, c.group_size)
    top = reduce(torch.maximum, scores).amax(-1)  # [B, Hk, nb, M]
    p = [(x - top[..., None]).exp() for x in scores]
    return top, sum(p).sum(-1), packed_values(cache, p, t.shape[-3], pos.is_cuda, part)


def by_plane(x, planes, group_size):
    """x [.., C] in the order of tokens -> one tensor [.., C / planes] for every plane."""
    return x.unflatten(-1, (-1, planes, group_size)).movedim(-2, 0).flatten(-2).unbind(0)


def packed_values(cache, p, n_blocks, half, part=first):
    """p . V of the packed values: p, P of [B, Hk, nb, M, C / P] -> [B, Hk, nb, M, D]."""
    bits, G, P = cache.config.v_bits, cache.config.group_size, len(p)
    U = cache.block // (P * G)
    packed = part(cache.v_packed, n_blocks, U).unflatten(4, (cache.v_scale.shape[3], -1))
    packed = packed.permute(0, 1, 2, 4, 5, 3, 6).flatten(-2)  # [B, Hk, nb, D / G, G, C / P]
    scale, zero = (part(x, n_blocks, U, P).permute(0, 1, 2, 4, 5, 3, 6).flatten(-2)
                   for x in (cache.v_scale, cache.v_zero))  # [B, Hk, nb, P, D / G, C / P]
    if half:
        p = [stored(x.to(torch.float16)) for x in p]
    # In float32: these sums largely cancel those of the codes.
    zero = zero.float() if half else zero + scale.float() * (2**bits - 1) / 2
    of_zero = [sum(x * zero[:, :, :, a, g, None] for a, x in enumerate(p)).sum(-1)
               for g in range(zero.shape[4])]
    of_zero = torch.stack(of_zero, 3)  # [B, Hk, nb, D / G, M]
    folded = [x[:, :, :, None] * scale[:, :, :, a, :, None] for a, x in enumerate(p)]
    codes = numbers(cache, packed, bits, p[0].dtype)
    of_codes = product(*((x, *plane) for x, plane in zip(folded, codes)))
    return (of_codes + of_zero[..., None]).transpose(3, 4).flatten(-2)


def softmax_of_window(cache, rows, scores, pos, begin=0):
    """Attention over the tokens whose values are exact: the sinks and the last R + 1.

    returns  largest score and sum of weights [B, Hk, M, 1], weighted values [B, Hk, M, D]
    """
    t = slot_tokens(cache.config, pos)  # [B, slots]
    unseen = t < 0
    if cache.sliding is not None:
        unseen = unseen | (t <= pos[:, None] - cache.sliding)
    recent = window_scores(cache, rows, scores, pos, t, begin)
    recent = recent.masked_fill(unseen[:, None, None], NEVER)
    return softmax_of(recent, cache.v_window.to(rows.dtype))


def window_scores(cache, rows, scores, pos, t, begin=0):
    """[B, Hk, M, slots]: scores of the window's tokens t [B, slots], for a query at pos; as if
    those of the blocks were of the tokens from `begin` on, a number or [B, 1]."""
    c, G, P, C = cache.config, cache.config.group_size, len(scores), cache.block
    recent = product((rows, cache.k_window.to(rows.dtype), cache.head_dim**-0.5))
    # Between the boundaries of K and V the value is exact and the key is quantized: such scores
    # come from the planes, from the place of the token there.
    exact = (t < c.sink) | (t >= (pos // c.residual * c.residual)[:, None])
    place = (t - begin).clamp(0, scores[0].shape[2] * C - 1)[:, None, None]
    in_plane = place % C // (P * G) * G + place % G
    B, Hk, M = (torch.arange(n, device=pos.device) for n in rows.shape[:3])
    index = B[:, None, None, None], Hk[:, None, None], place // C, M[:, None], in_plane
    plane = place // G % P
    for a, x in enumerate(scores):
        recent = torch.where(exact[:, None, None] | (plane != a), recent, x[index])
    return recent


def softmax_of(recent, values):
    """Attention by scores [B, Hk, M, n] to values [B, Hk, n, D], as `softmax_of_window` has it."""
    top = recent.amax(-1, keepdim=True)
    p = (recent - top).exp()
    total = p.sum(-1, keepdim=True)
    p = stored(p.to(values.dtype)) if values.dtype == torch.float16 else p
    return top, total, product((p, values.mT, 1.0))


def slot_tokens(config, pos):
    """[B, slots] token that each slot of the window holds; negative where there is none."""
    S, R = config.sink, config.residual
    slots = torch.arange(S + R + 1, device=pos.device)
    newest = pos[:, None]
    latest = newest - (newest - slots) % (R + 1)  # the newest t with (t - S) % (R + 1) + S = slot
    pinned = torch.where(slots <= newest, slots, -1)
    return torch.where(slots < S, pinned, torch.where(latest >= S, latest, -1))


def numbers(cache, packed, bits, dtype):
    """The codes of every plane as numbers, not yet shifted into place: [(codes * 2^p, 2^-p) ..].

    float16 (CUDA): the low bits of a float16 are the mantissa of a denormal, so the masked byte
    already *is* code * 2^(p - 24), exactly. Without this, a shift and a conversion a code."""
    # A tensor core aligns terms by exponents, and a denormal's are up to 2^10 too large. What it
    # cuts off shows in float16 results: there the codes stand two bits higher.
    lift = 2 * (dtype == cache.dtype == torch.float16)
    masks = [(p, (1 << bits) - 1 << p) for p in range(lift, 8 + lift, bits)]
    if dtype != torch.float16:  # around their middle, or the shares of codes and zeros would cancel
        return [((packed & mask).float() - mask / 2, 2.0**-p) for p, mask in masks]
    wide = packed.to(torch.int16) << lift
    # The minus makes LLVM mask two codes with one instruction; the tensor core applies it for free.
    return [(-(wide & mask).view(torch.float16), -(2.0 ** (24 - p))) for p, mask in masks]


def product(*terms, store=True):
    """Sum of factor * (rows [.., M, X] . codes [.., Y, X]) over the terms: [.., M, Y] float32.

    terms  (rows, codes, factor); on CUDA float16, one `tl.dot` a term, all in one kernel, with the
           unpacking on the way to the tensor core (Inductor's native_matmul). On a CPU a matrix
           product would write the codes out first, so it is a sum a row, which fuses with them.
    store  False: the caller ends in `stored`, in the same kernel; a single row is doubled on CUDA
    """
    M, codes = terms[0][0].shape[-2], terms[0][1]
    if codes.dtype == torch.float32:
        sums = [sum(rows[..., m, None, :] * codes * factor for rows, codes, factor in terms).sum(-1)
                for m in range(M)]
        return torch.stack(sums, -2)
    if M == 1:  # a product with a single row would go to the library, with the codes written out
        terms = [(rows.expand(*rows.shape[:-2], 2, -1), *rest) for rows, *rest in terms]
    # `rows` come second: there they are padded to 8 rows, as the first operand to 16.
    out = sum((codes @ rows.to(torch.float16).mT).float() * factor for rows, codes, factor in terms)
    return stored(out).mT[..., :M, :] if store else out.mT


def stored(x):
    """x, written to memory by the kernel that computes it.

    Inductor keeps the result of a product in the type of its operands, 16 bits here, unless float32
    arithmetic on it ends in a store of the same kernel; and what is not stored it evaluates again
    for every reader. `as_strided` needs real strides and so forces the store."""
    return x.as_strided(x.shape, x.stride())


def is_product(node):
    """Is a node of Inductor's scheduler a `tl.dot`?"""
    return node is not None and not node.is_template() and node.is_native_matmul()


def products_may_fuse(scheduler, node1, node2, shared_data_score):
    """The rule on fusing nodes of Inductor's scheduler where there are products."""
    from torch._inductor.choices import InductorChoices

    if is_product(node1) or is_product(node2):
        # A heuristic against peak memory would leave the sum of two products outside their kernel.
        return shared_data_score > 0
    # What reads a product joins its kernel or none: outside it the product is float16.
    for dep in (*node1.read_writes.reads, *node2.read_writes.reads):
        buffer = scheduler.name_to_buf.get(dep.name)
        if buffer is not None and is_product(buffer.defining_op):
            return False
    return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)


def kernel_kind(features):
    """Key of LAUNCH for a kernel of Inductor, or None."""
    from torch._inductor.virtualized import V

    n = str(features.reduction_numel)  # a number, or a symbol: the number of blocks
    if any(map(is_product, features.scheduler_nodes())):
        types = {V.graph.get_dtype(r.name)
                 for node in features.scheduler_nodes() for r in node.read_writes.reads}
        if torch.uint8 in types:
            return "uneven" if int(n) % 64 else "packed"  # of bytes always a number
        # The window has R + 1 slots, a sum of odd length. Of a few rows one pass is shorter.
        values = n.isdigit() and int(n) % 32 and torch.float32 not in types
        numel = str(features.numel)  # of the window, a number
        return "window" if values and numel.isdigit() and int(numel) > 2**13 else "plain"
    if not features.is_reduction() or n.isdigit() and int(n) > 512:
        return None
    return "softmax" if n.isdigit() else "blocks"


def launches():
    """Inductor's choices for attention: fixed launches, the fastest of those that were timed. Its
    own tiles are many times larger and spill registers, and timing them takes a minute a kernel."""
    from torch._inductor.choices import InductorChoices as Choices
    from torch._inductor.codegen.triton import FixedTritonConfig

    class Launches(Choices):
        can_fuse = staticmethod(products_may_fuse)

        def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
            kind = kernel_kind(features)
            if kind is None:
                return kernel_kwargs
            joined = JOINED.get(kind, {}) if "y" in groups[0] else {}
            launch = {"ZBLOCK": 1} | LAUNCH[kind] | joined
            if "XBLOCK" not in launch:
                launch["XBLOCK"] = max(2, 512 >> (int(features.reduction_numel) - 1).bit_length())
            if kind == "uneven" and int(groups[0]["y"]) % 64 == 0:
                launch["YBLOCK"] = 64  # groups of 64: with 32, up to 12 % slower
            if kind == "uneven" and int(features.reduction_numel) % 32:  # 32 would mask: +40 % time
                launch |= {"R0_BLOCK": 16, "num_warps": launch["YBLOCK"] // 32}
            fixed = {k: n for k, n in launch.items()
                     if k.islower() or k.removesuffix("BLOCK").lower() in groups[0]}
            return kernel_kwargs | {"fixed_config": FixedTritonConfig(fixed)}

        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            kind = kernel_kind(features)
            if kind is None:
                return Choices.should_use_persistent_reduction(features, cooperative_reduction)
            return "R0_BLOCK" not in LAUNCH[kind]  # a softmax: one pass over the scores, not three

        @staticmethod
        def reduction_split_factor(device, reduction_numel, numel, inner_reduction):
            if reduction_numel <= 8192:  # a sum over the window would be cut into two kernels
                return 1
            return Choices.reduction_split_factor(device, reduction_numel, numel, inner_reduction)

        def uuid(self):
            return f"kivi-11 {LAUNCH} {JOINED}"  # part of the key of the compile caches

    return Launches()


OPTIONS = {
    "triton.native_matmul": True,
    "triton.enable_pdl": True,  # a kernel starts while the one before ends: 5 of 42 us at B = 1
    "inductor_choices_class": launches,
    "max_fusion_size": 2048,  # with the three below, all planes share a kernel: one read of a byte
    "realize_opcount_threshold": 10**5,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "shape_padding": False,
    "assert_indirect_indexing": False,  # pages and slots are in range: 4 of 142 us
    # Else a kernel comes right behind the one it waits for: 27.5 us, not 20.0, at B = 1.
    "reorder_for_peak_memory": False,
    "loop_ordering_after_fusion": False,  # else sums of products stay outside the products' kernel
}
