"""Linear layers whose weights are codes of 8 or 4 bits.

Weights go through the quantizer of the cache (quantize.py), in groups along the inputs of an
output. Compiled, one row is one sum over the packed words, and on CUDA a few rows are products on
the tensor cores (see fused/linear_launches.py): neither writes a weight out. More rows, and all
that is not compiled, write them out for the library's product.
"""
import torch
from torch import nn

from fused.attention import stored
from quantize import dequantize, quantize

# Weights that are handled at once. Without, a large layer written out is the peak of the memory.
CHUNK = 2**24
CLIPS = tuple(i / 40 for i in range(7))  # shares of a group's range, see `quantize_weight`
# Sums, fields of a word times rows, that a kernel of `_dots` keeps for an output: more of them do
# not fit the registers.
ACCUMULATORS = 256
SPLIT = 16384  # most partial sums, outputs times parts, that `_dots` cuts a product into
# Most rows that `_dots` takes: for more, the library's products pay for writing weights out.
DOTS = 128


def weight_format(text):
    """(bits, group size) of "int8" (a group is a whole row), "int4" (groups of 32) or "int4:G".

    raises ValueError: another text, or G other than 32, 64 and 128
    """
    formats = {"int8": (8, None), "int4": (4, 32)}
    formats |= {f"int4:{G}": (4, G) for G in (32, 64, 128)}
    if text not in formats:
        raise ValueError(f"weights must be one of {', '.join(formats)}, got {text!r}")
    return formats[text]


def _group_size(inputs, bits, group_size):
    """The group size, where None is all inputs. raises ValueError: it does not fit them"""
    G = group_size or inputs
    if inputs % G or G * bits % 32:
        raise ValueError(f"int{bits} weights in groups of {G} do not fit {inputs} inputs: "
                         "use int8 or full precision")
    return G


