"""Buffers and op on one layer, without vLLM: rows steered as by the Hugging Face adapter."""

import pytest
import torch
from torch import nn

import fastsae
from fastsae import FastsaeError, Policy
from fastsae.ops import residual
from fastsae.ops.encode import encode_topk
from fastsae.steering.dose import Dose, clamp, relative_change
from fastsae.steering.table import Capacity
from fastsae.steering.vllm.layer import SteeredLayer, residual_parts

D, TOKENS = 48, 32
PLAIN = Policy([fastsae.amplify([1, 5], 4.0), fastsae.add(9, 2.0)], norm="preserve", name="plain")
GATED = Policy(fastsae.add(3, 5.0), gate=fastsae.gate([2, 4], above=0.4), name="gated")
MEMBER = Policy(
    [fastsae.add(2, 1.5), fastsae.amplify(range(20), 3.0, active="sae"), fastsae.ablate(7)],
    name="member",
)
FINISHED = Policy(
    fastsae.amplify(range(30), 3.0, active="sae"),
    gate=fastsae.gate([2, 4, 6], above=0.3),
    norm="preserve",
    name="finished",
)


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    sae = fastsae.SAE(fastsae.SAEConfig(D, 96, k=8))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
    return sae


@pytest.fixture
def layer(sae):
    return SteeredLayer(sae, Capacity(max_policies=8), 1, TOKENS, "cpu", watch=40)


