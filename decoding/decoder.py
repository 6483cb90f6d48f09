"""Decode steps: sampling, CUDA graphs, and tokens on their way to the host.

The device half of decoding (`Decoder`) never waits for the host: a sampled token feeds the next
step on the device, and the host reads it one step later. On CUDA a step is the replay of a CUDA
graph, one graph for each of a few lengths of the cache.
"""
import time
from functools import lru_cache

import torch


def sample(logits, temperature=0.0, top_k=None, top_p=None):
    """Next token of each row: logits [B, V] -> [B]. Temperature 0 is the argmax.

    It does not wait for the device, so that a CUDA graph can hold it.
    """
    if temperature < 1e-5:  # logits over less would overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        drop[..., 0] = False  # the first token always stays
        probs = probs.scatter(-1, order, ordered.masked_fill(drop, 0))
    # Exponential noise and argmax draw from probs without the wait that torch.multinomial needs.
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def checked(token, logits):
    """token [B, n], or -1 where the logits [B, V] or [B, n, V] it comes from are not finite."""
    return torch.where(torch.isfinite(logits.amax(-1)).view(token.shape), token, -1)


def padded(rows, device):
    """(tokens [B, L] right-padded with 0, lengths) of B lists of tokens."""
    lengths = [len(row) for row in rows]
    rows = [row + [0] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(rows, device=device), lengths


@lru_cache
def side_stream(device):
    """A CUDA stream beside the main one, for each device always the same.

    For every stream that multiplies the library keeps a workspace (32 MB on a Hopper).
    """
    return torch.cuda.Stream(device)


def bucket(length, block):
    """`length` tokens rounded up, so that decoding meets few sizes: each is a CUDA graph.

    Whole blocks, beyond 8 of them four sizes an octave: at most a quarter is read in vain.
    """
    n_blocks = -(-length // block)
    if n_blocks > 8:
        step = 1 << (n_blocks - 1).bit_length() - 3
        n_blocks = -(-n_blocks // step) * step
    return n_blocks * block


class Decoder:
    """Decode steps with `model`'s caches, which a prefill has filled: one step a call.

    token        [B, 1] on the device: a step reads the newest tokens there and puts the next there
    checked      the same for the host, -1 where the logits were NaN or inf
    graphs       capture every step in a CUDA graph? None: on CUDA
    sampling     arguments of `sample`
    on_compile   called with True before and with False after the first step of a compiled model
    counts       compile_s, seconds that compilations and captures took so far, and compile_steps,
                 the steps in which they did; of a Speculator proposed and accepted drafts, too
    """

    def __init__(self, model, token, graphs=None, **sampling):
        self.model = model
        self.token = token.clone()
        self.checked = token.clone()
        self.sampling = sampling
        self.on_compile = None
        self.counts = {"compile_s": 0.0, "compile_steps": 0}
        self._started = False
        self.graphs = {}  # CUDA graphs by the numbers of tokens that attention reads and of layers
        self._captures = token.is_cuda if graphs is None else graphs
        self._pool = None  # of memory, which all graphs share

    def begin(self, token, rows):
        """A new text: its first new tokens [B, 1] and its prompts, lists of tokens."""
        self.token.copy_(token)
        self.checked.copy_(token)

    def steps(self, done, new, limits):
        """Yields the newest tokens of each row, lists of one, until the largest of the `limits`;
        the first come from the prefill. The next step is under way on the device meanwhile.

        done, new  of each row: has it ended, and its tokens so far; they are kept up to date
        """
        mail = Mailbox()
        mail.post(self.checked)
        for n in range(1, max(limits) + 1):
            if n < max(limits):
                self()
                mail.post(self.checked)
            yield [[token] for token in mail.read()]

    def __call__(self):
        cache = self.model.cache
        cache.advance()
        length = bucket(cache.length, cache.block) if self._captures else cache.length
        t = cache.tokens(length)  # [n]
        if self._is_prepared(t):
            self._run(t)
            if cache.completes_key_block():
                self.model.flush()
        else:
            self._prepare(t)
        self._started = True

    def _graph(self, t):
        """The key of the graph of a step that reads the tokens t."""
        return len(t), len(self.model.path())

    def _is_prepared(self, t):
        """Does a step that reads these tokens neither compile nor capture anything?"""
        if self._captures:
            return self._graph(t) in self.graphs
        return self._started or not self.model.compiled

    def _prepare(self, t):
        """A step that compiles or is captured, and its time."""
        begin = time.perf_counter()
        says = self.on_compile if self.model.compiled and not self._started else None
        if says:
            says(True)
        if self._captures:
            self._capture(t)
        self._run(t)
        self.model.flush()  # compiles as well; what is not complete stays as it is
        if self.token.is_cuda:
            torch.cuda.synchronize()
        if says:
            says(False)
        self.counts["compile_s"] += time.perf_counter() - begin
        self.counts["compile_steps"] += 1

    def _run(self, t):
        if self._captures:
            self.graphs[self._graph(t)].replay()
        else:
            self._step(t)

    def _step(self, t):
        logits = self.model.decode(self.token, t)
        self.token.copy_(sample(logits, **self.sampling)[:, None])
        self.checked.copy_(checked(self.token, logits))

    def _capture(self, t):
        """Captures the step in a graph. The device's state afterwards is the one from before."""
        token = self.token.clone()
        pos = self.model.cache.pos.clone()
        stream = side_stream(token.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles; the replay writes the same to the same places
            self._step(t)
        torch.cuda.current_stream().wait_stream(stream)
        self.token.copy_(token)
        self.model.cache.pos.copy_(pos)
        graph = torch.cuda.CUDAGraph()
        # With several processes NCCL's own thread asks for events meanwhile.
        mode = "thread_local" if self.model.config.ranks[1] > 1 else "global"
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
            self._step(t)
        self._pool = graph.pool()
        self.graphs[self._graph(t)] = graph


class Mailbox:
    """Tokens on their way to the host: `post` now, `read` a step later. The device never idles."""

    def __init__(self):
        self._queue = []

    def post(self, token):
        if token.is_cuda:
            host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            host.copy_(token, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            host = token.clone()
            arrived = None
        self._queue.append((host, arrived))

    def read(self):
        host, arrived = self._queue.pop(0)
        if arrived is not None:
            arrived.synchronize()
        return host.flatten().tolist()
