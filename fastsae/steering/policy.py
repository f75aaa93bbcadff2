"""What to do to the residual stream: operations, gates and policies, as plain immutable values.

Nothing here touches a tensor. A policy is checked when it is built, equal to every policy of the
same content, and known by its digest: the same file is the same policy in every engine.
"""

import dataclasses
import hashlib
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from fastsae.errors import FastsaeError
from fastsae.steering.files import read_document

ACTIVES = ("relu", "sae")
MODES = ("set", "floor")
UNITS = ("raw", "max", "mean")
PHASES = ("all", "prompt", "generated")
NORMS = (None, "preserve")

Numbers = float | Sequence[float]
Features = int | Sequence[int]


class Operation:
    """One step of a policy. `op` names it in a file, `per_feature` its field with a number each."""

    op: ClassVar[str]
    per_feature: ClassVar[str | None] = None
    features: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The operation as a policy file spells it; one number where all features share it."""
        spelled: dict[str, Any] = {"op": self.op}
        for name in (each.name for each in dataclasses.fields(self)):
            value = getattr(self, name)
            if name == self.per_feature and len(set(value)) == 1:
                value = value[0]
            spelled[name] = list(value) if isinstance(value, tuple) else value
        return spelled

    def _replace(self, **checked: Any) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Amplify(Operation):
    features: tuple[int, ...]
    alpha: tuple[float, ...]
    active: str = "relu"
    op: ClassVar[str] = "amplify"
    per_feature: ClassVar[str] = "alpha"

    def __post_init__(self):
        features = _features(self.features)
        alpha = _numbers("alpha", self.alpha, features)
        self._replace(features=features, alpha=alpha, active=_one("active", self.active, ACTIVES))


@dataclass(frozen=True)
class Calibrate(Operation):
    features: tuple[int, ...]
    beta: tuple[float, ...]
    mode: str = "set"
    unit: str = "raw"
    op: ClassVar[str] = "calibrate"
    per_feature: ClassVar[str] = "beta"

    def __post_init__(self):
        features = _features(self.features)
        self._replace(features=features, beta=_numbers("beta", self.beta, features))
        self._replace(mode=_one("mode", self.mode, MODES), unit=_one("unit", self.unit, UNITS))


@dataclass(frozen=True)
class Ablate(Operation):
    features: tuple[int, ...]
    op: ClassVar[str] = "ablate"

    def __post_init__(self):
        self._replace(features=_features(self.features))


@dataclass(frozen=True)
class Add(Operation):
    features: tuple[int, ...]
    strength: tuple[float, ...]
    unit: str = "raw"
    op: ClassVar[str] = "add"
    per_feature: ClassVar[str] = "strength"

    def __post_init__(self):
        features = _features(self.features)
        strength = _numbers("strength", self.strength, features)
        self._replace(features=features, strength=strength, unit=_one("unit", self.unit, UNITS))


@dataclass(frozen=True)
class Enforce(Operation):
    features: tuple[int, ...]
    magnitude: float
    op: ClassVar[str] = "enforce"

    def __post_init__(self):
        magnitude = _number("magnitude", self.magnitude)
        if magnitude <= 0:
            raise FastsaeError(f"magnitude: expected a number above 0, got {self.magnitude!r}")
        self._replace(features=_features(self.features), magnitude=magnitude)


@dataclass(frozen=True)
class Gate:
    """Open on a token when the mean over `features` of ReLU(h_s) is ≥ above."""

    features: tuple[int, ...]
    above: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "features", _features(self.features))
        object.__setattr__(self, "above", _number("above", self.above))

    def to_dict(self) -> dict[str, Any]:
        return {"features": list(self.features), "above": self.above}


OPERATIONS = {kind.op: kind for kind in (Amplify, Calibrate, Ablate, Add, Enforce)}


def amplify(features: Features, alpha: Numbers, active: str = "relu") -> Amplify:
    """x + Σ α_s a_s d_s over `features` (one or several): α > 0 strengthens them, −1 removes them.

    a_s = ReLU(⟨w_s, x − s·b_dec⟩ + b_s) for active="relu". active="sae" takes the SAE's own
    activation: its threshold, or membership of the k largest for a top-k SAE. alpha: a number, or
    one per feature.
    """
    return Amplify(features, alpha, active)


def calibrate(features: Features, beta: Numbers, mode: str = "set", unit: str = "raw") -> Calibrate:
    """x + Σ (β_s − a_s) d_s: every feature ends at activation β_s; mode="floor" only raises.

    unit="raw": β in the SAE's own units; "max" or "mean": multiples of the feature's own largest or
    mean activation, from `sae.stats`. beta: a number, or one per feature.
    """
    return Calibrate(features, beta, mode, unit)


def ablate(features: Features) -> Ablate:
    """x − Σ a_s d_s: remove what the features contribute, a_s = ReLU(h_s)."""
    return Ablate(features)


def add(features: Features, strength: Numbers, unit: str = "raw") -> Add:
    """x + Σ c_s d_s: add decoder rows whether or not the features are active.

    strength: activation units, a number or one per feature; `unit` as in `calibrate`.
    """
    return Add(features, strength, unit)


def enforce(features: Features, magnitude: float) -> Enforce:
    """v_s = ReLU(m − a_s); x + m Σ (v_s/Σv) d_s, rescaled to ‖x‖; Σv = 0 leaves x alone. m > 0."""
    return Enforce(features, magnitude)


def gate(features: Features, above: float = 0.1) -> Gate:
    """Apply a policy only to tokens where mean_s ReLU(h_s) ≥ above, before any operation."""
    return Gate(features, above)


@dataclass(frozen=True)
class Policy:
    """Operations in order, each on the residual that the ones before it left, and where they apply.

    operations: one operation or several. phase: "all" tokens, those of the "prompt", or the
    "generated" ones (position ≥ prompt length; the first sampled token comes from the last prompt
    position, so "generated" leaves it unchanged). gate: tokens on which it stays closed are left
    alone. norm="preserve" rescales the result to the length it had. required: an adapter that
    cannot apply the policy stops the request. name and version identify it in requests and logs.
    Equality and `digest` go by content. A mistake is a FastsaeError that names the field.

    >>> Policy(amplify([12, 99], 4.0)) == Policy([amplify((12, 99), [4, 4])])
    True
    """

    operations: tuple[Operation, ...]
    _: KW_ONLY
    phase: str = "all"
    gate: Gate | None = None
    norm: str | None = None
    required: bool = False
    name: str | None = None
    version: str | None = None

    def __post_init__(self):
        given = self.operations
        operations = (given,) if isinstance(given, Operation) else ()
        if _is_list(given):
            operations = tuple(given)
        if not operations:
            raise FastsaeError(f"operations: expected one or more operations, got {given!r}")
        for i, operation in enumerate(operations):
            if not isinstance(operation, Operation):
                raise FastsaeError(
                    f"operations[{i}]: expected an operation ({', '.join(OPERATIONS)}), "
                    f"got {operation!r}"
                )
        if self.gate is not None and not isinstance(self.gate, Gate):
            raise FastsaeError(f"gate: expected fastsae.gate(features, above), got {self.gate!r}")
        _one("phase", self.phase, PHASES)
        _one("norm", self.norm, NORMS)
        if not isinstance(self.required, bool):
            raise FastsaeError(f"required: expected true or false, got {self.required!r}")
        object.__setattr__(self, "operations", operations)
        object.__setattr__(self, "name", _identifier("name", self.name))
        object.__setattr__(self, "version", _identifier("version", self.version))

    @property
    def label(self) -> str:
        """name@version, the name alone, or the head of the digest: what logs and errors print."""
        if self.name is None:
            return self.digest[:12]
        return self.name if self.version is None else f"{self.name}@{self.version}"

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of the canonical JSON of `to_dict` (sorted keys, no spaces)."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The policy as a file spells it; `Policy.from_dict` returns an equal policy."""
        return {
            "name": self.name,
            "version": self.version,
            "operations": [operation.to_dict() for operation in self.operations],
            "phase": self.phase,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "norm": self.norm,
            "required": self.required,
        }

    @classmethod
    def from_dict(cls, spelled: Mapping[str, Any]) -> "Policy":
        """The policy a file's dictionary describes; unknown and missing keys are errors."""
        accepted = [each.name for each in dataclasses.fields(cls)]
        fields = _keys("policy", spelled, accepted, ("operations",))
        given = fields.pop("operations")
        if not _is_list(given):
            raise FastsaeError(f"operations: expected a list, got {given!r}")
        operations = [_at(f"operations[{i}]", _operation, each) for i, each in enumerate(given)]
        if fields.get("gate") is not None:
            fields["gate"] = _at("gate", _build, Gate, "gate", fields["gate"])
        return cls(operations, **fields)

    @classmethod
    def from_file(cls, path: str | Path) -> "Policy | list[Policy]":
        """One policy, or a list of them when the file holds a list, from .json, .yaml or .yml.

        YAML needs pyyaml. Errors begin with the file, and the place in it.
        """
        path = Path(path)
        document = _at(str(path), read_document, path, joint=": ")
        if isinstance(document, list):
            return [_at(f"{path}: [{i}]", cls.from_dict, each) for i, each in enumerate(document)]
        return _at(str(path), cls.from_dict, document, joint=": ")


