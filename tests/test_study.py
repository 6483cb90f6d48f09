"""The benchmarks, as a user calls them."""
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from calling import ENV, ROOT, check_error, run
from reference import make_checkpoint, write_kvtuner

import bench
from checkpoint.hub import EMBEDDED
from generate import load
from kivi import FullCache, KiviCache
from study.measure import Results
from study.prompts import make_case
from study.quality import CACHES, row_bytes
from study.scatter import scatter
from study.variants import STUDY

TINY = ("--models", "tiny", "--device", "cpu")


def measured(*args, file):
    """(the JSON on the last line, which `file` holds as well; stdout) of bench.py."""
    code, out, err = run(*args, "--json", file, main=bench.main)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads(Path(file).read_text())
    return result, out


def test_a_picture_has_small_caches_to_the_left_and_good_ones_below(tmp_path):
    """Guards against axes that are turned, and names that are no XML."""
    sizes = {"full precision": (16, 0.0, 10), "kivi4": (5, 0.01, 10), "a < b": (2, 1.0, 0)}
    rows = [{"cache": name, "bytes": [1, n * 2**20, 1], "kl": kl}
            for name, (n, kl, _) in sizes.items()]
    answers = [{"cache": name, "hits": [1] * n} for name, (_, _, n) in sizes.items()]
    scatter(tmp_path / "caches.svg", rows, answers, 8192)
    root = ElementTree.parse(tmp_path / "caches.svg").getroot()
    four, two = [x.attrib for x in root if x.tag.endswith("circle")]
    assert int(two["cx"]) < int(four["cx"]) and int(two["cy"]) < int(four["cy"])
    assert four["fill"] == "rgb(0,200,40)" and two["fill"] == "rgb(200,0,40)"
    scatter(tmp_path / "no answers.svg", rows, [], 8192)
    assert "rgb" not in (tmp_path / "no answers.svg").read_text()
    assert [x.text for x in root][3::2] == ["kivi4: 5.0 MiB, KL 0.010", "a < b: 2.0 MiB, KL 1.000"]


def test_the_bytes_of_a_row_are_those_that_are_allocated():
    """Guards against a table whose bytes leave out a buffer."""
    model, _ = load(dtype=torch.bfloat16)
    for kv, more in (("bf16", {}), ("kivi2+", {"residual": 256}), ("kivi2:read=128", {})):
        model.setup_caches(1, 1024, kv, **more)
        storages = [x.untyped_storage() for layer in model.layers for x in layer.cache.buffers()]
        allocated = sum({x.data_ptr(): x.nbytes() for x in storages}.values())
        rows, schedule = 8 * model.config.n_layers, 8 * (1024 + 1)  # rows: of every layer
        assert row_bytes(model, {"kv": kv, **more})[0] == allocated - rows - schedule


@pytest.mark.slow
def test_the_quality_benchmark_runs_as_a_user_calls_it(tmp_path, monkeypatch):
    """Guards against a benchmark that rots: its tables, its JSON line, its file, bits that are not
    those of the buffers; and against answers that depend on the batch, or prompts on how the
    question comes."""
    made = {False: [], True: []}  # is the question decoded? the answers of the prompts

    def watched(*arguments):
        case = make_case(*arguments)
        made[arguments[-1]].append(case.rest[-case.answer :])
        return case

    monkeypatch.setattr("study.quality.make_case", watched)
    checkpoint = make_checkpoint(tmp_path / "llama", head_dim=64)
    tasks = ["pass key", "sums"]
    tuned = write_kvtuner(tmp_path / "bits", [(4, 2), (2, 2)])
    arguments = ["quality", "--checkpoint", checkpoint, "--rows", 2, "--prefill", 160,
                 "--tokens", 16, "--lengths", 300, "--trials", 1, "--greedy", 5, "--tasks", *tasks]
    result, out = measured(*arguments, "--study", "--caches", *CACHES, tuned,
                           file=tmp_path / "quality.json")
    assert "| kivi2, R = 32 | 3.00 |" in out and "Sums, by" in out
    rows = {row["cache"]: row for row in result["rows"]}
    assert list(rows) == [*CACHES, tuned, *STUDY]
    assert rows["full precision"]["kl"] == 0 < rows["kivi4"]["kl"] < rows["kivi2"]["kl"]
    assert rows["full precision"]["greedy_alike"] == 4
    simulated = rows["2 bits, R = 128"]["kl"]
    assert simulated == pytest.approx(rows["kivi2"]["kl"], rel=0.01)
    bits = {"full precision": 16, "kivi4": 5, "k4v2": 4, "kivi2": 3, "kivi2+": 3, "kivi2-": 2.75,
            "2 bits, G = 64": 2.5, tuned: 3.5}
    assert {name: rows[name]["bits"] for name in bits} == bits
    assert len(result["answers"]) == len(rows) * len(tasks) * 2
    assert all(len(row["hits"]) == 5 and row["loss"] > 0 for row in result["answers"])
    assert made[False] == made[True] and len(made[True]) == 5 * len(tasks)
    again, _ = measured(*arguments, "--batch", 2, "--caches", "kivi2", file=tmp_path / "2.json")
    losses = {tuple(row.values())[:4]: row["loss"] for row in result["answers"]}
    for row in again["answers"]:
        assert row["loss"] == pytest.approx(losses[tuple(row.values())[:4]], rel=1e-4)


