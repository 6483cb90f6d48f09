"""Text generation with a KIVI cache: `python generate.py` writes English with the model in tiny/.

The device half of decoding (`Decoder`) never waits for the host: a sampled token feeds the next
step on the device, and the host reads it one step later. On CUDA a step is the replay of a CUDA
graph, one graph for each of a few lengths of the cache. The command line stands in program/.
"""
import time
from functools import lru_cache

import torch

from checkpoint.config import ModelConfig
from checkpoint.hub import resolve
from checkpoint.text import load_tokenizer
from model import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(checkpoint=None, device="cpu", dtype=torch.float32, revision=None, weights=None,
         ranks=(0, 1), progress=None):
    """(model, tokenizer) of a checkpoint: folder, hub id or short name; None is the embedded one.

    The other arguments are those of `resolve` and of `Transformer.from_pretrained`.
    """
    folder = resolve(checkpoint, revision)
    ModelConfig.from_folder(folder)  # the weights take longest: all else that is wrong comes first
    tokenizer = load_tokenizer(folder)
    return Transformer.from_pretrained(folder, device, dtype, weights, progress, ranks), tokenizer


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
    graphs       capture every step in a CUDA graph? None: on CUDA
    sampling     arguments of `sample`
    on_compile   called with True before and with False after the first step of a compiled model
    compile_s    seconds that compilations and captures took so far, in `compile_steps` whole steps
    """

    def __init__(self, model, token, graphs=None, **sampling):
        self.model = model
        self.token = token.clone()
        self.sampling = sampling
        self.on_compile = None
        self.compile_s = 0.0
        self.compile_steps = 0
        self._started = False
        self.graphs = {}  # CUDA graphs by the number of tokens that attention reads
        self._captures = token.is_cuda if graphs is None else graphs
        self._pool = None  # of memory, which all graphs share

    def __call__(self):
        cache = self.model.cache
        cache.advance()
        length = bucket(cache.length, cache.block) if self._captures else cache.length
        t = cache.tokens(length)  # [n]
        if self._is_prepared(len(t)):
            self._run(t)
            if cache.completes_key_block():
                self.model.flush()
        else:
            self._prepare(t)
        self._started = True

    def _is_prepared(self, n_tokens):
        """Does a step that reads so many tokens neither compile nor capture anything?"""
        if self._captures:
            return n_tokens in self.graphs
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
        self.compile_s += time.perf_counter() - begin
        self.compile_steps += 1

    def _run(self, t):
        if self._captures:
            self.graphs[len(t)].replay()
        else:
            self._step(t)

    def _step(self, t):
        self.token.copy_(sample(self.model.decode(self.token, t), **self.sampling)[:, None])

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
        self.graphs[len(t)] = graph


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


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.0, *, top_k=None, top_p=None, kv=None,
             stop=None, on_token=None, on_row=None, stats=None, decoder=None, **options):
    """Continues prompts by up to `max_new_tokens` tokens; a row ends early with a token of `stop`.

    tokens          [B, L] integers, or a list of B lists of unequal lengths
    max_new_tokens  one number, or one a row; 0 makes the row a dummy that only fills the batch
    kv              name of the cache to set up, with `options` (see Transformer.setup_caches);
                    None keeps the caches that are there if they fit the batch, else "kivi2"
    stop            tokens that end a row; None: the model's
    on_token        called with the list of the B newest tokens after every step
    on_row          called with (row, its new tokens) as soon as a row ends
    stats           dict that receives prefill_s, decode_s (seconds) and steps; compile_s and
                    compile_steps, which those do not count: steps that compiled or were captured
    decoder         the Decoder of an earlier call on the same caches, whose CUDA graphs stay valid;
                    it brings its own sampling
    returns         the form of `tokens`, prompt included: [B, L + n], where an early row repeats
                    its last token, or lists
    raises          ValueError: prompts or numbers that cannot be, more tokens than the caches hold
    """
    ragged = not torch.is_tensor(tokens)
    rows = [list(row) for row in tokens] if ragged else tokens.tolist()
    single = isinstance(max_new_tokens, int)
    limits = [max_new_tokens] * len(rows) if single else list(max_new_tokens)
    _check(rows, limits, max_new_tokens, model.config.vocab_size)
    _make_room(model, rows, limits, kv, options)
    lengths = [len(row) for row in rows]
    padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
    padded = torch.tensor(padded, device=model.embed.weight.device)
    stop = set(model.config.eos if stop is None else stop)

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = decoder.sampling if decoder else sampling
    start = time.perf_counter()
    token = sample(model.prefill(padded, lengths), **sampling)[:, None]  # [B, 1]
    decoder = decoder or Decoder(model, token, **sampling)
    decoder.token.copy_(token)
    compile_s, compile_steps = decoder.compile_s, decoder.compile_steps
    if token.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    new, n_steps = _decode(decoder, limits, stop, on_token, on_row)
    if stats is not None:
        compile_s = decoder.compile_s - compile_s
        compile_steps = decoder.compile_steps - compile_steps
        stats.update(prefill_s=begin - start, decode_s=time.perf_counter() - begin - compile_s,
                     steps=max(0, n_steps - compile_steps),
                     compile_s=compile_s, compile_steps=compile_steps)
    out = [row + more for row, more in zip(rows, new)]
    if ragged:
        return out
    longest = max(map(len, out))
    out = [row + row[-1:] * (longest - len(row)) for row in out]
    return torch.tensor(out, device=tokens.device)


def _check(rows, limits, asked, vocab_size):
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: give at least one token "
                         "(the beginning-of-text token will do)")
    largest = max(map(max, rows))
    if min(map(min, rows)) < 0 or largest >= vocab_size:
        raise ValueError(f"a prompt holds token {largest}, the model's vocabulary ends at "
                         f"{vocab_size - 1}: is it the model's own tokenizer?")
    if len(limits) != len(rows) or max(limits) < 1 or min(limits) < 0:
        raise ValueError("max_new_tokens must be at least 1, one number or one for each of "
                         f"{len(rows)} rows, got {asked}")


def _make_room(model, rows, limits, kv, options):
    """Sets up caches, or empties those that are there. raises ValueError: they are too small."""
    capacity = max(len(row) + limit for row, limit in zip(rows, limits))
    if kv is not None or model.cache is None or model.cache.batch != len(rows):
        model.setup_caches(len(rows), capacity, kv or "kivi2", **options)
        return
    if capacity > model.cache.max_len:
        raise ValueError(f"{capacity} tokens exceed the cache's capacity of {model.cache.max_len}")
    for layer in model.layers:
        layer.cache.reset()


def _decode(decoder, limits, stop, on_token, on_row):
    """Decodes until every row has ended: the new tokens of each row, and the number of steps.

    Step n is under way on the device while the host reads the tokens of step n - 1.
    """
    mail = Mailbox()
    mail.post(decoder.token)  # the first new tokens come from the prefill
    new = [[] for _ in limits]
    done = [limit == 0 for limit in limits]
    n_tokens = 0
    while not all(done):
        n_tokens += 1
        if n_tokens < max(limits):
            decoder()
            mail.post(decoder.token)
        newest = mail.read()
        for row, token in enumerate(newest):
            if done[row]:
                continue
            new[row].append(token)
            done[row] = token in stop or n_tokens == limits[row]
            if done[row] and n_tokens < max(limits):
                decoder.model.cache.park(row)
            if done[row] and on_row:
                on_row(row, new[row])
        if on_token:
            on_token(newest)
    return new, n_tokens - 1


if __name__ == "__main__":
    from program.cli import main

    main()
