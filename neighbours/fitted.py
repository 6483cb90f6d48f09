"""Files of what was fitted to a model: safetensors, with the method's name in the metadata."""
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint.text import one_line


def write(file, method, tensors):
    """Writes float32 tensors by name. raises ValueError: it cannot be written"""
    with one_line(f"{file} cannot be written"):
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, file,
                  {"method": method})


def read(file, method, shapes):
    """The tensors of these shapes (lists), by name, that were fitted for a method.

    raises ValueError: no such file, of another method or another model, damaged
    """
    with one_line(f"{file or 'no file'} cannot be used, make one with "
                  f"`python -m neighbours.calibrate {method} FILE`"):
        with safe_open(file, "pt") as content:
            if (content.metadata() or {}).get("method") != method:
                raise ValueError(f"it was not written for {method}")
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        found = {name: list(x.shape) for name, x in tensors.items()}
        if found != shapes:
            raise ValueError(f"it is of another model: its tensors are {found}")
        if not all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors.values()):
            raise ValueError("it holds NaN, inf or other numbers than float32")
        return tensors
