"""Reads the weights of a checkpoint from its safetensors files, without a conversion step."""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.config import read_json
from checkpoint.names import NAMES
from checkpoint.room import check_room
from checkpoint.shares import read_share
from fused.linear import quantize_weight

INDEX = "model.safetensors.index.json"


@dataclass
class Target:
    """Where a tensor of a checkpoint goes."""

    views: list  # of a tensor of the model, in the order of the checkpoint's rows
    parameter: str  # name inside a layer, as in the tables
    part: object  # as in the tables


def load_weights(model, folder, progress=None):
    """Copies every tensor of a checkpoint into the model, one at a time.

    model     a Transformer, its parameters allocated; layers of quantized weights quantize what
              the checkpoint holds in full precision
    progress  called with the share of the tensors that are there, 0 .. 1, after each of them
    raises    ValueError: a file is missing or damaged, a tensor is of another shape, or there are
              too few or too many of them (all named at once)
    """
    folder = Path(folder)
    files = weight_files(folder)
    if model.config.tied and "lm_head.weight" in files and has_own_head(files):
        print(f"{folder}: config.json ties the head to the embedding, but the files hold another "
              "head: it is used", file=sys.stderr)
        model.config.tied = False
        model.head.weight = torch.nn.Parameter(torch.empty_like(model.embed.weight))
    check_room(model)
    targets = _targets(model)
    missing = set(targets)
    unexpected = []
    for name, file in files.items():
        filled = _targets_of(name, targets)
        if filled:
            _copy(model, file, name, [targets[target] for target in filled])
            missing -= set(filled)
            if progress:
                progress(1 - len(missing) / len(targets))
        elif not _may_be_ignored(name, model.config):
            unexpected.append(name)
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its config.json; missing: {_some(missing)}; "
                         f"unexpected: {_some(unexpected)}")


def has_own_head(files):
    """Do the files of `weight_files` hold a head that is not the embedding once more?"""
    pair = []
    for name, file in files.items():
        if name == "lm_head.weight" or "embed" in name:
            with reading(file), safe_open(file, framework="pt") as tensors:
                pair.append(tensors.get_tensor(name))
    return len(pair) == 2 and not torch.equal(*pair)


