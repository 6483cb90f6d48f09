"""Reading checkpoints: shards, names, dtypes, configs; memory while loading; damaged folders."""
import json
import sys
import weakref

import pytest
import torch
from calling import ROOT, process, run
from make_golden import LENGTH, LLAMA, VARIANTS, Weights, tokens, write_checkpoint
from reference import make_checkpoint, make_folder, some_ids
from safetensors.torch import save_file

from checkpoint import weights as weights_file
from checkpoint.config import ModelConfig, layer_bits
from model import Transformer


# ---- loading ------------------------------------------------------------------------------------

def test_a_sharded_checkpoint_is_the_same_model(model, tmp_path):
    """Guards against a shard that is not read, or read twice."""
    other = Transformer.from_pretrained(make_checkpoint(tmp_path, shards=3))
    ids = torch.tensor([some_ids(20)])
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("name", ("llama, biases", "falcon new decoder", "phi3"))
def test_shards_and_other_dtypes_give_the_same_model(name, tmp_path, golden):
    """Guards against a tensor that is read from the wrong shard, and a dtype that is reinterpreted
    instead of converted."""
    folder = write_checkpoint(tmp_path / "shards", VARIANTS[name], shards=3)
    net = Transformer.from_pretrained(folder)
    assert (net(tokens(LENGTH))[0] - golden[f"{name}/logits"]).abs().max() <= 1e-4
    for dtype in (torch.float16, torch.bfloat16):
        folder = write_checkpoint(tmp_path / str(dtype), VARIANTS[name])
        halves = {n: x.to(dtype) for n, x in Weights(VARIANTS[name]).items()}
        save_file(halves, folder / "model.safetensors")
        for target in (torch.float16, torch.bfloat16, torch.float32):
            half = Transformer.from_pretrained(folder, dtype=target)
            for a, b in zip(half.parameters(), net.parameters()):
                assert a.dtype == target and torch.equal(a, b.to(dtype).to(target))


