"""What the process around the project has set: default dtype, default device, current device."""
import pytest
import torch
from calling import check_error, run
from reference import changed

import generate
from checkpoint.config import ModelConfig
from checkpoint.rope import dynamic_frequencies, rope_frequencies
from program.cli import usable_device

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
DYNAMIC = YARN | {"rope_type": "dynamic"}


@pytest.fixture
def restored():
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype, device", (
    (torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")), ids=str)
@pytest.mark.parametrize("scaling", (YARN, DYNAMIC), ids=lambda scaling: scaling["rope_type"])
def test_another_default_dtype_or_device_changes_nothing(
        dtype, device, scaling, checkpoint, tmp_path, restored):
    """Guards against frequencies of another dtype, which turn keys a little wrong at every
    position, and weights that are not there."""
    folder = changed(checkpoint, tmp_path, rope_scaling=scaling)
    config = ModelConfig.from_folder(folder)
    lengths = torch.tensor([130, 100, 1001])

    def numbers():
        freq, scale = rope_frequencies(config)
        model, _ = generate.load(folder, weights="int8")
        state = [x for name, x in sorted(model.state_dict().items())]
        return [freq, model.freq, dynamic_frequencies(freq, DYNAMIC, lengths), *state], scale

    wanted, wanted_scale = numbers()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    found, scale = numbers()
    assert scale == wanted_scale
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


@pytest.mark.parametrize("name, current", (("cuda:1", [1]), ("cuda", []), ("cpu", [])))
def test_the_device_becomes_the_current_one(name, current, monkeypatch):
    """Guards against streams and graphs of GPU 0 for a model on GPU 1."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    assert usable_device(name) == torch.device(name) and chosen == current


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    """Alone, and as one of several processes. Guards against a traceback from choosing the current
    device."""
    check_error(run("--device", "cuda:99"), "cuda:99")
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 99}.items():
        monkeypatch.setenv(name, str(value))
    check_error(run("--device", "cuda"), "cuda")
