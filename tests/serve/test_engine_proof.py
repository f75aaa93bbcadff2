"""What the engine must never do: let tokens go by unsteered, or let one request break another."""

import asyncio
import importlib.util
import re
import threading
from pathlib import Path

import pytest

from fastsae.errors import FastsaeError
from fastsae.serve.engine import PAGE, Engine
from fastsae.serve.policies import Entry
from fastsae.serve.seats import EngineError
from fastsae.steering.positions import Where

pytest.importorskip("transformers")
_spec = importlib.util.spec_from_file_location("examples", Path(__file__).with_name("examples.py"))
examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(examples)
engine, job, answer, policy = examples.engine, examples.job, examples.answer, examples.policy
POLICIES, PROMPTS = examples.POLICIES, examples.PROMPTS
LAYER, NEW = examples.LAYER, examples.NEW


def test_tokens_that_went_by_unsteered_fail_the_request(engine, run, monkeypatch):
    monkeypatch.setattr(engine._seats, "_set", _unsteered(engine._seats))

    async def go():
        with pytest.raises(EngineError, match=r"policy c@1: 0 of 3 tokens were steered"):
            await answer(engine, job(PROMPTS[0], Entry(POLICIES[2], LAYER)))
        return await answer(engine, job(PROMPTS[0]))

    assert len(run(go())) == NEW


def _unsteered(its):
    def set_none(jobs):
        names = [each.id for each in jobs]
        its.handle.set([None] * len(names), requests=names)
        its._jobs, its._order = {each.id: each for each in jobs}, names

    return set_none


@pytest.mark.parametrize("unsteered", [False, True])
def test_preempted_requests_are_proved_steered_token_by_token(
    parts, alone, run, monkeypatch, unsteered
):
    """A cache too small for all: requests are thrown out and computed again from their first token.

    What is computed again counts from 0, so that tokens steered twice cannot stand in for tokens
    that went by unsteered.
    """
    from transformers.generation.continuous_batching.requests import RequestState

    engine = Engine(parts[0], None, {LAYER: parts[1]}, cache_tokens=4 * PAGE)
    again, real = [], RequestState.create_equivalent_initial_request
    steered = Where.steered

    def thrown_out(state):
        again.append(state.request_id)
        return real(state)

    def blind(where, residual, first_token):
        chosen = steered(where, residual, first_token)
        positions = where.positions(residual)[0]
        # Within a prompt that holds generated tokens, one token is not steered.
        return chosen & (positions != 40) if again and unsteered else chosen

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", thrown_out)
    monkeypatch.setattr(Where, "steered", blind)
    entries = [Entry(each, LAYER) for each in (POLICIES[0], POLICIES[1])] * 2
    jobs = [job(PROMPTS[i], entry, new=90) for i, entry in enumerate(entries)]

    async def go():
        return await asyncio.gather(
            *(answer(engine, each) for each in jobs), return_exceptions=True
        )

    engine.start()
    try:
        answers = run(go())
    finally:
        engine.stop()
    assert again, "the cache was meant to be too small"
    for each, got in zip(jobs, answers, strict=True):
        if unsteered and each.id in again:
            assert isinstance(got, EngineError)
            assert re.search(r"policy [ab]@1: \d+ of \d+ tokens were steered", str(got))
        elif not unsteered:
            assert got == alone(list(each.tokens), each.decision.entry.policy, 1.0, 90)


def test_a_policy_that_overflows_fails_alone(engine, alone, run):
    """Healthy requests, steered or not, write beside it what they write alone."""
    wild = [Entry(policy(f"wild{i}", [1, 2], strength), LAYER) for i, strength in
            enumerate((1e17, 1e30, 3e38))]  # fmt: skip

    async def go():
        healthy = [job(PROMPTS[i % 4], None if i % 2 else Entry(POLICIES[i % 4], LAYER), new=20)
                   for i in range(8)]  # fmt: skip
        broken = [job(PROMPTS[i], each, new=20) for i, each in enumerate(wild)]
        return healthy, await asyncio.gather(
            *(answer(engine, each) for each in [*healthy[:4], *broken, *healthy[4:]]),
            return_exceptions=True,
        )

    healthy, answers = run(go())
    for error in answers[4:7]:
        assert isinstance(error, EngineError)
        assert str(error).startswith("steering: a token's residual came out not finite")
    for each, got in zip(healthy, answers[:4] + answers[7:], strict=True):
        given = each.decision.entry and each.decision.entry.policy
        assert got == alone(list(each.tokens), given, 1.0, 20)
    numbers = engine.watched()
    for each in wild:
        found = numbers[LAYER, each.policy.digest]
        assert found["not_finite"] > 0 == found["tokens"]


def test_what_is_watched_leaves_with_the_policy(engine, parts, run):
    entry = Entry(POLICIES[0], LAYER, watch=(9,))

    async def ask(entry):
        return await answer(engine, job(PROMPTS[0], entry))

    run(ask(entry))
    found = engine.watched()[LAYER, entry.policy.digest]
    assert found["tokens"] == len(PROMPTS[0]) - 1 + NEW - 1
    assert set(found["features"]) == {1, 2, 9} and found["dose"]["max"] > 0
    engine.forget(entry)
    assert (LAYER, entry.policy.digest) not in engine.watched()
    run(ask(Entry(POLICIES[0], LAYER)))  # the same policy comes back, without the list
    found = engine.watched()[LAYER, entry.policy.digest]
    assert found["tokens"] == len(PROMPTS[0]) - 1 + NEW - 1
    with pytest.raises(FastsaeError, match="features: 64 is out of range"):
        engine.check(Entry(POLICIES[0], LAYER, watch=(64,)))


def test_stop_leaves_the_hooks_under_a_forward_that_does_not_end(parts, run, logged):
    engine = Engine(parts[0], None, {LAYER: parts[1]}, cache_tokens=2048)
    inside, go_on = threading.Event(), threading.Event()

    def slow(*given):
        inside.set()
        go_on.wait(30)

    hook = parts[0].model.layers[1].register_forward_hook(slow)

    async def go():
        asked = asyncio.create_task(answer(engine, job(PROMPTS[0], Entry(POLICIES[0], LAYER))))
        await asyncio.to_thread(inside.wait, 30)
        await asyncio.to_thread(engine.stop, 0.05)
        assert not engine.alive and engine.handle._host is not None
        assert logged[0].startswith("the engine's thread still runs after 0.05 s")
        go_on.set()
        with pytest.raises(EngineError):
            await asked
        await asyncio.to_thread(engine.stop)

    engine.start()
    try:
        run(go())
    finally:
        go_on.set()
        hook.remove()
        engine.stop()
    assert engine.handle._host is None and "_fastsae_host" not in parts[0].model.__dict__
