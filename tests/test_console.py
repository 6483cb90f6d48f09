"""How programs end: one line for every error, whatever the terminal, the disk and the files are."""
import io
import os
import subprocess
import sys

import bench
import pytest
from calling import ROOT, check_error, run
from checkpoint import write
from neighbours import calibrate
from program import console


def failing(error):
    """A program that raises."""
    def program(argv):
        raise error

    return lambda argv: console.guarded(program, argv)


@pytest.mark.parametrize("error, named", (
    (ValueError("of the input"), "of the input"),
    (PermissionError(13, "no permission"), "no permission"),
    (MemoryError(), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), "--weights"),
    (RuntimeError("mmap: Cannot allocate memory (os error 12)"), "--weights"),
    (ModuleNotFoundError("No module named 'jinja2'"), "requirements.txt"),
    (RecursionError("maximum recursion depth exceeded"), "recursion"),
), ids=lambda x: type(x).__name__)
def test_an_error_of_the_surroundings_is_one_line(error, named):
    """Guards against tracebacks, and a line that says nothing."""
    check_error(run(main=failing(error)), named)


def test_a_mistake_of_the_program_keeps_its_traceback():
    """Guards against a bug that looks like wrong input."""
    with pytest.raises(ZeroDivisionError):
        run(main=failing(ZeroDivisionError()))


def test_an_interrupt_and_a_closed_pipe_are_silent():
    """Guards against an error line after Ctrl-C or `| head`, and against status 0."""
    assert run(main=failing(KeyboardInterrupt())) == (130, "", "")
    assert run(main=failing(BrokenPipeError())) == (141, "", "")


def test_what_a_file_holds_does_not_reach_the_terminal_as_it_is():
    """Guards against escape sequences, text that is turned around, and values of 20 kB."""
    wild = "\x1b[31mred\x07\r\u202e" + "x" * 20000 + " the advice"
    _, _, err = result = run(main=failing(ValueError(wild)))
    check_error(result, "[31mred", "the advice")
    assert len(err) < 1100 and not set(err) & set("\x1b\x07\r\u202e")
    screen = io.StringIO()
    run(main=lambda argv: console.tell(wild), err=screen)
    assert len(screen.getvalue()) < 1100 and "\x1b" not in screen.getvalue()


@pytest.mark.parametrize("main, arguments, named", (
    (None, ("--nonsense",), "--nonsense"), (None, ("--seed", "x"), "--seed"),
    (None, ("--seed", 10**20), "--seed"), (None, ("--sink", 10**20), "--sink"),
    (bench.main, (), "command"), (bench.main, ("decode", "--batch", "x"), "--batch"),
    (write.main, (), "--out")), ids=str)
def test_wrong_options_get_one_line(main, arguments, named):
    """Guards against the usage before the line, and numbers that torch cannot take."""
    check_error(run(*arguments, **{"main": main} if main else {}), named)


EMPTY = [(None, option) for option in (
    "--checkpoint", "--revision", "--weights", "--predict", "--skip", "--kv", "--save-cache",
    "--load-cache", "--prompt-file", "--prompts", "--stop", "--prefix", "--draft", "--profile")]
EMPTY += [(bench.main, "quality --checkpoint"), (bench.main, "memory --json"),
          (calibrate.main, "nuq x --checkpoint"), (write.main, "--weights")]


@pytest.mark.parametrize("main, options", EMPTY, ids=[options for _, options in EMPTY])
def test_an_empty_value_is_refused(main, options):
    """A variable of the shell that is not set. Guards against an option that is left out in
    silence, so that another model or another text is measured."""
    line = options.split()
    check_error(run(*line, "", **{"main": main} if main else {}), line[-1], "empty")


class Full(io.StringIO):
    """A file on a full disk."""

    def flush(self):
        raise OSError(28, "No space left on device")


def test_what_a_full_disk_does_not_take_is_an_error():
    """Guards against results that are lost at the end of the process, with status 0."""
    out = Full()
    code, _, err = run("--help", out=out)
    check_error((code, "", err), "No space left")


# ---- processes, before anything large is imported ------------------------------------------------

def small_process(code, streams=""):
    """(exit status, stdout, stderr) of a program that begins, in a shell that closes streams."""
    line = f"from program import console; console.begin(); {code}"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, line],
                          capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_an_end_before_the_program_is_like_one_in_it():
    """Guards against the traceback of an interrupt, or of a missing library, among imports."""
    assert small_process("raise KeyboardInterrupt") == (130, "", "")
    check_error(small_process("import nowhere"), "nowhere", "requirements.txt")
    code, _, err = small_process("1 / 0")
    assert code == 1 and "Traceback" in err


def test_closed_streams():
    """Guards against text that vanishes with status 0, statistics in the text, an end of input
    that is a traceback."""
    check_error(small_process("print(1)", ">&-"), "stdout is closed")
    assert small_process("print(1); console.tell('x'); console.note('y')", "2>&-") == (0, "1\n", "")
    assert small_process("print(repr(input))", "<&-")[0] == 0
    assert "EOFError" in small_process("input()", "<&-")[2]


def test_a_terminal_that_lacks_a_character_ends_no_text():
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", "from program import console; console.begin()\n"
                           "print('a\u00e9b')"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a?b\n", "")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
def test_a_termination_prints_what_is_finished():
    """As `kill` and job queues send it. Guards against finished answers that are lost."""
    code = ("import os, signal, time\ndef work(argv):\n    try:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(5)\n"
            "    finally:\n        print('finished')\nconsole.guarded(work, [])")
    assert small_process(code) == (143, "finished\n", "")


@pytest.mark.parametrize("program", (("bench.py",), ("-m", "checkpoint.write")), ids=str)
def test_a_library_that_cannot_be_imported(program, tmp_path):
    """Guards against a program that begins after its imports."""
    for library in ("torch", "safetensors"):
        (tmp_path / f"{library}.py").write_text("raise OSError('libcudart.so: no such file')")
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    check_error((done.returncode, done.stdout, done.stderr), "libcudart.so")


def test_an_unwritable_compile_cache_is_one_line(tmp_path, monkeypatch):
    """Guards against a report that makes the folder itself, and fails as the compiler did."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    code = compile(f"import os; os.makedirs({str(folder)!r})", "torch/_inductor/x.py", "exec")
    result = run(main=lambda argv: console.guarded(lambda argv: exec(code), argv))
    check_error(result, "the compiler failed", "--no-compile", f"delete {folder}")
