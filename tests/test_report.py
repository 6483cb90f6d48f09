"""What the program says beside its text: statistics, progress on a terminal, a profile."""
import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
from calling import ROOT, as_compiled, check_error, run
from reference import changed
from safetensors import safe_open
from safetensors.torch import save_file

import generate
from kivi import KiviCache
from program import cli, report

SHORT = ("--temperature", 0, "--max-new-tokens", 5)
WINDOW = "; all tokens still lie in the exact window"
UNCOMPILED = ("; steps ran uncompiled, which is slower: "
              f"--compile first takes about {report.COMPILE_TAKES['cpu']} s")


class Terminal(io.StringIO):
    """stdout and stderr of a terminal in one."""

    def isatty(self):
        return True


# ---- the line on stderr -------------------------------------------------------------------------

def pays_from(bits, n_kv_heads=2, head_dim=64):
    """Tokens from which a cache for them in float32 is smaller than they are, one by one."""
    for n in range(1, 1000):
        cache = KiviCache(1, n_kv_heads, n, head_dim, k_bits=bits, v_bits=bits)
        if cache.nbytes < n * 2 * n_kv_heads * head_dim * 4:
            return n


@pytest.mark.parametrize("options, bits, hint", (
    ((), 2, UNCOMPILED),
    (("--no-compile",), 2, ""),
    (("--no-compile", "--kv", "kivi4"), 4, ""),
    (("--no-compile", "--residual", 32, "--max-new-tokens", 40), None, ""),
    (("--no-compile", "--kv", "bf16"), None, ""),
))
def test_the_line_says_why_two_bits_do_not_pay_yet(options, bits, hint):
    """The whole end of the line. Guards against a hint where the user has chosen already, and one
    that a text gets whose tokens are quantized."""
    code, _, err = run(*SHORT, *options)
    ending = f"{WINDOW}: {bits} bits pay from about {pays_from(bits)} tokens" if bits else ""
    assert code == 0 and re.search(r", peak memory \d+ MiB(.*)\n$", err)[1] == ending + hint


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_cache_in_full_precision_is_called_by_its_dtype(dtype):
    """Guards against float32 that is called bf16, as its --kv is."""
    code, _, err = run(*SHORT, "--kv", "bf16", "--dtype", dtype)
    assert code == 0 and f"; {dtype} cache " in err and "bf16" not in err


def test_a_run_that_compiled_gets_no_hint(monkeypatch):
    """Guards against advice to do what was done."""
    as_compiled(monkeypatch)
    code, _, err = run(*SHORT, "--compile")
    assert code == 0 and "uncompiled" not in err and "after compiling" in err


# ---- the numbers --------------------------------------------------------------------------------

