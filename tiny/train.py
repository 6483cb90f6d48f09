"""Trains the small Llama of this folder on the stories that prepare.py turned into tokens.

    python tiny/train.py --out RUN --minutes 7    # RUN as written by prepare.py

The same command resumes a broken run. Seven rows of ten are windows of story text. The others make
the model *use* its context: facts are hidden in story text and asked for at the end. The loss
counts answers ANSWER_WEIGHT times, facts and questions FACT_WEIGHT times (0: else the model tells
pass keys unasked). The first 60 % of the training run at 1,024 tokens, then three steps of four at
4,096. The schedule is a function of time used / --minutes: the learning rate falls linearly to 0 on
any machine. Deliberately absent: several GPUs, gradient accumulation, document masks (packed
documents see their predecessors).
"""
import argparse
import json
import math
import random
import sys
import time
from array import array
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate  # noqa: E402
from checkpoint.config import ModelConfig  # noqa: E402
from checkpoint.text import load_tokenizer  # noqa: E402
from checkpoint.weights import _targets  # noqa: E402
from model import Transformer  # noqa: E402

# A task: the fact, a paragraph among the story's; the question, the last paragraph; the answer that
# continues it. Keys are 10000 .. 99999.
PASSKEY = (
    "The pass key is {key}. Remember it. {key} is the pass key.",
    "What is the pass key? The pass key is",
    "{key}.",
)
HIDDEN = (
    "{name} hid the {thing} in the {place}.",
    "Where did {name} hide the {thing}? {name} hid the {thing} in the",
    "{place}.",
)
LIST = (
    "Key {thing}: {value}.",
    "What is the value of {thing}? The value of {thing} is",
    "{value}.",
)
SONG = "The old song goes:"  # a paragraph before the song and before its repetition
PROMPTS = [
    "Once upon a time there was a",
    "The old man opened the door and",
    '"Where are you going?" asked',
]
NAMES = """Alice Anna Arthur Ben Clara Daniel Emily Frank Grace Harry Helen Jack Jane Joe Kate Lucy
    Mary Tom""".split()
THINGS = """apple arrow axe bag ball bell boat book boot bottle bow box bread brush button cake
    candle chain chair clock coat coin cup doll dress drum fan flag flower fork glove hammer hat
    horn jar key knife lamp letter map mirror needle paper pen pipe plate purse ring rope shell shoe
    spoon stone sword table""".split()
PLACES = """barn castle cave church cottage forest garden kitchen library mill palace pond school
    ship shop""".split()
BOS = 1
EOS = 2
MASK = 4096  # the vocabulary; added to the tokens of facts and questions
SHORT = 1024
LONG = 4096
SYNTHETIC = 0.3  # share of rows with tasks
ANSWER_WEIGHT = 8
FACT_WEIGHT = 0
SEED = 1
LEARNING_RATE = 2e-3
WARM_UP = 200  # steps
DROPOUT = 0.1
WORKERS = 6  # for rows of each length


