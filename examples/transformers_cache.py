"""A 2-bit cache for `transformers` 5.

    model.generate(**inputs, cache=KiviPastKeyValues(model, max_len=4096))

    python examples/transformers_cache.py [folder or hub id]

Before transformers 5.24 the argument of `generate` was past_key_values; since then that name warns.

Making the cache switches the model to an attention function that is exact over a prompt and reads
the packed codes afterwards: K and V are never kept in full precision. Greedy, sampling, beams,
left-padded batches, sliding windows and tokens that a later mask hides are right. Assisted decoding
is refused (what is quantized cannot be taken back), and so are right padding, training, and
attention that is more than softmax(q . K) . V.
"""
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # not needed beside copies of kivi.py and quantize.py
from kivi import PRESETS, KiviCache  # noqa: E402


class KiviLayer(DynamicLayer):
    def __init__(self, config, max_len, options):
        super().__init__()
        self.config = config
        self.max_len = max_len
        self.options = options
        self.reset()

    def reset(self):
        self.cache = None
        self.seen = 0  # tokens of a row, padding too: columns of the mask
        self.waiting = False  # for `attention` to store what `update` has counted

    def update(self, key, value, *args, **kwargs):
        implementation = self.config._attn_implementation
        if implementation != "kivi":
            raise ValueError(f"the model's attention is {implementation}, not kivi: "
                             "call model.set_attn_implementation('kivi')")
        self.waiting = True
        self.seen += key.shape[2]
        key.layer = self  # `attention`, which gets the key next, finds the cache here
        return key, value

    def prefill(self, key, value, mask):
        """Left-padded rows become the right-padded ones of KiviCache.

        key, value [B, Hk, L, D]; mask [B, L, L]: what a token sees
        """
        B, Hk, L, D = key.shape
        t = torch.arange(L, device=key.device)
        real = mask.diagonal(dim1=1, dim2=2)  # only padding does not see itself
        lengths = real.sum(1)
        self.first = L - lengths[:, None]  # [B, 1] column of a row's first token
        if not torch.equal(real, t >= self.first):
            raise ValueError("padding that is not to the left of a prompt: "
                             "set tokenizer.padding_side = 'left'")
        self.cache = KiviCache(B, Hk, self.max_len, D,
                               dtype=key.dtype, device=key.device, **self.options)
        column = (t + self.first).clamp(max=L - 1)[:, None, :, None].expand_as(key)
        self.cache.prefill(key.gather(2, column), value.gather(2, column), lengths.tolist())
        self.waiting = False

    def decode(self, query, key, value, mask):
        """One token after the other; more than one only where a conversation goes on.

        query [B, H, L, D], key, value [B, Hk, L, D], mask [B, L, tokens] -> [B, L, H, D]
        """
        cache, (L, n), out = self.cache, mask.shape[1:], []
        cache.check(L, k=key, v=value, q=query)
        padding = torch.arange(n, device=key.device) < self.first
        real = mask[:, :, -L:].diagonal(dim1=1, dim2=2)
        if not real.all() or (mask & padding[:, None]).any():
            raise ValueError("attention_mask must cover all tokens so far, hide the prompt's "
                             "padding and show the new tokens: go on with equally many a row")
        with torch.autocast(query.device.type, enabled=False):
            for i in range(L):
                q, k, v = (x[:, :, i, None] for x in (query, key, value))
                cache.append(k, v)
                pos, t = cache.pos - 1, cache.tokens(cache.length)
                seen = mask[:, i].gather(1, (t + self.first).clamp(max=n - 1))
                seen = seen[:, None] & cache.seen(pos[:, None, None], t)
                out.append(cache.attention(q, pos, t, seen))
        self.waiting = False
        return torch.cat(out, 2).transpose(1, 2)

    def get_seq_length(self):
        return self.seen

    def get_max_length(self):
        return self.max_len

    def reorder_cache(self, beam_idx):
        for x in (self.first, *self.cache.contents().values()):
            x.copy_(x[beam_idx.to(x.device)])
        self.cache.lengths[:] = [self.cache.lengths[i] for i in beam_idx.tolist()]

    def crop(self, tokens_to_remove):
        if tokens_to_remove:
            raise ValueError("a KIVI cache cannot be cropped, what is quantized cannot be "
                             "taken back: decode without an assistant")

    def activate_past_recording(self):
        self.crop(1)

    def batch_repeat_interleave(self, repeats):
        raise ValueError("a KIVI cache has a fixed number of rows: "
                         "repeat the prompts before the first step")

    batch_select_indices = batch_repeat_interleave


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
        raise ValueError("use_cache=False beside a cache: leave it out, also of the model's config")


