"""The HTTP side of the server: OpenAI's shapes, refusals by name, limits, what is written down."""

import asyncio
import json

import pytest

ASK = {"prompt": "Say: ", "max_tokens": 50}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
SHOUT = {"steering": {"policy": "shout@1"}}
ADMIN = {"authorization": "Bearer root"}


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_completion_and_chat(serving, run):
    async def go():
        async with serving() as (client, _):
            plain = (await client.post("/v1/completions", json=ASK)).json()
            steered = (await client.post("/v1/chat/completions", json=CHAT | SHOUT)).json()
            return plain, steered

    plain, steered = run(go())
    assert plain["object"] == "text_completion" and plain["model"] == "m"
    assert plain["choices"] == [
        {"index": 0, "finish_reason": "stop", "logprobs": None, "text": "hello world"}
    ]
    assert plain["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert plain["steering"]["policy"] is None and not plain["steering"]["steered"]
    assert steered["object"] == "chat.completion"
    message = steered["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "HELLO WORLD"}
    assert steered["usage"]["prompt_tokens"] == len("<user>Hi<assistant>")
    said = steered["steering"]
    assert (said["policy"], said["strength"], said["steered"]) == ("shout@1", 1.0, True)
    assert len(said["digest"]) == 64


@pytest.mark.parametrize("route, body", [("completions", ASK), ("chat/completions", CHAT)])
def test_streams_say_the_same_as_whole_answers(serving, run, route, body):
    async def go():
        async with serving() as (client, _):
            options = {"stream": True, "stream_options": {"include_usage": True}}
            answer = await client.post(f"/v1/{route}", json=body | SHOUT | options)
            whole = await client.post(f"/v1/{route}", json=body | SHOUT)
            return events(answer.text), whole.json()

    chunks, whole = run(go())
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    texts = [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
    assert "".join(texts) == "HELLO WORLD" and len(texts) > 5
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert chunks[0]["steering"] == whole["steering"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_requests_are_answered_when_no_audit_line_can_be_written(serving, run, logged):
    async def go():
        async with serving() as (client, app):
            app.state.server.audit._file.close()
            app.state.server.audit._file = open("/dev/full", "ab", buffering=0)
            app.state.server.audit._path = None
            answers = [await client.post("/v1/completions", json=ASK) for _ in range(3)]
            return answers, (await client.get("/metrics")).text

    answers, metrics = run(go())
    assert [a.status_code for a in answers] == [200] * 3
    assert answers[0].json()["choices"][0]["text"] == "hello world"
    assert "fastsae_audit_lost_lines_total 3.0" in metrics
    assert len(logged) == 1 and logged[0].startswith("audit: cannot write")


NUMBERS = {
    "policy": "shout@1", "tokens": 4, "not_finite": 1, "gate": {"opened": 3, "closed": 1},
    "features": {1: {"sum": 6.0, "max": 2.5}}, "left_out": [], "dose": {"sum": 1.0, "max": 0.5},
}  # fmt: skip


def test_metrics_of_loaded_policies_and_of_no_others(serving, engine, store, run):
    digest = store.get("shout").policy.digest
    engine.numbers = {(12, digest): NUMBERS, (12, "0" * 64): NUMBERS, (3, digest): NUMBERS}

    async def go():
        async with serving() as (client, _):
            first = (await client.get("/metrics")).text
            engine.observe(0.003)
            other = {"op": "add", "features": [5], "strength": 1.0}
            put = {"name": "shout", "version": "1", "operations": [other]}
            await client.put("/fastsae/policies", json=put, headers=ADMIN)
            replaced = (await client.get("/metrics")).text
            await client.delete("/fastsae/policies/shout@1", headers=ADMIN)
            return first, replaced

    first, replaced = run(go())
    of = 'layer="12",policy="shout@1"'
    for line in (
        f"fastsae_watched_tokens_total{{{of}}} 4.0",
        f"fastsae_not_finite_tokens_total{{{of}}} 1.0",
        f'fastsae_gate_tokens_total{{gate="opened",{of}}} 3.0',
        f'fastsae_gate_tokens_total{{gate="closed",{of}}} 1.0',
        f'fastsae_feature_mean{{feature="1",{of}}} 1.5',
        f'fastsae_feature_max{{feature="1",{of}}} 2.5',
        f"fastsae_dose_mean{{{of}}} 0.25",
        f"fastsae_dose_max{{{of}}} 0.5",
        "fastsae_audit_lost_lines_total 0.0",
        "fastsae_steering_seconds_count 0.0",
    ):
        assert line in first.splitlines()
    assert first.count("fastsae_dose_max{") == 1
    assert "shout" not in replaced and 'le="0.005"} 1.0' in replaced
    assert [entry.policy.digest == digest for entry in engine.forgotten] == [True, False]


def test_several_prompts_and_tokens_as_prompts(serving, engine, run):
    async def go():
        async with serving() as (client, _):
            body = ASK | {"prompt": [[65, 66], [67]], "seed": 5}
            return (await client.post("/v1/completions", json=body)).json()

    answer = run(go())
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert [job.tokens for job in engine.seen] == [(65, 66), (67,)]
    assert [job.sampling.seed for job in engine.seen] == [5, 6]


@pytest.mark.parametrize(
    "stop, text", [("o", "hell"), (["wor", "lo w"], "hel"), ("world!", "hello world"), ("h", "")]
)
def test_stop_strings_end_the_text_before_them(serving, engine, run, stop, text):
    async def go():
        async with serving() as (client, _):
            whole = (await client.post("/v1/completions", json=ASK | {"stop": stop})).json()
            body = ASK | {"stop": stop, "stream": True}
            return whole, events((await client.post("/v1/completions", json=body)).text)

    whole, chunks = run(go())
    assert whole["choices"][0]["text"] == text
    assert "".join(c["choices"][0]["text"] for c in chunks) == text
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert len(engine.cancelled) == (0 if text == "hello world" else 2)


def test_max_tokens_end_with_length(serving, run):
    async def go():
        async with serving() as (client, _):
            return (await client.post("/v1/completions", json=ASK | {"max_tokens": 4})).json()

    answer = run(go())
    assert answer["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "finish_reason": "length",
        "logprobs": None,
        "text": "hell",
    }


@pytest.mark.parametrize(
    "change, status, param",
    [
        ({"steering": {"policy": "nobody"}}, 400, "steering.policy"),
        ({"steering": {"policy": "shout@2"}}, 400, "steering.policy"),
        ({"steering": {"policy": "shout", "strengt": 2}}, 400, "steering.strengt"),
        ({"steering": {"policy": "shout", "strength": "2"}}, 400, "steering.strength"),
        ({"steering": "shout"}, 400, "steering"),
        ({"stering": {"policy": "shout"}}, 400, "stering"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"steering": {"policy": "shout", "strength": 1e38}}, 400, "steering.strength"),
        ({"prompt": "x" * 390}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"stop": ["a", ""]}, 400, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, None),
        ({"model": "another"}, 404, "model"),
    ],
)
def test_refusals_name_the_field(serving, engine, run, change, status, param):
    async def go():
        async with serving() as (client, _):
            return await client.post("/v1/completions", json=ASK | change)

    answer = run(go())
    error = answer.json()["error"]
    assert answer.status_code == status and error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "") and error["message"]
    assert engine.seen == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"prompt": {}}'])
