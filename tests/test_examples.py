"""The programs of examples/ and the lines of the README, against exact attention, this project's
own model, and caches that are made anew for every token. Some need transformers 5.
"""
import copy
import io
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


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ((), ("--fused",)), ids=("plain", "fused"))
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


@pytest.mark.parametrize("fused", (False, pytest.param(True, marks=pytest.mark.slow)),
                         ids=("two files", "three files"))
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
            if L > 64:  # a part of a prompt: KiviCache has a method of its own
                held = seen[: T - L]
                cache.prefill(k[row, None][:, :, : T - L][:, :, held],
                              v[row, None][:, :, : T - L][:, :, held])
                out[row] = cache.extend(*(x[row, None, :, -L:] for x in (q, k, v)))[0]
                break
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


def small_model(kind, seed=1, initializer_range=0.3, **more):
    """A model of two layers with random weights."""
    import transformers

    config = getattr(transformers, kind)(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=initializer_range,
        pad_token_id=0, bos_token_id=None, eos_token_id=None, **more)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32, "use_sliding_window": True}


@pytest.mark.parametrize("kind, more", (
    ("MistralConfig", {"sliding_window": 24}), ("GraniteConfig", {"attention_multiplier": 0.7}),
    ("PhimoeConfig", {"sliding_window": 8, "num_local_experts": 4}),
    ("Qwen2MoeConfig", {"sliding_window": 24, **EXPERTS,
                        "layer_types": ["sliding_attention", "full_attention"]})))
def test_a_sliding_window_and_other_scales_of_scores(hub, kind, more):
    """Guards against attention to tokens that have left the model's window (all of them are exact
    here), also where it stands in the mask alone, or begins after the prompt, or in some layers; a
    scale that is not D^-0.5."""
    model = small_model(kind, **more)
    prompt = {"inputs": torch.randint(1, 64, (2, 20))}
    want = greedy(model, prompt, 60)
    cache = hub[0].KiviPastKeyValues(model, 100, group_size=16)
    assert torch.equal(want, greedy(model, prompt, 60, cache))


MIXED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("kind, more", (
    ("LlamaConfig", {}),
    ("Gemma3TextConfig", {"head_dim": 16, "tie_word_embeddings": False, **MIXED}),
    *(pytest.param(kind, more, marks=pytest.mark.slow) for kind, more in (
        ("Qwen2Config", {}), ("Qwen3Config", {"head_dim": 16}), ("Olmo2Config", {}),
        ("MistralConfig", {"sliding_window": 24}), ("Phi3Config", {"initializer_range": 0.15})))))
def test_families_write_in_8_bits_what_they_write_without_a_cache_of_ours(hub, kind, more):
    """Guards against scores, masks or layers of a family that the attention does not follow: the
    seed is one whose texts have no near ties. At 2 bits the text differs, so codes are read."""
    model = small_model(kind, **{"seed": 2, "initializer_range": 0.2, **more})
    prompt = {"inputs": torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))}
    want = greedy(model, prompt, 40)
    for bits in (8, 2):
        options = {"k_bits": bits, "v_bits": bits, "group_size": 8, "residual": 16}
        got = greedy(model, prompt, 40, hub[0].KiviPastKeyValues(model, 100, **options))
        assert torch.equal(want, got) == (bits == 8)


# ---- several tokens at a time, and back again ---------------------------------------------------

@pytest.mark.parametrize("kv, kind", (
    ("kivi2", "lookup"), pytest.param("kivi2+", "lookup", marks=pytest.mark.slow),
    pytest.param("kivi2", "model", marks=pytest.mark.slow)))
def test_drafts_do_not_change_the_text(hub, kv, kind):
    """Guards against drafts that stay in the cache after their rejection, read one another exactly
    where steps would read codes, or go beyond a key block that is complete by then."""
    example, model, tokenizer = hub
    options = {"prompt_lookup_num_tokens": 5}
    if kind == "model":
        options = {"assistant_model": copy.deepcopy(model)}
        with torch.no_grad():
            for weight in options["assistant_model"].parameters():
                weight += 0.05 * weight.std() * torch.randn_like(weight)
    batch, out, taken = inputs(tokenizer, TEXTS[:1]), [], []
    for more in ({}, options):
        cache = example.KiviPastKeyValues(model, 512, kv, **SMALL)
        crop = cache.crop
        cache.crop = lambda n: (taken.append(-n), crop(n))
        out.append(greedy(model, batch, 45, cache, **more))
    assert torch.equal(*out) and len(taken) < 43 and max(taken) > 0


