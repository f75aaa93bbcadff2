"""What the hooks allocate for a decoded token: nothing when idle, else the output and no more."""

import functools
import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastsae.steering import Policy, add, attach, gate
from fastsae.steering.scratch import Scratch

pytest.importorskip("transformers")

ROWS, D, CPU = 4, 32, torch.device("cpu")
OUTPUT_BYTES = ROWS * D * 4
NUMBERS = 8  # the 1 of `positions >= 1` and others: torch makes a tensor of 8 bytes of each


class Cache:
    def __init__(self, length: int):
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


@pytest.fixture
def token(build, make_sae):
    """(handle, a call that runs the hooks of one decode step and nothing of the model)"""
    model = build("llama")
    output = torch.randn(ROWS, 1, D)
    masks = [torch.ones(ROWS, columns, dtype=torch.long) for columns in range(2100)]
    given = {"input_ids": torch.ones(ROWS, 1, dtype=torch.long)}
    with attach(model, {0: make_sae()}) as handle:
        tracker, (point,) = handle._host.tracker, handle._host.points.values()

        @torch.inference_mode()
        def call(columns=8):
            given["attention_mask"], given["past_key_values"] = masks[columns], Cache(columns - 1)
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
def test_a_token_takes_its_output_and_leaves_nothing_behind(token, features, phase):
    handle, call = token
    policies = [Policy(add(range(features), 1.0 + i), phase=phase) for i in range(ROWS)]
    policies[1] = Policy(add(range(features), 3.0), gate=gate(range(features)))
    handle.set(policies)
    for _ in range(3):
        call()
    changes = allocations(call)
    taken = sum(change for change in changes if change > 0)
    assert sum(changes) == 0  # all of it is free again, the output included: nobody keeps it here
    assert max(changes) == OUTPUT_BYTES <= taken <= OUTPUT_BYTES + NUMBERS * 8
    kept = objects()
    for _ in range(100):
        call()
    assert objects() <= kept
    assert next(iter(handle.counts().values())) != [0] * ROWS


def test_a_longer_context_takes_no_more(token):
    handle, call = token
    handle.set([Policy(add([1, 2], 1.0 + i)) for i in range(ROWS)])
    call(2048)
    # A mask grows by a column per token; there is room for twice the context of the first one.
    for columns in (2049, 2050, 2099):
        assert max(allocations(functools.partial(call, columns))) == OUTPUT_BYTES


def test_forwards_do_not_see_what_others_left_in_the_buffers(llama, make_sae, logits):
    """Long and short, padded left or not at all, with masks and without, in turn on one model."""
    torch.manual_seed(5)
    policies = [Policy(add([1, 2], 3.0)), None, Policy(add(5, 2.0), phase="prompt")]
    batches = []
    for tokens, padding in ((9, 3), (1, 0), (4, 1), (9, 0), (2, 1), (30, 11)):
        ids, mask = torch.randint(3, 90, (3, tokens)), torch.ones(3, tokens, dtype=torch.long)
        mask[1, :padding] = 0
        batches += [(ids, mask), (ids, None)]
    with attach(llama, {0: make_sae()}) as handle:
        handle.set(policies)
        first = [logits(llama, ids, mask) for ids, mask in batches]
        again = [logits(llama, ids, mask) for ids, mask in batches[::-1]][::-1]
    for one, other, (ids, mask) in zip(first, again, batches, strict=True):
        assert torch.equal(one, other)
        with attach(llama, {0: make_sae()}) as handle:  # a handle alone has buffers of its own
            handle.set(policies)
            assert torch.equal(one, logits(llama, ids, mask))


def test_a_layer_called_on_its_own_by_threads_shares_no_buffer(llama, make_sae):
    with attach(llama, {0: make_sae()}) as handle:
        handle.set(Policy(add(1, 2.0)))
        assert handle._host.tracker.where().scratch("any", (1,), torch.bool, CPU) is None
        with torch.no_grad():
            llama(torch.ones(1, 4, dtype=torch.long), use_cache=False)
        assert handle._host.tracker.where().scratch("any", (1,), torch.bool, CPU) is None


def test_only_the_cpu_has_buffers():
    buffers = Scratch()
    assert buffers("a", (2, 3), torch.bool, torch.device("cuda")) is None
    kept = buffers("a", (2, 3), torch.bool, CPU)
    assert buffers("a", (2, 3), torch.bool, CPU) is kept
    assert buffers("b", (2, 3), torch.bool, CPU).data_ptr() != kept.data_ptr()
    assert buffers("a", (1, 3), torch.bool, CPU).data_ptr() == kept.data_ptr()
