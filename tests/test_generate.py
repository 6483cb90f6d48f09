"""Generation: sampling, greedy texts against references, and many rows at once."""
import json
import os
import statistics
from pathlib import Path

import pytest
import torch
from calling import run
from hypothesis import HealthCheck, given, settings, strategies as st
from make_golden import GREEDY, LENGTH, VARIANTS, tokens, write_checkpoint
from reference import ROOT, SMALL, decode_step, heldout, ref_llama, some_ids
from reference_cache import rel
from safetensors.torch import load_file

import generate
from kivi import KiviCache
from model import Transformer

CLOSE = 1e-5  # relative: what rounding in float32 makes of logits in another batch
FLIPPED = 1e-2  # and where it puts a number at the border of two codes into the other one


GOLDEN_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\nLily")


# ---- one prompt ---------------------------------------------------------------------------------

def test_greedy_generation_is_the_argmax_of_the_reference(checkpoint, model):
    """The program against `ref_llama`, exact and quantized. Guards against a token fed twice, a
    prompt cut short, logits of the wrong position: each new token must be (nearly) the reference's
    best one over the text so far."""
    ids = some_ids(40)
    quantized = {"group_size": 16, "residual": 32}
    for options, reference in (({"kv": "bf16"}, None), (SMALL, quantized)):
        out = generate.generate(model, torch.tensor([ids]), 80, stop=(), **options)[0].tolist()
        assert out[:40] == ids and len(out) == 120
        logits = ref_llama(checkpoint, out[:-1], 40, reference)[39:]
        behind = logits.amax(1) - logits[torch.arange(80), torch.tensor(out[40:])]
        assert behind.max() <= 0.05 and (behind == 0).float().mean() > 0.95


def test_a_second_run_gives_the_same_text(model):
    """Guards against state that survives: a cache that is not emptied, a host counter that goes
    on."""
    a, b = torch.tensor([some_ids(40)]), torch.tensor([some_ids(33, seed=1)])
    first = generate.generate(model, a, 60, stop=(), **SMALL)
    generate.generate(model, b, 70, stop=(), **SMALL)
    assert torch.equal(generate.generate(model, a, 60, stop=(), **SMALL), first)
    model.setup_caches(1, 200, **SMALL)
    generate.generate(model, b, 70, stop=())
    again = generate.generate(model, a, 60, stop=())
    assert torch.equal(again, first), "the caches of setup_caches were not emptied"


def test_a_row_ends_at_its_stop_token(model):
    """Guards against generating past the end, and against one row's end ending all."""
    prompts = [some_ids(20, seed=0), some_ids(20, seed=1)]
    free = generate.generate(model, prompts, 40, stop=(), **SMALL)
    stop = free[0][30]  # some token that occurs in the first row
    assert stop not in free[1][20:], "choose another seed"
    stopped = generate.generate(model, prompts, 40, stop=(stop,), **SMALL)
    end = free[0].index(stop, 20)
    assert stopped[0] == free[0][: end + 1] and stopped[1] == free[1]
    seen = []
    one = generate.generate(model, torch.tensor([prompts[0]]), 40, stop=(stop,),
                            on_token=seen.append, **SMALL)
    assert one[0].tolist() == stopped[0]
    assert [token for row in seen for token in row] == stopped[0][20:]


def test_every_eos_of_the_generation_config_ends_the_text(tmp_path, golden):
    """Guards against the first one only, and against the one of config.json."""
    greedy = golden["phi3/greedy"].tolist()
    prompt = tokens(LENGTH)[:, : LENGTH - GREEDY]
    for eos, n in (([7, greedy[3], greedy[1]], 2), (greedy[2], 3), ([greedy[4], 7], 5)):
        folder = write_checkpoint(tmp_path, VARIANTS["phi3"] | {"eos_token_id": greedy[0]})
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        net = Transformer.from_pretrained(folder)
        out = generate.generate(net, prompt, GREEDY, kv="bf16")
        assert out[0, LENGTH - GREEDY :].tolist() == greedy[:n]


@pytest.mark.parametrize("prompts, n", (([[]], 5), ([[1]], 0), ([[1] * 500], 20)),
                         ids=("empty prompt", "no tokens", "context"))
def test_generate_refuses_impossible_requests(model, prompts, n):
    """Guards against an endless loop, an index error, and text beyond the model's context."""
    with pytest.raises(ValueError):
        generate.generate(model, prompts, n)


