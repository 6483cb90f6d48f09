"""Fits to a model what some methods need before they run, by forward passes over a text.

    python -m neighbours.calibrate METHOD FILE --text book.txt --checkpoint smollm2-135m-instruct

The file goes behind a name for --kv, mostly the method's: `generate.py --kv METHOD:FILE`. Take
another text than the one that a quality is measured on.
"""
import argparse

import torch

from checkpoint.hub import resolve
from checkpoint.text import encode, load_tokenizer, one_line, read_text
from model import ModelConfig, Transformer
from neighbours import fit, fitted, nuq_levels, predict, registry  # noqa: F401 - names of caches
from program import console

FEWEST = 64  # tokens of a row: nuq3 fitted to 32 misses a third more, to 2 it writes no text
# By method: a function of (model, tokens [rows, n], its own option) to the tensors of the file, by
# name; and that option on the command line, its default and its help.
COMMANDS = {
    "prefixkv": (fit.fit_slots, "--slots", 256, "of a layer in the mean, in 64s (default 256)"),
    "zipvl": (fit.fit_shares, "--share", 0.5, "in 4 bits, in the mean (default 0.5)"),
    "gate": (fit.fit_gate, "--share", 0.2, "of the tokens that stay (default 0.2)"),
    "nuq": (nuq_levels.calibrate,),
    "predict": (predict.fit,),
}


def rows_of(tokenizer, text, rows, n):
    """Tokens [rows, n] from the beginning of a text. raises ValueError: it is too short"""
    start = tokenizer.encode("").ids
    ids = encode(tokenizer, [{"role": "user", "content": text}])[len(start) :]
    own = n - len(start)  # of the text, in a row
    if rows < 1 or len(ids) < rows * own:
        raise ValueError(f"a text of {len(ids)} tokens does not give {rows} rows of {n} tokens: "
                         "take a longer --text, or fewer --rows or --tokens")
    return torch.tensor([start + ids[i * own : (i + 1) * own] for i in range(rows)])


def parse(argv):
    """The values of the command line, by name."""
    parser = console.Parser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="method", required=True, metavar="method")
    commands.type = str  # else an empty value is refused under the command's name
    for name, (run, *own) in COMMANDS.items():
        add = commands.add_parser(name, help=run.__doc__, description=run.__doc__).add_argument
        add("file", metavar="FILE", help="where the result goes")
        add("--checkpoint", help="as in generate.py")
        add("--text", required=True, help="text file")
        add("--rows", type=int, default=4, help="rows of text (default 4)")
        add("--tokens", type=int, default=1024, help="tokens of a row (default 1024)")
        if own:
            option, default, text = own
            add(option, type=type(default), default=default, help=text)
    return vars(parser.parse_args(argv))


def calibrate(method, file, checkpoint, text, rows, tokens, **options):
    console.check_writable(file)  # before minutes of fitting
    folder = resolve(checkpoint)
    tokenizer = load_tokenizer(folder)
    with one_line(f"--text {text} cannot be used"):
        ids = rows_of(tokenizer, read_text(text), rows, tokens)
    longest = ModelConfig.from_folder(folder).max_len
    if not FEWEST <= tokens <= longest:
        raise ValueError(f"--tokens must lie in {FEWEST} .. {longest}, the model's context, got "
                         f"{tokens}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer.from_pretrained(folder, device)
    fitted.write(file, method, COMMANDS[method][0](model, ids.to(device), **options), model)


def main(argv=None):
    console.guarded(lambda argv: calibrate(**parse(argv)), argv)


if __name__ == "__main__":
    main()
