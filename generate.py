"""Text generation with a KIVI cache: `python generate.py` writes English with the model in tiny/.

A decode step is in decoding/, the command line in program/.
"""
from program import console

if __name__ == "__main__":
    console.begin()  # importing the rest takes a second, and can fail

import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest

import torch

from checkpoint.config import ModelConfig
from checkpoint.hub import resolve
from checkpoint.text import load_tokenizer
from decoding.decoder import Decoder, padded, sample
from decoding.speculate import speculator
from model import Transformer
from neighbours import registry  # noqa: F401 - more names for kv

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


@contextmanager
def surroundings(model):
    """What a model needs of the process: no gradients, no autocast (a cache holds one dtype), and
    its own GPU as the current one, to which streams and graphs belong."""
    device = model.embed.weight.device
    gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), gpu:
        yield


def generate(model, tokens, max_new_tokens, temperature=0.0, *, top_k=None, top_p=None, kv=None,
             stop=None, until=None, on_token=None, on_row=None, on_fault=None, stats=None,
             decoder=None, held=0, speculate=0, draft=None, **options):
    """Continues prompts by up to `max_new_tokens` tokens; a row ends early with a token of `stop`.

    tokens          [B, L] integers, or a list of B lists of unequal lengths
    max_new_tokens  one number, or one a row; 0 makes the row a dummy that only fills the batch
    kv              name of the cache to set up, with `options` (see Transformer.setup_caches);
                    None keeps the caches that are there if they fit the batch, else "kivi2"
    stop, until     tokens that end a row (None: the model's); called with (row, token): does it?
    on_token        called with the list of the B newest tokens after every step; None for a row
                    that has no other one
    on_row          called with (row, its new tokens) as soon as a row ends
    on_fault        called with (row, message) if the model computes NaN or inf there, which ends
                    the row; None: a ValueError, when the others have ended
    stats           dict that receives prefill_s, decode_s (seconds), prefilled (tokens), steps, the
                    row_steps of all rows and the row_tokens from them, and the `counts` of the
                    decoder; steps that compiled count only there and in the row_steps
    decoder         the Decoder of an earlier call on the same caches, whose CUDA graphs stay valid;
                    it brings its own sampling
    held            so many first tokens of every prompt are in the caches that are there
    speculate       so many drafts a step are verified (decoding/speculate.py), looked up in the
                    text or by `draft`, a smaller Transformer with the same tokenizer
    returns         the form of `tokens`, prompt included: [B, L + n], where an early row repeats
                    its last token, or lists
    raises          ValueError: prompts or numbers that cannot be, more tokens than the caches hold
    """
    with surroundings(model):
        ragged = not torch.is_tensor(tokens)
        rows = [list(row) for row in tokens] if ragged else tokens.tolist()
        single = isinstance(max_new_tokens, int)
        limits = [max_new_tokens] * len(rows) if single else list(max_new_tokens)
        _check(rows, limits, max_new_tokens, model.config.vocab_size, held)
        _make_room(model, rows, limits, kv, options, held)
        stop = set(model.config.eos if stop is None else stop)

        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        start = time.perf_counter()
        token = torch.zeros_like(model.cache.pos)[:, None]  # [B, 1]
        if decoder is None and speculate:
            decoder = speculator(model, token, speculate, draft, **sampling)
        decoder = decoder or Decoder(model, token, **sampling)
        decoder.begin(_prefill(model, rows, held, decoder.sampling), rows)
        before = Counter(decoder.counts)
        if token.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        new, counts = _decode(decoder, limits, stop, until, on_token, on_row, on_fault)
        if stats is not None:
            counts |= {name: n - before[name] for name, n in decoder.counts.items()}
            counts["steps"] = max(0, counts["steps"] - counts["compile_steps"])
            counts["prefilled"] = sum(len(row) - held for row, n in zip(rows, limits) if n)
            decode_s = time.perf_counter() - begin - counts["compile_s"]
            stats.update(counts, prefill_s=begin - start, decode_s=decode_s)
        out = [row + more for row, more in zip(rows, new)]
    if ragged:
        return out
    longest = max(map(len, out))
    out = [row + row[-1:] * (longest - len(row)) for row in out]
    return torch.tensor(out, device=tokens.device)


