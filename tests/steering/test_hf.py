"""Steering tiny transformers models: which tokens are steered, and by which operations."""

import functools

import pytest
import torch

from fastsae.ops import check
from fastsae.ops.backend import supported
from fastsae.steering import (
    Policy,
    ablate,
    add,
    amplify,
    attach,
    calibrate,
    enforce,
    gate,
    site,
    steer,
)

pytest.importorskip("transformers")

LAYER, NEW = 0, 5

# --- every family --------------------------------------------------------------------------------


def test_a_forward_steers_all_real_tokens_but_the_first(
    model, sae, logits, by_hand, batch, everywhere
):
    base = logits(model)
    with by_hand(model, sae, LAYER, batch.steered, everywhere):
        want = logits(model)
    with steer(model, sae, everywhere):
        got = logits(model)
    torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-5)
    assert (got - base).abs()[batch.real].max() > 1e-3
    assert torch.equal(logits(model), base)


def test_generation_steers_the_phases_token_by_token(model, sae, generate, batch, by_hand, logits):
    tokens, _ = generate(model)
    with steer(model, sae, batch.policies):
        tokens, got = generate(model)
    # Recompute from scratch what the cache should have held, with a hook that knows the columns.
    ids = torch.cat([batch.ids, tokens], 1)[:, :-1]
    mask = torch.cat([batch.mask, torch.ones_like(tokens)], 1)[:, :-1]
    chosen = mask.bool() & (mask.cumsum(1) > 1)
    chosen[1, batch.ids.shape[1] :] = False  # prompt
    chosen[2, : batch.ids.shape[1]] = False  # generated
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with by_hand(model, sae, LAYER, chosen, *batch.policies):
        want = logits(model, ids, mask, **({} if "Bloom" in type(model).__name__ else positions))
    torch.testing.assert_close(got, want[:, batch.ids.shape[1] - 1 :], rtol=1e-4, atol=1e-5)


def test_the_cache_changes_nothing(model, sae, batch, generate):
    with steer(model, sae, batch.policies):
        cached_tokens, cached = generate(model)
        tokens, plain = generate(model, use_cache=False)
    assert torch.equal(tokens, cached_tokens)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


def test_a_padded_row_is_steered_like_the_row_alone(model, sae, batch, generate):
    with steer(model, sae, batch.policies):
        _, together = generate(model)
    for row, policy in enumerate(batch.policies):
        ids = batch.ids[row : row + 1, -batch.lengths[row] :]
        with steer(model, sae, policy):
            _, alone = generate(model, ids, None)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_rows_without_a_policy_are_bit_identical(model, sae, logits, generate, everywhere, prompt):
    base, base_logits = logits(model), generate(model)[1]
    with attach(model, {LAYER: sae}) as handle:
        assert torch.equal(logits(model), base)  # idle
        for policies, kept in (([None, everywhere, None], [0, 2]), ([prompt, None, None], [1, 2])):
            handle.set(policies)
            assert torch.equal(logits(model)[kept], base[kept])
            _, got = generate(model)
            assert torch.equal(got[kept], base_logits[kept])
            assert not torch.equal(got, base_logits)
        handle.set([everywhere] * 3, strengths=[0, 1.0, 0.0])
        assert torch.equal(logits(model)[[0, 2]], base[[0, 2]])
        handle.set(None)
        assert torch.equal(logits(model), base)


def test_each_token_is_steered_exactly_once(model, sae, count_steered, batch, generate):
    counter = count_steered()
    with steer(model, sae, batch.policies):
        generate(model)
    # The last sampled token is never fed back, and the first real one is left alone.
    assert counter.rows.tolist() == [batch.lengths[0] - 1 + NEW - 1, batch.lengths[1] - 1, NEW - 1]


def test_the_generated_phase_leaves_the_first_token_alone(model, sae, generate, generated):
    _, base = generate(model)
    with steer(model, sae, generated):
        _, got = generate(model)
    assert torch.equal(got[:, 0], base[:, 0])
    assert not torch.allclose(got[:, 1], base[:, 1])