def visible(mask, key, n):
    """What the new tokens see of all n, [B, L, n]; without a mask all before them.

    The mask alone says so: some models have their sliding window nowhere else.
    """
    B, _, L, _ = key.shape
    if mask is None:
        return key.new_ones(1, dtype=torch.bool).expand(B, L, n)
    if mask.dtype != torch.bool or mask.shape[1:] != (1, L, n):
        raise ValueError(f"a mask of attention must be [{B}, 1, {L}, {n}] in torch.bool (True: is "
                         f"seen), got {list(mask.shape)} in {mask.dtype}")
    return mask[:, 0].expand(B, L, n)


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The model's attention. query [B, H, L, D], key, value [B, Hk, L, D] -> [B, L, H, D], None"""
    layer = getattr(key, "layer", None)  # None without a cache, and with another one
    if layer is not None:
        refuse(module, kwargs)
        value = value.to(key.dtype)  # autocast may leave it in another
        mask = visible(attention_mask, key, layer.seen)
        if layer.cache is not None:
            # What KiviCache does not multiply by itself.
            unit = scaling * query.shape[3] ** 0.5 if scaling else 1
            return layer.decode((query * unit).to(key.dtype), key, value, mask), None
        layer.prefill(key, value, mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask,
                                  scaling=scaling, **kwargs)


AttentionInterface.register("kivi", attention)
AttentionMaskInterface.register("kivi", sdpa_mask)


class KiviPastKeyValues(Cache):
    """Room for max_len tokens a row.

    kv, options  a name of PRESETS and what differs from it: k_bits, v_bits, group_size, ..
    raises       ValueError: a model, a size or an option that the cache does not know
    """

    def __init__(self, model, max_len, kv="kivi2", **options):
        config = model.config.get_text_config(decoder=True)
        for name in ("num_kv_shared_layers", "attention_chunk_size", "kv_lora_rank",
                     "is_encoder_decoder"):
            if getattr(config, name, None):
                raise ValueError(f"{type(model).__name__} has {name}, "
                                 "which a KIVI cache does not know")
        if kv not in PRESETS:
            raise ValueError(f"unknown kv {kv!r}; known: {', '.join(PRESETS)}")
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        try:
            options = vars(replace(PRESETS[kv], **options))
            KiviCache(1, 1, max_len, head_dim, device="meta", **options)  # refuses wrong ones
        except TypeError as error:
            known = ", ".join(vars(PRESETS[kv]))
            raise ValueError(f"the options are {known}: {error}") from None
        model.set_attn_implementation("kivi")
        if config._attn_implementation != "kivi":  # transformers has said why
            raise ValueError(f"the attention of {type(model).__name__} cannot be replaced: "
                             "a KIVI cache is not for this model")
        n_layers = config.num_hidden_layers
        super().__init__(layers=[KiviLayer(config, max_len, options) for _ in range(n_layers)])

    def update(self, key, value, layer_idx, *args, **kwargs):
        # The config that a layer asks is not that of another model, or of a copy.
        if any(layer.waiting for layer in self.layers):
            raise ValueError("tokens never reached this cache: call its reset(), and "
                             "set_attn_implementation('kivi') of the model that uses it")
        return super().update(key, value, layer_idx, *args, **kwargs)

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
