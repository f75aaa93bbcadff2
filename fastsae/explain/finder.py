"""Find features by what they are about: their words, their labels, the texts they fire in."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastsae.errors import FastsaeError
from fastsae.explain.examples import Examples
from fastsae.explain.explanations import Explanations
from fastsae.explain.labels import Labels
from fastsae.explain.terms import TermIndex


def companion(explanations: str | Path, kind: str) -> Path:
    """The file beside explanations: words.safetensors -> words.examples.jsonl and so on."""
    path = Path(explanations)
    if path.is_dir():
        path = path / "explanations"
    return path.with_name(f"{path.stem}.{kind}")


class Hit(NamedTuple):
    """A feature that was found."""

    feature: int
    score: float | None  # of the words, as `Explanations.search`; None where words do not match
    matched: str  # "words", "label" or "text"
    words: list[str]
    label: str | None
    text: str | None  # the feature's best text, its strongest token in [brackets]


@dataclass(eq=False)
class Finder:
    """Searches explanations, and labels and examples where there are any. One load, many queries.

    Answers in milliseconds, by inverted indices of the kept words, the labels and the texts that
    are made here; the texts of hundreds of thousands of examples take some seconds.
    """

    explanations: Explanations
    examples: Examples | None = None
    labels: Labels | None = None
    _labelled: list[int] = field(default_factory=list, init=False, repr=False)
    _label_terms: TermIndex | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        for name, part in (("examples", self.examples), ("labels", self.labels)):
            if part is not None and part.digest != self.explanations.sae.digest:
                raise FastsaeError(f"{name}: belong to another SAE; make them again")
        self.explanations.index()
        if self.examples is not None:
            self.examples.index()
        if self.labels is not None:
            self._labelled = sorted(self.labels)
            self._label_terms = TermIndex(self.labels[f].text for f in self._labelled)

    @classmethod
    def load(cls, path: str | Path) -> "Finder":
        """Explanations and what lies beside them: NAME.examples.jsonl, NAME.labels.jsonl."""
        explanations = Explanations.load(path)
        examples, labels = companion(path, "examples.jsonl"), companion(path, "labels.jsonl")
        return cls(
            explanations,
            Examples.load(examples) if examples.exists() else None,
            Labels.load(labels) if labels.exists() else None,
        )

    def search(self, query: str, top: int = 10, **options) -> list[Hit]:
        """Up to `top` features: first those that keep a word of the query, ranked as
        `Explanations.search` does (it takes `options`), where all words are in the vocabulary; then
        those whose label holds every word; then those with an example that holds every word.

        Filters on how features fire (`options`) leave only the first kind. Raises FastsaeError,
        with close words, when nothing matches and a word is not in the vocabulary.
        """
        terms = _terms(query)
        if not terms:
            raise FastsaeError("query: got no word; give one or more words")
        vocab = self.explanations.vocab
        unknown = [t for t in terms if t not in vocab and t.lower() not in vocab]
        found: dict[int, tuple[float | None, str]] = {}
        if not unknown:
            for feature, score in self.explanations.search(terms, top, **options):
                found[feature] = (score, "words")
        if not any(options.values()):
            if self._label_terms is not None:
                for number in self._label_terms.of(terms, self._label):
                    if len(found) >= top:
                        break
                    found.setdefault(self._labelled[number], (None, "label"))
            if self.examples is not None and len(found) < top:
                for feature in self.examples.find(terms, top + len(found)):
                    found.setdefault(feature, (None, "text"))
        if unknown and not found:
            vocab.index(unknown[0])  # raises
        return [self._hit(f, *how) for f, how in list(found.items())[:top]]

    def _label(self, number: int) -> str:
        return self.labels[self._labelled[number]].text

    def _hit(self, feature: int, score: float | None, matched: str) -> Hit:
        text = None
        if self.examples is not None and feature in self.examples:
            best = self.examples[feature].examples
            text = marked(best[0]) if best else None
        label = self.labels.get(feature) if self.labels is not None else None
        words = self.explanations.words(feature)
        return Hit(feature, score, matched, words, label and label.text, text)


def marked(example) -> str:
    """The example's text on one line with its strongest token in [brackets]."""
    parts = list(example.tokens)
    token = parts[example.peak]
    lead = token[: len(token) - len(token.lstrip())]
    parts[example.peak] = f"{lead}[{token.strip()}]"
    return " ".join("".join(parts).split())


def _terms(text: str) -> list[str]:
    return [t for t in re.split(r"[\s,.;:!?\"()]+", text) if t]