def test_malformed_bodies(serving, run, body):
    async def go():
        async with serving() as (client, _):
            return await client.post("/v1/completions", content=body)

    assert run(go()).status_code == 400


def test_what_clients_send_unasked_is_accepted(serving, run):
    async def go():
        async with serving() as (client, _):
            body = CHAT | {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "user": "u"}
            body |= {"logprobs": False, "tools": [], "response_format": {"type": "text"}}
            return await client.post("/v1/chat/completions", json=body | {"model": "m"})

    assert run(go()).status_code == 200


def test_keys(serving, run):
    async def go():
        async with serving(keys=("one", "two")) as (client, _):
            seen = []
            for key in (None, "three", "one", "two", "root"):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await client.post("/v1/completions", json=ASK, headers=headers)
                admin = await client.get("/fastsae/policies", headers=headers)
                seen.append((answer.status_code, admin.status_code))
            return seen

    assert run(go()) == [(401, 401), (401, 401), (200, 401), (200, 401), (401, 200)]


def test_without_admin_keys_the_routes_are_closed(serving, run):
    async def go():
        async with serving(admin_keys=()) as (client, _):
            return await client.get("/fastsae/status", headers=ADMIN)

    assert run(go()).status_code == 403


def test_limits(serving, engine, run):
    engine.beat = 0.01

    async def go():
        async with serving(max_body=300, max_running=2) as (client, app):
            large = await client.post("/v1/completions", json=ASK | {"prompt": "x" * 400})
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=ASK) for _ in range(5))
            )
            many = await client.post("/v1/completions", json=ASK | {"prompt": ["a", "b", "c"]})
            after = await client.post("/v1/completions", json=ASK)
            return large, answers, many, after, app.state.server.running

    large, answers, many, after, running = run(go())
    assert large.status_code == 413
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429]
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.headers["retry-after"] and refused.json()["error"]["type"] == "rate_limit_error"
    assert many.status_code == 429 and after.status_code == 200 and running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_cancels(serving, engine, run, stream):
    engine.beat = 0.05

    async def go():
        async with serving(timeout=0.12) as (client, app):
            answer = await client.post("/v1/completions", json=ASK | {"stream": stream})
            return answer, app.state.server.running

    answer, running = run(go())
    assert "timeout" in answer.text and running == 0 and len(engine.cancelled) == 1
    assert answer.status_code == (200 if stream else 504)
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_said_so(serving, engine, run, stream):
    engine.fail = 3

    async def go():
        async with serving() as (client, app):
            answer = await client.post("/v1/completions", json=ASK | {"stream": stream})
            return answer, app.state.server.running

    answer, running = run(go())
    assert "the model broke" in answer.text and running == 0
    assert answer.status_code == (200 if stream else 500)


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_ends_the_request_too(serving, engine, run, stream, monkeypatch):
    async def broken(job):
        raise KeyError("surprise")
        yield

    monkeypatch.setattr(engine, "run", broken)

    async def go():
        async with serving() as (client, app):
            body = ASK | {"stream": stream}
            answer = await asyncio.wait_for(client.post("/v1/completions", json=body), 5)
            return answer, app.state.server.running

    answer, running = run(go())
    assert "internal error" in answer.text and "surprise" not in answer.text and running == 0


