"""Where every feature fires in a text collection: its best texts, token by token, and a histogram.

Kept beside the explanations as NAME.examples.jsonl: a header line, then a line per feature.
"""

import json
import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from fastsae.errors import FastsaeError
from fastsae.explain.activations import _Batch, _batches, _Best, _chosen
from fastsae.explain.corpus import count_batches
from fastsae.explain.counts import CorpusCounts
from fastsae.explain.explanations import identity_of
from fastsae.explain.progress import Progress
from fastsae.explain.storage import replacing
from fastsae.explain.terms import TermIndex
from fastsae.explain.vocabulary import Vocabulary

FORMAT = "fastsae-examples"
VERSION = 1
BINS_PER_OCTAVE = 2
_TEXT = re.compile(r'"text": ?"([^"\\]*(?:\\.[^"\\]*)*)"')
_LOWEST, _BINS = -40, 96  # histogram from 2^-20 to 2^28; what lies outside is in the outer bins


class Example(NamedTuple):
    """A text in which a feature fires."""

    value: float  # the largest activation in the text
    document: int  # number of the text, from 0 in the order given
    position: int  # token position in the document, special tokens included
    tokens: tuple[str, ...]  # together they are the text around the place
    values: tuple[float, ...]  # the feature's activation on each of them
    peak: int  # which of them has the largest activation

    @property
    def text(self) -> str:
        return "".join(self.tokens)


class FeatureExamples(NamedTuple):
    """What is known of one feature; active / tokens of the collection is its frequency."""

    examples: list[Example]
    active: int  # tokens on which it is active
    edges: list[float]  # of the histogram's bins, one more than counts; half an octave each
    counts: list[int]


