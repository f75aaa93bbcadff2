"""Policies packed for the steer op, against a dense float64 oracle; slots, capacity and errors."""

import random

import pytest
import torch

from fastsae import SAE, SAEConfig
from fastsae.errors import FastsaeError
from fastsae.ops import steer
from fastsae.sae import FeatureStats
from fastsae.steering.membership import StagedPolicy, is_staged
from fastsae.steering.policy import (
    Policy,
    ablate,
    add,
    amplify,
    calibrate,
    enforce,
    gate,
)
from fastsae.steering.table import Capacity, PolicyTable

D, F = 24, 61


def make_sae(activation="jumprelu", *, centred=True, weights="float32", seed=0):
    draw = torch.Generator().manual_seed(seed)
    k = 6 if activation == "topk" else None
    sae = SAE(SAEConfig(D, F, activation, k, centred, dtype=weights))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(F, D, generator=draw))
        sae.b_enc.copy_(torch.randn(F, generator=draw) * 0.3)
        sae.b_dec.copy_(torch.randn(D, generator=draw))
        if sae.config.has_threshold:
            sae.threshold.copy_(torch.rand(F, generator=draw))
    spread = torch.rand(F, generator=draw) + 0.5
    sae.stats = FeatureStats(spread / 10, spread, 3 * spread, 1000)
    return sae


def oracle(sae, policy, x, strengths, dtype=torch.float64):
    """MATH.md §4, every feature of the SAE at once: the definition, in `dtype`."""
    x, s = x.to(dtype), strengths.to(dtype).unsqueeze(-1)
    W, D_, b, b_dec = (p.detach().to(dtype) for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))

    def acts(r, own=False):
        h = (r - b_dec * sae.config.apply_b_dec_to_input) @ W.T + b
        if own and sae.config.activation == "topk":
            return (
                torch.zeros_like(h)
                .scatter(-1, (top := h.topk(sae.config.k)).indices, top[0])
                .relu()
            )
        floor = sae.threshold.detach().to(dtype) if own and sae.config.has_threshold else 0.0
        return torch.where(h > floor, h, 0).relu()

    r = x
    for operation in policy.operations:
        f = torch.tensor(operation.features)
        a = acts(r, getattr(operation, "active", "relu") == "sae")[..., f]
        value = getattr(operation, operation.per_feature or "", None)
        value = torch.tensor(value or (0.0,) * len(f), dtype=dtype)
        unit = getattr(operation, "unit", "raw")
        value = value if unit == "raw" else value * getattr(sae.stats, unit)[f].to(dtype)
        if operation.op == "enforce":
            v = (operation.magnitude - a).relu()
            moved = r + s * operation.magnitude * (v / v.sum(-1, keepdim=True)) @ D_[f]
            moved = moved * r.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
            r = torch.where(v.sum(-1, keepdim=True) > 0, moved, r)
            continue
        c = {
            "amplify": lambda value=value, a=a: value * a,
            "ablate": lambda a=a: -a,
            "calibrate": lambda value=value, a=a: value - a,
            "add": lambda value=value, a=a: value.expand_as(a),
        }[operation.op]()
        if getattr(operation, "mode", "set") == "floor":
            c = c.relu()
        r = r + s * (c @ D_[f])
    if policy.norm == "preserve":
        r = r * x.norm(dim=-1, keepdim=True) / r.norm(dim=-1, keepdim=True)
    if policy.gate is not None:
        mean = acts(x)[..., torch.tensor(policy.gate.features)].mean(-1, keepdim=True)
        r = torch.where(mean >= policy.gate.above, r, x)
    return r


