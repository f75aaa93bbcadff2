"""The ASGI middleware against an application that records what reaches it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from fastsae.steering.table import Capacity
from fastsae.steering.vllm.middleware import SteeringMiddleware
from fastsae.steering.vllm.settings import Settings

ENTRY = {"policy": "a@1", "name": "a", "digest": "ab12", "site": 0}
STATUS = {"armed": True, "policies": [ENTRY], "sites": [{"layer": 7}]}


class Client:
    def __init__(self, status=STATUS):
        self.status, self.asked = status, 0

    async def collective_rpc(self, method, args):
        assert method == "fastsae" and json.loads(args[0]) == {"do": "status"}
        self.asked += 1
        return [json.dumps(self.status)]


def post(body: bytes, *, path="/v1/completions", client=None, pieces=1, audit=None):
    """(status or None, body the application saw, content-length it saw, the client)."""
    seen, sent = {}, []

    async def application(scope, receive, send):
        parts = []
        while True:
            message = await receive()
            parts.append(message["body"])
            if not message.get("more_body"):
                break
        seen["body"] = b"".join(parts)
        seen["length"] = dict(scope["headers"]).get(b"content-length")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    size = max(1, -(-len(body) // pieces))
    chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    ]

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    client = client or Client()
    state = SimpleNamespace(engine_client=client)
    settings = Settings((), Capacity(), 0, False, 10.0, None, audit)
    headers = [(b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(SteeringMiddleware(application, settings, state)(scope, receive, send))
    return SimpleNamespace(
        status=sent[0]["status"],
        error=sent[-1].get("body", b"").decode(),
        body=seen.get("body"),
        length=seen.get("length"),
        client=client,
    )


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"prompt": "steering"}', b'{"a": "\\u00e9"}', b'{"steering": null}', b"[]"],
)
def test_other_bodies_pass_as_they_came(body, pieces):
    seen = post(body, pieces=pieces)
    assert seen.status == 200 and seen.body == body and seen.client.asked == 0


@pytest.mark.parametrize("key", ["steering", "\\u0073teering"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_field_becomes_an_extra_arg(key, pieces):
    body = f'{{"prompt": "x", "{key}": {{"policy": "a"}}, "vllm_xargs": {{"other": 1}}}}'
    seen = post(body.encode(), pieces=pieces)
    assert seen.status == 200 and int(seen.length) == len(seen.body)
    fields = json.loads(seen.body)
    wish = json.loads(fields["vllm_xargs"].pop("fastsae"))
    assert wish == {"policy": "a", "strength": 1.0}
    assert fields == {"prompt": "x", "vllm_xargs": {"other": 1}}


@pytest.mark.parametrize(
    "fields, path",
    [
        ({"steering": {"policy": "b"}}, "/v1/completions"),
        ({"steering": "a"}, "/v1/completions"),
        ({"steering": '{"policy": "a"}'}, "/v1/completions"),
        ({"steering": {"policy": "a"}}, "/v1/embeddings"),
        ({"steering": {"policy": "a"}, "use_beam_search": True}, "/v1/completions"),
        ({"steering": {"policy": "a"}, "vllm_xargs": 3}, "/v1/completions"),
        ({"vllm_xargs": {"fastsae": '{"policy": "a"}'}}, "/v1/completions"),
    ],
)
def test_what_cannot_be_steered_never_reaches_the_application(fields, path):
    seen = post(json.dumps(fields).encode(), path=path)
    assert seen.status == 400 and seen.body is None
    assert json.loads(seen.error)["error"]["code"] == 400


@pytest.mark.parametrize("status", [{"armed": False, "policies": []}, {"error": "no settings"}])
def test_an_engine_that_is_not_armed_is_a_503(status):
    seen = post(b'{"steering": {"policy": "a"}}', client=Client(status))
    assert seen.status == 503 and seen.body is None


def test_every_steered_request_is_counted_and_recorded(tmp_path):
    from prometheus_client import REGISTRY

    def counted():
        labels = {"policy": "a@1", "status": "200"}
        return REGISTRY.get_sample_value("fastsae_requests_total", labels) or 0

    before, log = counted(), tmp_path / "audit.jsonl"
    body = b'{"prompt": "a secret", "steering": {"policy": "a", "strength": 2}}'
    post(body, audit=str(log))
    post(b'{"prompt": "x"}', audit=str(log))
    post(body, audit=str(log))
    assert counted() == before + 2
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 2 and "secret" not in log.read_text()
    wanted = {"policy": "a@1", "digest": "ab12", "layer": 7, "strength": 2.0, "status": 200}
    assert wanted.items() <= lines[0].items()
    assert lines[0]["request"] != lines[1]["request"]
