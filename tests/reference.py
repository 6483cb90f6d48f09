"""What several files of tests use: tiny checkpoints, and a Llama that shares no code with model.py.

`RefKivi` and `ref_llama` follow the official order of KIVI token by token, on Python lists.
"""
import json
import math
import re
from pathlib import Path

import torch
from make_golden import LLAMA as GOLDEN_LLAMA, write_checkpoint
from reference_cache import attention64, fake_quantized
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"kv": "kivi2", "group_size": 16, "residual": 32}  # a short text already flushes
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "hidden_act": "silu",
}
BIG_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
FAMILIES = {  # changes of config.json
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama 3.1": {"rope_scaling": BIG_ROPE, "rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                "sliding_window": None},
    "qwen 2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen 3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads": {"num_key_value_heads": 4, "head_dim": 16},
}


# ---- checkpoints --------------------------------------------------------------------------------

def byte_tokenizer(bos=True):
    """Bytes as tokens 0 .. 255, as GPT-2, Llama 3 and Qwen have them; <s> is 256, </s> is 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def random_weights(c):
    """Tensors for the config.json `c`, always the same ones."""
    generator = torch.Generator().manual_seed(7)
    dim, hidden, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    architecture = c["architectures"][0]
    weights = {}

    def linear(name, rows, columns, gain=1.0, bias=False):
        x = torch.randn(rows, columns, generator=generator)
        weights[f"{name}.weight"] = x * gain / columns**0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.5

    def norm(name, n):
        weights[f"{name}.weight"] = 1 + torch.randn(n, generator=generator) * 0.2

    linear("model.embed_tokens", c["vocab_size"], dim, dim**0.5)
    norm("model.norm", dim)
    if not c["tie_word_embeddings"]:
        linear("lm_head", c["vocab_size"], dim, 3.0)
    heads = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"],
             "v": c["num_key_value_heads"]}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        norm(at + "input_layernorm", dim)
        norm(at + "post_attention_layernorm", dim)
        for name, n in heads.items():
            linear(f"{at}self_attn.{name}_proj", n * head_dim, dim, 1.5,
                   architecture.startswith("Qwen2"))
        linear(f"{at}self_attn.o_proj", dim, heads["q"] * head_dim)
        if architecture.startswith("Qwen3"):
            norm(f"{at}self_attn.q_norm", head_dim)
            norm(f"{at}self_attn.k_norm", head_dim)
        linear(f"{at}mlp.gate_proj", hidden, dim)
        linear(f"{at}mlp.up_proj", hidden, dim)
        linear(f"{at}mlp.down_proj", dim, hidden)
    return weights


def make_checkpoint(folder, shards=1, **changes):
    """A random model in the Hugging Face layout, with a tokenizer of bytes; returns the folder."""
    c = LLAMA | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    weights = random_weights(c)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        names = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
                 for i, name in enumerate(sorted(weights))}
        for file in set(names.values()):
            save_file({n: weights[n] for n in weights if names[n] == file}, folder / file)
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


# Room for bytes and special tokens, and for groups of 32.
USUAL = GOLDEN_LLAMA | {"vocab_size": 280, "head_dim": 32}


def make_folder(folder, files=(), **config):
    """A checkpoint of make_golden.py's kind, with a tokenizer of bytes.

    config  changes of config.json; the weights follow two of them
    files   {name: bytes}: files that are replaced, or with None removed
    """
    followed = {key: config[key] for key in ("vocab_size", "num_hidden_layers") if key in config}
    write_checkpoint(folder, USUAL | followed)
    (folder / "config.json").write_text(json.dumps(USUAL | config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in dict(files).items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return folder


def changed(checkpoint, folder, **changes):
    """A copy of a checkpoint in `folder`, with changes of its config.json; returns the folder."""
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def truncated(checkpoint, folder):
    """A copy whose file of weights ends in the middle."""
    weights = changed(checkpoint, folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


def poisoned(checkpoint, folder):
    """A copy with one NaN in a weight of K: all keys of the second layer have a NaN channel."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 5] = math.nan
    save_file(weights, changed(checkpoint, folder) / "model.safetensors")
    return folder


