"""The server over a real (tiny, random) model: every answer is what the model alone would write."""

import asyncio
import collections
import importlib.util
import os
import random
import threading
import time
from pathlib import Path

import httpx
import pytest

from fastsae import Policy, add
from fastsae.errors import FastsaeError
from fastsae.serve import seats
from fastsae.serve.app import create_app
from fastsae.serve.engine import Engine
from fastsae.serve.policies import Entry, PolicyStore
from fastsae.serve.sampling import Sampling
from fastsae.serve.seats import EngineError, EngineFull
from fastsae.serve.state import Settings

pytest.importorskip("transformers")
_spec = importlib.util.spec_from_file_location("examples", Path(__file__).with_name("examples.py"))
examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(examples)
engine, job, answer, policy = examples.engine, examples.job, examples.answer, examples.policy
POLICIES, PROMPTS, Numbers = examples.POLICIES, examples.PROMPTS, examples.Numbers
LAYER, NEW = examples.LAYER, examples.NEW
ONE = {"model_name": "tiny", "admin_keys": ("root",)}


def test_a_mixed_crowd_writes_what_each_writes_alone(engine, alone, run):
    """Forty requests with four policies, strengths and none, admitted while others run."""
    kinds = [None, *POLICIES]
    asked = [(PROMPTS[i % 4], kinds[i % 5], (1.0, 0.5)[i % 2], 3 + i % 7) for i in range(40)]

    async def go():
        async def one(i, prompt, given, strength, new):
            await asyncio.sleep(0.01 * (i % 9))
            entry = None if given is None else Entry(given, LAYER)
            return await answer(engine, job(prompt, entry, strength, new))

        return await asyncio.gather(*(one(i, *each) for i, each in enumerate(asked)))

    answers = run(go())
    steered = sum(given is not None and a != alone(p, None, 1.0, n) for a, (p, given, _, n) in
                  zip(answers, asked, strict=True))  # fmt: skip
    for got, each in zip(answers, asked, strict=True):
        assert got == alone(*each), each
    assert steered > 15, "the policies were meant to change something"
    totals = engine.counters()
    assert set(totals) <= {p.label for p in POLICIES}


def test_requests_that_leave_are_cancelled_and_forgotten(engine, run, monkeypatch):
    monkeypatch.setattr(seats, "LINGER", 0.2)

    async def go():
        for _ in range(3):
            tokens = engine.run(job(PROMPTS[1], Entry(POLICIES[0], LAYER), new=500))
            async for _ in tokens:
                break
            await tokens.aclose()
        await asyncio.sleep(0.5)
        return await answer(engine, job(PROMPTS[0]))

    run(go())
    assert len(engine._seats._jobs) == 1 and not engine._sampling
    assert len(engine.handle._host.tracker.requests.lengths) == 1
    scheduler = engine.manager.batch_processor.scheduler
    assert not scheduler.active_requests and not scheduler.waiting_requests


def test_requests_that_leave_before_they_are_seated_leave_nothing(engine, run, monkeypatch):
    monkeypatch.setattr(seats, "LINGER", 0.2)

    async def go():
        entry = Entry(POLICIES[0], LAYER)
        jobs = [job(PROMPTS[1], entry, new=500) for _ in range(6)]
        tasks = [asyncio.create_task(answer(engine, each)) for each in jobs]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.8)
        return await answer(engine, job(PROMPTS[0]))

    run(go())
    scheduler = engine.manager.batch_processor.scheduler
    assert not scheduler.active_requests and not scheduler.waiting_requests
    assert len(engine._seats._jobs) == 1 and not engine._sampling


def test_logits_that_are_no_numbers_fail_the_request(engine, run):
    engine.model.lm_head.weight.data.fill_(float("nan"))

    async def go():
        with pytest.raises(EngineError, match="logits are not finite"):
            await answer(engine, job(PROMPTS[0]))

    run(go())
    assert not engine._sampling


def test_more_policies_than_the_tables_hold(engine, alone, run):
    many = [policy(f"p{i}", [i]) for i in range(12)]

    async def go():
        jobs = [job(PROMPTS[i % 4], Entry(each, LAYER), new=40) for i, each in enumerate(many)]
        first = [asyncio.create_task(answer(engine, each)) for each in jobs[:8]]
        await asyncio.sleep(0.1)
        late = [await _outcome(engine, each) for each in jobs[8:]]  # no room for any of them
        return [*await asyncio.gather(*first), *late]

    answers = run(go())
    assert isinstance(answers[8], EngineFull)
    for i, got in enumerate(answers):
        if not isinstance(got, EngineFull):
            assert got == alone(PROMPTS[i % 4], many[i], 1.0, 40)


async def _outcome(engine, each):
    try:
        return await answer(engine, each)
    except EngineFull as error:
        return error


def test_policies_that_do_not_fit_are_refused_before_they_are_served(engine):
    with pytest.raises(FastsaeError, match="64"):
        engine.check(Entry(policy("x", [64]), LAYER))
    with pytest.raises(FastsaeError, match="statistics"):
        engine.check(Entry(Policy([add([1], 1.0, unit="max")], name="x"), LAYER))


