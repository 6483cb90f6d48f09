"""Many prompts: they run in waves of one batch size over the same caches and CUDA graphs."""
import gc
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from os.path import commonprefix

import torch

import generate
from checkpoint.text import TextStream, read_text, stopper
from program import report
from program.chat import load_states
from program.console import out_of_memory
from program.memory import Budget, cache_parts
from program.parallel import processes
from program.report import tell

@dataclass(frozen=True)
class Job:
    index: int  # of the prompt in its file, from 0
    prompt: str
    ids: list
    limit: int  # new tokens
    length: int  # of both


def read_prompts(file, run, past):
    """The Jobs of a file: a prompt a line, or JSONL if its first line begins with "{".

    Empty lines are skipped. A line that cannot be used is reported on stderr with its number; it
    takes an index as well.
    raises ValueError: no line can be used
    """
    lines = [line.strip(" \t\v\f") for line in read_text(file).split("\n")]  # not wide blanks
    lines = [(number, line) for number, line in enumerate(lines, 1) if line]
    jsonl = bool(lines) and lines[0][1].startswith("{")
    jobs = []
    for index, (number, line) in enumerate(lines):
        try:
            item = json.loads(line) if jsonl else {"prompt": line}
            jobs.append(_job(index, item, run, past))
        except (ValueError, RecursionError) as error:
            tell(f"{file}, line {number}, skipped: {' '.join(str(error).split())}")
    if not jobs:
        raise ValueError(f"{file} holds no prompt that can run")
    return jobs


