"""From text to tokens and back: a checkpoint's tokenizer and its chat template."""
import json
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.processors import TemplateProcessing

from checkpoint.config import read_json


@contextmanager
def one_line(what):
    """Makes a ValueError of all that is raised inside, which begins with `what`.

    The tokenizer library raises bare Exception, and its panics are no Exception at all.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from None


def read_text(file):
    """A file's text: UTF-8 or, with its mark, UTF-16; no byte order mark, lines end in one "\\n".

    Bytes that are neither come as halves of surrogate pairs, which `encode` refuses.
    """
    data = Path(file).read_bytes()
    coding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = data.decode(coding, "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_tokenizer(folder):
    """The tokenizer of a checkpoint, which puts BOS before a text where the checkpoint says so.

    raises ValueError: there is no tokenizer.json, it is damaged, or tokenizer_config.json
           contradicts it
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        only = ", only tokenizer.model" if (folder / "tokenizer.model").exists() else ""
        raise ValueError(f"{file} does not exist{only}: write it with transformers, "
                         "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    config = _tokenizer_config(folder)
    special = _special_tokens(config)
    with one_line(f"{file} is no valid tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()  # the file may keep what its writer did to his batches
        tokenizer.no_padding()
    with one_line(f"{folder}/tokenizer_config.json does not fit {file}"):
        _add_tokens(tokenizer, config, special)
        tokenizer.encode_special_tokens = config.get("split_special_tokens", False)
        _set_bos(tokenizer, special.get("bos_token", ""), config.get("add_bos_token"))
    return tokenizer


def _add_tokens(tokenizer, config, special):
    """Adds the tokens that only tokenizer_config.json names, as transformers does."""
    declared = {int(n): token for n, token in config.get("added_tokens_decoder", {}).items()}
    tokenizer.add_tokens([AddedToken(**declared[number]) for number in sorted(declared)])
    for number, token in declared.items():
        if tokenizer.token_to_id(token["content"]) != number:
            raise ValueError(f"{token['content']!r} is not token {number} there")
    known = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tokenizer.add_special_tokens([token for token in special.values() if token not in known])


def _set_bos(tokenizer, bos, wanted):
    """Follows tokenizer_config.json where it says True or False and tokenizer.json disagrees."""
    if not isinstance(wanted, bool | None):
        raise ValueError(f"add_bos_token must be true or false, got {wanted!r}")
    number = tokenizer.token_to_id(bos)
    if number is None or wanted is None:
        return
    present = number in tokenizer.encode("").ids
    if wanted != present:
        parts = [bos, "$A"] if wanted else ["$A"]
        tokenizer.post_processor = TemplateProcessing(single=parts, special_tokens=[(bos, number)])


def _tokenizer_config(folder):
    """tokenizer_config.json, {} without one."""
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


def _special_tokens(config):
    """The special tokens of a tokenizer_config.json: {"bos_token": "<s>", ..}."""
    tokens = {}
    for name, token in config.items():
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and not name.startswith("add_") and token is not None:
            tokens[name] = token
    return tokens


def chat_template(folder):
    """The checkpoint's own chat template.

    returns a function of messages [{"role": .., "content": ..}, ..] to the prompt's text
    raises  ValueError: it has none, or (when called) one that fails; it runs in jinja2's sandbox,
            which bounds what it can reach, but neither its time nor its memory
    """
    config = _tokenizer_config(folder)
    special = _special_tokens(config)
    source = _template_source(folder, config)
    sandbox = _sandbox()

    def render(messages):
        try:
            template = sandbox.from_string(source)
            # Some ask whether tools `is none`: what is undefined is not.
            return template.render(messages=messages, add_generation_prompt=True, tools=None,
                                   documents=None, **special)
        except Exception as error:  # it is a program, and can fail as it likes
            raise ValueError(f"the chat template of {folder} fails: "
                             f"{type(error).__name__}: {error}") from None

    return render


def _template_source(folder, config):
    """The text of the template: of a file of its own, or in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    source = config.get("chat_template")
    if file.is_file():
        source = read_text(file)
    if isinstance(source, list):  # several, each with a name
        source = {str(entry.get("name")): entry.get("template")
                  for entry in source if isinstance(entry, dict)}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template: "
                         "leave out --chat, or choose an instruct model")
    return source


def _sandbox():
    """jinja2 with what templates of the hub expect to find there."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag that marks an answer for training: what stands inside is text like any other."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, **options):
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def now(form):
        return datetime.now().strftime(form)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": now}
    return sandbox


def encode(tokenizer, messages, render=None):
    """Tokens of a conversation.

    render  a chat template, which writes BOS itself; without one, the messages are one text, a
            line a turn
    raises  ValueError: text that is no UTF-8, that the tokenizer fails at, or of no tokens
    """
    text = "".join(m["content"] + "\n" * (m["role"] == "assistant") for m in messages)
    if render is not None:
        text = render(messages)
    if "\0" in text:
        raise ValueError("the prompt holds NUL characters: save its text as UTF-8")
    with one_line("the prompt cannot be encoded"):
        text.encode()  # halves of surrogate pairs cannot be
        ids = tokenizer.encode(text, add_special_tokens=render is None).ids
    if not ids:
        raise ValueError("the prompt has no tokens: it needs some text")
    return ids


class TextStream:
    """The text that follows a prompt, token by token in whole characters, and where it ends.

    stops  texts that end it and are no part of it
    text   what was given out so far; ended: did one of the stops appear?
    """

    def __init__(self, tokenizer, ids, stops=()):
        self.tokenizer = tokenizer
        self.stream = DecodeStream(ids=ids)
        self.held = []  # the newest tokens, whose text was not given out
        self.stops = stops
        self.text = self.tail = ""  # the tail may become a stop
        self.ended = False

    def add(self, token):
        """The text that a token completes; it may be empty."""
        if self.ended:
            return ""
        self.tail += self._decoded(token)
        ends = [end for end in map(self.tail.find, self.stops) if end >= 0]
        if ends:
            self.ended, self.tail = True, self.tail[: min(ends)]
            return self.rest()
        begun = [n for stop in self.stops for n in range(len(stop))
                 if self.tail.endswith(stop[:n])]
        return self.rest(max(begun, default=0))

    def rest(self, kept=0):
        """Gives out the tail, but for its last `kept` characters."""
        n = len(self.tail) - kept
        piece, self.tail = self.tail[:n], self.tail[n:]
        self.text += piece
        return piece

    def _decoded(self, token):
        self.held.append(token)
        with one_line("the tokenizer cannot decode the text"):
            try:
                piece = self.stream.step(self.tokenizer, token)
            except Exception:  # a byte made characters invalid that were given out: they stay
                piece = self.tokenizer.decode(self.held, skip_special_tokens=False)
                self.stream = DecodeStream(ids=self.held)
        if piece:
            self.held = []
        return piece or ""


def stopper(tokenizer, prompts, stops):
    """A function of (row, new token): does a stop appear in the row's text? None without stops."""
    if not stops:
        return None
    streams = [TextStream(tokenizer, ids, stops) for ids in prompts]

    def ends(row, token):
        streams[row].add(token)
        return streams[row].ended

    return ends
