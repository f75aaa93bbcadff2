"""One self-contained HTML page of explanations: no network, opens from disk."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from fastsae.errors import FastsaeError
from fastsae.explain.annotate import Annotations
from fastsae.explain.examples import Examples
from fastsae.explain.explanations import Explanations
from fastsae.explain.labels import Labels
from fastsae.explain.storage import replacing

_PAGE = Path(__file__).with_name("data") / "page.html"


def write_html(
    explanations: Explanations,
    path: str | Path,
    *,
    examples: Examples | None = None,
    labels: Labels | None = None,
    annotations: Annotations | None = None,
    features: Sequence[int] | None = None,
    words: int = 12,
) -> Path:
    """Write a page with a search box; every feature with its words, label, categories, texts whose
    tokens are coloured by the feature's activation, and a histogram of its activations.

    features: default those that have an example, all where there are no examples. words: per
    feature. About 2 kB per feature: choose features for a page of more than some 20 000.
    """
    for name, part in (("examples", examples), ("labels", labels), ("annotations", annotations)):
        if part is not None and part.digest != explanations.sae.digest:
            raise FastsaeError(f"{name}: belong to another SAE; make them again")
    if features is None:
        fires = examples and [f for f in examples.features if examples[f].examples]
        features = range(len(explanations)) if examples is None else fires
    chosen = [explanations._row(f) for f in features]
    by_feature: dict[int, list[str]] = {}
    for entry in annotations.entries if annotations else ():
        by_feature.setdefault(entry.feature, []).append(entry.category)
    names = {c.code: c.name for c in annotations.categories} if annotations else {}
    data = {
        "names": names,
        "tokens": examples.tokens if examples else None,
        "features": [
            _entry(f, explanations, examples, labels, by_feature.get(f, []), words) for f in chosen
        ],
    }
    ex = explanations
    about = (
        f"{ex.model_name}, {ex.sae.hook_name or 'SAE'}: {len(chosen):,} of {len(ex):,} features, "
        f"objective {ex.objective}, {len(ex.vocab):,} words ({ex.vocab.source})"
    )
    # "<" cannot close the script element then, nor open a comment in it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.read_text(encoding="utf-8").replace("{{about}}", html.escape(about))
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_text(page.replace("{{data}}", text), encoding="utf-8")
    return path


def _entry(feature: int, ex: Explanations, examples, labels, codes: list[str], words: int) -> dict:
    entry = {"f": feature, "w": ex.words(feature)[:words]}
    label = labels.get(feature) if labels is not None else None
    if label is not None:
        entry["l"], entry["v"] = label.text, label.verdict
    if codes:
        entry["c"] = codes
    if examples is not None and feature in examples:
        known = examples[feature]
        entry["n"] = known.active
        entry["h"] = [known.edges[0], known.counts]
        entry["x"] = [[e.value, list(e.tokens), list(e.values)] for e in known.examples]
    return entry
