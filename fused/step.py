"""The parts of a decode step, plain and compiled: each is compiled once and serves every layer.

Attention stays apart from the linear layers, because it has compiler options of its own. On CUDA a
graph of the whole step joins the parts (decoding/), so the seams cost nothing.
"""
from dataclasses import dataclass
from functools import partial

import torch

from fused.attention import compiled_attention, dynamic
from fused.drafts import drafted, fused_drafted, leaving
from fused.full import compiled_full_attention
from fused.linear_launches import SMALL, compiled_weights
from kivi import FullCache, KiviCache, quantize_groups
from quantize import take

# Else Inductor divides by a scale that is not yet rounded to 16 bits, and not to the last bit: some
# codes would differ from those of uncompiled code.
EXACT = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}


def start(model, tokens, pos):
    """x [B, n, dim] and the rotation of the tokens [B, n] from pos [B] on."""
    places = pos[:, None] + torch.arange(tokens.shape[1], device=pos.device)
    return model.embed(tokens), *model.rope(places)


def before(layer, x, cos, sin, pos):
    """What precedes attention: puts the token's K and V into the cache, returns q [B, H, 1, D]."""
    q, k, v = layer.attention.qkv(layer.attention_norm(x), cos, sin)
    cache = layer.cache
    cache.write(k, v, pos[:, None])
    always = q.is_cuda or torch.compiler.is_compiling()  # a CUDA graph has no `if` of the host
    if isinstance(cache, KiviCache) and (always or cache.evicts_value()):
        cache.quantize_value(pos[:, None])  # it changes no row that is too short
    return q


def attend(cache, q, pos, t):
    return cache.attention(q, pos, t)


def between(layer, following, x, y, cos, sin, pos):
    """From a layer's attention to the next one's query, so that a sum and a norm are one kernel."""
    x = layer.after(x, y)
    return x, before(following, x, cos, sin, pos)


def last(layer, norm, head, x, y):
    return head(norm(layer.after(x, y)[:, 0]))


def flush(layer, pos):
    layer.cache.quantize_keys(pos)


@dataclass
class Step:
    """The functions of a decode step, plain or compiled."""

    start: callable = start
    before: callable = before
    attend: callable = attend
    between: callable = between
    last: callable = last
    flush: callable = flush


def before_drafts(layer, x, cos, sin, pos, count):
    """q, k, v of drafts x [B, n, dim], `count` [B] of which are real, and what `leaving` returns.
    They stay outside a packed cache."""
    q, k, v = layer.attention.qkv(layer.attention_norm(x), cos, sin)
    if isinstance(layer.cache, KiviCache):
        return q, k, v, leaving(layer.cache, pos, x.shape[1])
    append_drafts(layer.cache, k, v, pos, count)
    return q, k, v, None


def append_drafts(cache, k, v, pos, count):
    """Writes the first `count` [B] drafts behind the pos [B] tokens of a full-precision cache."""
    # The others might lie beyond its end: in their place the last one is written again.
    i = torch.arange(k.shape[2], device=pos.device).minimum(count[:, None] - 1)  # [B, n]
    cache.write(take(k, i), take(v, i), pos[:, None] + i)


def between_drafts(layer, following, x, y, cos, sin, pos, count):
    x = layer.after(x, y)
    return x, *before_drafts(following, x, cos, sin, pos, count)


def last_drafts(layer, norm, head, x, y):
    return head(norm(layer.after(x, y)))


def commit(cache, k, v, pos, accepted):
    """Puts the first `accepted` [B] of the drafts k, v [B, Hk, n, D] into the cache from pos [B]
    on, at least one, as so many decode steps would. None but the last has completed a key block."""
    if isinstance(cache, FullCache):
        return  # they are there
    # A row with fewer writes its last one again, which changes nothing: no `if` of the host.
    i = torch.arange(k.shape[2], device=pos.device).minimum(accepted[:, None] - 1)  # [B, n]
    newest = pos[:, None] + i
    for some in newest.split(cache.config.group_size, 1):
        cache.quantize_value(some)  # before others take the places of these values
    cache.write(take(k, i), take(v, i), newest)


