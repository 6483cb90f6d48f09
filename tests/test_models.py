"""Run: python -m pytest -q tests/test_models.py        (checkpoints, tokenizers, the hub's cache, chat; no network, no GPU needed)

Every architecture against the numbers that transformers gives for the same small random checkpoint (make_golden.py). Every docstring
says which bug its test guards against.
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent

import generate
import model as model_file
from kivi import FullCache, KiviCache
from make_golden import CHAT, GOLDEN, GREEDY, LENGTH, LLAMA, VARIANTS, noise, tokens, weights, write_checkpoint
from model import ModelConfig, Transformer, causal

slow = pytest.mark.skipif(os.environ.get("KIVI_SLOW") != "1", reason="long: set KIVI_SLOW=1")
every = pytest.mark.parametrize("name", VARIANTS)
EIGHT = dict(kv="kivi2", k_bits=8, v_bits=8, group_size=16)  # its window of 128 holds all of these texts
SMALL = dict(kv="kivi2", k_bits=4, group_size=16, residual=16)


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Checkpoint folder of a variant, written at its first use."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = write_checkpoint(tmp_path_factory.mktemp("variant"), VARIANTS[name])
        return made[name]

    return folder


def decode_logits(net, ids, n_prompt):
    """Logits of every position from the last of the prompt on, through the caches that are set up."""
    out = [net.prefill(ids[:, :n_prompt])]
    for t in range(n_prompt, ids.shape[1]):
        net.cache.advance()
        out.append(net.decode(ids[:, t:t + 1], net.cache.blocks(net.cache.length)))
        if net.cache.due():
            net.flush()
    return torch.stack(out, 1)


# ---- parity -----------------------------------------------------------------------------------------------------------------------

@every
def test_the_forward_pass_equals_transformers(name, folders, golden):
    """Guards against anything that is not as the architecture has it: norms, layouts, biases, rotary scaling, masks."""
    net = Transformer.from_pretrained(folders(name))
    assert (net(tokens(LENGTH))[0] - golden[f"{name}/logits"]).abs().max() <= 1e-4


@every
@pytest.mark.parametrize("options", (dict(kv="bf16"), EIGHT), ids=("full", "8 bits"))
def test_greedy_decoding_equals_transformers(name, options, folders, golden):
    """Guards against a decode step that differs from the forward pass: a position, a window, a norm that `after` forgets."""
    net = Transformer.from_pretrained(folders(name))
    out = generate.generate(net, tokens(LENGTH)[:, :LENGTH - GREEDY], GREEDY, stop=(), **options)
    assert out[0, -GREEDY:].tolist() == golden[f"{name}/greedy"].tolist()
    if "dynamic" not in name:  # there a key keeps the rotation of its own step
        net.setup_caches(1, LENGTH, **options)
        assert (decode_logits(net, tokens(LENGTH), 20)[0] - golden[f"{name}/logits"][19:]).abs().max() <= 1e-4


@every
def test_rows_of_a_batch_equal_each_prompt_alone(name, folders):
    """Guards against padding that is seen, and (dynamic) a rotation by the longest row's length."""
    net = Transformer.from_pretrained(folders(name))
    prompts = [tokens(n, seed)[0].tolist() for seed, n in enumerate((5, 47, 16, 33))]
    for options in (dict(kv="bf16"), SMALL):
        together = generate.generate(net, prompts, 12, stop=(), **options)
        for prompt, row in zip(prompts, together):
            assert generate.generate(net, [prompt], 12, stop=(), **options)[0] == row


def test_the_variants_differ(golden):
    """Two variants with the same numbers would mean that one of them is not what its name says."""
    logits = [golden[f"{name}/logits"] for name in VARIANTS]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert (a - b).abs().max() > 0.1


