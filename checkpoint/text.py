"""From text to tokens: a checkpoint's tokenizer and its chat template."""
import json
from datetime import datetime

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from checkpoint.config import read_json


def load_tokenizer(folder):
    """The tokenizer of a checkpoint, which puts BOS before a text where the checkpoint says so.

    raises ValueError: there is no tokenizer.json, or it is damaged
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        only = ", only tokenizer.model" if (folder / "tokenizer.model").exists() else ""
        raise ValueError(f"{file} does not exist{only}: write it with transformers, "
                         "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is no valid tokenizer: {error}") from None
    config = _tokenizer_config(folder)
    _set_bos(tokenizer, _special_tokens(config).get("bos_token", ""), config.get("add_bos_token"))
    return tokenizer


def _set_bos(tokenizer, bos, wanted):
    """Follows tokenizer_config.json where it says True or False and tokenizer.json disagrees."""
    number = tokenizer.token_to_id(bos)
    if number is None or not isinstance(wanted, bool):
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
        if name.endswith("_token") and isinstance(token, str):
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
            return template.render(messages=messages, add_generation_prompt=True, **special)
        except Exception as error:  # it is a program, and can fail as it likes
            raise ValueError(f"the chat template of {folder} fails: "
                             f"{type(error).__name__}: {error}") from None

    return render


def _template_source(folder, config):
    """The text of the template: of a file of its own, or in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    source = config.get("chat_template")
    if file.exists():
        source = file.read_text(encoding="utf-8")
    elif isinstance(source, list):  # several, each with a name
        named = {str(entry.get("name")): entry.get("template")
                 for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template: "
                         "leave out --chat, or choose an instruct model")
    return source


def _sandbox():
    """jinja2 with what templates of the hub expect to find there."""
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, **options):
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def now(form):
        return datetime.now().strftime(form)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": now}
    return sandbox


def encode(tokenizer, messages, render=None):
    """Tokens of a conversation.

    render  a chat template, which writes BOS itself; without one, the messages are one text, a
            line a turn
    raises  ValueError: text that is no UTF-8
    """
    text = "".join(m["content"] + "\n" * (m["role"] == "assistant") for m in messages)
    if render is not None:
        text = render(messages)
    text.encode()  # bytes that are no UTF-8 come as halves of surrogate pairs
    return tokenizer.encode(text, add_special_tokens=render is None).ids
