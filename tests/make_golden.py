"""Golden numbers for test_models.py: `python tests/make_golden.py` writes tests/golden/models.safetensors (needs transformers and jinja2).

A variant is a few changes to a small `config.json`. Its weights are computed from their names alone, in integers, so that they are
the same everywhere and need not be kept. What is kept is what transformers makes of them: float32 logits, greedy tokens. The
texts of chat templates stand below; transformers must make the same.
"""
import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden" / "models.safetensors"
LENGTH, GREEDY, VOCAB = 48, 16, 128  # tokens of the forward, tokens decoded after the first 32, vocabulary

BASE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=256,
            bos_token_id=None, eos_token_id=None, torch_dtype="float32", initializer_range=0.02)
LLAMA = dict(BASE, architectures=["LlamaForCausalLM"], model_type="llama", num_key_value_heads=2, intermediate_size=96, hidden_act="silu",
             rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
MISTRAL = dict(LLAMA, architectures=["MistralForCausalLM"], model_type="mistral", rope_theta=1e6, sliding_window=None)
QWEN2 = dict(LLAMA, architectures=["Qwen2ForCausalLM"], model_type="qwen2", rms_norm_eps=1e-6, use_sliding_window=False, sliding_window=8,
             max_window_layers=2)
QWEN3 = dict(QWEN2, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32, attention_bias=False)
FALCON = dict(BASE, architectures=["FalconForCausalLM"], model_type="falcon", layer_norm_epsilon=1e-5, alibi=False, bias=False,
              multi_query=True, new_decoder_architecture=False, parallel_attn=True)
NEW = dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)
PHI3 = dict(LLAMA, architectures=["Phi3ForCausalLM"], model_type="phi3", pad_token_id=0)
OLD = 16  # context that the stretched rotary embeddings were "trained" on, shorter than the text

VARIANTS = {
    "llama": LLAMA,
    "llama, tied": dict(LLAMA, tie_word_embeddings=True),
    "llama, biases": dict(LLAMA, attention_bias=True, mlp_bias=True),
    "llama, head_dim 32": dict(LLAMA, head_dim=32),
    "llama, as many KV heads": dict(LLAMA, num_key_value_heads=4),
    "llama, rope llama3": dict(LLAMA, rope_theta=5e5, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=OLD)),
    "llama, rope linear": dict(LLAMA, rope_scaling=dict(type="linear", factor=4.0)),
    "llama, rope dynamic": dict(LLAMA, max_position_embeddings=OLD, rope_scaling=dict(
        type="dynamic", factor=4.0, original_max_position_embeddings=12)),  # which counts for nothing
    "llama, rope yarn": dict(LLAMA, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=OLD)),
    "llama, rope yarn, all entries": dict(LLAMA, head_dim=64, rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5, mscale=1.5, mscale_all_dim=0.5,
        truncate=False)),
    "mistral, window": dict(MISTRAL, sliding_window=12, rope_theta=10000.0),
    "mistral, no window": MISTRAL,
    "mistral, rope as transformers 5 writes it": {
        **{k: v for k, v in MISTRAL.items() if k != "rope_theta"}, "rope_parameters": dict(rope_type="default", rope_theta=1e5)},
    "qwen2": dict(QWEN2, tie_word_embeddings=True),
    "qwen2, window above layer 1": dict(QWEN2, use_sliding_window=True, max_window_layers=1),
    "qwen3": QWEN3,
    "falcon 7b": FALCON,
    "falcon, one after the other": dict(FALCON, parallel_attn=False, multi_query=False, bias=True, tie_word_embeddings=False),
    "falcon new decoder": NEW,
    "falcon new decoder, one norm": dict(NEW, num_ln_in_parallel_attn=1, ffn_hidden_size=96),
    "phi3": PHI3,
}

TALK = [dict(role="system", content="Be brief."), dict(role="user", content=" Where is <é>?"), dict(role="assistant", content="Here. "),
        dict(role="user", content='Say "why".')]