def test_the_memory_benchmark_runs_as_a_user_calls_it(tmp_path):
    """Guards against a benchmark that rots: its table, its JSON line and its file; and against
    bytes that are not those of the caches."""
    result, out = measured("memory", "--models", "llama-3.1-8b", "--lengths", 512, 4096,
                           file=tmp_path / "result.json")
    rows = {(row["cache"], row["tokens"]): row for row in result["bytes_per_token"]}
    assert len(rows) == 2 * (len(CACHES) + 2) and out.count("llama-3.1-8b | ") == len(rows)
    for length in (512, 4096):
        shape = (1, 8, length, 128)
        exact = 32 * FullCache(*shape, dtype=torch.bfloat16).nbytes
        packed = 32 * KiviCache(*shape, dtype=torch.bfloat16, group_size=128).nbytes
        row = rows["kivi2, G = 128", length]
        assert row["formula"] == packed / length
        assert row["ratio"] == exact / packed


@pytest.mark.slow
def test_the_throughput_benchmark_runs_as_a_user_calls_it(tmp_path):
    """Guards against a benchmark that rots: its tables, its JSON line and its file; and against a
    batch beyond the budget, and steps that are added up wrongly."""
    caches = ["bf16", "kivi2 R32"]
    result, out = measured("throughput", *TINY, "--loads", "161/20", "--budget-gb", 0.002,
                           "--layers", 1, "--caches", *caches, file=tmp_path / "result.json")
    assert [row["cache"] for row in result["rows"]] == caches
    for row in result["rows"]:
        assert row["largest"] and row["batch"] > 1
        assert row["formula_bytes"] <= 2e6 and len(row["step_ms"]) == 4
        steps = row["step_ms"]
        decoding = (steps[0] / 2 + steps[1] + steps[2] + steps[3] / 2) * 19 / 3 / 1e3
        assert row["decode_s"] == pytest.approx(decoding, rel=0.1)
        both = row["prefill_s"] + row["decode_s"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 20 / both)
    assert [row["cache"] for row in result["ratios"]] == caches[1:]
    assert "(largest)" in out
    result, out = measured("throughput", *TINY, "--loads", "161/20", "--batches", 1, 2,
                           "--layers", 1, "--caches", "bf16", file=tmp_path / "result.json")
    assert [(row["batch"], row["largest"]) for row in result["rows"]] == [(1, False), (2, False)]
    assert result["ratios"] == [] and "(largest)" not in out


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
    assert len(rows) == 4 and rows["kivi2"]["ratio"] > 0
    assert all(row["error"] < 0.01 for row in rows.values())
    assert "of its floor" in out


@pytest.mark.slow
def test_decode_goes_on_behind_a_cache_that_fails(monkeypatch, capsys):
    """Of a checkpoint. Guards against a table that ends at the first cache that does not fit, and
    a run that measured nothing and says that all is well."""
    made, cpu = bench.random_caches, torch.device("cpu")

    def make(model, batch, capacity, kv):
        if kv == "kivi4":
            raise RuntimeError("out of memory")
        made(model, batch, capacity, kv)

    monkeypatch.setattr(bench, "random_caches", make)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda results, device: 1e9)
    results, model = Results("decode", cpu), ([], str(EMBEDDED), ["bf16"])
    bench.decode(results, cpu, *model, ["bf16", "kivi4", "tiers"], 1, 300, None, None)
    rows = results.rows()
    assert [row["kv"] for row in rows] == ["bf16", "tiers"] and rows[1]["ratio"] > 0
    assert rows[0]["kv_bytes"] > 2 * rows[1]["kv_bytes"] and rows[0]["model"] == EMBEDDED.name
    assert "kivi4 failed: RuntimeError: out of memory" in capsys.readouterr().err
    for arguments, named in ((([*model, ["kivi3"], 2, 300, None, None]), "kivi3"),
                             (([*model, ["bf16"], 2, 300, None, 1]), "leave out --layers"),
                             (([*model, ["bf16"], 2, 99_999, None, None]), "no step")):
        with pytest.raises(ValueError, match=named):
            bench.decode(Results("decode", cpu), cpu, *arguments)
    assert "exceed the model's context" in capsys.readouterr().err


# ---- refusals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ("decode", "throughput"))
def test_what_needs_cuda_is_refused_without_it(what, tmp_path):
    """Guards against numbers of a machine that has no CUDA graphs, minutes before the refusal, and
    a file that holds nothing."""
    file = tmp_path / "result.json"
    result = run(what, "--device", "cpu", "--json", file, main=bench.main)
    check_error(result, f"{what} measures CUDA graphs", "--device cuda")
    assert not file.exists() and result[1] == ""


@pytest.mark.parametrize("load", ("161", "a/b", "0/5", "1/2/3"))
def test_malformed_loads_are_named_before_anything_runs(load):
    """Guards against minutes of measuring before an error."""
    code, out, err = run("throughput", *TINY, "--loads", load, main=bench.main)
    assert code == 2 and load in err and not out


@pytest.mark.parametrize("arguments, named", (
    (("quality", "--checkpoint", "nowhere"), "nowhere"),
    (("quality", "--caches", "kivi3", "--rows", 1, "--prefill", 9, "--tokens", 2), "kivi3"),
    (("quality", "--rows", 10**6), "fewer --rows"),
    (("quality", "--greedy", 0), "--greedy"),
    (("memory", "--json", "nowhere/x.json"), "nowhere/x.json"),
    (("memory", "--device", "abacus"), "abacus"),
))
def test_what_a_benchmark_cannot_do_gets_one_line(arguments, named, monkeypatch):
    """Guards against a traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*arguments, main=bench.main)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and named in line and "Traceback" not in err
