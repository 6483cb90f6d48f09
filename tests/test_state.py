"""The state of the process around the project, and numbers that are none."""
import copy

import pytest
import torch
from calling import check_error, run
from reference import SMALL, changed, some_ids
from reference_cache import randn

import generate
from checkpoint.config import ModelConfig
from checkpoint.rope import dynamic_frequencies, rope_frequencies
from kivi import FullCache, KiviCache
from model import Transformer
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


# ---- what the host application does around the library ------------------------------------------

CACHES = ((KiviCache, {"k_bits": 8, "v_bits": 8, "residual": 32}), (FullCache, {}))


@pytest.mark.parametrize("kind, options", CACHES)
def test_autocast_changes_no_attention(kind, options):
    """Guards against products in half precision: an error of 4e-3 where it was 1e-6."""
    q, k, v = randn(2, 4, 1, 32), randn(2, 2, 90, 32, seed=1), randn(2, 2, 90, 32, seed=2)
    cache = kind(2, 2, 100, 32, **options)
    cache.prefill(k[:, :, :80], v[:, :, :80])
    before = cache.attend(q), cache.state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cache.attend(q), before[0])
        assert cache.extend(q.expand(-1, -1, 10, -1), k[:, :, 80:], v[:, :, 80:]).dtype == q.dtype
    other = kind(2, 2, 100, 32, **options)
    other.load_state(before[1])
    want = other.extend(q.expand(-1, -1, 10, -1), k[:, :, 80:], v[:, :, 80:])
    assert torch.equal(cache.attend(q), other.attend(q)) and torch.isfinite(want).all()


def test_autocast_changes_no_text(model):
    want = generate.generate(model, [some_ids(40)], 40, stop=(), **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate.generate(model, [some_ids(40)], 40, stop=(), **SMALL) == want


@pytest.mark.parametrize("kind, options", CACHES)
def test_a_cache_from_inference_mode_goes_on_outside(kind, options):
    with torch.inference_mode():
        cache = kind(1, 1, 100, 32, **options)
        cache.prefill(randn(1, 1, 40, 32), randn(1, 1, 40, 32))
    x = randn(1, 1, 1, 32)
    for _ in range(30):
        cache.append(x, x)
    cache.reset()


@pytest.mark.parametrize("kind, options", CACHES)
def test_a_cache_keeps_no_graph_of_gradients(kind, options):
    """Guards against buffers that keep every step of a training loop alive."""
    cache = kind(1, 1, 100, 32, **options)
    k = randn(1, 1, 40, 32).requires_grad_()
    q = randn(1, 1, 40, 32, seed=1).requires_grad_()
    cache.extend(q, k, k)
    for _ in range(40):
        cache.append(k[:, :, :1], k[:, :, :1])
    assert not any(x.requires_grad for x in cache.buffers())
    cache.attend(q[:, :, :1]).sum().backward()  # of the query alone
    assert q.grad.abs().sum() > 0 and k.grad is None


def test_a_copied_model_has_caches_of_its_own(checkpoint):
    """Guards against layers of a copy that no longer share one schedule, and against a copy that
    writes into the original."""
    model = Transformer.from_pretrained(checkpoint)
    prompt = [some_ids(40)]
    want = generate.generate(model, prompt, 60, stop=(), **SMALL)
    copied = copy.deepcopy(model)
    assert generate.generate(copied, [some_ids(45, seed=3)], 55, stop=()) != want
    held = list(model.cache.lengths)
    assert copied.cache.lengths != held or copied.cache.lengths is not model.cache.lengths
    assert all(layer.cache.pos is copied.cache.pos for layer in copied.layers)
    again = copy.deepcopy(copied)
    assert generate.generate(again, prompt, 60, stop=()) == want
    assert model.cache.lengths == held == model.cache.pos.tolist()


# ---- numbers that are none ----------------------------------------------------------------------

def test_a_row_whose_logits_are_no_numbers_takes_no_other_row(model, monkeypatch):
    """NaN after some tokens, in the second of three rows. Guards against unknown tokens for ever
    with status 0, and against rows that are lost with it."""
    prompts, decode, steps = [some_ids(n, seed=n) for n in (9, 20, 5)], model.decode, []
    want = generate.generate(model, prompts, 30, stop=(), **SMALL)

    def broken(tokens, t):
        logits = decode(tokens, t)
        steps.append(len(t))
        if len(steps) % 29 == 12:
            logits[1, 7] = float("nan")
        return logits

    monkeypatch.setattr(model, "decode", broken)
    ended, faults = {}, {}
    out = generate.generate(model, prompts, 30, stop=(), on_row=ended.__setitem__,
                            on_fault=faults.__setitem__, **SMALL)
    assert out[0] == want[0] and out[2] == want[2] and out[1] == want[1][:32]
    assert sorted(ended) == [0, 2] and list(faults) == [1] and "NaN" in faults[1]
    steps.clear()
    with pytest.raises(ValueError, match="row 1 after 12 new tokens.*NaN"):
        generate.generate(model, prompts, 30, stop=(), **SMALL)


@pytest.mark.parametrize("part", (0, 1, 2), ids=("q", "k", "v"))
def test_a_prompt_with_no_number_in_q_k_or_v_is_refused(model, part, monkeypatch):
    """Guards against a NaN in q alone, over which the library's attention returns 0."""
    attention = model.layers[1].attention
    original = attention.qkv

    def broken(x, cos, sin):
        parts = original(x, cos, sin)
        parts[part][0, 0, 3, 5] = float("nan")
        return parts

    monkeypatch.setattr(attention, "qkv", broken)
    with pytest.raises(ValueError, match="NaN"):
        generate.generate(model, [some_ids(20)], 5, **SMALL)


def test_what_float16_scales_cannot_hold_is_refused(checkpoint):
    """A bfloat16 model whose keys exceed 65504. Guards against a check before the place where it
    fails: the keys are finite, their zeros would be inf. Full precision can hold them."""
    model = Transformer.from_pretrained(checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        c = model.config
        model.layers[0].attention.wqkv.weight[c.n_heads * c.head_dim :][: c.head_dim] *= 1e6
    with pytest.raises(ValueError, match="too large"):
        generate.generate(model, [some_ids(20)], 5, **SMALL)
    generate.generate(model, [some_ids(20)], 5, kv="bf16")