CHAT = {  # the forms that three families use: template, special tokens, messages, what transformers makes of them
    "chatml": (
        """{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}
        {{- '<|im_start|>system\nYou are kind.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
""", dict(eos_token="<|im_end|>"), TALK[1:],
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n Where is <é>?<|im_end|>\n<|im_start|>assistant\nHere. <|im_end|>\n"
        '<|im_start|>user\nSay "why".<|im_end|>\n<|im_start|>assistant\n'),
    "inst": (
        """{% if messages[0]['role'] == 'system' %}
    {% set first, rest = messages[0]['content'], messages[1:] %}
{% else %}
    {% set first, rest = '', messages %}
{% endif %}
{% for m in rest %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns') }}
    {% endif %}
    {% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + ('<<SYS>>\n' + first + '\n<</SYS>>\n\n' if first and loop.first else '') + m['content'].strip() + ' [/INST]' }}{% else %}
{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""", dict(bos_token="<s>", eos_token="</s>"), TALK,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is <é>? [/INST] Here. </s><s>[INST] Say \"why\". [/INST]"),
    "headers": (
        """{{- bos_token }}
{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
    {%- if m.content is none %}{% continue %}{% endif -%}
    {%- set ns.n = ns.n + 1 -%}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if ns.n and add_generation_prompt and strftime_now('%Y') | length == 4 -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
    {{- messages[0] | tojson -}}
{%- endif %}""", dict(bos_token="<|begin_of_text|>"), TALK[1:],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhere is <é>?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Here.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSay \"why\".<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"role": "user", "content": " Where is <é>?"}'),
}


def noise(name, *shape):
    """Numbers in [-1, 1) that depend on nothing but the name: a hash of it and of every index, in 32-bit integers."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 2654435761 + zlib.crc32(name.encode())
    for multiplier in (0x7FEB352D, 0x46A79D2B, 0x2C1B3C6D):
        x &= 0xFFFFFFFF
        x = (x ^ x >> 16) * multiplier
    return ((x >> 8 & 0xFFFF).float() / 2**15 - 1).view(shape)


def weights(c):
    """The tensors of the checkpoint that config `c` describes, under their Hugging Face names."""
    dim, heads, out = c["hidden_size"], c["num_attention_heads"], {}
    falcon, phi3, D = c["model_type"] == "falcon", c["model_type"] == "phi3", c.get("head_dim") or dim // heads

    def linear(name, rows, columns, bias=False, gain=2.0):
        out[f"{name}.weight"] = noise(name, rows, columns) * gain / columns**0.5
        if bias:
            out[f"{name}.bias"] = noise(name + ".bias", rows) * 0.5

    def norm(name, n):
        out[f"{name}.weight"] = 1 + noise(name, n) * 0.4
        if falcon:
            out[f"{name}.bias"] = noise(name + ".bias", n) * 0.4

    tied = c.get("tie_word_embeddings", falcon)
    linear("transformer.word_embeddings" if falcon else "model.embed_tokens", c["vocab_size"], dim, gain=2.0 if tied else dim**0.5)
    norm("transformer.ln_f" if falcon else "model.norm", dim)
    if not tied:
        linear("lm_head", c["vocab_size"], dim, gain=4.0)
    for i in range(c["num_hidden_layers"]):
        if falcon:
            at, bias, new = f"transformer.h.{i}.", c["bias"], c["new_decoder_architecture"]
            kv = c["num_kv_heads"] if new else 1 if c["multi_query"] else heads
            hidden = c.get("ffn_hidden_size", 4 * dim)
            two = new and c.get("num_ln_in_parallel_attn", 2) == 2
            norm(at + ("ln_attn" if two else "input_layernorm"), dim)
            if two or not c["parallel_attn"]:
                norm(at + ("ln_mlp" if two else "post_attention_layernorm"), dim)
            linear(at + "self_attention.query_key_value", (heads + 2 * kv) * D, dim, bias)
            linear(at + "self_attention.dense", dim, heads * D, bias)
            linear(at + "mlp.dense_h_to_4h", hidden, dim, bias)
            linear(at + "mlp.dense_4h_to_h", dim, hidden, bias)
            continue
        at, kv, hidden, bias = f"model.layers.{i}.", c["num_key_value_heads"], c["intermediate_size"], c.get("attention_bias", False)
        norm(at + "input_layernorm", dim)
        norm(at + "post_attention_layernorm", dim)
        if phi3:
            linear(at + "self_attn.qkv_proj", (heads + 2 * kv) * D, dim)
            linear(at + "mlp.gate_up_proj", 2 * hidden, dim)
        else:
            for name, n in (("q", heads), ("k", kv), ("v", kv)):
                linear(f"{at}self_attn.{name}_proj", n * D, dim, bias or c["model_type"] == "qwen2")
            for name in ("gate", "up"):
                linear(f"{at}mlp.{name}_proj", hidden, dim, c.get("mlp_bias", False))
        if c["model_type"] == "qwen3":
            norm(at + "self_attn.q_norm", D)
            norm(at + "self_attn.k_norm", D)
        linear(at + "self_attn.o_proj", dim, heads * D, bias)
        linear(at + "mlp.down_proj", dim, hidden, c.get("mlp_bias", False))
    return out


def write_checkpoint(folder, config, shards=1):
    """Config and weights in the Hugging Face layout, tensors spread over the shards in turn; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: x for name, x in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def tokens(n, seed=0):
    """n tokens of text, the same everywhere."""
    return ((noise(f"text {seed}", n) + 1) * VOCAB / 2).long()[None]


def main():
    from transformers import AutoModelForCausalLM, __version__
    from transformers.utils.chat_template_utils import render_jinja_template

    for template, special, messages, text in CHAT.values():
        rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **special)
        assert rendered == [text], rendered
    golden = {}
    for name, config in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config)
            load = lambda: AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            model, info = load()
            assert not any(info.values()), (name, info)
            with torch.no_grad():
                golden[f"{name}/logits"] = model(tokens(LENGTH)).logits[0].contiguous()
                prompt, (model, _) = tokens(LENGTH)[:, :32], load()  # anew: dynamic rope keeps the longest text it has seen
                out = model.generate(prompt, max_new_tokens=GREEDY, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
                golden[f"{name}/greedy"] = out[0, 32:].contiguous()
        top = golden[f"{name}/logits"].topk(2).values
        print(f"{name:32} logits {top.max():6.1f}  smallest lead {(top[:, 0] - top[:, 1]).min():.4f}  "
              f"greedy {golden[f'{name}/greedy'].tolist()}", file=sys.stderr)
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(golden, GOLDEN, metadata={"made with": f"transformers {__version__}, torch {torch.__version__}"})


if __name__ == "__main__":
    main()
