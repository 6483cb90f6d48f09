"""kivi.py and quantize.py in an attention module of your own, without any model.

    python examples/attention_only.py            the two files, in plain PyTorch
    python examples/attention_only.py --fused    and fused/attention.py: compiled, which takes long

Copy the files of your choice into your project; they import torch and each other.
"""
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside the copies
from kivi import KiviCache  # noqa: E402


class Attention(nn.Module):
    """attend(cache, q) reads the cache: the plain method, or what `compiled_attention` returns."""

    def __init__(self, dim, heads, kv_heads, attend=KiviCache.attend):
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, sum(self.heads) * self.head_dim, bias=False)
        self.attend = attend

    def forward(self, x, cache=None):
        """x [B, T, dim] -> [B, T, dim]. A prompt attends exactly; one token reads the cache."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = qkv.split(self.heads, 1)  # [B, H or Hk, T, D]
        if cache is not None and x.shape[1] == 1:
            cache.append(k, v)
            out = self.attend(cache, q)
        else:
            if cache is not None:
                cache.prefill(k, v)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(-2)


@torch.no_grad()
def main(attend=KiviCache.attend, tokens=1024, prompt=1000):
    torch.manual_seed(0)
    layer = Attention(dim=1024, heads=8, kv_heads=2, attend=attend)
    x = torch.randn(2, tokens, 1024)
    exact = layer(x)[:, prompt:]
    full = 2 * 2 * tokens * 2 * 128 * x.itemsize  # K and V, rows, tokens, KV heads, head_dim
    for bits in (8, 4, 2):
        cache = KiviCache(2, 2, tokens, head_dim=128, k_bits=bits, v_bits=bits)
        layer(x[:, :prompt], cache)
        out = torch.cat([layer(x[:, t : t + 1], cache) for t in range(prompt, tokens)], 1)
        error = (out - exact).norm() / exact.norm()
        print(f"{bits} bits: relative error {error:.4f}, "
              f"{cache.nbytes:,} bytes instead of {full:,}")


if __name__ == "__main__":
    if "--fused" in sys.argv:
        from fused.attention import compiled_attention

        main(compiled_attention("cpu"))
    else:
        main()
