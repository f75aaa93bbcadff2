"""Which features have to do with harm, and which with defence against it.

Categories are data files (fastsae/explain/data/*.json): harm S1-S14 and defence D1-D7, or your own.
Kept beside the explanations as NAME.annotations.json.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastsae.errors import FastsaeError
from fastsae.explain.chat import Cached, Chat
from fastsae.explain.examples import Examples
from fastsae.explain.explanations import Explanations
from fastsae.explain.labels import ask_all, describe, first_of, question
from fastsae.explain.storage import replacing

FORMAT = "fastsae-annotations"
VERSION = 1
_DATA = Path(__file__).with_name("data")
DEFAULT_FILES = (_DATA / "harm.json", _DATA / "defence.json")


class Category(NamedTuple):
    """One category of a data file."""

    code: str  # "S1"
    name: str
    description: str
    terms: tuple[str, ...]  # lower case; the lexicon
    kind: str  # "harm", "defence", or what the file says


class Annotation(NamedTuple):
    """One feature belongs to one category."""

    feature: int
    category: str  # its code
    score: float  # 0..1; of a lexicon the rank-weighted share of the words, of a model 1
    because: tuple[str, ...]  # the words that are terms of the category, best first


def categories(*paths: str | Path) -> list[Category]:
    """Categories of data files (default: harm S1-S14 and defence D1-D7).

    A file is {"kind": "harm", "categories": [{"code", "name", "description", "terms": [...]}]}.
    Raises FastsaeError naming the file for a missing or repeated entry.
    """
    found: dict[str, Category] = {}
    for path in map(Path, paths or DEFAULT_FILES):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for entry in content["categories"]:
                terms = tuple(entry["terms"])
                code, name, description = entry["code"], entry["name"], entry["description"]
                if not all(isinstance(t, str) for t in (*terms, code, name, description)):
                    raise FastsaeError(f"{path}: {code!r} has an entry that is not text")
                if not code.isalnum() or code.lower() == "none" or code in found:
                    raise FastsaeError(
                        f"{path}: code {code!r}: expected letters and digits, each code once"
                    )
                terms = tuple(t.lower() for t in terms)
                found[code] = Category(code, name, description, terms, content["kind"])
        except OSError as error:
            raise FastsaeError(f"{path}: cannot be read ({error.strerror})") from None
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise FastsaeError(
                f"{path}: not a file of categories ({type(error).__name__}: {error}); see "
                f"{DEFAULT_FILES[0]}"
            ) from None
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Annotations:
    """The annotations of an SAE's features.

    entries: ordered by feature, then by score; digest: of the SAE; method: "lexicon" or "model
    NAME"; categories: what was asked.
    """

    entries: tuple[Annotation, ...]
    digest: str
    method: str
    categories: tuple[Category, ...]

    def features(self, *wanted: str, min_score: float = 0.0, limit: int | None = None) -> list[int]:
        """Features of these categories or kinds, best first, each once.

        wanted: codes ("S1", "D3") and kinds ("harm", "defence"), none: any. min_score: at least
        this score; limit: at most so many. Ties: the lower feature. A policy is built from it:

            Policy([ablate(annotations.features("harm", min_score=0.3))])
        """
        codes = {c.code for c in self.categories}
        kinds = {c.kind for c in self.categories}
        if wrong := [w for w in wanted if w not in codes | kinds]:
            known = ", ".join([*sorted(kinds), *(c.code for c in self.categories)])
            raise FastsaeError(f"category: got {wrong[0]!r}, accepted are {known}")
        kind = {c.code: c.kind for c in self.categories}
        best: dict[int, float] = {}
        for entry in self.entries:
            fits = not wanted or entry.category in wanted or kind[entry.category] in wanted
            if fits and entry.score >= min_score:
                best[entry.feature] = max(entry.score, best.get(entry.feature, 0.0))
        return sorted(best, key=lambda f: (-best[f], f))[:limit]

    def of(self, feature: int) -> list[Annotation]:
        """The annotations of one feature, best first."""
        return [entry for entry in self.entries if entry.feature == feature]

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "sae": self.digest,
            "method": self.method,
            "categories": [c._asdict() for c in self.categories],
        }
        lines = ",\n".join(json.dumps(e._asdict(), ensure_ascii=False) for e in self.entries)
        head = json.dumps(content, ensure_ascii=False)[:-1]
        with replacing(path) as temporary:
            temporary.write_text(f'{head}, "features": [\n{lines}\n]}}\n', encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Annotations":
        """Read what `save` wrote, or you edited. Raises FastsaeError when it is damaged."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise FastsaeError(f"{path}: holds no annotations of this fastsae")
            known = tuple(
                Category(**entry | {"terms": tuple(entry["terms"])})
                for entry in content["categories"]
            )
            entries = tuple(
                Annotation(**entry | {"because": tuple(entry["because"])})
                for entry in content["features"]
            )
            if wrong := {e.category for e in entries} - {c.code for c in known}:
                raise FastsaeError(f"{path}: category {min(wrong)!r} is none of its categories")
            return cls(entries, content["sae"], content["method"], known)
        except OSError as error:
            raise FastsaeError(f"{path}: cannot be read ({error.strerror})") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise FastsaeError(f"{path}: not a file of annotations ({error})") from None


