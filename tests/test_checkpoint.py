"""Reading checkpoints: shards, names, dtypes, configs; memory while loading; damaged folders."""
import json
import math
import os
import sys
import time
import weakref

import pytest
import torch
from calling import ROOT, process, run
from make_golden import LENGTH, LLAMA, VARIANTS, Weights, tokens, write_checkpoint
from reference import make_checkpoint, make_folder, some_ids
from reference_cache import rel
from safetensors.torch import save_file

from checkpoint import weights as weights_file
from checkpoint.config import ModelConfig, layer_bits
from checkpoint.write import write_quantized
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
    more = {"lm_head.weight": Weights(tied)["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(Weights(tied) | more, folder / "model.safetensors")
    net = Transformer.from_pretrained(folder)
    assert net.head.weight is net.embed.weight
    assert (net(tokens(LENGTH))[0] - golden["llama, tied/logits"]).abs().max() <= 1e-4


@pytest.mark.parametrize("weights, shards", ((None, 1), (None, 2), ("int8", 1)))
def test_a_tied_head_that_is_another(weights, shards, tmp_path, capsys):
    """config.json ties it, but it was trained apart: it is used, as in transformers, and stderr
    says so. Guards against a head that is dropped in silence, in the copy of checkpoint/write.py,
    too."""
    folders = [make_checkpoint(tmp_path / name, shards) for name in ("untied", "says it is tied")]
    file = folders[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    nets = [Transformer.from_pretrained(folder, weights=weights) for folder in folders]
    ids = torch.tensor([some_ids(20)])
    logits = [net(ids) for net in nets]
    assert rel(logits[1], logits[0]) < (0.02 if weights else 1e-6)
    assert nets[1].head.weight is not nets[1].embed.weight and not nets[1].config.tied
    line, = capsys.readouterr().err.splitlines()
    assert str(folders[1]) in line and "config.json" in line and "head" in line
    written = [tmp_path / f"{i}" for i in range(2)]
    for folder, out in zip(folders, written):
        write_quantized(folder, "int8", out)
    a, b = (Transformer.from_pretrained(out)(ids) for out in written)
    assert torch.equal(a, b)


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


def test_a_marked_file_of_bits(tmp_path):
    """Guards against a byte order mark that costs the first layer."""
    file = tmp_path / "bits"
    file.write_bytes(b"\xef\xbb\xbf8 4\r\n4 2\r\n")
    assert layer_bits(file, 2) == [(8, 4), (4, 2)]


@pytest.mark.parametrize("text", ("\n" * 100_000, "1" * 100_000, "1 " * 100_000, "1\n" * 100_000,
                                  " \t" * 100_000 + "x", "1 2 " * 50_000 + "nbits_key"))
def test_a_long_file_of_bits_takes_no_time(text, tmp_path):
    """Guards against a pattern whose time grows with the square of the text: minutes."""
    file = tmp_path / "bits"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(ValueError, match="gives bits for"):
        layer_bits(file, 3)
    assert time.process_time() - began < 1


def test_rope_scaling_goes_before_rope_parameters(tmp_path):
    """As in transformers 5. Guards against the entry of an older config that a newer one hides."""
    config = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0},
                      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rope = ModelConfig.from_folder(tmp_path).rope_scaling
    assert rope["factor"] == 4 and rope["rope_theta"] == LLAMA.get("rope_theta", 10000)


@pytest.mark.parametrize("generation, config, eos", (
    ({"eos_token_id": 5}, 7, (5,)), ({"eos_token_id": [5, 6]}, 7, (5, 6)), ({}, 7, (7,)),
    ({"eos_token_id": None}, [7, 8], (7, 8)), (None, 7, (7,)), (None, None, ()), ({}, [], ())))
def test_the_tokens_that_end_a_text(generation, config, eos, tmp_path):
    """generation_config.json goes before config.json where it names any. Guards against an end
    that one file names and the other leaves open."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelConfig.from_folder(tmp_path).eos == eos


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


@pytest.mark.slow
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


BAD = ("x", "4", "", True, -1, -0.5, math.nan, math.inf, [], [1], {"a": 1}, 10**40)
NUMBERS = tuple(bad for bad in BAD) + (False, 0)
SWITCH = tuple(bad for bad in BAD if bad is not True) + (0, 1, "false")
KINDS = {  # entry -> values of the wrong kind
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "intermediate_size",
                     "max_position_embeddings", "rms_norm_eps", "rope_theta"), NUMBERS),
    **dict.fromkeys(("sliding_window",), NUMBERS[:-4] + NUMBERS[-2:]),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
                    SWITCH),
    "max_window_layers": ("x", 0.5, math.nan, [1]),
    "layer_types": ("x", 3, True, [], ["full_attention"], ["full_attention", "chunked"], [[], []]),
    "hidden_act": BAD + (3,), "architectures": BAD, "rope_scaling": BAD[:-2],
    "eos_token_id": ("x", True, -1, 0.5, 128, [1, "2"], [None], {"a": 1}),
    "quantization_config": ("x", 3, True, [], {}, {"quant_method": "kivi-weights", "bits": 4}),
}
ROPE = {"rope_type": ("x", 3, [], True), "factor": NUMBERS, "beta_fast": NUMBERS,
        "original_max_position_embeddings": NUMBERS, "attention_factor": NUMBERS}
OURS = {"quant_method": "kivi-weights", "bits": 4, "group_size": 32}
WRITTEN = {"bits": ("4", 4.0, True, None, [4]), "group_size": ("32", 32.0, True, [32], 0)}


def test_entries_of_the_wrong_kind_are_refused(tmp_path):
    """Guards against a string, a boolean or a negative number that is taken for what it is not, or
    for nothing: "false" is true, 0 is missing, "4" times 16 is 4444444444444444."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    base = LLAMA | MISTRAL | {"rope_scaling": yarn, "sliding_window": 9}
    cases = [(name, base | {name: bad}) for name, bads in KINDS.items() for bad in bads]
    cases += [(name, base | {"rope_scaling": yarn | {name: bad}})
              for name, bads in ROPE.items() for bad in bads]
    cases += [(name, base | {"quantization_config": OURS | {name: bad}})
              for name, bads in WRITTEN.items() for bad in bads]
    file = tmp_path / "config.json"
    accepted = []
    for name, config in cases:
        file.write_text(json.dumps(config))
        try:
            ModelConfig.from_folder(tmp_path)
            accepted.append((name, config[name] if name in config else config))
        except ValueError as error:
            assert str(error)
    assert not accepted


@pytest.mark.parametrize("name", ("config.json", "generation_config.json", "tokenizer_config.json",
                                  "model.safetensors.index.json", "tokenizer.json"))
@pytest.mark.parametrize("content", ("[" * 100_000, '{"eos_token_id": %s}' % ("9" * 5000), None),
                         ids=("deep", "long number", "no file"))
def test_json_files_that_are_none(name, content, tmp_path):
    """Too deep, a number too long for Python, and a pipe, which nobody writes to. Guards against a
    RecursionError, a message without the file's name, and a program that waits for ever."""
    folder = make_folder(tmp_path / "model", files={name: (content or "").encode()})
    if content is None:
        (folder / name).unlink()
        os.mkfifo(folder / name)
    code, out, err = run("--checkpoint", folder, "--prompt", "x", "--max-new-tokens", 2)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert name in err
