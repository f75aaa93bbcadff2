"""The policies that requests may name: loaded by the operator, replaced while requests run."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError
from fastsae.steering import Policy
from fastsae.steering.control import checked_holdout


@dataclass(frozen=True)
class Entry:
    """A policy as it is served. `holdout`: the share of its requests that stay unsteered.

    watch: features whose activations /metrics shows, besides those that the policy names.
    """

    policy: Policy
    layer: int | str
    holdout: float = 0.0
    watch: tuple[int, ...] = ()

    def __post_init__(self):
        listed = self.watch if isinstance(self.watch, list | tuple) else ("no list",)
        if any(type(feature) is not int or feature < 0 for feature in listed):
            raise FastsaeError(f"watch: expected a list of features ≥ 0, got {self.watch!r}")
        object.__setattr__(self, "watch", tuple(listed))
        checked_holdout(self.holdout, self.policy.required)
        if self.policy.name is None:
            raise FastsaeError("name: missing; requests name a policy as name@version, or name")

    @property
    def id(self) -> str:
        return self.policy.label

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "digest": self.policy.digest,
            "layer": self.layer,
            "holdout": self.holdout,
            "watch": list(self.watch),
            "policy": self.policy.to_dict(),
        }


class PolicyStore:
    """Entries by id. A request holds its Entry, so replacing one changes only later requests.

    check(entry): raises FastsaeError when the engine cannot apply the policy; called before a
    policy is admitted, so that every policy in the store can be applied. `gone` is called with
    every entry that was replaced or deleted.
    """

    def __init__(self, layers: Iterable[int | str], check: Callable[[Entry], None]):
        self.layers = tuple(layers)
        self._check = check
        self.gone: Callable[[Entry], None] = lambda entry: None
        self._entries: dict[str, Entry] = {}  # oldest first
        self._lock = threading.Lock()

    def put(self, document: Any) -> Entry:
        """Admits {"policy", "layer", "holdout", "watch"} or a bare policy, for one of its id."""
        if not isinstance(document, dict):
            raise FastsaeError(f"policy: expected a JSON object, got {document!r}")
        fields = document if "policy" in document else {"policy": document}
        unknown = sorted(set(fields) - {"policy", "layer", "holdout", "watch"})
        if unknown:
            raise FastsaeError(
                f"{unknown[0]}: unknown key; accepted are policy, layer, holdout, watch"
            )
        policy = Policy.from_dict(fields["policy"])
        entry = Entry(
            policy,
            self._layer(fields.get("layer")),
            fields.get("holdout", 0.0),
            fields.get("watch", ()),
        )
        self._check(entry)
        with self._lock:
            replaced = self._entries.pop(entry.id, None)
            self._entries[entry.id] = entry
        if replaced is not None:
            self.gone(replaced)
        return entry

    def load(self, path: str | Path, layer: int | str | None = None) -> list[Entry]:
        """Admits the policy or policies of a file, or of every .json, .yaml, .yml in a folder."""
        path = Path(path)
        suffixes = (".json", ".yaml", ".yml")
        files = (
            sorted(p for p in path.iterdir() if p.suffix in suffixes) if path.is_dir() else [path]
        )
        if not files:
            raise FastsaeError(f"{path}: holds no policy file ({', '.join(suffixes)})")
        admitted = []
        for file in files:
            found = Policy.from_file(file)
            for policy in found if isinstance(found, list) else [found]:
                fields = {"policy": policy.to_dict(), "layer": layer}
                try:
                    admitted.append(self.put(fields))
                except FastsaeError as error:
                    raise FastsaeError(f"{file}: {error}") from error
        return admitted

    def get(self, name: str) -> Entry:
        """The entry of "name@version", or of "name": its only or latest admitted version."""
        with self._lock:
            found = self._entries.get(name)
            if found is None and "@" not in name:
                versions = [e for e in self._entries.values() if e.policy.name == name]
                found = versions[-1] if versions else None
            known = ", ".join(self._entries) or "none is loaded"
        if found is None:
            raise FastsaeError(f"policy: {name!r} is unknown; known are {known}")
        return found

    def delete(self, name: str) -> Entry:
        with self._lock:
            if name not in self._entries:
                raise FastsaeError(f"policy: {name!r} is unknown; delete by full id name@version")
            deleted = self._entries.pop(name)
        self.gone(deleted)
        return deleted

    def all(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    def _layer(self, layer: int | str | None) -> int | str:
        if layer is None:
            if len(self.layers) != 1:
                raise FastsaeError(
                    f"layer: missing, and SAEs are attached at {', '.join(map(str, self.layers))}"
                )
            return self.layers[0]
        if type(layer) not in (int, str) or layer not in self.layers:
            raise FastsaeError(
                f"layer: no SAE is attached at {layer!r}, only at "
                f"{', '.join(map(str, self.layers))}"
            )
        return layer
