"""Text generation with a KIVI cache: `python generate.py` writes English with the checkpoint in tiny/.

The device half of decoding (`Decoder`) never waits for the host: the sampled token feeds the next step on the device, the
host reads it one step later. On CUDA every step is one CUDA graph, one for each bucket of the filled length. Many prompts run
in waves of one batch size over the same caches, so that buffers and graphs stay.
"""
import argparse
import gc
import itertools
import json
import os
import resource
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.processors import TemplateProcessing

from kivi import FullCache
from model import ModelConfig, Transformer, read_json

EMBEDDED = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {  # short names of checkpoints on the hub
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "falcon-7b": "tiiuae/falcon-7b",
    "falcon-7b-instruct": "tiiuae/falcon-7b-instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
NEEDED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
          "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]  # some repositories hold all weights twice

BANDWIDTH = {  # name of a device -> GB/s of its memory, as its data sheet says
    "NVIDIA B200": 8000, "NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350, "NVIDIA H100 NVL": 3900, "NVIDIA H100 PCIe": 2000,
    "NVIDIA A100-SXM4-80GB": 2039, "NVIDIA A100 80GB PCIe": 1935, "NVIDIA A100-SXM4-40GB": 1555, "NVIDIA A100-PCIE-40GB": 1555,
    "NVIDIA L40S": 864, "NVIDIA L4": 300, "NVIDIA A10G": 600, "Tesla V100-SXM2-16GB": 900, "Tesla T4": 320,
    "NVIDIA GeForce RTX 5090": 1792, "NVIDIA GeForce RTX 4090": 1008, "NVIDIA GeForce RTX 3090": 936,
}
PROFILED, WAIT = 10, 4  # decode steps of --profile, and those before them: compilation, the profiler's own start


def note(text=""):
    """Shows what takes long in the last line of a terminal, until the next note; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---- checkpoints --------------------------------------------------------------------------------------------------------

def resolve(checkpoint=None, revision=None):
    """Folder of a checkpoint: the embedded one when omitted, an existing folder, a short name or a hub id (downloaded once).

    revision  branch, tag or commit of the hub's repository
    raises ValueError: neither; a revision of a folder; the hub refuses it, or cannot be reached and its cache does not hold it
    """
    if checkpoint is None or Path(checkpoint).is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} needs a checkpoint of the hub, {checkpoint or 'the embedded one'} is a folder")
        return EMBEDDED if checkpoint is None else Path(checkpoint)
    repo = SHORT.get(str(checkpoint).lower(), str(checkpoint))
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise ValueError(f"checkpoint {str(checkpoint)!r} is no folder, no hub id (owner/name) and none of: {', '.join(SHORT)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=NEEDED))
    except GatedRepoError:
        raise ValueError(f"{repo} is gated: ask for access on https://huggingface.co/{repo}, then set HF_TOKEN to a token of that "
                         "account (https://huggingface.co/settings/tokens)") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo} (or it is private: set HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo} has no revision {revision!r}: see https://huggingface.co/{repo}/tree/main") from None
    except LocalEntryNotFoundError as error:
        if getattr(error, "snapshot_path", None):  # not every file that the hub lists; the loader says so if it matters
            return Path(error.snapshot_path)
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(f"{repo}{at} is not in the hub's cache and the hub cannot be reached: download it with a connection once, "
                         "or give a folder") from None
    except Exception as error:  # whatever its HTTP library raises, too
        raise ValueError(f"cannot download {repo}: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def load(checkpoint=None, device="cpu", dtype=torch.float32, revision=None, weights=None, ranks=(0, 1)):
    """(model, tokenizer) of a checkpoint: folder, hub id, short name, or the embedded one when omitted; the rest as in `Transformer.from_pretrained`."""
    folder = resolve(checkpoint, revision)
    ModelConfig.from_folder(folder)  # what is wrong with it should be known first, and the weights take longest
    file = folder / "tokenizer.json"
    if not file.exists():
        slow = (folder / "tokenizer.model").exists()
        raise ValueError(f"{file} does not exist{', only tokenizer.model' if slow else ''}: write it with transformers, "
                         "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is no valid tokenizer: {error}") from None
    _begin(tokenizer, folder)
    try:
        return Transformer.from_pretrained(folder, device, dtype, weights, lambda share: note(f"loading the weights: {share:.0%}"), ranks), tokenizer
    finally:
        note()


def _begin(tokenizer, folder):
    """Lets the tokenizer put BOS before a text as tokenizer_config.json says, where it says so and tokenizer.json does not agree."""
    config, special = _tokenizer_config(folder)
    token, wanted = special.get("bos_token", ""), config.get("add_bos_token")
    bos = tokenizer.token_to_id(token)
    if bos is not None and isinstance(wanted, bool) and wanted != (bos in tokenizer.encode("").ids):
        tokenizer.post_processor = TemplateProcessing(single=[token] * wanted + ["$A"], special_tokens=[(token, bos)])


def _tokenizer_config(folder):
    """tokenizer_config.json ({} without one) and its special tokens: {"bos_token": "<s>", ..}."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items() if name.endswith("_token")}
    return config, {name: token for name, token in tokens.items() if isinstance(token, str)}


def chat_template(folder):
    """The checkpoint's own chat template: a function of messages [{"role": .., "content": ..}, ..] that returns the prompt's text.

    raises ValueError: it has none, or (when called) one that fails; it runs in jinja2's sandbox, which bounds what it can
    reach, but neither its time nor its memory
    """
    import jinja2.sandbox

    config, special = _tokenizer_config(folder)
    file, source = folder / "chat_template.jinja", config.get("chat_template")
    if file.exists():
        source = file.read_text(encoding="utf-8")
    elif isinstance(source, list):  # several, by name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template: leave out --chat, or choose an instruct model")

    def refuse(message):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    def render(messages):
        try:
            return sandbox.from_string(source).render(messages=messages, add_generation_prompt=True, **special)
        except Exception as error:  # it is a program, and can fail as it likes
            raise ValueError(f"the chat template of {folder} fails: {type(error).__name__}: {error}") from None

    return render


# ---- sampling and the decode loop ---------------------------------------------------------------------------------------

def sample(logits, temperature=0.0, top_k=None, top_p=None):
    """Next token of each row: logits [B, V] -> [B]. Temperature 0 is the argmax. No sync, so a CUDA graph can hold it."""
    if temperature < 1e-5:  # logits over less would overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        drop[..., 0] = False  # the first token always stays
        probs = probs.scatter(-1, order, ordered.masked_fill(drop, 0))
    # Exponential noise and argmax draw from probs without the sync that torch.multinomial needs.
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


side_stream = lru_cache(torch.cuda.Stream)  # of a device, always the same: the library keeps a workspace, 32 MB on a Hopper, for every stream that multiplies


class Decoder:
    """One decode step a call, with `model`'s caches filled by a prefill: reads and replaces `token` [B, 1] on the device."""

    def __init__(self, model, token, graphs=None, **sampling):
        self.model, self.token, self.sampling = model, token.clone(), sampling
        self.graphs = {} if (token.is_cuda if graphs is None else graphs) else None
        self.pool = None
        self.started, self.compile_s, self.compile_steps = False, 0.0, 0  # what compilations and captures take, in steps of their own

    def _step(self, blocks):
        self.token.copy_(sample(self.model.decode(self.token, blocks), **self.sampling)[:, None])

    def __call__(self):
        cache = self.model.cache
        cache.advance()
        blocks = cache.blocks(cache.length, bucket=self.graphs is not None)
        new = not self.started and self.model.compiled if self.graphs is None else len(blocks) not in self.graphs
        begin, first, self.started = time.perf_counter(), not self.started, True
        if new and first:  # later it would be in the middle of the text
            note("compiling the decode step ...")
        if self.graphs is None:
            self._step(blocks)
        else:
            self._replay(blocks)
        if cache.due() or new:  # what is not due stays as it is, but the compilation should be over
            self.model.flush()
        if new:
            if self.token.is_cuda:
                torch.cuda.synchronize()
            if first:
                note()
            self.compile_s += time.perf_counter() - begin
            self.compile_steps += 1

    def _replay(self, blocks):
        """Replays the step's graph for this many blocks, captured at its first use."""
        key = len(blocks)
        if key not in self.graphs:
            token, pos = self.token.clone(), self.model.cache.pos.clone()
            stream = side_stream(token.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles; a repeated step writes the same bytes to the same places
                self._step(blocks)
            torch.cuda.current_stream().wait_stream(stream)
            self.token.copy_(token), self.model.cache.pos.copy_(pos)
            graph = torch.cuda.CUDAGraph()
            # NCCL's own thread asks for events meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local" if processes() > 1 else "global"):
                self._step(blocks)
            self.pool = graph.pool()
            self.graphs[key] = graph
        self.graphs[key].replay()


class Mailbox:
    """Tokens on their way to the host: `post` now, `read` a step later, so that the device never idles for the host."""

    def __init__(self):
        self.queue = []

    def post(self, token):
        if token.is_cuda:
            host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            host.copy_(token, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.queue.append((host, event))
        else:
            self.queue.append((token.clone(), None))

    def read(self):
        host, event = self.queue.pop(0)
        if event is not None:
            event.synchronize()
        return host.flatten().tolist()


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.0, *, top_k=None, top_p=None, kv=None, stop=None, on_token=None, on_row=None,
             stats=None, decoder=None, **options):
    """Continues prompts by up to `max_new_tokens` tokens; a row ends early with a token of `stop` (the model's EOS ids).

    tokens          [B, L] integers, or a list of B lists of unequal lengths
    max_new_tokens  one number, or one a row; 0 makes the row a dummy that only fills the batch
    kv              name of the cache to set up, with `options` (see Transformer.setup_caches); None keeps the caches that
                    `setup_caches` made if they fit the batch, else "kivi2"
    on_token        called with the list of the B newest tokens after every step
    on_row          called with (row, its new tokens) as soon as a row ends
    stats           dict that receives prefill_s, decode_s (seconds) and steps; compile_s and compile_steps, which the two before do not
                    count: the steps that compiled or captured a CUDA graph
    decoder         the Decoder of an earlier call on the same caches, whose CUDA graphs stay valid; it brings its own sampling
    returns         the same form as `tokens`, prompt included: [B, L + n] (an early row repeats its last token), or lists
    """
    ragged = not torch.is_tensor(tokens)
    rows = [list(r) for r in tokens] if ragged else tokens.tolist()
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: give at least one token (the beginning-of-text token will do)")
    if not 0 <= min(map(min, rows)) <= max(map(max, rows)) < model.config.vocab_size:
        raise ValueError(f"a prompt holds token {max(map(max, rows))}, the model's vocabulary ends at {model.config.vocab_size - 1}: "
                         "is it the model's own tokenizer?")
    B, lengths = len(rows), [len(r) for r in rows]
    limits = [max_new_tokens] * B if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != B or max(limits) < 1 or min(limits) < 0:
        raise ValueError(f"max_new_tokens must be at least 1, one number or one for each of {B} rows, got {max_new_tokens}")
    device = model.embed.weight.device
    capacity = max(n + m for n, m in zip(lengths, limits))
    if kv is not None or model.cache is None or model.cache.batch != B:
        model.setup_caches(B, capacity, kv or "kivi2", **options)
    elif capacity > model.cache.max_len:
        raise ValueError(f"{capacity} tokens exceed the cache's capacity of {model.cache.max_len}")
    else:
        for layer in model.layers:
            layer.cache.reset()
    padded = torch.tensor([r + [0] * (max(lengths) - len(r)) for r in rows], device=device)
    stop = set(model.config.eos if stop is None else stop)

    start = time.perf_counter()
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if decoder is None else decoder.sampling
    token = sample(model.prefill(padded, lengths), **sampling)[:, None]
    decoder = decoder or Decoder(model, token, **sampling)
    decoder.token.copy_(token)
    compile_s, compile_steps = decoder.compile_s, decoder.compile_steps
    mail = Mailbox()
    mail.post(token)
    if token.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    done, n = [m == 0 for m in limits], 0
    new = [[] for _ in rows]
    while n < max(limits):
        n += 1
        if n < max(limits):
            decoder()
            mail.post(decoder.token)
        newest = mail.read()
        for row, t in enumerate(newest):
            if not done[row]:
                new[row].append(t)
                done[row] = t in stop or n == limits[row]
                if done[row]:
                    if n < max(limits):
                        model.cache.park(row)
                    if on_row:
                        on_row(row, new[row])
        if on_token:
            on_token(newest)
        if all(done):
            break
    if stats is not None:
        compile_s, compile_steps = decoder.compile_s - compile_s, decoder.compile_steps - compile_steps
        stats.update(prefill_s=begin - start, decode_s=time.perf_counter() - begin - compile_s, steps=max(0, n - 1 - compile_steps),
                     compile_s=compile_s, compile_steps=compile_steps)
    out = [r + x for r, x in zip(rows, new)]
    if ragged:
        return out
    longest = max(map(len, out))
    return torch.tensor([r + r[-1:] * (longest - len(r)) for r in out], device=tokens.device)


# ---- memory -------------------------------------------------------------------------------------------------------------

def free_bytes(device):
    """Bytes that this process can still allocate on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None


def size(n):
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


SAFE = 0.97  # share of the free memory that a batch is chosen for: allocators round up and fragment


def largest(high, fits):
    """The largest n of 0 .. high with fits(n), where fits is true up to some n and false beyond."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def reserve(model, batch, most, prompt, capacity, args, options):
    """The batch to use: `batch`, or where it is None the largest of up to `most` rows that fits.

    prompt, capacity  tokens of the longest prompt, and of a row at its end
    raises            ValueError, naming the largest batch or capacity that fits, before anything is allocated
    """
    need = lambda B, n: model.memory(B, min(prompt, n), n, args.kv, **options)
    free = free_bytes(model.embed.weight.device)
    if free is not None:  # the weights are loaded already, and caches of a run before this one will be replaced
        free += need(1, capacity)["weights"] + (0 if model.cache is None else sum(layer.cache.nbytes for layer in model.layers))
    if processes() > 1 and free is not None:  # all must choose the same batch
        least = torch.tensor(float(free), device=model.embed.weight.device, dtype=torch.float64)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free = int(least)
    if args.memory_gb is not None:
        free = min(free or float("inf"), args.memory_gb * 2**30)
    fits = lambda B, n, share=1.0: free is None or sum(need(B, n).values()) <= share * free
    if batch is None:
        batch = max(1, largest(most, lambda B: fits(B, capacity, SAFE)))
    parts = need(batch, capacity)
    total = sum(parts.values())
    if not fits(batch, capacity):
        B = largest(batch, lambda B: fits(B, capacity)) if batch > 1 else 0
        n = largest(capacity, lambda n: fits(1, n))
        best = f"a batch of {B} fits" if B else f"{n} tokens fit, prompt included" if n else "not even the weights and one token fit"
        raise ValueError(f"a batch of {batch} with {capacity} tokens a row needs {size(total)}, {size(free)} are free: {best}")
    if args.prompts or args.memory_gb is not None:
        names = {"weights": "weights", "codes": "K and V" if args.kv == "bf16" else "packed codes"}
        for name, n in (*parts.items(), ("total", total), *([] if free is None else [("free", free)])):
            print(f"  {names.get(name, name):12} {size(n):>12}", file=sys.stderr)
        print(f"batch {batch}, {capacity} tokens a row", file=sys.stderr)
    return batch


def out_of_memory(error):
    named = any(text in str(error) for text in ("out of memory", "can't allocate memory"))  # as other layers of torch say it
    return named or isinstance(error, (torch.OutOfMemoryError, MemoryError))


# ---- many prompts -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    index: int  # of the prompt in its file, from 0
    prompt: str
    ids: list
    limit: int  # new tokens


def read_prompts(file, model, tokenizer, args, render=None):
    """The Jobs of a prompts file: one prompt a line, or JSONL where the first line begins with "{". Empty lines are skipped.

    A line that cannot be used is reported on stderr with its number; it takes an index as well.
    """
    lines = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    jsonl, context, jobs = bool(lines) and lines[0][1].startswith(b"{"), model.config.max_len, []
    for index, (number, line) in enumerate(lines):
        try:
            item = json.loads(line.decode()) if jsonl else {"prompt": line.decode()}
            prompt = item.get("prompt") if isinstance(item, dict) else None
            if not isinstance(prompt, str) or not prompt:
                raise ValueError('no "prompt" with text')
            prompt.encode()  # half of a surrogate pair passes JSON
            ids = encode(tokenizer, [{"role": "user", "content": prompt}], render)
            limit = item.get("max_new_tokens", args.max_new_tokens)
            limit = max(1, min(200, context - len(ids))) if limit is None else limit
            if type(limit) is not int or limit < 1:
                raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {limit!r}")
            if len(ids) + limit > context:
                raise ValueError(f"{len(ids)} tokens and {limit} new ones exceed the model's context of {context}")
            jobs.append(Job(index, prompt, ids, limit))
        except (ValueError, RecursionError) as error:
            print(f"{file}, line {number}, skipped: {' '.join(str(error).split())}", file=sys.stderr)
    if not jobs:
        raise ValueError(f"{file} holds no prompt that can run")
    return jobs


def answer_all(model, tokenizer, args, render=None):
    """Continues the prompts of a file in waves of one batch size and one capacity, and prints the results in the file's order.

    What was finished is printed also when the run ends early.
    """
    torch.manual_seed(args.seed)
    jobs = read_prompts(args.prompts, model, tokenizer, args, render)
    options = cache_options(args)
    capacity, longest = max(len(j.ids) + j.limit for j in jobs), max(len(j.ids) for j in jobs)
    batch = reserve(model, args.batch_size, len(jobs), longest, capacity, args, options)
    results, total = {}, {"prefill_s": 0.0, "decode_s": 0.0, "compile_s": 0.0, "waves": 0, "decoded": 0, "bytes": 0}
    try:
        # The longest first: what does not fit shows at once, and rows of a wave have much the same work.
        queue = sorted(jobs, key=lambda j: -len(j.ids) - j.limit)
        while queue:
            queue = waves(model, queue, batch, capacity, args, options, results, total)
            if queue:
                batch = -(-batch // 2)
                print(f"out of memory: going on with batches of {batch}", file=sys.stderr)
    finally:
        report(model, tokenizer, jobs, results, batch, capacity, total, args)


def waves(model, queue, batch, capacity, args, options, results, total):
    """Runs the jobs of `queue` batch by batch; returns those left when memory ran out."""
    try:
        model.setup_caches(batch, capacity, args.kv, **options)
        token = torch.zeros(batch, 1, dtype=torch.int64, device=model.embed.weight.device)
        decoder = Decoder(model, token, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        for first in range(0, len(queue), batch):
            wave, stats = queue[first : first + batch], {}
            dummies = batch - len(wave)
            keep = lambda row, new: results.setdefault(wave[row].index, new)
            generate(model, [j.ids for j in wave] + [[0]] * dummies, [j.limit for j in wave] + [0] * dummies, on_row=keep, stats=stats,
                     decoder=decoder)
            skip = stats["compile_steps"]
            steps = [(len(j.ids) + skip, max(0, len(results[j.index]) - 1 - skip)) for j in wave]
            total["prefill_s"] += stats["prefill_s"]
            total["decode_s"] += stats["decode_s"]
            total["compile_s"] += stats["compile_s"]
            total["decoded"] += sum(n for _, n in steps)
            total["bytes"] += traffic(model, steps)
            total["waves"] += 1
            print(f"{len(results)} prompts done, wave of {len(wave)}: prefill {stats['prefill_s']:.2f} s, {stats['steps']} steps in "
                  f"{stats['decode_s']:.2f} s", file=sys.stderr)
        return []
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if batch == 1 or processes() > 1:  # the others would wait for this one
            raise ValueError(f"out of memory with a batch of {batch} and {capacity} tokens a row: shorten the prompts or --max-new-tokens") from None
        error.__traceback__ = None  # its frames hold the tensors of the step that failed
    for layer in model.layers:
        layer.cache = None
    decoder = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [j for j in queue if j.index not in results]


def report(model, tokenizer, jobs, results, batch, capacity, total, args):
    """Prints the finished prompts in order, and the statistics of the run (JSON: as the last line)."""
    done = [j for j in jobs if j.index in results]
    for j in done:
        stream, new = DecodeStream(ids=j.ids), results[j.index]
        text = "".join(stream.step(tokenizer, t) or "" for t in new if t not in model.config.eos)
        if args.json:
            print(json.dumps({"index": j.index, "prompt": j.prompt, "text": text, "prompt_tokens": len(j.ids), "new_tokens": len(new)}))
        else:
            print(f"--- {j.index}\n{'' if args.chat else j.prompt}{text}")
    c, decode_s = model.config, total["decode_s"]
    result = {
        "text": "", "prompts": len(jobs), "finished": len(done), "batch_size": batch, "waves": total["waves"],
        "prompt_tokens": sum(len(j.ids) for j in done), "new_tokens": sum(len(results[j.index]) for j in done),
        "prefill_s": total["prefill_s"], "decode_s": decode_s, "tokens_per_s": total["decoded"] / decode_s if total["decoded"] else None,
        "kv": args.kv, "kv_bytes": 0 if model.cache is None else sum(layer.cache.nbytes for layer in model.layers),
        "kv_bytes_full": c.n_layers * FullCache.bytes(batch, c.n_kv_heads, capacity, c.head_dim, model.embed.weight.dtype),
        "peak_bytes": peak_bytes(model.embed.weight.device),
    }
    result |= speeds(result, total["bytes"], total["compile_s"], model.embed.weight.device)
    print(f"{len(done)} of {len(jobs)} prompts in {total['waves']} waves of {batch}: {told(result)}", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    sys.stdout.flush()


EXAMPLES = """examples:
  python generate.py                                                            English from the embedded checkpoint
  python generate.py --checkpoint smollm2-135m-instruct --chat --interactive    a conversation
  python generate.py --checkpoint llama-2-7b --prompts file.jsonl --json        many prompts at once, answers in order
"""


# ---- command line -------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        rank = int(os.environ.get("RANK", 0))
        line = " ".join([f"error: process {rank}:" if rank else "error:", *str(error).split()])
        (sys.__stderr__ if rank else sys.stderr).write(line + "\n")  # at once: several processes may write
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # what was generated so far has been printed
    finally:
        leave()


def parser():
    p = argparse.ArgumentParser(description="Generate text with a low-bit KV cache (KIVI).", epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--checkpoint", help="folder, hub id or short name (default: the embedded tiny/)")
    g.add_argument("--revision", help="branch, tag or commit of a hub id (default: its main branch)")
    g.add_argument("--weights", help="quantize the linear weights while loading: int8, int4 (groups of 32) or int4:G with G = 32, 64 or 128")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on cuda, float32 on cpu")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the decode step (default on cuda)")
    g = p.add_argument_group("cache")
    g.add_argument("--kv", default="kivi2", help="bf16 (full precision), kivi2, kivi2+, kivi4, k4v2 or kvtuner:FILE (default kivi2)")
    g.add_argument("--group-size", type=int, help="G, elements that share scale and zero (default 32)")
    g.add_argument("--residual", type=int, help="R, recent tokens in full precision (default 128)")
    g.add_argument("--sink", type=int, help="S, first tokens in full precision (default 0)")
    g = p.add_argument_group("prompt")
    source = g.add_mutually_exclusive_group()
    source.add_argument("--prompt", help='text to continue (default "Once upon a time")')
    source.add_argument("--prompt-file", help="file with the text to continue")
    source.add_argument("--prompts", help="file of many prompts, run in batches: one a line, or JSONL with prompt and, optionally, max_new_tokens; "
                        "unusable lines are named on stderr and skipped, the exit status is 0 if any prompt ran")
    source.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input; each continues the text so far")
    g.add_argument("--chat", action="store_true", help="prompts are messages, put into the checkpoint's own chat template")
    g.add_argument("--batch-size", type=batch_size, help="--prompts: rows that run together (default auto: as many as fit)")
    g.add_argument("--memory-gb", type=float, help="GiB that weights, cache and activations may take (default: what is free)")
    g = p.add_argument_group("sampling")
    g.add_argument("--max-new-tokens", type=int, help="default 200, or what the context leaves")
    g.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    g.add_argument("--top-k", type=int)
    g.add_argument("--top-p", type=float)
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("output")
    g.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object; with --prompts one for every prompt before it")
    g.add_argument("--profile", metavar="FILE", help=f"write a chrome trace of {PROFILED} decode steps")
    return p


def run(args):
    for name, low, high in (("temperature", 0, 100), ("top_k", 1, 10**9), ("top_p", 0, 1), ("max_new_tokens", 1, 10**9),
                            ("batch_size", 1, 10**6), ("memory_gb", 0, 10**6)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {low} .. {high}, got {value}")
    try:
        device = torch.device(args.device)
        if processes() > 1:
            device = join(device, args)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if args.profile:
        if args.prompts or args.interactive:
            raise ValueError(f"--profile is for one prompt: leave out --{'prompts' if args.prompts else 'interactive'}")
        open(args.profile, "ab").close()  # what cannot be written should be known before the weights are read
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    try:
        prompt = Path(args.prompt_file).read_text(encoding="utf-8") if args.prompt_file else args.prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.prompt_file} is no text in UTF-8: {error}") from None
    folder = resolve(args.checkpoint, args.revision)
    render = chat_template(folder) if args.chat else None
    ranks = (torch.distributed.get_rank(), processes()) if processes() > 1 else (0, 1)
    model, tokenizer = load(folder, device, dtype, weights=args.weights, ranks=ranks)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile(prefill=bool(args.prompts))
    if args.prompts:
        return answer_all(model, tokenizer, args, render)
    if not args.interactive:
        prompt = "Once upon a time" if prompt is None else prompt
        answer(model, tokenizer, encode(tokenizer, [{"role": "user", "content": prompt}], render), args, "" if args.chat else prompt)
        return
    messages = []
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt:
            continue
        messages.append({"role": "user", "content": prompt})
        context = model.config.max_len
        try:
            ids = encode(tokenizer, messages, render)
        except UnicodeEncodeError as error:  # a line that cannot be used does not end the conversation
            print("error:", error, file=sys.stderr)
            messages.pop()
            continue
        while len(ids) + (args.max_new_tokens or min(200, context // 2)) > context and len(messages) > 2:
            print(f"forgetting the oldest turn: the context holds {context} tokens", file=sys.stderr)
            del messages[:2]
            ids = encode(tokenizer, messages, render)
        if len(ids) >= context:
            print(f"error: {len(ids)} tokens leave no room in the context of {context}: a shorter line, please", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer(model, tokenizer, ids, args, "" if args.chat else prompt)})


def processes():
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device, args):
    """Joins the processes of torchrun, which share the model's heads; returns this one's device. Only the first prints."""
    if getattr(args, "interactive", False):
        raise ValueError(f"--interactive reads from one process, torchrun started {processes()}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=5))  # a process that dies must not leave the others waiting
        if backend == "nccl" and getattr(args, "dtype", None) != "float16":  # which PyTorch's direct sums do not have
            sum_directly()
    if torch.distributed.get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")
    return device


def sum_directly():
    """Compiled sums over processes whose GPUs all reach each other's memory go through it: Llama-3.1-8B on two H200, one row, 3.56 instead of 4.03 ms a step."""
    pairs = itertools.permutations(range(processes()), 2)  # all of them, so that every process decides alike
    if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == processes() and all(torch.cuda.can_device_access_peer(*pair) for pair in pairs):
        from torch._inductor import config
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        config._collective.auto_select = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no need to call it": Inductor still asks
            enable_symm_mem_for_group("0")  # the group of all processes


def leave():
    if processes() > 1:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def batch_size(text):
    return None if text == "auto" else int(text)


def cache_options(args):
    return {k: getattr(args, k) for k in ("group_size", "residual", "sink") if getattr(args, k) is not None}


def encode(tokenizer, messages, render=None):
    """Tokens of a conversation: through the chat template `render`, which writes BOS itself, or as one text, a line a turn."""
    text = render(messages) if render is not None else "".join(m["content"] + "\n" * (m["role"] == "assistant") for m in messages)
    text.encode()  # bytes that are no UTF-8 come as halves of surrogate pairs: a ValueError
    return tokenizer.encode(text, add_special_tokens=render is None).ids


def answer(model, tokenizer, ids, args, echo):
    """Streams the continuation of ids to stdout after `echo`, then the statistics to stderr (and JSON to stdout); returns the text."""
    torch.manual_seed(args.seed)
    new = args.max_new_tokens or max(1, min(200, model.config.max_len - len(ids)))
    options, capacity = cache_options(args), room(model, len(ids) + new)
    try:
        reserve(model, 1, 1, len(ids), capacity, args, options)
    except ValueError:
        if capacity == len(ids) + new:
            raise
        capacity = len(ids) + new  # without the rounding it may fit
        reserve(model, 1, 1, len(ids), capacity, args, options)
    model.setup_caches(1, capacity, args.kv, **options)
    stream, text, stats = DecodeStream(ids=ids), [], {}
    profiler = profile(args.profile, new) if args.profile else None
    echo = [echo]

    def show(newest):
        if echo:  # only now: before, the line shows the compilation
            print(echo.pop(), end="", flush=True)
        if profiler:
            profiler.step()
        if newest[0] not in model.config.eos:
            piece = stream.step(tokenizer, newest[0]) or ""
            text.append(piece)
            print(piece, end="", flush=True)

    try:
        with profiler or nullcontext():
            out = generate(model, [ids], new, args.temperature, top_k=args.top_k, top_p=args.top_p, on_token=show, stats=stats)
    except KeyboardInterrupt:  # ends an interactive answer, not the program
        if not args.interactive:
            raise
        print()
        return "".join(text)
    print()
    c, count = model.config, len(out[0]) - len(ids)
    if profiler:
        n = min(PROFILED, count - WAIT + 1)
        if n < 1:
            raise ValueError(f"the text ended after {count} tokens, before the steps that --profile records: try another --prompt or --seed")
        print(f"{n} decode steps are in {args.profile} (https://ui.perfetto.dev opens it); the times below count the profiler's own", file=sys.stderr)
    result = {
        "text": "".join(text), "prompt_tokens": len(ids), "new_tokens": count,
        "prefill_s": stats["prefill_s"], "decode_s": stats["decode_s"],
        "tokens_per_s": stats["steps"] / stats["decode_s"] if stats["steps"] else None,
        "kv": args.kv, "kv_bytes": sum(layer.cache.nbytes for layer in model.layers),
        "kv_bytes_full": c.n_layers * FullCache.bytes(1, c.n_kv_heads, capacity, c.head_dim, model.embed.weight.dtype),
        "peak_bytes": peak_bytes(model.embed.weight.device),
    }
    moved = traffic(model, [(len(ids) + stats.get("compile_steps", 0), stats["steps"])])
    result |= speeds(result, moved, stats.get("compile_s", 0.0), model.embed.weight.device)
    print(told(result), file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    return result["text"]


def room(model, n):
    """Capacity of the caches for n tokens. Every capacity is a compilation of its own, so a compiled step gets few: at least 1,024 tokens, then
    four sizes an octave, so that the turns of a conversation share one; never beyond the model's context."""
    if not model.compiled or n > model.config.max_len:
        return n
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return min(model.config.max_len, max(1024, -(-n // step) * step))


def traffic(model, rows):
    """Bytes that decoding must read: the weights in every step, the cache of each row at its middle length.

    rows  [(tokens before the first step, steps)]
    """
    embedding = 0 if model.config.tied else model.embed.weight.nbytes  # one row of it is read
    weights = model.memory(1, 1, 1, "bf16")["weights"] - embedding
    kv = sum(n * layer.cache.traffic(before + 1 + n // 2) for before, n in rows for layer in model.layers)
    return weights * max(n for _, n in rows) + kv


def speeds(result, moved, compile_s, device):
    """What the statistics say about time beside the seconds themselves: None where nothing was decoded or the device is not known."""
    rate = moved / result["decode_s"] / 1e9 if result["tokens_per_s"] else None
    peak = BANDWIDTH.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {"compile_s": compile_s, "prefill_tokens_per_s": result["prompt_tokens"] / result["prefill_s"] if result["prefill_s"] else None,
            "decode_gb_per_s": rate, "roofline": rate / peak if rate and peak else None}


def told(result):
    """The statistics as one line."""
    line = f"{result['prompt_tokens']} prompt tokens in {result['prefill_s']:.2f} s"
    if result["prefill_tokens_per_s"]:
        line += f" ({result['prefill_tokens_per_s']:.0f} tokens/s)"
    line += f", {result['new_tokens']} new tokens"
    if result["tokens_per_s"]:
        line += f" in {result['decode_s']:.2f} s: {result['tokens_per_s']:.1f} tokens/s, {result['decode_gb_per_s']:.1f} GB/s"
    if result["roofline"]:
        line += f" ({result['roofline']:.0%} of the memory's)"
    if result["compile_s"]:
        line += f", after compiling for {result['compile_s']:.1f} s"
    return (f"{line}; {result['kv']} cache {result['kv_bytes'] / 2**20:.2f} MiB (full precision {result['kv_bytes_full'] / 2**20:.2f} MiB), "
            f"peak memory {result['peak_bytes'] / 2**20:.0f} MiB")


def profile(file, new):
    """A profiler that writes a chrome trace of PROFILED decode steps to `file`, fewer if the text ends early; `step` is called with every new token.

    raises ValueError: so many tokens are not asked for
    """
    if new < WAIT + PROFILED:
        raise ValueError(f"--profile needs {WAIT + PROFILED} new tokens, this run makes {new}: raise --max-new-tokens or shorten the prompt")
    schedule = torch.profiler.schedule(wait=WAIT - 2, warmup=1, active=PROFILED, repeat=1)
    write = lambda p: None if int(os.environ.get("RANK", 0)) else p.export_chrome_trace(str(file))  # one file, not one a process
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def peak_bytes(device):
    """Peak memory so far: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
