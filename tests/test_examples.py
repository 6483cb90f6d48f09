"""The programs of examples/ and the lines of the README, against exact attention, this project's
own model, and caches that are made anew for every token. Some need transformers 5.
"""
import os
import re
import shutil
import subprocess
import sys
from inspect import signature

import pytest
import torch
from calling import ENV, ROOT

import generate
from kivi import KiviCache

TEXTS = ["Once upon a time there was a king, and the king had", "The sea",
         "It was a dark night and the old man went down to the"]
SMALL = {"group_size": 16, "residual": 32}  # most of these texts is quantized


def python(folder, *args):
    """stdout of a Python process that must end well."""
    run = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                         cwd=folder, env=os.environ | ENV)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("arguments", ((), pytest.param(("--fused",), marks=pytest.mark.slow)),
                         ids=("plain", "fused"))
def test_attention_only_runs_and_its_error_is_that_of_the_bits(arguments, tmp_path):
    """Guards against an import beyond the files that it names; attending before the token is
    appended (2 % at 8 bits)."""
    out = python(tmp_path, ROOT / "examples" / "attention_only.py", *arguments)
    rows = [line.replace(",", "").split() for line in out.splitlines()]
    errors = [float(row[4]) for row in rows]
    sizes = [int(row[5]) for row in rows]
    assert errors[0] < 0.01 < errors[1] < 0.1 < errors[2] < 0.5
    assert int(rows[0][9]) == 4 * 2**20 > 2 * sizes[0] > 2 * sizes[1] > 2 * sizes[2]


COPIED = """import torch
compile = torch.compile
torch.compile = lambda fn, **options: compile(fn, backend="eager", **options)  # no Inductor
def randn(heads, tokens):
    return torch.randn(1, heads, tokens, 128)
k, v, k1, v1, q = randn(8, 300), randn(8, 300), randn(8, 1), randn(8, 1), randn(32, 1)
{lines}
expected = torch.nn.functional.scaled_dot_product_attention(
    q, *cache.dequantized(), enable_gqa=True)
assert (out - expected).norm() < 1e-5 * expected.norm()
print(cache.length)
"""


@pytest.mark.parametrize("fused", (False, True), ids=("two files", "three files"))
def test_the_lines_of_the_readme_run_with_the_copied_files_alone(fused, tmp_path):
    """Guards against a README that shows names or arguments of another time, and against a file
    more that the copied ones need."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(from kivi.*?)```", text, re.S)[1].splitlines()
    optional = [line for line in lines if re.search("compiled_attention|= attend", line)]
    assert len(optional) == 3
    files = ["kivi.py", "quantize.py"]
    if fused:
        files.append("fused/attention.py")
        (tmp_path / "fused").mkdir()
    else:
        lines = [line for line in lines if line not in optional]
    for name in files:
        shutil.copy(ROOT / name, tmp_path / name)
    assert python(tmp_path, "-c", COPIED.format(lines="\n".join(lines))) == "301\n"


# ---- transformers -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hub():
    """(example, transformers' model and tokenizer of the embedded checkpoint)"""
    transformers = pytest.importorskip("transformers", minversion="5")
    import transformers_cache

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    transformers.AttentionInterface.register("rebuild", rebuild)
    transformers.AttentionMaskInterface.register("rebuild", transformers_cache.sdpa_mask)
    return transformers_cache, model, tokenizer


def inputs(tokenizer, texts=TEXTS):
    return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)


def greedy(model, batch, n, cache=None, **options):
    """The tokens of model.generate. `cache` goes by the name that this transformers gives it."""
    if cache is not None:
        named = "cache" in signature(model.forward).parameters
        options["cache" if named else "past_key_values"] = cache
    return model.generate(**batch, max_new_tokens=n, **{"do_sample": False} | options)


def rebuild(module, q, k, v, mask, **kwargs):
    """Reference: transformers keeps K and V itself; for every row and step a new KiviCache of all
    its tokens (its state depends on nothing else)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    L, T = q.shape[2], k.shape[2]
    if L == T:
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)
    out = torch.empty_like(q)
    for row in range(len(q)):
        for i in range(L):
            seen = mask[row, 0, i] if mask is not None else torch.arange(T) <= T - L + i
            cache = KiviCache(1, k.shape[1], 512, q.shape[3], **SMALL)
            cache.prefill(k[row, None][:, :, seen], v[row, None][:, :, seen])
            out[row, :, i] = cache.attend(q[row, None, :, i, None])[0, :, 0]
    return out.transpose(1, 2), None


@pytest.mark.parametrize("options", (
    {}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3}),
    ids=("greedy", "sampling", "beams"))
def test_a_batch_equals_a_cache_made_anew_for_every_token(hub, options):
    """Guards against padding in the cache, rows not shifted, the order of append and attend, beams
    that keep another beam's tokens or window."""
    example, model, tokenizer = hub
    batch = inputs(tokenizer)
    torch.manual_seed(0)
    out = greedy(model, batch, 40, example.KiviPastKeyValues(model, 512, **SMALL), **options)
    model.set_attn_implementation("rebuild")
    torch.manual_seed(0)
    assert torch.equal(out, greedy(model, batch, 40, **options))


