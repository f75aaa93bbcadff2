"""Contingency counts of words and features over a text collection: objective "corpus-mi"."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.activations import _Batch, _batches
from fastsae.explain.counts import MAX_PAIRS, CorpusCounts, PairCounter
from fastsae.explain.explanations import identity_of
from fastsae.explain.vocabulary import Vocabulary
from fastsae.sae import SAE

# A word of a text: letters, with apostrophes inside ("don't" is one word, and not "don").
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def corpus_counts(
    sae: SAE,
    model,
    tokenizer,
    texts: Iterable[str],
    vocab: Vocabulary,
    windows: Sequence[int | str] = ("word",),
    *,
    layer: int | str | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    max_pairs: int = MAX_PAIRS,
) -> dict[int | str, CorpusCounts]:
    """n[f, v] = passages of `texts` in which word v occurs and feature f is active, per window.

    windows: how a text is cut into passages. "word": every word of the text is a passage of its
    own, so n counts the occurrences of v on which f is active (on any of the word's tokens);
    an integer n: blocks of n consecutive tokens; "document": the whole text. A word belongs to the
    passage of its first token. Words are runs of letters, found in the vocabulary as written or in
    lower case; position 0 (an attention sink) and what lies behind `max_length` tokens never count.
    texts, layer, batch_size, max_length: as in `top_activations`; the texts are read once, the
    model runs once for all windows. Passages never straddle texts, so counts of parts of a
    collection add up (`CorpusCounts.merge`). Memory: 12 bytes per pair (f, v) that was seen
    together; more than `max_pairs` of them raise FastsaeError, nothing is ever dropped.
    Needs a fast tokenizer (character offsets).
    """
    batches = _batches(
        sae, model, tokenizer, texts, list(range(sae.config.d_sae)), layer, batch_size, max_length
    )
    return count_batches(batches, sae, model, tokenizer, vocab, windows, max_pairs=max_pairs)


def count_batches(
    batches: Iterable[_Batch],
    sae: SAE,
    model,
    tokenizer,
    vocab: Vocabulary,
    windows: Sequence[int | str],
    *,
    max_pairs: int = MAX_PAIRS,
) -> dict[int | str, CorpusCounts]:
    """`corpus_counts` of batches in which every feature is looked at."""
    windows = [_checked_window(window) for window in windows]
    if not windows or len(set(windows)) < len(windows):
        raise FastsaeError(f"windows: got {windows}, give each passage window once, at least one")
    if not getattr(tokenizer, "is_fast", False):
        raise FastsaeError(
            "tokenizer: words are found by character offsets, which only fast tokenizers give; "
            "load it with use_fast=True"
        )
    f, v = sae.config.d_sae, len(vocab)
    counters = {window: PairCounter(f, v, max_pairs) for window in windows}
    tokens = 0
    for batch in batches:
        words = _words(batch, tokenizer, vocab)
        for window, counter in counters.items():
            _count(batch, words, window, counter)
        tokens += batch.tokens
    if not tokens:
        raise FastsaeError("texts: hold no token beyond position 0; give at least one text")
    about = (vocab, identity_of(sae), getattr(model.config, "_name_or_path", ""), tokens)
    return {window: counter.result(window, *about) for window, counter in counters.items()}


def _checked_window(window: int | str) -> int | str:
    whole = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    if not whole and window not in ("word", "document"):
        raise FastsaeError(
            f'window: got {window!r}, accepted are "word", "document" or a number of tokens (≥ 1)'
        )
    return window


class _Words(NamedTuple):
    """The words of a batch in text order, those outside the vocabulary too; W of them."""

    row: Tensor  # [W] int64, row of the batch
    first: Tensor  # [W] int64, position of the first token
    index: Tensor  # [W] int64, position in the vocabulary, -1 when outside
    of_token: Tensor  # [B, L] int64, the word that a token belongs to, -1 for none


def _words(batch: _Batch, tokenizer, vocab: Vocabulary) -> _Words:
    """Words by character offsets. A token that touches two words belongs to the first of them."""
    length = batch.ids.shape[1]
    encoded = tokenizer(
        batch.documents, truncation=True, max_length=length, return_offsets_mapping=True
    )
    of_token = torch.full(batch.ids.shape, -1)
    rows, firsts, indices, total = [], [], [], 0
    position = vocab._position
    for row, text in enumerate(batch.documents):
        found = [m.span() for m in _WORD.finditer(text)]
        if not found:
            continue
        starts, ends = np.array(found).T
        at = np.array(encoded["offset_mapping"][row])
        at[0] = 0  # position 0 never counts
        # The first word that ends behind the token's start is the token's, if it begins in time.
        word = ends.searchsorted(at[:, 0], side="right")
        inside = (at[:, 1] > at[:, 0]) & (word < len(ends))
        inside &= starts[word.clip(max=len(ends) - 1)] < at[:, 1]
        where = inside.nonzero()[0]
        seen, first = np.unique(word[where], return_index=True)
        renumbered = np.full(len(ends), -1)
        renumbered[seen] = np.arange(len(seen)) + total
        of_token[row, torch.from_numpy(where)] = torch.from_numpy(renumbered[word[where]])
        forms = [text[slice(*found[i])] for i in seen]
        indices += [position.get(form, position.get(form.lower(), -1)) for form in forms]
        firsts += where[first].tolist()
        rows += [row] * len(seen)
        total += len(seen)
    return _Words(*(torch.tensor(x, dtype=torch.int64) for x in (rows, firsts, indices)), of_token)


def _count(batch: _Batch, words: _Words, window: int | str, counter: PairCounter) -> None:
    """Passages are numbered within the batch; every pair of passage and feature counts once."""
    rows, length = batch.ids.shape
    known = (words.index >= 0).nonzero()[:, 0]
    if window == "word":
        passage = words.of_token[batch.document, batch.position]
        inside = passage >= 0
        counter.add(
            passage[inside], batch.slot[inside], known, words.index[known], len(words.index)
        )
        return
    step = length if window == "document" else window
    per_row = -(-(length - 1) // step)
    has_token = torch.zeros(rows * per_row, dtype=torch.bool)
    row, position = (batch.ids[:, 1:] >= 0).nonzero(as_tuple=True)
    has_token[row * per_row + position // step] = True
    counter.add(
        batch.document * per_row + (batch.position - 1) // step,
        batch.slot,
        (words.row * per_row + (words.first - 1) // step)[known],
        words.index[known],
        int(has_token.sum()),
    )
