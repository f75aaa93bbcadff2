"""Continuous batching: requests of different policies packed into one row, mapped by their ids."""

from types import SimpleNamespace

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.steering import Policy, add, amplify, attach, steer

transformers = pytest.importorskip("transformers")

LAYER, NEW = 0, 5
PROMPTS = [[5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 3], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture
def model(build):
    return build("llama")


@pytest.fixture
def rows(batch):
    return [*batch.policies, None]


@pytest.fixture
def run():
    def run(model, prompts=PROMPTS, results=None, **config):
        more = {"allow_block_sharing": False, "num_blocks": 16, "page_size": 8} | config
        found = model.generate_batch(
            prompts,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(**more),
        )
        if results is not None:
            results.update(found)
        return [result.generated_tokens for result in found.values()]

    return run


@pytest.fixture
def alone(model, sae):
    """Each prompt on its own through `generate`: what its policy should write."""

    def alone(rows, sae=sae):
        texts = []
        for prompt, policy in zip(PROMPTS, rows, strict=True):
            with attach(model, {LAYER: sae}) as handle:
                handle.set(policy)
                ids = torch.tensor([prompt])
                out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
            texts.append(out[0, len(prompt) :].tolist())
        return texts

    return alone


def test_requests_keep_their_policies(model, sae, run, alone, rows, make_sae):
    base, want, backwards = alone([None] * 4), alone(rows), alone(rows[::-1])
    first = alone([rows[0]] * 4)
    assert sum(a != b for a, b in zip(base, want, strict=True)) >= 2 and base[3] == want[3]
    with attach(model, {LAYER: sae}) as handle:
        assert run(model) == base
        handle.set(rows)
        assert run(model) == want
        steered = [len(PROMPTS[0]) - 1 + NEW - 1, len(PROMPTS[1]) - 1, NEW - 1, 0]
        assert handle.counts() == {"layers.0.output": steered}
        assert run(model, max_batch_tokens=4) == want  # chunked prefill, two at a time
        handle.set(rows[::-1])
        assert run(model) == backwards
        handle.set(rows[0])
        assert run(model, allow_block_sharing=True) == first
    assert run(model) == base


def test_top_k_membership_in_a_packed_batch(model, run, alone, make_sae, rows):
    sae = make_sae("topk")
    own = Policy(amplify([3, 5, 9, 11, 20, 21, 22], 6.0, active="sae"))
    rows = [own, None, rows[0], own]
    want = alone(rows, sae)
    with steer(model, sae, rows, layer=LAYER):
        assert run(model) == want


def test_requests_are_known_by_their_ids(model, sae, alone, rows):
    want = alone(rows)
    names = ["a", "b", "c", "d"]
    config = transformers.ContinuousBatchingConfig(
        allow_block_sharing=False, num_blocks=16, page_size=8
    )
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows, requests=names)
        with model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=config
        ) as manager:
            for name in ("c", "a", "d", "b"):
                manager.add_request(PROMPTS[names.index(name)], request_id=name)
            with pytest.raises(FastsaeError, match=r"^request_id: 'e' has no policy"):
                manager.add_request([1, 2], request_id="e")
            got = {}
            while len(got) < 4:
                if (result := manager.get_result(timeout=5)) is not None:
                    got[result.request_id] = result.generated_tokens
    assert [got[name] for name in names] == want


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [1e17, 1e25, 3e38])
def test_numbers_that_are_none_stay_with_their_request(model, sae, run, rows, strength, kind):
    """All requests share one row: NaN keys or values of one would be NaN for all."""
    model = model.to(kind)
    huge = Policy([add([1, 2], strength)] * 2)
    crowd = [rows[0], huge, None, rows[2]]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[3]]
    with attach(model, {LAYER: sae}, watch=True) as handle:
        handle.set([rows[0], None, None, rows[2]])
        want = run(model, prompts)
        results = {}
        handle.set(crowd)
        got = run(model, prompts, results=results)
        assert got == [want[0], [], want[2], want[3]]
        errors = [result.error for result in results.values()]
        assert [error is None for error in errors] == [True, False, True, True]
        assert errors[1].startswith("steering: a token's residual came out not finite")
        numbers = handle.watched()["layers.0.output"]
        assert numbers[huge.digest]["not_finite"] > 0 == numbers[huge.digest]["tokens"]
        assert handle.counts()["layers.0.output"][1] == 0
        handle.set([rows[0], None, None, rows[2]])
        assert run(model, prompts) == want  # the name failed once, its next bearer has not


