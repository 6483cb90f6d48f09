"""neighbours/predict.py: K and V of upper layers by a linear map, against one token at a time."""
import math

import pytest
import torch
from calling import check_error, result_of, run
from reference import decode_step, make_checkpoint, some_ids
from reference_cache import attention64, randn, rel

from checkpoint.hub import EMBEDDED
from model import Transformer
from neighbours import calibrate, fitted, predict

N_LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("four") / "llama", num_hidden_layers=N_LAYERS)


@pytest.fixture
def exact(folder):
    return Transformer.from_pretrained(folder)


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("maps") / "maps.safetensors"
    tokens = torch.tensor([some_ids(50, seed=n) for n in range(9)])
    model = Transformer.from_pretrained(folder)
    fitted.write(file, "predict", predict.fit(model, tokens), model)
    return file


@pytest.fixture
def model(folder, file):
    model = Transformer.from_pretrained(folder)
    predict.predict_layers(model, file)
    return model


def rotated(head, t, freq):
    """A key [D] of token t."""
    half = len(freq)
    out = head.clone()
    for d, f in enumerate(freq.tolist()):
        a, b, angle = head[d].item(), head[d + half].item(), t * f
        out[d] = a * math.cos(angle) - b * math.sin(angle)
        out[d + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def alone(layer, x, pos, keys, values, rope):
    """One token [dim] through a layer behind others: keys, values [Hk, t, D] -> x, and its own."""
    cos, sin = rope(torch.tensor([[pos]]))
    q, k, v = layer.attention.qkv(layer.attention_norm(x[None, None]), cos, sin)
    keys, values = torch.cat([keys, k[0]], 1), torch.cat([values, v[0]], 1)
    y = attention64(q[0, :, 0], keys, values, layer.window).float()
    return layer.after(x[None, None], y[None, :, None])[0, 0], keys, values


def expected(exact, maps, ids):
    """(logits of the last token, K and V of every upper layer) of one prompt."""
    c, lower = exact.config, exact.config.n_layers - len(maps)
    x = exact.embed(torch.tensor([ids]))
    for layer in exact.layers[:lower]:
        x = layer(x, *exact.rope(torch.arange(len(ids))[None]))
    first, last, layers = x[0, 0], x[0, -1], []
    for layer, weights in zip(exact.layers[lower:], maps):
        none = torch.zeros(c.n_kv_heads, 0, c.head_dim)
        first, keys, values = alone(layer, first, 0, none, none, exact.rope)
        for t in range(1, len(ids) - 1):
            y = torch.cat([x[0, t], torch.ones(1)]) @ weights
            k, v = y.view(2, c.n_kv_heads, 1, c.head_dim)
            k = torch.stack([rotated(head[0], t, exact.freq)[None] for head in k])
            keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        last, keys, values = alone(layer, last, len(ids) - 1, keys, values, exact.rope)
        layers.append((keys, values))
    return exact.head(exact.norm(last)), layers


@pytest.mark.parametrize("window", (None, 9))
def test_a_prompt_is_read_as_described(window, model, exact):
    """Guards against maps of another layer, K that is turned twice or not, a first or last token
    that is predicted, one that sees tokens behind it, and a layer's window that is forgotten."""
    ids = some_ids(30)
    for layer in (*model.layers, *exact.layers):
        layer.window = window
    model.setup_caches(1, 40, "bf16")
    logits = model.prefill(torch.tensor([ids]))
    want, layers = expected(exact, model.maps, ids)
    assert rel(logits[0], want) < 1e-4
    lower = N_LAYERS // 2
    exact.setup_caches(1, 40, "bf16")
    exact.prefill(torch.tensor([ids]))
    for layer, other in zip(model.layers[:lower], exact.layers[:lower]):
        assert torch.equal(layer.cache.k_window, other.cache.k_window)
    for layer, kv in zip(model.layers[lower:], layers):
        for x, y in zip(layer.cache.dequantized(), kv):
            assert rel(x[0], y) < 1e-4


def test_rows_together_are_rows_alone(model):
    """Unequal lengths in one pass, through a packed cache, and a second text behind the first.
    Guards against the last token of the longest row in all of them, and a past that is not seen."""
    prompts = [some_ids(n, seed=n) for n in (40, 1, 23)]
    more = torch.tensor([some_ids(9, seed=n) for n in range(3)])
    tokens = torch.zeros(3, 40, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    model.setup_caches(3, 100, group_size=16, residual=32)
    together = model.prefill(tokens, [40, 1, 23], chunk=2048)
    stepped = decode_step(model, more[:, :1])
    model.setup_caches(1, 100, group_size=16, residual=32)
    for row, ids in enumerate(prompts):
        assert rel(model.prefill(torch.tensor([ids]))[0], together[row]) < 1e-5
        assert rel(decode_step(model, more[row : row + 1, :1])[0], stepped[row]) < 1e-4
    before = model.extend(more[:1])
    model.prefill(torch.tensor([some_ids(23, seed=5)]))
    assert rel(model.extend(more[:1]), before) > 1e-3


def test_a_gate_holds_what_is_predicted(model, tmp_path, monkeypatch):
    """A prompt, and a text behind the 10 tokens that are held of it, against a full cache of these
    alone. Guards against a gate that waits for queries, and a past that is seen as if no token had
    been dropped."""
    c, prompt, more = model.config, *(torch.tensor([some_ids(n, seed=n)]) for n in (28, 12))
    weight = randn(c.n_layers, c.n_kv_heads, c.head_dim * 3 // 2 + 3)
    tensors = {"weight": weight, "share": torch.tensor(0.25)}
    fitted.write(tmp_path / "gate", "gate", tensors, model)
    model.setup_caches(1, 40, "bf16")
    whole = model.prefill(prompt)
    model.setup_caches(1, 40, f"gate:{tmp_path / 'gate'}")
    assert rel(model.prefill(prompt), whole) < 1e-5
    held = [layer.cache.dequantized() for layer in model.layers]
    found = model.extend(more)
    model.setup_caches(1, 40, "bf16")
    for layer, kv in zip(model.layers, held):
        layer.cache.fill(*kv, torch.tensor([0]), torch.tensor([10]))
    model.cache.set_lengths([10])
    monkeypatch.setattr(model, "rope", lambda t, ends, rope=model.rope: rope(t + 18, ends + 18))
    assert rel(found, model.extend(more)) < 1e-5


def test_a_fit_is_least_squares(exact):
    """Against the library's, of numbers that leave the linear layer. Guards against rows that do
    not belong together, and keys that are turned already."""
    tokens = torch.tensor([some_ids(40, seed=n) for n in range(9)])
    found = predict.fit(exact, tokens)["maps"][1]
    c, seen = exact.config, {}
    hooks = [exact.layers[2].attention_norm.register_forward_pre_hook(
                 lambda _, x: seen.update(x=x[0])),
             exact.layers[3].attention.wqkv.register_forward_hook(
                 lambda *x: seen.update(y=x[-1]))]
    exact(tokens)
    for hook in hooks:
        hook.remove()
    x, y = (seen[name][:, 1:].flatten(0, 1).double() for name in "xy")
    x, y = torch.cat([x, torch.ones(len(x), 1)], 1), y[:, c.n_heads * c.head_dim :]
    want = torch.linalg.lstsq(x, y).solution
    errors = [(x @ w.double() - y).norm() for w in (found, want)]
    assert errors[0] < 1.05 * errors[1] and errors[1] < 0.9 * (y - y.mean(0)).norm()


def test_the_program_predicts(tmp_path):
    """From the fit to the text. Guards against an option that is read and forgotten."""
    file = tmp_path / "maps"
    code, _, err = run("predict", file, "--text", EMBEDDED / "heldout.txt", "--rows", 1,
                       "--tokens", 300, main=calibrate.main)
    assert code == 0, err
    asked = "--prompt", "The old man had no time.", "--max-new-tokens", 8, "--temperature", 0
    texts = [result_of(*asked, *more)["text"] for more in ((), ("--predict", file))]
    assert texts[0] != texts[1]


def test_what_cannot_be_is_refused(file, exact, model, tmp_path):
    """Guards against maps of another model or of no fractions, and caches that wait for queries in
    vain."""
    check_error(run("--predict", file), "another model")
    check_error(run("--predict", "nowhere"), "python -m neighbours.calibrate predict FILE")
    for kv in ("h2o:0.5", "tiers"):
        with pytest.raises(ValueError, match="--predict"):
            model.setup_caches(1, 20, kv)
    fitted.write(tmp_path / "f", "predict", {"maps": model.maps.int()}, exact)
    with pytest.raises(ValueError, match="float32"):
        predict.predict_layers(exact, tmp_path / "f")
    exact.config.ranks = 0, 2
    with pytest.raises(ValueError, match="torchrun"):
        predict.predict_layers(exact, file)
