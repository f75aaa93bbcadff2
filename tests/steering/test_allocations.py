"""What the hooks allocate for a decoded token: nothing when idle, nothing that stays when not."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastsae.steering import Policy, add, attach, gate

pytest.importorskip("transformers")

ROWS, D = 4, 32
OUTPUT_BYTES = ROWS * D * 4


class Cache:
    def get_seq_length(self) -> int:
        return 7


@pytest.fixture
def token(build, make_sae):
    """(handle, a call that runs the hooks of one decode step and nothing of the model)"""
    model = build("llama")
    output = torch.randn(ROWS, 1, D)
    given = {
        "input_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, 8, dtype=torch.long),
        "past_key_values": Cache(),
    }
    with attach(model, {0: make_sae()}) as handle:
        tracker, (point,) = handle._host.tracker, handle._host.points.values()

        @torch.inference_mode()
        def call():
            tracker.enter(None, (), given)
            point.after(None, (), output)
            tracker.leave(None, (), output)

        yield handle, call


def allocations(call) -> list[int]:
    """Bytes of every tensor allocation, and of every release as a negative number."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
        gc.collect()
    events = trace.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def objects() -> int:
    """How many containers and tensors are alive."""
    gc.collect()
    return len(gc.get_objects())


def test_the_profiler_sees_allocations():
    assert 4096 in allocations(lambda: torch.empty(1024))


@pytest.mark.parametrize("rows", [None, [None] * ROWS], ids=["off", "no policy"])
def test_an_idle_hook_allocates_nothing(token, rows):
    handle, call = token
    handle.set(rows)
    call()
    assert allocations(call) == []


@pytest.mark.parametrize("features", [1, 64])
@pytest.mark.parametrize("phase", ["all", "generated"])
def test_a_token_leaves_nothing_behind(token, features, phase):
    handle, call = token
    policies = [Policy(add(range(features), 1.0 + i), phase=phase) for i in range(ROWS)]
    policies[1] = Policy(add(range(features), 3.0), gate=gate(range(features)))
    handle.set(policies)
    for _ in range(3):
        call()
    changes = allocations(call)
    taken = sum(change for change in changes if change > 0)
    assert sum(changes) == 0  # all of it is free again, the output included: nobody keeps it here
    # The output, and a few numbers per row and column of the mask; nothing per feature.
    assert OUTPUT_BYTES <= taken <= OUTPUT_BYTES + ROWS * 8 * 8 * 8
    kept = objects()
    for _ in range(100):
        call()
    assert objects() <= kept
    assert next(iter(handle.counts().values())) != [0] * ROWS