def write_kvtuner(path, pairs):
    """A preset file of KVTuner with the bits of K and V, layer by layer; returns its --kv."""
    lines = []
    for i, (k_bits, v_bits) in enumerate(pairs):
        lines += [f"{i}:", f"  nbits_key: {k_bits}", f"  nbits_value: {v_bits}"]
    path.write_text("\n".join(lines) + "\n")
    return f"kvtuner:{path}"


# ---- an independent Llama -----------------------------------------------------------------------

class RefKivi:
    """One layer of one row in the official order, attention before the flush.

    It keeps Python lists of [Hk, D] tensors.
    options      group_size, residual, k_bits, v_bits; None: exact
    algorithm_1  the paper's other order: the flush before attention
    """

    def __init__(self, options, algorithm_1=False):
        self.options = options
        self.algorithm_1 = algorithm_1
        self.k_old = []
        self.k_new = []
        self.v_old = []
        self.v_new = []

    def add_prompt(self, q, k, v):
        self.k_new.append(k)
        self.v_new.append(v)
        return self.attention(q, self.k_new, self.v_new)

    @staticmethod
    def attention(q, keys, values):
        return attention64(q, torch.stack(keys, 1), torch.stack(values, 1)).float()

    def end_prompt(self):
        if self.options:
            for _ in range(len(self.k_new) // self.options["residual"]):
                self.flush()
            while len(self.v_new) > self.options["residual"]:
                self.evict()

    def step(self, q, k, v):
        self.k_new.append(k)
        self.v_new.append(v)
        if self.options and self.algorithm_1:
            self.after()
        out = self.attention(q, self.k_old + self.k_new, self.v_old + self.v_new)
        if self.options and not self.algorithm_1:
            self.after()
        return out

    def after(self):
        if len(self.k_new) == self.options["residual"]:
            self.flush()
        if len(self.v_new) > self.options["residual"]:
            self.evict()

    def flush(self):
        for _ in range(self.options["residual"] // self.options["group_size"]):
            group = [self.k_new.pop(0) for _ in range(self.options["group_size"])]
            channels = torch.stack(group, -1)  # [Hk, D, G]
            self.k_old += fake_quantized(channels, self.options.get("k_bits", 2)).unbind(-1)

    def evict(self):
        groups = self.v_new.pop(0).unflatten(-1, (-1, self.options["group_size"]))
        self.v_old.append(fake_quantized(groups, self.options.get("v_bits", 2)).flatten(-2))


def ref_frequencies(c):
    """Rotation of each channel pair with Hugging Face's rope_scaling, one frequency at a time."""
    scaling = c.get("rope_scaling") or {}
    out = []
    for i in range(c["head_dim"] // 2):
        frequency = c["rope_theta"] ** (-2 * i / c["head_dim"])
        if scaling.get("type") == "linear":
            frequency /= scaling["factor"]
        if scaling.get("rope_type") == "llama3":
            frequency = ref_llama3(frequency, scaling)
        out.append(frequency)
    return torch.tensor(out)


def ref_llama3(frequency, scaling):
    wavelength = 2 * math.pi / frequency
    low_factor, high_factor = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    slow = frequency / scaling["factor"]
    if wavelength > old / low_factor:
        return slow
    if wavelength < old / high_factor:
        return frequency
    smooth = (old / wavelength - low_factor) / (high_factor - low_factor)
    return (1 - smooth) * slow + smooth * frequency


class RefLlama:
    """The weights of a checkpoint folder, and the arithmetic of a Llama over single tokens."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {}
        for file in folder.glob("*.safetensors"):
            if file.name != "golden.safetensors":
                self.weights |= {name: x.float() for name, x in load_file(file).items()}
        self.frequencies = ref_frequencies(self.config)

    def norm(self, x, name):
        square = x.pow(2).mean(-1, keepdim=True)
        return x / (square + self.config["rms_norm_eps"]).sqrt() * self.weights[name + ".weight"]

    def linear(self, x, name):
        return self.weights[name + ".weight"] @ x + self.weights.get(name + ".bias", 0)

    def qkv(self, x, at, position):
        """The heads [H or Hk, D] of one token, q and k rotated."""
        D = self.config["head_dim"]
        q, k, v = (self.linear(x, f"{at}self_attn.{name}_proj").view(-1, D) for name in "qkv")
        if f"{at}self_attn.q_norm.weight" in self.weights:
            q, k = self.norm(q, at + "self_attn.q_norm"), self.norm(k, at + "self_attn.k_norm")
        angle = position * self.frequencies
        cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
        q, k = (x * cos + torch.cat([-x[:, D // 2 :], x[:, : D // 2]], 1) * sin for x in (q, k))
        return q, k, v

    def mlp(self, x, at):
        gate = self.linear(x, at + "mlp.gate_proj")
        silu = gate / (1 + torch.exp(-gate))
        return self.linear(silu * self.linear(x, at + "mlp.up_proj"), at + "mlp.down_proj")

    def head(self, x):
        embedding = self.weights["model.embed_tokens.weight"]
        return self.weights.get("lm_head.weight", embedding) @ self.norm(x, "model.norm")


def ref_llama(folder, ids, n_prompt=None, options=None, algorithm_1=False):
    """Logits [T, V] of a checkpoint over ids in float32, one token at a time.

    The first n_prompt are a prompt (None: all), the others decode steps through `RefKivi`.
    """
    net = RefLlama(folder)
    caches = [RefKivi(options, algorithm_1) for _ in range(net.config["num_hidden_layers"])]
    logits = []
    for position, token in enumerate(ids):
        in_prompt = n_prompt is None or position < n_prompt
        x = net.weights["model.embed_tokens.weight"][token]
        for i, cache in enumerate(caches):
            at = f"model.layers.{i}."
            q, k, v = net.qkv(net.norm(x, at + "input_layernorm"), at, position)
            y = cache.add_prompt(q, k, v) if in_prompt else cache.step(q, k, v)
            x = x + net.linear(y.flatten(), at + "self_attn.o_proj")
            x = x + net.mlp(net.norm(x, at + "post_attention_layernorm"), at)
            if position + 1 == n_prompt:
                cache.end_prompt()
        logits.append(net.head(x))
    return torch.stack(logits)


# ---- the program's own loop, step by step --------------------------------------------------------

def some_ids(n, seed=0):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def heldout(tokenizer, n):
    """The first n tokens of a book that the embedded checkpoint has not seen."""
    text = (ROOT / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    return tokenizer.encode(text).ids[:n]


def decode_step(model, token):
    """One step of the program's loop: token [B, 1] -> logits [B, V]."""
    cache = model.cache
    cache.advance()
    logits = model.decode(token, cache.tokens(cache.length))
    if cache.completes_key_block():
        model.flush()
    return logits


def decode_logits(model, tokens, n_prompt):
    """Teacher-forced logits [B, T - n_prompt + 1, V] of tokens [B, T] through the caches:
    of the prompt's last token and of every decoded one."""
    logits = [model.prefill(tokens[:, :n_prompt])]
    logits += [decode_step(model, token) for token in tokens[:, n_prompt:].split(1, 1)]
    return torch.stack(logits, 1)


# ---- memory -------------------------------------------------------------------------------------

def resident(field):
    """Bytes of a field of this process, "VmRSS" or "VmHWM" (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s+(\d+) kB", status)[1]) * 1024


def peak_allocation(call):
    """Peak of the bytes that tensors take at once beyond those at the start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
