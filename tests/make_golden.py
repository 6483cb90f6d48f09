"""Golden numbers of the architectures: `python tests/make_golden.py` writes
tests/golden/models.safetensors (needs transformers and jinja2).

A variant is a few changes to a small `config.json`. Its weights are computed from their names
alone, in integers, so that they are the same everywhere and need not be kept. What is kept is what
transformers makes of them: float32 logits, greedy tokens. The texts of chat templates stand below;
transformers must make the same.
"""
import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden" / "models.safetensors"
LENGTH = 48  # tokens of the forward pass
GREEDY = 16  # tokens decoded after the first LENGTH - GREEDY
VOCAB = 128

BASE = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, torch_dtype="float32",
    initializer_range=0.02,
)
LLAMA = BASE | dict(
    architectures=["LlamaForCausalLM"], model_type="llama", num_key_value_heads=2,
    intermediate_size=96, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=False,
)
MISTRAL = LLAMA | dict(
    architectures=["MistralForCausalLM"], model_type="mistral", rope_theta=1e6,
    sliding_window=None,
)
QWEN2 = LLAMA | dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", rms_norm_eps=1e-6,
    use_sliding_window=False, sliding_window=8, max_window_layers=2,
)
QWEN3 = QWEN2 | dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32, attention_bias=False,
)
FALCON = BASE | dict(
    architectures=["FalconForCausalLM"], model_type="falcon", layer_norm_epsilon=1e-5, alibi=False,
    bias=False, multi_query=True, new_decoder_architecture=False, parallel_attn=True,
)
NEW = FALCON | dict(new_decoder_architecture=True, num_kv_heads=2)
PHI3 = LLAMA | dict(architectures=["Phi3ForCausalLM"], model_type="phi3", pad_token_id=0)
# Context that the stretched rotary embeddings were "trained" on, shorter than the text.
OLD = 16

VARIANTS = {
    "llama": LLAMA,
    "llama, tied": LLAMA | dict(tie_word_embeddings=True),
    "llama, biases": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama, head_dim 32": LLAMA | dict(head_dim=32),
    "llama, as many KV heads": LLAMA | dict(num_key_value_heads=4),
    "llama, rope llama3": LLAMA | dict(rope_theta=5e5, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=OLD)),
    "llama, rope linear": LLAMA | dict(rope_scaling=dict(type="linear", factor=4.0)),
    "llama, rope dynamic": LLAMA | dict(max_position_embeddings=OLD, rope_scaling=dict(
        type="dynamic", factor=4.0, original_max_position_embeddings=12)),  # counts for nothing
    "llama, rope yarn": LLAMA | dict(rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=OLD)),
    "llama, rope yarn, all entries": LLAMA | dict(head_dim=64, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0,
        beta_slow=0.5, mscale=1.5, mscale_all_dim=0.5, truncate=False)),
    "mistral, window": MISTRAL | dict(sliding_window=12, rope_theta=10000.0),
    "mistral, no window": MISTRAL,
    "mistral, rope as transformers 5 writes it": {
        **{key: value for key, value in MISTRAL.items() if key != "rope_theta"},
        "rope_parameters": dict(rope_type="default", rope_theta=1e5)},
    "qwen2": QWEN2 | dict(tie_word_embeddings=True),
    "qwen2, window above layer 1": QWEN2 | dict(use_sliding_window=True, max_window_layers=1),
    "qwen3": QWEN3,
    "falcon 7b": FALCON,
    "falcon, one after the other": FALCON | dict(
        parallel_attn=False, multi_query=False, bias=True, tie_word_embeddings=False),
    "falcon new decoder": NEW,
    "falcon new decoder, one norm": NEW | dict(num_ln_in_parallel_attn=1, ffn_hidden_size=96),
    "phi3": PHI3,
}

