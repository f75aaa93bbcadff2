"""What the watch adds up, against one token and one feature at a time in float64."""

import collections
import math

import pytest
import torch

from fastsae import SAE, SAEConfig, gate
from fastsae.errors import FastsaeError
from fastsae.ops.watch import watch_
from fastsae.steering import Policy, ablate, add, amplify
from fastsae.steering.watch import Watch

D, F = 32, 64


@pytest.fixture
def sae():
    torch.manual_seed(3)
    sae = SAE(SAEConfig(D, F, "jumprelu"))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.3)
        sae.b_dec.normal_(0, 0.3)
        sae.threshold.uniform_(0.1, 0.8)
    return sae


POLICIES = [
    Policy(amplify([1, 2], 3.0), name="a", version="1"),
    Policy([add(3, 5.0), ablate([1, 4])], gate=gate([5, 6, 7], 0.4), name="b"),
    Policy(ablate(8), gate=gate(8, -1.0), name="c"),
]


def one_by_one(sae, x, r, policies, also=()):
    """{digest: numbers} of x, r [N, D] and a policy or None for each row, as the words have it."""
    W, b, b_dec, theta = (
        t.detach().double() for t in (sae.W_enc, sae.b_enc, sae.b_dec, sae.threshold)
    )
    found = collections.defaultdict(lambda: collections.defaultdict(float))
    for before, after, policy in zip(x.double(), r.double(), policies, strict=True):
        if policy is None:
            continue
        n = found[policy.digest]
        if not (before.isfinite().all() and after.isfinite().all()):
            n["not_finite"] += 1
            continue
        n["tokens"] += 1
        dose = float((after - before).norm() / before.norm())
        n["dose sum"] += dose
        n["dose max"] = max(n["dose max"], dose)
        h = W @ (before - b_dec) + b
        if policy.gate is not None:
            mean = sum(max(0.0, float(h[f])) for f in policy.gate.features)
            n["opened"] += mean / len(policy.gate.features) >= policy.gate.above
        for f in {f for op in policy.operations for f in op.features} | set(also):
            a = float(h[f]) if h[f] > theta[f] else 0.0
            n[f] += a
            n["max", f] = max(n["max", f], a)
    return found


def agree(read, want):
    assert read["tokens"] == want["tokens"] and read["not_finite"] == want["not_finite"]
    near = {"rel_tol": 2e-5, "abs_tol": 1e-5}
    assert math.isclose(read["dose"]["sum"], want["dose sum"], **near)
    assert math.isclose(read["dose"]["max"], want["dose max"], **near)
    if read["gate"] is not None:
        opened = want["opened"]
        assert read["gate"] == {"opened": opened, "closed": want["tokens"] - opened}
    for feature in (f for f in want if isinstance(f, int)):
        one = read["features"][feature]
        assert math.isclose(one["sum"], want[feature], **near), feature
        assert math.isclose(one["max"], want["max", feature], **near), feature


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_several_policies_over_several_forwards(sae, kind):
    watch = Watch(sae, policies=4, features=8)
    slot = {p.digest: watch.acquire(p, also=[9]) for p in POLICIES}
    given, rows = [*POLICIES, None], []
    table = watch.table
    before = [t.data_ptr() for t in table]
    for tokens in (1, 7, 50):
        policies = [given[(i * 7 + tokens) % 4] for i in range(tokens)]
        x = (torch.randn(tokens, D) * 2).to(kind)
        r = x.clone()
        for i, policy in enumerate(policies):
            # The gates of b decide whether its tokens move; nobody moves the tokens without one.
            if policy is not None and policy.name != "b":
                r[i] += torch.randn(D).to(kind)
        x[-1, 3], r[0, 4] = (float("nan"), float("inf")) if tokens > 1 else (x[-1, 3], r[0, 4])
        slots = torch.tensor([0 if p is None else slot[p.digest] for p in policies])
        watch_(x.view(1, tokens, D), r.view(1, tokens, D), slots.view(1, -1).int(), table)
        rows.append((x, r, policies))
    x, r = (torch.cat([each[i] for each in rows]) for i in (0, 1))
    policies = [policy for each in rows for policy in each[2]]
    want = one_by_one(sae, x, r, policies, also=[9])
    read = watch.read()
    assert [each["policy"] for each in read.values()] == ["a@1", "b", "c"]
    assert sum(each["not_finite"] for each in read.values()) > 1
    assert 0 < read[POLICIES[1].digest]["gate"]["opened"] < read[POLICIES[1].digest]["tokens"]
    for policy in POLICIES:
        agree(read[policy.digest], want[policy.digest])
    assert before == [t.data_ptr() for t in watch.table]


