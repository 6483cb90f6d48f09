"""What a program says on stderr, and how it ends: an error is one line and exit status 2.

It imports nothing large: `begin` comes before the imports of a program, which can fail as well.
"""
import argparse
import os
import re
import signal
import sys
from pathlib import Path
from traceback import format_exception

HALF = 500  # characters: values that stand in files may be of any length


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self.register("type", None, filled)  # of every option that names no type

    def error(self, message):  # argparse's own writes the usage before it, many lines
        raise ValueError(f"{message} (--help names all options)")


def filled(text):
    """A value of the command line. What stands for a variable that is not set must not be taken
    for an option that was left out."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty (a variable that is not set?): give a value, "
                                         "or leave the option out")
    return text


def tell(text):
    if text:
        print(printable(text), file=sys.stderr)


def printable(text):
    """A text without what would control a terminal, and without its middle where it is long."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return text if len(text) <= 2 * HALF else f"{text[:HALF]} ... {text[-HALF:]}"


def note(text=""):
    """Shows what takes long in the last line of a terminal, until the next note."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def begin():
    """Prepares the process of a program, before its imports."""
    sys.excepthook = hook
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is finished is printed first
    sys.stdin = sys.stdin or open(os.devnull)  # where they are closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        raise ValueError("stdout is closed: open it, the text goes there")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character ends no text


def check_writable(file):
    """Raises ValueError where a file cannot be written, and makes none."""
    path = Path(file)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: choose a file in a folder that exists")


def hook(kind, error, trace):
    end(error)
    sys.__excepthook__(kind, error, trace)


def guarded(program, argv):
    """Runs a program: its errors become one line and exit status 2."""
    from program.parallel import leave

    try:
        try:
            program(argv)
        finally:
            sys.stdout.flush()  # later, its error would be nobody's
    except BaseException as error:
        end(error)
        raise
    finally:
        leave()


def end(error):
    """Ends the process with a line about an error; returns where it is a mistake of the program."""
    if isinstance(error, (KeyboardInterrupt, BrokenPipeError)):  # Ctrl-C, `| head`
        # As the shell says for SIGINT and SIGPIPE. What there is so far has been printed.
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 141)
    line = explained(error)
    if line is None:
        return
    note()
    rank = int(os.environ.get("RANK", 0))
    stderr = sys.__stderr__ if rank else sys.stderr
    who = f"process {rank}: " if rank else ""
    stderr.write(printable(f"error: {who}{' '.join(line.split())}") + "\n")  # at once, of several
    sys.exit(2)


def explained(error):
    """What to tell a user about an error; None for a mistake of the program.

    When a run is killed while it compiles, the compiler's cache may keep half a file, over which
    later runs stumble in many ways: in JSON, pickle, zlib, Triton, the C++ compiler, the linker.
    """
    compiler = re.search(r"torch[/\\]_inductor|triton[/\\](backends|compiler|runtime)",
                         "".join(format_exception(error)))
    if compiler and not out_of_memory(error):
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # which the compiler sets itself
        reason = " ".join(str(error).splitlines()[:2])
        return (f"the compiler failed ({type(error).__name__}: {reason}): leave it out with "
                "--no-compile; if its cache is the reason (a killed run may have left it "
                f"broken), delete {cache} or let TORCHINDUCTOR_CACHE_DIR name a folder to write to")
    wrong_input = (ValueError, OSError, RecursionError)  # the last of deep JSON
    if isinstance(error, wrong_input) or type(error).__name__ == "SafetensorError":
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}: pip install -r requirements.txt"
    if out_of_memory(error):
        return f"{str(error) or 'out of memory'}: shorten the prompts, or take smaller --weights"
    return None


def out_of_memory(error):
    texts = "out of memory|not enough memory|(cannot|can't) allocate memory"
    return isinstance(error, MemoryError) or bool(re.search(texts, str(error), re.I))
