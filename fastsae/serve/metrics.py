"""Prometheus metrics of a server, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
UNSTEERED = ""


class Metrics:
    """`policy`: the id that a request named, "" for none; `arm`: Decision.reason of control.py."""

    def __init__(self):
        self.registry = r = CollectorRegistry()
        labels = ("policy", "arm")
        named = {"registry": r, "namespace": "fastsae"}
        self.requests = Counter("requests", "Ended requests", (*labels, "outcome"), **named)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", labels, **named)
        self.tokens = Counter("generated_tokens", "Generated tokens", labels, **named)
        self.latency = Histogram(
            "request_seconds", "A request, whole", labels, buckets=_SECONDS, **named
        )
        self.first = Histogram("time_to_first_token_seconds", "", labels, buckets=_SECONDS, **named)
        self.between = Histogram(
            "time_per_output_token_seconds", "After the first", labels, buckets=_TOKEN, **named
        )
        self.steered = Gauge("steered_tokens", "Tokens steered so far", ("policy",), **named)
        self.running = Gauge("running_requests", "Admitted, not ended", **named)
        self.refused = Counter("refused_requests", "Before admission", ("status",), **named)
        self.guard = Gauge("latency_guard_open", "1 while optional policies are dropped", **named)

    def text(self) -> bytes:
        return generate_latest(self.registry)