class Decoder(nn.Module):
    """A model of one layer whose output is its input; `steer` hooks it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.weight = nn.Parameter(torch.zeros(1))
        self.layers[0].weight = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.layers[0](x)


def by_hugging_face(sae, policy, strength, x):
    model = Decoder()
    with fastsae.steer(model, sae, policy, layer=0, strength=strength, first_token=True):
        return model(x.unsqueeze(0))[0]


@pytest.mark.parametrize("residual_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["pair", "single", "none"])
def test_rows_are_steered_as_by_the_hugging_face_adapter(sae, layer, form, residual_type):
    hidden, residual = torch.randn(2, 20, D, dtype=residual_type).unbind(0)
    plan = [(2, 6, PLAIN, 1.0), (6, 9, GATED, 0.5), (11, 15, MEMBER, -1.5), (15, 19, FINISHED, 2.0)]
    layer.fill([(a, b, layer.acquire(policy), s) for a, b, policy, s in plan])
    h, r = hidden.clone(), residual.clone()
    output = {"pair": (h, r), "single": h, "none": (h, None)}[form]
    layer.hook(None, (), output)
    x = hidden + residual if form == "pair" else hidden
    total = h + r if form == "pair" else h
    steered = 0
    for begin, end, policy, strength in plan:
        wanted = by_hugging_face(sae, policy, strength, x)[begin:end]
        assert torch.equal(total[begin:end], wanted), policy.label
        steered += int((wanted != x[begin:end]).any(-1).sum())
    assert 8 <= steered < 15  # gates are open on some rows only
    idle = [0, 1, 9, 10, 19]
    assert torch.equal(h[idle], hidden[idle]) and torch.equal(r[idle], residual[idle])


def test_rows_without_a_policy_keep_their_bits_whatever_they_hold(layer):
    hidden, residual = torch.randn(2, 10, D).unbind(0)
    hidden[3], residual[4], hidden[5] = torch.nan, torch.inf, -0.0
    h, r = hidden.clone(), residual.clone()
    layer.fill([(0, 2, layer.acquire(PLAIN), 1.0), (8, 10, layer.acquire(MEMBER), 1.0)])
    layer(h, r)
    for new, old in ((h, hidden), (r, residual)):
        assert torch.equal(new[2:8].view(torch.int32), old[2:8].view(torch.int32))
    layer.fill([])
    assert layer.active.tolist() == [0, 0]
    h, r = hidden.clone(), residual.clone()
    layer(h, r)
    assert torch.equal(h.view(torch.int32), hidden.view(torch.int32))


def test_the_next_forward_forgets_the_rows_of_this_one(sae, layer):
    layer.fill([(0, 4, layer.acquire(PLAIN), 1.0), (4, 6, layer.acquire(MEMBER), 1.0)])
    layer.fill([(5, 6, layer.acquire(PLAIN), 1.0)])
    x = torch.randn(8, D)
    new = x.clone()
    layer(new, None)
    assert torch.equal(new[5:6], by_hugging_face(sae, PLAIN, 1.0, x)[5:6])
    assert torch.equal(new[[0, 1, 2, 3, 4, 6, 7]], x[[0, 1, 2, 3, 4, 6, 7]])


@pytest.mark.parametrize("limit", [None, 0.3])
def test_one_graph_follows_the_buffers(sae, limit):
    """Traced while idle, as vLLM does: the op of every policy, the dose and the watch are in it."""
    dose = None if limit is None else Dose(limit, "clamp")
    layer = SteeredLayer(sae, Capacity(max_policies=8), 1, TOKENS, "cpu", dose, watch=40)

    def forward(h, r):
        layer(h, r)
        return h + r

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for policy in (None, PLAIN, MEMBER, None, FINISHED, MEMBER):
        spans = [] if policy is None else [(1, 5, layer.acquire(policy), 1.0)]
        layer.fill(spans)
        h, r = torch.randn(2, 6, D).unbind(0)
        wanted = h + r
        if policy is not None:
            free = by_hugging_face(sae, policy, 1.0, wanted)[1:5]
            wanted[1:5] = free if limit is None else clamp(wanted[1:5], free, limit)
        assert torch.equal(compiled(h.clone(), r.clone()), wanted)
    counted = {each["policy"]: each["tokens"] for each in layer.numbers().values()}
    assert counted == {"plain": 4, "member": 8, "finished": 4}


def test_nothing_the_graph_captures_looks_at_a_value(sae):
    """Its arithmetic as a GPU runs it, on tensors that hold no values to look at."""
    layer = SteeredLayer(sae, Capacity(), 1, TOKENS, "meta", Dose(0.3, "clamp"), watch=40)
    for kind in (torch.float32, torch.bfloat16):
        layer(torch.empty(6, D, dtype=kind, device="meta"), None)
        parts = (torch.empty(6, D, dtype=kind, device="meta") for _ in range(2))
        residual.steer_residual(*parts, *layer._arguments())


def test_a_step_like_the_last_and_one_after_an_idle_one(sae, layer):
    plan = [(0, 3, layer.acquire(PLAIN), 1.0), (3, 5, layer.acquire(MEMBER), 0.5)]
    x = torch.randn(8, D)
    wanted = None
    for spans in (plan, plan, [], plan[:1], plan):
        layer.fill(list(spans))
        new = x.clone()
        layer(new, None)
        wanted = new if wanted is None else wanted
        end = spans[-1][1] if spans else 0
        assert torch.equal(new[:end], wanted[:end]) and torch.equal(new[end:], x[end:])
        assert layer.active.tolist() == [len(spans) > 0, len(spans) > 1]
    assert not torch.equal(wanted[:5], x[:5])


def test_a_dose_is_clamped_row_by_row_and_idle_rows_keep_their_bits(sae):
    limit, x = 0.3, torch.randn(12, D)
    layer = SteeredLayer(
        sae, Capacity(max_policies=8), 1, TOKENS, "cpu", Dose(limit, "clamp"), watch=40
    )
    plan = [(1, 4, PLAIN, 0.05), (4, 7, PLAIN, 3.0), (7, 10, MEMBER, 4.0)]
    layer.fill([(a, b, layer.acquire(policy), s) for a, b, policy, s in plan])
    new = x.clone()
    layer(new, None)
    assert torch.equal(new[[0, 10, 11]], x[[0, 10, 11]])
    for begin, end, policy, strength in plan:
        free = by_hugging_face(sae, policy, strength, x)[begin:end]
        before = x[begin:end]
        assert torch.equal(new[begin:end], clamp(before, free, limit))
        far = relative_change(before, free) > limit
        assert bool(far.any()) == bool(far.all()) == (strength > 1)
    torch.testing.assert_close(relative_change(x[4:10], new[4:10]), torch.full((6,), limit))
    assert layer.numbers()[PLAIN.digest]["dose"]["max"] == pytest.approx(limit)


def test_what_steering_does_is_added_up_by_policy(sae, layer):
    x, sums = torch.randn(20, D), {policy.label: [0, 0, 0.0] for policy in (PLAIN, GATED, MEMBER)}
    for shift in range(3):
        plan = [(1, 6, PLAIN, 1.0), (7, 12, GATED, 1.0), (13, 14 + shift, MEMBER, 2.0)]
        layer.fill([(a, b, layer.acquire(policy), s) for a, b, policy, s in plan])
        new = x.clone()
        layer(new, None)
        for begin, end, policy, _ in plan:
            moved = relative_change(x[begin:end], new[begin:end])
            into = sums[policy.label]
            into[0] += end - begin
            into[1] += int((moved > 0).sum())
            into[2] += float(moved.sum())
            layer.release(policy)
        layer.fill([])
        layer(new, None)  # a step without steering adds nothing
    numbers = layer.numbers()
    for policy in (PLAIN, GATED, MEMBER):
        seen, (tokens, opened, dose) = numbers[policy.digest], sums[policy.label]
        assert seen["policy"] == policy.label and seen["tokens"] == tokens
        assert seen["dose"]["sum"] == pytest.approx(dose, rel=1e-5) and seen["seconds"] > 0
        if policy.gate is not None:
            assert seen["gate"] == {"opened": opened, "closed": tokens - opened}
            assert 0 < opened < tokens
    centre = sae.b_dec if sae.config.apply_b_dec_to_input else 0
    h = ((x - centre) @ sae.W_enc.T + sae.b_enc).detach()
    watched = numbers[PLAIN.digest]["features"]
    assert set(watched) == {1, 5, 9}
    for feature, each in watched.items():
        wanted = h[1:6, feature].relu()
        assert each["sum"] == pytest.approx(3 * float(wanted.sum()), rel=1e-4, abs=1e-5)
        assert each["max"] == pytest.approx(float(wanted.max()), rel=1e-4, abs=1e-5)
    assert SteeredLayer(sae, Capacity(), 0, TOKENS, "cpu").numbers() == {}


def test_a_policy_that_left_begins_at_nothing_when_it_returns(layer):
    for also, watched in (((), {3, 2, 4}), ((60,), {3, 2, 4, 60})):
        layer.check(GATED, also)
        for _ in range(2):
            layer.fill([(0, 5, layer.acquire(GATED, also), 1.0)])
            layer(torch.randn(8, D), None)
            layer.release(GATED)
        numbers = layer.numbers()[GATED.digest]
        assert numbers["tokens"] == 10 and set(numbers["features"]) == watched
        layer.forget(GATED.digest)
        assert layer.numbers() == {}
    with pytest.raises(FastsaeError, match="features: 96 is out of range"):
        layer.check(GATED, [96])


def test_the_dictionary_is_encoded_only_for_rows_that_ask_for_it(sae, layer, monkeypatch):
    encoded = []

    def counting(x, *arguments, **kinds):
        encoded.append(len(x))
        return encode_topk(x, *arguments, **kinds)

    monkeypatch.setattr(residual, "encode_topk", counting)
    for plan in ([], [(0, 9, PLAIN)], [(0, 9, PLAIN), (9, 12, MEMBER), (12, 14, FINISHED)]):
        layer.fill([(a, b, layer.acquire(policy), 1.0) for a, b, policy in plan])
        layer(torch.randn(20, D), None)
    assert encoded == [5]  # the rows of MEMBER and FINISHED in the last step


def test_slots_are_counted_and_given_back(layer):
    free = len(layer._free_members), len(layer._free_finishes)
    for _ in range(20):  # more often than there are slots
        for policy in (PLAIN, MEMBER, FINISHED):
            first = layer.acquire(policy)
            assert layer.acquire(policy) is first
        for policy in (PLAIN, MEMBER, FINISHED) * 2:
            layer.release(policy)
    assert layer.applied == {}
    assert (len(layer._free_members), len(layer._free_finishes)) == free
    assert all(not resident.users for resident in layer.table._residents.values())


def test_what_does_not_fit_is_refused_with_the_setting_to_change(sae, layer):
    two = Policy([fastsae.amplify(1, 1.0, active="sae"), fastsae.amplify(2, 1.0, active="sae")])
    with pytest.raises(FastsaeError, match=r'membership: .* 2 operations .* allows 1; set "member'):
        layer.check(two)
    with pytest.raises(FastsaeError, match="at most 32"):
        layer.check(Policy(fastsae.amplify(range(33), 1.0, active="sae")))
    with pytest.raises(FastsaeError, match="features: 96 is out of range"):
        layer.check(Policy(fastsae.ablate(96)))
    small = SteeredLayer(sae, Capacity(max_features=4, max_operations=1), 0, TOKENS, "cpu")
    with pytest.raises(FastsaeError, match=r"max_features: .* needs 5, the buffers hold 4"):
        small.check(Policy(fastsae.ablate(range(5))))
    with pytest.raises(FastsaeError, match="max_operations"):
        small.check(Policy([fastsae.ablate(1), fastsae.ablate(2)]))
    with pytest.raises(FastsaeError, match="allows 0"):
        small.check(MEMBER)
    assert small.check(Policy(fastsae.ablate([1, 2]))).items == 2


def test_more_rows_than_buffers_raise(layer):
    layer.fill([(0, 1, layer.acquire(PLAIN), 1.0)])
    with pytest.raises(FastsaeError, match="the buffers hold 32"):
        layer(torch.zeros(TOKENS + 1, D), None)


@pytest.mark.parametrize(
    "output",
    [None, (torch.zeros(2, 3),), (torch.zeros(2, 3), torch.zeros(3, 3)), (torch.zeros(2, 3), "x")],
)
def test_an_unknown_form_of_the_residual_is_refused(output):
    with pytest.raises(FastsaeError, match="knows \\(hidden, residual\\)"):
        residual_parts(output)


def test_its_buffers_are_no_part_of_a_checkpoint(layer):
    assert dict(layer.state_dict()) == {} and list(layer.parameters()) == []
