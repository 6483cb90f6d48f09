"""Trains the small Llama of this folder on the stories that prepare.py turned into tokens.

    python train.py --out RUN --minutes 7       # RUN as written by prepare.py; the same command resumes a broken run

Seven rows of ten are windows of story text. The others make the model *use* its context: facts are hidden in story
text and asked for at the end. The loss counts answers ANSWER_WEIGHT times, facts and questions FACT_WEIGHT times (0:
else the model tells pass keys unasked). The first 60 % of the training run at 1,024 tokens, then three steps of four
at 4,096. The schedule is a function of time used / --minutes: the learning rate falls linearly to 0 on any machine.
Deliberately absent: several GPUs, gradient accumulation, document masks (packed documents see their predecessors).
"""
import argparse, json, math, random, time
from array import array
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

# A task: the fact (a paragraph among the story's), the question (the last paragraph), the answer that continues it.
PASSKEY = ("The pass key is {key}. Remember it. {key} is the pass key.",  # key: 10000 .. 99999
           "What is the pass key? The pass key is", "{key}.")
HIDDEN = ("{name} hid the {thing} in the {place}.",
          "Where did {name} hide the {thing}? {name} hid the {thing} in the", "{place}.")
LIST = ("Key {thing}: {value}.", "What is the value of {thing}? The value of {thing} is", "{value}.")
SONG = "The old song goes:"  # a paragraph before the song and before its repetition
PROMPTS = "Once upon a time there was a", "The old man opened the door and", '"Where are you going?" asked'
NAMES = "Alice Anna Arthur Ben Clara Daniel Emily Frank Grace Harry Helen Jack Jane Joe Kate Lucy Mary Tom".split()
THINGS = """apple arrow axe bag ball bell boat book boot bottle bow box bread brush button cake candle chain chair
    clock coat coin cup doll dress drum fan flag flower fork glove hammer hat horn jar key knife lamp letter map mirror
    needle paper pen pipe plate purse ring rope shell shoe spoon stone sword table""".split()
PLACES = "barn castle cave church cottage forest garden kitchen library mill palace pond school ship shop".split()
BOS, EOS, HEAD, SHORT, LONG, MASK = 1, 2, 64, 1024, 4096, 4096  # MASK: the vocabulary
SYNTHETIC, ANSWER_WEIGHT, FACT_WEIGHT, WARM_UP, DROPOUT, WORKERS = 0.3, 8, 0, 200, 0.1, 6  # workers: of each length
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=MASK, hidden_size=256, intermediate_size=768,
    num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD, hidden_act="silu",
    rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=LONG, tie_word_embeddings=True,
    bos_token_id=BOS, eos_token_id=EOS, torch_dtype="bfloat16")