def test_a_prompt_in_chunks(hub):
    """Guards against rows that a chunk leaves empty, padding that is stored, and chunks behind one
    another."""
    example, model, tokenizer = hub
    out = [greedy(model, inputs(tokenizer), 8, example.KiviPastKeyValues(model, 512, **SMALL),
                  **options) for options in ({}, {"prefill_chunk_size": 4})]
    assert torch.equal(*out)


LONG = torch.randint(1, 64, (2, 130), generator=torch.Generator().manual_seed(2))


def test_a_few_tokens_are_read_as_by_so_many_steps(hub):
    """Twenty at once, over the end of a key block of 16. Guards against tokens behind that end that
    read the block's keys exactly."""
    model, out = small_model("LlamaConfig"), []
    for sizes in ((20,), (1,) * 20):
        cache = hub[0].KiviPastKeyValues(model, 512, "kivi2", group_size=16, residual=16)
        logits(model, LONG[:, :41], cache)
        parts = LONG[:, 41:61].split(sizes, 1)
        out.append(torch.cat([logits(model, part, cache) for part in parts], 1))
    torch.testing.assert_close(*out, rtol=1e-5, atol=1e-5)


def test_a_mask_that_changes_in_place(hub):
    """Guards against an answer about a mask that is remembered from the call before."""
    model, out = small_model("LlamaConfig"), []
    for same in (True, False):
        cache = hub[0].KiviPastKeyValues(model, 512, group_size=16)
        logits(model, LONG[:, :30], cache)
        mask = torch.ones(2, 1, 1, 31, dtype=torch.bool)
        logits(model, LONG[:, 30:31], cache, mask)
        cache.crop(-1)
        mask = mask if same else mask.clone()
        mask[..., 7] = False
        out.append(logits(model, LONG[:, 30:31], cache, mask))
    assert torch.equal(*out) and not torch.equal(out[0], logits(model, LONG[:, 31:32], cache))


def test_padding_that_a_chunk_cuts_through(hub):
    """Row 0 begins within the second chunk. Guards against results that stay where its tokens were
    put, to the left of their columns."""
    from transformers import DynamicCache

    model, mask, out = small_model("LlamaConfig"), torch.ones_like(LONG), []
    mask[0, :40] = 0
    for cache, attention in ((hub[0].KiviPastKeyValues(model, 512, group_size=16), "kivi"),
                             (DynamicCache(), "sdpa")):
        model.set_attn_implementation(attention)
        logits(model, LONG[:, :30], cache, mask[:, :30])
        out.append(logits(model, LONG[:, 30:60], cache, mask[:, :60])[:, 10:])
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)


def test_a_long_turn_is_read_as_a_part_of_a_prompt(hub):
    """Guards against new tokens that overwrite what is held before all have read it; columns of a
    padded row that are not the cache's tokens."""
    from transformers import DynamicCache

    model = small_model("LlamaConfig")
    mask = torch.ones_like(LONG)
    mask[0, :9] = 0
    out = []
    for cache, attention in ((hub[0].KiviPastKeyValues(model, 512, **SMALL), "kivi"),
                             (DynamicCache(), "rebuild")):
        model.set_attn_implementation(attention)
        logits(model, LONG[:, :60], cache, mask[:, :60])
        out += [[logits(model, LONG[:, 60:129], cache, mask[:, :129]),
                 logits(model, LONG[:, 129:], cache, mask)]]
    for mine, want in zip(*out):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, back", ((1, 1), (5, 3), (40, 40), (89, 64)))
def test_what_is_taken_back_has_never_been_there(hub, n, back):
    """Guards against tokens that left the window for others which are gone again; positions and
    lengths that stay."""
    model = small_model("LlamaConfig")
    states = []
    for taken_back in (True, False):
        cache = hub[0].KiviPastKeyValues(model, 512, "kivi2+", group_size=16, residual=16)
        logits(model, LONG[:, :41], cache)
        if taken_back:
            logits(model, LONG[:, 41 : 41 + n], cache)
            cache.crop(-back)
        elif n > back:
            logits(model, LONG[:, 41 : 41 + n - back], cache)
        assert cache.get_seq_length() == 41 + n - back
        own = cache.layers[0].cache  # its K and V depend on the tokens alone
        states.append([own.dequantized()])
        for token in LONG[:, :18].split(1, 1):
            logits(model, token, cache)
            states[-1].append(own.dequantized())
    for (k, v), (k_want, v_want) in zip(*states):
        assert torch.equal(k, k_want) and torch.equal(v, v_want)
    with pytest.raises(ValueError, match="2 tokens cannot be taken back .* newest 1 can"):
        cache.crop(-2)


