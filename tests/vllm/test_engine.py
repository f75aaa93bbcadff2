"""Real engines on the CPU: unsteered requests as in plain vLLM, steered ones as in Hugging Face."""

import subprocess
import sys

import pytest

from fastsae.steering.dose import Dose


@pytest.fixture(scope="module")
def unsteered(crowd):
    return [request | {"steering": None} for request in crowd]


@pytest.fixture(scope="module")
def contamination(tiny):
    """Batches with one prompt longer than a block of the cache: steered, not, otherwise, not."""
    prompt = tiny.prompt(99, 300)
    wishes = [{"policy": "p1@1"}, None, {"policy": "p0@1"}, {"policy": "p1@1", "strength": 0.5}]
    wishes += [None, {"policy": "p1@1"}]
    return [[{"prompt": prompt, "steering": wish, "tokens": 8}] for wish in wishes]


@pytest.fixture(scope="module")
def eager(run_engine, crowd, unsteered, contamination):
    p = {"name": "late", "operations": [{"op": "add", "features": [3], "strength": 1.0}]}
    too_far = {"name": "far", "operations": [{"op": "ablate", "features": [999]}]}
    commands = [
        {"do": "watch"},
        {"do": "load", "site": 0, "policy": p},
        {"do": "load", "site": 0, "policy": p | {"norm": "preserve"}},
        {"do": "replace", "site": 0, "policy": p | {"norm": "preserve"}},
        {"do": "load", "site": 0, "policy": too_far},
        {"do": "delete", "policy": "late"},
        {"do": "delete", "policy": "late"},
        {"do": "load", "site": 7, "policy": p},
    ]
    unknown = [unsteered[0], unsteered[1] | {"steering": {"policy": "nobody"}}]
    batches = [unsteered, crowd, *contamination, unknown]
    return run_engine(batches, commands=commands, max_num_seqs=32)


def ran(result):
    assert not result.failed, result.log[-6000:]
    return result


def idle(status) -> bool:
    workers = status["workers"]
    return (
        not any(status["in_use"])
        and status["held"] == 0
        and all(worker["requests"] == worker["policies"] == 0 for worker in workers)
    )


def test_unsteered_requests_are_those_of_plain_vllm(run_engine, eager, unsteered, contamination):
    batches = [unsteered, contamination[1]]
    plain = ran(run_engine(batches, steered=False, max_num_seqs=32))
    assert ran(eager).outputs[0] == plain.outputs[0]
    assert eager.outputs[1][24:] == plain.outputs[0][24:]  # batch-mates of steered requests
    assert eager.outputs[3] == plain.outputs[1]


def test_mixed_requests_are_those_of_the_hugging_face_adapter(eager, crowd, expected):
    tokens = ran(eager).outputs[1]
    for i, request in enumerate(crowd):
        assert tokens[i] == expected(request), f"request {i}, {request['steering']}"
    changed = [tokens[i] != expected(r | {"steering": None}) for i, r in enumerate(crowd)]
    assert sum(changed) >= 18 and not any(changed[24:])


def test_the_prefix_cache_is_shared_only_by_requests_steered_alike(eager, contamination, expected):
    for i, (request,) in enumerate(contamination):
        assert ran(eager).outputs[2 + i] == [expected(request)], f"{i}: {request['steering']}"
    cached = [each["cached"][0] for each in eager.counters[2:8]]
    assert cached[:4] == [0, 0, 0, 0] and min(cached[4:]) >= 128


def test_what_was_done_to_each_policys_tokens_is_known(eager):
    watched, worker = ran(eager).answers[0]["watched"], eager.status["workers"][0]
    assert set(watched) == {f"p{i}@1" for i in range(8)}
    assert sum(each["tokens"] for each in watched.values()) == worker["steered_rows"] > 0
    for each in watched.values():
        assert each["not_finite"] == 0 and each["seconds"] > 0
        assert 0 < each["dose"]["sum"] / each["tokens"] < each["dose"]["max"] < 10
    gate = watched["p5@1"]["gate"]
    assert gate["opened"] > 0 < gate["closed"] and watched["p0@1"]["gate"] is None
    assert gate["opened"] + gate["closed"] == watched["p5@1"]["tokens"]
    assert watched["p0@1"]["features"].keys() == {"1", "5", "9"}


def test_policies_are_loaded_replaced_and_deleted(eager):
    load, again, replaced, far, deleted, gone, nowhere = ran(eager).answers[1:]
    assert load["policy"] == "late" and replaced["digest"] != load["digest"]
    assert "replace it" in again["error"]
    assert "features: 999 is out of range" in far["error"]
    assert deleted == replaced and "no policy 'late'" in gone["error"]
    assert "site: got 7" in nowhere["error"]


def test_a_policy_the_engine_does_not_know_fails_its_request_alone(eager):
    assert ran(eager).outputs[-1] == [eager.outputs[0][0], []]
    assert eager.counters[-1]["reasons"] == ["length", "error"]


