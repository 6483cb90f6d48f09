"""Caches that exist only as numbers: the paper's variants, and other recipes.

Everything is quantized and dequantized at once, and a mask says which query reads the result and
which the exact number. The state of a cache depends on its length alone, so this is what decoding
step by step would read; a test compares the two.
"""
import math
from dataclasses import dataclass
from itertools import product

import torch

from quantize import KVConfig, channel_order, group_codes


@dataclass(frozen=True)
class Fake(KVConfig):
    """A simulated cache.

    axes      "channel" (groups of consecutive tokens of one channel) or "token" (groups of
              channels of one token)
    residual  R. Values per token: the last R are exact. Keys, and values per channel: the tokens
              after the last multiple of R; at 0 those whose group is not complete
    boost     for keys per channel only, and not without a residual: its tokens choose the channels
    """

    k_axis: str = "channel"
    v_axis: str = "token"

    def exact(self, pos, first, by_blocks):
        """[n, T] bool: does the query at pos [n] read token t < T exactly?

        first  [n]: from this token on; by_blocks: from the last block that is not complete
        """
        if by_blocks:
            block = max(self.residual, self.group_size)
            first = pos // block * block
        t = torch.arange(int(pos[-1]) + 1, device=pos.device)
        return (t >= first[:, None]) | (t < self.sink)

    def quantized(self, x, bits, axis, group_size, n_boosted=0):
        """x [B, Hk, T, D] as it comes back from `bits` bits, in float32."""
        T, G = x.shape[2], group_size
        if axis == "token":
            return rounded(x.unflatten(-1, (-1, G)), bits, -1).flatten(-2)
        t = torch.arange(math.ceil(T / G) * G, device=x.device)
        # A sink stays out of its group: the group's first token that is none stands in for it.
        t = torch.maximum(t, (t | G - 1).clamp(max=self.sink))
        # So does the last token for those that are not there yet.
        t = t.clamp(max=T - 1)
        groups = x[:, :, t].unflatten(2, (-1, G))  # [B, Hk, T / G, G, D]
        out = rounded(groups, bits, 3)
        if n_boosted:
            boosted = channel_order(groups[:, :, : self.residual // G])[..., :n_boosted]
            boosted = boosted[:, :, None, None].expand(*groups.shape[:4], -1)
            out.scatter_(4, boosted, rounded(groups.gather(4, boosted), 2 * bits, 3))
        return out.flatten(2, 3)[:, :, :T]

    def attention(self, q, k, v, pos):
        """q [B, H, n, D] at pos [n]; k, v [B, Hk, T, D], exact -> [B, H, n, D], in float32."""
        D = q.shape[-1]
        k_read = self.quantized(k, self.k_bits, self.k_axis, self.group_size, self.boosted(D))
        v_read = self.quantized(v, self.v_bits, self.v_axis, self.value_group(D))
        # Keys per token fill a window as those per channel do; without one, none is exact.
        exact_k = self.exact(pos, pos + 1, self.k_axis == "channel" or self.residual)
        exact_v = self.exact(pos, pos - self.residual, self.v_axis == "channel")
        q = q.unflatten(1, (k.shape[1], -1)).float()  # [B, Hk, M, n, D]
        k, v, k_read, v_read = (x[:, :, None].float() for x in (k, v, k_read, v_read))
        scores = torch.where(exact_k, q @ k.mT, q @ k_read.mT)  # [B, Hk, M, n, T]
        scores = scores / D**0.5
        unseen = torch.arange(k.shape[3], device=q.device) > pos[:, None]
        p = scores.masked_fill(unseen, -math.inf).softmax(-1)
        out = p * exact_v @ v + p * ~exact_v @ v_read
        return out.flatten(1, 2)


def rounded(groups, bits, dim):
    """Groups along `dim` as they come back from `bits` bits, in float32."""
    codes, scale, zero = group_codes(groups, bits, dim)
    return codes * scale.float() + zero.float()


def simulate(model, fake, prompt_kv, tokens):
    """Logits [B, n, V] of teacher-forced tokens [B, n], all at once.

    prompt_kv  (k, v) [B, Hk, L, D] of every layer: the exact prompt before them
    """
    length = prompt_kv[0][0].shape[2]
    pos = torch.arange(length, length + tokens.shape[1], device=tokens.device)
    rope = model.rope(pos[None])
    x = model.embed(tokens)
    for layer, (k, v) in zip(model.layers, prompt_kv):
        q, new_k, new_v = layer.attention.qkv(layer.attention_norm(x), *rope)
        k = torch.cat([k, new_k], 2)
        v = torch.cat([v, new_v], 2)
        y = fake.attention(q, k, v, pos)
        x = layer.after(x, y.type_as(x))
    return model.head(model.norm(x))


def _study():
    fakes = {}
    for k, v in product(("channel", "token"), ("token", "channel")):
        name = f"K per {k}, V per {v}"
        fakes[f"{name}, R = 0"] = Fake(k_axis=k, v_axis=v, residual=0)
        fakes[f"{name}, R = 128"] = Fake(k_axis=k, v_axis=v)
        fakes[f"{name}, R = 0, 4 bits"] = Fake(4, 4, k_axis=k, v_axis=v, residual=0)
    for R in (32, 64, 128):
        fakes[f"2 bits, R = {R}"] = Fake(residual=R)
    for G in (64, 128):
        fakes[f"2 bits, G = {G}"] = Fake(group_size=G, v_group_size=G)
    for k, v in ((2, 4), (4, 2), (4, 4)):
        fakes[f"K {k} V {v} bits"] = Fake(k, v)
    for S in (1, 4, 32):
        fakes[f"sink {S}"] = Fake(sink=S)
    fakes["boost 1/4"] = Fake(boost=1 / 4)
    for part in (8, 4, 2):
        fakes[f"sink 4, boost 1/{part}"] = Fake(sink=4, boost=1 / part)
    for G, part in ((32, 4), (64, 4), (64, 2)):
        name = f"sink 4, boost 1/{part}, G = {G}, 64 for V"
        fakes[name] = Fake(sink=4, boost=1 / part, group_size=G, v_group_size=64)
    return fakes


STUDY = _study()  # name -> Fake: the paper's findings in small, then recipes beyond it
