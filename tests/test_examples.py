"""Run: python -m pytest -q tests/test_examples.py        (the one with transformers needs it installed)

The programs of examples/, against exact attention, this project's own model and caches that are made anew for every token.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

import generate
from kivi import KiviCache

TEXTS = ["Once upon a time there was a king, and the king had", "The sea", "It was a dark night and the old man went down to the"]
SMALL = dict(group_size=16, residual=32)  # most of these texts is quantized


def test_attention_only_runs_and_its_error_is_that_of_the_bits(tmp_path):
    """Guards against: an import beyond the two files; attending before the token is appended (2 % at 8 bits)."""
    run = subprocess.run([sys.executable, ROOT / "examples" / "attention_only.py"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = [line.replace(",", "").split() for line in run.stdout.splitlines()]
    errors, sizes = [float(r[4]) for r in rows], [int(r[5]) for r in rows]
    assert errors[0] < 0.01 < errors[1] < 0.1 < errors[2] < 0.5
    assert int(rows[0][9]) == 4 * 2**20 > 2 * sizes[0] > 2 * sizes[1] > 2 * sizes[2]


def test_the_lines_of_the_readme_run_with_the_two_files_alone(tmp_path):
    """Guards against a README that shows names or arguments of another time, and against a third file that the two need."""
    lines = re.search(r"```python\n(from kivi.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    for name in ("kivi.py", "quantize.py"):
        shutil.copy(ROOT / name, tmp_path)
    assert lines.count("out = ") == 2
    program = f"""import torch
k, v, k1, v1, q = (torch.randn(1, h, n, 128) for h, n in ((8, 300), (8, 300), (8, 1), (8, 1), (32, 1)))
{lines.replace("out = ", "plain = ", 1)}
assert out.shape == q.shape and (out - plain).norm() < 1e-5 * plain.norm() > 0
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


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


def rebuild(module, q, k, v, mask, **kwargs):
    """Reference: transformers keeps K and V itself; for every row and step a new KiviCache of all its tokens (its state depends on nothing else)."""
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


def continued(hub, attention, batch, **options):
    example, model, _ = hub
    if attention == "kivi":
        options["past_key_values"] = example.KiviPastKeyValues(model, 512, **SMALL)
    else:
        model.set_attn_implementation("rebuild")
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=40, **options)


@pytest.mark.parametrize("options", (dict(do_sample=False), dict(do_sample=True, temperature=0.8), dict(do_sample=False, num_beams=3)),
                         ids=("greedy", "sampling", "beams"))
def test_a_batch_equals_a_cache_made_anew_for_every_token(hub, options):
    """Guards against: padding in the cache, rows not shifted, the order of append and attend, beams that keep another beam's tokens or window."""
    batch = inputs(hub[2])
    assert torch.equal(continued(hub, "kivi", batch, **options), continued(hub, "rebuild", batch, **options))


def test_the_same_text_as_this_projects_own_model(hub):
    """Guards against: attention to unpacked or full-precision keys; scaling; a cache that is not 2 bits."""
    example, model, tokenizer = hub
    own, _ = generate.load()
    for text in TEXTS:
        batch = inputs(tokenizer, [text])
        cache = example.KiviPastKeyValues(model, batch.input_ids.shape[1] + 100, **SMALL)
        out = model.generate(**batch, past_key_values=cache, max_new_tokens=100, do_sample=False)
        assert torch.equal(out, generate.generate(own, batch.input_ids, 100, 0.0, kv="kivi2", **SMALL))
        assert cache.nbytes == sum(layer.cache.nbytes for layer in own.layers)


def test_a_conversation_goes_on_in_the_same_cache(hub):
    """Guards against: several tokens after the prompt that overwrite one another, or are attended to by those before them."""
    from transformers import DynamicCache

    example, model, tokenizer = hub
    first, cache = inputs(tokenizer, TEXTS[:1]), example.KiviPastKeyValues(model, 512, **SMALL)
    out = model.generate(**first, past_key_values=cache, max_new_tokens=60, do_sample=False)
    more = torch.cat([out, inputs(tokenizer, [" And then she said to him,"]).input_ids[:, 1:]], 1)
    here = model.generate(more, past_key_values=cache, max_new_tokens=20, do_sample=False)
    kept = DynamicCache()
    model.set_attn_implementation("rebuild")
    assert torch.equal(out, model.generate(**first, past_key_values=kept, max_new_tokens=60, do_sample=False))
    assert torch.equal(here, model.generate(more, past_key_values=kept, max_new_tokens=20, do_sample=False))
    cache.reset()
    model.set_attn_implementation("kivi")
    assert torch.equal(out, model.generate(**first, past_key_values=cache, max_new_tokens=60, do_sample=False))


def test_without_a_kivi_cache_the_model_is_what_it_was(hub):
    """Guards against: an attention function that spoils the model's other uses."""
    example, model, tokenizer = hub
    batch = inputs(tokenizer)
    out = []
    for name in ("sdpa", "kivi"):
        model.set_attn_implementation(name)
        out.append(model.generate(**batch, max_new_tokens=20, do_sample=False))
    assert torch.equal(*out)


def test_a_sliding_window_and_other_scales_of_scores(hub):
    """Guards against: attention to tokens that have left the model's window (all of them are exact here); a scale that is not D^-0.5."""
    import transformers

    example = hub[0]
    config = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    for config in (transformers.MistralConfig(**config, sliding_window=24), transformers.GraniteConfig(**config, attention_multiplier=0.7)):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        prompt = torch.randint(1, 64, (2, 20))
        want = model.generate(prompt, max_new_tokens=60, do_sample=False)
        cache = example.KiviPastKeyValues(model, 100, group_size=16)
        assert torch.equal(want, model.generate(prompt, past_key_values=cache, max_new_tokens=60, do_sample=False))


def test_what_is_not_right_is_refused(hub):
    """Guards against: silent nonsense."""
    example, model, tokenizer = hub
    batch = inputs(tokenizer)
    new = lambda max_len=512, **options: example.KiviPastKeyValues(model, max_len, **SMALL, **options)

    def run(cache, **options):
        return model.generate(**{**batch, "past_key_values": cache, "max_new_tokens": 8, "do_sample": False, **options})

    flip = {"input_ids": batch.input_ids.flip(1), "attention_mask": batch.attention_mask.flip(1)}
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        run(new(), **flip)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model.generate(**inputs(tokenizer, TEXTS[:1]), past_key_values=new(), prompt_lookup_num_tokens=3, max_new_tokens=20)
    with pytest.raises(ValueError, match="cannot be cropped"):
        new().crop(-1)
    with pytest.raises(ValueError, match="fixed number of rows"):
        new().batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="full: a row holds its capacity of 20"):
        run(new(20))
    with pytest.raises(ValueError, match="k_bits must be one of"):
        run(new(k_bits=3))
    cache = new()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention is sdpa, not kivi"):
        run(cache)
    model.config.attention_chunk_size = 8
    try:
        with pytest.raises(ValueError, match="attention_chunk_size"):
            new()
    finally:
        del model.config.attention_chunk_size