def test_the_same_text_as_this_projects_own_model(hub):
    """Guards against attention to unpacked or full-precision keys; scaling; a cache that is not
    2 bits."""
    example, model, tokenizer = hub
    own, _ = generate.load()
    for text in TEXTS:
        batch = inputs(tokenizer, [text])
        length = batch.input_ids.shape[1]
        cache = example.KiviPastKeyValues(model, length + 100, **SMALL)
        out = greedy(model, batch, 100, cache)
        ours = generate.generate(own, batch.input_ids, 100, 0.0, kv="kivi2", **SMALL)
        assert torch.equal(out, ours)
        assert cache.nbytes == sum(layer.cache.nbytes for layer in own.layers)


def test_a_conversation_goes_on_in_the_same_cache(hub):
    """Guards against several tokens after the prompt that overwrite one another, or are attended to
    by those before them."""
    from transformers import DynamicCache

    example, model, tokenizer = hub
    first = inputs(tokenizer, TEXTS[:1])
    cache = example.KiviPastKeyValues(model, 512, **SMALL)
    out = greedy(model, first, 60, cache)
    said = inputs(tokenizer, [" And then she said to him,"]).input_ids[:, 1:]
    more = {"inputs": torch.cat([out, said], 1)}
    here = greedy(model, more, 20, cache)
    kept = DynamicCache()
    model.set_attn_implementation("rebuild")
    assert torch.equal(out, greedy(model, first, 60, kept))
    assert torch.equal(here, greedy(model, more, 20, kept))
    cache.reset()
    model.set_attn_implementation("kivi")
    assert torch.equal(out, greedy(model, first, 60, cache))


def test_without_a_kivi_cache_the_model_is_what_it_was(hub):
    """Guards against an attention function that spoils the model's other uses."""
    example, model, tokenizer = hub
    out = []
    for name in ("sdpa", "kivi"):
        model.set_attn_implementation(name)
        out.append(greedy(model, inputs(tokenizer), 20))
    assert torch.equal(*out)


def test_a_preset_is_that_of_the_program(hub):
    """Guards against a preset whose sinks or boosted channels are lost on the way."""
    example, model, tokenizer = hub
    own, _ = generate.load()
    batch = inputs(tokenizer, TEXTS[:1])
    cache = example.KiviPastKeyValues(model, 512, "kivi2+", residual=32)
    out = greedy(model, batch, 100, cache)
    ours = generate.generate(own, batch.input_ids, 100, 0.0, kv="kivi2+", residual=32)
    assert torch.equal(out, ours)


@pytest.mark.parametrize("kind, more", (
    ("MistralConfig", {"sliding_window": 24}), ("GraniteConfig", {"attention_multiplier": 0.7})))
def test_a_sliding_window_and_other_scales_of_scores(hub, kind, more):
    """Guards against attention to tokens that have left the model's window (all of them are exact
    here); a scale that is not D^-0.5."""
    import transformers

    config = getattr(transformers, kind)(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, **more)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prompt = {"inputs": torch.randint(1, 64, (2, 20))}
    want = greedy(model, prompt, 60)
    cache = hub[0].KiviPastKeyValues(model, 100, group_size=16)
    assert torch.equal(want, greedy(model, prompt, 60, cache))


def test_a_use_that_would_go_wrong_is_refused(hub):
    """Guards against silent nonsense."""
    example, model, tokenizer = hub
    batch = inputs(tokenizer)

    def new(max_len=512):
        return example.KiviPastKeyValues(model, max_len, **SMALL)

    flipped = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        greedy(model, flipped, 8, new())
    with pytest.raises(ValueError, match="cannot be cropped"):
        greedy(model, inputs(tokenizer, TEXTS[:1]), 20, new(), prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="cannot be cropped"):
        new().crop(-1)
    with pytest.raises(ValueError, match="fixed number of rows"):
        new().batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="full: .*20"):
        greedy(model, batch, 8, new(20))
    cache = new()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention is sdpa, not kivi"):
        greedy(model, batch, 8, cache)


@pytest.mark.parametrize("arguments, options, named", (
    ((512,), {"k_bits": 3}, "k_bits must be one of"),
    ((512,), {"bits": 2}, "the options are k_bits"),
    ((512, "kivi3"), {}, "unknown kv 'kivi3'"),
))
def test_a_cache_that_cannot_be_is_refused(hub, arguments, options, named):
    """Guards against an error in the middle of a text."""
    example, model, _ = hub
    with pytest.raises(ValueError, match=named):
        example.KiviPastKeyValues(model, *arguments, **options)


def test_a_model_with_attention_in_chunks_is_refused(hub, monkeypatch):
    """Guards against attention to tokens of another chunk."""
    example, model, _ = hub
    monkeypatch.setattr(model.config, "attention_chunk_size", 8, raising=False)
    with pytest.raises(ValueError, match="attention_chunk_size"):
        example.KiviPastKeyValues(model, 512)