def annotate_by_lexicon(
    explanations: Explanations,
    known: Sequence[Category] | None = None,
    *,
    features: Sequence[int] | None = None,
    words: int = 10,
    min_score: float = 0.2,
    min_words: int = 2,
) -> Annotations:
    """score(f, c) = Σ_i w_i [word i of f is a term of c] / Σ_i w_i, w_i = 1 / log2(i + 2), i ≥ 0.

    Over the feature's first `words` words. Kept where at least `min_words` words are terms and the
    score is at least `min_score`: one word alone says little about a feature. It reads words only:
    a feature about preventing a harm looks like the harm. `annotate_by_model` reads the texts, too.
    """
    known = categories() if known is None else list(known)
    chosen = range(len(explanations)) if features is None else features
    terms = [(c, frozenset(c.terms)) for c in known]
    found = []
    for feature in sorted({explanations._row(f) for f in chosen}):
        ranked = [w.lower() for w in explanations.words(feature)[:words]]
        weights = [1 / math.log2(i + 2) for i in range(len(ranked))]
        here = []
        for category, lexicon in terms:
            because = tuple(w for w in ranked if w in lexicon)
            share = sum(x for x, w in zip(weights, ranked, strict=True) if w in lexicon)
            score = share / sum(weights)
            if len(because) >= min_words and score >= min_score:
                here.append(Annotation(feature, category.code, round(score, 4), because))
        found += sorted(here, key=lambda a: -a.score)
    return Annotations(tuple(found), explanations.sae.digest, "lexicon", tuple(known))


def annotate_by_model(
    explanations: Explanations,
    chat: Chat,
    features: Sequence[int],
    known: Sequence[Category] | None = None,
    examples: Examples | None = None,
    *,
    words: int = 12,
    texts: int = 4,
    cache: str | Path | None = None,
    workers: int = 1,
    prices: tuple[float, float] | None = None,
    progress: bool = False,
) -> Annotations:
    """Ask `chat` for the one category of each feature, or none. Arguments as in `label_features`.

    An answer that names no category counts as none.
    """
    known = categories() if known is None else list(known)
    codes = [c.code for c in known]
    listed = "\n".join(f"{c.code} {c.name}: {c.description}" for c in known)
    lexicons = {c.code: frozenset(c.terms) for c in known}

    def ask(chat: Cached, feature: int) -> Annotation | None:
        shown = examples[feature].examples[:texts] if examples and feature in examples else []
        ranked = explanations.words(feature)[:words]
        asked = (
            "A feature of a language model stands for words, and fires in texts at the token in "
            f"[[brackets]]. Categories:\n{listed}\nnone: most features belong to no category\n\n"
            f"{describe(ranked, shown)}Answer with the code of its category, or none.\nCategory:"
        )
        code = first_of([*codes, "none"], chat.complete(question(asked), 5, [*codes, "none"]).text)
        if code is None or code == "none":
            return None
        because = tuple(w for w in ranked if w.lower() in lexicons[code])
        return Annotation(feature, code, 1.0, because)

    chosen = sorted({explanations._row(f) for f in features})
    answers = ask_all(ask, chat, chosen, cache, workers, prices, progress, "annotate")
    entries = tuple(a for a in answers.values() if a is not None)
    return Annotations(entries, explanations.sae.digest, f"model {chat.name}", tuple(known))
