"""What a cache's bits cost: perplexity and KL to full precision, choices of tokens, and answers
found in long prompts.

Tokens are decoded one by one, teacher-forced, after an exact prefill: that reads the cache as
decoding does. A single forward pass would never read it.
"""
import math
import random
import statistics
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoint.hub import EMBEDDED, resolve
from checkpoint.text import chat_template
from generate import DTYPES, generate, load
from model import make_cache
from study.measure import print_table, say
from study.models import at_length, step_seconds
from study.prompts import DEPTHS, TASKS, make_case, text_rows
from study.scatter import scatter
from study.variants import STUDY, Fake, simulate

CACHES = {  # label -> arguments of setup_caches; the first is the measure of all others
    "full precision": {"kv": "bf16"},
    "kivi4": {"kv": "kivi4"},
    "k4v2": {"kv": "k4v2"},
    "k4v2, 4 sinks": {"kv": "k4v2", "sink": 4},
    "kivi2+": {"kv": "kivi2+"},
    "kivi2-": {"kv": "kivi2-"},
    "kivi2": {"kv": "kivi2"},
    "kivi2, 4 sinks": {"kv": "kivi2", "sink": 4},
    "kivi2, R = 32": {"kv": "kivi2", "residual": 32},
}
LENGTHS = 1024, 8192, 32768  # tokens of a row whose bytes the table says
SHARED = ("index", "pos", "rows")
QUESTIONS = ("prefilled", "decoded")  # how a question comes; its answer is always decoded


def add_arguments(add):
    add("--checkpoint", help="as in generate.py")
    add("--weights", help="as in generate.py")
    add("--dtype", choices=DTYPES, default="float32", help="of the model")
    add("--caches", nargs="+", default=list(CACHES),
        help="names of the table, other names of --kv or kvtuner:FILE")
    add("--text", default=EMBEDDED / "heldout.txt", help="text file (default: a held-out excerpt)")
    add("--rows", type=int, default=8, help="rows of text")
    add("--tokens", type=int, default=512, help="at most scored a row")
    add("--prefill", type=int, default=256, help="tokens of exact prefill")
    add("--greedy", type=int, default=128, help="tokens that full precision adds to these (2 ..)")
    add("--lengths", type=int, nargs="*", default=[1024, 2048, 4096],
        help="tokens of the prompts that ask")
    add("--trials", type=int, default=2, help="such prompts a length and depth")
    add("--batch", type=int, default=40, help="such prompts at a time")
    add("--tasks", nargs="*", choices=TASKS, default=["pass key", "multi-key"],
        help="what they ask (default: pass key and multi-key)")
    add("--seed", type=int, default=0, help="of these prompts")
    add("--plot", metavar="FILE", help="draws bytes and KL of every cache into this SVG file")
    add("--study", action="store_true",
        help="also simulate the paper's variants and the ideas beyond it")


def quality(results, device, checkpoint, weights, dtype, caches, text, rows, tokens, prefill,
            greedy, lengths, trials, batch, tasks, seed, plot, study):
    """perplexity, KL, greedy choices and answers through the cache; --study: the long table"""
    if greedy < 2:
        raise ValueError(f"--greedy must be 2 or more: no cache chooses the first, got {greedy}")
    model, tokenizer = load(checkpoint, device, DTYPES[dtype], weights=weights)
    words = Path(text).read_text(encoding="utf-8")
    windows = text_rows(tokenizer, words, prefill, rows, tokens).to(device)
    results.data |= {
        "checkpoint": Path(checkpoint or EMBEDDED).name,
        "weights": weights,
        "dtype": dtype,
        "text": Path(text).name,
        "prefill": prefill,
        "rows_of_text": rows,
        "scored": windows[:, prefill:].numel(),
    }
    labels = dict.fromkeys(["full precision", *caches])  # that first, and once
    chosen = {label: CACHES.get(label, {"kv": label}) for label in labels}
    for cache in chosen.values():
        model.kv_configs(**cache)  # what is wrong with one should be known before all is measured
    chosen |= STUDY if study else {}
    lengths = [length for length in lengths if length <= model.config.max_len]
    longest = max(lengths, default=windows.shape[1])
    read_text(results, model, chosen, windows, prefill, greedy, longest)
    render = None
    with suppress(ValueError):  # a checkpoint without a template gets plain text
        render = chat_template(resolve(checkpoint))
    answers = results.data["answers"] = []
    for task, length, question in product(tasks, lengths, QUESTIONS):
        cases = []
        for number, depth in enumerate(DEPTHS * trials):
            rng = random.Random(f"{seed}, {task}, {length}, {number}")  # not of the question
            cases.append(make_case(tokenizer, render, words, task, length, depth, rng,
                                   question == "decoded"))
        column = {"task": task, "tokens": length, "question": question}
        answers += answered(model, chosen, cases, batch, column)
    print_answers(answers)
    if plot:
        scatter(plot, results.rows(), answers, LENGTHS[1])