@pytest.mark.slow
def test_compiled_steps_write_the_same_text(hub):
    """Guards against a compiled step that stores other bytes, or loses what it replaced."""
    model, prompt, runs = small_model("LlamaConfig"), {"inputs": LONG[:, :20]}, []
    for compiled in (False, True):
        cache = hub[0].KiviPastKeyValues(model, 512, compiled=compiled, **SMALL)
        out = greedy(model, prompt, 50, cache)
        layer = cache.layers[0]
        held = [x.clone() for x in (*layer.cache.contents().values(), *layer.replaced)]
        cache.crop(-1)
        runs.append((out, greedy(model, {"inputs": out[:, :-1]}, 5, cache), *held))
    assert all(map(torch.equal, *runs))


@pytest.mark.slow
def test_a_compiled_model_uses_the_cache(hub, monkeypatch):
    """Guards against a compiler that looks into the cache."""
    example, model, tokenizer = hub
    batch = inputs(tokenizer, TEXTS[1:2])
    want = greedy(model, batch, 4, example.KiviPastKeyValues(model, 64, **SMALL))
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager"))
    assert torch.equal(want, greedy(model, batch, 4, example.KiviPastKeyValues(model, 64, **SMALL)))


def test_text_in_the_window_is_exact_and_beyond_it_close(hub):
    """Guards against a cache whose plumbing is right and whose numbers are not: exact while all
    tokens lie in the window, then within these nats a token of full precision, as measured."""
    from transformers import DynamicCache

    example, model, tokenizer = hub
    batch = inputs(tokenizer)
    cache = example.KiviPastKeyValues(model, 128)
    assert torch.equal(greedy(model, batch, 30), greedy(model, batch, 30, cache))
    text = (ROOT / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    tokens = inputs(tokenizer, [text]).input_ids[:, : 2 * 320].view(2, 320)
    caches = {"exact": DynamicCache()} | {
        kv: example.KiviPastKeyValues(model, 320, kv) for kv in ("kivi2", "kivi2+", "kivi4")}
    logp = {}
    for kv, cache in caches.items():
        parts = [logits(model, part, cache) for part in tokens.split((192, 64, 64), 1)]
        logp[kv] = torch.cat(parts[1:], 1).log_softmax(-1)
    exact = logp.pop("exact")
    kl = {kv: (exact.exp() * (exact - x)).sum(-1).mean().item() for kv, x in logp.items()}
    for kv, bound in (("kivi2", 0.0212), ("kivi2+", 0.0117), ("kivi4", 0.00064)):
        assert 0 < kl[kv] < bound


def test_a_use_that_would_go_wrong_is_refused(hub):
    """Guards against silent nonsense."""
    example, model, tokenizer = hub
    batch = inputs(tokenizer)

    def new(max_len=512):
        return example.KiviPastKeyValues(model, max_len, **SMALL)

    flipped = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        greedy(model, flipped, 8, new())
    with pytest.raises(ValueError, match="1 tokens cannot be taken back .* newest 0 can"):
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
    ((512, "kivi2+"), {"v_bits": 5}, "v_bits must be one of"),
    ((512,), {"group_size": 24}, "group_size must be a power of two"),
    ((512,), {"residual": 100}, "residual 100 is not a multiple"),
    ((512,), {"sink": -1}, "sink must be 0 or more"),
    ((512,), {"boost": 4}, "boost must be a multiple of 8"),
    ((512,), {"v_group_size": 12}, "v_group_size must be a power of two"),
    ((0,), {}, "sizes of a cache"),
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


# ---- what a mask, a model or a cache says, and another one does not -----------------------------

def named(model, cache):
    """The cache by the name that this transformers gives the argument."""
    return {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": cache}


@torch.no_grad()
def logits(model, tokens, cache, mask=None, **options):
    return model(tokens, attention_mask=mask, **named(model, cache), **options).logits


@pytest.fixture
def llama(hub):
    """(a new model, a function that makes its caches)"""
    model = small_model("LlamaConfig", attention_dropout=0.1)
    return model, lambda: hub[0].KiviPastKeyValues(model, 64, group_size=16)  # all exact


TOKENS = torch.randint(1, 64, (2, 23), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0] * 5 + [1] * 18, [1] * 23])  # whole rows, for prompts of 20 tokens


def hole(mask):
    """A mask that hides the tokens 7 .. 11."""
    return mask.index_fill(-1, torch.arange(7, 12), 0)


