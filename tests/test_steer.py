"""steer against a float64 oracle that walks every row's operations in plain Python."""

import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops import BackendError
from fastsae.ops.backend import supported

pytestmark = pytest.mark.op("steer")


def oracle(s, dtype=torch.float64):
    """MATH.md §4, a row at a time; `dtype` is the type of every product and sum."""
    t = s.table
    enc, bias, theta, dec = (v.to(dtype) for v in (t.enc, t.bias, t.theta, t.dec))

    def act(r, row):
        h = enc[row] @ r + bias[row]
        return torch.zeros_like(h) if h <= theta[row].clamp(min=0) else h

    rows = []
    for x, slot, strength in zip(s.x, s.slots.tolist(), s.strengths.tolist(), strict=True):
        operations, gate, keep_norm = s.policies[slot]
        x0 = r = x.to(dtype)
        if slot == 0 or (
            gate and not torch.stack([act(x0, row) for row in gate[0]]).mean() >= gate[1]
        ):
            rows.append(x)
            continue
        for kind, entries, scalar in operations:
            if entries:
                a = [(act(r, row), row, value) for row, value in entries]
                r = apply(kind, r, a, dec, scalar, strength)
        if keep_norm and r.norm() > 0:
            r = r * (x0.norm() / r.norm())
        rows.append(r.to(s.x.dtype) if dtype != torch.float64 else r)
    return torch.stack([row.to(dtype) for row in rows]) if rows else s.x.to(dtype)


def apply(kind, r, a, dec, scalar, strength):
    if kind == 5:
        v = [(scalar - act).clamp(min=0) for act, _, _ in a]
        total = sum(v)
        if not total > 0:
            return r
        moved = r + strength * scalar * sum(
            w / total * dec[i] for w, (_, i, _) in zip(v, a, strict=True)
        )
        return moved * (r.norm() / moved.norm()) if moved.norm() > 0 else r
    coefficient = {
        0: lambda act, value: 0 * act,
        1: lambda act, value: value * act,
        2: lambda act, value: value - act,
        3: lambda act, value: (value - act).clamp(min=0),
        4: lambda act, value: value,
    }[kind]
    return r + strength * sum(coefficient(act, value) * dec[i] for act, i, value in a)


def check(s, backend, close):
    before = s.x.clone()
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    assert got.dtype == s.x.dtype and got.shape == s.x.shape
    assert torch.equal(s.x, before), "x was written"
    close(got, oracle(s), oracle(s, torch.float32))
    idle = s.slots == 0
    assert torch.equal(got[idle], s.x[idle]), "a row without a policy changed"
    return got


@pytest.mark.parametrize("n", [0, 1, 13, 37])
def test_every_operation(steer_sample, as_good_as_torch, n, device, backend):
    got = check(steer_sample(n, device=device), backend, as_good_as_torch)
    if n == 37:
        s = steer_sample(n, device=device)
        changed = (got != s.x).any(1)
        assert all(changed[s.slots == slot].any() for slot in range(1, 6)), "a slot does nothing"


@pytest.mark.parametrize("slot", range(1, 6))
@pytest.mark.parametrize("kind", ["normal", "massive"])
def test_one_row_of_every_policy(
    steer_sample, as_good_as_torch, slot, kind, dtype, device, backend
):
    s = steer_sample(1, kind=kind, dtype=dtype, device=device)
    s.slots[:] = slot
    check(s, backend, as_good_as_torch)


@pytest.mark.parametrize("d", [1, 37, 640, 2304])
def test_widths(steer_sample, as_good_as_torch, d, device, backend):
    check(steer_sample(7, d, device=device), backend, as_good_as_torch)


def test_rows_without_a_policy_are_bit_identical(steer_sample, dtype, device, backend):
    """NaN payloads, infinities and −0.0 included."""
    s = steer_sample(6, dtype=dtype, device=device)
    s.slots[:] = 0
    s.x[0, 0], s.x[1, 1], s.x[2, 2] = float("nan"), -float("inf"), -0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    assert torch.equal(got.view(bits), s.x.view(bits))
    assert got.data_ptr() != s.x.data_ptr()


def test_a_closed_gate_is_bit_identical_and_an_open_one_acts(steer_sample, device, backend):
    s = steer_sample(5, device=device)
    s.slots[:] = 3
    for above, moves in ((1e9, False), (-1.0, True), (0.0, True)):
        s.table.gate_above[3] = above
        got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
        assert (got != s.x).any() == moves
        assert moves or torch.equal(got, s.x)
    s.x[1] = float("nan")  # the mean is NaN, which is not above anything
    s.table.gate_above[3] = 0.0
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    assert got[1].isnan().all() and torch.isfinite(got[[0, 2, 3, 4]]).all()