# ---- sampling -----------------------------------------------------------------------------------

def test_sampling_follows_its_distribution():
    """Guards against a temperature on the wrong side of the division, top-k off by one, top-p that
    drops the first token."""
    torch.manual_seed(0)
    n = 20000
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -30.0])

    def shares(**options):
        drawn = generate.sample(logits.expand(n, 5), **options)
        return torch.bincount(drawn, minlength=5) / n

    assert torch.allclose(shares(temperature=0.7), torch.softmax(logits / 0.7, 0), atol=0.015)
    top2 = torch.cat([torch.softmax(logits[:2], 0), torch.zeros(3)])
    assert torch.allclose(shares(temperature=1.0, top_k=2), top2, atol=0.015)
    p = torch.softmax(logits, 0)
    assert p[0] < 0.8 < p[:2].sum()
    assert torch.allclose(shares(temperature=1.0, top_p=0.8), top2, atol=0.015)
    assert shares(temperature=1.0, top_p=0.01)[0] == 1
    assert shares(temperature=1.0, top_k=1)[0] == 1
    assert shares(temperature=0)[0] == 1
    logits = logits.flip(0)  # the most likely is not the first
    assert shares(temperature=1.0, top_p=0.0)[4] == shares(temperature=1e-40)[4] == 1


def test_sampling_is_repeatable(model):
    """Guards against a seed that is not used, and a temperature that is ignored."""
    def sampled(seed):
        torch.manual_seed(seed)
        return generate.generate(model, torch.tensor([some_ids(10)]), 30, 1.0, stop=(), **SMALL)

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))


# ---- trained checkpoints ------------------------------------------------------------------------

def check_golden(folder):
    """The logits and greedy tokens that transformers computed for this checkpoint."""
    golden = load_file(folder / "golden.safetensors")
    net, _ = generate.load(folder)
    net(golden["input_ids"])  # a throw-away forward: see the checkpoint's README
    logits = net(golden["input_ids"])
    if "positions" in golden:  # a large vocabulary: some positions only
        logits = logits[:, golden["positions"]]
    assert (logits - golden["logits"]).abs().max() <= 1e-4
    n = golden["greedy_ids"].shape[1]
    exact = 129 - golden["input_ids"].shape[1]  # kivi2 quantizes nothing before the 129th token
    group_size = min(32, net.config.head_dim)
    for options, same in (({"kv": "bf16"}, n), ({"kv": "kivi2", "group_size": group_size}, exact)):
        out = generate.generate(net, golden["input_ids"], n, stop=(), **options)
        assert torch.equal(out[:, -n:][:, :same], golden["greedy_ids"][:, :same])


@pytest.mark.skipif("KIVI_CHECKPOINTS" not in os.environ,
                    reason="KIVI_CHECKPOINTS names no folder with the stories260K checkpoints")
@pytest.mark.parametrize("name, group_size", (("stories260K", 8), ("stories260K_hd64", 32)))
def test_golden_logits_and_text_of_a_trained_checkpoint(name, group_size):
    """transformers' own numbers. Guards against everything that the references here and the program
    could have wrong together."""
    folder = Path(os.environ["KIVI_CHECKPOINTS"]) / name
    check_golden(folder)
    for options in (("--kv", "bf16"), ("--kv", "kivi2", "--group-size", group_size)):
        code, out, err = run("--checkpoint", folder, "--prompt", "Once upon a time", "--json",
                             "--temperature", 0, "--max-new-tokens", 60, *options)
        assert code == 0, err
        text, line = out.rsplit("\n", 2)[:2]
        result = json.loads(line)
        assert text == "Once upon a time" + result["text"] == GOLDEN_TEXT
        assert result["prompt_tokens"] == 5 and result["new_tokens"] == 60


def test_golden_logits_of_the_embedded_checkpoint():
    """Guards against a checkpoint file that was replaced without its numbers, or read
    differently."""
    check_golden(ROOT / "tiny")


def test_greedy_text_from_a_2_bit_cache_is_pinned(embedded):
    """Every lead of a pinned token over the second is above 0.02. Guards against a silent change of
    the numbers attention reads: most of the 170 prompt tokens are quantized here."""
    model, tokenizer = embedded
    text = (ROOT / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[:600]).ids
    out = generate.generate(model, [ids], 16, 0.0, kv="kivi2", residual=32)[0][len(ids) :]
    expected = "to the house, and thought I would go to sleep.\n\nI was not"
    assert tokenizer.decode(out) == expected
    full = generate.generate(model, [ids], 2, 0.0, kv="bf16")[0][len(ids) :]
    assert tokenizer.decode(full) == "to the"


