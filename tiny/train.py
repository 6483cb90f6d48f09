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
from tokenizers import Tokenizer
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate  # noqa: E402

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
LEARNING_RATE = 2e-3
WARM_UP = 200  # steps
DROPOUT = 0.1
WORKERS = 6  # for rows of each length
DIM = 256
MLP_DIM = 768
N_LAYERS = 8
N_HEADS = 4
N_KV_HEADS = 2
HEAD_DIM = 64
NORM_EPS = 1e-5
ROPE_THETA = 10000.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": MASK,
    "hidden_size": DIM,
    "intermediate_size": MLP_DIM,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": NORM_EPS,
    "rope_theta": ROPE_THETA,
    "max_position_embeddings": LONG,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {"bos_token_id": BOS, "eos_token_id": EOS}


class Rows(torch.utils.data.IterableDataset):
    """Endless batches [B, T] of int16 tokens, from a seed per worker.

    Tokens of answers are negated; those of facts and questions are + MASK.
    """

    def __init__(self, tokens, tok, length, seed, n_rows=1):
        self.tokens = array("h", tokens.tolist())
        self.tok = tok
        self.length = length
        self.seed = seed
        self.n_rows = n_rows
        self.gap = tok.token_to_id("\n\n")
        self.rng = random.Random(seed)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
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


def initial_weights():
    """Hugging Face's names and shapes for LlamaForCausalLM, projections [out, in].

    lm_head is tied to embed_tokens.
    """
    shapes = {
        "input_layernorm": (DIM,),
        "self_attn.q_proj": (N_HEADS * HEAD_DIM, DIM),
        "self_attn.k_proj": (N_KV_HEADS * HEAD_DIM, DIM),
        "self_attn.v_proj": (N_KV_HEADS * HEAD_DIM, DIM),
        "self_attn.o_proj": (DIM, N_HEADS * HEAD_DIM),
        "post_attention_layernorm": (DIM,),
        "mlp.gate_proj": (MLP_DIM, DIM),
        "mlp.up_proj": (MLP_DIM, DIM),
        "mlp.down_proj": (DIM, MLP_DIM),
    }
    w = {
        "model.embed_tokens.weight": 0.02 * torch.randn(MASK, DIM),
        "model.norm.weight": torch.ones(DIM),
    }
    for i in range(N_LAYERS):
        for name, shape in shapes.items():
            if len(shape) == 1:
                x = torch.ones(shape)
            else:
                into_residual = name.endswith(("o_proj", "down_proj"))
                x = torch.randn(shape) * 0.02 / (math.sqrt(2 * N_LAYERS) if into_residual else 1)
            w[f"model.layers.{i}.{name}.weight"] = x
    return w


def norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, NORM_EPS)


@torch.compile(dynamic=False)  # one layer, not the model: compiled once per length
def layer(x, w, cos, sin):
    """x [B, T, C]; w: the layer's weights by short name; cos, sin [T, D]."""
    h = norm(x, w["input_layernorm"])
    heads = (F.linear(h, w[f"self_attn.{name}_proj"]).unflatten(-1, (-1, HEAD_DIM)) for name in "qkv")
    q, k, v = (y.transpose(1, 2) for y in heads)  # [B, H or Hk, T, D]
    q, k = rotate(q, cos, sin).to(v), rotate(k, cos, sin).to(v)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = F.linear(y.transpose(1, 2).flatten(2), w["self_attn.o_proj"])
    x = x + F.dropout(y, DROPOUT)
    h = norm(x, w["post_attention_layernorm"])
    h = F.silu(F.linear(h, w["mlp.gate_proj"])) * F.linear(h, w["mlp.up_proj"])
    return x + F.dropout(F.linear(h, w["mlp.down_proj"]), DROPOUT)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def hidden(w, ids):
    """Tokens [B, T] to final hidden states [B, T, C]; logits are hidden @ embed_tokens.T."""
    t = torch.arange(ids.shape[1], device=ids.device)
    frequency = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2, device=ids.device) / HEAD_DIM)
    angle = torch.outer(t, frequency).repeat(1, 2)  # [T, D]
    # Else autocast keeps the residual stream in float32: twice the bytes everywhere.
    x = F.embedding(ids, w["model.embed_tokens.weight"]).bfloat16()
    for i in range(N_LAYERS):
        prefix = f"model.layers.{i}."
        own = {
            name.removeprefix(prefix).removesuffix(".weight"): p
            for name, p in w.items()
            if name.startswith(prefix)
        }
        x = layer(x, own, angle.cos(), angle.sin())
    return norm(x, w["model.norm.weight"])


@torch.compile(dynamic=False)
def token_losses(h, embedding, target):
    logits = F.linear(h, embedding).float()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")