def test_ablate_zeroes_the_activation(steer_sample, device, backend):
    """α = −1 with a unit decoder row equal to the encoder row removes the feature exactly."""
    s = steer_sample(9, device=device)
    unit = s.table.enc[0] / s.table.enc[0].norm()
    s.table.enc[0], s.table.dec[0], s.table.bias[0], s.table.theta[0] = unit, unit, 0.0, 0.0
    s.table.item_value[0] = -1.0
    s.table.op_end[1, 0] = s.table.op_begin[1, 0] + 1
    s.slots[:], s.strengths[:] = 1, 1.0
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    before = s.x @ unit
    assert (before > 0.05).any()
    assert ((got @ unit)[before > 0].abs() < 1e-6).all()
    assert torch.equal(got[before <= 0], s.x[before <= 0])


def test_zero_strength_changes_nothing_beyond_rounding(steer_sample, device, backend):
    s = steer_sample(13, device=device)
    s.strengths[:] = 0
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    torch.testing.assert_close(got, s.x, rtol=1e-6, atol=1e-7)


def test_zero_norms_and_zero_sums_are_guarded(steer_sample, device, backend):
    """A zero row, Σv = 0 in enforce, and a residual that operations bring to zero: no NaN."""
    s = steer_sample(13, device=device)
    s.x[:6] = 0
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    assert torch.isfinite(got).all()
    s.slots[:] = 5
    s.table.bias[1] = 1e6  # a ≫ m: v = 0
    s.table.op_kind[5, 2] = 0
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    torch.testing.assert_close(got, s.x, rtol=1e-6, atol=1e-7)


def test_norm_preserve_keeps_the_norm(steer_sample, device, backend):
    s = steer_sample(13, device=device)
    s.slots[:] = 2
    got = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    assert (got != s.x).any(1).any()
    torch.testing.assert_close(got.norm(dim=1), s.x.norm(dim=1))


def test_leading_dimensions(steer_sample, device, backend):
    s = steer_sample(12, device=device)
    flat = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    cube = ops.steer(
        s.x.view(3, 4, -1), s.slots.view(3, 4), s.strengths.view(3, 4), s.table, backend=backend
    )
    assert torch.equal(cube.view(12, -1), flat)
    one = ops.steer(s.x[1], s.slots[1], s.strengths[1], s.table, backend=backend)
    assert torch.equal(one, flat[1]) or backend == "reference"
    assert ops.steer(s.x[:0], s.slots[:0], s.strengths[:0], s.table, backend=backend).shape == (
        0,
        48,
    )


def test_every_memory_layout(steer_sample, relayout, layout, device, backend):
    s = steer_sample(12, device=device)
    x = relayout(s.x, layout)
    got = ops.steer(x, s.slots.long(), s.strengths.double(), s.table, backend=backend)
    plain = ops.steer(x.clone(), s.slots, s.strengths, s.table, backend=backend)
    assert torch.equal(got, plain)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (3, 4), (0,), (2, 0, 3)])
def test_the_short_way_serves_what_the_long_way_serves(steer_sample, shape, dtype, device):
    """With the same bits, gradients or not."""
    s = steer_sample(torch.Size(shape).numel(), dtype=dtype, device=device)
    x, slots, strengths = s.x.view(*shape, 48), s.slots.view(shape), s.strengths.view(shape)
    wanted = torch.ops.fastsae.steer(s.x, s.slots, s.strengths, list(s.table), "").view(x.shape)
    for arguments in (
        (x, slots, strengths),
        (x, slots.long(), strengths.double()),
        (x.mT.contiguous().mT if shape else x, slots, strengths),
        (x.requires_grad_(), slots, strengths),
    ):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                got = ops.steer(*arguments, s.table)
            assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
            assert torch.equal(got, wanted) and not got.requires_grad


def test_the_environment_still_chooses(steer_sample, monkeypatch, device):
    s = steer_sample(device=device)
    monkeypatch.setenv("FASTSAE_BACKEND", "none such")
    with pytest.raises(BackendError, match="none such"):
        ops.steer(s.x, s.slots, s.strengths, s.table)


def test_fake_tensors_stay_fake(steer_sample, device):
    s = steer_sample(5, device=device)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = ops.steer(mode.from_tensor(s.x), s.slots, s.strengths, s.table)
    assert isinstance(got, torch._subclasses.FakeTensor) and got.shape == s.x.shape


