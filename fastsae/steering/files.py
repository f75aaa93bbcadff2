"""Read a policy file, JSON or YAML, into plain values."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise FastsaeError(f"{key}: given {times} times")
    return dict(pairs)


def read_document(path: Path) -> Any:
    """The plain values in a .json, .yaml or .yml file; a key given twice is an error."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise FastsaeError(
            f"expected a .json, .yaml or .yml file, got {path.suffix or 'no'!r} suffix"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FastsaeError(f"cannot read the policy file: {error}") from error
    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=unique_keys)
        except json.JSONDecodeError as error:
            raise FastsaeError(f"not JSON: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise FastsaeError("YAML needs pyyaml: pip install pyyaml, or write JSON") from error

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            unique_keys([(self.construct_object(key, deep=True), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as error:
        raise FastsaeError(f"not YAML: {' '.join(str(error).split())}") from error