def test_a_seed_fixes_the_text_in_any_company(engine, run):
    how = Sampling(1.0, 0.9, 0, seed=11)

    async def go():
        first = await answer(engine, job(PROMPTS[0], how=how, new=12))
        crowd = [job(PROMPTS[i % 4], how=Sampling(1.0, seed=i), new=12) for i in range(8)]
        crowd.append(job(PROMPTS[0], how=how, new=12))
        return first, await asyncio.gather(*(answer(engine, each) for each in crowd))

    first, crowd = run(go())
    assert crowd[-1] == first
    assert len({tuple(each) for each in crowd}) > 5


@pytest.mark.parametrize("requests", [int(os.environ.get("FASTSAE_FUZZ", "300"))])
def test_a_long_day(parts, alone, run, hang_up, requests, monkeypatch):
    """Random policies, sizes, strengths, streams, hang-ups and nonsense: never a 500, never
    another policy's text, nothing left over. FASTSAE_FUZZ=10000 for the long one."""
    monkeypatch.setattr(seats, "LINGER", 0.1)
    expected = {
        (p, k): alone(PROMPTS[p], each, 1.0, 8)
        for p in range(4)
        for k, each in enumerate([None, *POLICIES])
    }
    draw = random.Random(1)
    nonsense = [b"", b"{", b"[1]", b'{"prompt": 5}', b'{"prompt": [5], "steering": {}}', b"\xff"]
    engine = Engine(parts[0], Numbers(), {LAYER: parts[1]}, cache_tokens=1024, max_policies=6)
    store = PolicyStore(engine.layers, engine.check)
    for each in POLICIES:
        store.put(each.to_dict())
    app = create_app(engine, store, Settings(**ONE, max_running=24))
    statuses = collections.Counter()

    async def one(client):
        await asyncio.sleep(draw.random())
        p, k, n = draw.randrange(4), draw.randrange(5), draw.randint(1, 8)
        body = {"prompt": PROMPTS[p], "max_tokens": n, "temperature": 0}
        if k:
            body["steering"] = {"policy": POLICIES[k - 1].name}
        kind = draw.random()
        if kind < 0.1:
            answer = await client.post("/v1/completions", content=draw.choice(nonsense))
            assert answer.status_code == 400
        elif kind < 0.2:
            await hang_up(app, body | {"max_tokens": 60, "stream": kind < 0.15}, kind / 10)
            return
        else:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code == 200:
                text = Numbers().decode(expected[p, k][:n])
                assert answer.json()["choices"][0]["text"] == text
        statuses[answer.status_code] += 1

    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                for start in range(0, requests, 60):
                    await asyncio.gather(*(one(client) for _ in range(min(60, requests - start))))
                await asyncio.sleep(0.3)
                last = await client.post(
                    "/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 1}
                )
                assert last.status_code == 200
                known = engine.handle._host.tracker.requests
                assert set(known.steered) <= set(known.lengths) and not known.failed
        assert app.state.server.running == 0 and not engine._sampling
        assert len(engine._seats._jobs) == 1

    run(go())
    assert set(statuses) <= {200, 400, 429}, statuses
    assert statuses[200] > requests / 3


def test_the_openai_client_over_a_real_socket(parts, alone):
    """uvicorn, the official client, streams, and SIGTERM's path: running requests finish."""
    openai = pytest.importorskip("openai")
    import uvicorn

    engine = Engine(parts[0], Numbers(), {LAYER: parts[1]}, cache_tokens=2048)
    store = PolicyStore(engine.layers, engine.check)
    for each in POLICIES:
        store.put(each.to_dict())
    app = create_app(engine, store, Settings(**ONE))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
    ask = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}
    steer = {"extra_body": {"steering": {"policy": "a", "strength": 0.5}}}

    def words(tokens):
        return Numbers().decode(tokens)

    try:
        plain = client.completions.create(**ask)
        assert plain.choices[0].text == words(alone(PROMPTS[0]))
        steered = client.completions.create(**ask, **steer)
        assert steered.choices[0].text == words(alone(PROMPTS[0], POLICIES[0], 0.5))
        assert steered.steering["policy"] == "a@1" and steered.usage.completion_tokens == NEW
        parts_of = client.completions.create(**ask, **steer, stream=True)
        assert "".join(c.choices[0].text for c in parts_of) == steered.choices[0].text
        with pytest.raises(openai.BadRequestError, match="unknown; known are"):
            client.completions.create(**ask, extra_body={"steering": {"policy": "z"}})
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "5 6"}]
            )
        assert [m.id for m in client.models.list()] == ["tiny"]
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'fastsae_requests_total{arm="steered",outcome="length",policy="a@1"} 2.0' in metrics
        assert 'fastsae_steered_tokens{policy="a@1"} 8.0' in metrics  # up to the last admission
        assert 'fastsae_watched_tokens_total{layer="0",policy="a@1"} 16.0' in metrics
        assert 'fastsae_feature_mean{feature="1",layer="0",policy="a@1"}' in metrics
        assert 'fastsae_dose_max{layer="0",policy="a@1"}' in metrics
        assert f"fastsae_steering_seconds_count {2 * NEW}.0" in metrics
        last = []
        slow = threading.Thread(
            target=lambda: last.append(client.completions.create(**(ask | {"max_tokens": 200})))
        )
        slow.start()
        time.sleep(0.3)
    finally:
        server.should_exit = True
        thread.join(60)
        slow.join(60)
    assert not thread.is_alive()
    assert last[0].usage.completion_tokens == 200
