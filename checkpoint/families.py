"""config.json in the words of every supported architecture, as fields of ModelConfig."""
from checkpoint.rope import rope_entry

# Name in config.json -> what counts where it says nothing, in its own words
ARCHITECTURES = {
    "LlamaForCausalLM": {"use_sliding_window": False},
    "MistralForCausalLM": {"sliding_window": 4096, "max_position_embeddings": 131072},
    "FalconForCausalLM": {"tie_word_embeddings": True},
    "Qwen2ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28},
    "Qwen3ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28},
    "Phi3ForCausalLM": {},
}
# and what it never says, as fields of ModelConfig; Falcon's are in `_falcon_fields`
UNSAID = {
    "Qwen2ForCausalLM": {
        "qkv_bias": True,
        "o_bias": False,
    },
    "Qwen3ForCausalLM": {"qk_norm": True},
    "Phi3ForCausalLM": {"names": "phi3"},
}
SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "alibi", "bias",
    "multi_query", "parallel_attn", "new_decoder_architecture",
)
MOST_LAYERS = 1000


def family_fields(architecture, raw):
    """What a config.json of one of ARCHITECTURES says, as a dict of fields of ModelConfig.

    raises KeyError, TypeError and others for entries that are missing or of the wrong kind;
           ValueError: what no model here can do
    """
    raw = ARCHITECTURES[architecture] | raw
    raw = {name: value for name, value in raw.items() if value is not None}
    for name in SWITCHES:
        if not isinstance(raw.get(name, False), bool):
            raise ValueError(f"config.json: {name} must be true or false, got {raw[name]!r}")
    if architecture == "FalconForCausalLM":
        return _falcon_fields(raw)
    return _llama_fields(raw) | UNSAID.get(architecture, {})


def _llama_fields(raw):
    """What a config.json in the words of Llama and its kin says."""
    heads = raw["num_attention_heads"]
    n_layers = raw["num_hidden_layers"]
    bias = raw.get("attention_bias", False)
    max_len = raw.get("max_position_embeddings", 2048)
    rope = rope_entry(raw)
    if rope["rope_type"] in ("dynamic", "yarn"):
        # These two are meant to carry a model beyond what its config says.
        stretched = rope["factor"] * rope["original_max_position_embeddings"]
        max_len = max(max_len, int(stretched))
    return {
        "vocab_size": raw["vocab_size"],
        "dim": raw["hidden_size"],
        "n_layers": n_layers,
        "n_heads": heads,
        "n_kv_heads": raw.get("num_key_value_heads", heads),
        "head_dim": raw.get("head_dim", raw["hidden_size"] // heads),
        "hidden_dim": raw["intermediate_size"],
        "max_len": max_len,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope,
        "tied": raw.get("tie_word_embeddings", False),
        "act": raw.get("hidden_act", "silu"),
        "windows": _windows(raw, n_layers),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": raw.get("mlp_bias", False),
    }


def _windows(raw, n_layers):
    """The attention window of every layer in tokens, None where it reads everything."""
    windows = {"full_attention": None, "sliding_attention": None}
    if raw.get("use_sliding_window", True):
        windows["sliding_attention"] = raw.get("sliding_window")
    n_full = raw.get("max_window_layers", 0)
    kinds = raw.get("layer_types", [
        "full_attention" if i in range(n_full) else "sliding_attention"
        for i in range(min(n_layers, MOST_LAYERS))  # `check` refuses more
    ])
    return tuple(windows[kind] for kind in kinds)


def _falcon_fields(raw):
    """What Falcon's config.json says, in words of its own.

    raises ValueError: a model with alibi instead of rotary embeddings
    """
    if raw.get("alibi"):
        raise ValueError("alibi position biases (the falcon-rw models) are not supported: "
                         "use a Falcon with rotary embeddings")
    kv_heads = raw["num_attention_heads"]
    if raw.get("new_decoder_architecture", False):
        kv_heads = raw.get("num_kv_heads", kv_heads)
        parallel = True
        norms = raw.get("num_ln_in_parallel_attn", 2)
    else:
        kv_heads = 1 if raw.get("multi_query", True) else kv_heads
        parallel = raw.get("parallel_attn", True)
        norms = 1 if parallel else 2
    words_of_the_others = {
        "num_key_value_heads": kv_heads,
        "intermediate_size": raw.get("ffn_hidden_size", 4 * raw["hidden_size"]),
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "hidden_act": raw.get("activation", "gelu"),
        "sliding_window": None,
        "attention_bias": raw.get("bias", False),
        "mlp_bias": raw.get("bias", False),
    }
    return _llama_fields(raw | words_of_the_others) | {
        "layer_norm": True,
        "parallel": parallel,
        "norms": norms,
        "gated": False,
        "names": "falcon 2" if parallel and norms == 2 else "falcon",
    }