def mean_loss(w, x):
    """The weighted loss of rows x [B, T + 1] as `Rows` makes them."""
    weight = 1.0 + (ANSWER_WEIGHT - 1) * (x < 0) + (FACT_WEIGHT - 1) * (x >= MASK)
    weight = weight[:, 1:].flatten()
    ids = x.abs() % MASK
    with torch.autocast(x.device.type, torch.bfloat16):
        h = hidden(w, ids[:, :-1])
        losses = token_losses(h, w["model.embed_tokens.weight"], ids[:, 1:])
        return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def evaluate(model, tok, data, seed, trials, rows):
    """Perplexity in rows of 1,024 tokens, and the share of pass keys found in held-out text."""
    device = model.embed.weight.device
    report = {}
    for name, ids in data.items():
        if name != "held_back":  # which is rows already
            ids = ids[: len(ids) // 1023 * 1023].view(-1, 1023)
            ids = F.pad(ids, (1, 0), value=BOS)
        ids = ids[:: -(-len(ids) // rows)].to(device, torch.long)
        losses = [
            F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:], reduction="none") for x in ids.split(8)
        ]
        report[name] = round(math.exp(torch.cat(losses).mean().item()), 3)
    for length in (1024, 2048, 4096):
        source = Rows(data["held_out"], tok, length, seed)
        found = 0
        for _ in range(trials):
            row = source.document(length, *source.task(length, PASSKEY))
            x = torch.tensor([row], device=device)
            # Greedy decoding finds a key just when every digit is the argmax after the true ones.
            best = model(x[:, :-1].abs() % MASK).argmax(-1)
            found += ((best == -x[:, 1:]) | (x[:, 1:] > 0)).all().item()
        report[f"passkey {length}"] = round(found / trials, 4)
    return report


def save(w, out):
    """Writes the model to the folder, in bfloat16."""
    tensors = {name: p.detach().bfloat16() for name, p in w.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name, value in (("config", CONFIG), ("generation_config", GENERATION_CONFIG)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def start(out, seed, device):
    """Weights, optimizer and state, new or those of the broken run in the folder."""
    torch.manual_seed(seed)
    w = {name: p.to(device).requires_grad_() for name, p in initial_weights().items()}
    groups = [
        {"params": [p for p in w.values() if p.dim() == 1], "weight_decay": 0},
        {"params": [p for p in w.values() if p.dim() == 2], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    state = {"step": 0, "seconds": 0.0, "log": []}
    if (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", map_location=device, weights_only=True)
        for name, p in w.items():
            p.data = saved["weights"][name]
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    return w, optimizer, state


def store(out, w, optimizer, state):
    """Writes what `start` reads, and never half of it."""
    weights = {name: p.detach() for name, p in w.items()}
    saved = {"weights": weights, "optimizer": optimizer.state_dict(), "state": state}
    torch.save(saved, out / "state.tmp")
    (out / "state.tmp").replace(out / "state.pt")


def note(state, report):
    print(report, flush=True)
    state["log"].append(report)


def update(w, optimizer, x, rate):
    """One step on the rows x at a learning rate: the loss."""
    loss = mean_loss(w, x)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss


def train(out, minutes, seed, batch):
    """Trains for some minutes, in steps of `batch` tokens."""
    begin = time.perf_counter()
    data = load_file(out / "tokens.safetensors")
    tok = Tokenizer.from_file(str(out / "tokenizer.json"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w, optimizer, state = start(out, seed, device)
    begin -= state["seconds"]
    run_seed = seed + state["step"]  # a resumed run draws other rows, other dropout
    torch.manual_seed(run_seed)
    batches = {}
    for length in (SHORT, LONG):
        rows = Rows(data["train"], tok, length + 1, run_seed, batch // length)
        loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=WORKERS,
                                             pin_memory=device == "cuda")
        batches[length] = iter(loader)
    printed_step, printed = state["step"], state["seconds"]
    stored = state["seconds"]
    while (progress := state["seconds"] / 60 / minutes) < 1:
        length = LONG if progress > 0.6 and state["step"] % 4 else SHORT
        x = next(batches[length]).to(device, torch.long, non_blocking=True)  # [B, length + 1]
        state["step"] += 1
        rate = LEARNING_RATE * min(1, state["step"] / WARM_UP) * (1 - progress)
        loss = update(w, optimizer, x, rate)
        seconds = state["seconds"] = time.perf_counter() - begin
        if seconds - printed > 10:
            speed = (state["step"] - printed_step) * batch / (seconds - printed)
            printed_step, printed = state["step"], seconds
            note(state, {"step": state["step"], "length": length, "loss": round(loss.item(), 4),
                         "tokens_per_s": round(speed), "left_s": round(60 * minutes - seconds)})
        if seconds - stored > 60:
            stored = seconds
            save(w, out)
            store(out, w, optimizer, state)
            model, _ = generate.load(out, device)
            note(state, evaluate(model, tok, data, seed, trials=8, rows=64))
    save(w, out)
    return state


def finish(out, seed, state):
    """Measures the model as it is shipped, and writes log.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description="trains the model of tiny/")
    parser.add_argument("--out", type=Path, required=True,
                        help="the folder that prepare.py wrote; gets the model as well")
    parser.add_argument("--minutes", type=float, default=7,
                        help="duration of the training, without the last evaluation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=131072, help="tokens of a step")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
