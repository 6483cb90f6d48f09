"""The benchmarks, as a user calls them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from calling import ENV, ROOT, check_error, run
from reference import write_kvtuner

import bench
from study.models import REQUESTS
from study.quality import CACHES
from study.variants import STUDY

TINY = ("--models", "tiny", "--device", "cpu")


def measured(*args, file):
    """(the JSON on the last line, which `file` holds as well; stdout) of bench.py."""
    code, out, err = run(*args, "--json", file, main=bench.main)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads(Path(file).read_text())
    return result, out


def test_the_quality_benchmark_runs_as_a_user_calls_it(checkpoint, tmp_path):
    """Guards against a benchmark that rots: its tables, its JSON line, its file, bits that are not
    those of the buffers."""
    tuned = write_kvtuner(tmp_path / "bits", [(4, 2), (2, 2)])
    result, out = measured(
        "quality", "--checkpoint", checkpoint, "--rows", 2, "--prefill", 160, "--tokens", 40,
        "--lengths", 300, "--trials", 1, "--study", "--caches", *CACHES, tuned,
        file=tmp_path / "quality.json")
    assert "| kivi2, R = 32 | 3.00 |" in out
    rows = {row["cache"]: row for row in result["rows"]}
    assert list(rows) == [*CACHES, tuned, *STUDY]
    assert rows["full precision"]["kl"] == 0 < rows["kivi4"]["kl"] < rows["kivi2"]["kl"]
    simulated = rows["2 bits, R = 128"]["kl"]
    assert simulated == pytest.approx(rows["kivi2"]["kl"], rel=0.01)
    bits = {"full precision": 16, "kivi4": 5, "k4v2": 4, "kivi2": 3, "kivi2+": 3,
            "2 bits, G = 64": 2.75, tuned: 3.5}
    assert {name: rows[name]["bits"] for name in bits} == bits
    for row in rows.values():
        trials = row["retrieval"]["pass key"]["300"].values()
        assert sum(n for _, n in trials) == 5


def test_the_memory_benchmark_runs_as_a_user_calls_it(tmp_path):
    """Guards against a benchmark that rots: its tables, its JSON line and its file."""
    result, out = measured("memory", *TINY, "--loads", "161/20", "--budget-gb", 0.002,
                           "--lengths", 512, file=tmp_path / "result.json")
    assert [row["cache"] for row in result["runs"]] == list(REQUESTS)
    assert all("failed" not in row for row in result["runs"])
    rows = result["bytes_per_token"]
    assert all(row["formula"] == row["buffers"] for row in rows)
    caches = {row["cache"] for row in rows}
    assert caches >= {"bf16", "kivi4 G32 R128", "k4v2 G32 R128", "kivi2 G32 R32"}
    assert out.count("|---") > 10


def test_the_throughput_benchmark_runs_as_a_user_calls_it(tmp_path):
    """Guards against a benchmark that rots: its tables, its JSON line and its file; and against a
    batch beyond the budget, and steps that are added up wrongly."""
    caches = ["bf16", "kivi2 R32"]
    result, out = measured("throughput", *TINY, "--loads", "161/20", "--budget-gb", 0.002,
                           "--curve", "--layers", 1, "--caches", *caches,
                           file=tmp_path / "result.json")
    for cache in caches:
        rows = [row for row in result["rows"] if row["cache"] == cache]
        batches = [row["batch"] for row in rows]
        assert rows[-1]["largest"] and batches == sorted(batches)
        for row in rows:
            assert row["formula_bytes"] <= 2e6 and len(row["step_ms"]) == 4
            steps = row["step_ms"]
            decoding = (steps[0] / 2 + steps[1] + steps[2] + steps[3] / 2) * 19 / 3 / 1e3
            assert row["decode_s"] == pytest.approx(decoding, rel=0.1)
            both = row["prefill_s"] + row["decode_s"]
            assert row["tokens_per_s"] == pytest.approx(row["batch"] * 20 / both)
    assert [row["cache"] for row in result["ratios"]] == caches[1:]
    assert "(largest)" in out


@pytest.mark.slow
def test_a_benchmark_that_is_ended_writes_what_it_has_measured(tmp_path):
    """SIGTERM, as `timeout` sends it, after the first row. Guards against hours of measuring
    without a file."""
    file = tmp_path / "rows.json"
    arguments = ["throughput", *TINY, "--loads", "161/20", "161/30", "161/40", "161/50",
                 "--budget-gb", "0.02", "--json", str(file)]
    process = subprocess.Popen([sys.executable, str(ROOT / "bench.py"), *arguments], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | ENV)
    next(line for line in process.stderr if "tokens/s" in line)
    process.terminate()
    out, err = process.communicate(timeout=60)
    result = json.loads(file.read_text())
    assert process.returncode == 130 and "Traceback" not in err
    assert json.loads(out.splitlines()[-1]) == result and result["unfinished"]
    said = 1 + sum(" tokens/s, prefill" in line for line in err.splitlines())
    assert said <= len(result["rows"]) <= said + 1 and said < 12  # a row is kept, then said
    assert result["rows"][0]["tokens_per_s"] > 0


@pytest.mark.slow
def test_the_attention_benchmark_runs_as_a_user_calls_it(tmp_path):
    """On a CPU, one packed cache. Guards against a benchmark that rots, and a form whose result is
    another one."""
    result, out = measured("attention", "--device", "cpu", "--shapes", "cpu-d64", "--caches",
                           "kivi2", file=tmp_path / "result.json")
    rows = {row["form"]: row for row in result["rows"]}
    assert len(rows) == 5 and rows["kivi2"]["ratio"] > 0
    assert all(row["error"] < 0.01 for row in rows.values())
    assert "of its floor" in out


# ---- refusals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ("decode", "throughput"))
def test_what_needs_cuda_is_refused_without_it(what, tmp_path):
    """Guards against numbers of a machine that has no CUDA graphs, minutes before the refusal, and
    a file that holds nothing."""
    file = tmp_path / "result.json"
    result = run(what, "--device", "cpu", "--json", file, main=bench.main)
    check_error(result, f"{what} measures CUDA graphs", "--device cuda")
    assert not file.exists() and result[1] == ""


@pytest.mark.parametrize("what", ("memory", "throughput"))
@pytest.mark.parametrize("load", ("161", "a/b", "0/5", "1/2/3"))
def test_malformed_loads_are_named_before_anything_runs(what, load):
    """Guards against minutes of measuring before an error."""
    code, out, err = run(what, *TINY, "--loads", load, main=bench.main)
    assert code == 2 and load in err and not out


@pytest.mark.parametrize("arguments, named", (
    (("quality", "--checkpoint", "nowhere"), "nowhere"),
    (("quality", "--caches", "kivi3", "--rows", 1, "--prefill", 9, "--tokens", 2), "kivi3"),
    (("quality", "--rows", 10**6), "fewer --rows"),
    (("memory", *TINY, "--json", "nowhere/x.json"), "nowhere/x.json"),
    (("memory", "--device", "abacus"), "abacus"),
))
def test_what_a_benchmark_cannot_do_gets_one_line(arguments, named, monkeypatch):
    """Guards against a traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*arguments, main=bench.main)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and named in line and "Traceback" not in err
