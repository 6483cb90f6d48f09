"""What tensors are called: in the checkpoints of every architecture, and in model.py."""

# Inside a layer: name in a checkpoint -> (name in the model, part). A part is one of the
# matrices that the model holds in one: 0, 1, 2, or None where the tensor is all of it.
# "groups" is all of it in Falcon's order: the queries of one KV head, its key, its value, ..
NORMS = {
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("mlp_norm", None),
}
LLAMA = NORMS | {
    "self_attn.q_proj": ("attention.wqkv", 0),
    "self_attn.k_proj": ("attention.wqkv", 1),
    "self_attn.v_proj": ("attention.wqkv", 2),
    "self_attn.o_proj": ("attention.wo", None),
    "self_attn.q_norm": ("attention.q_norm", None),
    "self_attn.k_norm": ("attention.k_norm", None),
    "mlp.gate_proj": ("mlp.w_in", 0),
    "mlp.up_proj": ("mlp.w_in", 1),
    "mlp.down_proj": ("mlp.w_out", None),
}
PHI3 = NORMS | {
    "self_attn.qkv_proj": ("attention.wqkv", None),
    "self_attn.o_proj": ("attention.wo", None),
    "mlp.gate_up_proj": ("mlp.w_in", None),
    "mlp.down_proj": ("mlp.w_out", None),
}
FALCON = {
    "self_attention.query_key_value": ("attention.wqkv", "groups"),
    "self_attention.dense": ("attention.wo", None),
    "mlp.dense_h_to_4h": ("mlp.w_in", None),
    "mlp.dense_4h_to_h": ("mlp.w_out", None),
}
FALCON_2 = FALCON | {
    "ln_attn": ("attention_norm", None),
    "ln_mlp": ("mlp_norm", None),
}
TOP = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
}
FALCON_TOP = {"transformer.word_embeddings": "embed", "transformer.ln_f": "norm", "lm_head": "head"}
NAMES = {  # ModelConfig.names -> outside the layers, prefix of a layer, inside it
    "llama": (TOP, "model.layers", LLAMA),
    "phi3": (TOP, "model.layers", PHI3),
    "falcon": (FALCON_TOP, "transformer.h", FALCON | NORMS),
    "falcon 2": (FALCON_TOP, "transformer.h", FALCON_2),
}
