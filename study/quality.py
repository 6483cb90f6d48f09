"""What a cache's bits cost: perplexity, KL to full precision, and facts found in long prompts.

Tokens are decoded one by one, teacher-forced, after an exact prefill: that reads the cache as
decoding does. A single forward pass would never read it.
"""
import itertools
import math
import random
import statistics
from pathlib import Path

import torch

from checkpoint.hub import EMBEDDED
from generate import DTYPES, load
from kivi import FullCache, KiviCache
from study.measure import print_table, say
from study.models import at_length
from study.prompts import DEPTHS, TASKS, hide, text_rows
from study.variants import STUDY, Fake, simulate

CACHES = {  # label -> arguments of setup_caches; the first is the measure of all others
    "full precision": {"kv": "bf16"},
    "kivi4": {"kv": "kivi4"},
    "k4v2": {"kv": "k4v2"},
    "kivi2+": {"kv": "kivi2+"},
    "kivi2": {"kv": "kivi2"},
    "kivi2, R = 32": {"kv": "kivi2", "residual": 32},
}


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
    add("--lengths", type=int, nargs="*", default=[1024, 2048, 4096],
        help="tokens of the retrieval prompts")
    add("--trials", type=int, default=2, help="prompts a length and depth")
    add("--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="retrieval tasks")
    add("--seed", type=int, default=0, help="of the retrieval prompts")
    add("--study", action="store_true",
        help="also simulate the paper's variants and the ideas beyond it")


def quality(results, device, checkpoint, weights, dtype, caches, text, rows, tokens, prefill,
            lengths, trials, tasks, seed, study):
    """perplexity, KL and retrieval through the cache; --study: the long table"""
    model, tokenizer = load(checkpoint, device, DTYPES[dtype], weights=weights)
    text = Path(text).read_text(encoding="utf-8")
    windows = text_rows(tokenizer, text, prefill, rows, tokens).to(device)
    results.data |= {
        "checkpoint": checkpoint or "tiny",
        "weights": weights,
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
    longest = lengths[-1] if lengths else windows.shape[1]
    base = None
    prompt = prefilled(model, windows[:, :prefill])
    for label, cache in chosen.items():
        logp = decoded(model, cache, prompt, windows[:, prefill:-1])
        base = logp if base is None else base
        row = {
            "cache": label,
            "simulated": isinstance(cache, Fake),
            **text_metrics(logp, base, windows[:, prefill:]),
            "retrieval": {},
            "answer_loss": {},
        }
        row["bits"], row["bits_whole"] = stored_bits(model, cache, longest)
        results.add(row)
        say(f"  {label}: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}")
    rng = random.Random(seed)
    columns = list(itertools.product(tasks, lengths))
    for length, task in itertools.product(lengths, tasks):
        cases = [hide(tokenizer, text, task, length, depth, rng) for depth in DEPTHS * trials]
        retrieve(model, chosen.values(), results.rows(), cases, task, length)
    print_table(
        "cache | stored bits | whole cache | perplexity | mean KL | 99th percentile | top-1"
        + "".join(f" | {task}, {length:,}" for task, length in columns),
        [f"{row['cache']} | {row['bits']:.2f} | {row['bits_whole']:.2f} | {row['perplexity']:.3f} "
         f"| {row['kl']:.4f} | {row['kl_p99']:.3f} | {row['top1']:.3f}"
         + "".join(f" | {found(row, *column)}" for column in columns) for row in results.rows()])


def retrieve(model, caches, rows, cases, task, length):
    """Notes in the row of each cache [hits, trials] by depth, and the mean loss of the answers."""
    device = model.embed.weight.device
    for row in rows:
        row["retrieval"].setdefault(task, {})[length] = {depth: [0, 0] for depth in DEPTHS}
        row["answer_loss"].setdefault(task, {})[length] = 0
    for prompt, answer, depth in cases:
        # The question's last token is decoded: the answer's first must come through the cache too.
        before = prefilled(model, torch.tensor([prompt[:-1]], device=device))
        given = torch.tensor([prompt[-1:] + answer[:-1]], device=device)
        for cache, row in zip(caches, rows):
            logp = decoded(model, cache, before, given)[0, 1:]  # [tokens of the answer, V]
            hits = row["retrieval"][task][length][depth]
            hits[0] += logp.argmax(-1).tolist() == answer
            hits[1] += 1
            loss = -logp[range(len(answer)), answer].sum().item()
            row["answer_loss"][task][length] += loss / len(cases)
    say(f"  {task} at {length}: "
        + ", ".join(f"{row['cache']} {found(row, task, length)}" for row in rows))


def found(row, task, length):
    hits, trials = map(sum, zip(*row["retrieval"][task][length].values()))
    return f"{hits}/{trials}"


def prefilled(model, tokens):
    """Exact prefill of tokens [B, L]: ((k, v) [B, Hk, L, D] of every layer, logits [B, V])."""
    model.setup_caches(*tokens.shape, "bf16")
    logits = model.prefill(tokens)
    return [layer.cache.dequantized() for layer in model.layers], logits


def decoded(model, cache, prompt, tokens):
    """Log-probabilities [B, n + 1, V] of tokens [B, n] and of what follows, teacher-forced.

    cache   arguments of setup_caches: token by token through real caches; a Fake: all at once
    prompt  what `prefilled` returned for the tokens before
    """
    prompt_kv, logits = prompt
    logits = [logits[:, None]]
    if isinstance(cache, Fake):
        logits.append(simulate(model, cache, prompt_kv, tokens))
    else:
        length = prompt_kv[0][0].shape[2]
        model.setup_caches(len(tokens), length + tokens.shape[1], **cache)
        at_length(model, length)
        for layer, (k, v) in zip(model.layers, prompt_kv):
            layer.cache.fill(k, v, model.cache.pos)
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


def stored_bits(model, cache, length):
    """Bits per element: of what is quantized, and of a whole cache of that length.

    Scales, zeros and exact tokens count 16 bits a number.
    """
    heads, head_dim = model.config.n_kv_heads, model.config.head_dim
    if isinstance(cache, Fake):
        return cache.stored_bits(head_dim, length)
    layers = []
    for config in model.kv_configs(**cache):
        kind, bits, options = FullCache, 16, {}
        if config:
            kind, options = KiviCache, vars(config)
            bits = (config.k_bits + config.v_bits) / 2 + 32 / config.group_size
        parts = kind.sizes(1, heads, length, head_dim, dtype=torch.bfloat16, **options)
        stored = parts["codes"] + parts["metadata"] + parts["window"]  # bytes of K and V
        layers.append((bits, 4 * stored / (heads * length * head_dim)))
    return map(statistics.mean, zip(*layers))
