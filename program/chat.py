"""One prompt, and a conversation: text appears on stdout as it comes, statistics on stderr."""
import json
from bisect import bisect_left
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix

import torch
from tokenizers import Tokenizer

import generate
from checkpoint.text import TextStream, encode, stopper
from decoding.decoder import Decoder, bucket
from decoding.speculate import speculator
from model import Transformer
from program import report
from program.memory import Budget
from program.report import tell

DEFAULT_NEW = 200  # tokens, where the user does not say how many


@dataclass(frozen=True)
class Run:
    """What all answers of a run share: the user's choices, None where he made none."""

    model: Transformer
    tokenizer: Tokenizer
    render: object  # chat template
    kv: str
    options: dict  # of the cache, as in `Transformer.setup_caches`
    sampling: dict  # arguments of `decoding.decoder.sample`
    seed: int
    max_new_tokens: int
    memory_gb: float
    compile: bool
    as_json: bool
    before: list = ()  # messages in front of every prompt
    prefix: str = ""  # text in front of every prompt
    stops: list = ()  # texts that end an answer
    speculate: int = 0  # drafts a step
    draft: Transformer = None  # where they come from; None: the text itself

    def encode(self, messages):
        """Tokens of a conversation, or of one prompt. raises ValueError as `encode`"""
        if isinstance(messages, str):
            messages = [*self.before, {"role": "user", "content": self.prefix + messages}]
        ids = encode(self.tokenizer, messages, self.render)
        last = self.model.config.vocab_size - 1
        if max(ids) > last:
            raise ValueError(f"a prompt holds token {max(ids)}, the model's vocabulary ends at "
                             f"{last}: is it the model's own tokenizer?")
        return ids

    def new_tokens(self, ids):
        """How many tokens to add to a prompt."""
        room = self.model.config.max_len - len(ids)
        return self.max_new_tokens or max(1, min(DEFAULT_NEW, room))

    def decoder(self, batch, capacity):
        """Sets up the caches and makes a Decoder for them."""
        self.model.setup_caches(batch, capacity, self.kv, **self.options)
        token = torch.zeros_like(self.model.cache.pos)[:, None]  # [B, 1]
        if self.speculate:
            decoder = speculator(self.model, token, self.speculate, self.draft, **self.sampling)
        else:
            decoder = Decoder(self.model, token, **self.sampling)
        decoder.on_compile = report.note_compiling
        return decoder

    def tell(self, result, length, intro=""):
        """Prints the statistics of a run whose longest row reached `length` tokens."""
        model = self.model
        dtype = str(model.embed.weight.dtype).removeprefix("torch.")
        cache = dtype if self.kv == "bf16" else self.kv
        line = report.format_stats(result, cache, model.compiled)
        tell(intro + line + report.remarks(self, length))
        if self.as_json:
            print(json.dumps(result))


def rounded_capacity(model, n_tokens, grows=False):
    """Capacity of the caches for so many tokens.

    Every capacity is a compilation of its own, so a compiled step gets few: at least 1,024 tokens,
    then four sizes an octave, and so the turns of a conversation (`grows`) share one. Never beyond
    the model's context.
    """
    if not (model.compiled or grows) or n_tokens > model.config.max_len:
        return n_tokens
    return min(model.config.max_len, max(1024, bucket(n_tokens, 1)))