# --- checks: every message begins with the field it is about ------------------------------------

_FIELD = re.compile(r"[a-z_]+(\[\d+\])*[.:]")


def _at(place: str, function, *args, joint: str = "."):
    """`function(*args)`, its FastsaeError prefixed with the place in the document."""
    try:
        return function(*args)
    except FastsaeError as error:
        between = joint if _FIELD.match(str(error)) else ": "
        raise FastsaeError(f"{place}{between}{error}") from error


def _is_index(given: Any) -> bool:
    try:
        operator.index(given)
    except TypeError:
        return False
    return not isinstance(given, bool)


def _is_list(given: Any) -> bool:
    if isinstance(given, str | bytes | Mapping):
        return False
    return isinstance(given, Iterable) and getattr(given, "ndim", None) != 0  # 0-d: a number


def _features(given: Any) -> tuple[int, ...]:
    listed = [given] if _is_index(given) else list(given) if _is_list(given) else None
    if not listed:
        raise FastsaeError(f"features: expected an index or a list of indices, got {given!r}")
    for feature in listed:
        if not _is_index(feature) or operator.index(feature) < 0:
            raise FastsaeError(f"features: expected indices ≥ 0, got {feature!r}")
    features = tuple(map(operator.index, listed))
    for feature, times in Counter(features).items():
        if times > 1:
            raise FastsaeError(f"features: {feature} is listed {times} times; name it once")
    return features


