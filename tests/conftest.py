"""Fixtures and markers of this folder.

slow  long tests, run with KIVI_SLOW=1
cuda  tests that need a GPU
"""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

pytest.register_assert_rewrite("calling", "reference", "reference_cache")

import generate  # noqa: E402
from make_golden import GOLDEN, VARIANTS, write_checkpoint  # noqa: E402
from model import Transformer  # noqa: E402
from reference import make_checkpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long, runs with KIVI_SLOW=1")
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")


def pytest_collection_modifyitems(items):
    left_out = {
        "slow": os.environ.get("KIVI_SLOW") != "1" and "long: set KIVI_SLOW=1",
        "cuda": not torch.cuda.is_available() and "needs a CUDA GPU",
    }
    for item in items:
        for name, reason in left_out.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def one_thread():
    """Most tensors here are tiny: a second thread only waits, and several round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a tiny random Llama."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture
def model(checkpoint):
    return Transformer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of tiny/. Tests leave its caches behind, and set up their own."""
    return generate.load()


@pytest.fixture(scope="session")
def golden():
    """What transformers computes for the variants of make_golden.py."""
    return load_file(GOLDEN)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function of a variant's name: its checkpoint folder, written at its first use."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = write_checkpoint(tmp_path_factory.mktemp("variant"), VARIANTS[name])
        return made[name]

    return folder
