"""A 2-bit cache for `transformers`: model.generate(**inputs, past_key_values=KiviPastKeyValues(model, max_len=4096))

python examples/transformers_cache.py [folder or hub id]        (needs transformers 5)

Making the cache switches the model to an attention function that is exact over a prompt and reads the packed codes afterwards: K and V
are never kept in full precision. Greedy, sampling, beams and left-padded batches are right. Assisted decoding is refused (what is
quantized cannot be taken back), and so are right padding and attention that is more than softmax(q . K) . V.
"""
import sys
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # or copy kivi.py and quantize.py beside this file
from kivi import KiviCache  # noqa: E402


class KiviLayer(DynamicLayer):
    def __init__(self, config, max_len, options):
        super().__init__()
        self.config, self.max_len, self.options, self.cache, self.seen = config, max_len, options, None, 0

    def update(self, key, value, *args, **kwargs):
        if self.config._attn_implementation != "kivi":
            raise ValueError(f"the model's attention is {self.config._attn_implementation}, not kivi: call model.set_attn_implementation('kivi')")
        self.seen += key.shape[2]
        key.layer = self  # `attention`, which gets the key next, finds the cache here
        return key, value

    def prefill(self, key, value, real, sliding):
        """key, value [B, Hk, L, D], real [B, L]: left-padded rows become the right-padded ones of KiviCache."""
        (B, Hk, L, D), t = key.shape, torch.arange(key.shape[2], device=key.device)
        lengths = real.sum(1)
        first = L - lengths[:, None]  # [B, 1] column of a row's first token
        if not torch.equal(real, t >= first):
            raise ValueError("padding that is not to the left of a prompt: set tokenizer.padding_side = 'left'")
        self.cache = KiviCache(B, Hk, self.max_len, D, sliding=sliding, dtype=key.dtype, device=key.device, **self.options)
        index = (t + first).clamp(max=L - 1)[:, None, :, None].expand_as(key)
        self.cache.prefill(key.gather(2, index), value.gather(2, index), lengths.tolist())

    def get_seq_length(self):
        return self.seen

    def get_max_length(self):
        return self.max_len

    def reset(self):
        self.cache, self.seen = None, 0

    def reorder_cache(self, beam_idx):
        cache = self.cache
        for name, x in cache.named_buffers():
            if x.dim() > 1 or name == "pos":  # those of rows
                x.copy_(x[beam_idx.to(x.device)])
        cache.lengths[:] = [cache.lengths[i] for i in beam_idx.tolist()]

    def crop(self, tokens_to_remove):
        if tokens_to_remove:
            raise ValueError("a KIVI cache cannot be cropped, what is quantized cannot be taken back: decode without an assistant")

    def activate_past_recording(self):
        self.crop(1)

    def batch_repeat_interleave(self, repeats):
        raise ValueError("a KIVI cache has a fixed number of rows: repeat the prompts before the first step")

    batch_select_indices = batch_repeat_interleave


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    layer, L = getattr(key, "layer", None), query.shape[2]
    exact = lambda: sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layer is None:  # without a cache, or with another one
        return exact()
    more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if more:
        raise ValueError(f"{type(module).__name__} uses {more[0]}, which a KIVI cache does not compute")
    if attention_mask is None:
        real = torch.ones(key.shape[0], L, dtype=torch.bool, device=key.device)
    else:
        real = attention_mask[:, 0, :, -L:].diagonal(dim1=1, dim2=2)  # [B, L]: only padding does not see itself
    if layer.cache is None:
        layer.prefill(key, value, real, kwargs.get("sliding_window"))
        return exact()
    if L > 1 and not real.all():
        raise ValueError("padding after the first prompt: continue rows of a batch with equally many tokens")
    q, out = query * (scaling * query.shape[3] ** 0.5 if scaling else 1), []
    for t in range(L):  # one, except where a conversation goes on
        layer.cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
        out.append(layer.cache.attend(q[:, :, t : t + 1]))  # [B, H, 1, D]
    return torch.cat(out, 2).transpose(1, 2), None


AttentionInterface.register("kivi", attention)
AttentionMaskInterface.register("kivi", sdpa_mask)


class KiviPastKeyValues(Cache):
    """Room for max_len tokens a row; options are those of KiviCache: k_bits, v_bits, group_size, residual, sink."""

    def __init__(self, model, max_len, **options):
        config = model.config.get_text_config(decoder=True)
        for name in ("num_kv_shared_layers", "attention_chunk_size"):
            if getattr(config, name, None):
                raise ValueError(f"{type(model).__name__} has {name}, which a KIVI cache does not know")
        model.set_attn_implementation("kivi")
        super().__init__(layers=[KiviLayer(config, max_len, options) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self):
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)


def main(checkpoint=Path(__file__).resolve().parent.parent / "tiny"):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(["Once upon a time", "The old man looked at the sea and"], return_tensors="pt", padding=True, return_token_type_ids=False)
    cache = KiviPastKeyValues(model, max_len=512)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=200, do_sample=False)
    print(*tokenizer.batch_decode(out, skip_special_tokens=True), f"cache: {cache.nbytes:,} bytes", sep="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