# ---- many rows ----------------------------------------------------------------------------------

@pytest.mark.parametrize("options", ({"kv": "bf16"}, SMALL, SMALL | {"kv": "kivi2+"}),
                         ids=("bf16", "kivi2", "kivi2+"))
def test_ragged_prompts_give_what_each_gives_alone(model, options):
    """Guards against left padding, one length for all rows, a row that stops the others or reads
    their tokens."""
    prompts = [some_ids(n, seed=n) for n in (1, 31, 32, 50)]
    together = generate.generate(model, prompts, 50, stop=(), **options)
    for prompt, row in zip(prompts, together):
        assert row == generate.generate(model, [prompt], 50, stop=(), **options)[0]


@pytest.mark.slow
def test_rows_of_a_batch_equal_the_same_prompts_alone(embedded):
    """Unequal prompts, so that flushes fall on different steps. Guards against one position or one
    schedule for the whole batch."""
    model, tokenizer = embedded
    ids = heldout(tokenizer, 400)
    prompts = [ids[:40], ids[:1] + ids[100:233], ids[:1] + ids[300:360]]
    options = {"kv": "kivi2", "residual": 32, "stop": ()}
    together = generate.generate(model, prompts, 40, 0.0, **options)
    for prompt, row in zip(prompts, together):
        assert generate.generate(model, [prompt], 40, 0.0, **options)[0] == row


def forced(model, rows, lengths, options):
    """Teacher-forced run of ragged rows: a prefill of lengths[b] tokens, then the others one by
    one, as many for every row.

    returns  logits [steps + 1, B, V], and the buffers of every layer's cache by name
    """
    model.setup_caches(len(rows), 160, **options)
    longest = max(lengths)
    padded = [row[:n] + [5] * (longest - n) for row, n in zip(rows, lengths)]
    logits = [model.prefill(torch.tensor(padded), lengths)]
    for step in range(len(rows[0]) - lengths[0]):
        newest = [[row[n + step]] for row, n in zip(rows, lengths)]
        logits.append(decode_step(model, torch.tensor(newest)))
    return torch.stack(logits), [dict(layer.cache.named_buffers()) for layer in model.layers]


def check_logits(together, rows):
    """Every row of a batch [steps, B, V] against a run of its own or beside others [steps, V]: to
    rounding, but for a few codes that it flips."""
    distances = [rel(together[:, b], row) for b, row in enumerate(rows)]
    assert statistics.median_low(distances) <= CLOSE and max(distances) <= FLIPPED, distances


def check_bytes(caches, others, b, row=0):
    """Row b of some caches and a row of others: every buffer bit for bit."""
    for mine, other in zip(caches, others):
        for name in mine:
            if name not in ("index", "rows"):
                assert torch.equal(mine[name][b], other[name][row]), name


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=4, database=None,
          suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 70), min_size=2, max_size=5),
       st.sampled_from(("bf16", "kivi2", "k4v2", "kivi2+")), st.integers(0, 99))
def test_every_row_equals_the_same_prompt_alone(checkpoint, lengths, kind, seed):
    """Logits to rounding, and bit for bit the cache of the first layer, whose K and V are the same
    numbers in both runs; rows whose flushes fall on different steps. The library's matrix products
    are replaced by one product a row, because on a CPU the last bits of a row depend on the number
    of rows there (one row takes another algorithm). Guards against any step that mixes rows or
    follows another row's length."""
    model = Transformer.from_pretrained(checkpoint)
    options = {"kv": "bf16"} if kind == "bf16" else SMALL | {"kv": kind}
    rows = [some_ids(n + 40, seed + n) for n in lengths]
    linear = torch.nn.functional.linear

    def one_row_at_a_time(x, w, bias=None):
        flat = x.reshape(-1, x.shape[-1])
        return torch.cat([linear(row[None], w, bias) for row in flat]).view(*x.shape[:-1], -1)

    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(torch.nn.functional, "linear", one_row_at_a_time)
        together, caches = forced(model, rows, lengths, options)
        alone = [forced(model, [row], [n], options) for row, n in zip(rows, lengths)]
    check_logits(together, [logits[:, 0] for logits, _ in alone])
    for b, (_, own) in enumerate(alone):
        check_bytes(caches[:1], own[:1], b)


