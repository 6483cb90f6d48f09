"""Run: python -m pytest -q tests/test_program.py        (what the program says, shows and writes beside its text; no GPU needed)"""
import contextlib
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent

import generate
from kivi import FullCache, KiviCache
from model import Transformer


class Terminal(io.StringIO):
    """stdout and stderr of a terminal in one."""

    def isatty(self):
        return True


def run(*args, out=None, err=None):
    """(exit status, stdout, stderr) of the program inside this process."""
    out, err, code = out or io.StringIO(), err or io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            generate.main([*map(str, args)])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def test_a_prompt_that_is_no_text_gets_one_line():
    """Bytes that are no UTF-8 reach Python as halves of surrogate pairs. Guards against a traceback from the tokenizer."""
    for args in (("--prompt", "a\udcff"), ("--prompt-file", ROOT / "tiny" / "model.safetensors")):
        code, out, err = run(*args)
        assert code == 2 and err.startswith("error:") and err.count("\n") == 1


def test_the_rounded_capacity_is_given_up_where_only_the_exact_one_fits(monkeypatch):
    """Guards against a refusal of what fits, in a compiled run, which rounds capacities up."""
    as_compiled(monkeypatch)
    args = ("--compile", "--max-new-tokens", 30, "--temperature", 0, "--memory-gb")
    code, out, err = run(*args, 0.0290)
    assert code == 0 and run(*args, 1)[1] == out
    assert run(*args, 0.001)[0] == 2


