"""Several tokens a step, exactly: drafts are verified together, and only then join the cache.

A step reads the newest token and up to n - 1 drafts of what may follow, and samples behind each of
them. As long as the sample is the next draft, the draft is accepted. The first other sample is a
new token as well, because everything before it is right. A draft is one token, not a distribution:
to accept it where the sample equals it keeps the distribution of the text at any temperature.

Drafts come from the text itself (`Lookup`) or from a smaller model (`SmallModel`).
"""
from itertools import pairwise
from os.path import commonprefix  # of any lists

import torch

from decoding.decoder import Decoder, bucket, checked, padded, sample
from fused.step import DraftStep, compiled_draft_step
from kivi import FullCache, KiviCache

GRAMS = 3, 2  # tokens that must be alike before what followed them is proposed


def grams(text, end):
    """The last tokens before place `end` of a text, more of them first."""
    return [tuple(text[end - size : end]) for size in GRAMS if size <= end]


class Lookup:
    """Drafts for one row: what followed the last tokens when they stood in its text before."""

    def __init__(self):
        self.known = 0  # tokens of the text
        self.ends = {}  # where these tokens ended last

    def propose(self, text, n):
        """Up to n tokens that may follow `text`, which begins like that of the call before."""
        for end in range(self.known, len(text)):  # not the last ones: they would find themselves
            for gram in grams(text, end):
                self.ends[gram] = end
        self.known = len(text)
        for gram in grams(text, len(text)):
            if gram in self.ends:
                end = self.ends[gram]
                return text[end : end + n]
        return []


class Lookups:
    """Drafts for all rows of a batch, by `Lookup`."""

    def begin(self, rows):
        self.rows = [Lookup() for _ in rows]

    def __call__(self, texts, lengths, most):
        return [row.propose(text, n) for row, text, n in zip(self.rows, texts, most)]


class SmallModel:
    """Drafts by greedy steps of another model with the same tokenizer, in full precision."""

    def __init__(self, model, batch, max_len):
        model.setup_caches(batch, max_len, "bf16")
        self.model = model
        self.decoder = Decoder(model, torch.zeros_like(model.cache.pos)[:, None])
        self.held = [[]] * batch  # tokens that are in its cache

    def begin(self, rows):
        """Reads what is new in each row."""
        common = [len(commonprefix(pair)) for pair in zip(self.held, rows)]
        common = [min(n, len(row) - 1) for n, row in zip(common, rows)]
        self.model.cache.set_lengths(common)
        new = [row[n:] for n, row in zip(common, rows)]
        self.model.extend(*padded(new, self.decoder.token.device))
        self.held = rows

    def __call__(self, texts, lengths, most):
        cache, drafts = self.model.cache, []
        # A row that has ended is parked, and its cache is overwritten from the front.
        self.held = [text[:n] if n == len(text) - 1 else [] for text, n in zip(texts, lengths)]
        cache.set_lengths(lengths)  # what was wrong is overwritten
        self.decoder.token.copy_(torch.tensor([text[-1:] for text in texts]))
        # One more than are drafted, so that the cache holds them all.
        for _ in range(min(max(most) + 1, cache.max_len - cache.length)):
            self.decoder()
            drafts.append(self.decoder.token.clone())
        cache.set_lengths(lengths)
        return [row[:n] for row, n in zip(torch.cat(drafts, 1).tolist(), most)]


def speculator(model, token, n_drafts, small=None, **sampling):
    """A Speculator over the caches of `model`, whose drafts come from a `small` model, if given.

    raises ValueError: the small model has other tokens, or a shorter context, or is the model
    """
    if not 1 <= n_drafts <= 15:
        raise ValueError(f"a step verifies 1 to 15 drafts, not {n_drafts}")
    if model.config.rope_scaling.get("rope_type") == "dynamic":
        raise ValueError("drafts do not work with a rotary embedding of type dynamic: its angles "
                         "depend on how many tokens there are")
    if any(type(layer.cache) not in (FullCache, KiviCache) for layer in model.layers):
        raise ValueError("drafts do not work with this kind of cache: leave out --speculate, or "
                         "choose another --kv")
    if small is model:
        raise ValueError("the draft model must be an object of its own: its caches are its own")
    if small and small.config.vocab_size > model.config.vocab_size:
        raise ValueError(f"the draft model has {small.config.vocab_size} tokens, the model only "
                         f"{model.config.vocab_size}: they need the same tokenizer")
    propose = SmallModel(small, len(token), model.cache.max_len) if small else Lookups()
    return Speculator(model, token, n_drafts + 1, propose, **sampling)