@slow
@pytest.mark.parametrize("name", ("falcon 7b", "falcon new decoder", "mistral, window", "qwen2, window above layer 1", "llama, rope dynamic"))
@pytest.mark.parametrize("options", (dict(kv="bf16"), SMALL), ids=("full", "kivi"))
def test_the_compiled_step_equals_the_eager_one(name, options, folders):
    """Guards against a graph break in LayerNorm, GELU, the shared norm or the window's mask."""
    torch._dynamo.reset()
    net = Transformer.from_pretrained(folders(name))
    eager = generate.generate(net, tokens(20), 40, stop=(), **options)
    net.compile()
    assert torch.equal(generate.generate(net, tokens(20), 40, stop=(), **options), eager)
    torch._dynamo.reset()


# ---- sliding window ---------------------------------------------------------------------------------------------------------------

def dense(q, k, v, seen):
    """Attention over the tokens where seen [Tq, T], by its definition: q [B, H, Tq, D]; k, v [B, Hk, T, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("T, window, chunk", ((40, 7, 16), (40, 1, 16), (48, 39, 16), (48, 16, 16), (33, 40, 16), (33, None, 16), (700, 300, 512)))
def test_prefill_attends_to_the_window(T, window, chunk, monkeypatch):
    """Guards against a window that is off by one, and against a mask as large as the square of the text."""
    masks, sdpa = [], model_file.F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **options):
        masks.append(0 if attn_mask is None else attn_mask.numel())
        return sdpa(*args, attn_mask=attn_mask, **options)

    q, k, v = noise("q", 2, 4, T, 16), noise("k", 2, 2, T, 16), noise("v", 2, 2, T, 16)
    age = torch.arange(T)[:, None] - torch.arange(T)
    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", spy)
    want = dense(q, k, v, (age >= 0) & (age < (window or T)))
    for c in (T, T - 5, 1):  # queries of the last c tokens
        assert (causal(q[:, :, T - c:], k, v, window, chunk) - want[:, :, T - c:]).abs().max() <= 1e-5
    assert max(masks) <= chunk * (chunk + (window or T))


CACHES = {
    "full": (FullCache, {}),
    "kivi": (KiviCache, dict(group_size=8, residual=32)),
    "K 4 V 2, sinks": (KiviCache, dict(group_size=8, residual=32, sink=4, k_bits=4)),
}


@pytest.mark.parametrize("sliding", (1, 20, 33, 100, 299, 300, 1000))
@pytest.mark.parametrize("kind", CACHES)
def test_decode_attends_to_the_window(kind, sliding):
    """Rows of 300 and 130 tokens, some of them appended: attention over what the cache shows of the window, and nothing changes when
    every group outside it holds other numbers. Guards against a bound that is off by one on either side, in either part of the cache."""
    make, options = CACHES[kind]
    k, v, q = noise("k", 2, 2, 300, 16), noise("v", 2, 2, 300, 16), noise("q", 2, 4, 1, 16)
    poison, lengths = [x.clone() for x in (k, v)], (300, 130)
    for row, n in enumerate(lengths):
        for x in poison:
            x[row, :, : max(0, n - sliding) // 8 * 8] += 50
    if kind == "full":
        for x in poison:
            x[0, :, : max(0, 300 - sliding)] = -9e3
    outs = []
    for keys, values in ((k, v), poison):
        cache = make(2, 2, 300, 16, sliding=sliding, **options)
        cache.prefill(keys[:, :, :299], values[:, :, :299], [290, 120])
        for t in range(10):
            rows = torch.tensor([[290 + t], [120 + t]])
            cache.append(*(x.gather(2, rows[:, None, :, None].expand(2, 2, 1, 16)) for x in (keys, values)))
        outs.append(cache.attend(q))
        if keys is k:
            shown = cache.dequantized()
    assert torch.equal(*outs)
    for row, n in enumerate(lengths):
        seen = (torch.arange(300) > n - 1 - sliding) & (torch.arange(300) < n)
        want = dense(q[row:row + 1], *(x[row:row + 1].float() for x in shown), seen[None])
        assert (outs[0][row] - want[0]).abs().max() <= 1e-5


def test_a_window_of_no_tokens_is_refused():
    for make in (FullCache, KiviCache):
        with pytest.raises(ValueError, match="sliding"):
            make(1, 1, 64, 32, sliding=0)


def test_which_layers_have_a_window(tmp_path):
    """Guards against a window where the config has switched it off, or on layers that read everything; and against a context that ends
    where the window does."""
    write = lambda **changes: (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "head_dim": 16, **changes}))
    mistral, qwen = dict(architectures=["MistralForCausalLM"]), dict(architectures=["Qwen2ForCausalLM"], sliding_window=9)
    for changes, want in (
        (dict(sliding_window=9), (None, None)),  # Llama has none
        (dict(mistral, sliding_window=9), (9, 9)), (dict(mistral, sliding_window=None), (None, None)), (mistral, (4096, 4096)),
        (qwen, (None, None)), (dict(qwen, use_sliding_window=True), (None, None)), (dict(qwen, use_sliding_window=True, max_window_layers=1), (None, 9)),
        (dict(qwen, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]), (9, None)),
    ):
        write(**changes)
        config = ModelConfig.from_folder(tmp_path)
        assert config.windows == want and config.max_len == 256, changes


# ---- loading ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ("llama, biases", "falcon new decoder", "phi3"))
def test_shards_and_other_dtypes_give_the_same_model(name, tmp_path, golden):
    """Guards against a tensor that is read from the wrong shard, and a dtype that is reinterpreted instead of converted."""
    net = Transformer.from_pretrained(write_checkpoint(tmp_path / "shards", VARIANTS[name], shards=3))
    assert (net(tokens(LENGTH))[0] - golden[f"{name}/logits"]).abs().max() <= 1e-4
    for dtype in (torch.float16, torch.bfloat16):
        folder = write_checkpoint(tmp_path / str(dtype), VARIANTS[name])
        save_file({n: x.to(dtype) for n, x in weights(VARIANTS[name]).items()}, folder / "model.safetensors")
        for target in (torch.float16, torch.bfloat16, torch.float32):
            half = Transformer.from_pretrained(folder, dtype=target)
            for a, b in zip(half.parameters(), net.parameters()):
                assert a.dtype == target and torch.equal(a, b.to(dtype).to(target))


def test_tied_heads(tmp_path, golden):
    """The head that some files repeat is ignored, one parameter serves both ends. Guards against a second copy."""
    tied = VARIANTS["llama, tied"]
    folder = write_checkpoint(tmp_path, tied)
    save_file({**weights(tied), "lm_head.weight": torch.ones(128, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
              folder / "model.safetensors")
    net = Transformer.from_pretrained(folder)
    assert net.head.weight is net.embed.weight
    assert (net(tokens(LENGTH))[0] - golden["llama, tied/logits"]).abs().max() <= 1e-4


def test_missing_and_unexpected_names_come_in_one_message(tmp_path):
    """Guards against a report that stops at the first, so that the user repairs one name after the other."""
    w = weights(LLAMA)
    w["model.layers.1.mlp.down_proj.scales"] = w.pop("model.layers.1.mlp.down_proj.weight")
    w["extra"] = w.pop("model.norm.weight")
    folder = write_checkpoint(tmp_path, LLAMA)
    save_file(w, folder / "model.safetensors")
    with pytest.raises(ValueError) as info:
        Transformer.from_pretrained(folder)
    missing, unexpected = str(info.value).split("missing:")[1].split("; unexpected:")
    assert missing == " model.layers.1.mlp.down_proj.weight, model.norm.weight"
    assert unexpected == " extra, model.layers.1.mlp.down_proj.scales"


def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Guards against a whole shard in memory: no tensor of the file may be alive when the next is read, and none is read twice."""
    import weakref

    alive, read = [], []

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
            assert not any(ref() is not None for ref in alive), f"{read[-1]} is still there when {name} is read"
            tensor = self.file.get_tensor(name)
            alive[:], _ = [weakref.ref(tensor)], read.append(name)
            return tensor

    safe_open = model_file.safe_open
    monkeypatch.setattr(model_file, "safe_open", Spy)
    Transformer.from_pretrained(write_checkpoint(tmp_path, VARIANTS["falcon new decoder"], shards=2))
    assert sorted(read) == sorted(weights(VARIANTS["falcon new decoder"]))


