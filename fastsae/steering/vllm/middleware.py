"""The body field "steering" of vLLM's HTTP server: checked here, then handed on as an extra arg.

vLLM accepts and ignores fields it does not know: without this, a client could believe it steers.
"""

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastsae.errors import FastsaeError
from fastsae.steering.control import Decision, LatencyGuard, decide, described
from fastsae.steering.vllm.ask import EngineGone, ask_engine
from fastsae.steering.vllm.requests import Wish
from fastsae.steering.vllm.settings import KEY, Settings

FIELD = "steering"
SCRAPE_SECONDS = 5.0
TRUSTED_SECONDS = 1.0  # how long a list of policies is good: another server may have changed one
CARRIERS = ("vllm_xargs", "sampling_params", "extra_args", "extra_body")  # fields within fields
FORM = re.compile(rb'(?:\bname="?|^|&)steering["=;\s]')


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Head(NamedTuple):
    """Of a policy, what a server without the policy itself knows."""

    label: str
    name: str
    digest: str
    required: bool


class Known(NamedTuple):
    """A loaded policy as the engine lists it; an Entry for `control.decide`."""

    policy: Head
    layer: int
    holdout: float


class SteeringMiddleware:
    """ASGI middleware, put into every server with fastsae settings.

    A body that does not mention steering passes as it came. Unknown policies, fields and routes
    that cannot be steered are a 400; an engine that does not answer as armed is a 503. routes:
    those whose requests carry extra args to the engine.
    """

    def __init__(
        self, app, settings: Settings, app_state, routes: Iterable[str], guard: LatencyGuard
    ):
        from fastsae.serve.audit import Audit
        from fastsae.steering.vllm.metrics import shared

        self.app, self.settings, self.state = app, settings, app_state
        self.routes, self.guard = tuple(routes), guard
        self.audit, self.metrics = Audit(settings.audit), shared()
        self._scraped = -TRUSTED_SECONDS

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["method"] == "GET" and _path(scope) == "/metrics":
            await self._watched()
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        messages, body = await _read(receive)
        if not _mentions_steering(scope, body):
            return await self.app(scope, _replay(messages, receive), send)
        named = dict(scope["headers"]).get(b"x-request-id", b"").decode(errors="replace")
        request = named or uuid.uuid4().hex
        try:
            body, decision = await self._take(scope, body, request)
        except Refused as refused:
            return await _answer(send, refused.status, str(refused))
        if decision is None:
            return await self.app(scope, _replay(messages, receive), send)
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        replay = _replay([{"type": "http.request", "body": body, "more_body": False}], receive)
        began, first, status = time.perf_counter(), None, 0

        async def watched(message):
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
                told = [(b"x-fastsae-arm", decision.reason.encode())]
                told.append((b"x-fastsae-digest", decision.entry.policy.digest.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *told]}
            if first is None and message.get("body"):
                first = time.perf_counter() - began
            await send(message)

        try:
            await self.app({**scope, "headers": headers}, replay, watched)
        finally:  # status 0: no answer began
            seconds = time.perf_counter() - began
            self.metrics.done(decision, status, first, seconds)
            self.audit.record(
                request=request,
                route=scope["path"],
                **described(decision),
                status=status,
                seconds=round(seconds, 4),
            )

    async def _take(self, scope, body: bytes, request: str) -> tuple[bytes, Decision | None]:
        """The body with the wish where the engine finds it; None: no policy is named."""
        if b"steering=" in scope.get("query_string", b""):
            raise Refused(400, f"{FIELD}: belongs into the body, as a JSON object")
        try:
            fields = json.loads(body, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            return self._no_json(scope, body)
        if not isinstance(fields, dict):
            return body, None  # vLLM's own answer
        hidden = _hidden(fields)
        if hidden is not None:
            raise Refused(400, f'{hidden}: ask with the body field "{FIELD}"')
        given = fields.pop(FIELD, None)
        if given is None:
            return body, None
        path = _path(scope)
        if path not in self.routes:
            routes = ", ".join(self.routes)
            raise Refused(400, f"{FIELD}: {path} cannot be steered; those that can are {routes}")
        if fields.get("use_beam_search"):
            raise Refused(400, f"{FIELD}: beam search cannot be steered")
        extra = fields.get("vllm_xargs")
        if extra is not None and not isinstance(extra, dict):
            raise Refused(400, "vllm_xargs: expected an object")
        try:
            if isinstance(given, str):
                raise FastsaeError(f"{FIELD}: expected an object, got a text")
            wish = Wish.of(given, self.settings.max_strength)
        except FastsaeError as error:
            raise Refused(400, str(error)) from error
        entry = await self._must_exist(wish)
        decision = decide(entry, wish.strength, _unit(fields) or request, self.guard)
        self.metrics.guard.set(self.guard.exceeded())
        if decision.steered:
            found = wish._replace(policy=entry.policy.label, digest=entry.policy.digest)
            fields["vllm_xargs"] = {**(extra or {}), KEY: found.to_json()}
        return json.dumps(fields).encode(), decision

    def _no_json(self, scope, body: bytes) -> tuple[bytes, None]:
        """A form that names steering would come out unsteered; the rest is vLLM's to answer."""
        kind = dict(scope["headers"]).get(b"content-type", b"").lower()
        if b"form" in kind and (FORM.search(body) or b'"fastsae"' in body):
            raise Refused(400, f"{FIELD}: forms cannot be steered, only JSON bodies")
        return body, None

    async def _watched(self) -> None:
        """Before a scrape, at most once a second: what the workers added up on their device."""
        now = time.monotonic()
        if not self.settings.watch or now < self._scraped + TRUSTED_SECONDS:
            return
        self._scraped = now
        # A dead or busy engine must not hide the other metrics: they are shown with older numbers.
        with contextlib.suppress(EngineGone, TimeoutError):
            async with asyncio.timeout(SCRAPE_SECONDS):
                answer = await ask_engine(self.state, {"do": "watch"})
                self.metrics.show(answer.get("watched", {}))

    async def _must_exist(self, wish: Wish) -> Known:
        """What the engine says of the policy; asked again when the answer is old or has no such."""
        known, until = getattr(self.state, "fastsae_known", ({}, 0.0))
        if wish.policy in known and time.monotonic() < until:
            return known[wish.policy]
        try:
            status = await ask_engine(self.state, {"do": "status"})
        except EngineGone as gone:
            raise Refused(503, f"{FIELD}: {gone}") from gone
        if not status.get("armed"):
            raise Refused(503, f"{FIELD}: the engine is not armed")
        # In the order of loading: a name alone is the version loaded last.
        entries = [_known(each, status["sites"]) for each in status["policies"]]
        known = {entry.policy.name: entry for entry in entries}
        known |= {entry.policy.label: entry for entry in entries}
        self.state.fastsae_known = (known, time.monotonic() + TRUSTED_SECONDS)
        if wish.policy not in known:
            labels = ", ".join(sorted(entry.policy.label for entry in entries)) or "none"
            raise Refused(
                400, f"steering.policy: there is no policy {wish.policy!r}; loaded are {labels}"
            )
        return known[wish.policy]


def _path(scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")


def _known(told: dict, sites: list[dict]) -> Known:
    head = Head(told["policy"], told["name"], told["digest"], told["required"])
    return Known(head, sites[told["site"]]["layer"], told["holdout"])


def _mentions_steering(scope, body: bytes) -> bool:
    """Whether the body may name the field: spelled out, escaped (\\u0073teering), or in UTF-16."""
    seen = b'"steering"' in body or b'"fastsae"' in body or b"\\u" in body or b"\0" in body
    return seen or b"steering=" in scope.get("query_string", b"") or bool(FORM.search(body))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if sum(name == FIELD for name, _ in pairs) > 1:
        raise Refused(400, f"{FIELD}: given twice")
    return dict(pairs)


def _hidden(fields: dict, where: str = "") -> str | None:
    """The place of a wish where it would be ignored, or would get round this middleware."""
    for name in CARRIERS:
        inner = fields.get(name)
        if isinstance(inner, dict):
            for key in (KEY, FIELD):
                if key in inner:
                    return f"{where}{name}.{key}"
            deeper = _hidden(inner, f"{where}{name}.")
            if deeper is not None:
                return deeper
    return None


def _unit(fields: dict) -> str | None:
    """Who is on one side of an experiment for good: the body's user, in each API's own field."""
    metadata = fields.get("metadata")
    anthropic = metadata.get("user_id") if isinstance(metadata, dict) else None
    user = fields.get("user") or anthropic
    return user if isinstance(user, str) else None


async def _read(receive) -> tuple[list[dict], bytes]:
    messages, parts = [], []
    while True:
        message = await receive()
        messages.append(message)
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(parts)


def _replay(messages: list[dict], receive):
    waiting = list(messages)

    async def replay():
        return waiting.pop(0) if waiting else await receive()

    return replay


async def _answer(send, status: int, message: str) -> None:
    """As vLLM's own errors look."""
    kind = "BadRequestError" if status == 400 else "ServiceUnavailableError"
    error = {"message": message, "type": kind, "param": FIELD, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
