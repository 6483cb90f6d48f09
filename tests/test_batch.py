"""Many prompts at once: waves, files of prompts, memory that runs out, interrupts."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calling import ENV, FIELDS, ROOT, check_error, result_of, run
from reference import resident

import generate
from model import Transformer
from study.measure import Results

PROMPTS = ["Once", "upon a time there", "x",
           "The quick brown fox jumps over the lazy dog and runs", "abc", "hello there", "z" * 40]
TABLE = r"(?m)" + r" .*\n".join(
    "^  " + name for name in ("weights", "packed codes", "metadata", "window", "activations",
                              "total", "free"))
reads_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@pytest.mark.parametrize("size, waves, rows", (
    (3, 3, 3), pytest.param("auto", 1, 7, marks=pytest.mark.slow)))
def test_a_file_of_prompts_gives_what_each_gives_alone(size, waves, rows, checkpoint, tmp_path):
    """Waves with a rest, results in the file's order, limits of their own. Guards against an order
    by length, dummies in the output or the statistics, and a wave that sees the one before."""
    file = tmp_path / "prompts.jsonl"
    limits = [40, 3, 60, 7, None, 1, 33]
    jobs = [{"prompt": prompt} | ({"max_new_tokens": limit} if limit else {})
            for prompt, limit in zip(PROMPTS, limits)]
    file.write_text("\n".join(map(json.dumps, jobs)))
    same = ("--checkpoint", checkpoint, "--temperature", 0, "--residual", 32)
    code, out, err = run(*same, "--json", "--prompts", file, "--batch-size", size,
                         "--max-new-tokens", 20)
    assert code == 0, err
    *objects, last = map(json.loads, out.splitlines())
    assert [(o["index"], o["prompt"]) for o in objects] == list(enumerate(PROMPTS))
    assert FIELDS <= last.keys()
    assert (last["finished"], last["waves"], last["batch_size"]) == (7, waves, rows)
    assert last["new_tokens"] == sum(o["new_tokens"] for o in objects)
    assert last["prompt_tokens"] == sum(len(prompt) + 1 for prompt in PROMPTS)
    for o, limit in zip(objects, limits):
        alone = result_of(*same, "--prompt", o["prompt"], "--max-new-tokens", limit or 20)
        for key in ("text", "prompt_tokens", "new_tokens"):
            assert o[key] == alone[key]
    assert re.search(TABLE, err)


def test_a_row_without_numbers_takes_no_other_row(checkpoint, tmp_path, monkeypatch):
    """Logits of NaN at the third step of every wave, for one row. Guards against answers that are
    lost with it, and against text of unknown tokens."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS[:4]))
    same = ("--checkpoint", checkpoint, "--temperature", 0, "--json", "--prompts", file,
            "--batch-size", 2, "--max-new-tokens", 9)
    want = [json.loads(line) for line in run(*same)[1].splitlines()[:-1]]
    decode, steps = Transformer.decode, []

    def broken(self, tokens, t):
        logits = decode(self, tokens, t)
        steps.append(t)
        logits[1 if len(steps) % 8 == 3 else slice(0, 0)] = float("nan")
        return logits

    monkeypatch.setattr(Transformer, "decode", broken)
    code, out, err = run(*same)
    *found, last = map(json.loads, out.splitlines())
    lost = [int(n) for n in re.findall(r"(?m)^prompt (\d) has no answer: .*NaN", err)]
    assert code == 0 and len(lost) == 2 and last["finished"] == 2
    assert found == [x for x in want if x["index"] not in lost]


BAD_LINES = [
    b'{"prompt": ',
    b'{"text": "x"}',
    b'{"prompt": ""}',
    b"[1]",
    b'{"prompt": "x", "max_new_tokens": 0}',
    b'{"prompt": "x", "max_new_tokens": true}',
    b'{"prompt": "x", "max_new_tokens": 9999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xff"}',
    b"[" * 100000,
    b'{"prompt": 5}',
]


def test_unusable_lines_are_named_and_the_rest_runs(checkpoint, tmp_path):
    """Guards against a traceback, a silent skip, and one bad line that ends the run; plain text is
    plain text."""
    file = tmp_path / "prompts"
    same = ("--checkpoint", checkpoint, "--prompts", file, "--temperature", 0)
    first = b'\xef\xbb\xbf{"prompt": "good", "max_new_tokens": 4}\n\n'
    last = b'\r\n{"prompt": "also", "max_new_tokens": 4}\r\n'
    file.write_bytes(first + b"\n".join(BAD_LINES) + last)
    code, out, err = run(*same, "--json")
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [o.get("prompt") for o in objects] == ["good", "also", None]
    assert objects[1]["index"] == len(BAD_LINES) + 1
    skipped = re.findall(r", line (\d+), skipped: ", err)
    assert skipped == [str(3 + i) for i in range(len(BAD_LINES))]
    file.write_text("one [1]\n\n  two {\n")
    _, out, _ = run(*same, "--max-new-tokens", 3)
    assert out.startswith("--- 0\none [1]") and "\n--- 1\ntwo {" in out
    file.write_text('{"prompt": 1}\n')
    code, _, err = run(*same)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")


