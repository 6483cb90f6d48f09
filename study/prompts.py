"""What the caches read: windows of a text, and long prompts that ask for one answer."""
from itertools import count
from typing import NamedTuple

import torch

THINGS = ("apple arrow bell boat book bottle candle chair clock coat coin crown drum flower hammer "
          "kettle lamp mirror needle rope").split()
PEOPLE = "Ann Ben Emma Jack Lucy Mary Paul Rose Sam Tom".split()
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROOM = 64  # of a prompt's tokens: for the question and the answer
STORY = "[story]"  # where the story goes in a chat template


class Case(NamedTuple):
    """Tokens of one prompt."""

    prompt: list  # prefilled exactly
    rest: list  # decoded one by one
    answer: int  # so many tokens at the end of `rest`


def pass_key(rng):
    key = rng.randrange(10**4, 10**5)
    facts = [f"The pass key is {key}. Remember it. {key} is the pass key."]
    return facts, "What is the pass key?", "The pass key is", f" {key}"


def multi_key(rng):
    keys = {name: rng.randrange(100, 1000) for name in rng.sample(THINGS, 4)}
    facts = [f"The {name} key is {key}. Remember it. {key} is the {name} key."
             for name, key in keys.items()]
    name = next(iter(keys))
    return facts, f"What is the {name} key?", f"The {name} key is", f" {keys[name]}"


def sums(rng):
    a, b = rng.randrange(1, 31), rng.randrange(1, 10)
    story = f"{rng.choice(PEOPLE)} has {a} {rng.choice(THINGS)}s and finds {b} more."
    return [], story, f"{a} + {b} =", f" {a + b}"


# Functions of random numbers to (facts to hide, the one that is asked for first; the question; what
# the answer begins with; the rest of it). Without facts, other cases of the task come before.
TASKS = {"pass key": pass_key, "multi-key": multi_key, "sums": sums}


def encoded(tokenizer, text):
    """The tokens of a text without those that begin one."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def text_rows(tokenizer, text, prefill, rows, tokens):
    """Windows [rows, prefill + n] of a text, n <= tokens.

    They overlap by their prefill, so that no token is scored twice.
    """
    start = tokenizer.encode("").ids
    ids = encoded(tokenizer, text)
    prefill -= len(start)
    n = min(tokens, (len(ids) - prefill) // rows) if rows > 0 else 0
    if n < 1:
        raise ValueError(f"a text of {len(ids)} tokens does not give {rows} rows after a prefill "
                         f"of {prefill}: use fewer --rows")
    return torch.tensor([start + ids[i * n : i * n + prefill + n] for i in range(rows)])


def paragraphs(text, task, rng):
    """Yields the story without end: a text from anywhere on, or examples of a task."""
    parts = [part for part in text.split("\n\n") if part.strip()]
    for i in count(rng.randrange(len(parts))):
        facts, question, opening, answer = TASKS[task](rng)
        yield parts[i % len(parts)] if facts else f"{question} {opening}{answer}."


def make_case(tokenizer, render, text, task, length, depth, rng, decoded):
    """A Case of about `length` tokens, length - ROOM of them prefilled.

    render   chat template: story and question are the user's, the answer is the assistant's;
             None: all is one text
    depth    0 .. 1, of the fact that is asked for; others lie anywhere
    decoded  is the question decoded? If not, its last token still is: the answer's first token
             must come through the cache too
    """

    def following(text):  # tokens of a text that does not begin one
        return encoded(tokenizer, "x" + text)[len(encoded(tokenizer, "x")) :]

    facts, question, opening, answer = TASKS[task](rng)
    content = f"{STORY}\n\n{question}"
    whole = render([{"role": "user", "content": content}]) if render else content + " "
    before, after = whole.split(STORY)
    start = tokenizer.encode(before, add_special_tokens=render is None).ids
    asked = following(after + opening)
    answer = following(after + opening + answer)[len(asked) :]
    split = 0 if decoded else len(asked) - 1
    hidden = [following("\n\n" + fact) for fact in facts]
    room = length - ROOM - len(start) - split - sum(map(len, hidden))
    if room < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for the {task} task: "
                         "use a larger --lengths")
    places = [depth] + [rng.random() for _ in hidden[1:]]
    source = paragraphs(text, task, rng)
    story = []
    ends = []  # of its paragraphs
    while len(story) < room:
        story += following("\n\n" + next(source))
        ends.append(len(story))
    extra = len(story) - room  # is cut off in front: an example before the question stays whole
    story, ends = story[extra:], [end - extra for end in ends if end > extra]
    cuts = [min(ends, key=lambda end: abs(end - place * room)) for place in places]
    for cut, fact in sorted(zip(cuts, hidden), reverse=True):  # places before stay the same
        story[cut:cut] = fact
    return Case(start + story + asked[:split], asked[split:] + answer, len(answer))