MEASURE = """
import re, sys
sys.path.insert(0, {root!r})
from model import Transformer
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
Transformer.from_pretrained({small!r})
before = peak()
net = Transformer.from_pretrained({folder!r})
print(peak() - before, sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_the_weights_and_one_tensor(tmp_path):
    """The peak of a process that loads three shards of 60 MB, mapped pages included. Guards against a whole file that is read or mapped
    at a time, and against a second copy of the model."""
    config = dict(LLAMA, hidden_size=512, intermediate_size=2048, num_hidden_layers=9, vocab_size=4096, num_attention_heads=8, num_key_value_heads=8)
    small = write_checkpoint(tmp_path / "small", LLAMA)
    folder = write_checkpoint(tmp_path / "large", config, shards=3)
    largest = max(x.nbytes for x in weights(config).values())
    code = MEASURE.format(root=str(ROOT), small=str(small), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    shard = max(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert shard > 3 * largest + 12e6, "the shards are too small to tell"
    assert size * 0.9 <= peak <= size + largest + 8e6, f"peak {peak / 1e6:.0f} MB, weights {size / 1e6:.0f}, largest tensor {largest / 1e6:.0f}"


USUAL = dict(LLAMA, vocab_size=280, head_dim=32)  # room for bytes and special tokens, and for groups of 32


def make_folder(folder, files=(), **config):
    """A checkpoint folder with these changes to its config.json (the weights follow two of them) and files removed (None) or replaced."""
    write_checkpoint(folder, USUAL | {k: v for k, v in config.items() if k in ("vocab_size", "num_hidden_layers")})
    (folder / "config.json").write_text(json.dumps(USUAL | config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in dict(files).items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return folder


ERRORS = {  # what is wrong: (changes of the folder, what the line must name)
    "another architecture": (dict(architectures=["GemmaForCausalLM"]), ("GemmaForCausalLM", "FalconForCausalLM", "Qwen3ForCausalLM")),
    "no architecture": (dict(architectures=None), ("architecture", "LlamaForCausalLM")),
    "alibi": (dict(VARIANTS["falcon 7b"], alibi=True), ("alibi",)),
    "longrope": (dict(rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[2.0])), ("longrope", "yarn")),
    "rope without its factor": (dict(rope_scaling=dict(type="linear")), ("factor",)),
    "partly rotated heads": (dict(partial_rotary_factor=0.5), ("partial_rotary_factor", "0.5")),
    "an activation": (dict(hidden_act="relu6"), ("relu6", "silu")),
    "no hidden_size": (dict(hidden_size=None), ("config.json",)),
    "heads that cannot be shared": (dict(num_key_value_heads=3), ("3",)),
    "only .bin": (dict(files={"model.safetensors": None, "pytorch_model.bin": b""}), ("pytorch_model.bin", "save_pretrained")),
    "no weights": (dict(files={"model.safetensors": None}), ("model.safetensors", "save_pretrained")),
    "only tokenizer.model": (dict(files={"tokenizer.json": None, "tokenizer.model": b""}), ("tokenizer.model", "save_pretrained")),
    "no tokenizer": (dict(files={"tokenizer.json": None}), ("tokenizer.json", "save_pretrained")),
    "a damaged tokenizer": (dict(files={"tokenizer.json": b"{}"}), ("tokenizer.json",)),
    "config that is a list": (dict(files={"config.json": b"[]"}), ("config.json",)),
    "tokenizer config that is no JSON": (dict(files={"tokenizer_config.json": b"{"}), ("tokenizer_config.json",)),
    "an index without files": (dict(files={"model.safetensors.index.json": b'{"weight_map": 3}'}), ("index.json",)),
    "an index that leaves the folder": (dict(files={"model.safetensors.index.json": b'{"weight_map": {"x": "../x.safetensors"}}'}), ("index.json",)),
    "a missing shard": (dict(files={"model.safetensors.index.json": b'{"weight_map": {"x": "model-00001-of-00001.safetensors"}}'}),
                        ("model-00001-of-00001.safetensors",)),
    "a model larger than memory": (dict(hidden_size=2**30, intermediate_size=2**30, head_dim=32), ("memory",)),
    "a vocabulary smaller than the tokenizer's": (dict(vocab_size=200), ("vocabulary", "199")),
}


def run(capsys, *args):
    """(exit status, stdout, stderr) of the program inside this process."""
    try:
        generate.main([str(a) for a in args])
        code = 0
    except SystemExit as error:
        code = error.code
    return (code, *capsys.readouterr())


def one_line(result, *named):
    code, out, err = result
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err + out, result
    for name in named:
        assert name in err, f"{name!r} is not in {err}"


@pytest.mark.parametrize("what", ERRORS)
def test_a_checkpoint_that_cannot_be_used_gets_one_line(what, tmp_path, capsys):
    """Guards against tracebacks and against lines that do not say what to do."""
    changes, named = ERRORS[what]
    one_line(run(capsys, "--checkpoint", make_folder(tmp_path, **changes), "--prompt", "xyz", "--max-new-tokens", 2), *named)


def test_no_damaged_config_ends_in_a_traceback(tmp_path):
    """Every entry in turn missing, null, negative, huge or of another kind: the model loads or a ValueError says why."""
    rope = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    for base in (dict(LLAMA, rope_scaling=rope, sliding_window=9, architectures=["MistralForCausalLM"]), VARIANTS["falcon new decoder"]):
        folder = write_checkpoint(tmp_path, base)
        for key in base:
            for bad in (..., None, -1, 0, 0.5, 10**12, 10**30, "x", [], [[]], {}, {"rope_type": []}, True):
                config = {k: v for k, v in base.items() if k != key} if bad is ... else {**base, key: bad}
                (folder / "config.json").write_text(json.dumps(config))
                try:
                    Transformer.from_pretrained(folder)(tokens(3))
                except ValueError as error:
                    assert str(error)
                except Exception as error:
                    pytest.fail(f"{key} = {bad!r}: {type(error).__name__}: {error}")


# ---- tokenizers -------------------------------------------------------------------------------------------------------------------

def byte_tokenizer(special=("<s>", "</s>"), bos=True):
    """Bytes as tokens 0 .. 255, in the way of GPT-2, Llama 3 and Qwen, and special tokens from 256 on."""
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 256)])
    return tokenizer


def metaspace_tokenizer():
    """Some words and, for everything else, bytes: in the way of sentencepiece (Llama 2, Mistral, Phi-3)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "▁ab", "ab"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("▁", "a"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


class Parrot:
    """Stands in for `generate.generate`: says these texts, one a call, token by token; keeps the prompts it was given."""

    def __init__(self, monkeypatch, tokenizer, *texts, interrupt=None):
        self.tokenizer, self.texts, self.prompts, self.interrupt, self.pieces = tokenizer, list(texts), [], interrupt, []
        monkeypatch.setattr(generate, "generate", self)

    def __call__(self, model, rows, max_new_tokens, *args, on_token, stats, **options):
        self.prompts.append(self.tokenizer.decode(rows[0], skip_special_tokens=False))
        ids = self.tokenizer.encode(self.texts.pop(0), add_special_tokens=False).ids
        for n, i in enumerate(ids):
            if n == self.interrupt:
                self.interrupt = None
                raise KeyboardInterrupt
            on_token([i])
        stats.update(prefill_s=0.1, decode_s=0.1, steps=len(ids) - 1)
        return [rows[0] + ids]


@pytest.fixture
def chat_folder(tmp_path):
    """A function of (tokenizer, tokenizer_config.json) that returns the folder of a model with them."""
    def make(tokenizer, **config):
        folder = make_folder(tmp_path)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("kind", (byte_tokenizer, metaspace_tokenizer))
def test_streamed_text_is_whole_characters(kind, chat_folder, capsys, monkeypatch):
    """Two to four bytes a character, one token a byte. Guards against replacement characters where a character is cut, and against a
    space that is lost or added where the answer begins."""
    tokenizer, text, pieces = kind(), " ab é日本🙂 ab", []
    folder = chat_folder(tokenizer)
    Parrot(monkeypatch, tokenizer, text if kind is byte_tokenizer else text[1:])
    monkeypatch.setattr("builtins.print", lambda *args, **options: pieces.append((*args, "")[0]) if options.get("flush") else None)
    generate.main(["--checkpoint", str(folder), "--prompt", "ab"])
    assert "".join(pieces) == "ab" + text and len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("in_file", (True, False))
@pytest.mark.parametrize("config, bos", ((dict(add_bos_token=True), True), (dict(add_bos_token=False), False), ({}, None)))
def test_bos_is_as_the_config_says(in_file, config, bos, chat_folder):
    """tokenizer_config.json decides; tokenizer.json where it is silent. Guards against a missing and a doubled BOS."""
    folder = chat_folder(byte_tokenizer(bos=in_file), bos_token={"content": "<s>"}, **config)
    _, tokenizer = generate.load(folder)
    assert tokenizer.encode("ab").ids == [256] * (in_file if bos is None else bos) + byte_tokenizer(bos=False).encode("ab").ids


def test_every_eos_of_the_generation_config_ends_the_text(tmp_path, golden):
    """Guards against the first one only, and against the one of config.json."""
    greedy = golden["phi3/greedy"].tolist()
    for eos, n in (([7, greedy[3], greedy[1]], 2), (greedy[2], 3), ([greedy[4], 7], 5)):
        folder = write_checkpoint(tmp_path, dict(VARIANTS["phi3"], eos_token_id=greedy[0]))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        out = generate.generate(Transformer.from_pretrained(folder), tokens(LENGTH)[:, :32], GREEDY, kv="bf16")
        assert out[0, 32:].tolist() == greedy[:n]


# ---- chat -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ("config", "list", "file"))
@pytest.mark.parametrize("name", CHAT)
def test_chat_templates_give_what_transformers_gives(name, where, tmp_path):
    """Guards against other blank lines (trim_blocks), escapes, missing functions, and a template that is not found."""
    template, special, messages, text = CHAT[name]
    config = {k: {"content": v, "special": True} if k == "bos_token" else v for k, v in special.items()}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        config["chat_template"] = "not this one"
    else:
        config["chat_template"] = template if where == "config" else [dict(name="tool_use", template="no"), dict(name="default", template=template)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert generate.chat_template(tmp_path)(messages) == text


INST = dict(bos_token="<s>", eos_token="</s>", chat_template=CHAT["inst"][0])


def test_chat_puts_the_prompt_into_the_template(chat_folder, capsys, monkeypatch):
    """Guards against a second BOS, a prompt in the answer, a template that is ignored."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, add_bos_token=True, **INST)
    parrot = Parrot(monkeypatch, tokenizer, " Hello.")
    code, out, err = run(capsys, "--checkpoint", folder, "--chat", "--prompt", "Hi", "--json", "--max-new-tokens", 20)
    assert code == 0 and parrot.prompts == ["<s>[INST] Hi [/INST]"]
    assert out.splitlines()[0] == " Hello." and json.loads(out.splitlines()[-1])["text"] == " Hello."


def test_chat_puts_every_prompt_of_a_file_into_the_template(chat_folder, capsys):
    """Guards against a template that only single prompts go through."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, add_bos_token=True, **INST)
    (folder / "prompts.txt").write_text("Hi\n")
    code, out, err = run(capsys, "--checkpoint", folder, "--chat", "--prompts", folder / "prompts.txt", "--json", "--max-new-tokens", 4)
    want = tokenizer.encode("<s>[INST] Hi [/INST]", add_special_tokens=False).ids
    assert code == 0 and json.loads(out.splitlines()[0])["prompt_tokens"] == len(want)



@pytest.mark.parametrize("chat", (True, False))
def test_a_conversation_keeps_its_history(chat, chat_folder, capsys, monkeypatch):
    """Three turns; the second answer is interrupted with Ctrl-C. Guards against forgotten turns, against a Ctrl-C that ends the program,
    and against one that loses what was said."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, **INST)
    parrot = Parrot(monkeypatch, tokenizer, "one", "twofold", "three")
    lines = iter(["A", "", "B", "C"])

    def ask(_):
        parrot.interrupt = 3 if len(parrot.prompts) == 1 else None
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    code, out, err = run(capsys, "--checkpoint", folder, "--interactive", *["--chat"] * chat)
    assert code == 0 and "Traceback" not in err
    turn = "<s>[INST] {} [/INST]"
    assert parrot.prompts == ([turn.format("A"), turn.format("A") + " one </s>" + turn.format("B"),
                               turn.format("A") + " one </s>" + turn.format("B") + " two </s>" + turn.format("C")] if chat else
                              ["<s>A", "<s>Aone\nB", "<s>Aone\nBtwo\nC"])
    assert out.split("\n")[:3] == (["one", "two", "three"] if chat else ["Aone", "Btwo", "Cthree"])


def test_a_long_conversation_forgets_its_oldest_turns(chat_folder, capsys, monkeypatch):
    """Guards against a conversation that ends with an error as soon as the context is full."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, **INST)
    parrot, lines = Parrot(monkeypatch, tokenizer, *["x" * 60] * 5), iter(["A", "B", "C", "D", "E"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    code, out, err = run(capsys, "--checkpoint", folder, "--interactive", "--chat", "--max-new-tokens", 60)
    assert code == 0 and "forgetting" in err
    assert "] D [" in parrot.prompts[-1] and "] A [" not in parrot.prompts[-1] and parrot.prompts[-1].count("<s>") < 5


TEMPLATES = {  # what a template may do wrong: (its text, what the line names)
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "its own refusal": ("{{ raise_exception('only\nin pairs') }}", "only in pairs"),
    "no such thing": ("{{ messages[7].content }}", "UndefinedError"),
    "into the interpreter": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "through a function": ("{{ raise_exception.__globals__['os'].system('true') }}", "unsafe"),
    "changes its input": ("{{ messages.append(1) }}", "unsafe"),
    "no end": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    "itself again": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "no text": (["a", "list"], "no chat template"),
    "none": (None, "no chat template"),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_broken_or_malicious_template_gets_one_line(what, chat_folder, capsys):
    """Guards against a template that runs outside the sandbox, and against its errors as tracebacks."""
    template, named = TEMPLATES[what]
    folder = chat_folder(byte_tokenizer(), chat_template=template)
    one_line(run(capsys, "--checkpoint", folder, "--chat", "--prompt", "Hi", "--max-new-tokens", 2), named, str(folder))


# ---- the hub ----------------------------------------------------------------------------------------------------------------------

TINYLLAMA, COMMIT, OLDER = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "f" * 40, "0" * 40


def fill_hub_cache(home, repo, source, commit=COMMIT, ref="main"):
    """Files of a folder in the layout of the hub's cache: blobs by hash, links to them in a snapshot, names of commits in refs."""
    import hashlib

    top = home / "hub" / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "refs" / ref).write_text(commit)
    for file in source.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (top / "blobs" / digest).write_bytes(file.read_bytes())
        (top / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{digest}")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with TinyLlama (two versions of it) and SmolLM2, of random weights."""
    base = tmp_path_factory.mktemp("hub")
    smollm = generate.SHORT["smollm2-135m"]
    for repo, commit, ref, layers in ((TINYLLAMA, COMMIT, "main", 2), (TINYLLAMA, OLDER, "v0", 1), (smollm, COMMIT, "main", 3)):
        source = make_folder(base / f"{layers} layers", num_hidden_layers=layers)
        (source / "tokenizer_config.json").write_text(json.dumps(INST))
        fill_hub_cache(base / "home", repo, source, commit, ref)
    return base / "home"


def program(hub, *args, offline=True):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | {"HF_HOME": str(hub), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), *map(str, args)], capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("offline", (True, False), ids=("HF_HUB_OFFLINE", "no network"))
def test_a_cached_checkpoint_works_offline(hub, offline):
    """As a user runs it. Guards against a program that asks the network for what it has."""
    done = program(hub, "--checkpoint", TINYLLAMA, "--chat", "--prompt", "Hi", "--max-new-tokens", 4, "--temperature", 0, "--json", offline=offline)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["prompt_tokens"] == 18


def test_revisions_and_short_names_find_their_snapshot(hub, capsys, monkeypatch):
    """Guards against a revision that is parsed and then ignored, and a short name that points elsewhere."""
    import huggingface_hub

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, **k, cache_dir=hub / "hub", local_files_only=True))
    layers = lambda *args: ModelConfig.from_folder(generate.resolve(*args)).n_layers
    assert layers(TINYLLAMA) == layers("tinyllama") == layers("TinyLlama", "main") == layers(TINYLLAMA, COMMIT) == 2
    assert layers(TINYLLAMA, "v0") == layers("tinyllama", OLDER) == 1
    assert layers("smollm2-135m") == 3
    with pytest.raises(ValueError, match="v9.*cache"):
        layers(TINYLLAMA, "v9")
    result = lambda *args: json.loads(run(capsys, "--checkpoint", "tinyllama", "--max-new-tokens", 2, "--json", *args)[1].splitlines()[-1])
    assert result()["kv_bytes_full"] == 2 * result("--revision", "v0")["kv_bytes_full"]


@pytest.mark.parametrize("offline", (True, False), ids=("HF_HUB_OFFLINE", "no network"))
def test_a_checkpoint_that_is_not_cached_gets_one_line(hub, offline):
    done = program(hub, "--checkpoint", "falcon-7b", "--max-new-tokens", 2, offline=offline)
    one_line((done.returncode, done.stdout, done.stderr), "tiiuae/falcon-7b", "cache")


@pytest.mark.parametrize("kind, named", (
    ("GatedRepoError", ("meta-llama/Llama-2-7b-hf", "https://huggingface.co/meta-llama/Llama-2-7b-hf", "HF_TOKEN")),
    ("RepositoryNotFoundError", ("no repository", "HF_TOKEN")),
    ("RevisionNotFoundError", ("revision 'v9'",)),
    ("HfHubHTTPError", ("meta-llama/Llama-2-7b-hf", "refused")),
    (None, ("meta-llama/Llama-2-7b-hf", "broken pipe")),
))
def test_what_the_hub_answers_becomes_one_line(kind, named, capsys, monkeypatch):
    """Guards against a gated model whose message does not say how to get in, and against errors of the HTTP library as tracebacks."""
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args, **options):
        raise getattr(errors, kind)("refused\nsecond line", response=Mock(headers={})) if kind else RuntimeError("broken pipe")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    one_line(run(capsys, "--checkpoint", "llama-2-7b", "--revision", "v9"), *named)


def test_only_needed_files_are_downloaded():
    """Guards against repositories that hold their weights twice (consolidated.safetensors, .bin, original/)."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
              "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth", "README.md",
              "tokenizer.model", "onnx/model.onnx", "model.gguf", "adapter_model.safetensors", "modeling_falcon.py"]
    assert sorted(filter_repo_objects(wanted + others, allow_patterns=generate.NEEDED)) == sorted(wanted)


def test_a_revision_of_a_folder_is_refused(tmp_path, capsys):
    """Guards against a pin that is silently without effect."""
    one_line(run(capsys, "--checkpoint", make_folder(tmp_path), "--revision", "main"), "revision 'main'", str(tmp_path))
    one_line(run(capsys, "--revision", "main"), "revision 'main'")
