"""The command line of generate.py."""
import argparse

import torch

import generate
from checkpoint.hub import resolve
from checkpoint.text import chat_template, read_text
from neighbours.predict import predict_layers
from neighbours.skip import skip_layers
from program import saved
from program.batch import answer_all
from program.chat import Answer, Past, Run, converse
from program.console import Parser, check_writable, guarded, note, tell
from program.parallel import join, processes, rank
from program.report import PROFILED, compile_if_it_pays, note_loading

EXAMPLES = """examples:
  python generate.py                                                           English from tiny/
  python generate.py --checkpoint smollm2-135m-instruct --chat --interactive   a conversation
  python generate.py --checkpoint llama-2-7b --prompts file.jsonl --json       many prompts at once
"""
RANGES = {
    "temperature": (0, 100),
    "top_k": (1, 10**9),
    "top_p": (0, 1),
    "max_new_tokens": (1, 10**9),
    "batch_size": (1, 10**6),
    "memory_gb": (0, 10**6),
    "sink": (0, 10**9),
    "seed": (-2**63, 2**64 - 1),
    "speculate": (1, 15),
}
NEEDS = {"system": "chat", "prefix": "prompts", "draft": "speculate"}  # options that need another
APART = [("save_cache", "prompts"), ("load_cache", "system"),
         *(("profile", other) for other in ("speculate", "prompts", "interactive")),
         *(("skip", other) for other in ("speculate", "interactive", "prefix", "save_cache",
                                         "load_cache"))]
OTHER_TEXTS = ("interactive", "prompts", "save_cache", "load_cache")  # also decide a capacity


def main(argv=None):
    guarded(start, argv)


def start(argv):
    args = parser().parse_args(argv)
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {low} .. {high}, got {value}")
    check_options(args)
    if args.interactive and processes() > 1:
        raise ValueError(f"--interactive reads from one process, torchrun started {processes()}")
    device = usable_device(args.device, args.dtype)
    dtype = generate.DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    prompt = args.prompt
    if args.prompt_file:
        prompt = read_text(args.prompt_file).removesuffix("\n")  # editors put one there
    folder = resolve(args.checkpoint, args.revision)
    render = chat_template(folder) if args.chat else None
    cache = saved.load(args.load_cache) if args.load_cache else None
    before = [{"role": "system", "content": args.system}] if args.system is not None else []
    prefix = read_text(args.prefix) if args.prefix else ""
    shared = {"device": device, "dtype": dtype, "ranks": (rank(), processes())}
    model, tokenizer = generate.load(folder, weights=args.weights, progress=note_loading, **shared)
    if args.skip:
        skip_layers(model, args.skip)
    if args.predict:
        predict_layers(model, args.predict)
    draft = load_draft(args.draft, tokenizer, **shared) if args.draft else None
    note()
    options = {"group_size": args.group_size, "residual": args.residual, "sink": args.sink}
    options = {name: value for name, value in options.items() if value is not None}
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    run = Run(model, tokenizer, render, args.kv, options, sampling, args.seed,
              args.max_new_tokens, args.memory_gb, args.compile, args.json,
              cache.messages if cache else before, prefix, args.stop, args.speculate, draft)
    check_capacities(args, model.kv_configs(args.kv, **options))
    if cache:
        saved.check(cache, run)
    past = Past(run, cache, args.interactive)
    if args.prompts:
        answer_all(run, args.prompts, args.batch_size, past, bool(cache or args.prefix))
        return
    ids = [] if args.interactive else past.respelled(run.encode(prompt))
    steps = run.new_tokens(ids)
    why = compile_if_it_pays(run, steps, len(ids) + steps, args.interactive)
    if args.interactive:
        tell(why)
        messages = converse(run, past)
    else:
        answer = Answer(run, past, ids, "" if args.chat else prompt)
        answer.give(why, args.profile)
        messages = [*run.before, {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer.stream.text}]
    if args.save_cache:
        if not past.decoder:
            raise ValueError(f"{args.save_cache} is not written: no answer was finished last")
        saved.save(args.save_cache, run, past.tokens, messages)


def check_options(args):
    """Raises ValueError for options that do not go together."""
    for name, other in NEEDS.items():
        if getattr(args, name) is not None and not getattr(args, other):
            raise ValueError(f"--{name} goes with --{other}: add that, or leave out --{name}")
    for pair in APART:
        if all(getattr(args, name) for name in pair):
            one, other = (f"--{name.replace('_', '-')}" for name in pair)
            raise ValueError(f"{one} and {other} do not go together: leave out one of them")
    if (args.save_cache or args.load_cache) and processes() > 1:
        raise ValueError("saved caches are of one process: leave out torchrun")
    for file in filter(None, (args.save_cache, args.profile)):
        check_writable(file)