ROW = torch.ones(2, 1, 1, 21, dtype=torch.bool)
WINDOW = torch.ones(2, 1, 23, 23, dtype=torch.bool).tril().triu(-8)[:, :, 20:]


@pytest.mark.parametrize("first, then", (
    (PADDED[:, :20], PADDED[:, :21]), (PADDED[:, :20], hole(PADDED[:, :21])),
    (PADDED[:, :20], hole(PADDED)), (None, hole(ROW)), (None, hole(ROW)[:1]), (None, WINDOW)),
    ids=("padded", "hidden", "three tokens", "4d", "4d for all rows", "window"))
def test_a_mask_may_hide_tokens_later(llama, first, then):
    """Guards against a mask that is read for padding only; columns of a padded row that are not the
    cache's tokens; several tokens with the mask of one."""
    from transformers import DynamicCache

    model, new = llama
    n = then.shape[-1]
    out = []
    for cache, implementation in ((new(), "kivi"), (DynamicCache(), "sdpa")):
        model.set_attn_implementation(implementation)
        logits(model, TOKENS[:, :20], cache, first)
        out.append(logits(model, TOKENS[:, 20:n], cache, then))
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first, then, words", (
    (PADDED[:, :20], None, "hide the prompt's padding"),
    (PADDED[:, :20], torch.ones(2, 21), "hide the prompt's padding"),
    (None, torch.tensor([[1] * 20 + [0], [1] * 21]), "show the new tokens"),
    (None, torch.ones(2, 1), "cover all tokens so far"),
    (None, ROW.float() - 1, "must be .* torch.float32"),
    (None, ROW.expand(2, 4, 1, 21), r"must be .*got \[2, 4, 1, 21\]"),
), ids=("padding without a mask", "padding shown", "a new token hidden", "the new token's alone",
        "of numbers", "one a head"))
def test_a_mask_that_the_cache_cannot_follow_is_refused(llama, first, then, words):
    """Guards against a mask that is followed in part."""
    model, new = llama
    cache = new()
    logits(model, TOKENS[:, :20], cache, first)
    with pytest.raises(ValueError, match=words):
        logits(model, TOKENS[:, 20:21], cache, then)


@pytest.mark.parametrize("n", (8, 640))
def test_rows_that_ended_apart_go_on_together(hub, n):
    """Guards against rows that must bring equally many tokens; padding between tokens that is read,
    at once or later; parts of a long turn that lie elsewhere."""
    from transformers import DynamicCache

    model, tokens, out = small_model("LlamaConfig"), LONG.repeat(1, 6)[:, : n + 15], []
    mask = torch.ones_like(tokens)
    mask[0, 14:17] = 0  # a text that ended early, or a turn that begins late
    for cache, implementation in (
            (hub[0].KiviPastKeyValues(model, 700, group_size=16, residual=704), "kivi"),
            (DynamicCache(), "sdpa")):
        model.set_attn_implementation(implementation)
        logits(model, tokens[:, :14], cache, mask[:, :14])
        turn = logits(model, tokens[:, 14:-1], cache, mask[:, :-1])
        out.append(torch.cat([turn[0, 3:], turn[1], *logits(model, tokens[:, -1:], cache, mask)]))
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)


def test_new_tokens_that_see_later_ones_are_refused(llama):
    """Guards against such a mask, as of a picture, that is taken for a causal one."""
    model, new = llama
    cache = new()
    logits(model, TOKENS[:, :20], cache)
    with pytest.raises(ValueError, match="but none to those before it"):
        logits(model, TOKENS[:, 20:], cache, WINDOW | True)


def test_a_gradient_through_codes_is_refused(llama):
    """Guards against one that lacks the share of K and V."""
    model, new = llama
    cache = new()
    logits(model, TOKENS[:, :20], cache)
    out = model(TOKENS[:, 20:], **named(model, cache)).logits
    with pytest.raises(ValueError, match="no gradients: use it under torch.no_grad"):
        out.sum().backward()


def test_rows_change_places_with_their_padding(llama):
    """Guards against beams that keep another beam's columns of the mask."""
    model, new = llama
    straight, swapped = new(), new()
    for cache in (straight, swapped):
        logits(model, TOKENS[:, :20], cache, PADDED[:, :20])
    swapped.reorder_cache(torch.tensor([1, 0]))
    want = logits(model, TOKENS[:, 20:21], straight, PADDED[:, :21])
    got = logits(model, TOKENS[:, 20:21].flip(0), swapped, PADDED[:, :21].flip(0))
    torch.testing.assert_close(got.flip(0), want)


