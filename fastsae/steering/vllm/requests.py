"""A request's steering field, and the policies it may name."""

import hashlib
import json
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastsae.errors import FastsaeError
from fastsae.steering.policy import Policy
from fastsae.steering.vllm.settings import is_number

REPLACED = 8  # earlier policies of a label that a server is told of


class Wish(NamedTuple):
    """What a client asks for: {"policy": "name@version" or "name", "strength": 1.0}."""

    policy: str
    strength: float
    digest: str | None = None  # of the policy that the server found under that name

    @classmethod
    def of(cls, given: Any, max_strength: float, *, found: bool = False) -> "Wish":
        """Checks all but that the name exists; a mistake is a FastsaeError for the client.

        found: whether a server has looked the name up, and may tell the policy's digest.
        """
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise FastsaeError(f"steering: not JSON: {error}") from error
        if not isinstance(given, Mapping):
            raise FastsaeError(f"steering: expected an object, got {given!r}")
        accepted = ("policy", "strength", "digest") if found else ("policy", "strength")
        for name in given:
            if name not in accepted:
                raise FastsaeError(f"steering: unknown key {name!r}; accepted are policy, strength")
        policy, strength = given.get("policy"), given.get("strength", 1.0)
        digest = given.get("digest")
        if not isinstance(policy, str) or not policy:
            raise FastsaeError(f"steering.policy: expected a policy's name, got {policy!r}")
        if not is_number(strength):
            raise FastsaeError(f"steering.strength: expected a finite number, got {strength!r}")
        if abs(strength) > max_strength:
            raise FastsaeError(
                f"steering.strength: got {strength}, this server allows ±{max_strength:g}"
            )
        if digest is not None and not isinstance(digest, str):
            raise FastsaeError(f"steering.digest: expected a text, got {digest!r}")
        return cls(policy, float(strength), digest)

    def to_json(self) -> str:
        fields = {} if self.digest is None else {"digest": self.digest}
        return json.dumps({"policy": self.policy, "strength": self.strength, **fields})


class Footprint(NamedTuple):
    """What a policy takes of a site's table: slots, feature rows, items."""

    slots: int
    rows: frozenset[tuple[int, bool]]
    items: int


class Loaded(NamedTuple):
    """A policy that the workers have checked against its site's SAE."""

    site: int
    policy: Policy
    footprint: Footprint
    holdout: float = 0.0
    watch: tuple[int, ...] = ()  # features to watch, besides those the policy names


class Registry:
    """Policies by name. "name" alone means the version loaded last.

    A server looks a request's policy up before the engine does. What is deleted or replaced in
    between is kept here, the last `kept` of them, so that the request gets what it was told.
    """

    def __init__(self, kept: int = 1024):
        self._by_label: dict[str, Loaded] = {}
        self._latest: dict[str, str] = {}
        self._gone: OrderedDict[str, Loaded] = OrderedDict()  # by digest
        self._replaced: dict[str, deque[str]] = {}  # digests, by label
        self._kept = kept

    def add(self, loaded: Loaded, *, replace: bool) -> Loaded | None:
        """Admits a policy; what it takes the place of."""
        policy = loaded.policy
        if policy.name is None:
            raise FastsaeError("name: a served policy needs one, requests ask for it by name")
        before = self._by_label.get(policy.label)
        if before is not None and not replace and before != loaded:
            raise FastsaeError(
                f"name: {policy.label} is loaded already with other content; replace it, or give "
                "the new one another version"
            )
        other = self._latest.get(policy.name)
        if other is not None and self._by_label[other].site != loaded.site:
            raise FastsaeError(f"name: {policy.name} is a policy of another site; rename one")
        if before is not None:
            self._retire(before)
        if before is not None and before.policy.digest != policy.digest:
            replaced = self._replaced.setdefault(policy.label, deque(maxlen=REPLACED))
            replaced.append(before.policy.digest)
        self._by_label[policy.label] = loaded
        self._latest[policy.name] = policy.label
        return None if before == loaded else before

    def remove(self, label: str) -> Loaded:
        gone = self.find(label)
        self._retire(self._by_label.pop(gone.policy.label))
        self._replaced.pop(gone.policy.label, None)
        name = gone.policy.name
        versions = [each for each, l in self._by_label.items() if l.policy.name == name]
        if versions:
            self._latest[name] = versions[-1]
        else:
            del self._latest[name]
        return gone

    def _retire(self, loaded: Loaded) -> None:
        self._gone[loaded.policy.digest] = loaded
        self._gone.move_to_end(loaded.policy.digest)
        while len(self._gone) > self._kept:
            self._gone.popitem(last=False)

    def looked_up(self, label: str, digest: str | None) -> Loaded:
        """What a server found under `label` a moment ago, whatever has happened to it since."""
        if digest is None:
            return self.find(label)
        found = self._gone.get(digest)
        for loaded in self._by_label.values():
            found = loaded if loaded.policy.digest == digest else found
        if found is None:
            raise FastsaeError(f"steering.policy: {label!r} was deleted or replaced; ask again")
        return found

    def find(self, label: str) -> Loaded:
        found = self._by_label.get(label) or self._by_label.get(self._latest.get(label, ""))
        if found is None:
            known = ", ".join(sorted(self._by_label)) or "none"
            raise FastsaeError(f"steering.policy: there is no policy {label!r}; loaded are {known}")
        return found

    def listed(self) -> list[Loaded]:
        return list(self._by_label.values())

    def replaced(self, label: str) -> list[str]:
        """Digests of the last policies that had this label before, and are served on demand."""
        return [digest for digest in self._replaced.get(label, ()) if digest in self._gone]


class Ledger:
    """Which policies of one site are in use and how often; `acquire` says no when it is full."""

    def __init__(self, max_policies: int, max_features: int, max_items: int):
        self.max_policies, self.max_features, self.max_items = max_policies, max_features, max_items
        self._users: dict[str, int] = {}
        self._footprints: dict[str, Footprint] = {}

    def fits(self, *footprints: Footprint) -> bool:
        slots = sum(each.slots for each in footprints)
        rows = frozenset().union(*(each.rows for each in footprints))
        items = sum(each.items for each in footprints)
        return (
            slots <= self.max_policies
            and len(rows) <= self.max_features
            and items <= self.max_items
        )

    def acquire(self, digest: str, footprint: Footprint) -> bool:
        if digest not in self._users:
            if not self.fits(footprint, *self._footprints.values()):
                return False
            self._users[digest], self._footprints[digest] = 0, footprint
        self._users[digest] += 1
        return True

    def release(self, digest: str) -> None:
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest], self._footprints[digest]

    @property
    def in_use(self) -> dict[str, int]:
        return dict(self._users)


def cache_salt(given: str | None, site_digest: str, policy: Policy, strength: float) -> str:
    """64 hex characters: prefix-cache blocks are shared only by requests steered alike.

    site_digest covers the SAE's weights, its layer and whether first tokens are steered. Policies
    for generated tokens only count too: generated blocks are reused as prompts.
    """
    parts = [given, site_digest, policy.digest, strength]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
