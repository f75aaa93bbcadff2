"""A real server over HTTP: the steering field, admin routes, metrics and the audit log."""

import concurrent.futures
import importlib.util
import json
import time
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("client", Path(__file__).with_name("client.py"))
client = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(client)
call, completion, tokens_of = client.call, client.completion, client.tokens_of
stream, wait_until_idle = client.stream, client.wait_until_idle
KEY, UNSTEERED = client.KEY, client.UNSTEERED


@pytest.fixture(scope="module")
def server(start):
    with start() as server:
        yield server


def test_the_steering_field_steers_as_the_hugging_face_adapter(server, crowd, expected):
    for request in [crowd[0], crowd[7], crowd[30]]:
        answer = call(f"{server.url}/v1/completions", completion(server, request))
        assert tokens_of(answer) == expected(request)


def test_streams_are_steered(server, crowd, expected):
    request = crowd[1]
    body = completion(server, request, stream=True)
    answer = call(f"{server.url}/v1/completions", body)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line[6:7] == "{"]
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"] or ()]
    assert tokens == expected(request)


def test_chats_are_steered(server):
    def ask(**more):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}]}
        body |= {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return tokens_of(call(f"{server.url}/v1/chat/completions", body | more))

    plain = ask()
    assert ask(steering={"policy": "p1"}) != plain
    assert ask(steering={"policy": "p1", "strength": 0}) == plain == ask(steering=None)


@pytest.mark.parametrize(
    "steering, says",
    [
        ({"policy": "nobody"}, "there is no policy 'nobody'; loaded are p0@1"),
        ({"policy": "p0@2"}, "there is no policy 'p0@2'"),
        ({}, "steering.policy"),
        ({"policy": 3}, "steering.policy"),
        ({"policy": "p0", "strength": "much"}, "steering.strength"),
        ({"policy": "p0", "strength": 1e9}, "this server allows"),
        ({"policy": "p0", "layer": 3}, "unknown key 'layer'"),
        ("p0", "steering"),
        ([], "steering"),
        (True, "steering"),
    ],
)
def test_a_wrong_field_is_a_400_that_says_so(server, steering, says):
    body = completion(server, UNSTEERED) | {"steering": steering}
    answer = call(f"{server.url}/v1/completions", body)
    assert answer.status == 400 and says in json.loads(answer.text)["error"]["message"]


def test_what_cannot_be_steered_is_a_400(server):
    steering = {"policy": "p0"}
    inside = completion(server, UNSTEERED) | {"vllm_xargs": {"fastsae": json.dumps(steering)}}
    assert call(f"{server.url}/v1/completions", inside).status == 400
    beams = completion(server, UNSTEERED | {"steering": steering}) | {"use_beam_search": True}
    assert call(f"{server.url}/v1/completions", beams).status == 400


def test_every_other_route_that_takes_a_body_refuses_the_field(server):
    """Whatever this vLLM serves: a route is steered, or says that it cannot be."""
    listed = json.loads(call(f"{server.url}/openapi.json").text)["paths"]
    routes = {path for path, methods in listed.items() if "post" in methods}
    steered = {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}
    assert steered < routes and {"/tokenize", "/v1/messages/count_tokens"} < routes
    body = {"model": "tiny", "prompt": "Hello", "input": "Hello", "steering": {"policy": "p0"}}
    for route in sorted(routes - steered):
        answer = call(f"{server.url}{route}", body)
        assert answer.status == 400 and "cannot be steered" in answer.text, route


def test_responses_and_messages_are_steered_as_chats(server):
    said = [{"role": "user", "content": "Hello there"}]
    shared = {"model": "tiny", "temperature": 0}

    def chat(**more):
        body = shared | {"messages": said, "max_tokens": 12, **more}
        answer = json.loads(call(f"{server.url}/v1/chat/completions", body).text)
        return answer["choices"][0]["message"]["content"]

    def response(**more):
        body = shared | {"input": said, "max_output_tokens": 12, **more}
        answer = call(f"{server.url}/v1/responses", body)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)["output"][-1]["content"][0]["text"]

    def message(**more):
        body = shared | {"messages": said, "max_tokens": 12, **more}
        answer = call(f"{server.url}/v1/messages", body)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)["content"][-1]["text"]

    steering = {"policy": "p1"}
    assert chat() == response() == message()
    assert chat() != chat(steering=steering) == response(steering=steering)
    assert chat(steering=steering) == message(steering=steering)


def test_admin_routes_need_their_own_key(server):
    for headers in ({}, {"X-Fastsae-Key": "wrong"}):
        assert call(f"{server.url}/fastsae/status", headers=headers).status == 403
        url = f"{server.url}/fastsae/policies"
        assert call(url, {"name": "x"}, method="POST", headers=headers).status == 403
        assert call(f"{url}/p0", method="DELETE", headers=headers).status == 403


def test_policies_are_loaded_replaced_and_deleted_while_serving(server, crowd):
    url = f"{server.url}/fastsae/policies"
    request = crowd[3] | {"steering": {"policy": "new"}}

    def generate():
        return call(f"{server.url}/v1/completions", completion(server, request))

    assert generate().status == 400
    policy = {"name": "new", "operations": [{"op": "add", "features": [3], "strength": 9.0}]}
    assert call(url, policy, method="POST", headers=KEY).status == 200
    added = tokens_of(generate())
    policy["operations"] = [{"op": "add", "features": [3], "strength": -9.0}]
    assert call(url, policy, method="POST", headers=KEY).status == 400
    assert call(url, policy, method="PUT", headers=KEY).status == 200
    assert tokens_of(generate()) != added
    bad = [b"{", b"[]", b'{"name": "x"}', b'{"name": "x", "name": "y"}', b"\x80\x04pickle"]
    assert [call(url, body, method="POST", headers=KEY).status for body in bad] == [400] * 5
    assert call(f"{url}/new", method="DELETE", headers=KEY).status == 200
    assert generate().status == 400