class Rows(IterableDataset):
    """Endless batches [B, T] of int16 tokens, from a seed per worker.

    Tokens of answers are negated; those of facts and questions are + MASK.
    """

    def __init__(self, tokens, tok, length, seed=SEED, n_rows=1):
        self.tokens = array("h", tokens.tolist())
        self.tok = tok
        self.length = length
        self.seed = seed
        self.n_rows = n_rows
        self.gap = tok.token_to_id("\n\n")
        self.rng = random.Random(seed)

    def __iter__(self):
        worker = get_worker_info()
        self.rng = random.Random(f"{self.seed} {self.length} {worker.id}")
        while True:
            yield torch.tensor([self.row() for _ in range(self.n_rows)], dtype=torch.int16)

    def row(self):
        """Plain story text, or documents of 256 tokens to a whole row, one after the other."""
        if self.rng.random() >= SYNTHETIC:
            return self.document(self.length)
        row = []
        while room := self.length - len(row):
            n = room
            if self.rng.random() >= 0.5:
                n = int(256 * max(1, room / 256) ** self.rng.random())
            kind = self.rng.choices((PASSKEY, HIDDEN, LIST, SONG), (4, 2, 2, 2))[0]
            row += self.document(room) if room < 256 else self.document(n, *self.task(n, kind))
        return row

    def text(self, n):
        """n tokens of the stories, from a paragraph's start."""
        place = self.rng.randrange(len(self.tokens) - n - 8192)
        start = self.tokens.index(self.gap, place) + 1
        return self.tokens[start : start + n].tolist()

    def answer(self, text):
        """Tokens of an answer, which continues a line."""
        return [-i for i in self.tok.encode(text, add_special_tokens=False).ids]

    def paragraph(self, text):
        """Tokens of a fact or question."""
        ids = self.tok.encode("\n\n" + text, add_special_tokens=False).ids
        return [i + MASK for i in ids[1:]]  # ids[0]: a lone space

    def task(self, n, kind):
        """Facts to hide in a document of n tokens, and pairs of question and answer."""
        rng = self.rng
        if kind is SONG:
            cue = [*self.paragraph(SONG), self.gap]
            song = self.text(rng.randint(24, min(512, n // 4)))
            return [cue + song], [(cue, song)]
        if kind is PASSKEY:
            items = [{"key": rng.randint(10000, 99999)}]
        elif kind is HIDDEN:
            words = zip(*(rng.sample(known, 4) for known in (NAMES, THINGS, PLACES)))
            items = [dict(zip(("name", "thing", "place"), three)) for three in words]
            items = items[: rng.randint(1, 4)]
        else:
            things = rng.sample(THINGS, rng.randint(4, min(40, n // 24)))
            items = [{"thing": thing, "value": rng.randint(100, 999)} for thing in things]
        fact, question, answer = kind
        facts = [fact.format(**item) for item in items]
        if kind is LIST:
            facts = [" ".join(facts)]
        asks = [
            (self.paragraph(question.format(**item)), self.answer(answer.format(**item)))
            for item in rng.sample(items, rng.randint(1, min(4, len(items))))
        ]
        return [self.paragraph(fact) for fact in facts], asks

    def document(self, n, facts=(), asks=()):
        """n tokens: BOS, story with facts at random depths, questions and answers, EOS."""
        tail = [token for ask in asks for part in ask for token in part]
        tail += [EOS] if asks else []  # plain story just breaks off
        story = self.text(n - 1 - sum(map(len, facts)) - len(tail))
        ends = [i for i, token in enumerate(story) if token == self.gap] + [len(story)]
        row, start = [BOS], 0
        for fact, end in zip(facts, sorted(self.rng.choices(ends, k=len(facts)))):
            row += story[start:end] + fact
            start = end
        return row + story[start:] + tail


def drop(module, inputs, output):
    """A hook on what a residual branch adds."""
    return F.dropout(output, DROPOUT)


def narrow(module, inputs, output):
    """A hook: autocast would keep the residual stream in float32, twice the bytes everywhere."""
    return output.bfloat16()


def new_model(folder, device):
    """The model of a folder's config.json with random float32 weights, ready to be trained."""
    model = Transformer(ModelConfig.from_folder(folder)).to(device)
    model.head.weight = model.embed.weight
    model.set_rope()
    into_residual = 0.02 / math.sqrt(2 * len(model.layers))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)
        else:
            last = name.endswith(("wo.weight", "w_out.weight"))
            nn.init.normal_(weight, std=into_residual if last else 0.02)
    model.embed.register_forward_hook(narrow)
    for layer in model.layers:
        layer.attention.wo.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
        layer.compile(dynamic=False)  # not the model: one compilation a length serves all layers
    return model


@torch.compile(dynamic=False)
def losses(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def mean_loss(model, x):
    """The weighted loss of rows x [B, T + 1] as `Rows` makes them."""
    weight = 1.0 + (ANSWER_WEIGHT - 1) * (x < 0) + (FACT_WEIGHT - 1) * (x >= MASK)
    weight = weight[:, 1:].flatten()
    x = x.abs() % MASK
    with torch.autocast(x.device.type, torch.bfloat16):
        logits = model(x[:, :-1])
    return (losses(logits, x[:, 1:]) * weight).sum() / weight.sum()


def save(model, out):
    """Writes the weights in bfloat16 under the names that a checkpoint has for them."""
    tensors = {
        name: torch.cat(target.views).bfloat16() for name, target in _targets(model).items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def evaluate(model, tok, data, trials, rows):
    """Perplexity in rows of 1,024 tokens, and the share of pass keys found in held-out text."""
    device = model.embed.weight.device
    report = {}
    for name, ids in data.items():
        if name != "held_back":  # which is rows already
            ids = ids[: len(ids) // 1023 * 1023].view(-1, 1023)
            ids = F.pad(ids, (1, 0), value=BOS)
        ids = ids[:: -(-len(ids) // rows)].to(device, torch.long)
        parts = [
            F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:], reduction="none") for x in ids.split(8)
        ]
        report[name] = round(torch.cat(parts).mean().exp().item(), 3)
    for length in (1024, 2048, 4096):
        source = Rows(data["held_out"], tok, length)
        found = 0
        for _ in range(trials):
            row = source.document(length, *source.task(length, PASSKEY))
            x = torch.tensor([row], device=device)
            # Greedy decoding finds a key just when every digit is the argmax after the true ones.
            best = model(x[:, :-1].abs() % MASK).argmax(-1)
            found += ((best == -x[:, 1:]) | (x[:, 1:] > 0)).all().item()
        report[f"passkey {length}"] = round(found / trials, 4)
    return report


def sample(model, tok, prompt):
    ids = generate.generate(model, [tok.encode(prompt).ids], 160, 0.8, kv="bf16", stop=())
    return tok.decode(ids[0])


def start(out, device):
    """Model, optimizer and state, new or those of the broken run in the folder."""
    torch.manual_seed(SEED)
    model = new_model(out, device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((1, 0), (2, 0.1))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    state = {"step": 0, "seconds": 0.0, "log": []}
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    return model, optimizer, state


def store(out, model, optimizer, state):
    """Writes what `start` reads, and never half of it."""
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    torch.save(saved, out / "state.tmp")
    (out / "state.tmp").replace(out / "state.pt")


def update(model, optimizer, x, rate):
    """One step on the rows x at a learning rate: the loss."""
    loss = mean_loss(model, x)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss


def train(out, device, minutes, batch, tok, data):
    """Trains for some minutes in steps of `batch` tokens: the state at the end."""
    model, optimizer, state = start(out, device)
    begin = time.perf_counter() - state["seconds"]
    seed = SEED + state["step"]  # a resumed run draws other rows, other dropout
    torch.manual_seed(seed)
    batches = {}
    for length in (SHORT, LONG):
        rows = Rows(data["train"], tok, length + 1, seed, batch // length)
        loader = DataLoader(rows, None, num_workers=WORKERS, pin_memory=device == "cuda")
        batches[length] = iter(loader)
    printed = stored = state["seconds"]
    printed_step = state["step"]
    while (progress := state["seconds"] / 60 / minutes) < 1:
        length = LONG if progress > 0.6 and state["step"] % 4 else SHORT
        x = next(batches[length]).to(device, torch.long, non_blocking=True)  # [B, length + 1]
        state["step"] += 1
        rate = LEARNING_RATE * min(1, state["step"] / WARM_UP) * (1 - progress)
        loss = update(model, optimizer, x, rate)
        seconds = state["seconds"] = time.perf_counter() - begin
        if seconds - printed > 10:
            speed = round((state["step"] - printed_step) * batch / (seconds - printed))
            report = {"step": state["step"], "length": length, "loss": round(loss.item(), 4)}
            state["log"].append({**report, "tokens_per_s": speed})
            print(state["log"][-1], f"ETA {60 * minutes - seconds:.0f} s", flush=True)
            printed, printed_step = seconds, state["step"]
        if seconds - stored > 60:
            stored = seconds
            save(model, out)
            store(out, model, optimizer, state)
            state["log"].append(evaluate(*generate.load(out, device), data, trials=8, rows=64))
            print(state["log"][-1], flush=True)
    save(model, out)
    return state


def main():
    parser = argparse.ArgumentParser(description="trains the model of tiny/")
    parser.add_argument("--out", type=Path, required=True,
                        help="the folder that prepare.py wrote; gets the model as well")
    parser.add_argument("--minutes", type=float, default=7,
                        help="duration of the training, without the last evaluation")
    parser.add_argument("--batch", type=int, default=131072, help="tokens of a step")
    args = parser.parse_args()
    out = args.out
    data = load_file(out / "tokens.safetensors")
    tok = load_tokenizer(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = train(out, device, args.minutes, args.batch, tok, data)
    model, _ = generate.load(out, device)  # as shipped
    state["final"] = evaluate(model, tok, data, trials=128, rows=500)
    state["torch"] = torch.__version__
    state["samples"] = [sample(model, tok, prompt) for prompt in PROMPTS]
    (out / "log.json").write_text(json.dumps(state, indent=1) + "\n")
    print(state["final"], *state["samples"], sep="\n\n")


if __name__ == "__main__":
    main()