class Rows(torch.utils.data.IterableDataset):
    """Endless batches [B, T] of int16 tokens, from a seed per worker; answers negated, facts and questions + MASK."""

    def __init__(self, tokens, tok, length, seed, batch_tokens=0):
        self.tokens, self.tok, self.length, self.seed = array("h", tokens.tolist()), tok, length, seed
        self.gap, self.rng, self.rows = tok.token_to_id("\n\n"), random.Random(seed), batch_tokens // (length - 1)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        self.rng = random.Random(f"{self.seed} {self.length} {worker.id if worker else 0}")
        while True:
            rows = (self.packed_row() if self.rng.random() < SYNTHETIC else self.document(self.length)
                    for _ in range(self.rows))
            yield torch.stack([torch.frombuffer(row, dtype=torch.int16) for row in rows])

    def text(self, n):
        start = self.tokens.index(self.gap, self.rng.randrange(len(self.tokens) - n - 8192)) + 1
        return self.tokens[start:start + n]

    def packed_row(self):
        """Documents of 256 tokens to a whole row, one after the other."""
        row = array("h")
        while room := self.length - len(row):
            n = room if self.rng.random() < 0.5 else int(256 * max(1, room / 256) ** self.rng.random())
            kind = self.rng.choices((PASSKEY, HIDDEN, LIST, SONG), (4, 2, 2, 2))[0]
            row += self.document(room) if room < 256 else self.document(n, *self.task(n, kind))
        return row

    def say(self, text, answer=False):
        """Tokens of an answer, which continues a line, or of a fact or question, which is a paragraph."""
        ids = self.tok.encode(text if answer else "\n\n" + text, add_special_tokens=False).ids
        return array("h", [-i for i in ids] if answer else [i + MASK for i in ids[1:]])  # ids[0]: a lone space

    def task(self, n, kind):
        """Facts to hide in a document of n tokens, and pairs of question and answer."""
        rng, say = self.rng, self.say
        if kind is SONG:
            cue, song = say(SONG) + array("h", [self.gap]), self.text(rng.randint(24, min(512, n // 4)))
            return [cue + song], [(cue, song)]
        if kind is PASSKEY:
            items = [dict(key=rng.randint(10000, 99999))]
        elif kind is HIDDEN:
            words = zip(*(rng.sample(w, 4) for w in (NAMES, THINGS, PLACES)))
            items = [dict(zip(("name", "thing", "place"), w)) for w in words][:rng.randint(1, 4)]
        else:
            things = rng.sample(THINGS, rng.randint(4, min(40, n // 24)))
            items = [dict(thing=thing, value=rng.randint(100, 999)) for thing in things]
        facts, asked = [kind[0].format(**i) for i in items], rng.sample(items, rng.randint(1, min(4, len(items))))
        return ([say(fact) for fact in ([" ".join(facts)] if kind is LIST else facts)],
                [(say(kind[1].format(**i)), say(kind[2].format(**i), answer=True)) for i in asked])

    def document(self, n, facts=(), asks=()):
        """n tokens: BOS, story with the facts between its paragraphs at random depths, questions and answers, EOS."""
        end = array("h", [EOS] * bool(asks))  # plain story just breaks off
        story = self.text(n - 1 - sum(map(len, facts)) - sum(len(q) + len(a) for q, a in asks) - len(end))
        ends = [i for i, token in enumerate(story) if token == self.gap] + [len(story)]
        ids, at = array("h", [BOS]), 0
        for fact, cut in zip(facts, sorted(self.rng.choices(ends, k=len(facts)))):
            ids, at = ids + story[at:cut] + fact, cut
        return sum((q + a for q, a in asks), ids + story[at:]) + end


def initial_weights():
    """Hugging Face's names and shapes for LlamaForCausalLM (lm_head is tied to embed_tokens); projections [out, in]."""
    C, M, V, L = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    q, kv = CONFIG["num_attention_heads"] * HEAD, CONFIG["num_key_value_heads"] * HEAD
    layer = {"input_layernorm": (C,), "self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C),
             "self_attn.v_proj": (kv, C), "self_attn.o_proj": (C, q), "post_attention_layernorm": (C,),
             "mlp.gate_proj": (M, C), "mlp.up_proj": (M, C), "mlp.down_proj": (C, M)}
    shapes = {"embed_tokens": (V, C), "norm": (C,)} | {f"layers.{i}.{n}": s for i in range(L) for n, s in layer.items()}
    std = lambda n: 0.02 / (math.sqrt(2 * L) if n.endswith(("o_proj", "down_proj")) else 1)
    return {f"model.{n}.weight": torch.randn(s) * std(n) if len(s) == 2 else torch.ones(s) for n, s in shapes.items()}


@torch.compile(dynamic=False)  # one layer, not the model: compiled once per length and shared by all layers
def layer(x, w, cos, sin, dropout):
    """x [B, T, C]; w: the layer's weights by short name."""
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], w[name], CONFIG["rms_norm_eps"])
    h = norm(x, "input_layernorm")
    q, k, v = (F.linear(h, w[f"self_attn.{n}_proj"]).unflatten(-1, (-1, HEAD)).transpose(1, 2) for n in "qkv")
    q, k = ((y * cos + torch.cat((-y[..., HEAD // 2:], y[..., :HEAD // 2]), -1) * sin).to(v) for y in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, H, T, D]
    x = x + F.dropout(F.linear(y.transpose(1, 2).flatten(2), w["self_attn.o_proj"]), dropout, dropout > 0)
    h = norm(x, "post_attention_layernorm")
    y = F.linear(F.silu(F.linear(h, w["mlp.gate_proj"])) * F.linear(h, w["mlp.up_proj"]), w["mlp.down_proj"])
    return x + F.dropout(y, dropout, dropout > 0)


def hidden(w, ids, dropout=0.0):
    """Tokens [B, T] to final hidden states [B, T, C]; logits are hidden @ embed_tokens.T."""
    frequency = CONFIG["rope_theta"] ** -(torch.arange(0, HEAD, 2, device=ids.device) / HEAD)
    angle = torch.outer(torch.arange(ids.shape[1], device=ids.device), frequency).repeat(1, 2)  # [T, D]
    x = F.embedding(ids, w["model.embed_tokens.weight"])
    if torch.is_autocast_enabled(x.device.type):
        x = x.bfloat16()  # else autocast keeps the residual stream in float32: twice the bytes everywhere
    for i in range(CONFIG["num_hidden_layers"]):
        own = f"model.layers.{i}."
        own = {n[len(own):-len(".weight")]: p for n, p in w.items() if n.startswith(own)}
        x = layer(x, own, angle.cos(), angle.sin(), dropout)
    return F.rms_norm(x, x.shape[-1:], w["model.norm.weight"], CONFIG["rms_norm_eps"])


@torch.compile(dynamic=False)
def token_losses(h, embedding, target):
    return F.cross_entropy(F.linear(h, embedding).float().flatten(0, 1), target.flatten(), reduction="none")


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def evaluate(w, data, tok, seed, trials, rows):
    """Perplexity in rows of 1,024 tokens and the share of pass keys found in held-out text, in the weights' dtype."""
    embedding, report = w["model.embed_tokens.weight"], {}
    for name, ids in data.items():
        if name != "held_back":
            ids = F.pad(ids[:len(ids) // 1023 * 1023].view(-1, 1023), (1, 0), value=BOS)
        ids = ids[::-(-len(ids) // rows)].to(embedding.device, torch.long)
        losses = [token_losses(hidden(w, x[:, :-1]), embedding, x[:, 1:]) for x in ids.split(8)]
        report[name] = round(math.exp(torch.cat(losses).mean().item()), 3)
    for length in (1024, 2048, 4096):
        source, found = Rows(data["held_out"], tok, length, seed), 0
        for _ in range(trials):  # greedy decoding finds a key just when every digit is the argmax after the true ones
            x = torch.tensor([list(source.document(length, *source.task(length, PASSKEY)))], device=embedding.device)
            best = F.linear(hidden(w, x[:, :-1].abs() % MASK), embedding).argmax(-1)
            found += ((best == -x[:, 1:]) | (x[:, 1:] > 0)).all().item()
        report[f"passkey {length}"] = round(found / trials, 4)
    return report


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def sample(w, tok, prompt, n=160, temperature=0.8):
    embedding = w["model.embed_tokens.weight"]
    ids = torch.tensor([tok.encode(prompt).ids], device=embedding.device)
    for _ in range(n):
        p = F.softmax(F.linear(hidden(w, ids)[:, -1], embedding) / temperature, -1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return tok.decode(ids[0].tolist())


def save(w, out):
    save_file({n: p.detach().bfloat16() for n, p in w.items()}, out / "model.safetensors", metadata={"format": "pt"})
    for name, value in dict(config=CONFIG, generation_config=dict(bos_token_id=BOS, eos_token_id=EOS)).items():
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", type=Path, required=True, help="the folder that prepare.py wrote; gets the model as well")
    ap.add_argument("--minutes", type=float, default=7, help="duration of the training, without the last evaluation")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--batch", type=int, default=131072, help="tokens of a step")
    ap.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    ap.add_argument("--init", type=Path, help="model.safetensors to start from, instead of random weights")
    args, start = ap.parse_args(), time.perf_counter()
    data, tok = load_file(args.out / "tokens.safetensors"), Tokenizer.from_file(str(args.out / "tokenizer.json"))
    device, checkpoint = "cuda" if torch.cuda.is_available() else "cpu", args.out / "state.pt"
    torch.manual_seed(args.seed)
    saved = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else {}
    w = saved.get("weights") or (load_file(args.init) if args.init else initial_weights())
    w = {n: p.detach().to(device, torch.float32).requires_grad_() for n, p in w.items()}
    groups = [dict(params=[p for p in w.values() if p.dim() == d], weight_decay=(d - 1) * 0.1) for d in (1, 2)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    state = saved.get("state", dict(step=0, tokens=0, seconds=0.0, log=[]))
    seed, start = args.seed + state["step"], start - state["seconds"]  # a resumed run draws other rows, other dropout
    torch.manual_seed(seed)
    batches = {T: iter(torch.utils.data.DataLoader(Rows(data["train"], tok, T + 1, seed, args.batch), batch_size=None,
                                                   num_workers=WORKERS, pin_memory=True)) for T in (SHORT, LONG)}
    printed, stored = dict(state), state["seconds"]
    while (progress := state["seconds"] / 60 / args.minutes) < 1:
        T = LONG if progress > 0.6 and state["step"] % 4 else SHORT
        x = next(batches[T]).to(device, torch.long, non_blocking=True)  # [B, T + 1]
        weight = 1.0 + (ANSWER_WEIGHT - 1) * (x < 0) + (FACT_WEIGHT - 1) * (x >= MASK)
        weight, x = weight[:, 1:].flatten(), x.abs() % MASK
        with torch.autocast(device, torch.bfloat16):
            h = hidden(w, x[:, :-1], DROPOUT)
            loss = (token_losses(h, w["model.embed_tokens.weight"], x[:, 1:]) * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (state["step"] + 1) / WARM_UP) * (1 - progress)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        state |= dict(step=state["step"] + 1, tokens=state["tokens"] + args.batch, seconds=seconds)
        if seconds - printed["seconds"] > 10:
            speed = (state["tokens"] - printed["tokens"]) / (seconds - printed["seconds"])
            report = dict(step=state["step"], length=T, loss=round(loss.item(), 4), tokens_per_s=round(speed))
            print(report, f"ETA {60 * args.minutes - seconds:.0f} s", flush=True)
            printed = dict(state, log=state["log"].append(report))
        if seconds - stored > 60:
            stored = seconds
            save(w, args.out)
            torch.save(dict(weights=w, optimizer=optimizer.state_dict(), state=state), args.out / "state.tmp")
            (args.out / "state.tmp").replace(checkpoint)  # never a half-written one
            print(report := evaluate(w, data, tok, args.seed, trials=8, rows=64), flush=True)
            state["log"].append(report)
    save(w, args.out)
    w = {n: p.to(device, torch.float32) for n, p in load_file(args.out / "model.safetensors").items()}  # as shipped
    state |= dict(final=evaluate(w, data, tok, args.seed, trials=128, rows=500), torch=torch.__version__,
                  samples=[sample(w, tok, prompt) for prompt in PROMPTS])
    (args.out / "log.json").write_text(json.dumps(state, indent=1) + "\n")
    print(state["final"], *state["samples"], sep="\n\n")


if __name__ == "__main__":
    main()
