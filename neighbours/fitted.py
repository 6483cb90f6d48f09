"""Files of what was fitted to a model: safetensors, with the method's name in the metadata and, as
tensor `model`, numbers by which that model is known."""
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint.text import one_line
from checkpoint.weights import sample


def write(file, method, tensors, model):
    """Writes float32 tensors by name, fitted to a model in float32.

    raises ValueError: it cannot be written
    """
    with one_line(f"{file} cannot be written"):
        tensors = tensors | {"model": sample(model)}
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, file,
                  {"method": method})


def read(file, model, method, shapes):
    """The tensors of these shapes (lists), by name, that were fitted to a model for a method.

    raises ValueError: no such file, of another method or another model, damaged; the model is
           divided among processes, and the fit is not
    """
    how = f"make one with `python -m neighbours.calibrate {method} FILE`"
    if not file:
        raise ValueError(f"{method} needs a file behind a colon: {how}")
    if model.config.ranks[1] > 1 and method in ("gate", "nuq", "predict"):
        raise ValueError(f"{method} is fitted to all KV heads, which are divided among processes "
                         "here: leave out torchrun")
    with one_line(f"{file} cannot be used, {how}"):
        with safe_open(file, "pt") as content:
            if (content.metadata() or {}).get("method") != method:
                raise ValueError(f"it was not written for {method}")
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        known, numbers = tensors.pop("model", torch.zeros(0)), sample(model)
        found = {name: list(x.shape) for name, x in tensors.items()}
        # The weights were float32: in another dtype they are rounded once, as those of this model.
        if found != shapes or not known.to(numbers.dtype).equal(numbers):
            raise ValueError(f"it is of another model, by its tensors {found}, weights or RoPE")
        if not all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors.values()):
            raise ValueError("it holds NaN, inf or other numbers than float32")
        return tensors
