"""Rows of a batch → requests → phases, for both model runners, on what vLLM's objects hold."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastsae
from fastsae import Policy
from fastsae.steering.dose import Dose
from fastsae.steering.table import Capacity
from fastsae.steering.vllm import batch
from fastsae.steering.vllm.layer import SteeredLayer
from fastsae.steering.vllm.settings import Settings, SiteSettings
from fastsae.steering.vllm.worker import WorkerSteering

D = 16
LOG = "vllm.plugins.fastsae"


@pytest.fixture
def steering():
    sae = fastsae.SAE(fastsae.SAEConfig(D, 32, k=4))
    layer = SteeredLayer(sae, Capacity(max_policies=4), 0, 24, "cpu")
    site = SiteSettings("folder", None, 1, None)
    settings = Settings((site,), Capacity(), 0, False, 10.0, None, None)
    return WorkerSteering(settings, {0: layer}, {0: 1})


def new(name, policy=None, prompt=6, strength=1.0):
    resolved = policy and {"site": 0, "policy": policy.to_dict(), "strength": strength}
    extra = {"fastsae": json.dumps(resolved)} if policy else None
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        req_id=name,
        sampling_params=params,
        prompt_token_ids=list(range(prompt)),
        prompt_embeds=None,
    )


def step(rows, *, fresh=(), finished=()):
    """rows: (request, tokens, position of the first), in batch order."""
    scheduled = SimpleNamespace(
        scheduled_new_reqs=list(fresh),
        finished_req_ids=set(finished),
        num_scheduled_tokens={name: tokens for name, tokens, _ in rows},
    )
    names, tokens, positions = ([row[i] for row in rows] for i in range(3))
    v1 = SimpleNamespace(
        req_ids=names, num_computed_tokens_cpu=np.array([*positions, 77], dtype=np.int32)
    )
    v2 = SimpleNamespace(
        req_ids=names,
        num_computed_tokens_np=np.array(positions, dtype=np.int32),
        query_start_loc_np=np.cumsum([0, *tokens, 0], dtype=np.int32),
    )
    return scheduled, SimpleNamespace(input_batch=v1), v2


@pytest.fixture(params=["v1", "v2"])
def begin(request, steering):
    def run(rows, **kinds) -> list[int]:
        scheduled, runner, prepared = step(rows, **kinds)
        if request.param == "v1":
            view = batch.of_v1(runner, scheduled)
        else:
            steering.finish(scheduled.finished_req_ids)
            view = batch.of_v2(scheduled, prepared)
        steering.begin(view)
        slots = steering.layers[0].slots
        return (slots != 0).int().tolist()[: sum(tokens for _, tokens, _ in rows)]

    return run


def policy(phase="all", feature=1):
    return Policy(fastsae.ablate(feature), phase=phase, name=f"{phase}{feature}")


def test_rows_follow_the_order_of_the_batch(begin, steering):
    fresh = [new("a"), new("b", policy(), 4), new("c", policy(feature=2), 3, 0.5)]
    assert begin([("b", 4, 0), ("a", 3, 0), ("c", 3, 0)], fresh=fresh) == [0, 1, 1, 1] + [0] * 3 + [
        0,
        1,
        1,
    ]
    layer = steering.layers[0]
    assert layer.slots[1] != layer.slots[8]
    assert layer.strengths[[1, 8]].tolist() == [1.0, 0.5]
    assert begin([("c", 1, 3), ("a", 1, 3), ("b", 1, 4)]) == [1, 0, 1]
    assert begin([("a", 1, 4)], finished=["b", "c"]) == [0]
    assert layer.applied == {} and steering.requests == {}


@pytest.mark.parametrize(
    "phase, prompt, decode",
    [("all", [0, 1, 1, 1, 1, 1], 1), ("prompt", [0, 1, 1, 1, 1, 1], 0), ("generated", [0] * 6, 1)],
)
def test_phases_go_by_position(begin, phase, prompt, decode):
    assert begin([("a", 6, 0)], fresh=[new("a", policy(phase))]) == prompt
    assert begin([("a", 1, 6)]) == [decode]


def test_chunks_of_a_prompt_and_one_that_reaches_over_its_end(begin):
    assert begin([("a", 4, 0)], fresh=[new("a", policy("generated"), 6)]) == [0] * 4
    assert begin([("a", 1, 4)]) == [0]  # a chunk of one token is no decoding step
    assert begin([("a", 4, 5)]) == [0, 1, 1, 1]  # a prefill of the last token and three drafts


def test_a_preempted_request_keeps_its_prompt_length(begin, steering):
    begin([("a", 6, 0)], fresh=[new("a", policy("prompt"), 6)])
    begin([("a", 1, 6)])
    assert begin([("b", 1, 0)], fresh=[new("b")]) == [0]  # while a is out of the batch
    assert begin([("a", 8, 0)]) == [0, 1, 1, 1, 1, 1, 0, 0]
    assert begin([("a", 8, 0)], fresh=[new("a", policy("prompt"), 6)])[:7] == [0, 1, 1, 1, 1, 1, 0]
    assert [users for _, _, users in steering.layers[0].applied.values()] == [1]


def test_first_tokens_are_steered_on_demand(begin, steering):
    steering.settings = steering.settings._replace(first_token=True)
    assert begin([("a", 2, 0)], fresh=[new("a", policy())]) == [1, 1]


def test_prompts_of_embeddings_have_a_length(begin):
    request = new("a", policy("generated"))
    request.prompt_token_ids, request.prompt_embeds = None, torch.zeros(3, D)
    assert begin([("a", 5, 0)], fresh=[request]) == [0, 0, 0, 1, 1]


def test_a_dose_above_the_limit_is_logged_once(begin, steering, caplog):
    layer = SteeredLayer(steering.layers[0].sae, Capacity(), 0, 24, "cpu", Dose(0.5), watch=4)
    steering.layers[0], strong = layer, Policy(fastsae.add(1, 50.0), name="strong")
    for name, wish, moves in (("a", policy(), 0), ("b", strong, 1), ("c", strong, 0)):
        caplog.clear()
        begin([(name, 6, 0)], fresh=[new(name, wish)])
        layer(torch.randn(6, D), None)
        begin([], finished=[name])
        said = [record.getMessage() for record in caplog.records if record.name == LOG]
        assert len(said) == moves and all("policy strong moved a token by" in text for text in said)


def test_dummy_forwards_are_not_steered(begin, steering):
    begin([("a", 6, 0)], fresh=[new("a", policy())])
    steering.clear()
    assert not steering.layers[0].slots.any() and not steering.layers[0].active.any()
    assert begin([("a", 1, 6)]) == [1]
