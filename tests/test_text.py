"""From text to tokens and back: tokenizers, chat templates, conversations."""
import json

import pytest
from calling import check_error, result_of, run, type_lines
from make_golden import CHAT, INST
from reference import byte_tokenizer, make_folder
from tokenizers import Tokenizer, decoders, models, normalizers, processors

import generate
from checkpoint.text import TextStream, chat_template, encode, load_tokenizer


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


@pytest.mark.parametrize("saved", ("truncation", "padding"))
def test_a_prompt_is_neither_cut_nor_filled(saved, chat_folder):
    """tokenizer.json keeps what its writer did to his batches. Guards against a prompt that ends
    after 4 tokens, or begins with 30 of padding."""
    tokenizer = byte_tokenizer()
    want = tokenizer.encode("abcdefgh").ids
    if saved == "truncation":
        tokenizer.enable_truncation(4)
    else:
        tokenizer.enable_padding(length=40, pad_token="</s>", pad_id=257, direction="left")
    assert tokenizer.encode("abcdefgh").ids != want
    _, loaded = generate.load(chat_folder(tokenizer))
    assert loaded.encode("abcdefgh").ids == want


def token(content, **options):
    names = ("lstrip", "rstrip", "normalized", "special", "single_word")
    return {"content": content, **dict.fromkeys(names, False), **options}


A, B = (byte_tokenizer(bos=False).encode(text).ids[0] for text in "ab")
SPACE = byte_tokenizer(bos=False).encode(" ").ids[0]


@pytest.mark.parametrize("config, text, want", (
    ({"eos_token": "<end>"}, "a<end>b", [A, 258, B]),
    ({"eos_token": {"content": "<end>"}, "pad_token": None}, "a<end>b", [A, 258, B]),
    ({"eos_token": "</s>"}, "a</s>b", [A, 257, B]),
    ({"added_tokens_decoder": {"258": token("<n>")}}, "a<n>b", [A, 258, B]),
    ({"added_tokens_decoder": {"256": token("<s>", lstrip=True)}}, "a <s>", [A, 256]),
    ({"added_tokens_decoder": {"256": token("<s>")}}, "a <s>", [A, SPACE, 256]),
    ({"split_special_tokens": True}, "<s>", byte_tokenizer(False).encode("<_s_>").ids[::2]),
), ids=str)
def test_tokens_that_only_the_config_names(config, text, want, chat_folder):
    """The right values are those of transformers 5.24. Guards against an end of turn that reaches
    the model letter by letter."""
    tokenizer = load_tokenizer(chat_folder(byte_tokenizer(bos=False), **config))
    assert encode(tokenizer, [{"role": "user", "content": text}]) == want


@pytest.mark.parametrize("config", (
    {"added_tokens_decoder": {"300": token("<n>")}}, {"added_tokens_decoder": {"x": token("<n>")}},
    {"added_tokens_decoder": {"258": "<n>"}}, {"added_tokens_decoder": [1]},
    {"added_tokens_decoder": {"258": {"lstrip": True}}}, {"bos_token": 5}, {"bos_token": ["<s>"]},
    {"eos_token": {"content": 5}}, {"bos_token": True}, {"add_bos_token": "yes"},
    {"add_bos_token": 1, "bos_token": "<s>"}, {"split_special_tokens": "no"}), ids=str)
def test_a_tokenizer_config_that_means_nothing_is_refused(config, chat_folder):
    """Guards against an entry of the wrong kind that is left out in silence, and a traceback."""
    folder = chat_folder(byte_tokenizer(), **config)
    check_error(run("--checkpoint", folder, "--max-new-tokens", 2), "tokenizer_config.json")


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


RENDERED = {  # what transformers 5.24 makes of "Hi" in them
    "{% if tools is not none %}[TOOLS]{{ tools }}{% endif %}{{ messages[0].content }}": "Hi",
    "{% if documents is not none %}Read{% endif %}{{ messages[0].content }}": "Hi",
    "{% if not tools is none %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}": "Hi",
    "{% if tools %}[TOOLS]{% endif %}{% if nothing %}x{% endif %}{{ nothing }}.": ".",
    "a {% generation %}{{ messages[0].content }}{% endgeneration %} b": "a Hi b",
    "a\n  {%- generation -%}\n b {%- endgeneration %}\nc": "abc",
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|": "<s>|</s>||",
}


