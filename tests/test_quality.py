"""What reading through a quantized cache costs the embedded model, pinned from both sides; and the
simulated caches of the study against real ones.
"""
from random import Random

import pytest
import torch
from reference import decode_logits, heldout, some_ids
from reference_cache import rel

import quantize
from generate import generate
from kivi import KiviCache, KVConfig
from study.prompts import ROOM, TASKS, make_case
from study.quality import decoded, greedy_metrics, prefilled
from study.variants import Fake

# Recorded with torch 2.13: perplexity over that of full precision, mean KL to it, and the loss of a
# pass key in nats (0.002 in full precision).
GATE = {
    "kivi2": (0.9966, 0.02947, 0.0027),
    "kivi2+": (0.9982, 0.01432, 0.0021),
    "kivi2-": (1.0075, 0.01786, 0.0020),
    "kivi4": (1.0011, 0.00099, 0.0023),
}


def pass_keys(tokenizer, ids):
    """4 prompts [4, 700] that hide a number in a story, ask for it, and end with the answer."""
    def encoded(text):
        return tokenizer.encode("\n\n" + text, add_special_tokens=False).ids[1:]

    prompts = []
    hidden = ((48213, 20), (70941, 150), (35862, 300), (91507, 450))  # number, place
    for i, (key, place) in enumerate(hidden):
        fact = encoded(f"The pass key is {key}. Remember it. {key} is the pass key.")
        question = encoded(f"What is the pass key? The pass key is {key}.")
        story = ids[i * 650 + 1 :][: 700 - len(fact + question)]
        prompts.append(ids[:1] + story[:place] + fact + story[place:] + question)
    return torch.tensor(prompts)


class Gate:
    """Measures what stands in GATE.

    4 rows of 150 tokens, teacher-forced after 256 of exact prefill, then the pass keys. Full
    precision is the plain forward pass, which has no cache.
    """

    def __init__(self, model, tokenizer):
        self.model = model
        ids = heldout(tokenizer, 2800)
        self.rows = torch.tensor([ids[:1] + ids[i * 406 + 1 : i * 406 + 406] for i in range(4)])
        self.base = model(self.rows)[:, 255:-1].log_softmax(-1)
        self.prompts = pass_keys(tokenizer, ids)

    def logp(self, tokens, n_prompt, kv):
        """Log-probabilities [B, T - n_prompt, V] of what follows the prompt."""
        self.model.setup_caches(*tokens.shape, kv)
        return decode_logits(self.model, tokens[:, :-1], n_prompt).log_softmax(-1)

    def text(self, kv):
        """(perplexity over that of full precision, mean KL to it)"""
        ours, target = self.logp(self.rows, 256, kv), self.rows[:, 256:, None]
        loss = self.base.gather(-1, target).mean() - ours.gather(-1, target).mean()
        kl = (self.base.exp() * (self.base - ours)).sum(-1).mean()
        return loss.exp().item(), kl.item()

    def answer(self, kv):
        """The loss of a pass key and the period after it, in nats."""
        n = self.prompts.shape[1] - 6
        logp = self.logp(self.prompts, n, kv)
        return -logp.gather(-1, self.prompts[:, n:, None]).sum(1).mean().item()


@pytest.fixture(scope="module")
def gate(embedded):
    return Gate(*embedded)


def check_gate(gate, kv):
    """Bounds on both sides: a cache better than recorded does not quantize what it should.
    Elsewhere a tie may be rounded otherwise."""
    recorded_ratio, recorded_kl, recorded_answer = GATE[kv]
    ratio, kl = gate.text(kv)
    assert ratio == pytest.approx(recorded_ratio, abs=0.004)
    assert kl == pytest.approx(recorded_kl, rel=0.1)
    assert gate.answer(kv) < 2 * recorded_answer


@pytest.mark.parametrize("kv", (
    "kivi2+", *(pytest.param(kv, marks=pytest.mark.slow) for kv in ("kivi2", "kivi2-", "kivi4"))))
def test_quality_through_the_cache_is_pinned(gate, kv):
    """Guards against a quantizer that is worse than it should be, and against one that does
    nothing. kivi2+ has half the KL of kivi2."""
    check_gate(gate, kv)


# ---- bugs that the gate must notice -------------------------------------------------------------

def rounded(x, dim):
    """x, quantized to 2 bits in groups along `dim` and back."""
    codes, scale, zero = quantize.group_codes(x, 2, dim)
    return codes * scale + zero


def v_per_channel(mp):
    """Values get the ranges of 32 tokens of their channel, in prefill and one by one. They are
    stored with 8 bits, so that nothing else happens to them."""
    fill, quantize_value = KiviCache.fill, KiviCache.quantize_value

    def broken_fill(self, k, v, start, ends, row=0):
        n = v.shape[2] // 32 * 32
        groups = rounded(v[:, :, :n].unflatten(2, (-1, 32)), 3).flatten(2, 3)
        fill(self, k, torch.cat([groups, v[:, :, n:]], 2), start, ends, row)
        packed = [self.v_packed.clone(), self.v_scale.clone(), self.v_zero.clone()]
        fill(self, k, v, start, ends, row)  # the window stays exact
        for buffer, x in zip((self.v_packed, self.v_scale, self.v_zero), packed):
            buffer.copy_(x)

    def broken_quantize_value(self, pos):
        row = torch.arange(self.batch)
        oldest = (pos[:, 0] - self.config.residual).clamp(min=0)
        t = oldest[:, None] + torch.arange(32)  # its range is that of the 32 oldest there
        exact = self.v_window.clone()
        values = self.v_window[row[:, None], :, self.slot(t)]  # [B, 32, Hk, D]
        self.v_window[row, :, self.slot(oldest)] = rounded(values, 1)[:, 0]
        quantize_value(self, pos)
        self.v_window.copy_(exact)

    mp.setitem(quantize.PRESETS, "kivi2", KVConfig(2, 8))
    mp.setattr(KiviCache, "fill", broken_fill)
    mp.setattr(KiviCache, "quantize_value", broken_quantize_value)


