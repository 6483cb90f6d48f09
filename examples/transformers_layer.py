"""One layer of the cache of transformers_cache.py: a KiviCache that follows a mask.

A forward call brings one token a row (a step), a few (drafts of an assistant, a short turn) or many
(a part of a prompt). Steps and drafts are read as the paper has it; the tokens of a prompt read one
another exactly. What tokens replaced in the window is kept until the next call, so that `crop` can
put it back; codes beyond a length have no meaning.
"""
import sys
from functools import lru_cache
from pathlib import Path

import torch
from transformers.cache_utils import DynamicLayer

# Not needed beside copies of what is imported here.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from decoding.decoder import bucket, side_stream  # noqa: E402
from fused.attention import compiled_attention  # noqa: E402
from fused.drafts import drafted, leaving  # noqa: E402
from fused.step import EXACT  # noqa: E402
from kivi import KiviCache  # noqa: E402
from quantize import take  # noqa: E402

# So many tokens of a forward call, and no more, are read as by as many steps (if the mask hides
# nothing but the padding of prompts), and can be taken back. An assistant drafts fewer; what they
# replace is kept in full precision.
DRAFTS = 64


def store(cache, k, v, pos, replaced):
    """Puts token pos [B] into the cache, k, v [B, Hk, 1, D], and what it replaces in the window
    into `replaced`, two tensors like k."""
    slot = cache.slot(pos)
    for old, window in zip(replaced, (cache.k_window, cache.v_window)):
        old.copy_(window[cache.rows, :, slot][:, :, None])
    cache.write(k, v, pos[:, None])
    cache.quantize_value(pos[:, None])


@lru_cache
def compiled_parts(device_type):
    """`store` and the attention of one token, compiled once for all layers of all caches."""
    return torch.compile(store, fullgraph=True, options=EXACT), compiled_attention(device_type)


class Call:
    """What the layers share of a forward call."""

    def __init__(self):
        self.pool = None  # memory of all CUDA graphs
        self.reset()

    def __getstate__(self):
        return vars(Call())  # a copy has its own memory of graphs, and no masks of a call

    def reset(self):
        self.waiting = False  # for `attention` to store what `update` has counted
        self.says = {}  # by id, a mask and what `examine` found there


