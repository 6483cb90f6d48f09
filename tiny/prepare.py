"""Makes the tokenizer and the token files that train.py reads.

    python prepare.py --corpus CORPUS --out RUN

CORPUS holds children.txt, prose.txt (books separated by a line <|endoftext|>) and manifest.tsv (one book a row, in the
files' order). Four whole books are held out, and one run of paragraphs is held back from every other book.
"""
import argparse, csv, json, random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HELD_OUT = {"Black Beauty", "The Story of Doctor Dolittle", "Ethan Frome", "The Sign of the Four"}
VOCABULARY, ROW = 4096, 1024


def train_tokenizer(texts):
    """Llama-2 style BPE: ids 0-2 are <unk> <s> </s>, 3-258 the bytes, then the learnt pieces; digits stand alone."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\p{N}|\s+|▁?[^\s\p{L}\p{N}▁]+|▁+"), "isolated")
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY - 259, limit_alphabet=100))
    learnt = json.loads(tok.to_str())["model"]
    special, by_id = ["<unk>", "<s>", "</s>"], sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocab = {piece: i for i, piece in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256)), *by_id])}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tok.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tok.add_special_tokens(special)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tok


def prepare(corpus, out, seed):
    """Writes tokenizer.json, tokenizer_config.json and tokens.safetensors: train [N], held_out [M] and held_back
    [books, ROW], int16."""
    with open(corpus / "manifest.tsv", newline="", encoding="utf-8") as f:
        titles = [row["title"] for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    texts = [text.strip() for name in ("children.txt", "prose.txt")
             for text in (corpus / name).read_text(encoding="utf-8").split("\n<|endoftext|>\n")]
    books = dict(zip(titles, texts, strict=True))
    tok = train_tokenizer(text for title, text in books.items() if title not in HELD_OUT)
    rng, rows = random.Random(seed), dict(train=[], held_out=[], held_back=[])
    for title, text in books.items():
        if title not in HELD_OUT:  # hold back a run of whole paragraphs, long enough for one row
            start = text.index("\n\n", rng.randrange(len(text) - 12000))
            end = text.index("\n\n", start + 6000)
            rows["held_back"].append(tok.encode(text[start + 2:end]).ids[:ROW])
            text = text[:start] + text[end:]
        rows["held_out" if title in HELD_OUT else "train"] += tok.encode(text).ids + [2]  # <s> book </s>
    save_file({k: torch.tensor(v, dtype=torch.int16) for k, v in rows.items()}, out / "tokens.safetensors")
    tok.save(str(out / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                  model_max_length=4096, clean_up_tokenization_spaces=False)
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    ap = argparse.ArgumentParser(description="tokenizer and token files for train.py")
    ap.add_argument("--corpus", type=Path, required=True, help="folder with children.txt, prose.txt and manifest.tsv")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seed", type=int, default=1, help="chooses the paragraphs held back")
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args.corpus, args.out, args.seed)


if __name__ == "__main__":
    main()