def check_capacities(args, configs):
    """Raises ValueError for caches of a share of the capacity, where other texts decide that."""
    for name in OTHER_TEXTS:
        if getattr(args, name) and any(getattr(c, "by_capacity", False) for c in configs):
            raise ValueError(f"--{name.replace('_', '-')} lets other texts decide the capacity, of "
                             f"which --kv {args.kv} holds a share: use h2o:slots=N or another --kv")


def load_draft(name, tokenizer, **options):
    """The small model of that name. raises ValueError: it has another tokenizer"""
    draft, other = generate.load(name, progress=note_loading, **options)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--draft {name} has another vocabulary: "
                         "choose a model with the same tokenizer")
    return draft


def usable_device(name, dtype=None):
    """The device of that name, or this process's own. raises ValueError: it cannot be used"""
    try:
        device = torch.device(name)
        if processes() > 1:
            device = join(device, dtype)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # streams and graphs belong to the current one
    except (RuntimeError, AssertionError, AttributeError) as error:  # the last without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def batch_size(text):
    return None if text == "auto" else int(text)


def parser():
    p = Parser(
        description="Generate text with a low-bit KV cache (KIVI).", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("model").add_argument
    add("--checkpoint", help="folder, hub id or short name (default: the embedded tiny/)")
    add("--revision", help="branch, tag or commit of a hub id (default: its main branch)")
    add("--weights", help="quantize the linear weights while loading: int8, int4 (groups of 32) "
        "or int4:G with G = 32, 64 or 128")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=generate.DTYPES, help="default bfloat16 on cuda, float32 on cpu")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the decode step (default: on cuda, where it pays for the tokens asked for)")
    add("--predict", metavar="FILE", help="half of the layers read prompts: KV Prediction, fitted")
    add("--skip", metavar="HIGH:LOW", help="fewer layers for later tokens: SkipDecode, if trained")
    add = p.add_argument_group("cache").add_argument
    add("--kv", default="kivi2", help="bf16 (full precision: the model's own dtype), kivi2, "
        "kivi2+, kivi2-, kivi4, k4v2, kvtuner:FILE or one of docs/neighbours.md (default kivi2)")
    add("--group-size", type=int, help="G, elements that share scale and zero (kivi2: 32)")
    add("--residual", type=int, help="R, recent tokens in full precision (kivi2: 128)")
    add("--sink", type=int, help="S, first tokens in full precision (kivi2: 0)")
    add("--save-cache", metavar="FILE", help="write what the cache holds after one prompt or a "
        "conversation; --load-cache goes on from there")
    add("--load-cache", metavar="FILE",
        help="the prompt, the conversation or each of --prompts continues a saved one")
    group = p.add_argument_group("prompt")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", type=str, default="Once upon a time", help="is continued (default %(default)s)")
    add("--prompt-file", help="file with the text to continue, without its last line break")
    add("--prompts", help="file of many prompts, run in batches: one a line, or JSONL with prompt "
        "and, optionally, max_new_tokens; unusable lines are named on stderr and skipped, the exit "
        "status is 0 if any prompt ran")
    add("--interactive", action="store_true", help="read prompts line by line until end of input; "
        "each continues the text so far")
    add = group.add_argument
    add("--chat", action="store_true",
        help="prompts are messages, put into the checkpoint's own chat template")
    add("--system", type=str, metavar="TEXT", help="--chat: a system message in front")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end an answer where this text appears, without it; may be given several times")
    add("--prefix", metavar="FILE",
        help="--prompts: a text in front of every prompt, which is read once")
    add("--batch-size", type=batch_size,
        help="--prompts: rows that run together (default auto: as many as fit)")
    add("--memory-gb", type=float, help="GiB of weights, cache and activations (default: all free)")
    add = p.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=int, help="default 200, or what the context leaves")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--speculate", type=int, metavar="N", help="verify up to N drafts a step, 1 .. 15, which "
        "are found in the text so far; greedy text stays the same but for rounding")
    add("--draft", metavar="CHECKPOINT",
        help="--speculate: drafts come from this small model, which has the same tokenizer")
    add = p.add_argument_group("output").add_argument
    add("--json", action="store_true", help="the last line of stdout is one JSON object; "
        "with --prompts one for every prompt before it")
    add("--profile", metavar="FILE", help=f"write a chrome trace of {PROFILED} decode steps")
    return p
