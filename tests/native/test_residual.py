"""The compiled work around steer on a CPU, against the plain torch that does the same elsewhere."""

import pytest
import torch

import fastsae
from fastsae.ops import residual, watch
from fastsae.steering.table import Capacity, PolicyTable
from fastsae.steering.watch import Watch

D, F, ROWS, ROOM = 37, 64, 21, 32
ops = torch.ops.fastsae


@pytest.fixture(params=[False, True], ids=["one tensor", "pair"])
def parts(request, dtype, isa):
    torch.manual_seed(5)
    hidden, other = (3 * torch.randn(2, ROWS, D)).to(dtype).unbind(0)
    hidden[3, 2], hidden[4, 0], hidden[5, 1] = torch.nan, torch.inf, -0.0
    slots = torch.zeros(ROOM, dtype=torch.int32)
    slots[[1, 2, 3, 4, 5, 11, ROWS - 1, ROWS]] = torch.tensor([1, 2, 1, 3, 2, 3, 1, 1]).int()
    finish = torch.zeros(ROOM, dtype=torch.int32)
    finish[[7, 11]] = 1
    return hidden, other.clone() if request.param else None, slots, torch.rand(ROOM), finish


@pytest.mark.parametrize("finished", [False, True])
def test_rows_that_have_something_to_do_are_taken(parts, finished):
    *given, finish = parts
    finish, watched = finish if finished else None, torch.arange(ROOM, dtype=torch.int32)
    got = ops._residual_rows(*given, finish, watched)
    want = residual._take_some(*given, finish, watched)
    assert got[1].tolist() == [1, 2, 3, 4, 5, *([7] if finished else []), 11, ROWS - 1]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert not ops._residual_rows(*given, finish, None)[4].any()
    nobody = torch.zeros_like(given[2])
    assert ops._residual_rows(given[0], given[1], nobody, given[3], None, None)[0].shape == (0, D)


def test_changed_rows_are_put_back_and_no_other_bit_is(parts):
    hidden, other, slots, strengths, _ = parts
    x, index, *_ = residual._take_some(hidden, other, slots, strengths, None, None)
    y = x.clone()
    y[1:3] += 1
    y[-1, -1] += 2
    watched = torch.tensor([0, 1, 1, 2, 1, 0, 2], dtype=torch.int32)
    found = []
    for put in (ops._residual_put, residual._put_some):
        h, r = hidden.clone(), None if other is None else other.clone()
        seconds = torch.full((4,), 0.5, dtype=torch.float64)
        put(h, r, x, y, index, watched, seconds, 0.25)
        found.append((h, r, seconds))
    (h, r, seconds), (h2, r2, seconds2) = found
    assert torch.equal(h.view(torch.uint8), h2.view(torch.uint8))
    assert other is None or torch.equal(r.view(torch.uint8), r2.view(torch.uint8))
    torch.testing.assert_close(seconds, seconds2)
    total = h if other is None else r
    assert torch.equal(total[[2, ROWS - 1]], y[[1, -1]])
    still = [0, 1, 4, 6, 7, 8]
    assert torch.equal(h[still].view(torch.uint8), hidden[still].view(torch.uint8))


def test_what_is_watched_adds_up_alike(dtype, isa):
    torch.manual_seed(6)
    sae = fastsae.SAE(fastsae.SAEConfig(D, F, "jumprelu"))
    with torch.no_grad():
        sae.threshold.uniform_(0.1, 0.5)
    policies = [
        fastsae.Policy(fastsae.add([1, 2, 3], 2.0), gate=fastsae.gate([4, 5], 0.2), name="a"),
        fastsae.Policy(fastsae.ablate(7), name="b"),
    ]
    tables = [Watch(sae, policies=3, features=6) for _ in range(2)]
    slots = torch.tensor([[table.acquire(policy) for policy in policies] for table in tables])
    each = torch.cat([slots[0].repeat(20), torch.zeros(3, dtype=torch.long)])
    x = (2 * torch.randn(len(each), D)).to(dtype)
    r = x.clone()
    r[::3] += torch.randn(D).to(dtype)
    x[5, 1], r[6, 0], x[7], r[7] = torch.nan, torch.inf, 0, 1
    for _ in range(2):
        watch.watch_(x.view(1, -1, D), r.view(1, -1, D), each.view(1, -1), tables[0].table)
        watch.watch(x, r, each, tables[1].table)
    for slot in set(slots[0].tolist()):
        torch.testing.assert_close(
            tables[0].table.sums[slot], tables[1].table.sums[slot], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(tables[0].table.maxima[slot], tables[1].table.maxima[slot])
    assert tables[0].table.sums[:, 1].sum() == 4 and 0 < tables[0].table.sums[slots[0, 0], 2] < 40


def test_tensors_that_do_not_fit_are_refused(parts):
    hidden, _, slots, strengths, _ = parts
    x, index, _, _, seen = ops._residual_rows(hidden, None, slots, strengths, None, None)
    few = slots[:8], strengths[:8]
    for words, op, arguments in (
        ("the buffers hold 8", ops._residual_rows, (hidden, None, *few, None, None)),
        ("strengths", ops._residual_rows, (hidden, None, slots, few[1], None, None)),
        ("residual: expected", ops._residual_rows, (hidden, x, slots, strengths, None, None)),
        ("index: ", ops._residual_put, (hidden, None, x, x, index + ROWS, seen, None, 0.0)),
        ("x, y", ops._residual_put, (hidden, None, x[1:], x, index, seen, None, 0.0)),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*arguments)


@pytest.mark.parametrize("how", ["strides", "types"])
def test_what_compiled_code_does_not_take_is_steered_all_the_same(how):
    torch.manual_seed(7)
    sae = fastsae.SAE(fastsae.SAEConfig(D, F, "relu"))
    table = PolicyTable(sae, capacity=Capacity(2, 8, 2, 8))
    slot = table.acquire(fastsae.Policy(fastsae.add([1, 2], 3.0)))
    hidden, other = torch.randn(2, ROWS, D)
    slots = torch.tensor([0, slot, slot] * (ROWS // 3), dtype=torch.int32)
    rest = torch.tensor([1, 0], dtype=torch.int32), slots, torch.ones(ROWS), list(table.buffers)
    found = []
    for like in (torch.Tensor.clone, unlike[how]):
        h, r = hidden.clone(), like(other)
        torch.ops.fastsae.steer_residual_(h, r, *rest, None, [], 0, 0.0, None, [], None, None, None)
        found.append((h, r.float()))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.equal(found[0][0], hidden)


unlike = {
    "strides": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "types": torch.Tensor.double,
}
