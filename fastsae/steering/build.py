"""Policies from words: features found in explanations, and those annotated as harmful."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastsae.errors import FastsaeError
from fastsae.steering.policy import Policy, ablate, add, amplify, calibrate

WAYS = ("add", "amplify", "calibrate")


def build_policy(
    explanations=None,
    *,
    search: str | None = None,
    top: int = 3,
    way: str = "add",
    strength: float = 1.0,
    unit: str = "max",
    alive_only: bool = False,
    ablated: Sequence[int] = (),
    name: str | None = None,
    version: str | None = None,
    phase: str = "all",
    required: bool = False,
) -> Policy:
    """Ablate `ablated`, then steer towards the `top` features that `search` finds, if it is given.

    explanations: what has `search(query, top=, alive_only=)`, a fastsae.Explanations. way: "add"
    c·d_s, "calibrate" a_s to c (both with strength in `unit`: "raw", or multiples of the feature's
    own "max" or "mean" activation), or "amplify" by alpha = strength. A feature that is both found
    and ablated is an error, as is a search that finds nothing.
    """
    if way not in WAYS:
        raise FastsaeError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    operations = [ablate(list(ablated))] if ablated else []
    if search is not None:
        found = explanations.search(search, top=top, alive_only=alive_only)
        features = [feature for feature, _ in found]
        if not features:
            raise FastsaeError(f"search: no feature is explained by {search!r}; try other words")
        both = sorted(set(features) & set(ablated))
        if both:
            raise FastsaeError(
                f"search: features {both} are found by {search!r} and annotated to be ablated; "
                "search for other words, or leave the category out"
            )
        if way == "amplify":
            operations.append(amplify(features, strength))
        else:
            operations.append(
                {"add": add, "calibrate": calibrate}[way](features, strength, unit=unit)
            )
    if not operations:
        raise FastsaeError("operations: none; search for words, or ablate annotated features")
    return Policy(operations, name=name, version=version, phase=phase, required=required)


def read_annotations(path: str | Path) -> dict[str, list[int]]:
    """{category: features} from a JSON file of just that; a feature is an index ≥ 0."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FastsaeError(f"annotations: cannot read {path}: {error}") from error
    if not isinstance(given, Mapping) or not given:
        raise FastsaeError(f"annotations: {path} must hold {{category: [features]}}")
    for category, features in given.items():
        right = isinstance(features, list) and all(type(f) is int and f >= 0 for f in features)
        if not right:
            raise FastsaeError(
                f"annotations: {path}: {category}: expected a list of feature indices ≥ 0, "
                f"got {features!r}"
            )
    return dict(given)


def annotated(annotations: Mapping[str, list[int]], categories: Sequence[str] | None) -> list[int]:
    """The features of some categories (None: of all of them), each once, ascending."""
    for category in categories or ():
        if category not in annotations:
            raise FastsaeError(
                f"category: {category!r} is not annotated; there are {', '.join(annotations)}"
            )
    chosen = annotations if categories is None else categories
    return sorted({feature for category in chosen for feature in annotations[category]})