def test_a_line_that_is_too_long_does_not_end_the_conversation(monkeypatch):
    """Guards against an exit in the middle of a conversation."""
    lines = iter(["word " * 5000, "The sea"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    code, out, err = run("--interactive", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0 and "error: " in err and out.startswith("The sea")


def as_compiled(monkeypatch, compiled=lambda fn: fn):
    """Lets --compile do as good as nothing: the program cannot tell, and no test waits for Inductor."""
    def compile(self, prefill=False):
        self.compiled = True
        for name in ("start", "before", "attend", "between", "last"):
            setattr(self, name, compiled(getattr(self, name)))

    monkeypatch.setattr(Transformer, "compile", compile)


# ---- the statistics ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", (dict(), dict(sink=3), dict(k_bits=4, dtype=torch.bfloat16), dict(sliding=70), dict(sliding=200, v_bits=8)),
                         ids=str)
def test_traffic_is_that_of_the_tokens_present(options):
    """Token by token, as the docstring of kivi.py says what is packed when. Guards against the capacity instead of the length, a window
    that is always full, metadata in bits, K and V with the same boundary."""
    B, Hk, D, G, R = 2, 3, 64, 16, 32
    cache = KiviCache(B, Hk, 300, D, group_size=G, residual=R, **options)
    full = FullCache(B, Hk, 300, D, sliding=options.get("sliding"), dtype=options.get("dtype", torch.float32))
    item, S = cache.k_window.element_size(), options.get("sink", 0)
    for length in (1, 31, 32, 33, 34, 64, 65, 100, 300):
        first = max(0, length - options.get("sliding", length))
        total = 0
        for t in range(first, length):
            for bits, packed in ((cache.config.k_bits, t < (length - 1) // R * R), (cache.config.v_bits, t < length - 1 - R)):
                total += D * bits / 8 + D / G * 2 * item if packed and t >= S else D * item
        assert cache.traffic(length) == Hk * total
        assert full.traffic(length) == 2 * Hk * (length - first) * D * item
    assert cache.traffic(300) < cache.nbytes / B or "sliding" in options


@pytest.mark.parametrize("tied", (True, False))
def test_the_statistics_hold_together(tied, tmp_path):
    """Guards against GB/s without the cache or with the embedding, time of prefill in decoding, rates of other steps than were timed,
    a roofline where the device is not known."""
    for file in (ROOT / "tiny").iterdir():
        shutil.copy(file, tmp_path) if file.is_file() else None
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"]
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}
    read = 4 * sum(x.numel() for x in tensors.values())  # float32; the embedding is the head
    if not tied:
        from safetensors.torch import save_file

        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    code, out, err = run("--checkpoint", tmp_path, "--kv", "bf16", "--temperature", 0, "--max-new-tokens", 61, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["new_tokens"] == 61 and result["roofline"] is None and result["compile_s"] == 0
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    token = config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2 * 4
    moved = 60 * read + token * sum(result["prompt_tokens"] + 1 + i for i in range(60))
    assert result["decode_gb_per_s"] * 1e9 * result["decode_s"] == pytest.approx(moved, rel=2e-3)
    assert result["tokens_per_s"] * result["decode_s"] == pytest.approx(60)
    assert result["prefill_tokens_per_s"] * result["prefill_s"] == pytest.approx(result["prompt_tokens"])
    assert re.search(r"5 prompt tokens in [\d.]+ s \(\d+ tokens/s\), 61 new tokens in [\d.]+ s: [\d.]+ tokens/s, [\d.]+ GB/s; bf16 cache [\d.]+ MiB "
                     r"\(full precision [\d.]+ MiB\), peak memory \d+ MiB", err)


def test_percent_of_the_roofline_on_known_devices_only(monkeypatch):
    """Guards against a fraction of another device's bandwidth, and a line that says 0 % where it knows nothing."""
    result = {"text": "", "prompt_tokens": 5, "new_tokens": 3, "prefill_s": 1.0, "decode_s": 2.0, "tokens_per_s": 1.0, "kv": "kivi2", "kv_bytes": 1,
              "kv_bytes_full": 1, "peak_bytes": 1}
    device = SimpleNamespace(type="cuda")
    for name, share in (("NVIDIA H200", 0.5), ("NVIDIA A100-SXM4-80GB", 2400 / 2039), ("NVIDIA H200 MIG 1g.18gb", None), ("Abacus", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        more = generate.speeds(result, 4.8e12, 0.0, device)
        assert more["roofline"] == (share and pytest.approx(share)) and more["decode_gb_per_s"] == 2400
        assert ("% of" in generate.told(result | more)) == (share is not None)


@pytest.mark.parametrize("kv", ("kivi2", "bf16"))
def test_compilation_is_not_decoding(kv, monkeypatch):
    """Guards against tokens/s that count the compilation, and a step that is counted without its time."""
    slow = []

    def first_is_slow(fn):
        def call(*args):
            if not slow:
                slow.append(time.sleep(1.5))
            return fn(*args)
        return call

    as_compiled(monkeypatch, first_is_slow)
    begin = time.perf_counter()
    code, out, err = run("--compile", "--temperature", 0, "--max-new-tokens", 21, "--json", "--kv", kv)
    took = time.perf_counter() - begin
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and 1.5 < result["compile_s"] < took - result["decode_s"] and f"after compiling for {result['compile_s']:.1f} s" in err
    assert result["tokens_per_s"] * result["decode_s"] == pytest.approx(19)  # of 20 steps


def test_many_prompts_have_the_same_statistics(tmp_path):
    """Guards against traffic of padding rows, of one row only, and weights once a row."""
    file = tmp_path / "prompts"
    file.write_text("\n".join(json.dumps({"prompt": "the sea " * n, "max_new_tokens": n}) for n in (8, 20, 14)))
    code, out, err = run("--prompts", file, "--temperature", 0, "--json", "--kv", "bf16", "--batch-size", 2)
    rows, result = [json.loads(x) for x in out.splitlines()[:-1]], json.loads(out.splitlines()[-1])
    model, _ = generate.load()
    steps = [19, 7]  # of two waves: 20 and 14 new tokens, then 8
    c = model.config
    weights, token = sum(p.nbytes for p in model.parameters()), c.n_layers * c.n_kv_heads * c.head_dim * 8
    kv = sum(r["prompt_tokens"] + i for r in rows for i in range(1, r["new_tokens"]))
    assert [r["new_tokens"] for r in rows] == [8, 20, 14]
    assert result["decode_gb_per_s"] * 1e9 * result["decode_s"] == pytest.approx(sum(steps) * weights + kv * token, rel=2e-3)
    assert "tokens/s, " in err and "GB/s; bf16 cache" in err


# ---- progress, help -----------------------------------------------------------------------------------------------------------------

def test_what_takes_long_is_shown_on_a_terminal_only(monkeypatch):
    """Guards against control characters in a log, progress that stays in the way of the text, and one that wipes it out."""
    as_compiled(monkeypatch)
    args = ("--compile", "--max-new-tokens", 5, "--temperature", 0)
    code, out, err = run(*args)
    assert code == 0 and "\r" not in out + err and "loading" not in err
    screen = Terminal()
    run(*args, out=screen, err=screen)
    shares = [int(x) for x in re.findall(r"loading the weights: (\d+)%", screen.getvalue())]
    assert shares == sorted(shares) and shares[-1] == 100 and len(shares) > 50
    lines = screen.getvalue().split("\r\033[K")
    assert lines[-2] == "compiling the decode step ..." and lines[-1].startswith(out)


def test_help_has_groups_and_examples_that_run():
    """Guards against an example with a flag that is gone."""
    code, out, _ = run("--help")
    assert code == 0
    for group in ("model:", "cache:", "prompt:", "sampling:", "output:"):
        assert f"\n{group}\n" in out
    examples = [line.split("   ")[0].split(maxsplit=2)[2:] for line in out.splitlines() if line.startswith("  python generate.py")]
    assert len(examples) == 3
    for example in examples:
        generate.parser().parse_args(shlex.split(" ".join(example)))


# ---- a profile ----------------------------------------------------------------------------------------------------------------------

def test_profile_writes_ten_decode_steps(tmp_path):
    """Guards against prefill in the trace, empty steps, and a text that the profiler changes."""
    file = tmp_path / "trace.json"
    args = ("--temperature", 0, "--max-new-tokens", 14)
    code, out, err = run(*args, "--profile", file)
    assert code == 0 and out == run(*args)[1] and f"10 decode steps are in {file}" in err
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("ph") == "X"]
    assert len({e["name"] for e in events if e["name"].startswith("ProfilerStep#")}) == 10
    assert sum(e["name"] == "aten::embedding" for e in events) == 10  # one a step


def test_a_text_that_ends_early_has_fewer_steps_in_its_profile(tmp_path):
    """Guards against a message that counts what was not recorded, and a trace without steps."""
    for file in (ROOT / "tiny").iterdir():
        shutil.copy(file, tmp_path) if file.is_file() else None
    model, tokenizer = generate.load()
    ids = torch.tensor([tokenizer.encode("Once upon a time").ids])
    new = generate.generate(model, ids, 12, 0.0)[0, ids.shape[1]:].tolist()
    for n, steps in ((8, 5), (2, None)):
        assert new.index(new[n - 1]) == n - 1
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": new[n - 1]}))
        code, _, err = run("--checkpoint", tmp_path, "--temperature", 0, "--profile", tmp_path / "trace")
        assert (code, f"{steps} decode steps are in" in err) == ((0, True) if steps else (2, False)), err
        if steps:
            events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
            assert sum(e["name"] == "aten::embedding" for e in events) in (steps, steps + 1)  # one is under way when the end is read
    assert "error: the text ended after 2 tokens" in err


@pytest.mark.parametrize("args, named", ((("--max-new-tokens", 13), "14 new tokens"), (("--interactive",), "--interactive"),
                                         (("--prompts", "x"), "--prompts")))
def test_a_profile_that_cannot_be_is_refused(args, named, tmp_path):
    """Guards against an empty trace, and one that every answer overwrites."""
    code, out, err = run(*args, "--profile", tmp_path / "trace")
    assert code == 2 and err.startswith("error:") and named in err and out == ""
    code, _, err = run("--profile", tmp_path / "nowhere" / "trace")
    assert code == 2 and "nowhere" in err


# ---- a conversation -----------------------------------------------------------------------------------------------------------------

def test_room_is_few_capacities():
    """Guards against a size that is too small, beyond the context, or one of its own for every length."""
    model = SimpleNamespace(config=SimpleNamespace(max_len=5000), compiled=False)
    assert [generate.room(model, n) for n in (1, 777, 5000, 6000)] == [1, 777, 5000, 6000]
    model.compiled = True
    sizes = {n: generate.room(model, n) for n in range(1, 5001)}
    assert all(n <= size <= max(1024, 1.25 * n) for n, size in sizes.items())
    assert sorted(set(sizes.values())) == [1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5000]
    assert generate.room(model, 5001) == 5001  # refused further on, by its own number
    model.config.max_len = 300
    assert generate.room(model, 200) == 300


def test_the_turns_of_a_conversation_share_one_compilation(monkeypatch):
    """Guards against a recompilation every turn: 20 seconds each on a GPU. (Dynamo decides that; Inductor stays out of it.)"""
    torch._dynamo.reset()
    as_compiled(monkeypatch, lambda fn: torch.compile(fn, fullgraph=True, backend="eager"))
    monkeypatch.setattr(generate, "encode", lambda t, messages, _: t.encode("word " * 40 * len(messages)).ids)
    lines, compiled = iter(["one", "two", "three"]), []

    def ask(_):
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return next(lines, None) or (_ for _ in ()).throw(EOFError)

    monkeypatch.setattr("builtins.input", ask)
    code, _, err = run("--compile", "--interactive", "--max-new-tokens", 6, "--residual", 32)
    assert code == 0 and err.count("new tokens") == 3
    assert compiled[0] < compiled[1] == compiled[2] == compiled[3], compiled


def test_ctrl_c_ends_the_answer_and_not_the_program():
    """A real process on a terminal. Guards against an interrupt that ends the program, loses what was said, or shows a traceback."""
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "generate.py", "--interactive", "--max-new-tokens", "2000", "--temperature", "0"], stdin=slave,
                               stdout=slave, stderr=slave, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"})
    os.close(slave)
    seen = b""

    def until(text, start=0):
        nonlocal seen
        while text not in seen[start:]:
            assert select.select([master], [], [], 60)[0], seen
            seen += os.read(master, 1000)
        return len(seen)

    try:
        until(b"> ")
        os.write(master, b"Once upon a time\n")
        until(b"Once upon a time the old man")  # the answer has begun
        process.send_signal(signal.SIGINT)
        at = until(b"\n> ", len(seen))
        os.write(master, b"and so\n")
        until(b"and so", at + 7)  # again, as the beginning of the answer
        process.send_signal(signal.SIGINT)
        until(b"\n> ", len(seen))
        os.write(master, b"\x04")
        assert process.wait(30) == 0 and b"Traceback" not in seen
    finally:
        process.kill()
        os.close(master)
