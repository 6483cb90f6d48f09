"""What the caches read: windows of a text, and long prompts that hide facts."""
import torch

NAMES = ("apple arrow bell boat book bottle candle chair clock coat coin crown drum flower hammer "
         "kettle lamp mirror needle rope").split()
TASKS = {  # facts hidden in the prompt, a fact, the question that ends it, digits of the answer
    "pass key": (1, "The pass key is {key}. Remember it. {key} is the pass key.",
                 "What is the pass key? The pass key is", 5),
    "multi-key": (4, "Key {name}: {key}.",
                  "What is the value of {name}? The value of {name} is", 3),
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


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


def hide(tokenizer, text, task, length, depth, rng):
    """A prompt that hides facts between a text's paragraphs and asks for one of them.

    returns  (prompt, answer, depth): token lists of `length` together
    """

    def paragraph(text):  # with the blank line before it
        return encoded(tokenizer, "x\n\n" + text)[len(encoded(tokenizer, "x")) :]

    n_facts, fact, question, digits = TASKS[task]
    names = rng.sample(NAMES, n_facts)
    keys = [rng.randrange(10 ** (digits - 1), 10**digits) for _ in names]
    hidden = [paragraph(fact.format(name=name, key=key)) for name, key in zip(names, keys)]
    question = question.format(name=names[0])
    start = tokenizer.encode("").ids
    ask = paragraph(question)
    answer = paragraph(f"{question} {keys[0]}")[len(ask) :]
    room = length - len(start + ask + answer) - sum(map(len, hidden))
    if room < 0:
        raise ValueError(f"a prompt of {length} tokens has no room for the {task} task: "
                         "use a larger --lengths")
    story = [part for part in text.split("\n\n") if part.strip()]
    i = rng.randrange(len(story))
    filler = []
    ends = [0]  # of the paragraphs
    while len(filler) < room:
        filler = (filler + paragraph(story[i % len(story)]))[:room]
        ends.append(len(filler))
        i += 1
    places = [depth] + [rng.random() for _ in names[1:]]  # the fact that is asked for: at `depth`
    cuts = [min(ends, key=lambda end: abs(end - place * room)) for place in places]
    for cut, i in sorted(zip(cuts, range(n_facts)), reverse=True):  # places before stay the same
        filler[cut:cut] = hidden[i]
    return start + filler + ask, answer, depth
