"""What the tests of quantize.py and kivi.py compare with: written from the paper, not the code.

A quantizer on Python floats with the bound of its error, what one row of a cache shows at length T,
attention in float64, the bytes of a cache counted from its shapes, and hostile numbers.
"""
import math
import struct

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
HALF_EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# ---- the quantizer, number by number ------------------------------------------------------------

def to_float32(x):
    """A Python float rounded to float32, half to even.

    One operation on float32 numbers, in float64 and then rounded so, is as if in float32 at once:
    53 bits are at least 2 * 24 + 2.
    """
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def round_to(dtype, x):
    """A float32 number rounded to `dtype`, half to even, by its bits."""
    if dtype == torch.float32 or not math.isfinite(x):
        return x
    if dtype == torch.float16:
        try:
            return struct.unpack("<e", struct.pack("<e", x))[0]
        except OverflowError:
            return math.copysign(math.inf, x)
    word = struct.unpack("<I", struct.pack("<f", x))[0]
    word = word + 0x7FFF + (word >> 16 & 1) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", word))[0]


def scalar_quantize(values, bits, dtype):
    """One group: (codes, scale, zero). The paper's formula, in float32 against the stored scale."""
    top = 2**bits - 1
    low = min(values)
    high = max(values)
    scale = 1.0
    if high != low:
        exact = to_float32(to_float32(high - low) / top)
        scale = round_to(dtype, exact) or SMALLEST[dtype]
    codes = []
    for x in values:
        steps = to_float32(to_float32(x - low) / scale)
        codes.append(round(min(max(steps, 0.0), top)))  # Python rounds half to even
    return codes, scale, low


def scalar_dequantize(codes, scale, zero, dtype):
    """x_hat of one group, clamped: a scale that was rounded up may carry the top code past max."""
    limit = torch.finfo(dtype).max
    exact = (to_float32(to_float32(code * scale) + zero) for code in codes)
    return [min(max(round_to(dtype, x), -limit), limit) for x in exact]


def error_bound(x, x_hat, scale, bits):
    """The bound of |x - x_hat|, derived, for every element, in float64.

    e = 2^-24 (float32), u and t: half an eps and the smallest subnormal of the dtype.
    scale   s = round(exact), exact = (max - min) / top: |s - exact| <= max(s (u + 2 e), t / 2). The
            clamp to t acts only where exact < t / 2, and there (x - zero) / t is an integer
    code    where (x - zero) / s <= top, rounding loses s / 2 (and 2 e top s: the difference and the
            quotient are float32); beyond, the clamp loses x - zero - top s <= top (exact - s)
    x_hat   product and sum round to float32 (top s e, |x_hat| e), then to the dtype: u |x_hat|
    The zero costs nothing: it is an element of the group.
    """
    top = 2**bits - 1
    e = 2.0**-24
    u = HALF_EPS[x.dtype]
    t = SMALLEST[x.dtype]
    s = scale.double()
    rounded = s / 2 + 2 * e * top * s
    clamped = top * (s * (u + 2 * e)).clamp_min(t / 2)
    of_code = torch.maximum(rounded, clamped)
    return (of_code + top * s * e + (u + e) * x_hat.double().abs() + t / 2) * (1 + 2.0**-20)


def drift_bound(x_hat, scale, bits):
    """How far x_hat may move when it is quantized once more: (bound, bool: no code may change).

    x_hat = zero + c s + d, |d| <= u M, M the largest |x_hat|. Codes 0 and top both occur, so the
    new range is top s + d', and the new scale is off by at most twice d' / top. Where s / 2 > 3 u M
    the codes stay, and x_hat moves by 4 u M; where s is smaller it moves by half a step, which is
    less then. float32 rounds product, sum and range as well: 13 u M in all. A subnormal scale is
    off by t / 2, top times. Where top u > 1/2 (8 bits, bfloat16) the top code may be missing: then
    the new scale is smaller by up to 1 / 255, which is a step at the top.
    """
    dtype = x_hat.dtype
    top = 2**bits - 1
    u = HALF_EPS[dtype]
    largest = x_hat.double().abs().amax(-1, keepdim=True)
    moves = (16 if dtype == torch.float32 else 4.01) * u * largest
    s = scale.double()
    top_may_miss = top * u > 0.49
    stays = (s > 2.1 * moves) & (s >= torch.finfo(dtype).smallest_normal) & (not top_may_miss)
    return moves + top * SMALLEST[dtype] + (s if top_may_miss else 0), stays.expand_as(x_hat)


