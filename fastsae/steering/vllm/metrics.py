"""Prometheus metrics of steered requests, shown by vLLM's own /metrics."""

import functools


class Metrics:
    """Per policy: requests by status, seconds to the first byte of the answer and to its last."""

    def __init__(self, registry=None):
        from prometheus_client import REGISTRY, Counter, Histogram

        registry = registry or REGISTRY
        self.requests = Counter(
            "fastsae_requests",
            "Steered requests by policy and HTTP status",
            ["policy", "status"],
            registry=registry,
        )
        self.first_byte = Histogram(
            "fastsae_first_byte_seconds",
            "Steered requests: seconds to the first byte of the answer",
            ["policy"],
            registry=registry,
        )
        self.seconds = Histogram(
            "fastsae_request_seconds",
            "Steered requests: seconds to the last byte of the answer",
            ["policy"],
            registry=registry,
        )

    def done(self, policy: str, status: int, first: float | None, seconds: float) -> None:
        """A request that ended. policy: the label of a loaded one, so that labels stay few."""
        self.requests.labels(policy, str(status)).inc()
        if first is not None:
            self.first_byte.labels(policy).observe(first)
        self.seconds.labels(policy).observe(seconds)


@functools.cache
def shared() -> Metrics:
    """The process's metrics, in prometheus_client's own registry, which servers already show."""
    return Metrics()