OPERATIONS = {
    "amplify": amplify([3, 5, 9], [1.5, -0.5, 2.0]),
    "amplify-sae": amplify([3, 5, 9, 11], 1.5, active="sae"),
    "ablate": ablate([3, 7]),
    "set": calibrate([1, 2, 3], [0.0, 2.0, 1.0]),
    "set-max": calibrate([1, 2], 0.5, unit="max"),
    "floor": calibrate([1, 2, 3, 4], 1.0, mode="floor"),
    "floor-mean": calibrate([1, 2, 3, 4], 2.0, mode="floor", unit="mean"),
    "add": add([4, 5], [2.0, -1.0]),
    "add-max": add(8, 0.3, unit="max"),
    "enforce": enforce([6, 7, 8], 1.5),
}
POLICIES = {name: Policy(operation) for name, operation in OPERATIONS.items()} | {
    "order": Policy([add(3, 2.0), amplify(3, 1.0), ablate(5), calibrate([3, 5], 0.7)]),
    "reversed": Policy([calibrate([3, 5], 0.7), ablate(5), amplify(3, 1.0), add(3, 2.0)]),
    "gate": Policy(add(3, 2.0), gate=gate([1, 2, 3], above=0.8)),
    "norm": Policy([add([3, 4], 2.0), enforce(5, 1.0)], norm="preserve"),
    "both": Policy(OPERATIONS["set"], gate=gate(9, above=0.5), norm="preserve"),
    "open": Policy(add(3, 2.0), gate=gate(9, above=0.0)),
}


def through_the_op(sae, policy, x, strengths, capacity=None):
    table = PolicyTable(sae, capacity=capacity or Capacity.of(sae, [policy]))
    slots = torch.full(x.shape[:1], table.acquire(policy), dtype=torch.int32)
    return steer(x, slots, strengths, table.buffers)


def inputs(n=40, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=draw), torch.rand(n, generator=draw) * 1.5


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk", "relu"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_operation_is_its_definition(name, activation, as_good_as_torch):
    sae, (x, s), policy = make_sae(activation), inputs(), POLICIES[name]
    want = oracle(sae, policy, x, s)
    got = through_the_op(sae, policy, x, s)
    as_good_as_torch(got, want, oracle(sae, policy, x, s, torch.float32), name)
    assert not torch.equal(got, x)
    got = through_the_op(sae, policy, x.double(), s)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the packed rows are fp32
    if name in ("gate", "both"):
        closed = (want == x.double()).all(-1)
        assert 0 < closed.sum() < len(x) and torch.equal(got[closed], x.double()[closed])


@pytest.mark.parametrize("name", POLICIES)
def test_membership_of_the_k_largest(name, as_good_as_torch):
    # The operations around the one that needs membership go through the op: all must still compose.
    sae, (x, s) = make_sae("topk"), inputs()
    own = amplify([3, 5, 9, 40, 41, 42], [1.0, -1.0, 2.0, 0.5, 0.5, 0.5], active="sae")
    rest = POLICIES[name]
    policy = Policy([*rest.operations, own, *rest.operations], gate=rest.gate, norm=rest.norm)
    table = PolicyTable(sae)
    assert is_staged(sae, policy) and not is_staged(make_sae("jumprelu"), policy)
    staged = StagedPolicy(table, policy)
    want, by_torch = oracle(sae, policy, x, s), oracle(sae, policy, x, s, torch.float32)
    as_good_as_torch(staged(x, s), want, by_torch, name)
    relu_only = Policy([*rest.operations, amplify(own.features, own.alpha), *rest.operations])
    assert not torch.allclose(oracle(sae, relu_only, x, s), oracle(sae, policy, x, s))
    staged.release()
    assert not any(resident.users for resident in table._residents.values())


def test_half_precision_rows_are_cast_once(as_good_as_torch):
    sae, (x, s) = make_sae(), inputs()
    for half in (torch.bfloat16, torch.float16):
        rough = x.to(half)
        want = oracle(sae, POLICIES["order"], rough, s)
        got = through_the_op(sae, POLICIES["order"], rough, s)
        assert got.dtype == half
        as_good_as_torch(got, want, want.to(half))


def test_weights_in_half_precision_and_an_uncentred_encoder():
    for sae in (make_sae(weights="bfloat16"), make_sae(centred=False)):
        x, s = inputs()
        want = oracle(sae, POLICIES["order"], x, s)
        torch.testing.assert_close(
            through_the_op(sae, POLICIES["order"], x, s).double(), want, rtol=1e-4, atol=1e-4
        )