def no_residual(mp):
    """Only the tokens of an incomplete group stay exact."""
    mp.setitem(quantize.PRESETS, "kivi2", KVConfig(2, 2, residual=32))


def one_layer_without_flush(mp):
    """The last layer never quantizes its keys."""
    calls = []
    quantize_keys = KiviCache.quantize_keys

    def broken(self, pos):
        calls.append(self)
        if len(calls) % 8:
            quantize_keys(self, pos)

    mp.setattr(KiviCache, "quantize_keys", broken)


@pytest.mark.parametrize("bug", (
    pytest.param(v_per_channel, marks=pytest.mark.slow),
    pytest.param(no_residual, marks=pytest.mark.slow),
    pytest.param(one_layer_without_flush, marks=pytest.mark.slow),
), ids=lambda bug: bug.__name__)
def test_the_gate_notices(bug, gate, monkeypatch):
    """The bounds above must fail under each of these bugs."""
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_gate(gate, "kivi2")


# ---- simulated caches ---------------------------------------------------------------------------

@pytest.mark.parametrize("options", (
    {},
    {"residual": 32, "k_bits": 4},
    {"residual": 64, "sink": 5, "v_bits": 4},
    {"residual": 32, "sink": 40, "boost": 0.25, "v_group_size": 16},
    {"residual": 64, "sink": 4, "boost": 16, "k_bits": 4, "group_size": 16},
), ids=str)
def test_a_simulated_cache_equals_the_real_one(model, options):
    """170 steps, one by one through the cache and all at once in the simulation that the
    benchmark's variants rest on. Guards against a mask that is one token off, and against sinks
    inside a range."""
    tokens = torch.tensor([some_ids(230), some_ids(230, seed=1)])
    prompt = prefilled(model, tokens[:, :60])
    real = decoded(model, {"kv": "kivi2"} | options, prompt, tokens[:, 60:])
    assert real.shape[:2] == (2, 171)
    assert rel(decoded(model, Fake(**options), prompt, tokens[:, 60:]), real) < 1e-5
    other = Fake(**options | {"residual": 96})
    assert rel(decoded(model, other, prompt, tokens[:, 60:]), real) > 1e-4


# ---- prompts that ask, and choices of tokens ----------------------------------------------------

def as_chat(messages):
    """A chat template."""
    return f"<user>{messages[0]['content']}</user>\n"


@pytest.mark.parametrize("render", (None, as_chat), ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_what_it_asks_for(task, render, embedded):
    """Guards against prompts that nobody could answer, or whose prefill holds the answer already;
    and against a question that is not decoded where it should be."""
    tokenizer = embedded[1]
    story = "\n\n".join(f"This is paragraph {i} of a story." for i in range(90))
    prompts = []
    for is_decoded in (False, True):
        arguments = tokenizer, render, story, task, 400, 0.5, Random(0), is_decoded
        case = make_case(*arguments)
        text = tokenizer.decode(case.prompt + case.rest)
        facts, question, opening, answer = TASKS[task](Random(0))
        between = "</user>\n" if render else " "
        assert text.endswith(f"\n\n{question}{between}{opening}{answer}")
        assert text.startswith("<user>") == (render is not None)
        assert tokenizer.decode(case.rest[-case.answer :]).strip() == answer.strip()
        assert len(case.prompt) == 400 - ROOM
        places = [text.index(f"\n\n{fact}\n\n") / len(text) for fact in facts]
        assert not facts or 0.3 < places[0] < 0.7
        assert facts or text.count(" + ") > 10
        prompts.append(tokenizer.decode(case.prompt))
        assert (question in prompts[-1]) != is_decoded
        assert is_decoded or len(case.rest) == case.answer + 1
    with pytest.raises(ValueError, match="larger --lengths"):
        make_case(tokenizer, render, story, task, ROOM, 0.5, Random(0), True)


@pytest.mark.slow
def test_tokens_alike_are_those_that_a_cache_writes_by_itself(embedded):
    """Guards against a divergence that is off by one token."""
    model, tokenizer = embedded
    prompt = torch.tensor([heldout(tokenizer, 200)])
    full, packed = (generate(model, prompt, 30, kv=kv, stop=())[:, 200:]
                    for kv in ("bf16", "kivi2"))
    logp = decoded(model, {"kv": "kivi2"}, prefilled(model, prompt), full[:, :-1])
    metrics = greedy_metrics(logp, full)
    n = 1 + int(metrics["greedy_alike"])
    assert n < 30 and torch.equal(full[:, :n], packed[:, :n]) and full[0, n] != packed[0, n]
    assert n - 1 <= 29 * metrics["greedy_top1"] <= 28
