"""Caches that live on: conversations, caches in files, a shared prefix, stop texts, drafts."""
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from calling import ROOT, check_error, result_of, run, type_lines
from reference import byte_tokenizer, changed, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
from checkpoint.text import TextStream
from program.chat import Past

GREEDY = ("--temperature", 0)
PACKED = ("--group-size", 16, "--residual", 32)
AGAIN = "reading all of it again"
LINES = "Once upon a time", "The old woman said", "and then the boy"
DOCUMENT = "The sea was grey and the old man went down to the shore with his two dogs.\n"
# A state does not fit a cache of another capacity where both are no whole residuals.


def turns(monkeypatch, lines, *args):
    """(the JSON objects of a conversation's answers, stderr)"""
    type_lines(monkeypatch, *lines)
    code, out, err = run("--interactive", "--json", *GREEDY, *args)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"text"')], err


def text_so_far(lines, answers):
    """What a conversation without a template reads before its last answer."""
    said = [line + answer["text"] + "\n" for line, answer in zip(lines, answers)]
    return "".join(said[: len(lines) - 1]) + lines[-1]


# ---- conversations ------------------------------------------------------------------------------

@pytest.mark.parametrize("kv", ("kivi2", "bf16"))
def test_later_turns_read_only_their_own_tokens(kv, monkeypatch):
    """Up to the 128 exact tokens of kivi2 the text is that of a run from scratch, too. Guards
    against turns that read everything, tokens that are read twice or left out, other caches."""
    same = ("--kv", kv, "--max-new-tokens", 12)
    answers, err = turns(monkeypatch, LINES, *same)
    assert len(answers) == 3 and AGAIN not in err
    for before, answer in zip(answers, answers[1:]):
        held = before["prompt_tokens"] + before["new_tokens"] - 1  # the newest was not read yet
        assert answer["prefill_tokens"] == answer["prompt_tokens"] - held < 10
        assert answer["kv_bytes"] == before["kv_bytes"]
        assert f"{answer['prompt_tokens']} prompt tokens, {answer['prefill_tokens']} of" in err
    alone = result_of(*GREEDY, *same, "--prompt", text_so_far(LINES, answers))
    for name in ("text", "prompt_tokens", "new_tokens"):
        assert alone[name] == answers[2][name]
    assert alone["prefill_tokens"] == alone["prompt_tokens"]


def test_tokens_that_the_tokenizer_would_not_choose_stay(monkeypatch, embedded):
    """At a high temperature a model spells its words in other tokens. Guards against a
    conversation that is read again after each of them, and against a text that changes."""
    tokenizer = embedded[1]
    lines = ("Once", "The sea")
    answers, err = turns(monkeypatch, lines, "--kv", "bf16", "--max-new-tokens", 25,
                         "--temperature", 2.5, "--seed", 5)
    assert AGAIN not in err and all(answer["prefill_tokens"] < 10 for answer in answers)
    said = text_so_far(lines, answers)
    assert len(tokenizer.encode(said).ids) < answers[-1]["prompt_tokens"]
    text = "Once upon a time\nand"
    letters = tokenizer.encode("Once").ids[:1] + [tokenizer.token_to_id(c) for c in "▁Once"]
    ids = tokenizer.encode(text).ids
    past = Past(SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(tokens=letters, states=[]))
    respelled = past.respelled(ids)
    assert respelled[: len(letters)] == letters and tokenizer.decode(respelled) == text
    other = tokenizer.encode("Twice upon a time").ids
    assert past.respelled(other) == other