def _check(rows, limits, asked, vocab_size, held):
    if not rows or not all(len(row) > held for row in rows):
        raise ValueError("a prompt is empty: give at least one token "
                         "(the beginning-of-text token will do)")
    largest = max(map(max, rows))
    if min(map(min, rows)) < 0 or largest >= vocab_size:
        raise ValueError(f"a prompt holds token {largest}, the model's vocabulary ends at "
                         f"{vocab_size - 1}: is it the model's own tokenizer?")
    if len(limits) != len(rows) or max(limits) < 1 or min(limits) < 0:
        raise ValueError("max_new_tokens must be at least 1, one number or one for each of "
                         f"{len(rows)} rows, got {asked}")


def _make_room(model, rows, limits, kv, options, held):
    """Sets up caches, if those that are there do not do. raises ValueError: they are too small."""
    capacity = max(len(row) + limit for row, limit in zip(rows, limits))
    if kv is not None or model.cache is None or model.cache.batch != len(rows):
        model.setup_caches(len(rows), capacity, kv or "kivi2", **options)
    if capacity > model.cache.max_len:
        raise ValueError(f"{capacity} tokens exceed the cache's capacity of {model.cache.max_len}")
    if held and model.cache.lengths != [held] * len(rows):
        raise ValueError(f"the caches hold {model.cache.lengths} tokens, not {held}")


def _prefill(model, rows, held, sampling):
    """Reads the prompts and samples behind them: the first new token of each row, [B, 1]."""
    new = padded([row[held:] for row in rows], model.embed.weight.device)
    read = model.extend if held else model.prefill
    return sample(read(*new), **sampling)[:, None]


def _decode(decoder, limits, stop, until, on_token, on_row, on_fault):
    """Decodes until every row has ended: the new tokens of each row, and counts: steps, row_steps,
    and row_tokens of `generate`'s stats."""
    new = [[] for _ in limits]
    done = [limit == 0 for limit in limits]
    faults, row_steps = [], 0
    for n_steps, newest in enumerate(decoder.steps(done, new, limits)):  # step 0 is the prefill
        running = [row for row, ended in enumerate(done) if not ended]
        before = list(map(len, new))
        row_steps += len(running) if n_steps else 0
        ends = {row: _append(new[row], newest[row], limits[row], stop,
                             until and partial(until, row)) for row in running}
        for row in filter(ends.get, running):
            done[row] = True
        for row in filter(ends.get, running):
            if not all(done):
                decoder.model.cache.park(row)
            if ends[row] == "fault":
                faults.append(row)
            elif on_row:
                on_row(row, new[row])
        if on_token:
            for tokens in zip_longest(*(row[n:] for row, n in zip(new, before))):
                on_token(list(tokens))
        if all(done):
            break
    for row in faults:
        message = "the model computes NaN or inf: its weights are damaged, or its dtype too narrow"
        if on_fault is None:
            raise ValueError(f"row {row} after {len(new[row])} new tokens: {message}")
        on_fault(row, message)
    row_tokens = sum(len(row[1:]) for row in new)  # the first came from the prefill
    return new, {"steps": n_steps, "row_steps": row_steps, "row_tokens": row_tokens}


def _append(row, tokens, limit, stop, until):
    """Appends the newest tokens of a row up to the one that ends it; a negative one stands for NaN.

    returns "end", "fault", or None where the row goes on
    """
    for token in tokens:
        if token < 0:
            return "fault"
        row.append(token)
        if token in stop or len(row) == limit or until and until(token):
            return "end"
    return None


if __name__ == "__main__":
    from program.cli import main

    main()
