"""Which of the requests that name a policy are steered: hold-outs, and the latency guard.

The same for every server; nothing here knows an engine.
"""

import collections
import hashlib
import threading
import time
from typing import Any, NamedTuple, Protocol

from fastsae.errors import FastsaeError


class Entry(Protocol):
    """A policy as a server holds it. policy: anything with its name, label, digest, required."""

    policy: Any
    layer: int | str
    holdout: float


class Decision(NamedTuple):
    """What a request gets. reason: "steered", "none", "holdout", "latency" or "strength 0"."""

    entry: Entry | None
    strength: float
    reason: str

    @property
    def steered(self) -> bool:
        return self.entry is not None and self.reason == "steered"


def checked_holdout(share: Any, required: bool) -> float:
    """The share of a policy's requests that stay unsteered: in [0, 1), 0 for a required policy."""
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not 0 <= share < 1:
        raise FastsaeError(f"holdout: expected a share in [0, 1), got {share!r}")
    if share and required:
        raise FastsaeError(
            "holdout: a required policy must steer every request; make one of the two untrue"
        )
    return float(share)


def in_holdout(entry: Entry, key: str) -> bool:
    """Whether a unit of the experiment (a user, else a request) is held out: a fixed function of
    the policy's name and the key, so a user stays on one side across versions and restarts."""
    text = f"{entry.policy.name}\0{key}".encode()
    point = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return point < entry.holdout


class LatencyGuard:
    """Open while the 95th percentile of the last seconds per token is above the budget.

    budget_ms: milliseconds per token; None: never. Looks at tokens of the last `window` seconds and
    needs 20 of them to say anything.
    """

    LEAST = 20

    def __init__(self, budget_ms: float | None, window: float = 10.0):
        self.budget_ms, self.window = budget_ms, window
        self._seen: collections.deque[tuple[float, float]] = collections.deque(maxlen=4096)
        self._lock = threading.Lock()

    def token(self, milliseconds: float) -> None:
        if self.budget_ms is not None:
            with self._lock:
                self._seen.append((time.monotonic(), milliseconds))

    def exceeded(self) -> bool:
        if self.budget_ms is None:
            return False
        oldest = time.monotonic() - self.window
        with self._lock:
            recent = sorted(ms for at, ms in self._seen if at >= oldest)
        if len(recent) < self.LEAST:
            return False
        return recent[int(0.95 * (len(recent) - 1))] > self.budget_ms


def decide(entry: Entry | None, strength: float, key: str, guard: LatencyGuard) -> Decision:
    if entry is None:
        return Decision(None, 0.0, "none")
    if strength == 0:
        return Decision(entry, 0.0, "strength 0")
    if entry.holdout and in_holdout(entry, key):
        return Decision(entry, strength, "holdout")
    if not entry.policy.required and guard.exceeded():
        return Decision(entry, strength, "latency")
    return Decision(entry, strength, "steered")


def described(decision: Decision) -> dict[str, Any]:
    """What was asked and what was done, for responses and audit lines of every server."""
    entry = decision.entry
    return {
        "policy": None if entry is None else entry.policy.label,
        "digest": None if entry is None else entry.policy.digest,
        "layer": None if entry is None else entry.layer,
        "strength": decision.strength,
        "steered": decision.steered,
        "reason": decision.reason,
    }
