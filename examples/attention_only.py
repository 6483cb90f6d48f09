"""kivi.py and quantize.py in an attention module of your own, without any model: python examples/attention_only.py"""
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # or copy both files beside this one
from kivi import KiviCache  # noqa: E402


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, n * (dim // heads), bias=False) for n in (heads, kv_heads, kv_heads))
        self.head_dim = dim // heads

    def forward(self, x, cache=None):
        """x [B, T, dim] -> [B, T, dim]. Many tokens are a prompt, attended to exactly; one token reads the cache."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, H or Hk, T, D]
        if cache is not None and x.shape[1] == 1:
            cache.append(k, v)
            return cache.attend(q).transpose(1, 2).flatten(-2)  # plain PyTorch; fused: kivi.compiled_attention, see README.md
        if cache is not None:
            cache.prefill(k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(-2)


@torch.no_grad()
def main(tokens=1024, prompt=1000):
    torch.manual_seed(0)
    layer, x = Attention(dim=1024, heads=8, kv_heads=2), torch.randn(2, tokens, 1024)
    exact = layer(x)[:, prompt:]
    for bits in (8, 4, 2):
        cache = KiviCache(batch=2, n_kv_heads=2, max_len=tokens, head_dim=128, k_bits=bits, v_bits=bits)
        layer(x[:, :prompt], cache)
        out = torch.cat([layer(x[:, t : t + 1], cache) for t in range(prompt, tokens)], 1)
        full = 2 * 2 * tokens * 2 * 128 * x.itemsize  # K and V, rows, tokens, KV heads, head_dim
        print(f"{bits} bits: relative error {(out - exact).norm() / exact.norm():.4f}, {cache.nbytes:,} bytes instead of {full:,}")


if __name__ == "__main__":
    main()