def _job(index, item, run, past):
    prompt = item.get("prompt") if isinstance(item, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError('no "prompt" with text')
    ids = past.respelled(run.encode(prompt))
    limit = item.get("max_new_tokens")
    limit = run.new_tokens(ids) if limit is None else limit
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {limit!r}")
    length, context = len(ids) + limit, run.model.config.max_len
    if length > context:
        raise ValueError(f"{len(ids)} tokens and {limit} new ones exceed "
                         f"the model's context of {context}")
    return Job(index, prompt, ids, limit, length)


def answer_all(run, file, batch, past, shares):
    """Continues the prompts of a file, and prints the results in the file's order.

    What was finished is printed also when the run ends early.
    batch   rows that run together; None: as many as fit
    past    a program.chat.Past, perhaps of a saved cache
    shares  read what all prompts begin with only once?
    """
    torch.manual_seed(run.seed)
    jobs = read_prompts(file, run, past)
    # Of every prompt at least its last token is read.
    shared = commonprefix([job.ids[:-1] for job in jobs]) if shares else []
    if past.tokens and not run.prefix:  # a prompt reads all behind them at once, as if alone
        shared = shared[: len(past.tokens)]
    # The longest first: what does not fit shows at once, and rows of a wave have like work.
    queue = sorted(jobs, key=lambda job: -job.length)
    capacity = queue[0].length
    longest = max(len(job.ids) for job in jobs)
    one_row = cache_parts(run.model, 1, len(shared), run.kv, **run.options) if shared else {}
    budget = Budget(run, longest, sum(one_row.values()), len(shared))
    expected = batch or budget.largest_batch(len(jobs), capacity)
    steps = sum(job.limit for job in queue[::expected])  # about: one row of every wave
    why = report.compile_if_it_pays(run, steps, expected * capacity, prefill=True)
    batch = batch or budget.largest_batch(len(jobs), capacity)  # compiled, a row takes less
    budget.check(batch, capacity)
    tell(budget.table(batch, capacity))
    tell(why)
    results = {}  # new tokens by the index of the prompt
    totals = Counter()
    try:
        states = read_shared(run, past, shared, totals) if shared else []
        while queue:
            queue = run_waves(run, queue, batch, capacity, states, results, totals)
            if queue:
                batch = -(-batch // 2)
                tell(f"out of memory: going on with batches of {batch}")
    finally:
        print_results(run, jobs, results, (batch, capacity), totals)


def read_shared(run, past, shared, totals):
    """Reads these tokens behind those of `past`: the states of caches of one row that hold them."""
    kept = min(past.keep([*shared, -1]), len(shared))
    past.make_room(len(shared), 0, kept)
    model, start = run.model, time.perf_counter()
    rest = torch.tensor([shared[kept:]], device=model.embed.weight.device)
    if kept < len(shared):
        model.extend(rest)
    states = [layer.cache.state() for layer in model.layers]
    seconds = time.perf_counter() - start
    totals.update(prefill_s=seconds, prefilled=rest.numel())
    tell(f"the {len(shared)} tokens that all prompts begin with: {rest.numel()} of them read in "
         f"{seconds:.2f} s")
    return states


def run_waves(run, queue, batch, capacity, states, results, totals):
    """Runs the jobs of `queue` batch by batch; returns those left when memory ran out.

    states  of caches that hold what the prompts begin with, [] if nothing
    """
    try:
        decoder = run.decoder(batch, capacity)
        for first in range(0, len(queue), batch):
            run_wave(run, queue[first : first + batch], batch, decoder, states, results, totals)
        return []
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if batch == 1 or processes() > 1:  # the others would wait for this one
            raise ValueError(f"out of memory with a batch of {batch} and {capacity} tokens a row: "
                             "shorten the prompts or --max-new-tokens") from None
        error.__traceback__ = None  # its frames hold the tensors of the step that failed
    decoder = None
    for layer in run.model.layers:
        layer.cache = None
    gc.collect()
    torch.cuda.empty_cache()
    return [job for job in queue if job.index not in results]


def run_wave(run, wave, batch, decoder, states, results, totals):
    """Continues the prompts of some jobs. The rest of the batch are dummies."""
    n_dummies = batch - len(wave)
    held = states[0]["lengths"][0] if states else 0
    load_states(run.model, states)
    for layer in run.model.layers if states else ():
        layer.cache.fork(0, list(range(1, batch)))
    prompts = [job.ids for job in wave] + [wave[0].ids[: held + 1]] * n_dummies
    limits = [job.limit for job in wave] + [0] * n_dummies
    stats = Counter()

    def keep(row, new):
        results[wave[row].index] = new

    def fail(row, message):
        tell(f"prompt {wave[row].index} has no answer: {message}")

    generate.generate(run.model, prompts, limits, on_row=keep, on_fault=fail, stats=stats,
                      decoder=decoder, held=held,
                      until=stopper(run.tokenizer, prompts, run.stops))
    rows = [(len(job.ids), len(results.get(job.index, ()))) for job in wave]
    decoded, moved = report.decoded(run, stats, rows)
    totals.update(stats, waves=1, decoded=decoded, moved=moved)
    tell(f"{len(results)} prompts done, wave of {len(wave)}: prefill {stats['prefill_s']:.2f} s, "
         f"{stats['steps']} steps in {stats['decode_s']:.2f} s")


def print_results(run, jobs, results, shape, totals):
    """Prints the finished prompts in order, and the statistics of all."""
    rows = []  # tokens of each prompt, and new ones
    for job in jobs:
        if job.index not in results:
            continue
        new = results[job.index]
        stream = TextStream(run.tokenizer, job.ids, run.stops)
        try:
            for token in new:
                if token not in run.model.config.eos:
                    stream.add(token)
        except ValueError as error:  # the other rows have theirs
            tell(f"prompt {job.index} has no text: {error}")
            continue
        stream.rest()
        row = {"index": job.index, "prompt": job.prompt, "text": stream.text,
               "prompt_tokens": len(job.ids), "new_tokens": len(new)}
        plain = f"--- {job.index}\n{'' if run.render else job.prompt}{row['text']}"
        print(json.dumps(row) if run.as_json else plain)
        rows.append((len(job.ids), len(new)))
    n_waves = totals["waves"]
    result = {"text": "", "prompts": len(jobs), "finished": len(results), "batch_size": shape[0],
              "waves": n_waves}
    result |= report.statistics(run, shape, rows, totals, totals["decoded"], totals["moved"])
    run.tell(result, max(map(sum, rows), default=0) - 1,
             f"{len(results)} of {len(jobs)} prompts in {n_waves} waves of {shape[0]}: ")
    sys.stdout.flush()
