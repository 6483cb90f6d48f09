"""How the tests call the programs: as a user does in a process, or inside this one."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from fused.step import Step
from model import Transformer
from program import cli

ROOT = Path(__file__).resolve().parent.parent
ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
FIELDS = {  # of the JSON object
    "text", "prompt_tokens", "new_tokens", "prefill_s", "decode_s", "tokens_per_s", "kv",
    "kv_bytes", "kv_bytes_full", "peak_bytes",
}


def process(*args):
    """A Python process in the project's folder: its returncode, stdout and stderr."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          timeout=300, env=os.environ | ENV, cwd=ROOT)


def command(*args):
    """generate.py as a process."""
    return process(ROOT / "generate.py", *args)


def run(*args, main=cli.main, out=None, err=None):
    """(exit status, stdout, stderr) of a program inside this process."""
    out = out or io.StringIO()
    err = err or io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, args)])
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def result_of(*args):
    """The JSON object of a run inside this process."""
    code, out, err = run(*args, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def type_lines(monkeypatch, *lines):
    """Lets `input` read these lines, then the end of input."""
    rest = iter(lines)

    def read(prompt=""):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def check_error(result, *named):
    """Exit status 2 and one line that begins with "error:" and names what is wrong."""
    code, out, err = result
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, err)
    assert "Traceback" not in out + err
    for text in named:
        whole = rf"(?<![\w.]){re.escape(text)}(?!\d)"  # a number: not a part of another
        assert re.search(whole, lines[0]), f"{text!r} is not named in: {lines[0]}"


def as_compiled(monkeypatch, wrap=None):
    """Lets --compile do as good as nothing: the program cannot tell, and no test waits for
    Inductor.

    wrap  a function that replaces every function of a decode step
    """
    def compile(self, prefill=False):
        self.compiled = True
        if wrap:
            self.step = Step(**{name: wrap(part) for name, part in vars(self.step).items()})

    monkeypatch.setattr(Transformer, "compile", compile)