class Past:
    """What the caches of one row hold, and how a text goes on from there.

    saved  a program.saved.Saved to begin with; grows: will more texts follow?
    """

    def __init__(self, run, saved=None, grows=False):
        self.run, self.grows = run, grows
        self.tokens, self.states = (saved.tokens, saved.states) if saved else ([], [])
        self.decoder = None  # of the caches that are set up

    def respelled(self, ids):
        """`ids`, or the same text with the tokens that are held in front: those that a model writes
        are not always the tokenizer's own for that text."""
        if ids[: len(self.tokens)] == self.tokens:
            return ids
        decode = partial(self.run.tokenizer.decode, skip_special_tokens=False)
        held = decode(self.tokens)
        n = bisect_left(range(len(ids)), len(held), key=lambda n: len(decode(ids[:n])))
        return self.tokens + ids[n:] if decode(ids[:n]) == held else ids

    def keep(self, ids):
        """How many first tokens of `ids` need not be read: at least the last one must."""
        n = min(len(commonprefix([self.tokens, ids])), len(ids) - 1)
        if n < len(self.tokens) and self.run.kv != "bf16":  # a packed cache cannot be cut
            tell("the text does not go on from what the cache holds: reading all of it again")
            self.tokens, self.states, n = [], [], 0
        return n

    def make_room(self, n_prompt, new_tokens, kept):
        """Lets the caches hold their first `kept` tokens and have room for a prompt and new ones.

        raises ValueError: there is no memory for that
        """
        run, model = self.run, self.run.model
        exact = max(n_prompt + new_tokens, len(self.tokens))
        if not self.decoder or model.cache.max_len < exact:
            states = self.states or [layer.cache.state() for layer in model.layers if self.tokens]
            tensors = [x for state in states for x in state.values() if torch.is_tensor(x)]
            budget = Budget(run, n_prompt, sum(x.nbytes for x in tensors), kept)
            capacity = self.capacity(exact, budget)
            tokens = self.forget()  # an interrupt may come before all is there
            self.decoder = run.decoder(1, capacity)
            load_states(model, states)
            self.tokens = tokens
        if kept < len(self.tokens):
            model.cache.set_lengths([kept])

    def capacity(self, exact, budget):
        rounded = rounded_capacity(self.run.model, exact, self.grows)
        capacity = rounded if budget.fits(1, rounded) else exact
        budget.check(1, capacity)
        if self.run.memory_gb is not None:
            tell(budget.table(1, capacity))
        return capacity

    def forget(self):
        """Lets the next text begin with new caches; returns the tokens that these hold."""
        tokens, self.tokens, self.states, self.decoder = self.tokens, [], [], None
        return tokens

    def generate(self, ids, new_tokens, kept, **options):
        """`generate.generate` behind the tokens that are kept; the caches then hold the new text.
        After an interrupt nobody knows what they hold."""
        decoder = self.decoder
        self.forget()
        model = self.run.model
        (out,) = generate.generate(model, [ids], new_tokens, decoder=decoder, held=kept, **options)
        text = decoder.texts[0] if self.run.speculate else out  # drafts may go beyond the end
        self.tokens, self.decoder = text[: model.cache.lengths[0]], decoder
        return out


def load_states(model, states):
    """Puts a state into the first rows of every layer's cache."""
    for layer, state in zip(model.layers, states):
        layer.cache.load_state(state)


@dataclass
class Answer:
    """The continuation of one prompt, printed as its tokens come."""

    run: Run
    past: Past
    ids: list
    echo: str = ""  # text to print before it
    profiler: object = None

    def __post_init__(self):
        self.stream = TextStream(self.run.tokenizer, self.ids, self.run.stops)

    def show(self, newest):
        """Takes the newest tokens of a batch of one row."""
        if self.echo:  # not earlier, when the line shows the compilation
            print(self.echo, end="", flush=True)
            self.echo = ""
        if self.profiler:
            self.profiler.step()
        if newest[0] not in self.run.model.config.eos:
            print(self.stream.add(newest[0]), end="", flush=True)

    def give(self, why=None, profile_file=None):
        """Prints the text, then the statistics.

        why           line about the compilation, printed when nothing is wrong
        profile_file  where a trace of some decode steps goes
        """
        run, past, n_prompt = self.run, self.past, len(self.ids)
        torch.manual_seed(run.seed)
        new_tokens = run.new_tokens(self.ids)
        kept = past.keep(self.ids)
        past.make_room(n_prompt, new_tokens, kept)
        if profile_file:
            self.profiler = report.profile(profile_file, new_tokens)
        tell(why)
        stats = Counter()
        with self.profiler or nullcontext():
            out = past.generate(self.ids, new_tokens, kept, on_token=self.show, stats=stats,
                                until=stopper(run.tokenizer, [self.ids], run.stops))
        print(self.stream.rest())
        rows = [(n_prompt, len(out) - n_prompt)]
        if profile_file:
            report.tell_profiled(profile_file, len(out) - n_prompt)
        numbers = report.statistics(run, (1, run.model.cache.max_len), rows, stats,
                                    *report.decoded(run, stats, rows))
        run.tell({"text": self.stream.text, **numbers}, len(out) - 1)


def converse(run, past):
    """Reads prompts line by line until the end of input; each continues the text so far.

    returns the messages of the conversation
    """
    context = run.model.config.max_len
    reserved = run.max_new_tokens or min(DEFAULT_NEW, context // 2)
    messages = list(run.before)
    first = [m["role"] for m in messages[:1]] == ["system"]  # stays in front
    while True:
        try:
            line = input("> ").removeprefix("\N{BYTE ORDER MARK}")
        except EOFError:
            return messages
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids = past.respelled(run.encode(messages))
            while len(ids) + reserved > context and len(messages) > 2 + first:
                tell(f"forgetting the oldest turn: the context holds {context} tokens")
                del messages[first : first + 2]
                ids = past.respelled(run.encode(messages))
            if len(ids) >= context:
                raise ValueError(f"{len(ids)} tokens leave no room in the context of {context}: "
                                 "a shorter line, please")
        except ValueError as error:  # such a line does not end the conversation
            tell(f"error: {error}")
            messages.pop()
            continue
        answer = Answer(run, past, ids, "" if run.render else line)
        try:
            answer.give()
        except KeyboardInterrupt:  # ends the answer, not the program
            print()
            tell("interrupted: the next turn reads the whole text again")
        messages.append({"role": "assistant", "content": answer.stream.text})