class Speculator(Decoder):
    """Steps of `model` that verify drafts, otherwise as `Decoder`.

    n       tokens of a row that a step reads, of which n - 1 are drafts
    propose Lookups or SmallModel: called with the texts so far, how many tokens of each are in the
            cache, and how many drafts it can use
    """

    def __init__(self, model, token, n, propose, graphs=None, **sampling):
        super().__init__(model, token, graphs, **sampling)
        B, device = len(token), token.device
        self.n, self.propose = n, propose
        self.input = torch.zeros(B, n + 1, dtype=torch.int64, device=device)  # and how many count
        self.output = torch.zeros_like(self.input)
        compiled = compiled_draft_step(model.config, device) if model.compiled else DraftStep()
        self.step = compiled
        self.counts |= {"proposed": 0, "accepted": 0}

    def most(self, row):
        """How many drafts can row `row` use? None is beyond the end of its key block."""
        cache = self.model.cache
        length = cache.lengths[row]
        room = cache.max_len - length
        if cache.config:
            room = min(room, cache.config.residual - length % cache.config.residual)
        return min(self.n, room) - 1

    def begin(self, token, rows):
        self.texts = [row + more for row, more in zip(rows, token.tolist())]
        self.propose.begin(rows)

    def steps(self, done, new, limits):
        """As `Decoder.steps`, but several tokens at a time."""
        yield [text[-1:] for text in self.texts]
        while True:
            yield self([0 if ended else limit - len(row)
                        for ended, row, limit in zip(done, new, limits)])

    def __call__(self, wanted):
        """One step: the new tokens of each row, at most as many as are `wanted`, but always one."""
        cache = self.model.cache
        if cache.length >= cache.max_len:
            cache.advance()  # refuses
        most = [max(0, min(self.most(row), n - 1)) for row, n in enumerate(wanted)]
        drafts = self.propose(self.texts, cache.lengths, most)
        rows = [text[-1:] + more for text, more in zip(self.texts, drafts)]
        self.input.copy_(torch.tensor(
            [row + [0] * (self.n - len(row)) + [len(row)] for row in rows]))
        length = cache.length + self.n
        length = bucket(length, cache.block) if self._captures else length
        t = cache.tokens(length)
        if self._is_prepared(t):
            self._run(t)
        else:
            self._prepare(t)
        self._started = True
        output = self.output.tolist()
        new = [row[: row[-1]] for row in output]
        cache.lengths[:] = [n + len(row) for n, row in zip(cache.lengths, new)]
        if cache.completes_key_block():
            self.model.flush()
        for text, row in zip(self.texts, new):
            text += [max(token, 0) for token in row]  # -1 stands for no number, and ends the row
        self.counts["proposed"] += sum(map(len, drafts))
        self.counts["accepted"] += sum(map(len, new)) - len(new)
        return new

    def _capture(self, t):
        """As `Decoder._capture`. Its first run, which compiles, must accept nothing: it would take
        the place of values that the step itself still needs."""
        given = self.input.clone()
        self.input[:, -1] = 1
        super()._capture(t)
        self.input.copy_(given)

    def _step(self, t):
        tokens, count = self.input[:, :-1], self.input[:, -1:]  # [B, n], [B, 1]
        logits, drafts = self.verify(tokens, count[:, 0], t)
        samples = sample(logits.flatten(0, 1), **self.sampling).view_as(tokens)
        place = torch.arange(1, self.n, device=tokens.device)
        same = (samples[:, :-1] == tokens[:, 1:]) & (place < count)
        accepted = 1 + same.long().cumprod(1).sum(1)  # [B]
        pos = self.model.cache.pos
        for layer, (k, v) in zip(self.model.layers, drafts):
            self.step.commit(layer.cache, k, v, pos, accepted)
        pos += accepted
        self.output.copy_(torch.cat([checked(samples, logits), accepted[:, None]], 1))

    def verify(self, tokens, count, t):
        """Logits [B, n, V] behind each of the tokens [B, n], of which `count` [B] are real, and K
        and V of every layer."""
        model, step, pos = self.model, self.step, self.model.cache.pos
        x, cos, sin = step.start(model, tokens, pos)
        q, k, v, left = step.before(model.layers[0], x, cos, sin, pos, count)
        drafts = [(k, v)]
        for layer, following in pairwise(model.layers):
            y = step.attend(layer.cache, q, pos, t, k, v, left)
            x, q, k, v, left = step.between(layer, following, x, y, cos, sin, pos, count)
            drafts.append((k, v))
        y = step.attend(model.layers[-1].cache, q, pos, t, k, v, left)
        return step.last(model.layers[-1], model.norm, model.head, x, y), drafts