def test_process_wide_modes(steer_sample, process_mode, mode, device, backend):
    s = steer_sample(device=device)
    plain = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    with process_mode(mode, device):
        again = ops.steer(s.x, s.slots, s.strengths, s.table, backend=backend)
    assert torch.equal(plain, again)


def test_no_gradient(steer_sample, device, backend):
    s = steer_sample(device=device)
    x = s.x.requires_grad_()
    got = ops.steer(x, s.slots, s.strengths, s.table, backend=backend)
    with pytest.raises(RuntimeError, match="does not require grad"):
        got.sum().backward()


def test_opcheck(steer_sample, device, backend):
    s = steer_sample(5, 8, device=device)
    op = torch.ops.fastsae.steer.default
    torch.library.opcheck(op, (s.x, s.slots, s.strengths, list(s.table), backend))


def test_compiles_to_one_graph_for_every_batch_size(steer_sample, count_compiles, device, backend):
    table = steer_sample(device=device).table

    def run(x, slots, strengths):
        return ops.steer(x + 0, slots, strengths, table, backend=backend)

    compiled, counter = count_compiles(run)
    for n in (3, 5, 8, 13):
        s = steer_sample(n, device=device)
        assert torch.equal(compiled(s.x, s.slots, s.strengths), run(s.x, s.slots, s.strengths))
    assert counter.frame_count <= 2, "a new N recompiled"


def test_errors_name_the_argument_and_the_fix(steer_sample):
    s = steer_sample()
    for arguments, words in (
        ((s.x[:, :5], s.slots, s.strengths), ["x: got shape [13, 5]", "[..., 48]"]),
        ((s.x, s.slots[:3], s.strengths), ["slots, strengths: got shapes [3] and [13]", "[13]"]),
        ((s.x, s.slots, s.strengths[:, None]), ["[13, 1]", "one entry per row of x"]),
        ((s.x.int(), s.slots, s.strengths), ["x: got dtype torch.int32"]),
        ((s.x, s.slots.to("meta"), s.strengths), ["slots on meta", ".to(device)"]),
    ):
        with pytest.raises(FastsaeError) as error:
            ops.steer(*arguments, s.table)
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "field,at,value,words",
    [
        ("op_end", (1, 0), 10_000, "op_begin, op_end: got 0 to 10000"),
        ("op_begin", (1, 0), -1, "op_begin, op_end: got -1 to 2"),
        ("item_row", 1, 9, "item_row: got values from 0 to 9, expected 0 to 8"),
        ("item_row", 0, -1, "item_row: got values from -1"),
        ("gate_end", 1, 10_000, "gate_begin, gate_end: got 2 to 10000"),
    ],
)
def test_native_checks_what_a_slot_reads(steer_sample, field, at, value, words):
    """At every call, because the contents of a table may change between two."""
    if "native" not in supported("steer"):
        pytest.skip("native is not built")
    s = steer_sample(1)

    def run(slot):
        s.slots[:] = slot
        return ops.steer(s.x, s.slots, s.strengths, s.table, backend="native")

    before = {slot: run(slot) for slot in (0, 1, 2)}
    kept = getattr(s.table, field)[at].clone()
    getattr(s.table, field)[at] = value
    with pytest.raises(RuntimeError, match=words):
        run(1)
    for slot in (0, 2):  # they read other entries
        assert torch.equal(run(slot), before[slot])
    getattr(s.table, field)[at] = kept
    assert torch.equal(run(1), before[1])


def test_native_checks_slots_and_the_table(steer_sample):
    if "native" not in supported("steer"):
        pytest.skip("native is not built")
    s, t = steer_sample(3), steer_sample().table
    for slot in (-1, 6):
        with pytest.raises(RuntimeError, match=f"slots: got values from .*{slot}.*expected 0 to 5"):
            ops.steer(s.x, torch.tensor([0, slot, 1]), s.strengths, t, backend="native")
    for wrong, words in (
        (t._replace(dec=t.dec[:5]), "dec: expected the rows of enc"),
        (t._replace(op_end=t.op_end[:3]), "op_end: expected as many slots as op_kind"),
        (t._replace(item_value=t.item_value[:3]), "item_value: expected a last dimension"),
        (t._replace(gate_end=t.gate_end.long()), "gate_end: expected int32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.steer(s.x, s.slots, s.strengths, wrong, backend="native")
