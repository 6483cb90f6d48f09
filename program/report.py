"""What the program says about a run beside its text: progress, statistics, a profile."""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from program.console import note, tell
from program.memory import cache_bytes, cache_parts, kv_read, largest, weights_read
from program.parallel import processes, rank
from quantize import KVConfig

COMPILE_TAKES = {"cuda": 37, "cpu": 40}  # seconds with empty caches, at any depth of the model
# Seconds that a compiled step on CUDA saves, estimated: for the many small kernels of a layer, and
# for each element of its K and V, which an uncompiled one writes out in full precision.
SAVED_A_LAYER = 2.5e-4
SAVED_AN_ELEMENT = 1e-11
PROFILED = 10  # decode steps of a profile
WAIT = 4  # new tokens before them: compilation, the profiler's own start


def note_loading(share):
    note(f"loading the weights: {share:.0%}")


def note_compiling(begins):
    note("compiling the decode step ..." if begins else "")


def compile_if_it_pays(run, steps, tokens, interactive=False, prefill=False):
    """Compiles the model where the user says so, or on CUDA where the decode steps pay for it.

    steps   decode steps asked for; tokens: in all rows of the caches at their end
    returns a line on what was chosen and why; None where the user chose, and on a CPU (there the
            statistics say it)
    """
    model, takes = run.model, COMPILE_TAKES["cuda"]
    if run.compile is not None or not model.embed.weight.is_cuda:
        if run.compile:
            model.compile(prefill=prefill)
        return None
    c = model.config
    elements = 2 * tokens * c.n_kv_heads * c.head_dim
    saves = steps * c.n_layers * (SAVED_A_LAYER + SAVED_AN_ELEMENT * elements)
    if interactive:
        reason = "a conversation pays for it"
    elif processes() > 1:
        reason = "several processes need it"
    elif saves >= takes:
        reason = f"it saves about {saves:.0f} s in {steps} steps"
    else:
        return (f"not compiling the decode step: that takes about {takes} s and saves about "
                f"{saves:.1f} s in {steps} steps (--compile does it)")
    model.compile(prefill=prefill)
    return f"compiling the decode step, about {takes} s: {reason} (--no-compile leaves it out)"


def peak_bytes(device):
    """Peak memory so far: of CUDA's allocator, or of the process; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def traffic(model, rows, pace=1):
    """Bytes that decoding must read: weights in every step, each row's cache at its middle length.

    rows  [(tokens before the first step, steps)]; pace: tokens that a step brings
    """
    total = weights_read(model) * max(steps for _, steps in rows)
    for before, steps in rows:
        total += steps * kv_read(model, before + 1 + int(steps * pace) // 2)
    return total


def pace(stats):
    """Tokens that a step of a row brings: with drafts more than one."""
    return stats["row_tokens"] / stats["row_steps"] if stats["row_steps"] else 1


def decoded(run, stats, rows):
    """(tokens, bytes that had to be read) of the steps whose time is decode_s. Of steps that
    brought several tokens the rows' shares are estimates.

    stats  of `generate.generate`; rows: [(tokens of the prompt, new tokens)]
    """
    skipped, a_step = stats["compile_steps"], pace(stats)
    rows = [(before + int(skipped * a_step), max(0, round((new - 1) / a_step) - skipped))
            for before, new in rows]
    moved = traffic(run.model, rows, a_step)
    if run.draft:  # a step of it for every draft, and one behind them
        more = 1 + stats["proposed"] / max(1, stats["row_steps"])
        smaller = [(before, int(steps * more)) for before, steps in rows]
        moved += traffic(run.draft, smaller, a_step / more)
    return round(a_step * sum(steps for _, steps in rows)), moved


def roofline(rate, device):
    """The share of the memory's bandwidth that a rate in GB/s is; None where it is not known."""
    if not rate or device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    peak = 2 * gpu.memory_clock_rate * gpu.memory_bus_width / 8e6  # twice a cycle; kHz and bits
    if "MIG" in gpu.name or not peak:  # a part of a GPU, or a driver that does not tell
        return None
    return rate / peak