def test_an_idle_hook_returns_the_layers_own_output(
    model, sae, trunk_and_layers, logits, everywhere
):
    layer, seen = trunk_and_layers(model)[1][LAYER], []
    watch = functools.partial(layer.register_forward_hook, lambda m, a, out: seen.append(out))
    with attach(model, {LAYER: sae}) as handle, watch(prepend=True), watch():
        handle.set(None)
        logits(model)
        assert seen[0] is seen[1]
        handle.set([None, None])
        assert not handle.active
        handle.set(everywhere)
        logits(model)
        assert seen[2] is not seen[3] and type(seen[2]) is type(seen[3])
        if isinstance(seen[2], tuple):
            assert all(a is b for a, b in zip(seen[2][1:], seen[3][1:], strict=True))


# --- operations ----------------------------------------------------------------------------------

OPERATIONS = {
    "amplify": Policy(amplify(range(8), [1.5, -0.5] * 4)),
    "ablate": Policy(ablate(range(8))),
    "calibrate": Policy(calibrate([1, 2], [0.0, 3.0])),
    "enforce": Policy(enforce([6, 7, 8], 1.5)),
    "order": Policy([add(3, 2.0), amplify(3, 1.0), ablate(4), calibrate(4, 0.5)]),
    "gate": Policy(add(3, 2.0), gate=gate([1, 2], above=0.3)),
    "norm": Policy([add(3, 5.0), amplify(2, 1.0)], norm="preserve"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_reach_the_model(llama, sae, name, by_hand, batch, logits):
    policy = OPERATIONS[name]
    with by_hand(llama, sae, LAYER, batch.steered, policy):
        want = logits(llama)
    with steer(llama, sae, policy):
        got = logits(llama)
    torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, logits(llama))


@pytest.mark.parametrize("name", OPERATIONS)
def test_top_k_membership_and_plain_rows_share_a_batch(
    llama, name, make_sae, logits, by_hand, batch, generate
):
    sae, plain = make_sae("topk"), OPERATIONS[name]
    own = amplify([3, 5, 9, 11, 20, 21, 22], 3.0, active="sae")
    staged = Policy([*plain.operations, own], gate=plain.gate, norm=plain.norm)
    base = logits(llama)
    for rows in ([staged, None, plain], [staged, staged, staged], [None, None, staged]):
        with by_hand(llama, sae, LAYER, batch.steered, *rows):
            want = logits(llama)
        with steer(llama, sae, rows):
            got = logits(llama)
        torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-5)
        kept = [row for row, policy in enumerate(rows) if policy is None]
        assert torch.equal(got[kept], base[kept])
    with steer(llama, sae, [staged, plain, None]):
        tokens, scores = generate(llama, num_return_sequences=1)
        plainly = generate(llama, use_cache=False)
    assert torch.equal(tokens, plainly[0])
    torch.testing.assert_close(scores, plainly[1], rtol=1e-4, atol=1e-5)


def test_a_hook_goes_straight_to_the_kernel(llama, sae, generate, batch, monkeypatch):
    """Prompt and decoded tokens alike, on the CPU; with nothing to do it does not even go there."""
    with steer(llama, sae, batch.policies):
        want = generate(llama)
    base = generate(llama)

    def refuse(*args):
        raise AssertionError("the long way")

    if "native" in supported("steer"):
        monkeypatch.setattr(check, "rows", refuse)
        with steer(llama, sae, batch.policies):
            for got, wanted in zip(generate(llama), want, strict=True):
                assert torch.equal(got, wanted)
    monkeypatch.setattr(site, "steer", refuse)
    with attach(llama, {LAYER: sae}) as handle:
        for rows in (None, [None] * 3):
            handle.set(rows)
            for got, wanted in zip(generate(llama), base, strict=True):
                assert torch.equal(got, wanted)


def test_strength_scales_each_row(llama, sae, logits):
    with steer(llama, sae, Policy(add(3, 6.0))):
        want = logits(llama)
    with steer(llama, sae, Policy(add(3, 2.0)), strength=3.0):
        torch.testing.assert_close(logits(llama), want)
    with steer(llama, sae, [Policy(add(3, 2.0))] * 3, strength=[3.0, 1.5, 6.0]):
        got = logits(llama)
    torch.testing.assert_close(got[0], want[0])
    with steer(llama, sae, Policy(add(3, 3.0))):
        torch.testing.assert_close(got[1], logits(llama)[1])


def test_half_precision_models_stay_in_half_precision(sae, build, logits, everywhere, prompt):
    model = build("llama").to(torch.bfloat16)
    base = logits(model)
    with steer(model, sae, [everywhere, None, prompt]):
        got = logits(model)
    assert got.dtype == torch.bfloat16 and torch.equal(got[1], base[1])
    assert not torch.equal(got[0], base[0])