class Examples:
    """The examples of many features; `examples[feature]` parses one line.

    sae: digest of the SAE (`SAEIdentity.digest`); tokens: tokens of the collection.
    """

    def __init__(self, header: dict, text: str):
        self.header, self._text = header, text
        self.digest, self.tokens = header["sae"], header["tokens"]
        self._starts, self.features, at = [], header["features"], 0
        for _ in self.features:
            self._starts.append(at)
            at = text.find("\n", at) + 1
        self._row = {feature: i for i, feature in enumerate(self.features)}
        self._index: tuple[TermIndex, array, array] | None = None

    def __contains__(self, feature: int) -> bool:
        return feature in self._row

    def __getitem__(self, feature: int) -> FeatureExamples:
        start = self._starts[self._row[feature]]
        entry = json.loads(self._text[start : self._text.index("\n", start)])
        first, counts = entry["histogram"]
        edges = [2.0 ** ((first + i) / BINS_PER_OCTAVE) for i in range(len(counts) + 1)]
        examples = [
            Example(e["value"], e["document"], e["position"], *_cut(e), e["peak"])
            for e in entry["examples"]
        ]
        return FeatureExamples(examples, entry["active"], edges, counts)

    def find(self, words: Sequence[str], limit: int) -> list[int]:
        """Up to `limit` features with an example that holds all words, in file order; any case."""
        terms, rows, _ = self.index()
        found: dict[int, None] = {}
        for piece in terms.of(words, self._piece):
            found[self.features[rows[piece]]] = None
            if len(found) == limit:
                break
        return list(found)

    def index(self) -> tuple[TermIndex, array, array]:
        """What `find` reads, made once: the examples' words, their rows, where their texts begin.

        Takes seconds for hundreds of thousands of examples.
        """
        if self._index is None:
            rows, starts = array("i"), array("q")

            def texts() -> Iterator[str]:
                for match in _TEXT.finditer(self._text):
                    rows.append(bisect_right(self._starts, match.start()) - 1)
                    starts.append(match.start())
                    yield _unescaped(match)

            self._index = (TermIndex(texts()), rows, starts)
        return self._index

    def _piece(self, number: int) -> str:
        return _unescaped(_TEXT.match(self._text, self.index()[2][number]))

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        with replacing(path) as temporary:
            header = json.dumps(self.header, ensure_ascii=False)
            temporary.write_text(header + "\n" + self._text, encoding="utf-8", newline="\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """Read what `save` wrote. Raises FastsaeError when it is missing, truncated or foreign."""
        path = Path(path)
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                header, text = json.loads(file.readline()), file.read()
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise FastsaeError(f"{path}: holds no examples of this fastsae")
            if text.count("\n") != len(header["features"]):
                raise FastsaeError(f"{path}: truncated; make the examples again")
            return cls(header, text)
        except OSError as error:
            raise FastsaeError(f"{path}: cannot be read ({error.strerror})") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise FastsaeError(f"{path}: not a file of examples ({error})") from None


@torch.no_grad()
def collect_examples(
    sae,
    model,
    tokenizer,
    texts: Iterable[str],
    features: Sequence[int] | None = None,
    *,
    n: int = 3,
    layer: int | str | None = None,
    context: int = 12,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = False,
) -> Examples:
    """The n largest a_f over `texts`, at most one per text, and the histogram of all a_f > 0.

    features: default all. Other arguments, order and ties as in `top_activations`; one pass over
    the texts. Values are kept to six digits.
    """
    chosen = _chosen(sae, range(sae.config.d_sae) if features is None else features)
    collector = ExampleCollector(sae, chosen, n=n, context=context)
    batches = _batches(sae, model, tokenizer, texts, chosen, layer, batch_size, max_length)
    for _ in collector.watch(batches, _size(texts), progress=progress):
        pass
    return collector.result(tokenizer)


@torch.no_grad()
def counts_and_examples(
    sae,
    model,
    tokenizer,
    texts: Iterable[str],
    vocab: Vocabulary,
    windows: Sequence[int | str] = ("word",),
    *,
    n: int = 3,
    progress: bool = False,
) -> tuple[dict[int | str, CorpusCounts], Examples]:
    """What `corpus_counts` and `collect_examples` return for all features, by one pass of the
    model over the texts instead of two."""
    everything = list(range(sae.config.d_sae))
    collector = ExampleCollector(sae, everything, n=n)
    batches = _batches(sae, model, tokenizer, texts, everything, None, 8, 512)
    watched = collector.watch(batches, _size(texts), progress=progress)
    counts = count_batches(watched, sae, model, tokenizer, vocab, windows)
    return counts, collector.result(tokenizer)


class ExampleCollector:
    """Collects the examples of `chosen` features from batches that go by."""

    def __init__(self, sae, chosen: list[int], *, n: int = 3, context: int = 12):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise FastsaeError(f"n: got {n!r}, accepted is an integer of 1 or more")
        self.sae, self.chosen, self.tokens = sae, chosen, 0
        self.best = _Best(len(chosen), n, context, with_values=True)
        self.histogram = torch.zeros(len(chosen), _BINS, dtype=torch.int64)

    def watch(self, batches: Iterable[_Batch], total: float, *, progress: bool) -> Iterator[_Batch]:
        """The same batches. total: texts of all of them, for the progress bar."""
        with Progress("examples", total, "texts", on=progress) as bar:
            for batch in batches:
                self.best.merge(batch)
                bin = (batch.value.double().log2() * BINS_PER_OCTAVE).floor().long() - _LOWEST
                cell = batch.slot * _BINS + bin.clamp(0, _BINS - 1)
                counts = cell.bincount(minlength=self.histogram.numel())
                self.histogram += counts.view_as(self.histogram)
                self.tokens += batch.tokens
                bar.add(len(batch.ids))
                yield batch

    def result(self, tokenizer) -> Examples:
        header = {
            "format": FORMAT,
            "version": VERSION,
            "sae": identity_of(self.sae).digest,
            "tokens": self.tokens,
            "features": self.chosen,
        }
        pieces = _Pieces(tokenizer)
        lines = (
            _line(self.best, self.histogram[i], f, i, pieces) for i, f in enumerate(self.chosen)
        )
        return Examples(header, "".join(line + "\n" for line in lines))


def _size(texts: Iterable[str]) -> float:
    return len(texts) if hasattr(texts, "__len__") else math.inf


def _line(best: _Best, histogram: torch.Tensor, feature: int, slot: int, pieces: "_Pieces") -> str:
    used = histogram.nonzero()[:, 0].tolist() or [0, -1]
    first, last = used[0], used[-1]
    examples = []
    for i in range(int((best.values[slot] > 0).sum())):
        window = best.windows[slot, i]
        inside = window >= 0
        parts = pieces(window[inside].tolist())
        examples.append(
            {
                "value": _short(float(best.values[slot, i])),
                "document": int(best.documents[slot, i]),
                "position": int(best.positions[slot, i]),
                "peak": int(inside[: best.context].sum()),
                "text": "".join(parts),
                "ends": list(accumulate(map(len, parts))),
                "values": [_short(v) for v in best.around[slot, i][inside].tolist()],
            }
        )
    entry = {
        "feature": feature,
        "active": int(histogram.sum()),
        "histogram": [first + _LOWEST, histogram[first : last + 1].tolist()],
        "examples": examples,
    }
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


class _Pieces:
    """`_pieces` of many token lists, with the text that a token adds behind another kept.

    Where tokens add other texts than they do alone (bytes of one character), the pieces do not make
    the whole text, or hold U+FFFD, and `_pieces` decides.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self._first, self._behind = tokenizer, {}, {}

    def __call__(self, ids: list[int]) -> list[str]:
        parts, begun = [], False
        for at, token in enumerate(ids):
            part = self._after(ids[at - 1], token) if begun else self._alone(token)
            if part is None:
                return _pieces(self.tokenizer, ids)
            parts.append(part)
            begun = begun or part != ""  # special tokens show nothing
        text = "".join(parts)
        if "\ufffd" in text or text != self._decode(ids):
            return _pieces(self.tokenizer, ids)
        return parts

    def _alone(self, token: int) -> str:
        if token not in self._first:
            self._first[token] = self._decode([token])
        return self._first[token]

    def _after(self, before: int, token: int) -> str | None:
        if token not in self._behind:
            lead, both = self._alone(before), self._decode([before, token])
            if not lead or not both.startswith(lead):
                return None
            self._behind[token] = both[len(lead) :]
        return self._behind[token]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, cut out of one decoded text (a token alone loses its space).

    Of the tokens that together are one character, the last has it and the others are empty; so are
    special tokens.
    """
    shown, out = "", []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = text.rstrip("\ufffd") if end < len(ids) else text
        fits = text.startswith(shown)
        out.append(text[len(shown) :] if fits else "")
        shown = text if fits else shown
    return out


def _unescaped(match: re.Match) -> str:
    text = match[1]
    return json.loads(f'"{text}"') if "\\" in text else text


def _cut(entry: dict) -> Iterator[tuple]:
    starts = [0, *entry["ends"][:-1]]
    yield tuple(entry["text"][a:b] for a, b in zip(starts, entry["ends"], strict=True))
    yield tuple(entry["values"])
