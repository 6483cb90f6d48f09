"""Many prompts: they run in waves of one batch size over the same caches and CUDA graphs."""
import gc
import json
import sys
from collections import Counter
from dataclasses import dataclass

import torch

import generate
from checkpoint.text import TextStream, read_text
from program import report
from program.console import out_of_memory
from program.memory import Budget
from program.parallel import processes
from program.report import tell

@dataclass(frozen=True)
class Job:
    index: int  # of the prompt in its file, from 0
    prompt: str
    ids: list
    limit: int  # new tokens
    length: int  # of both


def read_prompts(file, run):
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
            jobs.append(_job(index, item, run))
        except (ValueError, RecursionError) as error:
            tell(f"{file}, line {number}, skipped: {' '.join(str(error).split())}")
    if not jobs:
        raise ValueError(f"{file} holds no prompt that can run")
    return jobs


def _job(index, item, run):
    prompt = item.get("prompt") if isinstance(item, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError('no "prompt" with text')
    ids = run.encode(prompt)
    limit = item.get("max_new_tokens")
    limit = run.new_tokens(ids) if limit is None else limit
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {limit!r}")
    length, context = len(ids) + limit, run.model.config.max_len
    if length > context:
        raise ValueError(f"{len(ids)} tokens and {limit} new ones exceed "
                         f"the model's context of {context}")
    return Job(index, prompt, ids, limit, length)


def answer_all(run, file, batch=None):
    """Continues the prompts of a file, and prints the results in the file's order.

    What was finished is printed also when the run ends early.
    batch  rows that run together; None: as many as fit
    """
    torch.manual_seed(run.seed)
    jobs = read_prompts(file, run)
    # The longest first: what does not fit shows at once, and rows of a wave have like work.
    queue = sorted(jobs, key=lambda job: -job.length)
    capacity = queue[0].length
    budget = Budget(run, max(len(job.ids) for job in jobs))
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
        while queue:
            queue = run_waves(run, queue, batch, capacity, results, totals)
            if queue:
                batch = -(-batch // 2)
                tell(f"out of memory: going on with batches of {batch}")
    finally:
        print_results(run, jobs, results, (batch, capacity), totals)


def run_waves(run, queue, batch, capacity, results, totals):
    """Runs the jobs of `queue` batch by batch; returns those left when memory ran out."""
    try:
        decoder = run.decoder(batch, capacity)
        for first in range(0, len(queue), batch):
            run_wave(run, queue[first : first + batch], batch, decoder, results, totals)
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


def run_wave(run, wave, batch, decoder, results, totals):
    """Continues the prompts of some jobs. The rest of the batch are dummies."""
    n_dummies = batch - len(wave)
    prompts = [job.ids for job in wave] + [[0]] * n_dummies
    limits = [job.limit for job in wave] + [0] * n_dummies
    stats = {}

    def keep(row, new):
        results[wave[row].index] = new

    generate.generate(run.model, prompts, limits, on_row=keep, stats=stats, decoder=decoder)
    skipped = stats["compile_steps"]
    steps = [max(0, len(results[job.index]) - 1 - skipped) for job in wave]
    rows = [(len(job.ids) + skipped, n) for job, n in zip(wave, steps)]
    moved = report.traffic(run.model, rows)
    totals.update(stats, waves=1, decoded=sum(steps), moved=moved)
    tell(f"{len(results)} prompts done, wave of {len(wave)}: prefill {stats['prefill_s']:.2f} s, "
         f"{stats['steps']} steps in {stats['decode_s']:.2f} s")


def print_results(run, jobs, results, shape, totals):
    """Prints the finished prompts in order, and the statistics of all."""
    n_prompt, n_new, longest = 0, 0, 0  # tokens
    for job in jobs:
        if job.index not in results:
            continue
        new = results[job.index]
        stream = TextStream(run.tokenizer, job.ids)
        try:
            pieces = [stream.add(token) for token in new if token not in run.model.config.eos]
        except ValueError as error:  # the other rows have theirs
            tell(f"prompt {job.index} has no text: {error}")
            continue
        row = {"index": job.index, "prompt": job.prompt, "text": "".join(pieces),
               "prompt_tokens": len(job.ids), "new_tokens": len(new)}
        plain = f"--- {job.index}\n{'' if run.render else job.prompt}{row['text']}"
        print(json.dumps(row) if run.as_json else plain)
        n_prompt += len(job.ids)
        n_new += len(new)
        longest = max(longest, len(job.ids) + len(new))
    n_waves = totals["waves"]
    result = {"text": "", "prompts": len(jobs), "finished": len(results), "batch_size": shape[0],
              "waves": n_waves}
    result |= report.statistics(run, shape, (n_prompt, n_new), totals,
                                totals["decoded"], totals["moved"])
    run.tell(result, longest - 1,
             f"{len(results)} of {len(jobs)} prompts in {n_waves} waves of {shape[0]}: ")
    sys.stdout.flush()