def test_numbers_are_the_same_bits_again_and_in_a_graph(sae):
    def numbers(run):
        torch.manual_seed(0)
        watch = Watch(sae, policies=3)
        slots = torch.tensor([watch.acquire(p) for p in POLICIES] * 5 + [0])
        for _ in range(3):
            x = torch.randn(16, D)
            run(x, x + torch.randn(16, D), slots, watch.table)
        return watch.read()

    assert numbers(watch_) == numbers(watch_)
    compiled = torch.compile(watch_, fullgraph=True, backend="aot_eager")
    assert numbers(watch_) == numbers(compiled)


def test_a_token_at_the_origin_has_a_dose_that_spoils_no_sum(sae):
    watch, x = Watch(sae, policies=2), torch.zeros(3, D)
    slots = torch.tensor([watch.acquire(POLICIES[0]), watch.acquire(POLICIES[2]), 1])
    slots[2] = slots[1]
    r = x.clone()
    r[0, 0] = 1.0
    x[1], r[1], r[2] = 1.0, 2.0, 0.0
    watch_(x, r, slots, watch.table)
    doses = [each["dose"] for each in watch.read().values()]
    assert doses[0]["max"] == torch.finfo(torch.float32).max
    assert doses[1] == {"sum": 1.0, "max": 1.0}


def test_a_policy_never_inherits_the_numbers_of_another(sae):
    watch, x = Watch(sae, policies=2), torch.randn(4, D)
    first, second, third = POLICIES

    def run(policy):
        slot = watch.acquire(policy)
        watch_(x, x + 1, torch.full((4,), slot), watch.table)
        return slot

    run(first)
    watch.forget(first.digest)  # while rows have it
    assert watch.read()[first.digest]["tokens"] == 0
    taken = run(second)
    with pytest.raises(FastsaeError, match=r"max_policies: 2 policies are in use"):
        watch.acquire(third)
    assert third not in watch and second in watch
    watch.release(second)
    assert watch.read()[second.digest]["tokens"] == 4  # it stays while there is room
    assert watch.acquire(third) == taken
    read = watch.read()
    assert second.digest not in read and read[third.digest]["tokens"] == 0
    assert read[third.digest]["features"] == {8: {"sum": 0.0, "max": 0.0}}
    watch.release(third)
    watch.forget(third.digest)
    watch.forget(third.digest)
    assert third not in watch
    assert watch.acquire(second) == taken and watch.read()[second.digest]["tokens"] == 0
    watch.release(second)
    assert watch.acquire(second) == taken and watch.read()[second.digest]["tokens"] == 0


def test_features_beyond_the_buffers_are_named(sae):
    policy = Policy(ablate([1, 2, 3, 4]), gate=gate([5, 6]))
    watch = Watch(sae, policies=1, features=3)
    watch.acquire(policy)
    (read,) = watch.read().values()
    assert list(read["features"]) == [5, 6, 1] and read["left_out"] == [2, 3, 4]
    assert read["gate"] == {"opened": 0, "closed": 0}
    watch = Watch(sae, policies=1, features=1)
    watch.acquire(policy)
    (read,) = watch.read().values()
    assert read["gate"] == {}
    with pytest.raises(FastsaeError, match="features: 64 is out of range"):
        watch.acquire(POLICIES[0], also=[64])
