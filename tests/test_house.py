"""The limits of this project's files, and that each of them can fail.

A check is a function of a folder that returns the faults it found, one a line.
"""
import ast
import io
import re
import shutil
import subprocess
import tokenize
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LINES, TEST_LINES, FUNCTION_LINES = 100, 420, 700, 60
README_LINES, README_WIDTH = 150, 120
# Code tokens of all that is no test, by room: each grows with its own features alone.
TOKENS = {"quantize.py, kivi.py": 7_420, "model.py, generate.py": 4_640, "decoding": 3_080,
          "fused": 10_150, "checkpoint": 7_650, "program": 9_980, "bench.py, study": 9_760,
          "examples, tiny": 4_540, "neighbours": 15_700}
TOP = {"quantize.py", "kivi.py", "model.py", "generate.py", "bench.py", "test_kivi.py"}
# Every module of the product. One may import only those above it.
ORDER = """
quantize
kivi
fused.attention fused.full fused.drafts fused.linear fused.linear_launches fused.step
program.parallel program.console
checkpoint.rope checkpoint.families checkpoint.names checkpoint.config checkpoint.shares
checkpoint.room checkpoint.weights checkpoint.write checkpoint.hub checkpoint.text
model
neighbours.fitted neighbours.observed neighbours.packed neighbours.tiers neighbours.evict
neighbours.fit neighbours.nuq_levels neighbours.nuq neighbours.retrieve neighbours.predict
neighbours.skip neighbours.registry neighbours.calibrate
decoding.decoder decoding.speculate
generate
program.memory program.report program.saved program.chat program.batch program.cli
study.measure study.models study.prompts study.variants study.scatter
study.throughput study.quality study.memory
bench
""".split()
SCRIPTS = ("examples",)  # programs beside the product: no module imports them
# The command line stands in program/, which imports generate.
EXCEPTIONS = {("generate", "program.cli")}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}
# Written with classes of one character, or this file would hold them itself.
FOREIGN = re.compile(r"/(?:wor[k]|roo[t]|hom[e]|User[s]|mn[t]|workspac[e]s?)/"
                     r"|pypi[.]or[g]|pythonhoste[d]|artifactor[y]|--index-ur[l]|extra-index-ur[l]"
                     r"|registry[.]npmj[s]|simple/\?forma[t]")


def tracked(folder):
    """Names of the project's files in a folder: git's, or without git all but hidden ones."""
    listed = subprocess.run(["git", "ls-files"], cwd=folder, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.split("\n")
        return [name for name in names if name and (folder / name).exists()]
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    hidden = (".", "__pycache__", "shared")
    return sorted(str(path) for path in paths
                  if not any(part.startswith(hidden) for part in path.parts[:-1]))


def python_files(folder):
    """(name, text, is it a test?) of every Python file."""
    for name in tracked(folder):
        if name.endswith(".py"):
            text = (folder / name).read_text(encoding="utf-8")
            yield name, text, name.startswith(("tests/", "test_"))


def texts(folder):
    """(name, text) of every file that is text."""
    for name in tracked(folder):
        try:
            yield name, (folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            pass


parsed = cache(ast.parse)  # most files are those of the check before


def functions(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


# ---- the checks ---------------------------------------------------------------------------------

def long_files(folder):
    for name, text, is_test in python_files(folder):
        limit = TEST_LINES if is_test else LINES
        n = len(text.splitlines())
        if n > limit:
            yield f"{name} has {n} lines, at most {limit}"


def wide_lines(folder):
    for name, text, _ in python_files(folder):
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > WIDTH:
                yield f"{name}, line {number} has {len(line)} columns, at most {WIDTH}"


def long_functions(folder):
    for name, text, _ in python_files(folder):
        for function in functions(parsed(text)):
            n = function.end_lineno - function.lineno + 1
            if n > FUNCTION_LINES:
                yield f"{name}: {function.name} has {n} lines, at most {FUNCTION_LINES}"


def other_names_at_the_top(folder):
    found = {name for name, _, _ in python_files(folder) if "/" not in name}
    yield from (f"{name} is missing at the top" for name in TOP - found)
    yield from (f"{name} does not belong at the top" for name in found - TOP)


@cache
def code_tokens(text):
    """Tokens of a Python file that are neither comment, docstring nor layout."""
    tree = parsed(text)
    docstrings = set()
    for node in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)),
                 *functions(tree)]:
        if ast.get_docstring(node, clean=False) is not None:
            docstrings.add(node.body[0].lineno)
    code = [token for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in NO_CODE]
    return sum(token.type != tokenize.STRING or token.start[0] not in docstrings
               for token in code)


def too_much_code(folder):
    rooms = {name: room for room in TOKENS for name in room.split(", ")}
    totals = Counter()
    for name, text, is_test in python_files(folder):
        if not is_test:
            totals[rooms.get(name.split("/")[0], name)] += code_tokens(text)
    for room, total in totals.items():
        if total > TOKENS.get(room, 0):
            yield f"{room}: {total} code tokens, at most {TOKENS.get(room, 0)}"