def statistics(run, shape, rows, stats, decoded, moved):
    """The numbers of a run, as its JSON object holds them; None where nothing was computed.

    shape    batch and capacity of the caches
    rows     [(tokens of the prompt, new tokens)]
    stats    of `generate.generate`
    decoded  tokens of the decode steps in decode_s; moved: bytes that they read
    """
    device = run.model.embed.weight.device
    prefill_s, decode_s = stats["prefill_s"], stats["decode_s"]
    rate = moved / decode_s / 1e9 if decoded else None
    return {
        "prompt_tokens": sum(before for before, _ in rows),
        "prefill_tokens": stats["prefilled"],  # not those that the caches held
        "new_tokens": sum(new for _, new in rows),
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "tokens_per_s": decoded / decode_s if decoded else None,
        "kv": run.kv,
        "kv_bytes": cache_bytes(run.model),
        "kv_bytes_full": sum(cache_parts(run.model, *shape, "bf16").values()),
        "peak_bytes": peak_bytes(device),
        "compile_s": stats["compile_s"],
        "prefill_tokens_per_s": stats["prefilled"] / prefill_s if prefill_s else None,
        "decode_gb_per_s": rate,
        "roofline": roofline(rate, device),
        "proposed_drafts": stats["proposed"],
        "accepted_drafts": stats["row_tokens"] - stats["row_steps"],  # none behind a text's end
        "tokens_per_step": pace(stats),
    }


def pays_from(run):
    """The length from which a cache of that capacity is smaller than its tokens are exactly."""
    c, itemsize = run.model.config, run.model.embed.weight.dtype.itemsize
    exact = 2 * c.n_layers * c.n_kv_heads * c.head_dim * itemsize  # bytes of a token

    def saves_nothing(n_tokens):
        parts = cache_parts(run.model, 1, n_tokens, run.kv, **run.options)
        return sum(parts.values()) >= n_tokens * exact

    return largest(2**20, saves_nothing) + 1


def remarks(run, length):
    """What explains the statistics of a run whose longest row reached `length` tokens."""
    text = ""
    config = run.model.kv_configs(run.kv, **run.options)[0]
    is_kivi = type(config) is KVConfig
    if is_kivi and (length - 1) // config.residual * config.residual <= config.sink:
        text += ("; all tokens still lie in the exact window: "
                 f"{config.v_bits} bits pay from about {pays_from(run)} tokens")
    if not run.model.compiled and run.compile is None:
        seconds = COMPILE_TAKES["cuda" if run.model.embed.weight.is_cuda else "cpu"]
        text += f"; steps ran uncompiled, which is slower: --compile first takes about {seconds} s"
    return text


def format_stats(result, cache, compiled):
    """The statistics as one line. `cache` names the cache's kind."""
    line = f"{result['prompt_tokens']} prompt tokens"
    if result["prefill_tokens"] < result["prompt_tokens"]:
        line += f", {result['prefill_tokens']} of them read"
    line += f" in {result['prefill_s']:.2f} s"
    if result["prefill_tokens_per_s"]:
        line += f" ({result['prefill_tokens_per_s']:.0f} tokens/s)"
    line += f", {result['new_tokens']} new tokens"
    if result["tokens_per_s"]:
        line += (f" in {result['decode_s']:.2f} s: {result['tokens_per_s']:.1f} tokens/s, "
                 f"{result['decode_gb_per_s']:.1f} GB/s")
    if result["roofline"]:
        line += f" ({result['roofline']:.0%} of the memory's)"
    if result["proposed_drafts"]:
        line += (f", {result['accepted_drafts']} of {result['proposed_drafts']} drafts accepted, "
                 f"{result['tokens_per_step']:.2f} tokens a step")
    if result["compile_s"]:
        done = "compiling" if compiled else "capturing CUDA graphs"
        line += f", after {done} for {result['compile_s']:.1f} s"
    line += (f"; {cache} cache {result['kv_bytes'] / 2**20:.2f} MiB "
             f"(full precision {result['kv_bytes_full'] / 2**20:.2f} MiB)")
    if result["peak_bytes"]:
        line += f", peak memory {result['peak_bytes'] / 2**20:.0f} MiB"
    return line


def profile(file, new_tokens):
    """A profiler that writes a chrome trace of PROFILED decode steps to `file`.

    Its `step` is called with every new token. raises ValueError: so many are not asked for
    """
    if new_tokens < WAIT + PROFILED:
        raise ValueError(f"--profile needs {WAIT + PROFILED} new tokens, this run makes "
                         f"{new_tokens}: raise --max-new-tokens or shorten the prompt")

    def write(profiler):
        if rank() == 0:  # one file, not one a process
            # The library would replace a link by a file, and tells no error.
            with TemporaryDirectory() as folder:
                trace = Path(folder) / Path(file).name
                profiler.export_chrome_trace(str(trace))
                Path(file).write_bytes(trace.read_bytes())

    schedule = torch.profiler.schedule(wait=WAIT - 2, warmup=1, active=PROFILED, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def tell_profiled(file, new_tokens):
    """Tells how many steps are in the profile of a text. raises ValueError: none"""
    steps = min(PROFILED, new_tokens - WAIT + 1)
    if steps < 1:
        raise ValueError(f"the text ended after {new_tokens} tokens, before the steps that "
                         "--profile records: try another --prompt or --seed")
    tell(f"{steps} decode steps are in {file} (https://ui.perfetto.dev opens it); "
         "the times below count the profiler's own")
