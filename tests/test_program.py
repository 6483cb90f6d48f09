"""The command line of generate.py: every --kv, wrong input, compilation, conversations."""
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from calling import (
    ENV, FIELDS, ROOT, as_compiled, check_error, command, result_of, run, type_lines,
)
from reference import changed, poisoned, truncated, write_kvtuner

import generate
from kivi import FullCache, KiviCache
from program import report
from program.chat import rounded_capacity
from program.cli import parser
from program.memory import needs

BITS = {  # --kv -> bits of K and V of both layers; None: full precision
    "bf16": None,
    "kivi2": [(2, 2)] * 2,
    "kivi2+": [(2, 2)] * 2,
    "kivi2-": [(2, 2)] * 2,
    "kivi4": [(4, 4)] * 2,
    "k4v2": [(4, 2)] * 2,
    "kvtuner": [(4, 2), (2, 8)],
}


def check_run(kv, name, code, out, err):
    """What a run of 17 + 60 tokens through the tiny checkpoint must have printed."""
    assert code == 0, err
    assert out.startswith("Once upon a time") and "Traceback" not in err
    result = json.loads(out.splitlines()[-1])
    assert FIELDS <= result.keys() and result["kv"] == name and result["text"] in out
    assert result["prompt_tokens"] == 17 and 1 <= result["new_tokens"] <= 60
    for field in ("peak_bytes", "prefill_s", "decode_s", "tokens_per_s"):
        assert result[field] > 0
    shape = (1, 2, 17 + 60, 32)
    full = 2 * FullCache(*shape).nbytes
    assert result["kv_bytes_full"] == full
    if BITS[kv] is None:
        assert result["kv_bytes"] == full
        return
    options = {"group_size": 16, "residual": 32}
    if kv in ("kivi2+", "kivi2-"):
        options |= {"sink": 4, "boost": 0.25, "v_group_size": 64}
    layers = [KiviCache(*shape, k_bits=k_bits, v_bits=v_bits, **options)
              for k_bits, v_bits in BITS[kv]]
    assert result["kv_bytes"] == sum(layer.nbytes for layer in layers)


def arguments_for(kv, checkpoint, folder):
    name = write_kvtuner(folder / "bits", BITS[kv]) if kv == "kvtuner" else kv
    options = [] if kv == "bf16" else ["--group-size", 16, "--residual", 32]
    return name, ["--checkpoint", checkpoint, "--kv", name, "--prompt", "Once upon a time",
                  "--max-new-tokens", 60, "--temperature", 0, "--json", *options]


@pytest.mark.parametrize("kv", BITS)
def test_the_program_runs_for_every_kv(kv, checkpoint, tmp_path):
    """Guards against a flag that rots, JSON that is not the last line, bytes that are not the
    caches', text that is not streamed."""
    name, arguments = arguments_for(kv, checkpoint, tmp_path)
    check_run(kv, name, *run(*arguments))


@pytest.mark.slow
def test_the_program_runs_as_a_process(checkpoint, tmp_path):
    """Guards against what only a process shows: an import that the tests have done already."""
    name, arguments = arguments_for("kvtuner", checkpoint, tmp_path)
    done = command(*arguments)
    check_run("kvtuner", name, done.returncode, done.stdout, done.stderr)


def test_an_all_2_bit_kvtuner_file_is_kivi2(checkpoint, tmp_path):
    """Guards against per-layer bits that take another path than the preset."""
    results = []
    for kv in ("kivi2", write_kvtuner(tmp_path / "bits", [(2, 2)] * 2)):
        results.append(result_of("--checkpoint", checkpoint, "--kv", kv, "--prompt", "abc",
                                 "--max-new-tokens", 100, "--temperature", 0, "--residual", 32))
    for field in ("text", "kv_bytes"):
        assert results[0][field] == results[1][field]