def test_audit_lines_and_metrics(serving, tmp_path, engine, run):
    async def go():
        async with serving(with_text=True) as (client, _):
            await client.post("/v1/completions", json=ASK | SHOUT)
            await client.post("/v1/completions", json=ASK | {"steering": {"policy": "none"}})
            engine.fail = 0
            await client.post("/v1/completions", json=ASK)
            return (await client.get("/metrics")).text

    text = run(go())
    steered, failed = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert steered["policy"] == "shout@1" and steered["steered"] and steered["layer"] == 12
    assert (steered["outcome"], steered["generated_tokens"]) == ("stop", 12)
    assert (steered["prompt"], steered["text"]) == ("Say: ", "HELLO WORLD")
    assert (failed["outcome"], failed["policy"], failed["reason"]) == ("failed", None, "none")
    for line in (
        'fastsae_requests_total{arm="steered",outcome="stop",policy="shout@1"} 1.0',
        'fastsae_requests_total{arm="none",outcome="failed",policy=""} 1.0',
        'fastsae_generated_tokens_total{arm="steered",policy="shout@1"} 12.0',
        'fastsae_refused_requests_total{status="400"} 1.0',
        "fastsae_running_requests 0.0",
    ):
        assert line in text, line
    assert 'time_to_first_token_seconds_count{arm="steered",policy="shout@1"} 1.0' in text


def test_audit_without_text(serving, tmp_path, run):
    async def go():
        async with serving() as (client, _):
            await client.post("/v1/completions", json=ASK | SHOUT)

    run(go())
    line = (tmp_path / "audit.jsonl").read_text()
    assert "Say" not in line and "HELLO" not in line


def test_a_reader_who_leaves_cancels(serving, engine, run, hang_up):
    engine.beat = 0.02

    async def go():
        async with serving() as (_, app):
            for stream in (False, True):
                await hang_up(app, ASK | {"stream": stream}, 0.06)
            return app.state.server.running

    assert run(go()) == 0
    assert len(engine.cancelled) == 2