# ---- what a cache shows -------------------------------------------------------------------------

def fake_quantized(x, bits, counts=None):
    """x [.., G], every row one group, quantized and dequantized in float32.

    counts  bool [G]: the elements that count for minimum and maximum (None: all)
    """
    y = x.float()
    low, high = ends(y, counts)
    scale = ((high - low) / (2**bits - 1)).to(x.dtype).float()
    scale[scale == 0] = SMALLEST[x.dtype]
    scale[high == low] = 1.0
    return ((y - low) / scale).clamp(0, 2**bits - 1).round() * scale + low


def ends(y, counts=None):
    """Minimum and maximum [.., 1] of the elements of y [.., G] that count."""
    if counts is None:
        counts = torch.ones(y.shape[-1], dtype=torch.bool)
    low = y.masked_fill(~counts, math.inf).amin(-1, keepdim=True)
    high = y.masked_fill(~counts, -math.inf).amax(-1, keepdim=True)
    return low, high


def boosted_channels(boost, head_dim):
    """How many key channels of a head have twice the bits: `boost` itself, or a share of them."""
    return boost if boost >= 1 else math.floor(boost * head_dim / 8) * 8


def loudest_first(k, group_size, residual, sink):
    """The channels of every KV head [Hk][D] by their widest group: k [Hk, T, D], T at least R.

    Only the first R tokens count, and no sink of them: a group of sinks alone has no range.
    """
    widths = torch.zeros(len(k), k.shape[2])
    for start in range(0, residual, group_size):
        token = torch.arange(start, start + group_size)
        if (token >= sink).any():
            low, high = ends(k[:, token].mT.float(), token >= sink)
            widths = torch.maximum(widths, (high - low)[..., 0])
    # Python sorts stably: of equal widths the lower channel stays first.
    return [sorted(range(len(head)), key=lambda channel: -head[channel])
            for head in widths.tolist()]


def expected_reads(k, v, k_bits=2, v_bits=2, group_size=32, residual=128, sink=0, boost=0,
                   v_group_size=0, sliding=None):
    """What the attention of the last step over ONE row reads: k, v [Hk, T, D] -> float32, the same.

    Keys from (T - 1) // R * R on are exact (a step quantizes after its attention), values of the
    last R + 1 tokens, and both of the first S tokens. The rest went through the quantizer once, the
    loudest channels of K in twice the bits.
    """
    n_tokens, n_channels = k.shape[1:]
    k_out = k.to(torch.float32, copy=True)
    v_out = v.to(torch.float32, copy=True)
    token = torch.arange(n_tokens)
    end = (n_tokens - 1) // residual * residual
    n = boosted_channels(boost, n_channels)
    loud = torch.zeros(len(k), 1, n_channels, dtype=torch.bool)
    if n and end:
        for head, order in enumerate(loudest_first(k, group_size, residual, sink)):
            loud[head, 0, order[:n]] = True
    for start in range(0, end, group_size):
        group = slice(start, start + group_size)
        counts = token[group] >= sink
        if counts.any():  # one scale a channel: tokens come last
            read = fake_quantized(k[:, group].mT, k_bits, counts).mT
            if n:
                fine = fake_quantized(k[:, group].mT, 2 * k_bits, counts).mT
                read = torch.where(loud, fine, read)
            k_out[:, group][:, counts] = read[:, counts]
    old = (token < n_tokens - residual - 1) & (token >= sink)
    width = math.gcd(v_group_size, n_channels) if v_group_size else group_size
    for start in range(0, n_channels, width):
        group = slice(start, start + width)
        v_out[:, old, group] = fake_quantized(v[:, old, group], v_bits)
    return k_out, v_out