def test_prompt_file_seed_and_sampling_flags(checkpoint, tmp_path):
    """Guards against a flag that is parsed and then ignored."""
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")

    def result(*args):
        return result_of("--checkpoint", checkpoint, "--max-new-tokens", 40, *args)

    def text(*args):
        return result(*args)["text"]

    greedy = text("--prompt", "Once upon a time", "--temperature", 0)
    assert text("--prompt-file", file, "--temperature", 0) == greedy
    assert text("--temperature", 1, "--top-k", 1) == greedy
    assert text("--temperature", 1, "--top-p", 0.0001) == greedy
    hot = ("--temperature", 1.5, "--seed")
    assert text(*hot, 1) == text(*hot, 1) != text(*hot, 2)
    plain = result()
    sinks = 2 * 3 * 2 * 2 * 32 * 4  # layers, sinks, K and V, heads, D, bytes of a float32
    assert result("--sink", 3)["kv_bytes"] - plain["kv_bytes"] == sinks
    half = 2 * FullCache(1, 2, 17 + 40, 32, dtype=torch.bfloat16).nbytes  # of two layers
    assert result("--dtype", "bfloat16")["kv_bytes_full"] == half < 0.6 * plain["kv_bytes_full"]


def test_help_has_groups_and_examples_that_run():
    """Guards against an example with a flag that is gone."""
    code, out, _ = run("--help")
    assert code == 0
    for group in ("model:", "cache:", "prompt:", "sampling:", "output:"):
        assert f"\n{group}\n" in out
    examples = [line.split("   ")[0].split(maxsplit=2)[2:] for line in out.splitlines()
                if line.startswith("  python generate.py")]
    assert len(examples) == 3
    for example in examples:
        parser().parse_args(shlex.split(" ".join(example)))


# ---- wrong input --------------------------------------------------------------------------------

def with_changes(**changes):
    return lambda c, folder: ["--checkpoint", changed(c, folder, **changes)]


def with_options(*options):
    return lambda c, folder: ["--checkpoint", c, *options]


def with_kvtuner(*pairs):
    return lambda c, folder: ["--checkpoint", c, "--kv", write_kvtuner(folder / "bits", pairs)]


def without(name):
    def arguments(c, folder):
        (changed(c, folder) / name).unlink()
        return ["--checkpoint", folder]

    return arguments


