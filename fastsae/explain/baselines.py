"""A baseline for words: the n-grams a feature fires on, found by pruning its best texts.

The other baselines are `top_activations`, and `explain` with objective "logit" (the logit lens).
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.data import layer_activations
from fastsae.errors import FastsaeError
from fastsae.explain.activations import _batches, _Best, _chosen, _place
from fastsae.explain.corpus import _WORD
from fastsae.explain.examples import _Pieces
from fastsae.explain.vocabulary import Vocabulary
from fastsae.models import model_device

ANY = "·"  # a place where any token will do


class NGram(NamedTuple):
    """Tokens that make a feature fire on the last of them."""

    tokens: tuple[str, ...]  # ANY where the token does not matter
    value: float  # the feature's activation on the last token, after these tokens alone
    share: float  # of the activation in the whole text
    found: int  # texts that gave this n-gram

    def __str__(self) -> str:
        return "".join(self.tokens)


@torch.no_grad()
def ngrams(
    sae,
    model,
    tokenizer,
    texts: Iterable[str],
    features: Sequence[int],
    *,
    n: int = 5,
    keep: float = 0.5,
    longest: int = 12,
    substitutes: int = 4,
    layer: int | str | None = None,
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[int, list[NGram]]:
    """The shortest ends of each feature's n best texts on which a_f stays ≥ keep · a_f(whole text).

    1. The best places, as in `top_activations`. 2. The shortest suffix, of up to `longest` tokens
    behind the special tokens that the tokenizer puts first, that keeps the activation of its last
    token; the whole suffix of `longest` tokens where none does. 3. Each of its tokens but the last
    is replaced by the `substitutes` tokens that the model itself finds most probable there; where
    the activation stays for all of them, the place is ANY; a leading ANY says that some token must
    precede. A place whose activation no suffix keeps stays as it is, with its small `share`.

    keep: 0..1. Other arguments and errors as in `top_activations`. Returns {feature: [NGram, ...]},
    those of most texts first, then by activation; equal n-grams are merged (largest value). A
    feature that never fires has none. Source: after "N2G" (Foote et al. 2023, arXiv 2305.19911),
    with the model's own predictions in place of a masked language model's.
    """
    chosen = _chosen(sae, features)
    limits = (("n", n, 1), ("longest", longest, 1), ("substitutes", substitutes, 1))
    for name, value, least in limits:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FastsaeError(f"{name}: got {value!r}, accepted is an integer of {least} or more")
    if not 0 < keep <= 1:
        raise FastsaeError(f"keep: got {keep!r}, accepted is a number above 0, at most 1")
    best = _Best(len(chosen), n, longest - 1)
    for batch in _batches(sae, model, tokenizer, texts, chosen, layer, batch_size, max_length):
        best.merge(batch)
    prune = _Pruner(sae, model, tokenizer, layer, keep, substitutes)
    was_training = model.training
    model.eval()
    try:
        return {f: _of_feature(prune, f, best, slot, longest) for slot, f in enumerate(chosen)}
    finally:
        model.train(was_training)


def _of_feature(prune: "_Pruner", feature: int, best: _Best, slot: int, longest: int):
    merged: dict[tuple[str, ...], NGram] = {}
    for i in range(int((best.values[slot] > 0).sum())):
        window = best.windows[slot, i, :longest]
        whole = float(best.values[slot, i])
        ids = [t for t in window[window >= 0].tolist() if t not in prune.special]
        if not ids:
            continue  # it fires on a special token
        tokens, value = prune(feature, ids, whole)
        found = NGram(tokens, value, value / whole, 1)
        if tokens in merged:
            old = merged[tokens]
            found = max(old, found, key=lambda g: g.value)._replace(found=old.found + 1)
        merged[tokens] = found
    return sorted(merged.values(), key=lambda g: (-g.found, -g.value))


@torch.no_grad()
def ngram_scores(
    sae, model, tokenizer, best: _Best, vocab: Vocabulary, rows: Tensor, n: int,
    *, keep: float = 0.5, substitutes: int = 4,
) -> Tensor:  # fmt: skip
    """The words that the n-grams of a feature's n best places are made of: [S, V] float32.

    score(f, v) = Σ over the places of the activation on the n-gram alone, halved where v is one of
    its earlier words and not the one that the feature fires on; −∞ where no n-gram has v. A word of
    which the n-gram has a token counts. best: the places of all features, in order; rows [S]:
    features; other arguments as in `ngrams`.
    """
    out = torch.full((len(rows), len(vocab)), -torch.inf)
    prune, position = _Pruner(sae, model, tokenizer, None, keep, substitutes), vocab._position
    pieces, was_training = _Pieces(tokenizer), model.training
    model.eval()
    try:
        for row, feature in enumerate(rows.tolist()):
            for i in range(min(n, int((best.values[feature] > 0).sum()))):
                window = best.windows[feature, i].tolist()
                ids = [t for t in window[: best.context + 1] if t >= 0 and t not in prune.special]
                if not ids:
                    continue  # it fires on a special token
                length, free, value = prune.pruned(feature, ids, float(best.values[feature, i]))
                kept = [
                    len(ids) - length + at for at, any_ in enumerate([*free, False]) if not any_
                ]
                after = [t for t in window[best.context + 1 :] if t >= 0]
                for word, last in _words_at(pieces(ids + after), kept):
                    v = position.get(word, position.get(word.lower(), -1))
                    if v >= 0:
                        gain = value if last else value / 2
                        out[row, v] = max(0.0, float(out[row, v])) + gain
    finally:
        model.train(was_training)
    return out


def _words_at(pieces: list[str], kept: list[int]) -> dict[tuple[str, bool], None]:
    """The words that have a kept piece, each once, and whether they have the last of these."""
    ends = list(accumulate(map(len, pieces)))
    spans = [(ends[at] - len(pieces[at]), ends[at]) for at in kept]
    found = {}
    for match in _WORD.finditer("".join(pieces)):
        inside = [a < match.end() and b > match.start() for a, b in spans]
        if any(inside):
            found[match.group(), inside[-1]] = None
    return found


class _Pruner:
    """Steps 2 and 3 for one place in a text."""

    def __init__(self, sae, model, tokenizer, layer, keep: float, substitutes: int):
        self.sae, self.model, self.tokenizer = sae, model, tokenizer
        self.hook, self.keep, self.substitutes = _place(sae, layer), keep, substitutes
        self.first = list(tokenizer("")["input_ids"])
        self.special = set(getattr(tokenizer, "all_special_ids", ())) | set(self.first)

    def __call__(self, feature: int, ids: list[int], whole: float) -> tuple[tuple, float]:
        """The n-gram's tokens, and the activation after them alone."""
        length, free, value = self.pruned(feature, ids, whole)
        names = [
            self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids[-length:]
        ]
        return tuple(ANY if f else t for f, t in zip([*free, False], names, strict=True)), value

    def pruned(self, feature: int, ids: list[int], whole: float) -> tuple[int, list[bool], float]:
        """How many of the last tokens stay, which of them but the last are ANY, and their value."""
        floor = self.keep * whole
        values = self._last(feature, [ids[-length:] for length in range(1, len(ids) + 1)])
        fits = (values >= floor).nonzero()[:, 0]
        length = int(fits[0]) + 1 if len(fits) else len(ids)
        ids, value = ids[-length:], float(values[length - 1])
        free = [False] * (length - 1)
        if len(fits) and length > 1:
            free = self._free(feature, ids, floor)
        return length, free, value

    def _free(self, feature: int, ids: list[int], floor: float) -> list[bool]:
        """For each token but the last: does the activation outlive every substitute?"""
        likely = self._likely(ids)
        changed = [
            ids[:place] + [other] + ids[place + 1 :]
            for place, others in enumerate(likely)
            for other in others
        ]
        kept = (self._last(feature, changed) >= floor).view(len(ids) - 1, self.substitutes)
        return kept.all(1).tolist()

    def _likely(self, ids: list[int]) -> list[list[int]]:
        """The model's most probable tokens at each place but the last, without the one there."""
        prompt = torch.tensor([self.first + ids], device=model_device(self.model))
        logits = self.model(prompt).logits[0].float()
        out = []
        for place, own in enumerate(ids[:-1]):
            at = len(self.first) + place - 1
            # Nothing precedes the first token where the tokenizer puts none before it.
            row = logits[max(at, 0)].clone()
            row[[own, *self.special]] = -torch.inf
            out.append(row.topk(self.substitutes).indices.tolist())
        return out

    def _last(self, feature: int, rows: list[list[int]]) -> Tensor:
        """[len(rows)] a_f on the last token of each row, behind the special tokens."""
        device, values = model_device(self.model), []
        for part in (rows[i : i + 32] for i in range(0, len(rows), 32)):
            full = [torch.tensor(self.first + row) for row in part]
            # Causal attention: what lies behind a row's end cannot change it.
            ids = torch.nn.utils.rnn.pad_sequence(full, batch_first=True).to(device)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in full], batch_first=True
            ).to(device)
            hidden = layer_activations(self.model, self.hook, ids, mask)
            last = hidden[range(len(full)), [len(row) - 1 for row in full]]
            z = self.sae.encode(last.to(self.sae.W_enc.device))
            here = z.indices == feature
            values.append(torch.where(here, z.values, 0).float().amax(1).clamp(min=0).cpu())
        return torch.cat(values)
