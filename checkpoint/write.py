"""Writes a checkpoint whose linear weights are quantized; it loads like any other.

    python -m checkpoint.write --checkpoint FOLDER --weights int4 --out DIR
"""
from program import console

if __name__ == "__main__":
    console.begin()

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from checkpoint.config import check_files, read_json
from checkpoint.weights import (
    INDEX, has_own_head, is_float, reading, weight_files, weight_form,
)
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
    check_files(folder)
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
                check_link(file)
                shutil.copyfile(file, part / file.name)
        _write_json(part / "config.json", config)
        if (folder / INDEX).exists():
            _write_json(part / INDEX, index)
        if out.exists():  # Windows replaces no folder
            out.rmdir()
        part.replace(out)
    except BaseException:
        shutil.rmtree(part)
        raise


def check_link(file):
    """Raises ValueError for a link out of the folder: what it shows would get into the copy.

    In the hub's cache, files are links into other folders of that cache.
    """
    folder = file.parent.resolve()
    if folder.parent.name == "snapshots":
        folder = folder.parents[2]
    if not file.resolve().is_relative_to(folder):
        raise ValueError(f"{file} is a link to {file.resolve()}: put a copy in its place if it "
                         "belongs to the checkpoint")


def _write_weights(files, out, form):
    """Writes every file quantized, one at a time. returns the index of all, as safetensors' is."""
    names = {}
    size = 0
    for file in files:
        with reading(file):
            tensors = load_file(file)
        _quantize(tensors, form, file)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        shutil.copymode(file, out / file.name)  # or only its writer could read it
        names |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        console.tell(f"{file.name}: {len(tensors)} tensors")
    return {"metadata": {"total_size": size}, "weight_map": names}


def _quantize(tensors, form, file):
    """Replaces the linear weights in a dict of tensors; the embedding stays."""
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    for name in matrices:
        if name.endswith(".weight") and "embed" not in name:
            layer = name.removesuffix("weight")
            weight = tensors.pop(name)
            if not (is_float(weight) and weight.numel()):
                raise ValueError(f"{name} in {file} is {weight.dtype} of shape "
                                 f"{tuple(weight.shape)}, which cannot be quantized: "
                                 "use the model's original checkpoint")
            if weight.itemsize in (1, 8):
                weight = weight.float()
            packed, meta = quantize_weight(weight, *weight_form(name, form))
            tensors[layer + "packed"] = packed
            tensors[layer + "meta"] = meta


def _write_json(file, value):
    file.write_text(json.dumps(value, indent=1) + "\n")


def main(argv=None):
    console.guarded(write, argv)


def write(argv):
    parser = console.Parser(
        description="Write a checkpoint with quantized linear weights; "
        "the embedding stays, an untied head becomes int8."
    )
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="folder in the Hugging Face layout, with safetensors")
    parser.add_argument("--weights", default="int4", help="int8, int4 (groups of 32) or int4:G "
                        "with G = 32, 64 or 128 (default int4)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    args = parser.parse_args(argv)
    write_quantized(args.checkpoint, args.weights, args.out)


if __name__ == "__main__":
    main()