def test_the_centring_is_folded_in_double_precision():
    sae = make_sae()
    with torch.no_grad():
        sae.b_dec[0], sae.W_enc[3, 0], sae.W_enc[3, 1], sae.b_dec[1] = 1e6, 1e3, 1.0, 0.25
    table = PolicyTable(sae)
    table.acquire(Policy(ablate(3)))
    exact = sae.b_enc[3].double() - sae.W_enc[3].double() @ sae.b_dec.double()
    assert table.buffers.bias[table._rows[(3, False)]] == exact.float()


def test_slots_are_shared_by_content_and_rows_by_feature():
    table = PolicyTable(make_sae())
    first = table.acquire(Policy(amplify([3, 4], 1.0)))
    assert first != 0
    assert table.acquire(Policy(amplify((3, 4), [1, 1]))) == first
    assert table.acquire(Policy(amplify([3, 4], 1.0), name="other")) != first
    table.acquire(Policy([ablate([4, 5]), add([3], 1.0)], gate=gate([3, 5])))
    assert set(table._rows) == {(3, False), (4, False), (5, False)}
    table.acquire(Policy(amplify([3], 1.0, active="sae")))  # the same row behind a threshold
    assert (3, True) in table._rows


def test_buffers_never_move_and_slot_0_stays_empty():
    table = PolicyTable(make_sae(), capacity=Capacity(4, 12, 4, 40))
    before = [t.data_ptr() for t in table.buffers]
    for name in ("order", "gate", "norm", "set", "floor", "add", "enforce"):
        table.acquire(POLICIES[name])
        table.release(POLICIES[name])
        assert [t.data_ptr() for t in table.buffers] == before
        assert not table.buffers.op_kind[0].any() and table.buffers.gate_end[0] == 0
    x, s = inputs()
    untouched = steer(x, torch.zeros(len(x), dtype=torch.int32), s, table.buffers)
    assert torch.equal(untouched, x)


def test_a_released_policy_stays_packed_until_its_room_is_needed():
    table = PolicyTable(make_sae(), capacity=Capacity(max_policies=2, max_features=8))
    a, b, c = Policy(ablate(1)), Policy(ablate(2)), Policy(ablate(3))
    slots = {p.digest: table.acquire(p) for p in (a, b)}
    table.release(a)
    table.release(b)
    assert table.acquire(a) == slots[a.digest]  # nothing was packed again
    assert table.acquire(c) == slots[b.digest]  # b was idle, a is in use
    table.release(a)
    table.release(c)
    table.acquire(a)
    assert table.acquire(b) == slots[b.digest]  # c went, a was used more recently


@pytest.mark.parametrize(
    "capacity,policies,message",
    [
        (Capacity(max_policies=1), [ablate(1), ablate(2)], "max_policies: .* needs 1, and 1 of 1"),
        (
            Capacity(max_features=2),
            [ablate(1), ablate([1, 2, 3])],
            "max_features: .* needs 2, and 1 of 2",
        ),
        (
            Capacity(max_items=3),
            [ablate([1, 2]), ablate([1, 3])],
            "max_items: .* needs 2, and 2 of 3",
        ),
        (
            Capacity(max_operations=1),
            [ablate(1), [ablate(1), ablate(2)]],
            "max_operations: .* needs 2",
        ),
    ],
)
def test_exhausted_capacity_names_the_argument_and_changes_nothing(capacity, policies, message):
    sae, (x, s) = make_sae(), inputs()
    table = PolicyTable(sae, capacity=capacity)
    first, second = (Policy(operations) for operations in policies)
    slots = torch.full((len(x),), table.acquire(first), dtype=torch.int32)
    before = steer(x, slots, s, table.buffers)
    with pytest.raises(FastsaeError, match=f"^{message}.*larger max_"):
        table.acquire(second)
    assert torch.equal(steer(x, slots, s, table.buffers), before)
    assert len(table._residents) == 1


def test_capacity_arguments_are_checked():
    for wrong in (0, -1, 2.5, True, "4"):
        with pytest.raises(FastsaeError, match=r"^max_policies: expected a positive integer"):
            PolicyTable(make_sae(), capacity=Capacity(max_policies=wrong))


