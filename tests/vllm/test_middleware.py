"""The ASGI middleware against an application that records what reaches it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from fastsae.steering.control import LatencyGuard
from fastsae.steering.table import Capacity
from fastsae.steering.vllm.metrics import Metrics
from fastsae.steering.vllm.middleware import SteeringMiddleware
from fastsae.steering.vllm.settings import Settings

ROUTES = ("/v1/completions", "/v1/chat/completions")


def status(**more):
    entry = {"policy": "a@1", "name": "a", "digest": "ab12", "site": 0}
    entry |= {"required": False, "holdout": 0.0}
    return {"armed": True, "policies": [entry | more], "sites": [{"layer": 7}]}


class Client:
    def __init__(self, status=None, dies=False):
        self.status, self.asked, self.dies, self.errored = status or ANSWER, 0, dies, False

    async def collective_rpc(self, method, args):
        assert method == "fastsae" and json.loads(args[0])["do"] in ("status", "watch")
        self.asked += 1
        if self.dies:  # as vLLM's own call to a dead engine: nobody ever answers
            self.errored = True
            await asyncio.Future()
        return [json.dumps(self.status)]


ANSWER = status()


class Slow(LatencyGuard):
    def exceeded(self):
        return True


def post(
    body: bytes,
    *,
    path="/v1/completions",
    client=None,
    pieces=1,
    audit=None,
    kind=b"application/json",
    query=b"",
    guard=None,
):
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
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", kind)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    scope["query_string"] = query
    middleware = SteeringMiddleware(
        application, settings, state, ROUTES, guard or LatencyGuard(None)
    )
    asyncio.run(middleware(scope, receive, send))
    return SimpleNamespace(
        status=sent[0]["status"],
        headers=dict(sent[0]["headers"]),
        error=sent[-1].get("body", b"").decode(),
        body=seen.get("body"),
        length=seen.get("length"),
        client=client,
    )


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "steering"}',
        b'{"prompt": "name=steering&steering=1"}',
        b'{"a": "\\u00e9"}',
        b'{"steering": null}',
        b"[]",
        b"\0\xff",
    ],
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
    assert wish == {"policy": "a@1", "strength": 1.0, "digest": "ab12"}
    assert fields == {"prompt": "x", "vllm_xargs": {"other": 1}}
    assert seen.headers[b"x-fastsae-arm"] == b"steered"


def test_a_field_in_utf_16_is_found():
    body = '{"prompt": "é", "steering": {"policy": "a"}}'.encode("utf-16")
    assert "fastsae" in json.loads(post(body).body)["vllm_xargs"]


def held_out(user, client, **more):
    body = json.dumps({"prompt": "x", "steering": {"policy": "a"}} | user | more)
    seen = post(body.encode(), client=client)
    wished = "vllm_xargs" in json.loads(seen.body)
    assert seen.headers[b"x-fastsae-arm"] == (b"steered" if wished else b"holdout")
    assert "steering" not in json.loads(seen.body)
    return not wished


@pytest.mark.parametrize("field", [lambda u: {"user": u}, lambda u: {"metadata": {"user_id": u}}])
def test_a_share_of_users_is_held_out_and_stays_on_its_side(field):
    client = Client(status(holdout=0.25))
    sides = [held_out(field(f"user {i}"), client) for i in range(200)]
    assert sides == [held_out(field(f"user {i}"), client, more=1) for i in range(200)]
    assert 30 <= sum(sides) <= 70


def test_a_slow_server_drops_optional_policies_and_never_required_ones(tmp_path):
    body = b'{"prompt": "x", "steering": {"policy": "a", "strength": 2}}'
    guard, log = Slow(1.0), tmp_path / "audit.jsonl"
    dropped = post(body, guard=guard, audit=str(log))
    assert json.loads(dropped.body) == {"prompt": "x"}
    assert dropped.headers[b"x-fastsae-arm"] == b"latency"
    kept = post(body, guard=guard, client=Client(status(required=True)), audit=str(log))
    assert "fastsae" in json.loads(kept.body)["vllm_xargs"]
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert (first["steered"], first["reason"]) == (False, "latency")
    assert (second["steered"], second["reason"], second["strength"]) == (True, "steered", 2.0)


def test_strength_0_is_no_steering():
    seen = post(b'{"prompt": "x", "steering": {"policy": "a", "strength": 0}}')
    assert json.loads(seen.body) == {"prompt": "x"}
    assert seen.headers[b"x-fastsae-arm"] == b"strength 0"


@pytest.mark.parametrize(
    "fields, path",
    [
        ({"steering": {"policy": "b"}}, "/v1/completions"),
        ({"steering": "a"}, "/v1/completions"),
        ({"steering": '{"policy": "a"}'}, "/v1/completions"),
        ({"steering": {"policy": "a"}}, "/v1/embeddings"),
        ({"steering": {"policy": "a"}}, "/tokenize"),
        ({"steering": {"policy": "a"}}, "/v1/chat/completions/batch"),
        ({"steering": {"policy": "a"}}, "/v1/completions/render"),
        ({"steering": {"policy": "a"}, "use_beam_search": True}, "/v1/completions"),
        ({"steering": {"policy": "a"}, "vllm_xargs": 3}, "/v1/completions"),
        ({"vllm_xargs": {"fastsae": '{"policy": "a"}'}}, "/v1/completions"),
        ({"vllm_xargs": {"steering": '{"policy": "a"}'}}, "/v1/completions"),
        ({"extra_body": {"steering": {"policy": "a"}}}, "/v1/completions"),
        ({"sampling_params": {"extra_args": {"fastsae": "{}"}}}, "/inference/v1/generate"),
    ],
)
def test_what_cannot_be_steered_never_reaches_the_application(fields, path):
    seen = post(json.dumps(fields).encode(), path=path)
    assert seen.status == 400 and seen.body is None
    assert json.loads(seen.error)["error"]["code"] == 400


@pytest.mark.parametrize(
    "kind, body",
    [
        (b"multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data; %s\r\n"),
        (b"application/x-www-form-urlencoded", b"prompt=x&%s1"),
    ],
)
def test_forms_that_name_steering_are_refused(kind, body):
    name = b"steering=" if b"url" in kind else b'name="steering"'
    assert post(body % name, kind=kind).status == 400
    assert post(body % name.replace(b"steering", b"other"), kind=kind).status == 200


def test_a_field_given_twice_or_in_the_query_is_refused():
    assert post(b'{"steering": {"policy": "a"}, "steering": null}').status == 400
    assert post(b'{"prompt": "x"}', query=b"steering=a").status == 400


@pytest.mark.parametrize("answer", [{"armed": False, "policies": []}, {"error": "no settings"}])
def test_an_engine_that_is_not_armed_is_a_503(answer):
    seen = post(b'{"steering": {"policy": "a"}}', client=Client(answer))
    assert seen.status == 503 and seen.body is None


def test_an_engine_that_dies_before_it_answers_is_a_503():
    seen = post(b'{"steering": {"policy": "a"}}', client=Client(dies=True))
    assert seen.status == 503 and "died" in seen.error


def test_every_steered_request_is_counted_and_recorded(tmp_path):
    from prometheus_client import REGISTRY

    def counted():
        labels = {"policy": "a@1", "arm": "steered", "status": "200"}
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
    wanted |= {"steered": True, "reason": "steered"}
    assert wanted.items() <= lines[0].items()
    assert lines[0]["request"] != lines[1]["request"]


NUMBERS = {
    "policy": "a@1",
    "layer": 2,
    "tokens": 4,
    "not_finite": 1,
    "gate": {"opened": 3, "closed": 1},
    "features": {"7": {"sum": 6.0, "max": 2.5}},
    "left_out": [],
    "dose": {"sum": 2.0, "max": 0.75},
    "seconds": 0.25,
}


def test_a_scrape_shows_what_the_workers_added_up_until_the_policy_leaves():
    from prometheus_client import CollectorRegistry

    metrics = Metrics(registry := CollectorRegistry())
    metrics.show({"a@1": NUMBERS, "b": NUMBERS | {"gate": None, "seconds": None, "tokens": 0}})

    def value(name, **labels):
        return registry.get_sample_value(
            f"fastsae_{name}", {"policy": "a@1", "layer": "2"} | labels
        )

    assert value("watched_tokens_total") == 4 and value("not_finite_tokens_total") == 1
    assert value("gate_tokens_total", gate="opened") == 3
    assert value("gate_tokens_total", gate="closed") == 1
    assert value("feature_mean", feature="7") == 1.5 and value("feature_max", feature="7") == 2.5
    assert value("dose_mean") == 0.5 and value("dose_max") == 0.75
    assert value("policy_seconds_total") == 0.25
    assert value("policy_seconds_total", policy="b") is value("dose_max", policy="b") is None
    metrics.show({"b": NUMBERS})
    assert value("dose_max") is None and value("dose_max", policy="b") == 0.75


def test_scrapes_ask_the_engine_at_most_once_a_second_and_outlive_it():
    asked = []

    class Watched:
        errored = False

        async def collective_rpc(self, method, args):
            asked.append(json.loads(args[0]))
            return [json.dumps({"watched": {"a@1": NUMBERS}})]

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def scrapes(client, times):
        settings = Settings((), Capacity(), 0, False, 10.0, None, None)
        state = SimpleNamespace(engine_client=client)
        middleware = SteeringMiddleware(application, settings, state, ROUTES, LatencyGuard(None))
        sent = []

        async def send(message):
            sent.append(message["status"])

        scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": []}
        for _ in range(times):
            await middleware(scope, None, send)
        return sent

    assert asyncio.run(scrapes(Watched(), 5)) == [200] * 5 and asked == [{"do": "watch"}]
    assert asyncio.run(scrapes(Client(dies=True), 1)) == [200]
    assert asyncio.run(scrapes(None, 1)) == [200]