def test_a_template_that_rewrites_the_past_starts_again(tmp_path, monkeypatch):
    """Exact: 128 tokens. Guards against a packed cache that goes on from another text, silence
    about it, and against exact caches that keep nothing of the common beginning."""
    folder = make_checkpoint(tmp_path)
    template = "The system: {{ messages|length }}.{{ messages[-1].content }}:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    same = ("--checkpoint", folder, "--chat", "--max-new-tokens", 9, "--kv")
    packed, err = turns(monkeypatch, "abc", *same, "kivi2")
    assert err.count(AGAIN) == 2
    assert [a["prefill_tokens"] for a in packed] == [a["prompt_tokens"] for a in packed]
    exact, err = turns(monkeypatch, "abc", *same, "bf16")
    common = len("The system: ")
    assert AGAIN not in err and [a["text"] for a in exact] == [a["text"] for a in packed]
    assert [a["prompt_tokens"] - a["prefill_tokens"] for a in exact] == [0, common, common]


@pytest.mark.parametrize("unit", (64, 1))
def test_a_conversation_moves_into_larger_caches(unit, checkpoint, monkeypatch):
    """Guards against a growth that loses tokens or lets all of them be read again."""
    same = ("--checkpoint", checkpoint, "--max-new-tokens", 30, *PACKED)
    lines = 3 * LINES[0][:15], 40 * "x"  # 75 tokens are held after the first answer
    roomy, _ = turns(monkeypatch, lines, *same)
    monkeypatch.setattr("program.chat.rounded_capacity", lambda model, n, _: -(-n // unit) * unit)
    tight, err = turns(monkeypatch, lines, *same)
    sizes = [answer["kv_bytes"] for answer in tight]
    assert sizes[0] < sizes[1] < roomy[0]["kv_bytes"] and AGAIN not in err
    for name in ("text", "prefill_tokens"):
        assert [a[name] for a in tight] == [a[name] for a in roomy]


def test_an_interrupted_answer_is_read_again(monkeypatch):
    """Guards against going on from caches whose contents nobody knows."""
    step, count = generate.Decoder.__call__, 0

    def interrupted(self):
        nonlocal count
        step(self)
        count += 1
        if count == 10:  # after the step, before its token is counted
            raise KeyboardInterrupt

    monkeypatch.setattr(generate.Decoder, "__call__", interrupted)
    answers, err = turns(monkeypatch, LINES, "--max-new-tokens", 8)
    assert len(answers) == 2 and "interrupted" in err
    assert answers[1]["prefill_tokens"] == answers[1]["prompt_tokens"]
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"] + 8


def test_a_system_message_stands_in_front_and_is_never_forgotten(tmp_path, monkeypatch):
    """Guards against a message that only the first turn has, or that is forgotten as a turn."""
    folder = make_checkpoint(tmp_path)
    template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    rendered = []
    encode = generate.load(folder)[1].encode
    monkeypatch.setattr("program.chat.encode", lambda tokenizer, messages, render:
                        rendered.append(render(messages)) or encode(rendered[-1]).ids)
    _, err = turns(monkeypatch, ("A" * 200, "B" * 200, "C" * 200), "--checkpoint", folder,
                   "--chat", "--system", "Rules", "--max-new-tokens", 9)
    assert "forgetting" in err and rendered[-1].endswith("u" + "C" * 200)
    assert "A" not in rendered[-1] and all(text.startswith("sRulesu") for text in rendered)
    alone = result_of("--checkpoint", folder, "--chat", "--system", "Rules", "--prompt", "A",
                      "--max-new-tokens", 2)
    assert rendered[-1] == "sRulesuA" and alone["prompt_tokens"] == len("sRulesuA") + 1


# ---- stop texts ---------------------------------------------------------------------------------

def test_a_text_ends_before_the_first_stop_that_is_whole():
    """Random texts of few letters, a token each. Guards against a stop that is missed across
    tokens, given out in part, or a tail that is lost where none comes."""
    tokenizer, chance = byte_tokenizer(), random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices("ab ", k=12))
        stops = ["".join(chance.choices("ab ", k=chance.randint(1, 4))) for _ in range(2)]
        ends = [n for n in range(13) if any(stop in text[:n] for stop in stops)]
        want = text
        if ends:
            want = text[: min(text.find(stop) for stop in stops if stop in text[: ends[0]])]
        stream = TextStream(tokenizer, [1], stops)
        pieces = []
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            pieces.append(stream.add(token))
            assert want.startswith("".join(pieces))
        pieces.append(stream.rest())
        assert "".join(pieces) == stream.text == want and stream.ended == bool(ends)


def test_stop_ends_an_answer(tmp_path, monkeypatch):  # of the embedded checkpoint
    """One prompt, a conversation and many prompts. Guards against a row that goes on, a stop in the
    text, and another row that ends with it."""
    whole = result_of(*GREEDY, "--prompt", LINES[0], "--max-new-tokens", 15)
    stop = ("--stop", "never", "--stop", " man of", "--max-new-tokens", 15)
    stopped = result_of(*GREEDY, "--prompt", LINES[0], *stop)
    assert stopped["text"] == whole["text"][: whole["text"].index(" man of")]
    assert stopped["new_tokens"] < 10 and whole["new_tokens"] == 15
    answers, _ = turns(monkeypatch, LINES[:1], *stop)
    (tmp_path / "prompts").write_text(LINES[0] + "\nThe sea\n")
    out = run(*GREEDY, "--prompts", tmp_path / "prompts", "--json", *stop)[1]
    rows = [json.loads(line) for line in out.splitlines()]
    assert [answers[0]["text"], rows[0]["text"]] == [stopped["text"]] * 2
    assert [answers[0]["new_tokens"], rows[0]["new_tokens"]] == [stopped["new_tokens"]] * 2
    alone = result_of(*GREEDY, "--prompt", "The sea", *stop)
    assert rows[1]["text"] == alone["text"] and rows[1]["new_tokens"] == 15


# ---- caches in files ----------------------------------------------------------------------------

@pytest.mark.parametrize("options", (
    ("--kv", "kivi2+"), pytest.param(PACKED, marks=pytest.mark.slow)))
def test_a_saved_cache_continues_to_the_same_text(options, tmp_path, monkeypatch):
    """One prompt, a conversation and many prompts go on where a conversation of one run has its
    turns. Guards against tokens that are lost or read again, and rows that see each other."""
    same = ("--max-new-tokens", 7, *options)
    file = tmp_path / "text.cache"
    lines = ("Once upon a time. " * 14, *LINES[1:])
    whole, _ = turns(monkeypatch, lines, *same)
    result_of(*GREEDY, *same, "--prompt", lines[0], "--save-cache", file)
    again = ("--load-cache", file)
    second = result_of(*GREEDY, *same, *again, "--prompt", LINES[1])
    (tmp_path / "prompts").write_text("\n".join([LINES[1], "x", LINES[1]]))
    code, out, err = run(*GREEDY, *same, *again, "--prompts", tmp_path / "prompts", "--json",
                         "--batch-size", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    rest, _ = turns(monkeypatch, LINES[1:], *same, *again, "--save-cache", file)
    for name in ("text", "prompt_tokens", "new_tokens"):
        results = [second, rest[0], rows[0], rows[2]]
        assert [result[name] for result in results] == [whole[1][name]] * 4
        assert rest[1][name] == whole[2][name]
    assert second["prefill_tokens"] == whole[1]["prefill_tokens"] < 10
    assert rows[3]["prefill_tokens"] < 3 * 10
    third = result_of(*GREEDY, *same, *again, "--prompt", "more")
    assert third["prompt_tokens"] > whole[2]["prompt_tokens"] + 7 and third["prefill_tokens"] < 6


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "text.cache"
    result_of("--checkpoint", checkpoint, "--max-new-tokens", 3, "--save-cache", file)
    return file


def edited(file, copy, **metadata):
    """A copy of a saved cache with other metadata, or without any in another number."""
    with safe_open(file, "pt") as content:
        old = content.metadata()
    tensors = load_file(file)
    if not metadata:
        tensors["layer.1.k_window"][0, 0, 2, 5] += 1
    save_file(tensors, copy, old | metadata)


def other_model(checkpoint, folder):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, changed(checkpoint, folder) / "model.safetensors")


def other_tokenizer(checkpoint, folder):
    byte_tokenizer(bos=False).save(str(changed(checkpoint, folder) / "tokenizer.json"))


FILES = {  # what is wrong: (file, copy) -> a damaged copy, what the line names
    "truncated": (lambda f, copy: copy.write_bytes(f.read_bytes()[:-9]), "save it again"),
    "a number": (edited, "save it again"),
    "a token": (lambda f, copy: edited(f, copy, tokens="[1, 2]"), "save it again"),
    "no digest": (lambda f, copy: save_file(load_file(f), copy), "save it again"),
    "text": (lambda f, copy: copy.write_text("{}"), "save it again"),
    "missing": (lambda f, copy: None, "save it again"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_damaged_file_is_refused(what, saved, checkpoint, tmp_path):
    """Guards against a traceback, and a text that goes on from damaged numbers."""
    damage, named = FILES[what]
    damage(saved, tmp_path / "copy")
    result = run("--checkpoint", checkpoint, "--prompt", "x", "--load-cache", tmp_path / "copy")
    check_error(result, named, str(tmp_path / "copy"))


@pytest.mark.parametrize("make, named", ((other_model, "model"), (other_tokenizer, "tokenizer")))
def test_a_file_of_another_model_is_refused(make, named, saved, checkpoint, tmp_path):
    make(checkpoint, tmp_path)
    check_error(run("--checkpoint", tmp_path, "--load-cache", saved), f"another {named}")


@pytest.mark.parametrize("options, named", (
    (("--kv", "kivi4"), "--kv kivi2"), (("--residual", 64), "residual"),
    (("--dtype", "bfloat16"), "--dtype"), (("--chat", "--system", "x"), "--load-cache")))
def test_a_file_of_another_cache_is_refused(options, named, saved, checkpoint):
    check_error(run("--checkpoint", checkpoint, "--load-cache", saved, *options), named)


def test_a_save_that_is_cut_off_leaves_the_old_file(saved, checkpoint, monkeypatch, tmp_path):
    """Guards against half a file in the place of a whole one, and against rests beside it."""
    file = tmp_path / "text.cache"
    file.write_bytes(saved.read_bytes())

    def cut_off(tensors, part, metadata):
        Path(part).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("program.saved.save_file", cut_off)
    code, _, _ = run("--checkpoint", checkpoint, "--max-new-tokens", 3, "--save-cache", file)
    assert code == 130 and file.read_bytes() == saved.read_bytes()
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_is_saved_where_no_answer_was_finished(checkpoint, monkeypatch, tmp_path):
    type_lines(monkeypatch)
    result = run("--checkpoint", checkpoint, "--interactive", "--save-cache", tmp_path / "file")
    check_error(result, "no answer was finished")
    assert not list(tmp_path.iterdir())


# ---- a shared prefix ----------------------------------------------------------------------------

@pytest.mark.parametrize("chat", (False, True))
@pytest.mark.parametrize("kv, document", (
    ("kivi2", DOCUMENT), ("bf16", 3 * DOCUMENT),
    ("kivi4", 3 * DOCUMENT)))
def test_a_prefix_is_read_once(kv, document, chat, tmp_path):
    """Guards against a document that every wave reads, dummies without it, and another text than
    that of prompts that hold the document themselves."""
    folder = make_checkpoint(tmp_path)
    template = "<{{ messages[0].content }}>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    questions = ["Who?", "What was grey?", "And where did he go?"]
    same = (*GREEDY, "--checkpoint", folder, "--kv", kv, "--max-new-tokens", 12, "--json",
            "--batch-size", 2, *["--chat"] * chat, "--prompts")

    def rows(prompts, *args):
        (folder / "prompts").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
        code, out, err = run(*same, folder / "prompts", *args)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()], err

    (folder / "document").write_text(document)
    shared, err = rows(questions, "--prefix", folder / "document")
    separate, _ = rows([document + question for question in questions])
    for row, alone in zip(shared[:3], separate):
        assert row["prompt_tokens"] == alone["prompt_tokens"] > len(document)
        if kv != "kivi4":  # which reads the document as it is packed
            assert row["text"] == alone["text"]
    each = [len(question) + chat for question in questions]
    assert shared[3]["prefill_tokens"] == len(document) + 1 + sum(each)
    assert separate[3]["prefill_tokens"] == separate[3]["prompt_tokens"]
    assert re.search(r"(?m)^  kept +[\d.]+ MiB$", err) and f"the {len(document) + 1} tokens" in err


# ---- drafts -------------------------------------------------------------------------------------

@pytest.mark.parametrize("is_model", (False, True))
def test_drafts_change_the_steps_and_not_the_text(is_model, tmp_path, monkeypatch):
    """A conversation and many prompts. The model as its own draft is always right. Guards
    against another text, and statistics that count a token as a step."""
    n = 9 if is_model else 24  # tokens of the decode steps
    same = ("--max-new-tokens", n + 1, "--kv", "bf16")
    lines = "the old man and the old man and", "The boy"
    drafts = ("--speculate", 4, *("--draft", ROOT / "tiny") * is_model)
    plain, drafted = (turns(monkeypatch, lines, *same, *more) for more in ((), drafts))
    assert AGAIN not in drafted[1] and drafted[0][1]["prefill_tokens"] < 12
    for one, other in zip(plain[0], drafted[0]):
        assert one["text"] == other["text"] and one["tokens_per_step"] == 1
        assert 0 < other["accepted_drafts"] <= other["proposed_drafts"]
    drafted = drafted[0][0]
    assert drafted["tokens_per_s"] * drafted["decode_s"] == pytest.approx(n)
    steps = n / drafted["tokens_per_step"]
    assert steps == pytest.approx(round(steps)) and steps < n
    assert drafted["accepted_drafts"] == pytest.approx(n - steps)
    read = [one["decode_gb_per_s"] * one["decode_s"] for one in (plain[0][0], drafted)]
    if not is_model:  # the weights once a step, and the cache
        assert read[1] / read[0] == pytest.approx(steps / n, rel=0.02)
    (tmp_path / "prompts").write_text(f"{lines[0]}\nThe sea")
    code, out, err = run(*GREEDY, *same, *drafts, "--prompts", tmp_path / "prompts", "--json")
    row, _, last = map(json.loads, out.splitlines())
    assert row["text"] == drafted["text"] and last["tokens_per_step"] > 1
    assert f"{last['accepted_drafts']} of {last['proposed_drafts']} drafts accepted" in err


def test_the_budget_counts_the_draft_model():
    """Guards against a run that is found to fit without its second model."""
    few = ("--max-new-tokens", 2, "--memory-gb", 0.05)
    code, _, err = run(*few)
    assert code == 0, err
    code, _, err = run(*few, "--speculate", 2, "--draft", ROOT / "tiny")
    assert code == 2 and "51.20 MiB are free" in err


REFUSED = {  # options: what the line names
    ("--system", "x"): "--chat",
    ("--prefix", "README.md"): "--prompts",
    ("--draft", "tiny"): "--speculate",
    ("--speculate", 16): "15",
    ("--stop", ""): "--stop",
    ("--save-cache", "x", "--prompts", "LICENSE"): "--prompts",
    ("--save-cache", "no/such/folder"): "no/such/folder",
    ("--profile", "x", "--speculate", 2): "--profile",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_do_not_go_together_are_refused(options):
    check_error(run(*options), REFUSED[options])


def test_a_draft_of_another_tokenizer_is_refused(checkpoint):
    result = run("--draft", checkpoint, "--speculate", 2)
    check_error(result, "--draft", "vocabulary")
