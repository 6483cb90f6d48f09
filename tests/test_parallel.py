"""Several processes that share one model."""
import json
from dataclasses import replace

import pytest
import torch
from calling import ROOT, process, run
from reference import FAMILIES, make_checkpoint
from reference_cache import randn, rel
from safetensors.torch import load_file, save_file

from checkpoint.shares import shard
from model import ModelConfig, Transformer, causal
from program import parallel


def torchrun(n, *args):
    return process("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                   ROOT / "generate.py", "--device", "cpu", *args)


@pytest.mark.parametrize("on_this_host, reached, wanted", (
    (1, True, False), (2, False, False), (2, True, True)))
def test_sums_go_through_each_others_memory_only_where_it_can_be_reached(
        on_this_host, reached, wanted, monkeypatch):
    """Guards against a job of several hosts, or of GPUs that cannot reach each other, that dies in
    its first step."""
    from torch._inductor import config
    from torch.distributed import _symmetric_memory

    asked = []
    monkeypatch.setattr(_symmetric_memory, "enable_symm_mem_for_group", asked.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_host))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer",
                        lambda device, other: device == 0 or reached)
    with config.patch({"_collective.auto_select": False}):
        parallel.sum_directly()
        assert config._collective.auto_select == wanted
    assert asked == ["0"] * wanted


@pytest.mark.slow
@pytest.mark.parametrize("n", (2, 4))
def test_processes_that_share_the_heads_write_the_same_text(n, tmp_path):
    """The embedded checkpoint, a batch of 3 ragged prompts, 2-bit caches; with 4 processes, two
    hold each KV head. Guards against a sum that is missing, heads with another's keys, a slice of
    the weights at the wrong place, output of every process."""
    file = tmp_path / "prompts"
    long = "He looked at the old house and said nothing. " * 5
    file.write_text(f"Once upon a time\nThe sea was\n{long}")
    options = ["--prompts", file, "--batch-size", 3, "--max-new-tokens", 24, "--temperature", 0,
               "--kv", "kivi2", "--residual", 32, "--json"]
    together = torchrun(n, *options)
    assert together.returncode == 0, together.stderr
    *texts, last = map(json.loads, together.stdout.splitlines())
    *wanted, whole = map(json.loads, run("--device", "cpu", *options)[1].splitlines())
    assert len(texts) == 3 and texts == wanted
    assert last["kv_bytes"] < 0.6 * whole["kv_bytes"]


REFUSED = "4 heads, 2 KV heads and 96 hidden channels cannot be divided among 3 processes"


def test_a_model_that_cannot_be_divided_is_refused(checkpoint):
    """Guards against shares that leave a head out, and processes without a KV head."""
    config = ModelConfig.from_folder(checkpoint)
    with pytest.raises(ValueError, match=REFUSED):
        shard(config, 0, 3)
    assert shard(config, 3, 4).n_kv_heads == 1
    with pytest.raises(ValueError, match="in one process"):
        shard(replace(config, weights=(8, None)), 0, 2)


@pytest.mark.slow
def test_what_processes_cannot_share_is_refused(checkpoint):
    """Guards against a traceback, or a hang, where the heads cannot be divided."""
    done = torchrun(3, "--checkpoint", checkpoint, "--prompt", "x")
    assert done.returncode and REFUSED + "\n" in done.stderr
    assert done.stdout == "" and "generate.py\", line" not in done.stderr


def add_biases(folder):
    """Gives every linear layer a bias."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for i, (name, weight) in enumerate(list(tensors.items())):
        if "_proj" in name:
            tensors[name.replace("weight", "bias")] = randn(len(weight), seed=i)
    save_file(tensors, file)


def layer_sum(models, i, x, cos, sin):
    """What the i-th layers of some models compute before they are summed, summed."""
    total = 0
    for model in models:
        layer = model.layers[i]
        q, k, v = layer.attention.qkv(x, cos, sin)
        total = total + layer.attention.out(causal(q, k, v)) + layer.mlp(x)
    return total


def fuse_weights(folder):
    """Makes a Phi-3 of a Llama without biases: q, k, v in one tensor, gate and up in another."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for target, parts in fused.items():
        for name in [name for name in tensors if name.endswith(f"{parts[0]}.weight")]:
            rows = [tensors.pop(name.replace(parts[0], part)) for part in parts]
            tensors[name.replace(parts[0], target)] = torch.cat(rows)
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "mlp_bias": False}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ("llama", "all biases", "qwen 2", "qwen 3", "one KV head",
                                    "phi 3"))
@torch.no_grad()
def test_the_shares_of_two_processes_add_up_to_the_layer(family, tmp_path):
    """Without processes: what the two shares of a layer compute before they are summed adds up to
    the whole layer. Guards against the wrong rows of q, k, v, gate or up, and a bias that counts
    twice."""
    biases = {"attention_bias": True, "mlp_bias": True}
    changes = FAMILIES["llama"] if family == "phi 3" else FAMILIES.get(family, biases)
    folder = make_checkpoint(tmp_path / "full", **changes)
    if family == "all biases":
        add_biases(folder)
    if family == "phi 3":
        fuse_weights(folder)
    whole = Transformer.from_pretrained(folder)
    parts = [Transformer.from_pretrained(folder, ranks=(rank, 2)) for rank in range(2)]
    x = randn(2, 7, 64)
    cos, sin = whole.rope(torch.arange(7)[None])
    for i, layer in enumerate(whole.layers):
        together = layer_sum(parts, i, x, cos, sin)
        assert rel(together, layer_sum([whole], i, x, cos, sin)) < 1e-5
        rows = len(layer.attention.wqkv.weight)
        assert len(parts[0].layers[i].attention.wqkv.weight) < rows
