"""Prometheus metrics of requests that name a policy, shown by vLLM's own /metrics."""

import functools

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

    def done(self, decision: Decision, status: int, first: float | None, seconds: float) -> None:
        """A request that ended. status: of HTTP, 0 when no answer began."""
        labels = (decision.entry.policy.label, decision.reason)
        self.requests.labels(*labels, str(status)).inc()
        if first is not None:
            self.first_byte.labels(*labels).observe(first)
        self.seconds.labels(*labels).observe(seconds)


@functools.cache
def shared() -> Metrics:
    """The process's metrics, in prometheus_client's own registry, which servers already show."""
    return Metrics()