class KiviLayer(DynamicLayer):
    """A KiviCache, and where its rows lie in the columns of the mask."""

    def __init__(self, config, max_len, options, compiled, call):
        super().__init__()
        self.config, self.max_len, self.options = config, max_len, options
        self.compiled, self.call = compiled, call
        self.reset()

    def reset(self):
        self.cache = None
        # CUDA graphs of a step, and its output there, by the tokens that attention reads and by
        # whether a key block is complete then; where they read q, k and v, [B, H + 2 Hk, 1, D].
        self.graphs, self.inputs = {}, None
        self.replaced = ()  # K and V of the window that the last tokens took the place of
        self.seen = 0  # tokens of a row, padding too: columns of the mask

    def __getstate__(self):  # graphs know the addresses of the cache that is copied
        return {**vars(self), "graphs": {}, "inputs": None}

    def update(self, key, value, *args, **kwargs):
        implementation = self.config._attn_implementation
        if implementation != "kivi":
            raise ValueError(f"the model's attention is {implementation}, not kivi: "
                             "call model.set_attn_implementation('kivi')")
        self.seen += key.shape[2]
        key.layer = self  # `attention`, which gets the key next, finds the cache here
        return key, value

    @torch.inference_mode(False)
    def open(self, key):
        """Makes the cache for rows like those of key [B, Hk, L, D]."""
        B, Hk, _, D = key.shape
        self.cache = KiviCache(B, Hk, self.max_len, D,
                               dtype=key.dtype, device=key.device, **self.options)
        self.one = [torch.zeros_like(self.cache.k_window[:, :, :1]) for _ in "kv"]
        # The column of a row's first token.
        self.first = torch.zeros(B, 1, dtype=torch.int64, device=key.device)
        self.padded = False

    def look(self, mask, key):
        """What `examine` says, asked once a call: the answer waits for the device."""
        B, L, call = self.cache.batch, key.shape[2], self.call
        if mask is None and not self.padded:
            return [L] * B, True
        if id(mask) not in call.says:
            self.cache.check(L, k=key)  # other rows than the cache's could not be compared
            call.says[id(mask)] = mask, self.examine(mask, L)
        says = call.says[id(mask)][1]
        lengths = says[0]
        if min(lengths) < L:
            self.first = self.first + L - torch.tensor(lengths, device=self.first.device)[:, None]
            self.padded = True
        return says

    def examine(self, mask, L):
        """mask [B or 1, 1, L, seen]: (tokens of each row to store, the others being padding to the
        left; does a token see all before it, and no padding?)"""
        n = self.seen
        if mask is None:
            mask = self.first.new_ones(1, 1, L, n, dtype=torch.bool)
        mask = mask[:, 0].expand(self.cache.batch, L, n)
        t = torch.arange(n, device=mask.device)
        own = t[n - L:]
        real = mask[:, :, n - L:].diagonal(dim1=1, dim2=2)  # only padding does not see itself
        lengths = real.sum(1)
        first = self.first + L - lengths[:, None]
        causal = torch.equal(mask, (t <= own[:, None]) & (t >= first[:, :, None]))
        if n == L and not causal and not torch.equal(real, own >= first):
            raise ValueError("padding that is not to the left of a prompt: "
                             "set tokenizer.padding_side = 'left'")
        if n > L and not causal:
            # Padding among the new tokens, as behind a text that ended early, is kept, never read.
            lengths, padding = torch.full_like(lengths, L), (t < self.first)[:, None]
            if not real[:, -1].all() or (mask & (padding | (t > own[:, None]))).any():
                raise ValueError("attention_mask must cover all tokens so far, hide the prompt's "
                                 "padding and show the new tokens, but none to those before it")
        return lengths.tolist(), causal

    @torch.no_grad()
    def attend(self, q, k, v, mask, lengths, causal):
        """Stores the tokens k, v [B, Hk, L, D] and attends from q [B, H, L, D] -> [B, H, L, D].

        mask, lengths, causal  see `examine`
        """
        L = q.shape[2]
        if L == 1 and causal:
            return self.step(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            if causal and (L > DRAFTS or min(lengths) < L):
                return self.extend(q, k, v, lengths)
            cache, R, out = self.cache, self.cache.config.residual, []
            cache.check_new(1, None, k=k, v=v, q=q)
            self.keep(k, v, lengths)
            if not causal:
                return (self.masked if L > 1 else self.hidden)(q, k, v, mask[:, 0])
            while L:
                n = min(L, *(R - x % R for x in cache.lengths))  # not beyond the end of a key block
                out.append(self.drafts(*(x[:, :, -L:][:, :, :n] for x in (q, k, v))))
                L -= n
            return torch.cat(out, 2)

    def step(self, q, k, v):
        """One token a row, after which nothing but the padding is hidden."""
        cache, compiled = self.cache, self.compiled
        cache.check(1, k=k, v=v, q=q)
        if not q.is_cuda:
            cache.check_finite(slice(None), k=k, v=v)
        cache.advance()
        self.replaced = self.one
        if compiled is None:
            compiled = q.is_cuda
        if compiled and q.is_cuda:
            return self.replay(q, k, v)
        parts = compiled_parts(q.device.type) if compiled else (store, KiviCache.attention)
        return self.run(parts, q, k, v, cache.length)

    def run(self, parts, q, k, v, length):
        cache, (store, attend) = self.cache, parts
        with torch.autocast(q.device.type, enabled=False):
            store(cache, k, v, cache.pos, self.one)
            out = attend(cache, q, cache.pos, cache.tokens(length))
            if cache.completes_key_block():
                cache.quantize_keys(cache.pos)
            cache.pos += 1
        return out

    def replay(self, q, k, v):
        """`run` as the replay of a CUDA graph, in which the host has next to nothing to do."""
        cache, graphs = self.cache, self.graphs
        length = bucket(cache.length, cache.block)
        kind = length, cache.completes_key_block()
        with torch.cuda.device(q.device):
            if kind not in graphs:
                graphs[kind] = self.capture(q, k, v, length)
            torch.cat([q, k, v], 1, out=self.inputs)  # one launch instead of three copies
            graph, out = graphs[kind]
            graph.replay()
        return out  # read before the layer's next step, which will write there

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, q, k, v, length):
        """A step in a graph, and where it puts its output. The cache afterwards is the one from
        before."""
        parts, device = compiled_parts("cuda"), q.device
        if self.inputs is None:
            self.inputs = torch.cat([q, k, v], 1)
        q, k, v = self.inputs.split([x.shape[1] for x in (q, k, v)], 1)
        main, stream = torch.cuda.current_stream(), side_stream(device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            self.run(parts, q, k, v, length)  # compiles
        main.wait_stream(stream)
        self.take_back(1)
        self.cache.advance()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: a streamer does.
        with torch.cuda.graph(graph, pool=self.call.pool, capture_error_mode="thread_local"):
            out = self.run(parts, q, k, v, length)
        self.call.pool = graph.pool()
        return graph, out

    def drafts(self, q, k, v):
        """A few tokens, read as by so many steps."""
        cache, n = self.cache, q.shape[2]
        t = cache.tokens(cache.length + n)
        out = drafted(cache, q, cache.pos, t, k, v, leaving(cache, cache.pos, n))
        self.fill(k, v)
        return out

    def hidden(self, q, k, v, mask):
        """One token a row under such a mask as in `masked`, but read as by a step."""
        cache = self.cache
        cache.append(k, v)
        pos, t = cache.pos - 1, cache.tokens(cache.length)
        return cache.attention(q, pos, t, self.of_tokens(mask, t) & (t <= pos[:, None])[:, None])

    def masked(self, q, k, v, mask):
        """Many tokens, where the mask [B or 1, L, seen] hides some: as `extend` reads them."""
        cache, t = self.cache, self.cache.tokens(self.cache.length)
        held = self.of_tokens(mask, t) & (t < cache.pos[:, None])[:, None]
        seen = torch.cat([held, mask.expand(len(held), -1, -1)[:, :, -q.shape[2]:]], 2)
        out = [cache.attention(part, cache.pos - 1, t, own, (k, v))  # parts bound the memory
               for part, own in zip(q.split(512, 2), seen.split(512, 1))]
        self.fill(k, v)
        return torch.cat(out, 2)

    def of_tokens(self, mask, t):
        """The columns of a mask [B or 1, L, seen] that are the cache's tokens t: [B, L, tokens]."""
        column = (t + self.first).clamp(max=self.seen - 1)[:, None]
        return mask.expand(len(column), -1, -1).gather(2, column.expand(-1, mask.shape[1], -1))

    def fill(self, k, v):
        cache, n = self.cache, k.shape[2]
        cache.fill(k, v, cache.pos, cache.pos + n)
        cache.set_lengths([x + n for x in cache.lengths])

    def extend(self, q, k, v, lengths):
        """Many tokens: a part of a prompt, whose own tokens are read exactly."""
        self.cache.check(q.shape[2], k=k, v=v, q=q)
        padding, (q, k, v) = self.to_the_right(lengths, q, k, v)
        self.keep(k, v, lengths)
        out = self.cache.extend(q, k, v, lengths)
        return take(out, self.cache.index[: q.shape[2]] - padding)

    @torch.no_grad()
    def prefill(self, k, v, lengths):
        """Stores the last `lengths` [B] of the tokens k, v [B, Hk, L, D] of prompts."""
        _, (k, v) = self.to_the_right(lengths, k, v)
        ends, _ = self.cache.check_new(0, lengths, k=k, v=v)
        self.keep(k, v, lengths)
        self.cache.fill(k, v, self.cache.pos, ends)
        self.cache.set_lengths(ends.tolist())

    def to_the_right(self, lengths, *tensors):
        """Padding [B, 1] to the left of the tokens of a row, and the tensors [B, .., L, D] with it
        to the right, as KiviCache has it."""
        L = tensors[0].shape[2]
        padding = L - torch.tensor(lengths, device=self.first.device)[:, None]
        if min(lengths) < L:
            t = torch.arange(L, device=padding.device)
            tensors = [take(x, t + padding) for x in tensors]
        return padding, tensors

    def keep(self, k, v, lengths):
        """Keeps what the last of the new tokens k, v [B, Hk, L, D] will replace in the window: by
        then other new ones may lie there."""
        cache, n = self.cache, min(DRAFTS, *lengths)
        ends = cache.pos + torch.tensor(lengths, device=k.device)
        t = ends[:, None] - n + torch.arange(n, device=k.device) - cache.config.residual - 1
        self.replaced = [cache.pick(name, x, t, cache.pos[:, None], slice(None))
                         for name, x in (("k", k), ("v", v))]

    def take_back(self, n):
        """Takes the last n tokens of every row back."""
        cache = self.cache
        slots = min(n, cache.config.residual + 1)  # what the others replaced was new, too
        t = cache.pos[:, None] - n + torch.arange(slots, device=cache.pos.device)
        place = cache.rows[:, None], slice(None), cache.slot(t)
        for window, old in zip((cache.k_window, cache.v_window), self.replaced):
            window[place] = old[:, :, -n:][:, :, :slots].transpose(1, 2)
        cache.set_lengths([x - n for x in cache.lengths])

    def crop(self, tokens_to_remove):
        n, kept = -tokens_to_remove, self.replaced[0].shape[2] if self.replaced else 0
        if not 0 <= n <= kept:
            raise ValueError(f"{n} tokens cannot be taken back from a KIVI cache, only the newest "
                             f"{kept} can: reset() it and give it the text again")
        if n:
            self.take_back(n)
            self.replaced = [x[:, :, : kept - n] for x in self.replaced]
            self.seen -= n

    def get_seq_length(self):
        return self.seen

    def get_max_length(self):
        return self.max_len

    def reorder_cache(self, beam_idx):
        if self.cache is None:
            return
        tensors = (self.first, *self.replaced, *self.cache.contents().values())
        for x in tensors:
            x.copy_(x[beam_idx.to(x.device)])
        self.cache.lengths[:] = [self.cache.lengths[i] for i in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats):
        raise ValueError("a KIVI cache has a fixed number of rows: "
                         "repeat the prompts before the first step")

    batch_select_indices = batch_repeat_interleave