def test_nothing_is_left_when_requests_are_done(eager):
    status = ran(eager).status
    assert status["armed"] and idle(status)
    assert status["workers"][0]["steered_rows"] > 0


def test_compiled_engines_agree_with_plain_vllm_and_with_eager(run_engine, crowd, unsteered, eager):
    compiled = {"enforce_eager": False, "max_num_seqs": 32}
    plain = ran(run_engine([unsteered], steered=False, **compiled))
    steered = ran(run_engine([unsteered, crowd], **compiled))
    assert steered.outputs[0] == plain.outputs[0]
    assert steered.outputs[1] == ran(eager).outputs[1]


def test_chunks_preemption_and_a_full_table(run_engine, tiny, crowd, expected):
    """10 cache blocks of 128 tokens for 8 rows that outgrow one each; four slots for 8 policies."""
    long = [
        {"prompt": tiny.prompt(i, 110), "steering": {"policy": f"p{i % 4}@1"}, "tokens": 30}
        for i in range(12)
    ]
    result = ran(
        run_engine(
            [crowd, long],
            settings={"max_policies": 4},
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=10 << 18,
            disable_log_stats=False,
        )
    )
    assert result.preemptions > 0
    for requests, tokens in zip([crowd, long], result.outputs, strict=True):
        assert tokens == [expected(request) for request in requests]
    assert idle(result.status)


def test_two_ranks_steer_as_one_within_a_dose(run_engine, folder, crowd, expected):
    site = {"sae": str(folder / "sae"), "policies": str(folder / "policies.json")}
    site["dose"] = {"limit": 0.5, "action": "clamp"}
    result = ran(
        run_engine(
            [crowd],
            settings={"sites": [site]},
            commands=[{"do": "watch"}],
            environ={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},  # one NUMA node serves two ranks
            tensor_parallel_size=2,
            max_num_batched_tokens=128,
            kv_cache_memory_bytes=16 << 20,
        )
    )
    within = [expected(request, Dose(0.5, "clamp")) for request in crowd]
    assert result.outputs[0] == within != [expected(request) for request in crowd]
    watched = result.answers[0]["watched"].values()
    assert max(each["dose"]["max"] for each in watched) == pytest.approx(0.5, rel=1e-3)
    counted = sum(each["tokens"] for each in watched)
    assert counted == result.status["workers"][0]["steered_rows"]  # of one rank, not of both
    rows = {worker["steered_rows"] for worker in result.status["workers"]}
    assert len(result.status["workers"]) == 2 and len(rows) == 1 and idle(result.status)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"sites": [{"sae": "missing-folder", "layer": 2}]}, "missing-folder"),
        ({"membership": 0}, 'set "membership"'),
    ],
)
def test_what_cannot_be_steered_stops_the_start(run_engine, settings, reason):
    result = run_engine([], settings=settings)
    assert result.failed and reason in result.log


SURFACES = """
import dataclasses, json, vllm
from fastsae.steering.vllm import register
from fastsae.steering.vllm.install import V2_SURFACES, problem
print("BEFORE", problem(vllm.__version__), problem(vllm.__version__, V2_SURFACES))
register()
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
wrapped = EngineCore.collective_rpc, GPUModelRunner.prepare_inputs
register()
print("AGAIN", wrapped == (EngineCore.collective_rpc, GPUModelRunner.prepare_inputs))
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
fields = [{field.name for field in dataclasses.fields(kind)}
          for kind in (InputBatch, NewRequestData, SchedulerOutput)]
print("V2", fields[0] >= {"req_ids", "query_start_loc_np", "num_computed_tokens_np"},
      fields[1] >= {"req_id", "sampling_params", "prompt_token_ids", "prompt_embeds"},
      fields[2] >= {"scheduled_new_reqs", "finished_req_ids", "preempted_req_ids"})
"""


REFUSED = """
import vllm
vllm.__version__ = {version!r}
from fastsae.steering.vllm import register
register()
from vllm.config import VllmConfig
VllmConfig()
try:
    VllmConfig(additional_config={{"fastsae": {settings}}})
except Exception as error:
    print("REFUSED", error)
"""


@pytest.mark.parametrize(
    "version, settings, reason",
    [
        ("0.99.0", {"sites": [{"sae": "x"}]}, "fastsae steers vLLM >= 0.32, < 0.34; this is 0.99"),
        ("0.32.0", {"sites": [{"sae": "x", "layr": 3}]}, "unknown key 'layr'"),
    ],
)
def test_another_version_serves_until_it_is_asked_to_steer(
    environment, tmp_path, version, settings, reason
):
    done = subprocess.run(
        [sys.executable, "-P", "-c", REFUSED.format(version=version, settings=settings)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "REFUSED" in done.stdout and reason in done.stdout, done.stderr


def test_both_runners_have_what_the_plugin_wraps_and_are_wrapped_once(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", SURFACES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0].isupper()]
    assert lines == ["BEFORE None None", "AGAIN True", "V2 True True True"], done.stderr