def attention64(q, k, v, sliding=None):
    """Attention of one row in float64: q [H, D], k, v [Hk, T, D] -> [H, D].

    Query head h reads KV head h // (H / Hk); sliding: only that many of the newest tokens.
    """
    n_heads, head_dim = q.shape
    first = 0 if sliding is None else max(0, k.shape[1] - sliding)
    out = []
    for h in range(n_heads):
        keys, values = (x[h * len(k) // n_heads, first:].double() for x in (k, v))
        weights = torch.softmax(keys @ q[h].double() / math.sqrt(head_dim), 0)
        out.append(weights @ values)
    return torch.stack(out)


def rel(a, b):
    """Relative L2 distance of a from the reference b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- bytes --------------------------------------------------------------------------------------

def kivi_bytes(batch, n_kv_heads, max_len, head_dim, dtype, block, k_bits=2, v_bits=2,
               group_size=32, residual=128, sink=0, boost=0, v_group_size=0, sliding=None):
    """Bytes of a KiviCache by part. `block`: tokens that its attention reads at a time.

    There is room for the codes of whole residuals, and of whole bytes at 2 bits: 4 groups. Behind
    every KV head lie 128 spare bytes, and behind the last row, once, the rest of its last block.
    """
    unit = math.lcm(residual, 4 * group_size)
    tokens = math.ceil(max(residual, max_len // residual * residual) / unit) * unit
    rest = math.ceil(tokens / block) * block - tokens
    n_heads = batch * n_kv_heads
    n_tokens = n_heads * tokens + rest
    columns = head_dim + boosted_channels(boost, head_dim)
    value_group = math.gcd(v_group_size, head_dim) if v_group_size else group_size
    scales = n_tokens // group_size * head_dim + n_tokens * (head_dim // value_group)
    exact_slots = n_heads * (sink + residual + 1)
    number = 4 if dtype == torch.float32 else 2
    order = 2 * head_dim if boost else 0
    return {
        "codes": n_tokens * (columns * k_bits + head_dim * v_bits) // 8 + 2 * n_heads * 128,
        "metadata": 2 * scales * number + 4 * n_heads * 128,
        "window": 2 * (exact_slots * head_dim * dtype.itemsize + n_heads * 128),
        "positions": 8 * (2 * batch + math.ceil(max_len / block) * block) + n_heads * (order + 128),
    }


def full_bytes(batch, n_kv_heads, max_len, head_dim, dtype):
    """Bytes of a FullCache by part: whole blocks of 128 tokens, and 128 spare bytes a KV head."""
    tokens = math.ceil(max_len / 128) * 128
    window = 2 * batch * n_kv_heads * (tokens * head_dim * dtype.itemsize + 128)
    return {"codes": 0, "metadata": 0, "window": window, "positions": 8 * (2 * batch + tokens)}


# ---- numbers ------------------------------------------------------------------------------------

def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keys_like(*shape, seed=0, dtype=torch.float32):
    """Random K with a few large channels, as real keys have: they show a scale of a wrong axis."""
    loud = 1 + 9 * (torch.arange(shape[-1]) % 7 == 3)
    return (randn(*shape, seed=seed) * loud + 0.5 * loud).to(dtype)


KINDS = ("normal", "constant", "outlier", "offset", "large", "edge", "denormal", "levels", "two",
         "zeros")


def hostile_groups(kind, n, size, dtype, seed):
    """n groups of numbers that break quantizers: [n, size] in dtype."""
    info = torch.finfo(dtype)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=g)
    signs = torch.randint(0, 2, (n, size), generator=g) * 2 - 1
    steps = torch.randint(0, 4, (n, size), generator=g).double()
    if kind == "constant":
        x = x[:, :1].expand(n, size) * 10.0 ** (seed % 9 - 4)
    elif kind == "outlier":
        x[torch.arange(n), torch.randint(size, (n,), generator=g)] *= 1000
    elif kind == "offset":  # a range far below the rounding of the offset
        x = x + 300
    elif kind == "large":
        x = x * (info.max / 32)
    elif kind == "edge":  # the last numbers before overflow, of both signs or of one
        x = info.max * (1 - steps * info.eps) * (signs if seed % 2 else (signs + 1) / 2)
    elif kind == "denormal":
        whole = torch.randint(-9, 10, (n, size), generator=g).double()
        x = whole * SMALLEST[dtype] * 3 ** (seed % 6)
    elif kind == "levels":
        x = steps * 0.25 - 1
    elif kind == "two":
        x = (signs + 1) / 2 * x[:, :1] + 1
    elif kind == "zeros":  # of both signs
        x = torch.zeros(n, size) * signs
    return x.to(dtype)
