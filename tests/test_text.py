"""From text to tokens and back: tokenizers, chat templates, conversations."""
import json

import pytest
from calling import check_error, run, type_lines
from make_golden import CHAT, INST
from reference import byte_tokenizer, make_folder
from tokenizers import Tokenizer, decoders, models, normalizers, processors

import generate
from checkpoint.text import chat_template

def metaspace_tokenizer():
    """Some words and, for everything else, bytes: in the way of sentencepiece (Llama 2, Mistral,
    Phi-3)."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab = special | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁ab", "ab"):
        vocab[piece] = len(vocab)
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


class Parrot:
    """Stands in for `generate.generate`: says these texts, one a call, token by token.

    It keeps the prompts that it was given. interrupt: a KeyboardInterrupt before that token, once
    """

    def __init__(self, monkeypatch, tokenizer, *texts):
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.prompts = []
        self.interrupt = {}  # number of the call -> token
        monkeypatch.setattr(generate, "generate", self)

    def __call__(self, model, rows, max_new_tokens, *, on_token, stats, **options):
        self.prompts.append(self.tokenizer.decode(rows[0], skip_special_tokens=False))
        ids = self.tokenizer.encode(self.texts.pop(0), add_special_tokens=False).ids
        for n, token in enumerate(ids):
            if n == self.interrupt.get(len(self.prompts)):
                raise KeyboardInterrupt
            on_token([token])
        stats.update(prefill_s=0.1, decode_s=0.1, steps=len(ids) - 1, compile_s=0, compile_steps=0)
        return [rows[0] + ids]


@pytest.fixture
def chat_folder(tmp_path):
    """A function of (tokenizer, tokenizer_config.json) that returns the folder of a model with
    them."""
    def make(tokenizer, **config):
        folder = make_folder(tmp_path)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


# ---- tokenizers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", (byte_tokenizer, metaspace_tokenizer))
def test_streamed_text_is_whole_characters(kind, chat_folder, monkeypatch):
    """Two to four bytes a character, one token a byte. Guards against replacement characters where
    a character is cut, and against a space that is lost or added where the answer begins."""
    tokenizer = kind()
    text = " ab é日本🙂 ab"
    pieces = []
    folder = chat_folder(tokenizer)
    Parrot(monkeypatch, tokenizer, text if kind is byte_tokenizer else text[1:])

    def keep(*texts, flush=False, **options):
        if flush:
            pieces.extend(texts)

    monkeypatch.setattr("builtins.print", keep)
    run("--checkpoint", folder, "--prompt", "ab")
    assert "".join(pieces) == "ab" + text and len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("in_file", (True, False))
@pytest.mark.parametrize("config, bos", (
    ({"add_bos_token": True}, True), ({"add_bos_token": False}, False), ({}, None)))
def test_bos_is_as_the_config_says(in_file, config, bos, chat_folder):
    """tokenizer_config.json decides; tokenizer.json where it is silent. Guards against a missing
    and a doubled BOS."""
    folder = chat_folder(byte_tokenizer(bos=in_file), bos_token={"content": "<s>"}, **config)
    _, tokenizer = generate.load(folder)
    bare = byte_tokenizer(bos=False).encode("ab").ids
    wanted = in_file if bos is None else bos
    assert tokenizer.encode("ab").ids == [256] * wanted + bare


# ---- chat templates -----------------------------------------------------------------------------

@pytest.mark.parametrize("where", ("config", "list", "file"))
@pytest.mark.parametrize("name", CHAT)
def test_chat_templates_give_what_transformers_gives(name, where, tmp_path):
    """Guards against other blank lines (trim_blocks), escapes, missing functions, and a template
    that is not found."""
    template, special, messages, text = CHAT[name]
    config = dict(special)
    if "bos_token" in config:
        config["bos_token"] = {"content": config["bos_token"], "special": True}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        config["chat_template"] = "not this one"
    elif where == "list":
        config["chat_template"] = [{"name": "tool_use", "template": "no"},
                                   {"name": "default", "template": template}]
    else:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template(tmp_path)(messages) == text


CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": INST}


def test_chat_puts_the_prompt_into_the_template(chat_folder, monkeypatch):
    """Guards against a second BOS, a prompt in the answer, a template that is ignored."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, add_bos_token=True, **CONFIG)
    parrot = Parrot(monkeypatch, tokenizer, " Hello.")
    code, out, _ = run("--checkpoint", folder, "--chat", "--prompt", "Hi", "--json",
                       "--max-new-tokens", 20)
    assert code == 0 and parrot.prompts == ["<s>[INST] Hi [/INST]"]
    lines = out.splitlines()
    assert lines[0] == " Hello." and json.loads(lines[-1])["text"] == " Hello."