def read_text(results, model, caches, windows, prefill, greedy, longest):
    """Adds a row for each cache: how it reads windows [B, T] of a text behind their prefill, and
    the `greedy` tokens that full precision puts there itself."""
    prompt = prefilled(model, windows[:, :prefill])
    own = generate(model, windows[:, :prefill], greedy, kv="bf16", stop=())[:, prefill:]
    base = None
    for label, cache in caches.items():
        logp = decoded(model, cache, prompt, windows[:, prefill:-1])
        seconds = 0 if isinstance(cache, Fake) else step_seconds(model, windows.shape[1] - 2, 5)[0]
        base = logp if base is None else base
        bits, whole = stored_bits(model, cache, longest)
        row = {"cache": label, "simulated": isinstance(cache, Fake), "bits": bits,
               "bits_whole": whole, "bytes": row_bytes(model, cache), "ms": 1e3 * seconds,
               **text_metrics(logp, base, windows[:, prefill:]),
               **greedy_metrics(decoded(model, cache, prompt, own[:, :-1]), own)}
        results.add(row)
        say(f"  {label}: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}")
    lengths = " / ".join(map(str, LENGTHS))
    print_table(
        f"cache | stored bits | whole cache | MiB at {lengths} | perplexity | "
        "mean KL | 99th percentile | top-1 | greedy top-1 | greedy tokens alike | ms a step",
        [f"{row['cache']} | {row['bits']:.2f} | {row['bits_whole']:.2f} | "
         f"{' / '.join(f'{n / 2**20:.2f}' for n in row['bytes'])} | {row['perplexity']:.3f} | "
         f"{row['kl']:.4f} | {row['kl_p99']:.3f} | {row['top1']:.3f} | "
         f"{row['greedy_top1']:.3f} | {row['greedy_alike']:g} | {row['ms']:.1f}"
         for row in results.rows()])


def answered(model, caches, cases, batch, column):
    """A row for each cache: which of the cases it answers, and the mean loss of an answer.

    column  what the rows say beside; their hits are in the order of the cases
    """
    device = model.embed.weight.device
    rows = [{"cache": label, **column, "hits": [], "loss": 0} for label in caches]
    for first in range(0, len(cases), batch):
        part = cases[first : first + batch]
        prompt = prefilled(model, torch.tensor([case.prompt for case in part], device=device))
        rest = pad_sequence([torch.tensor(case.rest) for case in part], True).to(device)
        for row, cache in zip(rows, caches.values()):
            logp = decoded(model, cache, prompt, rest[:, :-1])
            for case, case_logp, case_rest in zip(part, logp, rest):
                place = slice(len(case.rest) - case.answer, len(case.rest))
                ours, target = case_logp[place], case_rest[place]
                row["hits"].append(int((ours.argmax(-1) == target).all()))
                row["loss"] -= ours.gather(-1, target[:, None]).sum().item() / len(cases)
    say(f"  {' '.join(map(str, column.values()))}: "
        + ", ".join(f"{row['cache']} {sum(row['hits'])}" for row in rows))
    return rows


def print_answers(rows):
    """A table for each task: how many prompts each cache answers, by length and question."""
    for task in dict.fromkeys(row["task"] for row in rows):
        columns, lines = {"cache": None}, {}
        for row in rows:
            if row["task"] == task:
                columns[f"{row['tokens']:,}, {row['question']}"] = None
                line = lines.setdefault(row["cache"], [row["cache"]])
                line.append(f"{sum(row['hits'])}/{len(row['hits'])}")
        print(f"\n{task.capitalize()}, by tokens and how the question comes")
        print_table(" | ".join(columns), map(" | ".join, lines.values()))


