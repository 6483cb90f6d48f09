"""Writes a checkpoint whose linear weights are quantized; it loads like any other.

    python -m checkpoint.write --checkpoint FOLDER --weights int4 --out DIR
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from checkpoint.config import read_json
from checkpoint.weights import INDEX, has_own_head, reading, weight_files, weight_form
from fused.linear import quantize_weight, weight_format

COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")  # the tokenizer and the like


def write_quantized(folder, weights, out):
    """Writes a copy of a checkpoint whose linear weights are the two tensors of a QuantizedLinear.

    weights  "int8", "int4" or "int4:G"
    out      a folder, new or empty; it appears when all of it is there
    raises   ValueError, OSError: not a checkpoint, or weights that do not fit, or `out` holds files
    """
    form = weight_format(weights)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder")
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise ValueError(f"{folder} holds quantized weights already: "
                         "use the model's original checkpoint")
    files = weight_files(folder)
    if has_own_head(files):
        config["tie_word_embeddings"] = False
    bits, group_size = form
    config["quantization_config"] = {
        "quant_method": "kivi-weights", "bits": bits, "group_size": group_size,
    }
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True)
    try:
        index = _write_weights(sorted(set(files.values())), part, form)
        for pattern in COPIED:
            for file in folder.glob(pattern):
                shutil.copyfile(file, part / file.name)
        _write_json(part / "config.json", config)
        if (folder / INDEX).exists():
            _write_json(part / INDEX, index)
        part.replace(out)
    except BaseException:
        shutil.rmtree(part)
        raise


def _write_weights(files, out, form):
    """Writes every file quantized, one at a time. returns the index of all, as safetensors' is."""
    names = {}
    size = 0
    for file in files:
        with reading(file):
            tensors = load_file(file)
        _quantize(tensors, form)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        shutil.copymode(file, out / file.name)  # or only its writer could read it
        names |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{file.name}: {len(tensors)} tensors", file=sys.stderr)
    return {"metadata": {"total_size": size}, "weight_map": names}


def _quantize(tensors, form):
    """Replaces the linear weights in a dict of tensors; the embedding stays."""
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    for name in matrices:
        if name.endswith(".weight") and "embed" not in name:
            layer = name.removesuffix("weight")
            packed, meta = quantize_weight(tensors.pop(name), *weight_form(name, form))
            tensors[layer + "packed"] = packed
            tensors[layer + "meta"] = meta


def _write_json(file, value):
    file.write_text(json.dumps(value, indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Write a checkpoint with quantized linear weights; "
        "the embedding stays, an untied head becomes int8."
    )
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="folder in the Hugging Face layout, with safetensors")
    parser.add_argument("--weights", default="int4", help="int8, int4 (groups of 32) or int4:G "
                        "with G = 32, 64 or 128 (default int4)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    try:
        write_quantized(args.checkpoint, args.weights, args.out)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