def test_chat_puts_every_prompt_of_a_file_into_the_template(chat_folder):
    """Guards against a template that only single prompts go through."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, add_bos_token=True, **CONFIG)
    (folder / "prompts.txt").write_text("Hi\n")
    code, out, _ = run("--checkpoint", folder, "--chat", "--prompts", folder / "prompts.txt",
                       "--json", "--max-new-tokens", 4)
    want = tokenizer.encode("<s>[INST] Hi [/INST]", add_special_tokens=False).ids
    assert code == 0 and json.loads(out.splitlines()[0])["prompt_tokens"] == len(want)


TEMPLATES = {  # what a template may do wrong: (its text, what the line names)
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "its own refusal": ("{{ raise_exception('only\nin pairs') }}", "only in pairs"),
    "no such thing": ("{{ messages[7].content }}", "UndefinedError"),
    "into the interpreter": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "through a function": (
        "{{ raise_exception.__globals__['os'].system('true') }}", "unsafe"),
    "changes its input": ("{{ messages.append(1) }}", "unsafe"),
    "no end": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    "itself again": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "no text": (["a", "list"], "no chat template"),
    "none": (None, "no chat template"),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_broken_or_malicious_template_gets_one_line(what, chat_folder):
    """Guards against a template that runs outside the sandbox, and against its errors as
    tracebacks."""
    template, named = TEMPLATES[what]
    folder = chat_folder(byte_tokenizer(), chat_template=template)
    result = run("--checkpoint", folder, "--chat", "--prompt", "Hi", "--max-new-tokens", 2)
    check_error(result, named, str(folder))


# ---- conversations ------------------------------------------------------------------------------

@pytest.mark.parametrize("chat", (True, False))
def test_a_conversation_keeps_its_history(chat, chat_folder, monkeypatch):
    """Three turns; the second answer is interrupted with Ctrl-C. Guards against forgotten turns,
    against a Ctrl-C that ends the program, and against one that loses what was said."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, **CONFIG)
    parrot = Parrot(monkeypatch, tokenizer, "one", "twofold", "three")
    parrot.interrupt = {2: 3}
    type_lines(monkeypatch, "A", "", "B", "C")
    code, out, err = run("--checkpoint", folder, "--interactive", *["--chat"] * chat)
    assert code == 0 and "Traceback" not in err
    prompts = ["<s>A", "<s>Aone\nB", "<s>Aone\nBtwo\nC"]
    shown = ["Aone", "Btwo", "Cthree"]
    if chat:
        first = "<s>[INST] A [/INST]"
        second = first + " one </s><s>[INST] B [/INST]"
        prompts = [first, second, second + " two </s><s>[INST] C [/INST]"]
        shown = ["one", "two", "three"]
    assert parrot.prompts == prompts and out.split("\n")[:3] == shown


def test_a_long_conversation_forgets_its_oldest_turns(chat_folder, monkeypatch):
    """Guards against a conversation that ends with an error as soon as the context is full."""
    tokenizer = byte_tokenizer()
    folder = chat_folder(tokenizer, **CONFIG)
    parrot = Parrot(monkeypatch, tokenizer, *["x" * 60] * 5)
    type_lines(monkeypatch, *"ABCDE")
    code, _, err = run("--checkpoint", folder, "--interactive", "--chat", "--max-new-tokens", 60)
    assert code == 0 and "forgetting" in err
    last = parrot.prompts[-1]
    assert "] D [" in last and "] A [" not in last and last.count("<s>") < 5


def test_a_line_that_is_too_long_does_not_end_the_conversation(monkeypatch):
    """Guards against an exit in the middle of a conversation."""
    type_lines(monkeypatch, "word " * 5000, "The sea")
    code, out, err = run("--interactive", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0 and "error: " in err and out.startswith("The sea")