ERRORS = {  # name: (arguments from (checkpoint, folder), what the line must name)
    "missing folder": (lambda c, f: ["--checkpoint", f / "nowhere"], "nowhere"),
    "unknown architecture": (with_changes(architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
    "truncated safetensors": (
        lambda c, f: ["--checkpoint", truncated(c, f)], "model.safetensors"),
    "capacity exceeded": (with_options("--max-new-tokens", 600), "512"),
    "G does not divide D": (with_options("--group-size", 64), "64"),
    "R is no multiple of G": (with_options("--group-size", 16, "--residual", 40), "40"),
    "NaN in K": (lambda c, f: ["--checkpoint", poisoned(c, f)], "NaN"),
    "unknown kv": (with_options("--kv", "kivi3"), "kivi3"),
    "wrong kvtuner file": (with_kvtuner(*[(2, 2)] * 5), "5"),
    "bits not 2, 4, 8": (with_kvtuner((2, 3), (2, 3)), "3"),
    "missing kvtuner file": (lambda c, f: ["--checkpoint", c, "--kv", f"kvtuner:{f}/nowhere"],
                             "nowhere"),
    "not a checkpoint": (lambda c, f: ["--checkpoint", f], "config.json"),
    "unknown name": (lambda c, f: ["--checkpoint", "no-such-model"], "no-such-model"),
    "missing weights": (without("model.safetensors"), "model.safetensors"),
    "missing tokenizer": (without("tokenizer.json"), "tokenizer.json"),
    "another shape": (with_changes(intermediate_size=128), "128"),
    "another depth": (with_changes(num_hidden_layers=3), "model.layers.2"),
    "negative temperature": (with_options("--temperature", -1), "-1"),
    "top-p above 1": (with_options("--top-p", 2), "2"),
    "no new tokens": (with_options("--max-new-tokens", 0), "0"),
    "negative sinks": (with_options("--sink", -3), "-3"),
    "no residual": (with_options("--residual", 0), "0"),
    "no group": (with_options("--group-size", 0), "0"),
    "unknown device": (with_options("--device", "abacus"), "abacus"),
    "missing prompt file": (lambda c, f: ["--checkpoint", c, "--prompt-file", f / "nowhere.txt"],
                            "nowhere.txt"),
    "prompt beyond the context": (with_options("--prompt", "word " * 200), "512"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_input_gets_one_line_and_exit_status_2(name, checkpoint, tmp_path, monkeypatch):
    """Guards against tracebacks, warnings beside the line, status 0 or 1."""
    arguments, named = ERRORS[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_error(run(*arguments(checkpoint, tmp_path)), named)


@pytest.mark.slow
def test_wrong_input_of_a_process(checkpoint, tmp_path):
    """The one that shows last. Guards against warnings of libraries that the tests above do not
    see, and another status."""
    done = command("--checkpoint", poisoned(checkpoint, tmp_path), "--prompt", "x")
    check_error((done.returncode, done.stdout, done.stderr), "NaN")


def test_a_prompt_that_is_no_text_gets_one_line():
    """Bytes that are no UTF-8 reach Python as halves of surrogate pairs. Guards against a traceback
    from the tokenizer."""
    check_error(run("--prompt", "a\udcff"))
    check_error(run("--prompt-file", ROOT / "tiny" / "model.safetensors"))


# ---- compilation --------------------------------------------------------------------------------

def choose(steps, tokens=1000, choice=None, cuda=True, **options):
    """(the line about the compilation, was the model compiled and with which `prefill`?) of a
    model like Llama-3.1-8B."""
    model = Mock()
    model.embed.weight.is_cuda = cuda
    model.config = SimpleNamespace(n_layers=32, n_kv_heads=8, head_dim=128)
    run_of = SimpleNamespace(model=model, compile=choice)
    why = report.compile_if_it_pays(run_of, steps, tokens, **options)
    return why, [call.kwargs["prefill"] for call in model.compile.call_args_list]


def test_a_compilation_is_chosen_where_it_pays():
    """Guards against half a minute of compiling for a sentence, against a choice that no line
    explains, and against a line about what the user has chosen himself."""
    takes = report.COMPILE_TAKES["cuda"]
    why, compiled = choose(10)
    assert compiled == [] and re.fullmatch(
        rf"not compiling the decode step: that takes about {takes} s and saves about 0\.\d s "
        r"in 10 steps \(--compile does it\)", why)
    why, compiled = choose(10**5, prefill=True)
    assert compiled == [True] and re.fullmatch(
        rf"compiling the decode step, about {takes} s: it saves about \d+ s in 100000 steps "
        r"\(--no-compile leaves it out\)", why)
    fewest = [next(steps for steps in range(0, 10**5, 10) if choose(steps, tokens)[1])
              for tokens in (10, 10**4, 10**6)]
    assert fewest == sorted(fewest, reverse=True) and fewest[2] < fewest[0] / 2, fewest
    why, compiled = choose(1, interactive=True)
    assert "a conversation pays for it" in why and compiled == [False]
    for cuda in (True, False):
        assert choose(1, choice=True, cuda=cuda) == (None, [False])
        assert choose(10**6, choice=False, cuda=cuda) == (None, [])
    assert choose(10**6, cuda=False) == (None, [])


def test_several_processes_compile(monkeypatch):
    """Guards against sums between GPUs that are not compiled: several times slower."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    why, compiled = choose(1)
    assert "several processes need it" in why and compiled == [False]


@pytest.mark.parametrize("arguments", ((), ("--prompts", ROOT / "LICENSE"), ("--interactive",)))
def test_the_choice_is_told_on_stderr(arguments, monkeypatch):
    """Guards against a line that is lost, printed twice, or stands in the text."""
    module = "program.report" if "--prompts" in arguments else "program.cli"
    monkeypatch.setattr(f"{module}.compile_if_it_pays", lambda *_, **__: "compiling, because")
    type_lines(monkeypatch, "The sea")
    code, out, err = run(*arguments, "--max-new-tokens", 2)
    assert code == 0 and err.splitlines().count("compiling, because") == 1
    assert "because" not in out


def test_a_broken_compile_cache_is_named_in_one_line(monkeypatch, fresh_compiler):
    """Guards against a traceback where a killed run has left half a file in the compiler's
    cache."""
    from torch._inductor import compile_fx

    def broken(*args, **options):
        json.loads("{")

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", broken)
    result = run("--compile", "--max-new-tokens", 3)
    check_error(result, "the compiler failed", "delete", "--no-compile")


@pytest.mark.slow
def test_the_program_compiles_on_request(checkpoint):
    """Guards against --compile on the CPU, which nothing else runs as a user does."""
    arguments = ["--checkpoint", checkpoint, "--prompt", "Once", "--max-new-tokens", 150,
                 "--temperature", 0, "--residual", 32, "--json"]
    compiled, plain = command(*arguments, "--compile"), command(*arguments, "--no-compile")
    assert compiled.returncode == plain.returncode == 0, compiled.stderr
    texts = [json.loads(done.stdout.splitlines()[-1])["text"] for done in (compiled, plain)]
    assert texts[0] == texts[1]


def test_capacities_are_few():
    """Guards against a size that is too small, beyond the context, or one of its own for every
    length."""
    model = SimpleNamespace(config=SimpleNamespace(max_len=5000), compiled=False)
    sizes = (1, 777, 5000, 6000)
    assert tuple(rounded_capacity(model, n) for n in sizes) == sizes
    model.compiled = True
    rounded = {n: rounded_capacity(model, n) for n in range(1, 5001)}
    assert all(n <= size <= max(1024, 1.25 * n) for n, size in rounded.items())
    assert sorted(set(rounded.values())) == [
        1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5000]
    assert rounded_capacity(model, 5001) == 5001  # refused further on, by its own number
    model.config.max_len = 300
    assert rounded_capacity(model, 200) == 300


def test_the_rounded_capacity_is_given_up_where_only_the_exact_one_fits(monkeypatch):
    """Guards against a refusal of what fits, in a compiled run, which rounds capacities up."""
    as_compiled(monkeypatch)
    model, _ = generate.load()
    model.compile()
    exact, rounded = (sum(needs(model, 1, 5, n, "kivi2").values()) for n in (35, 1024))
    arguments = ("--compile", "--max-new-tokens", 30, "--temperature", 0, "--memory-gb")
    code, out, _ = run(*arguments, (exact + rounded) / 2 / 2**30)
    assert code == 0 and run(*arguments, 1)[1] == out
    assert run(*arguments, 0.001)[0] == 2


# ---- conversations ------------------------------------------------------------------------------

def test_interactive_answers_every_line(checkpoint, monkeypatch):
    """Guards against an end of input that is a traceback, an empty line that counts, and a second
    prompt that does not follow the first."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\none\n"))
    code, out, err = run("--checkpoint", checkpoint, "--interactive", "--max-new-tokens", 8,
                         "--temperature", 0)
    assert code == 0 and "Traceback" not in err
    prompts = [int(line.split()[0]) for line in err.splitlines() if "new tokens" in line]
    # Bytes of "one" and BOS, then the text so far, too.
    assert len(prompts) == 2 and prompts[0] == 4 and prompts[1] > 7
    assert out.count("> one") == 2


class Console:
    """A process on a terminal of its own."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, args)], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, env=os.environ | ENV | {"TERM": "dumb"})
        os.close(slave)
        self.seen = b""

    def until(self, text, start=0):
        """Waits until the text appears after the first `start` bytes; returns how many came."""
        while text not in self.seen[start:]:
            assert select.select([self.master], [], [], 60)[0], self.seen
            self.seen += os.read(self.master, 1000)
        return len(self.seen)

    def type(self, text):
        os.write(self.master, text)


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_not_the_program():
    """A real process on a terminal. Guards against an interrupt that ends the program, loses what
    was said, or shows a traceback."""
    console = Console(ROOT / "generate.py", "--interactive", "--max-new-tokens", 2000,
                      "--temperature", 0)
    try:
        console.until(b"> ")
        console.type(b"Once upon a time\n")
        console.until(b"Once upon a time the old man")  # the answer has begun
        console.process.send_signal(signal.SIGINT)
        at = console.until(b"\n> ", len(console.seen))
        console.type(b"and so\n")
        console.until(b"and so", at + 7)  # again, as the beginning of the answer
        console.process.send_signal(signal.SIGINT)
        console.until(b"\n> ", len(console.seen))
        console.type(b"\x04")
        assert console.process.wait(30) == 0 and b"Traceback" not in console.seen
    finally:
        console.process.kill()
        os.close(console.master)


@pytest.mark.slow
def test_the_turns_of_a_conversation_share_one_compilation(monkeypatch, fresh_compiler):
    """Guards against a recompilation every turn: half a minute each on a GPU. (Dynamo decides
    that; Inductor stays out of it.)"""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compile(
        fn, fullgraph=True, dynamic=options.get("dynamic"), backend="eager"))
    monkeypatch.setattr("program.chat.encode", lambda tokenizer, messages, render:
                        tokenizer.encode("word " * 40 * len(messages)).ids)
    graphs = []

    def ask(prompt, lines=iter(["one", "two", "three"])):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    code, _, err = run("--compile", "--interactive", "--max-new-tokens", 6, "--residual", 32)
    assert code == 0 and err.count("new tokens") == 3
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3], graphs