def added(strength):
    operation = {"op": "add", "features": [3], "strength": strength}
    return {"name": "changing", "operations": [operation]}


def test_a_running_request_keeps_the_policy_it_began_with(server, crowd):
    url = f"{server.url}/fastsae/policies"
    body = completion(server, crowd[3] | {"steering": {"policy": "changing"}, "tokens": 200})

    def generate():
        return tokens_of(call(f"{server.url}/v1/completions", body))

    assert call(url, added(9.0), method="POST", headers=KEY).status == 200
    before = generate()
    for change in ("PUT", "DELETE"):
        running = stream(server, body)
        tokens = next(running)
        if change == "PUT":
            assert call(url, added(-9.0), method="PUT", headers=KEY).status == 200
            after = generate()
            assert after != before
        else:
            assert call(f"{url}/changing", method="DELETE", headers=KEY).status == 200
            assert call(f"{server.url}/v1/completions", body).status == 400
        for more in running:
            tokens += more
        assert tokens == before
        before = after
    wait_until_idle(server)


def test_policies_that_come_and_go_never_give_a_500_or_a_wrong_policy(server, crowd):
    """Eight clients ask for a policy while it is replaced, deleted and loaded, without a pause."""
    url = f"{server.url}/fastsae/policies"
    body = completion(server, crowd[3] | {"steering": {"policy": "changing"}, "tokens": 6})
    known = []
    for strength in (9.0, -9.0):
        assert call(url, added(strength), method="PUT", headers=KEY).status == 200
        known.append(tokens_of(call(f"{server.url}/v1/completions", body)))
    assert known[0] != known[1]

    def ask(_):
        answer = call(f"{server.url}/v1/completions", body)
        if answer.status == 400:
            return "" if "there is no policy 'changing'" in answer.text else answer.text
        right = answer.status == 200 and tokens_of(answer) in known
        return "" if right else f"{answer.status} {answer.text}"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, i) for i in range(200)]
        changes = 0
        while not all(answer.done() for answer in answers):
            sign = 1 if changes % 2 else -1
            assert call(url, added(9.0 * sign), method="PUT", headers=KEY).status == 200
            if changes % 3 == 0:
                assert call(f"{url}/changing", method="DELETE", headers=KEY).status == 200
            changes += 1
    complaints = [answer.result() for answer in answers if answer.result()]
    assert not complaints and changes > 3, complaints[:5]
    call(f"{url}/changing", method="DELETE", headers=KEY)
    wait_until_idle(server)


def test_a_held_out_request_is_unsteered_and_counted_as_such(server, crowd, expected):
    url = f"{server.url}/fastsae/policies"
    policy = added(9.0) | {"name": "tried"}
    for wrong in ({"holdout": 2}, {"holdout": 0.5, "x": 1}):
        assert call(url, {"policy": policy, **wrong}, method="POST", headers=KEY).status == 400
    required = {"policy": policy | {"required": True}, "holdout": 0.5}
    assert "required" in call(url, required, method="POST", headers=KEY).text
    asked = {"policy": policy, "holdout": 0.5, "watch": [999]}
    assert "999" in call(url, asked, method="POST", headers=KEY).text
    asked["watch"] = [17]
    assert call(url, asked, method="POST", headers=KEY).status == 200
    plain = expected(crowd[3] | {"steering": None})
    request = crowd[3] | {"steering": {"policy": "tried"}}
    size, seen = len(server.audit.read_text().splitlines()), []
    for user in range(12):
        body = completion(server, request, user=f"user {user}")
        seen.append(tokens_of(call(f"{server.url}/v1/completions", body)) == plain)
    lines = [json.loads(line) for line in server.audit.read_text().splitlines()[size:]]
    assert [line["reason"] == "holdout" for line in lines] == seen
    assert [not line["steered"] for line in lines] == seen and 1 < sum(seen) < 11
    label = '{arm="holdout",policy="tried",status="200"}'
    metrics = call(f"{server.url}/metrics").text
    assert f"fastsae_requests_total{label} {float(sum(seen))}" in metrics
    watched = json.loads(call(f"{server.url}/fastsae/watched", headers=KEY).text)["watched"]
    assert set(watched["tried"]["features"]) == {"3", "17"} and watched["tried"]["tokens"] > 0
    assert call(f"{url}/tried", method="DELETE", headers=KEY).status == 200


def test_metrics_and_the_audit_log_tell_of_steered_requests_only(server, crowd):
    def counted():
        lines = call(f"{server.url}/metrics").text.splitlines()
        name = 'fastsae_requests_total{arm="steered",policy="p2@1",status="200"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before, size = counted(), len(server.audit.read_text().splitlines())
    call(f"{server.url}/v1/completions", completion(server, crowd[5]))
    before, size = counted(), len(server.audit.read_text().splitlines())
    time.sleep(1.1)  # metrics of the workers are at most a second old
    for request in (crowd[2], crowd[30]):
        call(f"{server.url}/v1/completions", completion(server, request))
    assert counted() == before + 1
    shown = call(f"{server.url}/metrics").text
    assert 'fastsae_dose_max{layer="2",policy="p2@1"}' in shown
    assert 'fastsae_feature_mean{feature="7",layer="2",policy="p2@1"}' in shown
    assert 'fastsae_gate_tokens_total{gate="closed",layer="2",policy="p5@1"}' in shown
    (line,) = server.audit.read_text().splitlines()[size:]
    recorded = json.loads(line)
    assert recorded["policy"] == "p2@1" and recorded["layer"] == 2 and recorded["status"] == 200
