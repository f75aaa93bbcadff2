"""The body field "steering" of vLLM's HTTP server: checked here, then handed on as an extra arg.

vLLM accepts and ignores fields it does not know: without this, a client could believe it steers.
"""

import json
import time
import uuid

from fastsae.errors import FastsaeError
from fastsae.steering.vllm.requests import Wish
from fastsae.steering.vllm.settings import KEY, Settings

FIELD = "steering"
ROUTES = ("/v1/chat/completions", "/v1/completions")
TRUSTED_SECONDS = 1.0  # how long a list of policies is good: another server may have deleted one


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class SteeringMiddleware:
    """ASGI middleware, put into every server with fastsae settings.

    A body that does not mention steering passes as it came. Unknown policies, fields and routes
    that cannot be steered are a 400; an engine that does not answer as armed is a 503.
    """

    def __init__(self, app, settings: Settings, app_state):
        from fastsae.serve.audit import Audit
        from fastsae.steering.vllm.metrics import shared

        self.app, self.settings, self.state = app, settings, app_state
        self.audit, self.metrics = Audit(settings.audit), shared()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        messages, body = await _read(receive)
        # An escaped key ("\\u0073teering") is a key as well.
        if b'"steering"' not in body and b'"fastsae"' not in body and b"\\u" not in body:
            return await self.app(scope, _replay(messages, receive), send)
        try:
            body, wish, entry = await self._take(scope, body)
        except Refused as refused:
            return await _answer(send, refused.status, str(refused))
        if wish is None:
            return await self.app(scope, _replay(messages, receive), send)
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        scope = {**scope, "headers": headers}
        replay = _replay([{"type": "http.request", "body": body, "more_body": False}], receive)
        began, first, status = time.perf_counter(), None, 0

        async def watched(message):
            nonlocal status, first
            status = message.get("status", status)
            if first is None and message.get("body"):
                first = time.perf_counter() - began
            await send(message)

        try:
            await self.app(scope, replay, watched)
        finally:  # status 0: no answer began
            seconds = time.perf_counter() - began
            self.metrics.done(entry["policy"], status, first, seconds)
            named = dict(scope["headers"]).get(b"x-request-id", b"").decode(errors="replace")
            self.audit.record(
                request=named or uuid.uuid4().hex,
                route=scope["path"],
                policy=entry["policy"],
                digest=entry["digest"],
                layer=entry["layer"],
                strength=wish.strength,
                status=status,
                seconds=round(seconds, 4),
            )

    async def _take(self, scope, body: bytes) -> tuple[bytes, Wish | None, dict]:
        """The body with the wish moved to where the engine finds it; None: nothing to do."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return body, None, {}  # vLLM's own answer to what is not JSON
        if not isinstance(fields, dict):
            return body, None, {}
        extra = fields.get("vllm_xargs")
        if isinstance(extra, dict) and KEY in extra:
            raise Refused(400, f'vllm_xargs.{KEY}: ask with the body field "{FIELD}"')
        if FIELD not in fields:
            return body, None, {}
        given = fields.pop(FIELD)
        if given is None:
            return body, None, {}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in ROUTES:
            raise Refused(400, f"{FIELD}: {path} cannot be steered, only {' and '.join(ROUTES)}")
        if fields.get("use_beam_search"):
            raise Refused(400, f"{FIELD}: beam search cannot be steered")
        if extra is not None and not isinstance(extra, dict):
            raise Refused(400, "vllm_xargs: expected an object")
        try:
            wish = Wish.of(given, self.settings.max_strength)
            if isinstance(given, str):
                raise FastsaeError(f"{FIELD}: expected an object, got a text")
        except FastsaeError as error:
            raise Refused(400, str(error)) from error
        entry = await self._must_exist(wish)
        fields["vllm_xargs"] = {**(extra or {}), KEY: wish.to_json()}
        return json.dumps(fields).encode(), wish, entry

    async def _must_exist(self, wish: Wish) -> dict:
        """What the engine says of the policy; asked again when the answer is old or has no such."""
        known, until = getattr(self.state, "fastsae_known", ({}, 0.0))
        if wish.policy in known and time.monotonic() < until:
            return known[wish.policy]
        status = await ask_engine(self.state, {"do": "status"})
        if not status.get("armed"):
            raise Refused(503, "steering: the engine is not armed")
        entries = [e | {"layer": status["sites"][e["site"]]["layer"]} for e in status["policies"]]
        # In the order of loading: a name alone is the version loaded last.
        known = {entry["name"]: entry for entry in entries}
        known |= {entry["policy"]: entry for entry in entries}
        self.state.fastsae_known = (known, time.monotonic() + TRUSTED_SECONDS)
        if wish.policy not in known:
            labels = ", ".join(sorted(entry["policy"] for entry in entries)) or "none"
            raise Refused(
                400, f"steering.policy: there is no policy {wish.policy!r}; loaded are {labels}"
            )
        return known[wish.policy]


async def ask_engine(state, asked: dict) -> dict:
    """A command to the engine's process through vLLM's own collective_rpc."""
    client = getattr(state, "engine_client", None)
    if client is None:
        return {"error": "there is no engine"}
    (answer,) = await client.collective_rpc(KEY, args=(json.dumps(asked),))
    return json.loads(answer)


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
