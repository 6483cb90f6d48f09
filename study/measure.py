"""What every measurement stands on: results that survive an early end, and times beside ceilings.

The ceiling of a time: the bytes that must move, over the measured bandwidth of a large copy.
"""
import json
import math
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

from decoding.decoder import side_stream
from program.parallel import processes


class Results:
    """What a command measures: facts of the run, and rows that grow as it goes."""

    def __init__(self, command, device):
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        self.data = {
            "what": command,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else name,
            "processes": processes(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
        }

    def rows(self):
        return self.data.setdefault("rows", [])

    def add(self, row):
        self.rows().append(row)

    def write(self, path):
        Path(path).write_text(json.dumps(self.data, indent=1) + "\n")


def say(text):
    """Progress goes to stderr: stdout holds the tables and the JSON."""
    print(text, file=sys.stderr, flush=True)


def add_ratios(rows, time, same, is_full):
    """Notes in every row how many times as long the best row in full precision takes.

    time, same  keys: the times that are compared, and what the compared rows have in common
    is_full     function of a row: is it one of full precision?
    """
    for row in rows:
        times = [full[time] for full in rows if is_full(full) and full[same] == row[same]]
        row["ratio"] = min(times) / row[time] if times else None


def print_table(columns, rows):
    """A table in Markdown on stdout. columns, rows: texts with " | " between the cells."""
    print(f"\n| {columns} |\n{'|---' * len(columns.split(' | '))}|")
    for row in rows:
        print(f"| {row} |")


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def clock(call, repeats):
    """Median seconds of a call until the device is done, by the host's clock."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def clock_replays(graph, repeats, before=None):
    """Median seconds of a replay of a CUDA graph, by the device's clock.

    before  called ahead of every replay, not counted
    """
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before:
            before()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def clock_calls(calls, device, repeats=30):
    """Median seconds of one of the calls: in one CUDA graph, or on a CPU one after the other."""
    def run_all():
        return [call() for call in calls]  # kept: in a graph each result has memory of its own

    if device.type != "cuda":
        run_all()
        return clock(run_all, repeats) / len(calls)
    calls = calls * math.ceil(8 / len(calls))  # the launch of a graph takes 5 us, which they share
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_all()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_all()
    graph.replay()
    del results
    return clock_replays(graph, repeats) / len(calls)


def copy_bandwidth(results, device):
    """Bytes a second that a large copy reads and writes: the ceiling of all that is measured."""
    x = torch.ones(2 ** (28 if device.type == "cuda" else 25), device=device)
    y = torch.empty_like(x)
    calls = (lambda: y.copy_(x), lambda: torch.neg(x, out=y))  # a copy may use a slower engine
    bandwidth = 2 * x.nbytes / min(clock_calls([call], device, 20) for call in calls)
    results.data["copy_GB/s"] = bandwidth / 1e9
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    return bandwidth
