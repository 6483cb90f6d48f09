"""What caches hold of one text, in a file: the text goes on from there on another day."""
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint.text import one_line


@dataclass(frozen=True)
class Saved:
    file: str
    kv: str  # the --kv of the caches
    tokens: list  # that they hold
    messages: list  # of which the tokens are
    states: list  # of every layer's cache: see `Buffers.state`
    fingerprints: dict


def fingerprints(model, tokenizer):
    """What a file must share with a run, by its name for the user."""
    weights = sha256(repr(model.config).encode())
    for name, x in model.state_dict().items():
        first = x.flatten()[:64].cpu().view(torch.uint8).numpy()  # not all: they are gigabytes
        weights.update(f"{name} {list(x.shape)}".encode() + first.tobytes())
    text = tokenizer.to_str().encode()
    return {"model": weights.hexdigest(), "tokenizer": sha256(text).hexdigest()}


def save(file, run, tokens, messages):
    """Writes the caches of a run, of one row, which hold these tokens. The file appears, or takes
    the place of an older one, when all of it is there.

    raises ValueError: it cannot be written
    """
    layers, tensors = [], {}
    for number, layer in enumerate(run.model.layers):
        state = layer.cache.state()
        layers.append({name: x for name, x in state.items() if not torch.is_tensor(x)})
        tensors |= {f"layer.{number}.{name}": state[name] for name in state.keys() - layers[-1]}
    facts = {"kv": run.kv, "tokens": tokens, "messages": messages, "layers": layers,
             "fingerprints": fingerprints(run.model, run.tokenizer)}
    metadata = {name: json.dumps(fact) for name, fact in facts.items()}
    metadata["digest"] = _digest(metadata, tensors)
    part = Path(f"{file}.part")
    try:
        with one_line(f"{file} cannot be written"):
            save_file(tensors, part, metadata)
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def load(file):
    """Reads what `save` has written. raises ValueError: no such file, or not all as it was"""
    with one_line(f"{file} cannot be used, save it again"):
        with safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        if metadata.pop("digest", None) != _digest(metadata, tensors):
            raise ValueError("it is no saved cache, or was changed since")
        facts = {name: json.loads(fact) for name, fact in metadata.items()}
        states = facts.pop("layers")
        for name, x in tensors.items():
            _, number, name = name.split(".", 2)
            states[int(number)][name] = x
        return Saved(file, states=states, **facts)


def check(saved, run):
    """Raises ValueError if a run cannot go on from there."""
    if saved.kv != run.kv:
        raise ValueError(f"{saved.file} was saved with --kv {saved.kv}: use that, not {run.kv}")
    for name, value in fingerprints(run.model, run.tokenizer).items():
        if saved.fingerprints[name] != value:
            raise ValueError(f"{saved.file} was saved with another {name}: use its own "
                             "--checkpoint, --weights and --dtype")


def _digest(metadata, tensors):
    """sha256 of all that a file holds."""
    digest = sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
