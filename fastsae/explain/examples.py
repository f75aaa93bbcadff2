"""Where every feature fires in a text collection: its best texts, token by token, and a histogram.

Kept beside the explanations as NAME.examples.jsonl: a header line, then a line per feature.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastsae.errors import FastsaeError
from fastsae.explain.activations import _batches, _Best, _chosen
from fastsae.explain.explanations import identity_of
from fastsae.explain.progress import Progress
from fastsae.explain.storage import replacing

FORMAT = "fastsae-examples"
VERSION = 1
BINS_PER_OCTAVE = 2
_TEXT = re.compile(r'"text": ?"((?:[^"\\]|\\.)*)"')
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
        # For `find`: the texts in lower case, where each begins, and the row it belongs to.
        self._lower: str | None = None
        self._pieces: list[int] = []
        self._rows: list[int] = []

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
        words = [word.lower() for word in words]
        longest, found, at = max(words, key=len), [], 0
        lower = self.index()._lower
        while len(found) < limit and (at := lower.find(longest, at)) >= 0:
            end = at + len(longest)
            if _inside_word(lower, at) or lower[end].isalnum():
                at = end
                continue
            piece = bisect_right(self._pieces, at) - 1
            row = self._rows[piece]
            text = lower[self._pieces[piece] : lower.index("\n", at)]
            if all(word in text for word in words) and (
                any(
                    all(_holds(e.text, w) for w in words) for e in self[self.features[row]].examples
                )
            ):
                found.append(self.features[row])
                piece = bisect_right(self._rows, row)  # the next feature's first
                end = self._pieces[piece] if piece < len(self._pieces) else len(lower)
            at = end
        return found

    def index(self) -> "Examples":
        """Makes the first `find` as fast as the others; returns itself."""
        if self._lower is None:
            parts, self._pieces, self._rows, length = [], [], [], 0
            for match in _TEXT.finditer(self._text):
                self._pieces.append(length)
                self._rows.append(bisect_right(self._starts, match.start()) - 1)
                parts.append(match[1].lower())
                length += len(parts[-1]) + 1
            self._lower = "\n".join(parts) + "\n"
        return self

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
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise FastsaeError(f"n: got {n!r}, accepted is an integer of 1 or more")
    total = len(texts) if hasattr(texts, "__len__") else math.inf
    best = _Best(len(chosen), n, context, with_values=True)
    histogram = torch.zeros(len(chosen), _BINS, dtype=torch.int64)
    tokens = 0
    with Progress("examples", total, "texts", on=progress) as bar:
        for batch in _batches(sae, model, tokenizer, texts, chosen, layer, batch_size, max_length):
            best.merge(batch)
            bin = (batch.value.double().log2() * BINS_PER_OCTAVE).floor().long() - _LOWEST
            cell = batch.slot * _BINS + bin.clamp(0, _BINS - 1)
            histogram += cell.bincount(minlength=histogram.numel()).view_as(histogram)
            tokens += batch.tokens
            bar.add(len(batch.ids))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "sae": identity_of(sae).digest,
        "tokens": tokens,
        "features": chosen,
    }
    lines = (_line(best, histogram[i], f, i, tokenizer) for i, f in enumerate(chosen))
    return Examples(header, "".join(line + "\n" for line in lines))


def _line(best: _Best, histogram: torch.Tensor, feature: int, slot: int, tokenizer) -> str:
    used = histogram.nonzero()[:, 0].tolist() or [0, -1]
    first, last = used[0], used[-1]
    examples = []
    for i in range(int((best.values[slot] > 0).sum())):
        window = best.windows[slot, i]
        inside = window >= 0
        pieces = _pieces(tokenizer, window[inside].tolist())
        peak = int(inside[: best.context].sum())
        ends, at = [], 0
        for piece in pieces:
            at += len(piece)
            ends.append(at)
        examples.append(
            {
                "value": _short(best.values[slot, i]),
                "document": int(best.documents[slot, i]),
                "position": int(best.positions[slot, i]),
                "peak": peak,
                "text": "".join(pieces),
                "ends": ends,
                "values": [_short(v) for v in best.around[slot, i][inside]],
            }
        )
    entry = {
        "feature": feature,
        "active": int(histogram.sum()),
        "histogram": [first + _LOWEST, histogram[first : last + 1].tolist()],
        "examples": examples,
    }
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))


def _short(value: torch.Tensor) -> float:
    return float(f"{float(value):.6g}")


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


def _cut(entry: dict) -> Iterator[tuple]:
    starts = [0, *entry["ends"][:-1]]
    yield tuple(entry["text"][a:b] for a, b in zip(starts, entry["ends"], strict=True))
    yield tuple(entry["values"])


def _inside_word(text: str, at: int) -> bool:
    """Whether a letter stands before `at`; one that belongs to a JSON escape is none."""
    escaped = text[max(0, at - 2) : at].startswith("\\") or "\\u" in text[max(0, at - 6) : at]
    return at > 0 and text[at - 1].isalnum() and not escaped


def _holds(text: str, word: str) -> bool:
    text, at = text.lower(), -1
    while (at := text.find(word, at + 1)) >= 0:
        end = at + len(word)
        if not (text[max(0, at - 1) : at].isalnum() or text[end : end + 1].isalnum()):
            return True
    return False