def test_what_does_not_fit_is_refused_with_what_does(checkpoint, tmp_path):
    """The named batch and capacity really pass, one more does not. Guards against a refusal after
    the allocation, and a wrong limit."""
    file = tmp_path / "prompts"
    file.write_text("abc\n" * 40)

    def status(*args):
        """(exit status, the error or all of stderr)"""
        code, _, err = run("--checkpoint", checkpoint, "--temperature", 0, *args)
        return code, err.splitlines()[-1] if code else err

    many = ("--prompts", file, "--max-new-tokens", 3, "--memory-gb", 0.003, "--batch-size")
    code, line = status(*many, 40)
    assert code == 2 and line.startswith("error: ") and "40" in line
    fits = int(re.search(r"a batch of (\d+) fits", line)[1])
    assert 1 < fits < 40 and status(*many, fits)[0] == 0 and status(*many, fits + 1)[0] == 2
    code, err = status(*many, "auto")
    chosen = int(re.search(r"(?m)^batch (\d+), 7 tokens", err)[1])
    assert code == 0 and fits - 2 <= chosen <= fits
    one = ("--prompt", "abc", "--memory-gb", 0.00068, "--residual", 32, "--max-new-tokens")
    code, line = status(*one, 400)
    assert code == 2 and "error: " in line
    tokens = int(re.search(r": (\d+) tokens fit, prompt included", line)[1])
    assert 5 < tokens < 404
    assert status(*one, tokens - 4)[0] == 0 and status(*one, tokens - 3)[0] == 2
    code, line = status("--prompt", "abc", "--memory-gb", 0.0001)
    assert code == 2 and "not even" in line


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batch_or_ends_with_one_line(
        checkpoint, tmp_path, monkeypatch):
    """Guards against a traceback, lost or doubled results, and an endless retry."""
    file = tmp_path / "prompts"
    file.write_text("\n".join(PROMPTS))
    arguments = ("--checkpoint", checkpoint, "--prompts", file, "--json", "--temperature", 0,
                 "--max-new-tokens", 6)
    want = run(*arguments)[1].splitlines()[:-1]
    step = generate.Decoder.__call__
    most = 2  # rows that have room

    def decoder(self):
        if len(self.token) > most and max(self.model.cache.lengths) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        step(self)

    monkeypatch.setattr(generate.Decoder, "__call__", decoder)
    _, out, err = run(*arguments)
    *lines, last = out.splitlines()
    assert lines == want and json.loads(last)["batch_size"] == 2
    assert re.findall(r"batches of (\d+)", err) == ["4", "2"]
    most = 0
    code, out, err = run(*arguments)
    check_error((code, "", err.splitlines()[-1]), "out of memory")
    assert "Traceback" not in err
    *lines, last = out.splitlines()
    assert json.loads(last)["finished"] == len(lines) < len(PROMPTS)


@pytest.mark.slow
def test_ctrl_c_writes_what_is_finished(checkpoint, tmp_path):
    """A real process and a real signal. Guards against results that exist only in memory, and a
    traceback."""
    file = tmp_path / "prompts"
    file.write_text("\n".join(f"prompt {i}" for i in range(400)))
    arguments = ("--checkpoint", checkpoint, "--prompts", file, "--batch-size", 4,
                 "--max-new-tokens", 30, "--json")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | ENV)
    for line in process.stderr:
        if "8 prompts done" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    *objects, last = map(json.loads, out.splitlines())
    assert process.returncode == 130 and "Traceback" not in err
    assert 8 <= len(objects) == last["finished"] < 400
    indices = [o["index"] for o in objects]
    assert indices == sorted(indices)


# ---- memory over time ---------------------------------------------------------------------------

def soak(folder, n_prompts, file, monkeypatch):
    """(the statistics, resident bytes of this process after every wave) of n_prompts short
    prompts in batches of 16."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (n_prompts,), generator=generator).tolist()
    lines = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(n)) for i, n in enumerate(lengths)]
    file.write_text("\n".join(lines))
    memory = []
    generate_wave = generate.generate

    def measured(*args, **options):
        generate_wave(*args, **options)
        memory.append(resident("VmRSS"))

    monkeypatch.setattr(generate, "generate", measured)
    code, out, err = run("--checkpoint", folder, "--prompts", file, "--batch-size", 16,
                         "--max-new-tokens", 8, "--json")
    assert code == 0 and len(out.splitlines()) == n_prompts + 1, err
    return json.loads(out.splitlines()[-1]), memory


@pytest.mark.slow
@reads_proc
def test_memory_stays_flat_over_waves(checkpoint, tmp_path, monkeypatch):
    """400 prompts in 25 waves. Guards against caches, graphs or results on the device that pile up
    wave by wave."""
    _, memory = soak(checkpoint, 400, tmp_path / "prompts", monkeypatch)
    assert len(memory) == 25
    assert max(memory[5:]) - memory[5] < 4 * 2**20, [m / 2**20 for m in memory]


@pytest.mark.slow
@reads_proc
def test_memory_stays_flat_over_many_waves(tmp_path, monkeypatch):
    """2,000 prompts through the embedded checkpoint; with KIVI_SOAK=FILE 10,000, and the memory
    after every wave goes there."""
    file = os.environ.get("KIVI_SOAK")
    last, memory = soak(ROOT / "tiny", 10000 if file else 2000, tmp_path / "prompts", monkeypatch)
    if file:
        results = Results("soak", torch.device("cpu"))
        results.data |= last
        results.data["resident_MiB_after_wave"] = [round(m / 2**20, 2) for m in memory]
        results.write(file)
    assert max(memory[10:]) - memory[10] < 8 * 2**20, [m / 2**20 for m in memory]
