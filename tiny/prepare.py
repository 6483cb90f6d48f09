"""Makes the folder that train.py reads: the tokenizer, the tokens of the texts and config.json.

    python tiny/prepare.py --corpus CORPUS --out RUN

CORPUS holds children.txt, prose.txt (books separated by a line <|endoftext|>) and manifest.tsv (one
book a row, in the files' order). Four whole books are held out, and one run of paragraphs is held
back from every other book.
"""
import argparse
import csv
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

HERE = Path(__file__).resolve().parent
COPIED = ("config.json", "generation_config.json", "tokenizer_config.json")
HELD_OUT = {
    "Black Beauty",
    "The Story of Doctor Dolittle",
    "Ethan Frome",
    "The Sign of the Four",
}
VOCABULARY = 4096
ROW = 1024  # tokens of a row that is held back
EOS = 2
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = r"▁?\p{L}+|\p{N}|\s+|▁?[^\s\p{L}\p{N}▁]+|▁+"  # digits stand alone


def train_tokenizer(texts):
    """Llama-2 style BPE: ids 0-2 are SPECIAL, 3-258 the bytes, then the learnt pieces."""
    tok = Tokenizer(models.BPE())
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tok.normalizer = normalizers.Sequence(steps)
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tok.train_from_iterator(texts, BpeTrainer(vocab_size=VOCABULARY - 259, limit_alphabet=100))
    learnt = json.loads(tok.to_str())["model"]
    by_id = sorted(learnt["vocab"], key=learnt["vocab"].get)
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + by_id
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tok.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tok.add_special_tokens(SPECIAL)
    tok.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    tok.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tok


def read_books(corpus):
    """{title: text} of all books of a corpus."""
    manifest, *files = (
        (corpus / name).read_text(encoding="utf-8")
        for name in ("manifest.tsv", "children.txt", "prose.txt")
    )
    rows = csv.DictReader(manifest.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    texts = [text for file in files for text in file.split("\n<|endoftext|>\n")]
    return {row["title"]: text.strip() for row, text in zip(rows, texts, strict=True)}


def prepare(corpus, out, seed):
    """Writes a checkpoint folder without weights, and tokens.safetensors.

    The latter holds train [N], held_out [M] and held_back [books, ROW] in int16.
    """
    books = read_books(corpus)
    tok = train_tokenizer(text for title, text in books.items() if title not in HELD_OUT)
    rng = random.Random(seed)  # chooses the paragraphs that are held back
    rows = {"train": [], "held_out": [], "held_back": []}
    for title, text in books.items():
        name = "held_out" if title in HELD_OUT else "train"
        if name == "train":  # hold back a run of whole paragraphs, long enough for one row
            start = text.index("\n\n", rng.randrange(len(text) - 12000))
            end = text.index("\n\n", start + 6000)
            rows["held_back"].append(tok.encode(text[start + 2 : end]).ids[:ROW])
            text = text[:start] + text[end:]
        rows[name] += [*tok.encode(text).ids, EOS]  # <s> book </s>
    tokens = {name: torch.tensor(ids, dtype=torch.int16) for name, ids in rows.items()}
    save_file(tokens, out / "tokens.safetensors")
    tok.save(str(out / "tokenizer.json"))
    for name in COPIED:
        shutil.copy(HERE / name, out)


def main():
    parser = argparse.ArgumentParser(description="tokenizer and token files for train.py")
    parser.add_argument("--corpus", type=Path, required=True,
                        help="folder with children.txt, prose.txt and manifest.tsv")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.corpus, args.out, seed=1)


if __name__ == "__main__":
    main()