@pytest.mark.parametrize("options", ({"kv": "bf16"}, SMALL), ids=("bf16", "kivi2"))
def test_rows_beside_dummies_and_alone_with_the_library(model, options):
    """The same without any replacement. Beside other rows of the same number the first layer's
    cache is the same bit for bit, whatever they hold; alone, prefill is the same in all layers, and
    decoding to the rounding of the products. Guards against padding or neighbours that leak in."""
    lengths = [33, 1, 64, 50]
    rows = [some_ids(n + 40, n) for n in lengths]
    prompts = [row[:n] for row, n in zip(rows, lengths)]
    together, caches = forced(model, rows, lengths, options)
    _, prefilled = forced(model, prompts, lengths, options)
    beside, alone = [], []
    for b, n in enumerate(lengths):
        others = [rows[b] if i == b else some_ids(7 + 40, 9) for i in range(4)]
        logits, own = forced(model, others, [n if i == b else 7 for i in range(4)], options)
        beside.append(logits[:, b])
        check_bytes(caches[:1], own[:1], b, row=b)
        logits, own = forced(model, [rows[b]], [n], options)
        alone.append(logits[:, 0])
        assert torch.equal(together[0, b], logits[0, 0])
        logits, own = forced(model, [prompts[b]], [n], options)
        check_bytes(prefilled, own, b)
    check_logits(together, beside)
    check_logits(together, alone)


def test_keys_are_quantized_on_the_steps_that_complete_a_block(model, monkeypatch):
    """Guards against a flush on steps where no row is due, and against one that is left out."""
    steps = []
    monkeypatch.setattr(model, "flush", lambda: steps.append(list(model.cache.lengths)))
    generate.generate(model, [some_ids(n) for n in (3, 10, 20)], 60, stop=(), **SMALL)
    due = [n for n in range(4, 63) if any((n + more) % 32 == 0 for more in (0, 7, 17))]
    assert [n for n, *_ in steps] == due


def test_a_flush_writes_only_the_blocks_of_rows_that_are_due(monkeypatch):
    """Guards against a flush that touches other rows or blocks, and against one where no row is
    due."""
    k, v = (torch.randn(3, 2, 66, 32, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    cache = KiviCache(3, 2, 512, 32, residual=32)
    cache.prefill(k[:, :, :63], v[:, :, :63], [63, 20, 31])
    quantize_keys = cache.quantize_keys
    before = []

    def spied(pos):
        before.append({name: buffer.clone() for name, buffer in cache.named_buffers()})
        quantize_keys(pos)

    monkeypatch.setattr(cache, "quantize_keys", spied)
    cache.append(k[:, :, 63, None], v[:, :, 63, None])
    changed = set()
    for name, old in before[0].items():
        if name not in ("index", "pos"):
            places = (old != getattr(cache, name)).nonzero()[:, [0, 2]].tolist()
            changed |= {(name, *place) for place in places}
    assert {(row, group) for name, row, group in changed if name == "k_zero"} == {(0, 1), (2, 0)}
    assert all(name.startswith("k_") and row in (0, 2) for name, row, _ in changed)
    cache.append(k[:, :, 64, None], v[:, :, 64, None])
    assert len(before) == 1


def test_rows_with_limits_of_their_own_never_pass_the_capacity(model):
    """A long prompt with a short answer beside a short one with a long answer, in a cache that
    holds either but not their sum, and rows that only fill the batch. Guards against a finished row
    that goes on, and against one that ends the others."""
    prompts = [some_ids(n, n) for n in (120, 5, 40)]
    limits = [3, 110, 1]
    seen = {}
    out = generate.generate(model, [*prompts, [0]], [*limits, 0], stop=(), on_row=seen.setdefault,
                            **SMALL)
    assert model.cache.max_len == 123 and out[3] == [0]
    for b, prompt in enumerate(prompts):
        assert out[b] == generate.generate(model, [prompt], limits[b], stop=(), **SMALL)[0]
        assert seen[b] == out[b][len(prompt) :]
    assert set(seen) == {0, 1, 2}
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate.generate(model, prompts, [1, 2], **SMALL)