def imported(node):
    """The modules that an import statement may mean, by their names with dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def wrong_arrows(folder):
    """Imports of what does not stand above, wherever in a file."""
    rooms = {name.split(".")[0] for name in ORDER} | {"tests", "test_kivi", *SCRIPTS}
    for name, text, is_test in python_files(folder):
        module = name.removesuffix(".py").replace("/", ".")
        script = name.startswith(SCRIPTS)
        if is_test:
            continue
        if module not in ORDER and not script:
            yield f"{name} has no place in the order of rooms"
            continue
        above = ORDER if script else ORDER[: ORDER.index(module)]
        for node in ast.walk(parsed(text)):
            for target in imported(node):
                ours = target in ORDER or target in rooms and not any(
                    other.startswith(target + ".") for other in ORDER)
                if ours and target not in above and (module, target) not in EXCEPTIONS:
                    yield f"{name}, line {node.lineno} imports {target}, which is not above it"


def early_exceptions(folder):
    """generate.py may import the command line only where it runs as a program."""
    for name, text, _ in python_files(folder):
        module = name.removesuffix(".py").replace("/", ".")
        tree = parsed(text)
        at_the_end = ast.unparse(tree.body[-1]) if tree.body else ""
        is_main = at_the_end.startswith("if __name__ == '__main__':")
        last = set(ast.walk(tree.body[-1])) if is_main else set()
        for node in ast.walk(tree):
            if any((module, x) in EXCEPTIONS for x in imported(node)) and node not in last:
                yield f"{name}, line {node.lineno}: only its last lines may import that"


def long_readme(folder):
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    if len(lines) > README_LINES:
        yield f"README.md has {len(lines)} lines, at most {README_LINES}"
    for number, line in enumerate(lines, 1):
        if len(line) > README_WIDTH:
            yield f"README.md, line {number} has {len(line)} columns, at most {README_WIDTH}"


def foreign_places(folder):
    """Paths of somebody's machine, and where packages came from."""
    for name, text in texts(folder):
        for number, line in enumerate(text.splitlines(), 1):
            found = FOREIGN.search(line)
            if found:
                yield f"{name}, line {number} holds {found[0]!r}"


CHECKS = (long_files, wide_lines, long_functions, other_names_at_the_top, too_much_code,
          wrong_arrows, early_exceptions, long_readme, foreign_places)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check):
    """Guards against files that grow, and arrows that turn, a little with every change."""
    faults = list(check(ROOT))
    assert not faults, "\n".join(faults)


# ---- every check can fail -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project's files, without what is larger than a megabyte."""
    folder = tmp_path_factory.mktemp("house") / "copy"
    for name in tracked(ROOT):
        if (ROOT / name).stat().st_size < 2**20:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@lru_cache
def faults_of_the_copy(check, copy):
    return set(check(copy))


LONG_FUNCTION = "\n\ndef long():\n" + "    pass\n" * FUNCTION_LINES
MUTATIONS = [  # (the check that must notice, the file, what it gets at its end)
    (long_files, "kivi.py", "\n" * LINES),
    (long_files, "tests/test_house.py", "\n" * (TEST_LINES + 1)),
    (wide_lines, "program/cli.py", "#" * (WIDTH + 1)),
    (long_functions, "study/measure.py", LONG_FUNCTION),
    (long_functions, "tests/calling.py", LONG_FUNCTION),
    (other_names_at_the_top, "more.py", "x = 1\n"),
    (too_much_code, "fused/step.py", "x = 1\n" * 1_000),
    (too_much_code, "kivi.py", "x = 1\n" * 100),
    (too_much_code, "more.py", "x = 1\n"),
    (wrong_arrows, "quantize.py", "import kivi\n"),
    (wrong_arrows, "kivi.py", "\ndef f():\n    from fused.attention import stored\n"),
    (wrong_arrows, "fused/linear.py", "from fused import step\n"),
    (wrong_arrows, "checkpoint/hub.py", "import model\n"),
    (wrong_arrows, "generate.py", "    from program import chat\n"),
    (wrong_arrows, "program/memory.py", "from study.measure import say\n"),
    (wrong_arrows, "bench.py", "from tests import calling\n"),
    (wrong_arrows, "study/more.py", "x = 1\n"),
    (early_exceptions, "generate.py", "\n\ndef f():\n    from program.cli import main\n"),
    (long_readme, "README.md", "\n" * README_LINES),
    (long_readme, "README.md", "x" * (README_WIDTH + 1)),
    (foreign_places, "docs/speed.md", "see /ho" + "me/me/notes\n"),
    (foreign_places, "results/attention-forms.md", "from https://pypi" + ".org/simple\n"),
]


@pytest.mark.parametrize("check, name, more", MUTATIONS,
                         ids=[f"{check.__name__}, {name}" for check, name, _ in MUTATIONS])
def test_the_check_notices(check, name, more, copy):
    """Guards against a check that looks at nothing."""
    file = copy / name
    before = file.read_bytes() if file.exists() else None
    known = faults_of_the_copy(check, copy)
    with file.open("a", encoding="utf-8") as end:
        end.write(more)
    try:
        faults = set(check(copy)) - known
        assert faults and all(Path(name).name in fault or "tokens" in fault for fault in faults)
    finally:
        file.unlink() if before is None else file.write_bytes(before)