def untied(folder):
    """Gives a checkpoint a head of its own."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)


@pytest.mark.parametrize("tied", (True, False))
def test_the_statistics_hold_together(tied, tmp_path):
    """Guards against GB/s without the cache or with the embedding, time of prefill in decoding,
    rates of other steps than were timed, a roofline where the device is not known."""
    changed(ROOT / "tiny", tmp_path, tie_word_embeddings=tied)
    with safe_open(ROOT / "tiny" / "model.safetensors", "pt") as weights:
        # float32; the embedding is read as the head, or beside it not at all
        read = sum(4 * weights.get_tensor(name).numel() for name in weights.keys())
    if not tied:
        untied(tmp_path)
    code, out, err = run("--checkpoint", tmp_path, "--kv", "bf16", "--temperature", 0,
                         "--max-new-tokens", 61, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["new_tokens"] == 61
    assert result["roofline"] is None and result["compile_s"] == 0
    c = json.loads((tmp_path / "config.json").read_text())
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    token = c["num_hidden_layers"] * c["num_key_value_heads"] * head_dim * 2 * 4
    moved = 60 * read + token * sum(result["prompt_tokens"] + 1 + i for i in range(60))
    assert result["decode_gb_per_s"] * 1e9 * result["decode_s"] == pytest.approx(moved, rel=2e-3)
    assert result["tokens_per_s"] * result["decode_s"] == pytest.approx(60)
    prompt_tokens = result["prefill_tokens_per_s"] * result["prefill_s"]
    assert prompt_tokens == pytest.approx(result["prompt_tokens"])
    assert re.search(
        r"^5 prompt tokens in [\d.]+ s \(\d+ tokens/s\), 61 new tokens in [\d.]+ s: "
        r"[\d.]+ tokens/s, [\d.]+ GB/s; float32 cache [\d.]+ MiB "
        r"\(full precision [\d.]+ MiB\), peak memory \d+ MiB", err)


@pytest.mark.parametrize("name, clock, width, bandwidth", (  # kHz, bits, GB/s of its data sheet
    ("NVIDIA A100-SXM4-80GB", 1593000, 5120, 2039), ("NVIDIA H100 80GB HBM3", 2619000, 5120, 3350),
    ("Tesla T4", 5001000, 256, 320), ("NVIDIA GeForce RTX 4090", 10501000, 384, 1008),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 2619000, 5120, None), ("Abacus", 0, 0, None)))
def test_percent_of_the_roofline_where_it_is_known(name, clock, width, bandwidth, monkeypatch):
    """Guards against a fraction of another device's bandwidth, and a line that says 0 % where it
    knows nothing."""
    gpu = SimpleNamespace(name=name, memory_clock_rate=clock, memory_bus_width=width)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
    share = report.roofline(2400, SimpleNamespace(type="cuda"))
    assert share == (bandwidth and pytest.approx(2400 / bandwidth, rel=1e-3))
    assert report.roofline(None, SimpleNamespace(type="cuda")) is None
    result = {"prompt_tokens": 5, "prefill_tokens": 5, "new_tokens": 3, "prefill_s": 1.0,
              "decode_s": 2.0, "proposed_drafts": 0, "tokens_per_s": 1.0,
              "kv_bytes": 1, "kv_bytes_full": 1, "peak_bytes": 1,
              "compile_s": 0.0, "prefill_tokens_per_s": 5.0, "decode_gb_per_s": 2400}
    line = report.format_stats(result | {"roofline": share}, "kivi2", True)
    assert ("% of" in line) == (share is not None)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ("kivi2", pytest.param("bf16", marks=pytest.mark.slow)))
def test_compilation_is_not_decoding(kv, monkeypatch):
    """Guards against tokens/s that count the compilation, and a step that is counted without its
    time."""
    slept = []

    def first_is_slow(part):
        def call(*args):
            if not slept:
                slept.append(time.sleep(1.5))
            return part(*args)

        return call

    as_compiled(monkeypatch, first_is_slow)
    begin = time.perf_counter()
    code, out, err = run("--compile", "--temperature", 0, "--max-new-tokens", 21, "--json",
                         "--kv", kv)
    took = time.perf_counter() - begin
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and 1.5 < result["compile_s"] < took - result["decode_s"]
    assert f", after compiling for {result['compile_s']:.1f} s" in err
    assert result["tokens_per_s"] * result["decode_s"] == pytest.approx(19)  # of 20 steps


def test_many_prompts_have_the_same_statistics(tmp_path):
    """Guards against traffic of padding rows, of one row only, and weights once a row."""
    file = tmp_path / "prompts"
    jobs = [{"prompt": "the sea " * n, "max_new_tokens": n} for n in (8, 20, 14)]
    file.write_text("\n".join(map(json.dumps, jobs)))
    code, out, err = run("--prompts", file, "--temperature", 0, "--json", "--kv", "bf16",
                         "--batch-size", 2)
    *rows, result = map(json.loads, out.splitlines())
    assert code == 0 and [row["new_tokens"] for row in rows] == [8, 20, 14]
    model, _ = generate.load()
    c = model.config
    weights = sum(p.nbytes for p in model.parameters())
    token = c.n_layers * c.n_kv_heads * c.head_dim * 8
    present = sum(row["prompt_tokens"] + i for row in rows for i in range(1, row["new_tokens"]))
    steps = 19 + 7  # of two waves: 20 and 14 new tokens, then 8
    moved = result["decode_gb_per_s"] * 1e9 * result["decode_s"]
    assert moved == pytest.approx(steps * weights + present * token, rel=2e-3)
    assert "tokens/s, " in err and "GB/s; float32 cache" in err


# ---- progress -----------------------------------------------------------------------------------

def test_what_takes_long_is_shown_on_a_terminal_only(monkeypatch):
    """Guards against control characters in a log, progress that stays in the way of the text, and
    one that wipes it out."""
    as_compiled(monkeypatch)
    code, out, err = run("--compile", *SHORT)
    assert code == 0 and "\r" not in out + err and "loading" not in err
    screen = Terminal()
    run("--compile", *SHORT, out=screen, err=screen)
    shown = screen.getvalue()
    shares = [int(share) for share in re.findall(r"loading the weights: (\d+)%", shown)]
    assert shares == sorted(shares) and shares[-1] == 100 and len(shares) > 50
    lines = shown.split("\r\033[K")
    assert lines[-2] == "compiling the decode step ..." and lines[-1].startswith(out)


# ---- a profile ----------------------------------------------------------------------------------

def steps_in(trace):
    """Steps that a trace names, and embeddings in it, of which a decode step has one."""
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    return len(steps), names.count("aten::embedding")


def test_profile_writes_ten_decode_steps(tmp_path):
    """Guards against prefill in the trace, empty steps, and a text that the profiler changes."""
    file = tmp_path / "trace.json"
    arguments = ("--temperature", 0, "--max-new-tokens", 14)
    code, out, err = run(*arguments, "--profile", file)
    assert code == 0 and out == run(*arguments)[1]
    assert f"10 decode steps are in {file}" in err and steps_in(file) == (10, 10)


def test_a_text_that_ends_early_has_fewer_steps_in_its_profile(tmp_path):
    """Guards against a message that counts what was not recorded, and a trace without steps."""
    folder = changed(ROOT / "tiny", tmp_path)
    model, tokenizer = generate.load()
    ids = tokenizer.encode("Once upon a time").ids
    new = generate.generate(model, [ids], 12, 0.0)[0][len(ids) :]
    arguments = ("--checkpoint", folder, "--temperature", 0, "--profile", tmp_path / "trace")
    for n in (8, 2):
        assert new.index(new[n - 1]) == n - 1, "the token that shall end the text comes earlier"
        end = json.dumps({"eos_token_id": new[n - 1]})
        (folder / "generation_config.json").write_text(end)
        code, _, err = run(*arguments)
        if n == 8:
            assert code == 0 and "5 decode steps are in" in err
            # One is under way when the end is read.
            assert steps_in(tmp_path / "trace")[1] in (5, 6)
    assert code == 2 and "error: the text ended after 2 tokens" in err


@pytest.mark.parametrize("arguments, named", (
    (("--max-new-tokens", 13), "14 new tokens"), (("--interactive",), "--interactive"),
    (("--prompts", "x"), "--prompts")))
def test_a_profile_that_cannot_be_is_refused(arguments, named, tmp_path):
    """Guards against an empty trace, and one that every answer overwrites."""
    code, out, err = run(*arguments, "--profile", tmp_path / "trace")
    check_error((code, out, err), named)
    assert out == ""
    check_error(run("--profile", tmp_path / "nowhere" / "trace"), str(tmp_path / "nowhere"))


def test_a_profile_goes_where_it_is_told(tmp_path):
    """Guards against a link that becomes a file, and a full disk of which nothing is said."""
    (tmp_path / "link").symlink_to("target")
    arguments = ("--temperature", 0, "--max-new-tokens", 14, "--profile")
    assert run(*arguments, tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink() and steps_in(tmp_path / "target") == (10, 10)
    code, out, err = run(*arguments, "/dev/full")
    assert code == 2 and err.splitlines()[-1].startswith("error: [Errno 28]")
    assert "decode steps are in" not in err and Path("/dev/full").is_char_device()


def test_wrong_input_leaves_no_empty_file(tmp_path):
    """Guards against a check that writes, of a profile and of bench.py's result."""
    for main, option in ((cli.main, "--profile"), (bench.main, "--json")):
        program = ("decode", "--device", "cpu") if main is bench.main else ("--temperature", -1)
        run(*program, option, tmp_path / "file", main=main)
        program = ("memory",) if main is bench.main else ()
        check_error(run(*program, option, tmp_path, main=main), str(tmp_path), "cannot be written")
        check_error(run("--checkpoint", tmp_path, option, tmp_path / "file", main=main))
    assert list(tmp_path.iterdir()) == []
