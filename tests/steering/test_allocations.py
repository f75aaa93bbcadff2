"""The hooks allocate nothing for a decoded token, and never write what somebody still holds."""

import copy
import functools
import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastsae.steering import Policy, add, attach, gate, scratch
from fastsae.steering.scratch import KEPT_BYTES, Output, Scratch

pytest.importorskip("transformers")

ROWS, D, CPU = 4, 32, torch.device("cpu")
OUTPUT_BYTES = ROWS * D * 4


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
@pytest.mark.parametrize("required", [False, True])
def test_a_token_allocates_nothing_after_the_first(token, features, phase, required):
    handle, call = token
    options = {"phase": phase, "required": required}
    policies = [Policy(add(range(features), 1.0 + i), **options) for i in range(ROWS)]
    policies[1] = Policy(add(range(features), 3.0), gate=gate(range(features)))
    handle.set(policies)
    assert OUTPUT_BYTES in allocations(call)
    assert allocations(call) == []
    kept = objects()
    for columns in (8, 9, 2048, 2099):  # a mask grows by a column per token
        assert allocations(functools.partial(call, columns)) == []
    assert objects() <= kept
    assert next(iter(handle.counts().values())) != [0] * ROWS


def test_several_sites_and_layers_allocate_nothing(build, make_sae):
    model = build("llama")
    ids, output = torch.ones(ROWS, 1, dtype=torch.long), torch.randn(ROWS, 1, D)
    with (
        attach(model, {0: make_sae(), 1: make_sae()}) as one,
        attach(model, {1: make_sae()}) as two,
    ):
        one.set({0: Policy(add(3, 1.0)), 1: Policy(add(4, 1.0))})
        two.set(Policy(add(5, 2.0)))
        host = one._host

        @torch.inference_mode()
        def call():
            host.tracker.enter(None, (), {"input_ids": ids, "past_key_values": Cache(7)})
            for point in host.points.values():
                point.after(None, (), output)
            host.tracker.leave(None, (), output)

        call()
        assert allocations(call) == []


@pytest.mark.parametrize("held", ["tensor", "view", "storage", "none"])
def test_an_output_that_somebody_holds_is_left_alone(token, held):
    handle, call = token
    handle.set(Policy(add([1, 2], 3.0)))
    point = next(iter(handle._host.points.values()))
    outputs, real = [], point._steered
    point._steered = lambda *given: outputs.append(real(*given)) or outputs[-1]
    call()
    kept = {
        "tensor": lambda t: t,
        "view": lambda t: t[1, :, 3:],
        "storage": lambda t: torch.empty(0).set_(t.untyped_storage()),
        "none": lambda t: None,
    }[held](outputs[0])
    where, before = outputs.pop().data_ptr(), None if kept is None else kept.clone()
    handle.set(Policy(add([1, 2], 30.0)))
    call()
    assert (outputs[0].data_ptr() == where) is (held == "none")
    assert kept is None or torch.equal(kept, before)


def test_recorded_hidden_states_keep_their_tokens(llama, make_sae):
    """Every layer's output of every generated token, against one forward of the whole text."""
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    with attach(llama, {0: make_sae(), 1: make_sae()}) as handle:
        handle.set({0: Policy(add([1, 2], 30.0)), 1: Policy(add(3, -30.0))})
        told = {"output_hidden_states": True, "return_dict_in_generate": True, "do_sample": False}
        made = llama.generate(ids, max_new_tokens=6, **told)
        with torch.no_grad():
            again = llama(made.sequences[:, :-1], use_cache=False, output_hidden_states=True)
    for layer, whole in enumerate(again.hidden_states):
        steps = torch.cat([step[layer] for step in made.hidden_states], dim=1)
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_a_copy_has_an_output_of_its_own():
    output, x = Output(), torch.zeros(2, 1, 8)
    held = output(x).view(-1)
    copied = copy.deepcopy(output)
    del output
    assert copied(x).data_ptr() == copied(x).data_ptr() != held.data_ptr()


def test_without_a_count_of_users_every_output_is_new(monkeypatch):
    monkeypatch.setattr(scratch, "_count", None)
    output, x = Output(), torch.zeros(2, 1, 8)
    one = output(x)
    assert output(x) is not one


def test_a_large_output_is_not_kept():
    output = Output()
    small, large = torch.zeros(1, 1, 8), torch.zeros(1, 1, KEPT_BYTES // 4 + 1)
    assert output(small).data_ptr() == output(small).data_ptr()
    assert output(large).data_ptr() != output(large).data_ptr()
    first = output(small)  # the small one is still there
    assert output(small.half()).dtype == torch.float16 and first.dtype == torch.float32


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
