"""Prometheus metrics of a server, in a registry of its own."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastsae.serve.audit import Audit
from fastsae.serve.policies import Entry

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_STEERING = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
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
        self.steering = Histogram(
            "steering_seconds",
            "All steered layers of one forward in which a request is steered, on the host's clock",
            buckets=_STEERING,
            **named,
        )
        self.running = Gauge("running_requests", "Admitted, not ended", **named)
        self.refused = Counter("refused_requests", "Before admission", ("status",), **named)
        self.guard = Gauge("latency_guard_open", "1 while optional policies are dropped", **named)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Watched:
    """What steering did, per policy that is loaded now, read from the device when it is scraped.

    watched() -> {(layer, policy digest): numbers of fastsae.steering.watch}. A policy that was
    deleted or replaced, and one that no request has named yet, has no samples.
    """

    def __init__(
        self,
        watched: Callable[[], dict[tuple[int | str, str], dict]],
        loaded: Callable[[], Iterable[Entry]],
        audit: Audit,
    ):
        self.watched, self.loaded, self.audit = watched, loaded, audit

    def describe(self) -> list[Metric]:
        return []  # do not ask the engine when this is registered

    def collect(self) -> Iterable[Metric]:
        lost = CounterMetricFamily("fastsae_audit_lost_lines", "Audit lines that were not written")
        lost.add_metric([], self.audit.lost)
        yield lost
        labels = ["policy", "layer"]
        tokens = CounterMetricFamily("fastsae_watched_tokens", "Steered tokens", labels=labels)
        broken = CounterMetricFamily(
            "fastsae_not_finite_tokens", "Tokens that steering could not finish", labels=labels
        )
        gate = CounterMetricFamily(
            "fastsae_gate_tokens", "Steered tokens by their gate", labels=[*labels, "gate"]
        )
        feature = _mean_and_max("feature", "Activation before steering", [*labels, "feature"])
        dose = _mean_and_max("dose", "Relative change of a token, |r - x| / |x|", labels)
        numbers = self.watched()
        for entry in self.loaded():
            found = numbers.get((entry.layer, entry.policy.digest))
            if found is None:
                continue
            of, count = [entry.id, str(entry.layer)], found["tokens"]
            tokens.add_metric(of, count)
            broken.add_metric(of, found["not_finite"])
            for state, times in (found["gate"] or {}).items():
                gate.add_metric([*of, state], times)
            if count:
                _add(dose, of, found["dose"], count)
                for number, each in found["features"].items():
                    _add(feature, [*of, str(number)], each, count)
        yield from (tokens, broken, gate, *feature, *dose)


def _mean_and_max(name: str, what: str, labels: list[str]) -> list[GaugeMetricFamily]:
    return [
        GaugeMetricFamily(f"fastsae_{name}_{kind}", f"{what}, {kind}", labels=labels)
        for kind in ("mean", "max")
    ]


def _add(families: list[GaugeMetricFamily], labels: list[str], each: dict, count: int) -> None:
    for family, value in zip(families, (each["sum"] / count, each["max"]), strict=True):
        family.add_metric(labels, value)
