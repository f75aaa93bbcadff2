"""What all requests share: limits, keys, metrics, and a place for each that runs."""

import contextlib
import secrets
import time
from dataclasses import dataclass

from fastapi import Request
from pydantic import ValidationError

from fastsae.errors import FastsaeError
from fastsae.serve.audit import Audit
from fastsae.serve.engine import Engine
from fastsae.serve.errors import ApiError
from fastsae.serve.metrics import Metrics, Watched
from fastsae.serve.policies import PolicyStore
from fastsae.serve.sampling import Sampling
from fastsae.serve.seats import Job
from fastsae.steering.control import LatencyGuard, decide


@dataclass(frozen=True)
class Settings:
    """Limits and keys. Times in seconds, sizes in bytes; no keys: everybody may complete."""

    model_name: str
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()  # none: no admin routes
    max_body: int = 1 << 20
    max_tokens: int = 1024
    default_tokens: int = 256
    max_running: int = 64
    timeout: float = 300.0
    latency_budget_ms: float | None = None


class Server:
    """What the routes share."""

    def __init__(
        self, engine: Engine, store: PolicyStore, settings: Settings, audit: Audit, explanations
    ):
        self.engine, self.store, self.settings, self.audit = engine, store, settings, audit
        self.explanations = explanations
        self.metrics = Metrics()
        self.metrics.registry.register(Watched(engine.watched, store.all, audit))
        engine.observe = self.metrics.steering.observe
        store.gone = engine.forget
        self.guard = LatencyGuard(settings.latency_budget_ms)
        self.started = int(time.time())
        self.running = 0

    @contextlib.contextmanager
    def admitted(self, jobs: int):
        """A place for each job of a request, or 429: nothing waits without a bound."""
        if self.running + jobs > self.settings.max_running:
            message = f"{self.running} requests are running, {self.settings.max_running} may"
            raise ApiError(429, message, code="too_many_requests")
        self.running += jobs
        self.metrics.running.set(self.running)
        try:
            yield
        finally:
            self.running -= jobs
            self.metrics.running.set(self.running)

    def authorise(self, request: Request, keys: tuple[str, ...]) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if keys and not any(secrets.compare_digest(given.encode(), k.encode()) for k in keys):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def body(self, request: Request) -> bytes:
        size, parts = 0, []
        async for part in request.stream():
            size += len(part)
            if size > self.settings.max_body:
                raise ApiError(413, f"the body is larger than {self.settings.max_body} bytes")
            parts.append(part)
        return b"".join(parts)

    def parse(self, kind, body: bytes):
        try:
            fields = kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(each) for each in first["loc"])
            raise ApiError(400, f"{place or 'body'}: {first['msg']}", place or None) from None
        if fields.model not in (None, self.settings.model_name):
            message = f"model: {fields.model!r} is not served, {self.settings.model_name!r} is"
            raise ApiError(404, message, "model", "model_not_found")
        return fields

    def jobs(self, fields, prompts: list[list[int]], most: int | None, key: str) -> list[Job]:
        entry = None
        if fields.steering is not None:
            try:
                entry = self.store.get(fields.steering.policy)
            except FastsaeError as error:
                raise ApiError(400, str(error), "steering.policy", "unknown_policy") from None
        strength = fields.steering.strength if fields.steering else 0.0
        decision = decide(entry, strength, fields.user or key, self.guard)
        self.metrics.guard.set(self.guard.exceeded())
        seed = secrets.randbits(63) if fields.seed is None else fields.seed
        most = self.settings.default_tokens if most is None else most
        if most > self.settings.max_tokens:
            message = f"max_tokens: got {most}, at most {self.settings.max_tokens} are served"
            raise ApiError(400, message, "max_tokens")
        if not prompts:
            raise ApiError(400, "prompt: expected at least one, got none", "prompt")
        found = []
        for number, tokens in enumerate(prompts):
            if not tokens:
                raise ApiError(400, "prompt: expected at least one token, got none", "prompt")
            if len(tokens) + most > self.engine.context:
                message = (
                    f"prompt: {len(tokens)} tokens and {most} new ones exceed the context of "
                    f"{self.engine.context}"
                )
                raise ApiError(400, message, "prompt", "context_length_exceeded")
            how = Sampling(fields.temperature, fields.top_p, fields.top_k, seed + number)
            found.append(Job(tuple(tokens), most, how, decision))
        return found
