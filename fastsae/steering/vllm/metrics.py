"""Prometheus metrics of requests that name a policy, shown by vLLM's own /metrics."""

import contextlib
import functools
from collections.abc import Iterator

from fastsae.steering.control import Decision


class Metrics:
    """Labels as in `fastsae serve`. policy: name@version of a loaded one, so that labels stay few;
    arm: what was decided, `Decision.reason`."""

    def __init__(self, registry=None):
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        named = {"registry": registry or REGISTRY, "namespace": "fastsae"}
        labels = ("policy", "arm")
        self.requests = Counter(
            "requests", "Ended requests that name a policy", (*labels, "status"), **named
        )
        self.first_byte = Histogram(
            "first_byte_seconds", "To the first byte of the answer", labels, **named
        )
        self.seconds = Histogram("request_seconds", "A request, whole", labels, **named)
        self.guard = Gauge(
            "latency_guard_open",
            "1 while optional policies are dropped",
            multiprocess_mode="max",
            **named,
        )

        # Gauges, though they only grow: the workers add up, and several API servers show the same.
        of = ("policy", "layer")
        self.watched = {
            name: Gauge(name, about, more, multiprocess_mode="mostrecent", **named)
            for name, about, more in (
                ("watched_tokens_total", "Steered tokens", of),
                ("not_finite_tokens_total", "Tokens that steering could not finish", of),
                ("gate_tokens_total", "Steered tokens by their gate", (*of, "gate")),
                ("feature_mean", "Activation before steering, mean", (*of, "feature")),
                ("feature_max", "Activation before steering, max", (*of, "feature")),
                ("dose_mean", "Relative change of a token, |r - x| / |x|, mean", of),
                ("dose_max", "Relative change of a token, |r - x| / |x|, max", of),
                ("policy_seconds_total", "Wall time of steering; on a CPU only", of),
            )
        }
        self._shown: set[tuple[str, tuple[str, ...]]] = set()

    def show(self, watched: dict[str, dict]) -> None:
        """watched: Watch.read by policy label, with layer and seconds; what has left goes."""
        shown = set()
        for label, numbers in watched.items():
            of = (label, str(numbers["layer"]))
            for name, more, value in samples(numbers):
                self.watched[name].labels(*of, *more).set(value)
                shown.add((name, (*of, *more)))
        for name, labels in self._shown - shown:
            with contextlib.suppress(KeyError):
                self.watched[name].remove(*labels)
        self._shown = shown

    def done(self, decision: Decision, status: int, first: float | None, seconds: float) -> None:
        """A request that ended. status: of HTTP, 0 when no answer began."""
        labels = (decision.entry.policy.label, decision.reason)
        self.requests.labels(*labels, str(status)).inc()
        if first is not None:
            self.first_byte.labels(*labels).observe(first)
        self.seconds.labels(*labels).observe(seconds)


def samples(numbers: dict) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Metric, labels after the policy's and its layer's, value."""
    tokens = numbers["tokens"]
    yield "watched_tokens_total", (), tokens
    yield "not_finite_tokens_total", (), numbers["not_finite"]
    for side, count in (numbers["gate"] or {}).items():
        yield "gate_tokens_total", (side,), count
    if numbers["seconds"] is not None:
        yield "policy_seconds_total", (), numbers["seconds"]
    if tokens:
        yield "dose_mean", (), numbers["dose"]["sum"] / tokens
        yield "dose_max", (), numbers["dose"]["max"]
        for feature, each in numbers["features"].items():
            yield "feature_mean", (str(feature),), each["sum"] / tokens
            yield "feature_max", (str(feature),), each["max"]


@functools.cache
def shared() -> Metrics:
    """The process's metrics, in prometheus_client's own registry, which servers already show."""
    return Metrics()