def test_the_exact_capacity_is_enough_and_one_less_is_not():
    sae, policies = make_sae(), list(POLICIES.values())
    exact = Capacity.of(sae, policies)
    table = PolicyTable(sae, capacity=exact)
    assert len({table.acquire(policy) for policy in policies}) == len(policies)
    for name, value in exact._asdict().items():
        table = PolicyTable(sae, capacity=exact._replace(**{name: value - 1}))
        with pytest.raises(FastsaeError, match=f"^{name}:"):
            for policy in policies:
                table.acquire(policy)


def test_any_order_of_acquire_and_release_computes_the_right_thing():
    sae, (x, s) = make_sae(), inputs(12)
    table = PolicyTable(sae, capacity=Capacity(5, 14, 4, 30))
    want = {p.digest: oracle(sae, p, x, s) for p in POLICIES.values()}
    held, draw = [], random.Random(0)
    for _ in range(120):
        policy = draw.choice(list(POLICIES.values()))
        if held and draw.random() < 0.5:
            table.release(held.pop(draw.randrange(len(held))))
        try:
            table.acquire(policy)
        except FastsaeError as error:
            assert str(error).startswith("max_")
            continue
        held.append(policy)
        for each in {p.digest: p for p in held}.values():
            slot = table._residents[each.digest].slot
            slots = torch.full((len(x),), slot, dtype=torch.int32)
            got = steer(x, slots, s, table.buffers).double()
            torch.testing.assert_close(got, want[each.digest], rtol=1e-4, atol=1e-4)
    rows = set().union(*(each.lowered.rows for each in table._residents.values()))
    assert rows == set(table._rows)
    assert len(table._free_rows) + len(rows) == table.capacity.max_features


@pytest.mark.parametrize(
    "policy,message",
    [
        (
            Policy([ablate(1), add(F, 1.0)]),
            rf"operations\[1\].features: {F} is out of range.*0 to 60",
        ),
        (Policy(ablate(1), gate=gate([2, 99])), r"gate.features: 99 is out of range"),
        (Policy(ablate([1, 13])), "features: 13 has NaN or infinite weights"),
        (Policy(ablate([1, 14])), "features: 14 has NaN or infinite weights"),
        (Policy(ablate(1), gate=gate(15)), "features: 15 has NaN or infinite weights"),
        (
            Policy(add([1, 16], 1.0, unit="max")),
            r"operations\[0\].unit: feature 16 has a max .* 0.0",
        ),
    ],
)
def test_features_that_cannot_be_steered_are_named(policy, message):
    sae = make_sae()
    with torch.no_grad():
        sae.W_enc[13, 3], sae.W_dec[14, 0], sae.b_enc[15] = torch.nan, torch.inf, torch.nan
        sae.W_enc[20] = torch.nan  # unused: must not matter
    sae.stats.max[16] = 0
    table = PolicyTable(sae)
    with pytest.raises(FastsaeError, match=message):
        table.acquire(policy)
    assert not table._residents and not table._rows
    table.acquire(Policy(ablate([1, 2])))


def test_units_without_statistics_say_how_to_get_them():
    sae = make_sae()
    sae.stats = None
    for operation in (add(1, 1.0, unit="max"), calibrate(1, 1.0, unit="mean")):
        with pytest.raises(FastsaeError, match=r"operations\[0\].unit: .*feature_stats\(sae"):
            PolicyTable(sae).acquire(Policy(operation))


def test_the_op_alone_refuses_top_k_membership():
    with pytest.raises(FastsaeError, match=r'operations\[1\].active: "sae" on a top-k SAE'):
        PolicyTable(make_sae("topk")).acquire(Policy([ablate(1), amplify(1, 1.0, active="sae")]))


def test_a_table_made_in_inference_mode_can_be_updated_outside():
    with torch.inference_mode():
        table = PolicyTable(make_sae())
        table.acquire(Policy(ablate(1)))
    table.acquire(Policy(ablate(2)))