def _number(field: str, given: Any) -> float:
    try:
        value = math.nan if isinstance(given, str | bytes | bool) else float(given)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        value = math.nan
    if not math.isfinite(value):
        raise FastsaeError(f"{field}: expected a finite number, got {given!r}")
    return value + 0.0  # −0.0 becomes 0.0: equal policies must have equal digests


def _numbers(field: str, given: Any, features: tuple[int, ...]) -> tuple[float, ...]:
    if not _is_list(given):
        return (_number(field, given),) * len(features)
    values = tuple(_number(f"{field}[{i}]", each) for i, each in enumerate(given))
    if len(values) != len(features):
        raise FastsaeError(
            f"{field}: got {len(values)} numbers for {len(features)} features; "
            "pass one number, or one per feature"
        )
    return values


def _one(field: str, given: Any, accepted: Sequence[str | None]) -> Any:
    if not isinstance(given, str | None) or given not in accepted:
        names = ", ".join("null" if name is None else repr(name) for name in accepted)
        raise FastsaeError(f"{field}: expected one of {names}, got {given!r}")
    return given


def _identifier(field: str, given: Any) -> str | None:
    if given is None:
        return None
    text = str(given) if _is_index(given) else given
    if not isinstance(text, str) or not text or text != text.strip() or "@" in text:
        raise FastsaeError(
            f"{field}: expected text without '@' (in YAML, quoted), got {given!r}; "
            "requests name a policy as name@version"
        )
    return text


# --- documents ----------------------------------------------------------------------------------


def _keys(what: str, given: Any, accepted: Iterable[str], needed: Iterable[str]) -> dict[str, Any]:
    accepted = ", ".join(keys := tuple(accepted))
    if not isinstance(given, Mapping):
        raise FastsaeError(f"expected a {what} with the keys {accepted}, got {given!r}")
    for key in given:
        if key not in keys:
            raise FastsaeError(f"unknown key {key!r} in {what}; accepted: {accepted}")
    for key in needed:
        if key not in given:
            raise FastsaeError(f"{key}: missing in {what}")
    return dict(given)


def _build(kind: type, what: str, given: Any) -> Any:
    needed = [each.name for each in dataclasses.fields(kind) if each.default is MISSING]
    accepted = ([] if kind is Gate else ["op"]) + [each.name for each in dataclasses.fields(kind)]
    values = _keys(what, given, accepted, needed)
    values.pop("op", None)
    return kind(**values)


def _operation(given: Any) -> Operation:
    op = given.get("op") if isinstance(given, Mapping) else given
    if not isinstance(op, str) or op not in OPERATIONS or not isinstance(given, Mapping):
        raise FastsaeError(f"op: expected one of {', '.join(OPERATIONS)}, got {op!r}")
    return _build(OPERATIONS[op], op, given)