def prefilled(model, tokens):
    """Exact prefill of tokens [B, L]: ((k, v) [B, Hk, L, D] of every layer, logits [B, V], tokens).
    """
    model.setup_caches(*tokens.shape, "bf16")
    logits = model.prefill(tokens)
    return [layer.cache.dequantized() for layer in model.layers], logits, tokens


def decoded(model, cache, prompt, tokens):
    """Log-probabilities [B, n + 1, V] of tokens [B, n] and of what follows, teacher-forced.

    cache   arguments of setup_caches: token by token through real caches; a Fake: all at once
    prompt  what `prefilled` returned for the tokens before
    """
    prompt_kv, logits, read = prompt
    logits = [logits[:, None]]
    if isinstance(cache, Fake):
        logits.append(simulate(model, cache, prompt_kv, tokens))
    else:
        length = prompt_kv[0][0].shape[2]
        model.setup_caches(len(tokens), length + tokens.shape[1], **cache)
        nothing = torch.zeros_like(model.cache.pos)
        if hasattr(model.cache, "observe"):
            model.prefill(read)  # it must see the queries, too
        else:
            for layer, (k, v) in zip(model.layers, prompt_kv):
                layer.cache.fill(k, v, nothing, nothing + length)
            at_length(model, length)
        for token in tokens.split(1, 1):
            model.cache.advance()
            logits.append(model.decode(token, model.cache.tokens(model.cache.length))[:, None])
            if model.cache.completes_key_block():
                model.flush()
    return torch.cat(logits, 1).float().log_softmax(-1)


def text_metrics(logp, base, target):
    """logp, base [B, n, V], target [B, n] -> perplexity, and the distance of logp to base."""
    kl = torch.stack([(b.exp() * (b - x)).sum(-1) for x, b in zip(logp, base)])  # [B, n]
    loss = -logp.gather(-1, target[..., None]).mean().item()
    base_loss = -base.gather(-1, target[..., None]).mean().item()
    return {
        "perplexity": math.exp(loss),
        "perplexity_ratio": math.exp(loss - base_loss),
        "kl": kl.mean().item(),
        "kl_p99": kl.flatten().quantile(0.99).item(),
        "top1": (logp.argmax(-1) == base.argmax(-1)).float().mean().item(),
    }


def greedy_metrics(logp, own):
    """logp [B, n, V] of full precision's own tokens [B, n], the first of which no cache chose.

    Until one differs they are what the cache would have chosen by itself.
    """
    same = (logp.argmax(-1) == own)[:, 1:]
    return {
        "greedy_top1": same.float().mean().item(),
        "greedy_alike": statistics.median(same.cumprod(1).sum(1).tolist()),
    }


def stored_bits(model, cache, length):
    """Bits per element: of what is quantized, and of all in a cache of that length.

    Scales, zeros and exact tokens count 16 bits a number.
    """
    head_dim = model.config.head_dim
    layers = []
    for config in [cache] if isinstance(cache, Fake) else model.kv_configs(**cache):
        bits, exact = 16, 0
        if hasattr(config, "stored_bits"):
            bits = config.stored_bits(head_dim)
            exact = (config.sink + config.residual) / length
        elif config:
            k_bits = config.k_bits * (1 + config.boosted(head_dim) / head_dim)
            k_bits += 32 / config.group_size
            bits = (k_bits + config.v_bits + 32 / config.value_group(head_dim)) / 2
            exact = (config.sink + config.residual) / length
        layers.append((bits, bits + (16 - bits) * exact))
    return map(statistics.mean, zip(*layers))


def row_bytes(model, cache):
    """Bytes that one row's caches take in half precision, with room for each of LENGTHS tokens.
    What all layers share, their schedule, does not count."""
    c, total = model.config, []
    for length in [] if isinstance(cache, Fake) else LENGTHS:
        layers = [make_cache(config, 1, c.n_kv_heads, length, c.head_dim,
                             dtype=torch.bfloat16, device="meta")
                  for config in model.kv_configs(**cache)]
        total.append(sum(x.untyped_storage().nbytes() for layer in layers
                         for name, x in layer.named_buffers() if name not in SHARED))
    return total