def test_tied_heads(tmp_path, golden):
    """The head that some files repeat is ignored, one parameter serves both ends. Guards against a
    second copy."""
    tied = VARIANTS["llama, tied"]
    folder = write_checkpoint(tmp_path, tied)
    more = {"lm_head.weight": torch.ones(128, 64),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(Weights(tied) | more, folder / "model.safetensors")
    net = Transformer.from_pretrained(folder)
    assert net.head.weight is net.embed.weight
    assert (net(tokens(LENGTH))[0] - golden["llama, tied/logits"]).abs().max() <= 1e-4


def test_missing_and_unexpected_names_come_in_one_message(tmp_path):
    """Guards against a report that stops at the first, so that the user repairs one name after the
    other."""
    tensors = dict(Weights(LLAMA))
    weight = tensors.pop("model.layers.1.mlp.down_proj.weight")
    tensors["model.layers.1.mlp.down_proj.scales"] = weight
    tensors["extra"] = tensors.pop("model.norm.weight")
    folder = write_checkpoint(tmp_path, LLAMA)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as info:
        Transformer.from_pretrained(folder)
    missing, unexpected = str(info.value).split("missing:")[1].split("; unexpected:")
    assert missing == " model.layers.1.mlp.down_proj.weight, model.norm.weight"
    assert unexpected == " extra, model.layers.1.mlp.down_proj.scales"


def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Guards against a whole shard in memory: no tensor of the file may be alive when the next is
    read, and none is read twice."""
    alive, read = [], []
    safe_open = weights_file.safe_open

    class Spy:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            left = [ref for ref in alive if ref() is not None]
            assert not left, f"{read[-1]} is still there when {name} is read"
            tensor = self.file.get_tensor(name)
            alive[:] = [weakref.ref(tensor)]
            read.append(name)
            return tensor

    monkeypatch.setattr(weights_file, "safe_open", Spy)
    variant = VARIANTS["falcon new decoder"]
    Transformer.from_pretrained(write_checkpoint(tmp_path, variant, shards=2))
    assert sorted(read) == sorted(Weights(variant))


MEASURE = """
import re, sys
sys.path.insert(0, {root!r})
from model import Transformer
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
Transformer.from_pretrained({small!r})
before = peak()
net = Transformer.from_pretrained({folder!r})
print(peak() - before, sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_the_weights_and_one_tensor(tmp_path):
    """The peak of a process that loads three shards of 60 MB, mapped pages included. Guards against
    a whole file that is read or mapped at a time, and against a second copy of the model."""
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9,
                      "vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    small = write_checkpoint(tmp_path / "small", LLAMA)
    folder = write_checkpoint(tmp_path / "large", config, shards=3)
    largest = max(x.nbytes for x in Weights(config).values())
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert shard > 3 * largest + 12e6, "the shards are too small to tell"
    code = MEASURE.format(root=str(ROOT), small=str(small), folder=str(folder))
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size * 0.9 <= peak <= size + largest + 8e6, (
        f"peak {peak / 1e6:.0f} MB, weights {size / 1e6:.0f}, largest tensor {largest / 1e6:.0f}")


# ---- config.json --------------------------------------------------------------------------------

MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}
SLIDING = QWEN | {"use_sliding_window": True}


@pytest.mark.parametrize("changes, windows", (
    ({"sliding_window": 9}, (None, None)),  # Llama has none
    (MISTRAL | {"sliding_window": 9}, (9, 9)),
    (MISTRAL | {"sliding_window": None}, (None, None)),
    (MISTRAL, (4096, 4096)),
    (QWEN, (None, None)),
    (SLIDING, (None, None)),
    (SLIDING | {"max_window_layers": 1}, (None, 9)),
    (SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}, (9, None)),
))
def test_which_layers_have_a_window(changes, windows, tmp_path):
    """Guards against a window where the config has switched it off, or on layers that read
    everything; and against a context that ends where the window does."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": 16} | changes))
    config = ModelConfig.from_folder(tmp_path)
    assert config.windows == windows and config.max_len == 256


def test_layer_bits_reads_presets_and_plain_text(tmp_path):
    """The file layout of KVTuner's calibration presets, layers in any order. Guards against bits
    that go to another layer, and against its per-head files, which name every layer many times."""
    file = tmp_path / "bits"

    def read(text):
        file.write_text(text)
        return layer_bits(file, 3)

    def layer(number, k_bits, v_bits):
        return f"{number}:\n  nbits_key: {k_bits}\n  nbits_value: {v_bits}\n"

    wanted = [(8, 4), (4, 2), (2, 2)]
    assert read(layer(0, 8, 4) + layer(1, 4, 2) + layer(2, 2, 2)) == wanted
    assert read(layer(1, 4, 2) + layer(2, 2, 2) + layer(0, 8, 4)) == wanted
    as_json = json.dumps({i: {"nbits_key": 2 << i, "nbits_value": 2} for i in range(3)})
    assert read(as_json) == [(2, 2), (4, 2), (8, 2)]
    assert read("8 4\n4 2\n2, 2\n") == wanted
    heads = "0:\n" + layer(0, 2, 2) + layer(1, 2, 2) + "1:\n" + layer(0, 2, 2)
    for wrong in (layer(0, 8, 4) + layer(1, 4, 2), layer(0, 8, 4) * 3, heads, "4 2\n", ""):
        with pytest.raises(ValueError, match="3"):
            read(wrong)


# ---- what cannot be used ------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def index_of(file):
    return {INDEX: json.dumps({"weight_map": {"x": file}}).encode()}


ERRORS = {  # what is wrong: (changes of the folder, what the line must name)
    "another architecture": (
        {"architectures": ["GemmaForCausalLM"]},
        ("GemmaForCausalLM", "FalconForCausalLM", "Qwen3ForCausalLM")),
    "no architecture": ({"architectures": None}, ("architecture", "LlamaForCausalLM")),
    "alibi": (VARIANTS["falcon 7b"] | {"alibi": True}, ("alibi",)),
    "longrope": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ("longrope", "yarn")),
    "rope without its factor": ({"rope_scaling": {"type": "linear"}}, ("factor",)),
    "partly rotated heads": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    "an activation": ({"hidden_act": "relu6"}, ("relu6", "silu")),
    "no hidden_size": ({"hidden_size": None}, ("config.json",)),
    "heads that cannot be shared": ({"num_key_value_heads": 3}, ("3",)),
    "only .bin": (
        {"files": {"model.safetensors": None, "pytorch_model.bin": b""}},
        ("pytorch_model.bin", "save_pretrained")),
    "no weights": (
        {"files": {"model.safetensors": None}}, ("model.safetensors", "save_pretrained")),
    "only tokenizer.model": (
        {"files": {"tokenizer.json": None, "tokenizer.model": b""}},
        ("tokenizer.model", "save_pretrained")),
    "no tokenizer": ({"files": {"tokenizer.json": None}}, ("tokenizer.json", "save_pretrained")),
    "a damaged tokenizer": ({"files": {"tokenizer.json": b"{}"}}, ("tokenizer.json",)),
    "config that is a list": ({"files": {"config.json": b"[]"}}, ("config.json",)),
    "tokenizer config that is no JSON": (
        {"files": {"tokenizer_config.json": b"{"}}, ("tokenizer_config.json",)),
    "an index without files": ({"files": {INDEX: b'{"weight_map": 3}'}}, (INDEX,)),
    "an index that leaves the folder": ({"files": index_of("../x.safetensors")}, (INDEX,)),
    "a missing shard": (
        {"files": index_of("model-00001-of-00001.safetensors")},
        ("model-00001-of-00001.safetensors",)),
    "a model larger than memory": (
        {"hidden_size": 2**30, "intermediate_size": 2**30, "head_dim": 32}, ("memory",)),
    "a vocabulary smaller than the tokenizer's": ({"vocab_size": 200}, ("vocabulary", "199")),
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_checkpoint_that_cannot_be_used_gets_one_line(what, tmp_path):
    """Guards against tracebacks and against lines that do not say what to do."""
    changes, named = ERRORS[what]
    folder = make_folder(tmp_path / "model", **changes)
    result = run("--checkpoint", folder, "--prompt", "xyz", "--max-new-tokens", 2)
    code, out, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, result
    assert "Traceback" not in err + out
    for text in named:
        assert text in err, f"{text!r} is not in {err}"


def test_no_damaged_config_ends_in_a_traceback(tmp_path):
    """Every entry in turn missing, null, negative, huge or of another kind: the model loads or a
    ValueError says why."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    mistral = LLAMA | MISTRAL | {"rope_scaling": yarn, "sliding_window": 9}
    bad_values = (None, -1, 0, 0.5, 10**12, 10**30, "x", [], [[]], {}, {"rope_type": []}, True)
    for base in (mistral, VARIANTS["falcon new decoder"]):
        folder = write_checkpoint(tmp_path, base)
        for key in base:
            without = {name: value for name, value in base.items() if name != key}
            for config in [without, *(base | {key: bad} for bad in bad_values)]:
                (folder / "config.json").write_text(json.dumps(config))
                try:
                    Transformer.from_pretrained(folder)(tokens(3))
                except ValueError as error:
                    assert str(error)
                except Exception as error:
                    what = repr(config[key]) if key in config else "missing"
                    pytest.fail(f"{key} = {what}: {type(error).__name__}: {error}")
