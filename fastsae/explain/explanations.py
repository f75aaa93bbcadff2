"""What `explain` returns: the words of every feature, searchable, with the SAE they belong to."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.vocabulary import Vocabulary
from fastsae.sae import FeatureStats

AGGREGATES = ("sum", "mean", "max", "count")


class SAEIdentity(NamedTuple):
    """Which SAE explanations were made from."""

    hook_name: str | None  # where it reads the model, in its checkpoint's words
    model_name: str | None
    activation: str
    d_in: int
    d_sae: int
    digest: str  # sha256 of W_dec rounded to bfloat16: equal for float32 and bfloat16 loads


def identity_of(sae) -> SAEIdentity:
    """The identity of an SAE; reads all of W_dec once."""
    c = sae.config
    return SAEIdentity(
        c.hook_name,
        c.model_name,
        c.activation,
        c.d_in,
        c.d_sae,
        decoder_digest(sae.W_dec),
    )


@torch.no_grad()
def decoder_digest(W_dec: Tensor) -> str:
    """sha256 over the bfloat16 bits of W_dec [F, D], row by row, whatever its dtype and device."""
    digest = hashlib.sha256(repr(tuple(W_dec.shape)).encode())
    for rows in W_dec.detach().split(4096):
        digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Explanations:
    """The M best words of each of F features.

    scores: [F, M] float32, descending; indices: [F, M] int32, positions in `vocab`.
    objective: "corpus-mi" | "mi" | "pmi" | "paper" | "logit" (fastsae/explain/mi.py states them).
    temperature: the number that divided the logits ("auto" already resolved; 1.0 where unused).
    model_name: the explained model; sae: which SAE; stats: how the features fire, if known.
    made_with: what else decided the scores, plain data: the lens, or the texts' window and size.
    """

    scores: Tensor
    indices: Tensor
    vocab: Vocabulary
    objective: str
    temperature: float
    model_name: str
    sae: SAEIdentity
    stats: FeatureStats | None = None
    made_with: dict = field(default_factory=dict)

    def __post_init__(self):
        s, i = self.scores, self.indices
        if s.ndim != 2 or s.shape != i.shape or s.shape[0] != self.sae.d_sae:
            raise FastsaeError(
                f"explanations: scores {list(s.shape)} and indices {list(i.shape)} must both be "
                f"[{self.sae.d_sae}, M]"
            )
        if i.numel() and not (0 <= int(i.min()) and int(i.max()) < len(self.vocab)):
            raise FastsaeError(f"explanations: word indices leave 0..{len(self.vocab) - 1}")

    def __len__(self) -> int:
        return self.scores.shape[0]

    def __repr__(self) -> str:
        shape = f"{len(self)} features x {self.scores.shape[1]} words of {len(self.vocab)}"
        return (
            f"Explanations({shape}, objective={self.objective!r}, "
            f"temperature={self.temperature:.4g}, model={self.model_name!r})"
        )

    def words(self, feature: int) -> list[str]:
        """The feature's words, best first."""
        return [self.vocab.words[i] for i in self.indices[self._row(feature)].tolist()]

    def scores_of(self, feature: int) -> list[float]:
        """The scores of `words(feature)`, in the same order."""
        return self.scores[self._row(feature)].tolist()

    def _row(self, feature: int) -> int:
        try:
            row = int(feature)
        except (TypeError, ValueError):
            raise FastsaeError(f"feature: got {feature!r}, accepted is an integer") from None
        if not 0 <= row < len(self):
            raise FastsaeError(f"feature: got {feature}, accepted are 0..{len(self) - 1}")
        return row

    def search(
        self,
        query: str | Sequence[str],
        top: int = 10,
        *,
        aggregate: str = "sum",
        match: str = "any",
        alive_only: bool = False,
        min_frequency: float | None = None,
        max_frequency: float | None = None,
    ) -> list[tuple[int, float]]:
        """Features ranked by  aggregate over the query's words q of s(f, q), best first.

        query: words in one string (spaces or commas between) or a sequence; repeats count once.
        s(f, q) is the feature's score for q when q is among its M kept words. Otherwise it is what
        an unrelated pair would score (pmi: −log F; paper: −log F / V; others: 0), or the feature's
        last kept score if that is lower, because a word that was not kept cannot beat it.
        aggregate: "sum", "mean" or "max" of s(f, q) over the query's words; "count": how many of
        them the feature keeps, equal counts ranked by the sum.
        match: "any" returns features that keep at least one of the words, "all" those with all.
        alive_only leaves out features that never fired; min_frequency and max_frequency those that
        fire on a smaller or larger share of tokens (0..1). All three need feature statistics.

        Returns up to `top` pairs (feature, value); fewer when fewer match; ties: the lower feature.
        Raises FastsaeError, with close matches, for a word outside the vocabulary.
        """
        if aggregate not in AGGREGATES:
            raise FastsaeError(
                f"aggregate: got {aggregate!r}, accepted are {', '.join(AGGREGATES)}"
            )
        if match not in ("any", "all"):
            raise FastsaeError(f"match: got {match!r}, accepted are any, all")
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise FastsaeError(f"top: got {top!r}, accepted is an integer of 1 or more")
        features, kept, values = self._matches(self._query(query), match)
        allowed = self._allowed(alive_only, min_frequency, max_frequency)[features]
        features, kept, values = features[allowed], kept[:, allowed], values[:, allowed]
        total = {"mean": values.mean(0), "max": values.amax(0)}.get(aggregate, values.sum(0))
        order = total.sort(descending=True, stable=True).indices
        if aggregate == "count":
            total = kept.sum(0).double()
            order = order[total[order].sort(descending=True, stable=True).indices]
        order = order[:top]
        return list(zip(features[order].tolist(), total[order].tolist(), strict=True))

    def _matches(self, words: list[int], match: str) -> tuple[Tensor, Tensor, Tensor]:
        """Features [n] that keep any or all of the words, ascending; whether they keep each, and
        s(f, q) of `search`: both [Q, n]."""
        order, starts = self.index()
        width, lists = self.indices.shape[1], []
        for word in words:
            at = order[starts[word] : starts[word + 1]].long()
            lists.append((at // width, self.scores[at // width, at % width]))
        features, count = torch.cat([f for f, _ in lists]).unique(return_counts=True)
        if match == "all":
            features = features[count == len(words)]
        kept = torch.zeros(len(words), len(features), dtype=torch.bool)
        values = self.scores[features, -1].clamp(max=self._neutral()).repeat(len(words), 1)
        for row, (found, scores) in enumerate(lists):
            here = torch.isin(found, features, assume_unique=True)
            place = torch.searchsorted(features, found[here])
            kept[row, place] = True
            values[row, place] = scores[here]
        return features, kept, values.double()

    def index(self) -> tuple[Tensor, Tensor]:
        """What `search` reads, made once: places in `indices` by word, and where a word's begin."""
        return self._places

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        words, order = self.indices.flatten().sort(stable=True)
        row = order // self.indices.shape[1]
        first = torch.ones(len(words), dtype=torch.bool)  # of a word that a row holds twice
        first[1:] = (words[1:] != words[:-1]) | (row[1:] != row[:-1])
        counts = words[first].bincount(minlength=len(self.vocab))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        small = self.indices.numel() < 2**31
        return order[first].to(torch.int32 if small else torch.int64), starts

    def _query(self, query: str | Sequence[str]) -> list[int]:
        words = (
            re.split(r"[\s,]+", query.strip(" ,\t\n")) if isinstance(query, str) else list(query)
        )
        if not words or words == [""]:
            raise FastsaeError("query: got no word; give one or more words of the vocabulary")
        return list(dict.fromkeys(self.vocab.index(word) for word in words))

    def _neutral(self) -> float:
        """The score of a word and a feature that tell nothing about each other."""
        log_f = math.log(len(self))
        return {"pmi": -log_f, "paper": -log_f / len(self.vocab)}.get(self.objective, 0.0)

    def _allowed(self, alive_only: bool, least: float | None, most: float | None) -> Tensor:
        allowed = torch.ones(len(self), dtype=torch.bool)
        if not alive_only and least is None and most is None:
            return allowed
        if self.stats is None:
            raise FastsaeError(
                "alive_only, min_frequency, max_frequency: these explanations have no feature "
                "statistics; explain an SAE whose checkpoint has them, or search without"
            )
        if alive_only:
            allowed &= self.stats.frequency > 0
        if least is not None:
            allowed &= self.stats.frequency >= least
        if most is not None:
            allowed &= self.stats.frequency <= most
        return allowed

    def check(self, sae) -> None:
        """Raise FastsaeError unless these explanations were made from this SAE's decoder."""
        other = identity_of(sae)
        if (other.d_sae, other.d_in) != (self.sae.d_sae, self.sae.d_in):
            why = f"{self.sae.d_sae} x {self.sae.d_in}, the SAE is {other.d_sae} x {other.d_in}"
        elif other.digest != self.sae.digest:
            why = f"digest {self.sae.digest[:12]}, the SAE's decoder has {other.digest[:12]}"
        else:
            return
        raise FastsaeError(
            f"sae: the explanations belong to another SAE ({self.sae.hook_name}, {why}); "
            "explain this SAE again: fastsae.explain(sae, model, tokenizer, vocab)"
        )

    def save(self, path: str | Path) -> Path:
        """Write to `path`, atomically; returns the file written.

        A path that ends in .json gives JSON (`to_json`), an existing directory gets the file
        explanations.safetensors, anything else is a safetensors file with the metadata in its
        header. `load` reads all three and returns equal tensors.
        """
        from fastsae.explain.storage import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Explanations":
        """Read what `save` wrote. Raises FastsaeError when it is missing, truncated or foreign."""
        from fastsae.explain.storage import load

        return load(Path(path))

    def to_json(
        self, path: str | Path | None = None, *, features=None, top: int | None = None
    ) -> str:
        """JSON text: the metadata and per feature its number, words and scores; written to `path`.

        features: only these (default all); top: at most so many words of each (default all).
        """
        from fastsae.explain.storage import to_json

        return to_json(self, None if path is None else Path(path), features, top)
