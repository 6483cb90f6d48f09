"""A 2-bit cache for `transformers` 5.

    model.generate(**inputs, cache=KiviPastKeyValues(model, max_len=4096))

    python examples/transformers_cache.py [folder or hub id]

Before transformers 5.24 the argument of `generate` was past_key_values; since then that name warns.

Making the cache switches the model to an attention function that is exact over a prompt and reads
the packed codes afterwards: K and V are never kept in full precision. Greedy, sampling, beams,
left-padded batches, sliding windows, tokens that a later mask hides, prompts in chunks, second
turns, prompt lookup and an assistant model are right; `crop` takes back what the last forward call
brought. Refused are right padding, training, a choice among rows (contrastive search), and
attention that is more than softmax(q . K) . V. Speed, and what works with torch.compile:
docs/transformers.md.
"""
import sys
from dataclasses import replace
from inspect import signature
from math import isclose
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers_layer import Call, KiviLayer  # sets the path to what is imported next

from kivi import PRESETS, KiviCache

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"full_attention", "sliding_attention"}  # of the names that a config may give them


def refuse(module, options):
    """Raises ValueError for what `attention` would leave out without a word."""
    for name in ("softcap", "s_aux", "position_bias", "output_attentions"):
        value = options.get(name)
        if torch.is_tensor(value) or value:
            raise ValueError(f"{type(module).__name__} uses {name}, "
                             "which a KIVI cache does not compute")
    if options.get("dropout") or module.training and torch.is_grad_enabled():
        raise ValueError("a KIVI cache has neither dropout nor gradients: call model.eval()")
    if options.get("use_cache") is False:  # generate would repeat the whole text at every step
        raise ValueError("use_cache=False beside a cache: leave it out, also of the model's config "
                         "(layers that say it by themselves cannot have this cache)")


def no_gradient(_):
    raise ValueError("a KIVI cache has no gradients: use it under torch.no_grad()")


@torch.compiler.disable  # in a compiled model it stays what it is: it has its own compiled parts
def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The model's attention. query [B, H, L, D], key, value [B, Hk, L, D] -> [B, L, H, D], None

    What a token sees the mask alone says: some models have their sliding window nowhere else.
    """
    layer = getattr(key, "layer", None)  # None without a cache, and with another one
    if layer is not None:
        refuse(module, kwargs)
        value = value.to(key.dtype)  # autocast may leave it in another
        B, _, L, D = key.shape
        mask, n = attention_mask, layer.seen
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, L, n)):
            raise ValueError(f"a mask of attention must be [{B}, 1, {L}, {n}] in torch.bool (True: "
                             f"is seen), got {list(mask.shape)} in {mask.dtype}")
        if layer.cache is None:
            layer.open(key)
        lengths, causal = layer.look(mask, key)
        if n == L:
            layer.prefill(key, value, lengths)
        else:
            unit = scaling * D**0.5 if scaling else 1  # what KiviCache does not multiply by itself
            query = query.to(key.dtype) if isclose(unit, 1) else (query * unit).to(key.dtype)
            out = layer.attend(query, key, value, mask, lengths, causal)
        layer.call.waiting = False
        if n > L:
            if torch.is_grad_enabled() and query.requires_grad:
                out = out.detach().requires_grad_()  # else K and V would be left out without a word
                out.register_hook(no_gradient)
            return out.transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask,
                                  scaling=scaling, **kwargs)


AttentionInterface.register("kivi", attention)
AttentionMaskInterface.register("kivi", sdpa_mask)


class KiviPastKeyValues(Cache):
    """Room for max_len tokens a row.

    kv        a name of PRESETS: kivi2 (the paper's), kivi2+, kivi2-, kivi4 or k4v2
    options   what differs from it: k_bits, v_bits (2, 4 or 8), group_size, residual (recent tokens
              in full precision), sink (first tokens in full precision), boost (key channels in
              twice the bits), v_group_size; see `quantize.KVConfig`
    compiled  steps of one token by torch.compile, on CUDA in CUDA graphs too (None: on CUDA)
    raises    ValueError: a model, a size or an option that the cache does not know
    """

    def __init__(self, model, max_len, kv="kivi2", compiled=None, **options):
        config = model.config.get_text_config(decoder=True)
        for name in ("num_kv_shared_layers", "attention_chunk_size", "kv_lora_rank",
                     "is_encoder_decoder"):
            if getattr(config, name, None):
                raise ValueError(f"{type(model).__name__} has {name}, "
                                 "which a KIVI cache does not know")
        others = {*(getattr(config, "layer_types", None) or ())} - LAYERS
        if others:
            raise ValueError(f"{type(model).__name__} has layers of {', '.join(sorted(others))}, "
                             "which a KIVI cache does not know")
        if kv not in PRESETS:
            raise ValueError(f"unknown kv {kv!r}; known: {', '.join(PRESETS)}")
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        known = vars(PRESETS[kv])
        if wrong := options.keys() - known:
            raise ValueError(f"the options are {', '.join(known)}, not {', '.join(wrong)}")
        options = vars(replace(PRESETS[kv], **options))
        KiviCache(1, 1, max_len, head_dim, device="meta", **options)  # refuses wrong ones
        model.set_attn_implementation("kivi")
        if config._attn_implementation != "kivi":  # transformers has said why
            raise ValueError(f"the attention of {type(model).__name__} cannot be replaced: "
                             "a KIVI cache is not for this model")
        self.call = Call()
        super().__init__(layers=[KiviLayer(config, max_len, options, compiled, self.call)
                                 for _ in range(config.num_hidden_layers)])

    @torch.compiler.disable
    def update(self, key, value, layer_idx, *args, **kwargs):
        # The config that a layer asks is not that of another model, or of a copy.
        if self.call.waiting:
            raise ValueError("tokens never reached this cache: call its reset(), and "
                             "set_attn_implementation('kivi') of the model that uses it, which "
                             "alone will do before the first use of a loaded cache")
        self.call.waiting = True
        if layer_idx == 0:
            self.call.says = {}  # of masks of the call before
        return super().update(key, value, layer_idx, *args, **kwargs)

    def reset(self):
        super().reset()
        self.call.reset()

    @property
    def nbytes(self):
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)


def main(checkpoint=ROOT / "tiny"):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["Once upon a time", "The old man looked at the sea and"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    cache = KiviPastKeyValues(model, max_len=512)
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    out = model.generate(**inputs, **{name: cache}, max_new_tokens=200, do_sample=False)
    print(*tokenizer.batch_decode(out, skip_special_tokens=True), sep="\n\n")
    print(f"\ncache: {cache.nbytes:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