def weight_files(folder):
    """The safetensors file of every tensor of a checkpoint, by its name.

    raises ValueError: one does not exist, the index names files outside the folder, or there is
           one for all beside those of the index
    """
    names = {"every tensor": "model.safetensors"}
    index = folder / INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or any(Path(str(n)).name != n for n in names.values()):
            raise ValueError(f"{index} has no weight_map of file names in its folder: "
                             "download it again")
    paths = [folder / name for name in sorted(set(names.values()))]
    for file in paths:
        if not file.is_file():
            pickles = sorted(folder.glob("*.bin"))  # not read: they can run code
            only = f", only {pickles[0].name}" if pickles else ""
            raise ValueError(
                f"{file} does not exist{only}: download it again; if the checkpoint has no "
                "safetensors and you trust it, write them with transformers, "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            )
    whole = folder / "model.safetensors"
    if whole.exists() and whole not in paths:
        raise ValueError(f"{folder} holds {whole.name}, and an index of other files: "
                         "remove the one that is not meant")
    files = {}
    for file in paths:
        with reading(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name in files:
                    raise ValueError(f"{folder} holds {name} twice, once in {file.name}: "
                                     "download it again")
                files[name] = file
    return files


def weight_form(name, weights):
    """(bits, group size) of a weight where the layers have `weights`: a head becomes int8.

    Without, a head in full precision would be the largest part of small weights.
    """
    return (8, None) if name == "lm_head.weight" else weights


def sample(model):
    """[n] numbers of a model, in its dtype on the CPU, by which another one is known.

    They are of the embedding, the last norm and RoPE, which are the same with any --weights and in
    every process. Adapters that trained the layers alone are not seen.
    """
    numbers = model.embed.weight.flatten()
    parts = numbers[:: 1 + len(numbers) // 1000], model.norm.weight, model.freq.to(numbers)
    return torch.cat(parts).cpu()


@contextmanager
def reading(file):
    """Makes one clear line of what safetensors raises when `file` is damaged."""
    try:
        yield
    except SafetensorError as error:
        message = f"{file} is damaged or truncated ({error}): download it again"
        raise ValueError(message) from None


def _targets(model):
    """The Target of every tensor that a checkpoint must have, by its name there."""
    config = model.config
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    sizes = {
        "attention.wqkv": model.layers[0].attention.sizes,
        "mlp.w_in": (config.hidden_dim, config.hidden_dim),
    }
    targets = {}
    for name, layer, parameter, part in _layer_names(config):
        for kind in ("weight", "bias", "packed", "meta"):
            tensor = tensors.get(f"{layer}{parameter}.{kind}")
            if tensor is not None:
                views = _views(tensor.data, sizes.get(parameter), part, config.n_kv_heads)
                targets[f"{name}.{kind}"] = Target(views, parameter, part)
    return targets


def _layer_names(config):
    """All that may have weights: name in the checkpoint, layer here, name inside that, part."""
    top, prefix, inside = NAMES[config.names]
    for name, parameter in top.items():
        yield name, "", parameter, None
    for i in range(config.n_layers):
        for name, (parameter, part) in inside.items():
            yield f"{prefix}.{i}.{name}", f"layers.{i}.", parameter, part


def _views(tensor, sizes, part, n_kv_heads):
    """The rows of the model's tensor that belong to `part`, in the order of the checkpoint."""
    if part is None:
        return [tensor]
    matrices = tensor.split(sizes)
    if part != "groups":
        return [matrices[part]]
    by_head = [matrix.chunk(n_kv_heads) for matrix in matrices]
    return [rows for group in zip(*by_head) for rows in group]


def _targets_of(name, targets):
    """The names of the targets that a tensor fills: itself, or two if it is to be quantized."""
    if name in targets:
        return [name]
    layer = name.removesuffix("weight")
    if layer + "packed" in targets:
        return [layer + "packed", layer + "meta"]
    return []


def _may_be_ignored(name, config):
    """Some files hold what is computed here, or a tied head a second time."""
    return name.endswith("rotary_emb.inv_freq") or config.tied and name.startswith("lm_head.")


def _copy(model, file, name, targets):
    """Copies one tensor to its target or, quantized, to the two of a QuantizedLinear."""
    tensor = _read(model, file, name, targets[0])
    views = targets[0].views
    quantizes = len(targets) == 2
    bits, group_size = weight_form(name, model.config.weights) if quantizes else (32, None)
    inputs = [n * 32 // bits for n in views[0].shape[1:]]  # of packed words, the codes in them
    shape = (sum(map(len, views)), *inputs)
    floating = quantizes or views[0].is_floating_point()
    if tensor.shape != shape or is_float(tensor) != floating:
        raise ValueError(f"{name} in {file.name} is {tensor.dtype} of shape "
                         f"{tuple(tensor.shape)}, config.json asks for {shape}")
    parts = [tensor]
    if quantizes:
        parts = quantize_weight(tensor.to(model.embed.weight.dtype), bits, group_size)
    for target, part in zip(targets, parts):
        rows = part.split([len(view) for view in target.views])
        for view, new in zip(target.views, rows):
            view.copy_(new)


def is_float(tensor):
    """Are these numbers by themselves? Blocks of the last two dtypes share scales elsewhere."""
    parts = (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu)
    return tensor.is_floating_point() and tensor.dtype not in parts


def _read(model, file, name, target):
    """One tensor of a file, or this process's share of it."""
    device = str(model.embed.weight.device)
    # Opened anew for each: what is mapped counts as our memory, at the end the whole file.
    with reading(file), safe_open(file, framework="pt", device=device) as tensors:
        if model.config.ranks[1] == 1:
            return tensors.get_tensor(name)
        tensor = tensors.get_slice(name)
        return read_share(model.config, target.parameter, target.part, tensor)


def _some(names):
    """The first names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more or "none"