TALK = [
    dict(role="system", content="Be brief."),
    dict(role="user", content=" Where is <é>?"),
    dict(role="assistant", content="Here. "),
    dict(role="user", content='Say "why".'),
]
CHATML = """{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|im_start|>system\nYou are kind.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""
INST = """{% if messages[0]['role'] == 'system' %}
    {% set first, rest = messages[0]['content'], messages[1:] %}
{% else %}
    {% set first, rest = '', messages %}
{% endif %}
{% for m in rest %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns') }}
    {% endif %}
    {% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + ('<<SYS>>\n' + first + '\n<</SYS>>\n\n' if first and loop.first else '')\
 + m['content'].strip() + ' [/INST]' }}{% else %}
{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
HEADERS = """{{- bos_token }}
{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
    {%- if m.content is none %}{% continue %}{% endif -%}
    {%- set ns.n = ns.n + 1 -%}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim)\
 ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if ns.n and add_generation_prompt and strftime_now('%Y') | length == 4 -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
    {{- messages[0] | tojson -}}
{%- endif %}"""
CHAT = {  # forms of three families: template, special tokens, messages, what transformers makes
    "chatml": (
        CHATML, dict(eos_token="<|im_end|>"), TALK[1:],
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n Where is <é>?<|im_end|>\n"
        "<|im_start|>assistant\nHere. <|im_end|>\n"
        '<|im_start|>user\nSay "why".<|im_end|>\n<|im_start|>assistant\n'),
    "inst": (
        INST, dict(bos_token="<s>", eos_token="</s>"), TALK,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is <é>? [/INST] Here. </s>"
        '<s>[INST] Say "why". [/INST]'),
    "headers": (
        HEADERS, dict(bos_token="<|begin_of_text|>"), TALK[1:],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhere is <é>?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHere.<|eot_id|>"
        '<|start_header_id|>user<|end_header_id|>\n\nSay "why".<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"role": "user", "content": " Where is <é>?"}'),
}


def noise(name, *shape):
    """Numbers in [-1, 1) that depend on nothing but the name.

    A hash of it and of every index, in 32-bit integers.
    """
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 2654435761
    x = x + zlib.crc32(name.encode())
    for multiplier in (0x7FEB352D, 0x46A79D2B, 0x2C1B3C6D):
        x &= 0xFFFFFFFF
        x = (x ^ x >> 16) * multiplier
    return ((x >> 8 & 0xFFFF).float() / 2**15 - 1).view(shape)


class Weights(dict):
    """The tensors of the checkpoint that config `c` describes, under their Hugging Face names."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.dim = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.head_dim = c.get("head_dim") or self.dim // self.heads
        self.falcon = c["model_type"] == "falcon"
        tied = c.get("tie_word_embeddings", self.falcon)
        embedding, norm, layer = "model.embed_tokens", "model.norm", "model.layers"
        if self.falcon:
            embedding = "transformer.word_embeddings"
            norm, layer = "transformer.ln_f", "transformer.h"
        self.linear(embedding, c["vocab_size"], self.dim, gain=2.0 if tied else self.dim**0.5)
        self.norm(norm, self.dim)
        if not tied:
            self.linear("lm_head", c["vocab_size"], self.dim, gain=4.0)
        for i in range(c["num_hidden_layers"]):
            at = f"{layer}.{i}."
            self.falcon_layer(at) if self.falcon else self.llama_layer(at)

    def linear(self, name, rows, columns, bias=False, gain=2.0):
        self[f"{name}.weight"] = noise(name, rows, columns) * gain / columns**0.5
        if bias:
            self[f"{name}.bias"] = noise(name + ".bias", rows) * 0.5

    def norm(self, name, n):
        self[f"{name}.weight"] = 1 + noise(name, n) * 0.4
        if self.falcon:
            self[f"{name}.bias"] = noise(name + ".bias", n) * 0.4

    def falcon_layer(self, at):
        c, dim, heads, D = self.config, self.dim, self.heads, self.head_dim
        bias, new = c["bias"], c["new_decoder_architecture"]
        kv_heads = c["num_kv_heads"] if new else 1 if c["multi_query"] else heads
        hidden = c.get("ffn_hidden_size", 4 * dim)
        two = new and c.get("num_ln_in_parallel_attn", 2) == 2
        self.norm(at + ("ln_attn" if two else "input_layernorm"), dim)
        if two or not c["parallel_attn"]:
            self.norm(at + ("ln_mlp" if two else "post_attention_layernorm"), dim)
        self.linear(at + "self_attention.query_key_value", (heads + 2 * kv_heads) * D, dim, bias)
        self.linear(at + "self_attention.dense", dim, heads * D, bias)
        self.linear(at + "mlp.dense_h_to_4h", hidden, dim, bias)
        self.linear(at + "mlp.dense_4h_to_h", dim, hidden, bias)

    def llama_layer(self, at):
        c, dim, heads, D = self.config, self.dim, self.heads, self.head_dim
        kind = c["model_type"]
        kv_heads, hidden = c["num_key_value_heads"], c["intermediate_size"]
        bias, mlp_bias = c.get("attention_bias", False), c.get("mlp_bias", False)
        self.norm(at + "input_layernorm", dim)
        self.norm(at + "post_attention_layernorm", dim)
        if kind == "phi3":
            self.linear(at + "self_attn.qkv_proj", (heads + 2 * kv_heads) * D, dim)
            self.linear(at + "mlp.gate_up_proj", 2 * hidden, dim)
        else:
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                self.linear(f"{at}self_attn.{name}_proj", n * D, dim, bias or kind == "qwen2")
            for name in ("gate", "up"):
                self.linear(f"{at}mlp.{name}_proj", hidden, dim, mlp_bias)
        if kind == "qwen3":
            self.norm(at + "self_attn.q_norm", D)
            self.norm(at + "self_attn.k_norm", D)
        self.linear(at + "self_attn.o_proj", dim, heads * D, bias)
        self.linear(at + "mlp.down_proj", dim, hidden, mlp_bias)


def write_checkpoint(folder, config, shards=1):
    """Config and weights in the Hugging Face layout, tensors spread over the shards in turn.

    returns  the folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(Weights(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
             for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: x for name, x in tensors.items() if files[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tokens(n, seed=0):
    """n tokens of text [1, n], the same everywhere."""
    return ((noise(f"text {seed}", n) + 1) * VOCAB / 2).long()[None]


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), (folder, info)
    return model


@torch.no_grad()
def compute(config):
    """(logits [LENGTH, V], greedy tokens [GREEDY]) of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        logits = transformers_model(folder)(tokens(LENGTH)).logits[0]
        prompt = tokens(LENGTH)[:, : LENGTH - GREEDY]
        model = transformers_model(folder)  # anew: dynamic rope keeps the longest text it has seen
        out = model.generate(prompt, max_new_tokens=GREEDY, do_sample=False, pad_token_id=0,
                             attention_mask=torch.ones_like(prompt))
    return logits.contiguous(), out[0, LENGTH - GREEDY :].contiguous()


def main():
    from transformers import __version__
    from transformers.utils.chat_template_utils import render_jinja_template

    for template, special, messages, text in CHAT.values():
        rendered, _ = render_jinja_template([messages], chat_template=template,
                                            add_generation_prompt=True, **special)
        assert rendered == [text], rendered
    golden = {}
    for name, config in VARIANTS.items():
        logits, greedy = compute(config)
        golden[f"{name}/logits"] = logits
        golden[f"{name}/greedy"] = greedy
        top = logits.topk(2).values
        lead = (top[:, 0] - top[:, 1]).min()
        print(f"{name:32} logits {top.max():6.1f}  smallest lead {lead:.4f}  "
              f"greedy {greedy.tolist()}", file=sys.stderr)
    GOLDEN.parent.mkdir(exist_ok=True)
    made_with = f"transformers {__version__}, torch {torch.__version__}"
    save_file(golden, GOLDEN, metadata={"made with": made_with})


if __name__ == "__main__":
    main()