def test_a_cache_made_for_another_object_of_the_model_is_refused(llama):
    """Guards against tokens that attend to themselves alone; so does one in a second model that is
    set to kivi, where the cache is at home too."""
    model, new = llama
    other = copy.deepcopy(model)
    cache = new()
    with pytest.raises(ValueError, match="never reached this cache: .* of the model that uses it"):
        logits(other, TOKENS, cache)
    other.set_attn_implementation("kivi")
    with pytest.raises(ValueError, match="never reached this cache: call its reset"):
        logits(other, TOKENS, cache)
    cache.reset()
    assert torch.equal(logits(other, TOKENS, cache), logits(model, TOKENS, new()))


def test_a_copy_goes_on_by_itself_and_knows_the_models_attention(llama):
    """Guards against copies that share buffers or keep the masks of a prompt; a copy that asks a
    copied config which attention the model has."""
    model, new = llama
    cache = new()
    logits(model, TOKENS[:, :20], cache, PADDED[:, :20])
    twin = copy.deepcopy(cache)
    saved = io.BytesIO()
    torch.save(cache, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    assert not twin.call.says and not loaded.call.says
    for n in (20, 21):
        step = TOKENS[:, n:][:, :1], PADDED[:, : n + 1]
        expected, *others = (logits(model, step[0], x, step[1]) for x in (cache, twin, loaded))
        assert all(torch.equal(expected, other) for other in others)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="never reached this cache"):
        logits(model, TOKENS[:, 22:], twin)


def test_after_an_error_the_cache_must_be_reset(llama):
    """Guards against layers that hold different numbers of tokens."""
    model, new = llama
    cache, weight = new(), model.model.layers[1].self_attn.v_proj.weight.data
    want = logits(model, TOKENS, cache)
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="v holds NaN"):
        logits(model, TOKENS[:, :1], cache)
    weight.copy_(kept)
    with pytest.raises(ValueError, match="call its reset"):
        logits(model, TOKENS[:, :1], cache)
    cache.reset()
    assert torch.equal(logits(model, TOKENS, cache), want)


def test_what_the_attention_would_leave_out_is_refused(llama):
    """Guards against weights, dropout, gradients or a flag that get lost on the way; a cache of
    another dtype or batch than the model's."""
    model, new = llama
    for options in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ValueError, match=f"LlamaAttention uses {next(iter(options))}"):
            logits(model, TOKENS, new(), **options)
    for options in ({"output_attentions": True}, {"use_cache": False}):
        with pytest.raises(ValueError, match=next(iter(options))):
            logits(model, TOKENS, new(), **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            greedy(model, {"inputs": TOKENS}, 3, new(), **options)
    cache = new()
    logits(model, TOKENS[:, :20], cache)
    with pytest.raises(ValueError, match=r"k must be \[2, .*got \[3, "):
        logits(model, TOKENS[[0, 1, 1], :1], cache)
    cache.reset()
    logits(model, TOKENS[:, :20], cache)
    with pytest.raises(ValueError, match=r"k must be \[2, .*got \[3, "):
        logits(model, TOKENS[[0, 1, 1], :1], cache, hole(torch.ones(3, 21)))
    cache.reset()
    logits(model, TOKENS[:, :20], cache)
    with pytest.raises(ValueError, match="k must be .*float32 .*got .*bfloat16"):
        logits(model.bfloat16(), TOKENS[:, :1], cache)
    model.float().train()
    with pytest.raises(ValueError, match="call model.eval"):
        logits(model, TOKENS, new())  # dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    logits(model, TOKENS, new())
    with pytest.raises(ValueError, match="call model.eval"):
        model(TOKENS, **named(model, new()))  # gradients


@pytest.mark.parametrize("kind, more, words", (
    ("BloomConfig", {}, "attention of BloomForCausalLM cannot be replaced"),
    ("DeepseekV3Config", {"kv_lora_rank": 16}, "has kv_lora_rank"),
    ("BartConfig", {}, "has is_encoder_decoder"),
    ("Lfm2Config", {"layer_types": ["conv"]}, "has layers of conv, which"),
))
def test_a_model_that_does_not_use_this_attention_is_refused(hub, kind, more, words):
    """Guards against a model that keeps something else in its cache, or reads it elsewhere."""
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, kind)(num_hidden_layers=1, **more)
        auto = transformers.AutoModelForSeq2SeqLM if kind == "BartConfig" else (
            transformers.AutoModelForCausalLM)
        model = auto.from_config(config)
    with pytest.raises(ValueError, match=words):
        hub[0].KiviPastKeyValues(model, 64, group_size=8)
