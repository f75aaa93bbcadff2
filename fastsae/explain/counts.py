"""Counts of words and features that share passages, and the information in them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.explanations import SAEIdentity
from fastsae.explain.vocabulary import Vocabulary
from fastsae.ops.topk import topk

MAX_PAIRS = 1 << 27  # of a word and a feature seen together: 1.6 GB of counts
_DENSE = 1 << 26  # pairs in all, up to which a plain table is kept: 268 MB, much faster to add to
_PENDING = 1 << 22
_ROW_BYTES = 64 << 20
_FORMAT = "fastsae-counts"


def signed_information(joint: Tensor, feature: Tensor, word: Tensor, passages: int) -> Tensor:
    """± I(X; Y) in nats of the binary variables X = "f is active", Y = "v occurs" in a passage.

    I = Σ_{x,y} p(x,y) log [p(x,y) / (p(x) p(y))] with p = counts / passages; the sign is that of
    n_fv·N − n_f·n_v, so words that avoid the feature are negative. joint [..., F, V], feature [F],
    word [V]: counts. Returns float64; 0 where either variable is constant.
    """
    n11, n_f, n_v = joint.double(), feature.double()[:, None], word.double()
    n = torch.tensor(float(passages), dtype=torch.float64, device=joint.device)

    def xlogx(x: Tensor) -> Tensor:
        return torch.xlogy(x, x)

    total = xlogx(n11)
    for cell in (n_f - n11, n_v - n11, n - n_f - n_v + n11):
        total = total + xlogx(cell)
    margins = xlogx(n_f) + xlogx(n - n_f) + (xlogx(n_v) + xlogx(n - n_v))
    information = ((total - margins + xlogx(n)) / n).clamp(min=0)
    return information * torch.sign(n11 * n - n_f * n_v)


@dataclass(frozen=True, eq=False)
class CorpusCounts:
    """In how many passages each word occurs, each feature is active, and both.

    keys: [P] int64, ascending, f·V + v of the pairs seen together; joint: [P] int32, their counts.
    feature: [F] int64; word: [V] int64; passages: how many were read; tokens: of how many tokens.
    """

    keys: Tensor
    joint: Tensor
    feature: Tensor
    word: Tensor
    passages: int
    window: int | str
    vocab: Vocabulary
    sae: SAEIdentity
    model_name: str
    tokens: int

    def dense(self, features: Tensor) -> Tensor:
        """n[f, v] for the given features: [n, V] int64."""
        v = len(self.vocab)
        out = torch.zeros(len(features), v, dtype=torch.int64)
        low, high = (torch.searchsorted(self.keys, features * v + end) for end in (0, v))
        sizes = high - low
        row = torch.repeat_interleave(torch.arange(len(features)), sizes)
        at = torch.arange(len(row)) + torch.repeat_interleave(
            low - (sizes.cumsum(0) - sizes), sizes
        )
        out[row, self.keys[at] % v] = self.joint[at].long()
        return out

    def scores(self, features: Tensor) -> Tensor:
        """The signed information of every word about the given features: [n, V] float64, nats."""
        n, rows = self.dense(features), self.feature[features]
        return signed_information(n, rows, self.word, self.passages)

    def top(self, m: int) -> tuple[Tensor, Tensor]:
        """The m words of the largest score per feature: scores [F, m] float32, indices int32.

        Exact, by tiles of features; ties go to the lower word index. A word never seen scores 0, so
        it stands before the words that avoid the feature.
        """
        found = []
        step = max(1, _ROW_BYTES // (8 * len(self.vocab)))
        for features in torch.arange(len(self.feature)).split(step):
            found.append(topk(self.scores(features).float(), m))
        values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values, indices.int()

    @classmethod
    def merge(cls, parts: Sequence["CorpusCounts"]) -> "CorpusCounts":
        """The counts over all the parts' texts together, exact: every count is a sum.

        Raises FastsaeError when the parts differ in window, vocabulary, SAE or model.
        """
        if not parts:
            raise FastsaeError("counts: got none to merge")
        first = parts[0]
        for part in parts[1:]:
            for name in ("window", "sae", "model_name"):
                ours, other = getattr(first, name), getattr(part, name)
                if ours != other:
                    raise FastsaeError(
                        f"counts: cannot merge, {name} is {ours!r} and {other!r}; count all parts "
                        "of a collection with the same settings"
                    )
            if part.vocab.words != first.vocab.words:
                raise FastsaeError("counts: cannot merge counts of different vocabularies")
        keys, joint = _summed([p.keys for p in parts], [p.joint for p in parts])
        return cls(
            keys,
            joint,
            sum(p.feature for p in parts),
            sum(p.word for p in parts),
            sum(p.passages for p in parts),
            first.window,
            first.vocab,
            first.sae,
            first.model_name,
            sum(p.tokens for p in parts),
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; `load` reads it back."""
        path = Path(path)
        meta = {
            "format": _FORMAT,
            "version": 1,
            "passages": self.passages,
            "window": self.window,
            "tokens": self.tokens,
            "model_name": self.model_name,
            "sae": self.sae._asdict(),
            "words": self.vocab.words,
            "frequencies": self.vocab.frequencies,
            "source": self.vocab.source,
        }
        tensors = {n: getattr(self, n).contiguous() for n in ("keys", "joint", "feature", "word")}
        try:
            save_file(tensors, path, {"fastsae": json.dumps(meta)})
        except (OSError, SafetensorError) as error:
            raise FastsaeError(f"{path}: cannot be written ({error})") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> "CorpusCounts":
        """Read what `save` wrote. Raises FastsaeError for a missing, damaged or other file."""
        try:
            with safe_open(Path(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("fastsae", "{}"))
                if meta.get("format") != _FORMAT or meta.get("version") != 1:
                    raise FastsaeError(
                        f"{path}: holds no counts of this version of fastsae; "
                        "`fastsae explain --objective corpus-mi --save-counts` writes them"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise FastsaeError(f"{path}: cannot read counts ({error})") from None
        frequencies = meta["frequencies"]
        vocab = Vocabulary(tuple(meta["words"]), frequencies, meta["source"])
        names = ("passages", "window", "model_name", "tokens")
        identity = SAEIdentity(**meta["sae"])
        return cls(**tensors, vocab=vocab, sae=identity, **{name: meta[name] for name in names})


class PairCounter:
    """Adds up passages batch by batch; memory is bounded by the number of distinct pairs."""

    def __init__(self, features: int, words: int, max_pairs: int):
        self.width, self.max_pairs, self.passages = words, max_pairs, 0
        self.feature = torch.zeros(features, dtype=torch.int64)
        self.word = torch.zeros(words, dtype=torch.int64)
        self.keys = torch.empty(0, dtype=torch.int64)
        self.joint = torch.empty(0, dtype=torch.int32)
        pairs = features * words
        self._table = torch.zeros(pairs, dtype=torch.int32) if pairs <= _DENSE else None
        self._pending: list[Tensor] = []
        self._waiting = 0

    def add(self, f_passage, feature, v_passage, word, passages: int) -> None:
        """Entries (passage, feature) and (passage, word), in any order, repeats allowed."""
        self.passages += passages
        f_passage, feature = _distinct(f_passage, feature, len(self.feature))
        v_passage, word = _distinct(v_passage, word, self.width)
        self.feature += feature.bincount(minlength=len(self.feature))
        self.word += word.bincount(minlength=self.width)
        # Join on the passage: every word of it with every feature of it.
        low = torch.searchsorted(f_passage, v_passage)
        sizes = torch.searchsorted(f_passage, v_passage, right=True) - low
        at = torch.repeat_interleave(low - (sizes.cumsum(0) - sizes), sizes)
        at += torch.arange(len(at))
        keys = feature[at] * self.width + torch.repeat_interleave(word, sizes)
        if self._table is not None:
            self._table.index_add_(0, keys, torch.ones(len(keys), dtype=torch.int32))
            return
        self._pending.append(keys)
        self._waiting += len(keys)
        if self._waiting > max(_PENDING, len(self.keys) // 2):
            self._compact()

    def _compact(self) -> None:
        if self._table is not None:
            self.keys = self._table.nonzero()[:, 0]
            self.joint = self._table[self.keys]
            self._check()
            return
        ones = [torch.ones(len(keys), dtype=torch.int32) for keys in self._pending]
        self.keys, self.joint = _summed([self.keys, *self._pending], [self.joint, *ones])
        self._pending, self._waiting = [], 0
        self._check()

    def _check(self) -> None:
        if len(self.keys) > self.max_pairs:
            raise FastsaeError(
                f"max_pairs: more than {self.max_pairs:,} pairs of a word and a feature share a "
                'passage; use a smaller vocabulary, shorter passages (window="word" has the '
                "fewest) or a larger max_pairs (12 bytes each)"
            )

    def result(self, window, vocab, sae, model_name, tokens) -> CorpusCounts:
        self._compact()
        return CorpusCounts(
            self.keys, self.joint, self.feature, self.word, self.passages,
            window, vocab, sae, model_name, tokens,
        )  # fmt: skip


def _distinct(passage: Tensor, other: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The distinct pairs, ascending by passage, then by the other number."""
    both = (passage * width + other).unique()
    return both.div(width, rounding_mode="floor"), both % width


def _summed(keys: list[Tensor], counts: list[Tensor]) -> tuple[Tensor, Tensor]:
    distinct, place = torch.cat(keys).unique(return_inverse=True)
    total = torch.zeros(len(distinct), dtype=torch.int32)
    return distinct, total.index_add_(0, place, torch.cat(counts))