@pytest.mark.parametrize("template", RENDERED)
def test_what_a_template_may_ask_for(template, tmp_path):
    """Guards against a preamble of tools that nobody gave: what is undefined is not none."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    for source in (template, {"default": template, "tool_use": "no"}):
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(config | {"chat_template": source}))
        messages = [{"role": "user", "content": "Hi"}]
        assert chat_template(tmp_path)(messages) == RENDERED[template]


@pytest.mark.parametrize("mark, coding", ((b"\xef\xbb\xbf", "utf-8"), (b"", "utf-16")))
def test_a_template_file_with_a_byte_order_mark(mark, coding, tmp_path):
    """Guards against a mark that becomes the first character of every prompt."""
    (tmp_path / "chat_template.jinja").write_bytes(mark + "é\r\n{{ 1 }}".encode(coding))
    assert chat_template(tmp_path)([]) == "é\n1"


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
    "no default": ({"tool_use": "x"}, "no chat template"),
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


# ---- what the tokenizer library fails at --------------------------------------------------------

def byte_ids(tokenizer, text):
    """Letters and, as <0x..>, bytes."""
    return [tokenizer.token_to_id(piece) for piece in text.split()]


BROKEN = "a <0xC3> <0xA9> <0xE2> a a"  # é, and the first byte of a character that does not follow


@pytest.mark.parametrize("pieces, text", (
    (BROKEN, "aé\ufffdaa"),
    ("a <0xC3> <0xA9> <0xE2> <0x82> <0xAC> b", "aé€b"),
    ("<0xE2> <0xE2> a <0xC3> <0xA9> ▁a <0xA9> ▁ab", "\ufffd\ufffdaé a\ufffd ab"),
    ("a <0xC3> <0xA9> <0xE2> ▁a ▁ab a", "aé\ufffd a aba"),
))
def test_a_text_that_becomes_invalid(pieces, text):
    """What was given out stays, a byte too many is a replacement character. Guards against the
    library's exception, which ended the run."""
    tokenizer = metaspace_tokenizer()
    stream = TextStream(tokenizer, tokenizer.encode("b").ids)
    assert "".join(map(stream.add, byte_ids(tokenizer, pieces))) == text


def saying(monkeypatch, *rows):
    """Lets the model answer the prompts of a file with these tokens."""
    def answer(model, prompts, limits, *, on_row, stats, **options):
        for row, new in enumerate(rows):
            on_row(row, new)
        stats.update(prefill_s=0.1, decode_s=0.1, steps=1, compile_s=0, compile_steps=0)

    monkeypatch.setattr(generate, "generate", answer)


def test_the_text_of_a_row_takes_no_other_row(chat_folder, monkeypatch):
    """The second text becomes invalid; at the third the library panics, which is no Exception.
    Guards against finished answers that are lost."""
    tokenizer = metaspace_tokenizer()
    strip = decoders.Strip("b", 0, 9)  # fails at a token of nothing else
    tokenizer.decoder = decoders.Sequence([strip, tokenizer.decoder])
    folder = chat_folder(tokenizer)
    (folder / "prompts").write_text("a\n" * 4)
    good = byte_ids(tokenizer, "a ▁a a")
    saying(monkeypatch, good, byte_ids(tokenizer, BROKEN), byte_ids(tokenizer, "b"), good)
    code, out, err = run("--checkpoint", folder, "--prompts", folder / "prompts", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row.get("index") for row in rows] == [0, 1, 3, None], err
    assert [row["text"] for row in rows[:3]] == ["a aa", "aé\ufffdaa", "a aa"]
    assert "prompt 2 has no text" in err


def wordlevel_tokenizer():
    """Knows one word, and fails at all others."""
    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))


def test_a_line_that_cannot_be_encoded_is_skipped(chat_folder, monkeypatch):
    """In a file and in a conversation. Guards against one word that ends the run."""
    folder = chat_folder(wordlevel_tokenizer())
    lines = ("a", "unknown", "", "b")
    (folder / "prompts").write_text("\n".join(lines))
    same = ("--checkpoint", folder, "--max-new-tokens", 2)
    code, out, err = run(*same, "--prompts", folder / "prompts", "--json")
    assert code == 0 and [json.loads(line).get("prompt") for line in out.splitlines()] == [
        "a", "b", None]
    assert "line 2, skipped: the prompt cannot be encoded: " in err
    type_lines(monkeypatch, "unknown", "a", "also unknown")
    code, out, err = run(*same, "--interactive")
    assert code == 0 and out.startswith("a") and err.count("error: the prompt cannot be enc") == 2
    check_error(run(*same, "--prompt", "unknown"), "cannot be encoded")


