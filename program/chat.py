"""One prompt, and a conversation: text appears on stdout as it comes, statistics on stderr."""
import json
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

import generate
from checkpoint.text import TextStream, encode
from decoding.decoder import Decoder, bucket
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

    def encode(self, messages):
        """Tokens of a conversation, or of one prompt. raises ValueError as `encode`"""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
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


def rounded_capacity(model, n_tokens):
    """Capacity of the caches for so many tokens.

    Every capacity is a compilation of its own, so a compiled step gets few: at least 1,024 tokens,
    then four sizes an octave, and so the turns of a conversation share one. Never beyond the
    model's context.
    """
    if not model.compiled or n_tokens > model.config.max_len:
        return n_tokens
    return min(model.config.max_len, max(1024, bucket(n_tokens, 1)))


@dataclass
class Answer:
    """The continuation of one prompt, printed as its tokens come."""

    run: Run
    ids: list
    echo: str = ""  # text to print before it
    text: str = ""  # what is printed so far
    profiler: object = None

    def __post_init__(self):
        self.stream = TextStream(self.run.tokenizer, self.ids)

    def show(self, newest):
        """Takes the newest tokens of a batch of one row."""
        if self.echo:  # not earlier, when the line shows the compilation
            print(self.echo, end="", flush=True)
            self.echo = ""
        if self.profiler:
            self.profiler.step()
        if newest[0] not in self.run.model.config.eos:
            piece = self.stream.add(newest[0])
            self.text += piece
            print(piece, end="", flush=True)

    def capacity(self, new_tokens):
        """Of the caches. raises ValueError: there is no room for them"""
        exact = len(self.ids) + new_tokens
        rounded = rounded_capacity(self.run.model, exact)
        budget = Budget(self.run, len(self.ids))
        capacity = rounded if budget.fits(1, rounded) else exact
        budget.check(1, capacity)
        if self.run.memory_gb is not None:
            tell(budget.table(1, capacity))
        return capacity

    def give(self, why=None, profile_file=None):
        """Prints the text, then the statistics.

        why           line about the compilation, printed when nothing is wrong
        profile_file  where a trace of some decode steps goes
        """
        run, n_prompt = self.run, len(self.ids)
        torch.manual_seed(run.seed)
        new_tokens = run.new_tokens(self.ids)
        capacity = self.capacity(new_tokens)
        decoder = run.decoder(1, capacity)
        if profile_file:
            self.profiler = report.profile(profile_file, new_tokens)
        tell(why)
        stats = {}
        with self.profiler or nullcontext():
            (out,) = generate.generate(run.model, [self.ids], new_tokens, on_token=self.show,
                                       stats=stats, decoder=decoder)
        print()
        tokens = n_prompt, len(out) - n_prompt
        if profile_file:
            report.tell_profiled(profile_file, tokens[1])
        steps = stats["steps"]
        moved = report.traffic(run.model, [(n_prompt + stats["compile_steps"], steps)])
        numbers = report.statistics(run, (1, capacity), tokens, stats, steps, moved)
        run.tell({"text": self.text, **numbers}, len(out) - 1)


def converse(run):
    """Reads prompts line by line until the end of input; each continues the text so far."""
    context = run.model.config.max_len
    reserved = run.max_new_tokens or min(DEFAULT_NEW, context // 2)
    messages = []
    while True:
        try:
            line = input("> ").removeprefix("\N{BYTE ORDER MARK}")
        except EOFError:
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            ids = run.encode(messages)
            while len(ids) + reserved > context and len(messages) > 2:
                tell(f"forgetting the oldest turn: the context holds {context} tokens")
                del messages[:2]
                ids = run.encode(messages)
            if len(ids) >= context:
                raise ValueError(f"{len(ids)} tokens leave no room in the context of {context}: "
                                 "a shorter line, please")
        except ValueError as error:  # such a line does not end the conversation
            tell(f"error: {error}")
            messages.pop()
            continue
        answer = Answer(run, ids, "" if run.render else line)
        try:
            answer.give()
        except KeyboardInterrupt:  # ends the answer, not the program
            print()
        messages.append({"role": "assistant", "content": answer.text})
