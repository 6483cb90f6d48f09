"""Text generation with a KIVI cache: `python generate.py` writes English with the checkpoint in tiny/.

The device half of decoding (`Decoder`) never waits for the host: the sampled token feeds the next step on the device, the
host reads it one step later. On CUDA every step is one CUDA graph, one for each bucket of the filled length.
"""
import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from kivi import FullCache
from model import Transformer

EMBEDDED = Path(__file__).resolve().parent / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {  # short names of checkpoints on the hub
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}


# ---- checkpoints --------------------------------------------------------------------------------------------------------

def resolve(checkpoint=None):
    """Folder of a checkpoint: the embedded one when omitted, an existing folder, a short name or a hub id (downloaded once).

    raises ValueError: neither; the hub refuses it or cannot be reached
    """
    if checkpoint is None:
        return EMBEDDED
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    repo = SHORT.get(checkpoint.lower(), checkpoint)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise ValueError(f"checkpoint {checkpoint!r} is no folder, no hub id (owner/name) and none of: {', '.join(SHORT)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))
    except GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its licence on its hub page, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo} (or it is private: set HF_TOKEN)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"cannot download {repo}: {str(error).splitlines()[0]}") from None


def load(checkpoint=None, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a checkpoint: folder, hub id, short name, or the embedded one when omitted."""
    folder = resolve(checkpoint)
    model = Transformer.from_pretrained(folder, device, dtype)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: save the tokenizer in its fast form (tokenizer.json) beside the weights")
    try:
        return model, Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is no valid tokenizer: {error}") from None


# ---- sampling and the decode loop ---------------------------------------------------------------------------------------

def sample(logits, temperature=0.0, top_k=None, top_p=None):
    """Next token of each row: logits [B, V] -> [B]. Temperature 0 is the argmax. No sync, so a CUDA graph can hold it."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the first token always stays
        probs = probs.scatter(-1, order, ordered.masked_fill(drop, 0))
    # Exponential noise and argmax draw from probs without the sync that torch.multinomial needs.
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


class Decoder:
    """One decode step a call, with `model`'s caches filled by a prefill: reads and replaces `token` [B, 1] on the device."""

    def __init__(self, model, token, graphs=None, **sampling):
        self.model, self.token, self.sampling = model, token.clone(), sampling
        self.graphs = {} if (token.is_cuda if graphs is None else graphs) else None
        self.pool = None

    def _step(self, blocks):
        self.token.copy_(sample(self.model.decode(self.token, blocks), **self.sampling)[:, None])

    def __call__(self):
        cache = self.model.cache
        cache.advance()
        blocks = cache.blocks(cache.length)
        if self.graphs is None:
            self._step(blocks)
        else:
            self._replay(cache.blocks(cache.length, bucket=True))
        if cache.due():
            self.model.flush()

    def _replay(self, blocks):
        """Replays the step's graph for this many blocks, captured at its first use."""
        key = len(blocks)
        if key not in self.graphs:
            token, pos = self.token.clone(), self.model.cache.pos.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles; a repeated step writes the same bytes to the same places
                self._step(blocks)
            torch.cuda.current_stream().wait_stream(stream)
            self.token.copy_(token), self.model.cache.pos.copy_(pos)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
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
def generate(model, tokens, max_new_tokens, temperature=0.0, *, top_k=None, top_p=None, kv=None, stop=None, on_token=None,
             stats=None, **options):
    """Continues prompts by up to `max_new_tokens` tokens; a row ends early with a token of `stop` (the model's EOS ids).

    tokens    [B, L] integers, or a list of B lists of unequal lengths
    kv        name of the cache to set up, with `options` (see Transformer.setup_caches); None keeps the caches that
              `setup_caches` made if they fit the batch, else "kivi2"
    on_token  called with the list of the B newest tokens after every step
    stats     dict that receives prefill_s, decode_s (seconds) and steps
    returns   the same form as `tokens`, prompt included: [B, L + n] (an early row repeats its last token), or lists
    """
    ragged = not torch.is_tensor(tokens)
    rows = [list(r) for r in tokens] if ragged else tokens.tolist()
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: give at least one token (the beginning-of-text token will do)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    B, lengths = len(rows), [len(r) for r in rows]
    device = model.embed.weight.device
    capacity = max(lengths) + max_new_tokens
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
    token = sample(model.prefill(padded, lengths), temperature, top_k, top_p)[:, None]
    decoder, mail = Decoder(model, token, temperature=temperature, top_k=top_k, top_p=top_p), Mailbox()
    mail.post(token)
    if token.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    done, n = [False] * B, 0
    new = [[] for _ in rows]
    while n < max_new_tokens:
        n += 1
        if n < max_new_tokens:
            decoder()
            mail.post(decoder.token)
        newest = mail.read()
        for row, t in enumerate(newest):
            if not done[row]:
                new[row].append(t)
                done[row] = t in stop
        if on_token:
            on_token(newest)
        if all(done):
            break
    if stats is not None:
        stats.update(prefill_s=begin - start, decode_s=time.perf_counter() - begin, steps=n - 1)
    out = [r + x for r, x in zip(rows, new)]
    if ragged:
        return out
    longest = max(map(len, out))
    return torch.tensor([r + r[-1:] * (longest - len(r)) for r in out], device=tokens.device)


# ---- command line -------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # what was generated so far has been printed


def parser():
    p = argparse.ArgumentParser(description="Generate text with a low-bit KV cache (KIVI).")
    p.add_argument("--checkpoint", help="folder, hub id or short name (default: the embedded tiny/)")
    p.add_argument("--kv", default="kivi2", help="bf16 (full precision), kivi2, kivi2+, kivi4, k4v2 or kvtuner:FILE (default kivi2)")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", help='text to continue (default "Once upon a time")')
    source.add_argument("--prompt-file", help="file with the text to continue")
    source.add_argument("--interactive", action="store_true", help="read prompts line by line until end of input")
    p.add_argument("--max-new-tokens", type=int, help="default 200, or what the context leaves")
    p.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--group-size", type=int, help="G, elements that share scale and zero (default 32)")
    p.add_argument("--residual", type=int, help="R, recent tokens in full precision (default 128)")
    p.add_argument("--sink", type=int, help="S, first tokens in full precision (default 0)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on cuda, float32 on cpu")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the decode step (default on cuda)")
    p.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    return p


def run(args):
    for name, low, high in (("temperature", 0, 100), ("top_k", 1, 10**9), ("top_p", 0, 1), ("max_new_tokens", 1, 10**9)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {low} .. {high}, got {value}")
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    prompt = Path(args.prompt_file).read_text(encoding="utf-8") if args.prompt_file else args.prompt
    model, tokenizer = load(args.checkpoint, device, dtype)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
    if not args.interactive:
        return answer(model, tokenizer, "Once upon a time" if prompt is None else prompt, args)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        if prompt:
            answer(model, tokenizer, prompt, args)


def answer(model, tokenizer, prompt, args):
    """Streams the continuation of one prompt to stdout, then prints the statistics to stderr (and JSON to stdout)."""
    torch.manual_seed(args.seed)
    ids = tokenizer.encode(prompt).ids
    new = args.max_new_tokens or max(1, min(200, model.config.max_len - len(ids)))
    options = {k: getattr(args, k) for k in ("group_size", "residual", "sink") if getattr(args, k) is not None}
    model.setup_caches(1, len(ids) + new, args.kv, **({} if args.kv == "bf16" else options))
    stream, text, stats = DecodeStream(ids=ids), [], {}

    def show(newest):
        if newest[0] not in model.config.eos:
            piece = stream.step(tokenizer, newest[0]) or ""
            text.append(piece)
            print(piece, end="", flush=True)

    print(prompt, end="", flush=True)
    out = generate(model, [ids], new, args.temperature, top_k=args.top_k, top_p=args.top_p, on_token=show, stats=stats)
    print()
    c, count = model.config, len(out[0]) - len(ids)
    result = {
        "text": "".join(text), "prompt_tokens": len(ids), "new_tokens": count,
        "prefill_s": stats["prefill_s"], "decode_s": stats["decode_s"],
        "tokens_per_s": stats["steps"] / stats["decode_s"] if stats["steps"] else None,
        "kv": args.kv, "kv_bytes": sum(layer.cache.nbytes for layer in model.layers),
        "kv_bytes_full": c.n_layers * FullCache.bytes(1, c.n_kv_heads, len(ids) + new, c.head_dim, model.embed.weight.dtype),
        "peak_bytes": peak_bytes(model.embed.weight.device),
    }
    speed = f"{result['tokens_per_s']:.1f} tokens/s" if stats["steps"] else "one token"
    print(f"{len(ids)} prompt tokens in {stats['prefill_s']:.2f} s, {count} new tokens, decoding {speed}; {args.kv} cache "
          f"{result['kv_bytes'] / 2**20:.2f} MiB (full precision {result['kv_bytes_full'] / 2**20:.2f} MiB), "
          f"peak memory {result['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr)
    if args.json:
        print(json.dumps(result))


def peak_bytes(device):
    """Peak memory so far: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