def quantize_weight(weight, bits, group_size=None):
    """The tensors `packed` and `meta` of a QuantizedLinear from its weight [outputs, inputs].

    group_size  None: a row is one group
    raises      ValueError: groups that do not fit the inputs, NaN or inf
    """
    inputs = weight.shape[1]
    G = _group_size(inputs, bits, group_size)
    packed = []
    meta = []
    for rows in weight.split(max(1, CHUNK // 8 // inputs)):
        codes, scale, zero = _best_codes(rows.unflatten(-1, (-1, G)), bits)
        packed.append(_pack_words(codes, bits))
        meta.append(torch.cat((scale, zero), -1))
    return torch.cat(packed), torch.cat(meta)


def _best_codes(groups, bits):
    """codes [outputs, n_groups, G]; scale, zero [outputs, n_groups, 1] of groups, shaped as codes.

    4 bits: each group is clipped by one of CLIPS at both ends, where that makes its squared error
    least. Without, int4 raises the embedded checkpoint's perplexity by 3.4 % instead of 3.0.
    """
    G = groups.shape[-1]
    low = groups.amin(-1, keepdim=True)
    high = groups.amax(-1, keepdim=True)
    best = None
    clips = CLIPS if bits == 4 else (0,)
    for clip in clips:
        cut = (high - low) * clip
        new = quantize(groups.clamp(low + cut, high - cut), bits, G)
        error = (dequantize(*new) - groups).float().square().sum(-1, keepdim=True)
        if best is None:
            best = new
            best_error = error
            continue
        better = error < best_error
        best = [torch.where(better, a, b) for a, b in zip(new, best)]
        best_error = torch.where(better, error, best_error)
    return best


def _pack_words(codes, bits):
    """codes [outputs, n_groups, G] -> int32 [outputs, words], see QuantizedLinear."""
    n_fields = 32 // bits
    fields = codes.unflatten(-1, (n_fields, -1)).int()  # [outputs, n_groups, fields, words]
    words = sum(fields[:, :, i] << i * bits for i in range(n_fields))
    return words.mT.flatten(1)


def few(x):
    """Does a compiled layer on CUDA read packed words for x [rows, ..]? Else it writes them out."""
    return len(x) == 1 or len(x) <= DOTS and x.dtype == torch.bfloat16


def tile_rows(n):
    """Rows that a tile of a kernel of products has for n rows of x: a power of two."""
    return max(8, 1 << (n - 1).bit_length())


class QuantizedLinear(nn.Module):
    """A linear layer whose weights [outputs, inputs] are codes in groups of G consecutive inputs.

    packed  int32 [outputs, inputs * bits / 32]: the first word of every group, then the second of
            every group, and so on. Word j of a group of n words holds its codes j, n + j,
            2 n + j, .. from the low bits up, the fields of the word. So neighbouring words take
            neighbouring inputs (8 bits, one group) or neighbouring scales (4 bits), and all of
            them load as vectors
    meta    [outputs, inputs / G, 2] in the model's dtype: scale and zero of every group, side by
            side, so that one load brings both
    raises  ValueError: groups (group_size None: of all inputs) that do not divide the inputs or
            do not fill whole words
    """

    def __init__(self, inputs, outputs, bits, group_size=None, bias=False):
        super().__init__()
        G = _group_size(inputs, bits, group_size)
        self.bits = bits
        self.mask = 2**bits - 1
        self.n_fields = 32 // bits  # codes in a word
        self.n_words = G * bits // 32  # of a group
        self.n_groups = inputs // G
        packed = torch.empty(outputs, self.n_groups * self.n_words, dtype=torch.int32)
        self.register_buffer("packed", packed)
        self.register_buffer("meta", torch.empty(outputs, self.n_groups, 2))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        """x [.., inputs] -> [.., outputs]"""
        rows = x.flatten(0, -2)
        if not torch.compiler.is_compiling():
            y = self._in_parts(rows)
        elif len(rows) == 1:
            y = self._sum(rows, x.is_cuda)
        elif x.is_cuda and few(rows):
            y = self._dots(rows)
        else:
            y = rows @ self.dequantized().mT
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def _in_parts(self, x):
        """The product with the weights written out, CHUNK of them at a time."""
        y = x.new_empty(len(x), len(self.packed))
        step = max(1, CHUNK // x.shape[-1])
        for first in range(0, len(self.packed), step):
            last = first + step
            y[:, first:last] = x @ self.dequantized(first, last).type_as(x).mT
        return y

    def dequantized(self, first=0, last=None):
        """The weights of outputs first .. last - 1 [last - first, inputs], rounded once."""
        meta = self.meta[first:last, :, None]  # [outputs, n_groups, 1, 2]
        packed = self.packed[first:last]
        words = packed.unflatten(1, (-1, self.n_groups)).mT  # [outputs, n_groups, words]
        fields = []
        for place in range(0, 32, self.bits):
            codes = words >> place & self.mask
            fields.append(codes.to(meta.dtype))
        codes = torch.stack(fields, 2).flatten(2)  # [outputs, n_groups, G]
        return torch.addcmul(meta[..., 1], codes, meta[..., 0]).flatten(1)

    def _sum(self, x, raw):
        """The product for x [1, inputs]: per group, scale * sum(codes * x) + zero * sum(x).

        A code is masked at its place in the word, bit p: it reads as code * 2^p, and x is divided
        by 2^p beforehand.
        raw  (CUDA) the masked bits are not even converted. Seen as a float32 they are
             code * 2^(p - 149), a denormal or its continuation by the first binade, exact up to
             bit 24, and one shift brings the fields beyond down: 2.1 instructions a code instead
             of 4 to 5. Then x is scaled up by 2^88: products neither underflow nor overflow for
             inputs from 2^-65 to 2^39
        """
        n_steps = _words_together(self.n_groups, self.n_words)
        up, unit = (88, -149) if raw else (0, 0)  # exponents of the scaled x and of a raw bit
        down = 24 - self.bits % 8  # shift of the fields beyond bit 24
        places = torch.arange(0, 32, self.bits, dtype=torch.int32, device=x.device)
        places = torch.where(places < 24, places, places - down)
        x = x.float().view(self.n_groups, self.n_fields, self.n_words)
        power = (127 + up - places << 23).view(torch.float32)  # by its bits, 2^(up - place)
        x = x * power[:, None]
        x = x.permute(1, 2, 0).reshape(self.n_fields, n_steps, -1)  # in the order of the words
        x = stored(x.contiguous())  # without, it is computed again for every output
        words = self.packed.view(-1, n_steps, x.shape[-1])
        product = 0
        total = 0
        for step in range(n_steps):
            for field, place in enumerate(range(0, 32, self.bits)):
                word = words[:, step]
                if place >= 24:
                    word = word >> down
                    place = place - down
                code = word & (self.mask << place)
                code = code.view(torch.float32) if raw else code.float()
                product = product + code * x[field, step]
                # Once for all outputs of a thread, not for each.
                total = total + x[field, step] * 2.0 ** (place + unit)
        pairs = self._meta(self.n_words // n_steps, raw)
        scale, zero = (part.float() for part in pairs)
        y = product * scale + total * zero  # [outputs, words of a step]
        width = y.shape[-1]
        if raw and len(y) <= 8192 and width in range(512, 1025, 128):
            # Parts of 128, added up by what reads the result. Without, few outputs with long sums
            # leave the GPU too little work at a time.
            parts = y.unflatten(-1, (width // 128, -1)).transpose(0, 1)
            y = stored(parts.sum(-1)).sum(0)
        else:
            y = y.sum(-1)
        return (y * 2.0 ** (-up - unit))[None].to(self.meta.dtype)

    def _dots(self, x):
        """The product for a few rows x [rows, inputs] in bfloat16: one kernel, float32 sums.

        The masked bits, narrowed to 16, are numbers without a conversion as in `_sum`:
        code * 2^(p - 133) as a bfloat16, up to bit 8. From there one fused multiplication and
        addition makes two weights of two codes, 2^-33 times as large, each rounded once.
        """
        n_rows = len(x)
        outputs, n_words = self.packed.shape
        up, unit = 100, -133  # exponents of the scaled weights and of a raw bit
        # Parts of the fields, each of which reads all words, and parts of the words.
        field_parts = max(1, self.n_fields * tile_rows(n_rows) // ACCUMULATORS)
        word_parts = _parts_of_words(outputs, field_parts, n_words)
        x = stored(x.view(n_rows, self.n_groups, -1).mT.contiguous())  # in the order of the words
        x = x.view(n_rows, field_parts, self.n_fields // field_parts, word_parts, -1)
        step = 32 // field_parts
        first_bit = torch.arange(0, 32, step, dtype=torch.int32, device=x.device)
        words = self.packed >> first_bit[:, None, None]  # [field_parts, outputs, words]
        scale, zero = self._meta(self.n_words, True)
        zero = _rounded(zero * 2.0 ** (up + unit))
        y = 0
        for field, place in enumerate(range(0, step, self.bits)):
            byte = (words >> place // 8 * 8).to(torch.int16)
            place = place % 8
            codes = (byte & (self.mask << place)).view(torch.bfloat16)
            step_size = _rounded(scale * 2.0 ** (up - place))
            weights = _rounded(codes * step_size) + zero
            weights = weights.view(field_parts, outputs, word_parts, -1)
            weights = weights.transpose(1, 2).flatten(0, 1)  # [parts, outputs, words]
            inputs = x[:, :, field].permute(1, 2, 3, 0)
            inputs = inputs.flatten(0, 1)  # [parts, words, rows]
            y = y + (weights @ inputs).float()
        # Stored by the kernel of the products: without, it is added up outside, in their own type.
        y = stored(y * 2.0 ** (-up - unit)).sum(0).mT
        # Rows again: without, its readers would wait for single numbers of columns.
        return stored(y.to(torch.bfloat16).contiguous())

    def _meta(self, repeat, raw):
        """scale, zero for every word [outputs, repeat * n_groups]: the groups over and over.

        raw  one word brings both. Apart they are 2 bytes each: a thread would take 8 of them but
             4 words, and the way from one layout to the other costs 3 instructions a code
        """
        if raw and self.meta.element_size() == 2:
            both = self.meta.view(torch.int32)[..., 0]
            halves = (both, both >> 16)
            parts = [half.to(torch.int16).view(self.meta.dtype) for half in halves]
        else:
            parts = self.meta.unbind(-1)
        return [
            part[:, None].expand(-1, repeat, -1).flatten(1)
            for part in parts
        ]


def _words_together(n_groups, n_words):
    """How many words of a group one step of `_sum` takes together.

    As many as leave rows of 128, 4 words for each thread of a warp, or else of 8 (11008 inputs).
    """
    for width in (128, 8):
        for n_steps in (4, 2):
            row = n_groups * n_words // n_steps
            if n_words % n_steps == 0 and row % width == 0:
                return n_steps
    return 1


def _parts_of_words(outputs, field_parts, n_words):
    """Parts that `_dots` cuts its words into, where the outputs alone are too few blocks.

    Not 8 parts and more: Inductor would add them up in a kernel of its own, and not where the
    result is turned.
    """
    for parts in (4, 2):
        fits = outputs * parts * field_parts <= SPLIT and parts * field_parts < 8
        if fits and n_words % (64 * parts) == 0:
            return parts
    return 1


def _rounded(x):
    """x, really rounded to bfloat16: by its bits and back.

    Without, the kernel goes on in float32, with 1.6 times the instructions.
    """
    return x.view(torch.int16).view(torch.bfloat16)