def test_a_token_beyond_the_vocabulary_takes_no_other_row(chat_folder, monkeypatch):
    """A token that the model has no row for. Guards against one such line that ends a file of
    prompts or a conversation."""
    folder = chat_folder(byte_tokenizer(), added_tokens_decoder={
        str(n): token(f"<{n}>") for n in range(258, 290)})
    (folder / "prompts").write_text("a<289>\n\u3000b\n")
    same = ("--checkpoint", folder, "--max-new-tokens", 2)
    code, out, err = run(*same, "--prompts", folder / "prompts", "--json")
    prompts = [json.loads(line).get("prompt") for line in out.splitlines()]
    assert code == 0 and prompts == ["\u3000b", None] and "line 1, skipped: a prompt holds" in err
    type_lines(monkeypatch, "<289>", "a")
    code, out, err = run(*same, "--interactive")
    assert code == 0 and "error: a prompt holds token 289" in err and out.startswith("a")


def test_a_prompt_of_no_tokens_is_refused(chat_folder, monkeypatch):
    """The tokenizer strips blanks. Guards against an IndexError, and against one such line that
    ends a file or a conversation."""
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.normalizer = normalizers.Strip()
    folder = chat_folder(tokenizer)
    (folder / "prompts").write_text('{"prompt": "a"}\n{"prompt": " "}\n{"prompt": "b"}')
    same = ("--checkpoint", folder, "--max-new-tokens", 2)
    for prompt in ("", " "):
        check_error(run(*same, "--prompt", prompt), "no tokens")
    (folder / "chat_template.jinja").write_text("{% if false %}x{% endif %}")
    check_error(run(*same, "--chat", "--prompt", "a"), "no tokens")
    code, out, err = run(*same, "--prompts", folder / "prompts", "--json")
    assert code == 0 and len(out.splitlines()) == 3 and "line 2, skipped: the prompt has no" in err
    type_lines(monkeypatch, " ", "a")
    code, out, err = run(*same, "--interactive")
    assert code == 0 and "error: the prompt has no tokens" in err and out.startswith("a")


PANICS = {  # change of tokenizer.json -> what the line names
    "of a file": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
                  "no valid tokenizer"),
    "of a text": ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
                  "cannot be encoded"),
}


@pytest.mark.parametrize("what", PANICS)
def test_a_panic_of_the_library_gets_one_line(what, chat_folder):
    """Guards against a traceback: a panic is no Exception."""
    change, named = PANICS[what]
    folder = chat_folder(byte_tokenizer())
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    check_error(run("--checkpoint", folder, "--prompt", "ab"), named)


# ---- text as it comes ---------------------------------------------------------------------------

AS_IT_COMES = {
    "plain": b"%b",
    "last newline": b"%b\n",
    "UTF-8 with a mark": b"\xef\xbb\xbf%b\n",
    "CRLF": b"%b\r\n",
    "CR": b"%b\r",
    "UTF-16": "utf-16",
    "UTF-16, big endian": "utf-16-be",
}


def coded(how, text):
    if how.startswith("UTF-16"):
        mark = "\ufeff" if how.endswith("endian") else ""
        return (mark + text + "\r\n").encode(AS_IT_COMES[how])
    return AS_IT_COMES[how] % text.encode()


@pytest.mark.parametrize("how", AS_IT_COMES)
def test_files_of_text_as_they_come(how, checkpoint, tmp_path):
    """--prompt-file and --prompts, both kinds. Guards against marks, halves of characters and
    line ends that the model reads."""
    file = tmp_path / "file"
    same = ("--checkpoint", checkpoint, "--max-new-tokens", 2, "--temperature", 0)
    file.write_bytes(coded(how, "é日\nb"))
    result = result_of(*same, "--prompt-file", file)
    assert result["prompt_tokens"] == 1 + len("é日\nb".encode())
    for prompt in ("é日b", '{"prompt": "é日b"}'):
        file.write_bytes(coded(how, prompt))
        first = json.loads(run(*same, "--prompts", file, "--json")[1].splitlines()[0])
        assert first["prompt"] == "é日b" and first["prompt_tokens"] == 1 + len("é日b".encode())


def test_text_in_no_known_coding_is_refused(checkpoint, tmp_path):
    """UTF-16 without a mark, with half a character, and Latin-1."""
    file = tmp_path / "file"
    for text, named in (("ab".encode("utf-16-le"), "NUL"), (b"\xff\xfea", "utf-16"),
                        ("é".encode("latin-1"), "utf-8")):
        file.write_bytes(text)
        check_error(run("--checkpoint", checkpoint, "--prompt-file", file), named)
        code, _, err = run("--checkpoint", checkpoint, "--prompts", file)
        assert code == 2 and err.splitlines()[-1].startswith("error: ")


def test_a_mark_before_piped_lines(checkpoint, monkeypatch):
    """Guards against a mark that the model reads."""
    type_lines(monkeypatch, "\ufeffab")
    code, _, err = run("--checkpoint", checkpoint, "--interactive", "--max-new-tokens", 2)
    assert code == 0 and err.startswith("3 prompt tokens")
