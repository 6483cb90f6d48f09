"""KV Prediction: half of the layers read a prompt, and predict K and V of the others (2410.08391).

The lower layers compute a prompt exactly. What enters the middle one becomes K and V of every layer
above by a linear map, so that those layers compute nothing for it: about half of the prefill. Only
the first and the last of the new tokens pass through all layers: models attend to the first as to a
sink, and the last one's logits are wanted. Decoding is as ever, and any cache can hold the result.

As published: linear maps with a bias, K predicted before RoPE, the last token by the whole model.
Not: there a small model of its own reads the prompt, and its K and V are mapped; both are trained
     together. Nobody has published one, so here the lower layers take its place, what is mapped are
     hidden states of the same model, and ridge regression fits the maps.
Beyond: the first token is exact."""
import torch
from torch.nn import functional as F

from checkpoint.rope import rotate
from model import Transformer
from neighbours import fitted
from quantize import take


class PredictingTransformer(Transformer):
    """A Transformer with `maps` [upper layers, dim + 1, 2 Hk D], the last row of each its bias."""

    def extend_rows(self, tokens, ends, row, chunk):
        x, P, (B, L) = self.embed(tokens), self.cache.lengths[row], tokens.shape
        ends = torch.tensor(ends, device=x.device)
        start, t = torch.full_like(ends, P), torch.arange(P + L, device=x.device)
        cos, sin = self.rope(t[None, P:], ends)
        finite, n_lower = [], len(self.layers) - len(self.maps)
        for layer in self.layers[:n_lower]:
            x, ok = layer.extend(x, cos, sin, start, ends, row, chunk)
            finite.append(ok)
        place = torch.stack([torch.zeros_like(ends), ends - P - 1], 1)  # [B, 2]: first and last
        exact = take(x[:, None], place)[:, 0]  # [B, 2, dim]
        rotation = [take(y.expand(B, -1, -1, -1), place) for y in (cos, sin)]
        pos = P + place[..., None]
        for layer, weights in zip(self.layers[n_lower:], self.maps):
            q, *own = layer.attention.qkv(layer.attention_norm(exact), *rotation)
            k, v = predicted(x, weights, self.config.head_dim)
            index = place[:, None, :, None].expand_as(own[0])
            k, v = (y.scatter(2, index, z) for y, z in zip((rotate(k, cos, sin), v), own))
            finite += [torch.isfinite(q).all(), *map(layer.cache.storable, (k, v))]
            past = layer.cache.dequantized(slice(row, row + B)) if P else (k[:, :, :0],) * 2
            all_k, all_v = (torch.cat([y.to(z.dtype), z], 2) for y, z in zip(past, (k, v)))
            # What a cache has dropped leaves fewer: as if those held were the newest.
            held = t[-all_k.shape[2] :]
            seen = (held <= pos) & (held > pos - (layer.window or P + L))
            y = F.scaled_dot_product_attention(q, all_k, all_v, seen[:, None], enable_gqa=True)
            layer.cache.fill(k, v, start, ends, row)
            exact = layer.after(exact, y)
        return self.head(self.norm(exact[:, 1])), torch.stack(finite).all()

    def setup_caches(self, *shape, **options):
        super().setup_caches(*shape, **options)
        if getattr(self.cache.config, "observes", False):
            raise ValueError("the kv ranks tokens by queries, which are not computed where K and V "
                             "are predicted: leave out --predict, or choose another --kv")


def predicted(x, weights, head_dim):
    """K before RoPE and V [B, Hk, n, D] of a layer, from what enters the middle one [B, n, dim]."""
    y = x @ weights[:-1] + weights[-1]
    return y.unflatten(-1, (2, -1, head_dim)).permute(2, 0, 3, 1, 4)


def predict_layers(model, file):
    """Lets a model predict from now on, with the maps that `fit` wrote.

    raises ValueError: the file cannot be used; the model is divided among processes
    """
    c = model.config
    shape = [c.n_layers // 2, c.dim + 1, 2 * c.n_kv_heads * c.head_dim]
    maps = fitted.read(file, model, "predict", {"maps": shape})["maps"]
    model.register_buffer("maps", maps.to(model.embed.weight), persistent=False)
    model.__class__ = PredictingTransformer  # in place: weights are large


def fit(model, tokens):
    """K and V of the upper layers from what enters the middle one: for --predict FILE"""
    middle = (len(model.layers) + 1) // 2  # of an odd number the larger part is exact
    x = model.embed(tokens)
    cos, sin = model.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
    maps = []
    for number, layer in enumerate(model.layers):
        if number == middle:
            rows = x[:, 1:].flatten(0, 1).double()  # the first token is exact, and unlike others
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            square = rows.mT @ rows
            # Ridge: inputs are many, and alike.
            square.diagonal().add_(1e-4 * square.diagonal().mean())
        if number >= middle:
            unturned = torch.ones_like(cos), torch.zeros_like(sin)
            _, k, v = layer.attention.qkv(layer.attention_norm(x), *unturned)
            wanted = torch.cat([y.transpose(1, 2).flatten(2) for y in (k, v)], -1)
            wanted = wanted[:, 1:].flatten(0, 1).double()
            maps.append(torch.linalg.solve(square, rows.mT @ wanted).float())
        x = layer(x, cos, sin)
    return {"maps": torch.stack(maps)}