@dataclass
class DraftStep:
    """The functions of a step that verifies drafts, plain or compiled."""

    start: callable = start
    before: callable = before_drafts
    attend: callable = drafted
    between: callable = between_drafts
    last: callable = last_drafts
    commit: callable = commit


def compiling(config, device):
    """(what compiles a function, what compiles one with linear layers) for `device`."""
    cuda = torch.device(device).type == "cuda"
    compiled = partial(torch.compile, fullgraph=True, options=EXACT | (SMALL if cuda else {}))
    if cuda and config.weights is not None:
        return compiled, partial(compiled_weights, joined=not config.parallel)
    return compiled, compiled


def compiled_step(config, device):
    """The functions of a `Step`, compiled for `device`."""
    compiled, linear = compiling(config, device)
    forms = {FullCache: compiled_full_attention(), KiviCache: compiled_attention(device)}
    plain = compiled(attend)

    def attend_any(cache, q, pos, t):
        kind = type(cache)
        if kind in forms:
            return forms[kind](cache, q, pos, t)
        if not hasattr(kind, "fused"):
            return plain(cache, q, pos, dynamic(t))
        forms[kind] = compiled_attention(device, kind.fused, kind.attention)
        return forms[kind](cache, q, pos, t)

    return Step(compiled(start), linear(before), attend_any, linear(between), linear(last),
                compiled(flush))


def compiled_draft_step(config, device):
    """The functions of a `DraftStep`, compiled for `device`."""
    compiled, linear = compiling(config, device)
    start_any = compiled(start)

    def start_drafts(model, tokens, pos):
        # Else the second number of tokens would be compiled as any number, here and all along.
        torch._dynamo.mark_static(tokens, 1)
        return start_any(model, tokens, pos)

    kivi, full = compiled_attention(device, fused_drafted, drafted), compiled_full_attention()

    def attend(cache, *args):
        return (full if isinstance(cache, FullCache) else kivi)(cache, *args)

    return DraftStep(start_drafts, linear(before_drafts), attend, linear(between_drafts),
                     linear(last_drafts), compiled(commit))


def compiled_quantizer():
    """`kivi.quantize_groups`, compiled: one pass over a prompt's K or V instead of a dozen."""
    compiled = torch.compile(quantize_groups, fullgraph=True, options=EXACT)

    def quantizer(x, keep, config, name, order=None):
        B, Hk, n_groups, G, D = x.shape
        if B * Hk * n_groups <= 4:  # one stack, a number that would be compiled as a constant
            return quantize_groups(x, keep, config, name, order)
        keep = keep.expand(B, Hk, -1, G, 1).reshape(-1, G, 1)[None, None]
        x = x.reshape(-1, G, D)[None, None]
        if order is not None:
            order = order.expand(B, Hk, n_groups, D).reshape(1, 1, -1, D)
        for tensor in (x, keep, order):  # one compilation for all lengths and batches
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
        parts = compiled(x, keep, config, name, order)
        return tuple(part.view(B, Hk, -1, *part.shape[3:]) for part in parts)

    return quantizer


def warm_quantizer(caches):
    """Compiles the quantizer of these caches now, not in the middle of the first prompt."""
    packed = [cache for cache in caches if isinstance(cache, KiviCache)]
    for cache in {cache.config: cache for cache in packed}.values():
        n = min(cache.max_len, 4 * cache.config.group_size + 1)  # two stacks, to be dynamic
        nothing = torch.zeros_like(cache.k_window[:1, :, :1]).expand(-1, -1, n, -1)
        cache.fill(nothing, nothing, cache.pos[:1], torch.ones_like(cache.pos[:1]))