@pytest.mark.parametrize("how", ["policies", "strengths", "phase"])
def test_shared_blocks_are_refused_for_mixed_policies(model, sae, run, rows, how):
    with attach(model, {LAYER: sae}) as handle:
        if how == "policies":
            handle.set(rows)
        elif how == "strengths":
            handle.set([rows[0]] * 4, strengths=[1, 2, 1, 1])
        else:
            handle.set(rows[1])
        with pytest.raises(FastsaeError, match=r"allow_block_sharing=False"):
            run(model, allow_block_sharing=True)


def test_a_kept_manager_with_shared_blocks_serves_one_policy(model, sae, rows):
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    config = transformers.ContinuousBatchingConfig(num_blocks=16, page_size=8)
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows[0])
        manager = model.init_continuous_batching(settings, config)
        manager.add_request([1, 2, 3])
        for policy in (None, rows[2]):
            handle.set(policy)
            with pytest.raises(FastsaeError, match=r"must not share cache blocks.*a new manager"):
                manager.add_request([1, 2, 3])


def test_a_manager_from_before_attach_holds_unsteered_blocks(model, sae, rows, run):
    config = transformers.ContinuousBatchingConfig(num_blocks=16, page_size=8)
    settings = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    model.generate_batch(
        PROMPTS,
        generation_config=settings,
        continuous_batching_config=config,
        persistent_manager=True,
    )
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows[0])
        with pytest.raises(FastsaeError, match=r"must not share cache blocks"):
            model.generate_batch(PROMPTS, generation_config=settings)
    model.destroy_cached_continuous_batching_manager()


def test_graphs_are_refused(model, sae, rows, run):
    compiling = transformers.CompileConfig()
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows)
        with pytest.raises(FastsaeError, match=r"a graph replays the requests"):
            run(model, varlen_compile_config=compiling)


def test_the_managers_own_rehearsal_is_not_steered(model, sae, rows):
    config = transformers.ContinuousBatchingConfig(allow_block_sharing=False)
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows)
        manager = model.init_continuous_batching(continuous_batching_config=config)
        manager.add_request([1, 2, 3])
        states = [("__warmup_PREFILLING_0__", 2), ("request-0", 3)]
        manager.batch_processor = SimpleNamespace(
            inputs_and_outputs=SimpleNamespace(
                requests_in_batch=[
                    SimpleNamespace(state=SimpleNamespace(request_id=name), query_length=count)
                    for name, count in states
                ]
            )
        )
        packed = manager.add_request.__self__.packed(7, torch.device("cpu"))
        assert packed.real.tolist() == [False, False, True, True, True, False, False]
        assert packed.lengths[2:5].tolist() == [3, 3, 3]


def test_mistakes_reach_the_caller_of_generate_batch(model, sae, run, rows):
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows[:2])
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but there are more"):
            run(model)
        handle.set(Policy(add(1, 1.0), required=True))
        handle.sites[next(iter(handle.sites))].sae = None  # whatever goes wrong in the hook
        with pytest.raises((FastsaeError, AttributeError)):
            run(model)
    for requests, message in (([], "expected different"), (["a", "a"], "expected different")):
        with attach(model, {LAYER: sae}) as handle, pytest.raises(FastsaeError, match=message):
            handle.set(rows, requests=requests)
    with attach(model, {LAYER: sae}) as handle, pytest.raises(FastsaeError, match="got 1 ids for"):
        handle.set(rows, requests=["a"])
