"""The CUDA C++ kernels of decode and steer, run thread by thread on the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent.parent.parent


# --- what is asked of every backend --------------------------------------------------------------

REUSED = {
    "decode": """
        test_shapes test_types test_wide_rows test_repeated_indices_add_up test_every_memory_layout
        test_leading_dimensions_and_no_entries test_zero_entries_never_meet_the_weights
        test_nan_and_infinity_travel test_cancellation_of_massive_terms
    """,
    "steer": """
        test_every_operation test_one_row_of_every_policy test_widths test_leading_dimensions
        test_rows_without_a_policy_are_bit_identical test_ablate_zeroes_the_activation
        test_a_closed_gate_is_bit_identical_and_an_open_one_acts test_every_memory_layout
        test_zero_strength_changes_nothing_beyond_rounding test_norm_preserve_keeps_the_norm
        test_zero_norms_and_zero_sums_are_guarded
    """,
}


def _module(stem: str):
    spec = importlib.util.spec_from_file_location(f"{stem}_again", TESTS / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reuse(op: str, module) -> dict:
    """The tests of another file, for these kernels."""
    native = pytest.mark.op(op, but=("cuda", "reference", "triton"))
    here = pytest.mark.usefixtures("cuda_is_native")
    return {f"{name}_{op}": here(native(getattr(module, name))) for name in REUSED[op].split()}


steer_tests = _module("test_steer")
globals().update(_reuse("decode", _module("test_decode")))
globals().update(_reuse("steer", steer_tests))


# --- decode --------------------------------------------------------------------------------------


def short(*shape):
    """Numbers of eight bits: products of two are exact, so a sum is rounded once per term."""
    return torch.randn(*shape).bfloat16()


def test_decode_adds_in_the_order_of_the_entries(builds, mixed, threads):
    """Bit for bit, in words of 16 bytes and one by one."""
    threads(1)
    decode = builds["sm_90"].decode
    n, k, f, d = 58, 34, 50, 2304  # enough rows for words of 16 bytes
    values, W = short(n, k).to(mixed[0]), short(f, d).to(mixed[1])
    indices, b = torch.randint(0, f, (n, k), dtype=torch.int32), short(d)
    wanted = torch.zeros(n, d)
    for j in range(k):
        wanted += values[:, j, None].float() * W[indices[:, j]].float()
    wanted = (wanted + b).to(torch.promote_types(*mixed))
    got = decode(values, indices, W, b)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    for row in (0, n - 1):
        assert torch.equal(decode(values[[row]], indices[[row]], W, b)[0], wanted[row])


def test_decode_of_weights_at_odd_addresses(builds, decode_sample, relayout):
    s = decode_sample(58, 3, 2304, 20, dtype=torch.bfloat16)
    even = builds["sm_90"].decode(s.values, s.indices, s.W)
    odd = relayout(s.W, "offset")
    assert odd.data_ptr() % 16
    assert torch.equal(builds["sm_90"].decode(s.values, s.indices, odd), even)


@pytest.mark.parametrize("d", [33, 2304])
def test_decode_shows_an_index_out_of_range(builds, d):
    values, indices, W = torch.randn(57, 35), torch.randint(0, 9, (57, 35)).int(), torch.randn(9, d)
    clean = builds["sm_90"].decode(values, indices, W)
    indices[1, 0], indices[2, 34], indices[3, 33], indices[4, 5] = -1, 9, 2**31 - 1, -(2**31)
    values[4, 5] = clean[4] = 0  # padding is not read
    got = builds["sm_90"].decode(values, indices, W)
    assert got[1:4].isnan().all()
    indices[4, 5] = 0
    clean[4] = builds["sm_90"].decode(values, indices, W)[4]
    assert torch.equal(got[[0, *range(4, 57)]], clean[[0, *range(4, 57)]])


# --- steer ---------------------------------------------------------------------------------------


NOTHING = ([], None, False)
SIZES = [(n, d) for n in (1, 3, 16, 17, 33) for d in (1, 7, 100, 130)]
SIZES += [(1, 640), (16, 640), (33, 640), (3, 1030), (18, 1030), (17, 2304)]


@pytest.mark.parametrize("n,d", SIZES)
def test_steer_of_every_size(cuda_is_native, demanding, as_good_as_torch, n, d):
    steer_tests.check(demanding(n, d), "native", as_good_as_torch)


@pytest.mark.parametrize("n", [2, 19])
def test_steer_of_every_type(cuda_is_native, demanding, as_good_as_torch, dtype, n):
    steer_tests.check(demanding(n, 640, dtype=dtype), "native", as_good_as_torch)


@pytest.mark.parametrize(
    "policies",
    [
        [NOTHING],
        [NOTHING, ([], ([1], -1.0), True), ([], None, True)],  # no operation at all
        [NOTHING, *(([(kind, [(0, 0.5)], 1.0)], None, False) for kind in range(6))],
        [NOTHING, ([(kind % 6, [(kind % 9, 0.1)], 0.4) for kind in range(13)], None, True)],
    ],
    ids=["one slot", "no operations", "one operation", "13 operations"],
)
def test_tables_of_every_shape(cuda_is_native, steer_sample, as_good_as_torch, policies):
    for n, d in ((3, 37), (18, 132)):
        s = steer_sample(n, d, policies=policies)
        steer_tests.check(s, "native", as_good_as_torch)


@pytest.mark.parametrize("d", [100, 640])
def test_a_row_does_not_depend_on_the_rows_beside_it(cuda, demanding, d):
    s = demanding(19, d)
    together = cuda.steer_sample(s)  # groups of four
    sixteen = cuda.steer_sample(s, slice(16))
    assert torch.equal(sixteen, together[:16])
    for i in range(0, 19, 3):
        alone = cuda.steer_sample(s, [i])
        assert torch.equal(alone[0], together[i])
    rest = torch.arange(19) % 3 != 0
    s.x[0::6], s.x[3::6, 5] = torch.nan, torch.inf
    assert torch.equal(cuda.steer_sample(s)[rest], together[rest])


@pytest.mark.parametrize("n", [5, 18])
def test_a_wrong_slot_makes_its_row_nan(cuda, demanding, n):
    s = demanding(n, 640)
    clean, wrong = cuda.steer_sample(s), torch.tensor([0, 2, 3, n - 1])
    s.slots[wrong] = torch.tensor([-1, 6, 2**31 - 1, -(2**31)], dtype=torch.int32)
    got, right = cuda.steer_sample(s), torch.ones(n).bool().index_fill(0, wrong, False)
    assert got[wrong].isnan().all() and torch.equal(got[right], clean[right])


@pytest.mark.parametrize("n", [2, 17])
@pytest.mark.parametrize("d", [130, 132, 636])  # a block's columns go beyond the last
def test_weights_that_no_item_names_are_not_used(cuda, steer_sample, n, d):
    """Not even times zero: the row behind the one that is read may hold anything."""
    operations = [(kind, [(1, 0.5)], 0.7) for kind in (1, 2, 3, 4, 5)]
    s = steer_sample(n, d, 4, policies=[NOTHING, (operations, ([1], -1.0), True)])
    s.slots[:] = 1
    clean = cuda.steer_sample(s)
    for weights in (s.table.enc, s.table.dec):
        weights[[0, 2, 3]] = torch.tensor([torch.inf, torch.nan, -torch.inf])[:, None]
    assert torch.equal(cuda.steer_sample(s), clean) and clean.isfinite().all()


@pytest.mark.parametrize("n", [2, 17])
@pytest.mark.parametrize("d", [37, 130, 132, 636])
def test_an_infinite_weight_meets_no_padding(cuda, steer_sample, n, d):
    """∞ · 0 would be NaN, for which no gate opens; ∞ itself is above anything."""
    s = steer_sample(n, d, policies=[NOTHING, ([(4, [(0, 1.0)], 0.0)], ([1], 1e30), False)])
    s.slots[:], s.strengths[:] = 1, 1.0
    columns = [0, 1, 2, 3, -1]  # what is read in the place of none, and another block's
    s.table.enc[1, columns], s.x[:, columns] = torch.inf, 1.0
    torch.testing.assert_close(cuda.steer_sample(s), s.x + s.table.dec[0])
    s.x[:, 0] = torch.nan  # NaN is not: no bit of the row changes
    assert torch.equal(cuda.steer_sample(s).view(torch.int32), s.x.view(torch.int32))


def test_a_direction_that_is_not_active_may_hold_anything(cuda, steer_sample):
    policies = [NOTHING, ([(1, [(0, 1.0), (1, 1.0)], 0.0)], None, False)]
    s = steer_sample(18, 640, 4, policies=policies)
    s.slots[:], s.table.bias[1] = 1, -1e9
    clean = cuda.steer_sample(s)
    s.table.dec[1] = torch.nan
    assert torch.equal(cuda.steer_sample(s), clean)
    s.table.dec[0, 7] = torch.inf
    got, columns = cuda.steer_sample(s), torch.arange(640) != 7
    assert torch.equal(got[:, columns], clean[:, columns]) and not got[:, 7].isfinite().all()


@pytest.mark.parametrize("d", [7, 640])
def test_weights_at_odd_addresses(cuda_is_native, demanding, relayout, as_good_as_torch, d):
    s = demanding(18, d)
    odd = {name: relayout(getattr(s.table, name), "offset") for name in ("enc", "dec")}
    s.table = s.table._replace(**odd)
    steer_tests.check(s, "native", as_good_as_torch)


def test_blocks_alone_and_in_clusters_agree(builds, demanding):
    for n, d in ((3, 100), (18, 100), (3, 1030), (18, 640)):
        s = demanding(n, d)
        alone, together = (build.steer_sample(s) for build in builds.values())
        torch.testing.assert_close(alone, together)
        assert d > 128 or torch.equal(alone, together)  # narrow rows need no cluster


def test_rows_too_wide_for_four_or_for_any(builds, demanding):
    """Without clusters all of a row, and what is added to it, lies in the memory of one block."""
    cuda, s = builds["sm_80"], demanding(17, 5376)
    got = cuda.steer_sample(s)
    for i in (0, 16):
        assert torch.equal(cuda.steer_sample(s, [i])[0], got[i])
    one = torch.ones(1, 1)
    assert cuda.decode(one, one.int() - 1, one) == 1  # no error is left for the next launch
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        cuda.steer_sample(demanding(1, 20_900))


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_threads_changes_no_bit(cuda, demanding, decode_sample, order):
    for n, d in ((3, 130), (17, 640)):
        s, t = demanding(n, d, dtype=torch.bfloat16), decode_sample(n, 40, d, 50)
        cuda.schedule()
        steered, decoded = cuda.steer_sample(s), cuda.decode(t.values, t.indices, t.W, t.b_dec)
        cuda.schedule(order)
        assert torch.equal(cuda.steer_sample(s), steered)
        assert torch.equal(cuda.decode(t.values, t.indices, t.W, t.b_dec), decoded)


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("x", torch.zeros(3, 4, 48), "x: expected 2 contiguous dimensions"),
        ("x", torch.zeros(48, 3).T, "x: expected 2 contiguous dimensions"),
        ("x", torch.zeros(3, 48).double(), "x: expected float32, bfloat16 or float16"),
        ("x", torch.zeros(3, 47), "table: expected enc of the width of x"),
        ("slots", torch.zeros(3), "slots: expected 3 contiguous elements of int32"),
        ("strengths", torch.zeros(2), "strengths: expected 3 contiguous elements of float32"),
        ("dec", torch.zeros(8, 48), "dec: expected 432 contiguous elements of float32"),
        ("gate_above", torch.zeros(6).int(), "gate_above: expected 6 contiguous elements"),
    ],
)
def test_steer_refuses_what_does_not_fit(cuda, steer_sample, name, value, words):
    s = steer_sample(3)
    if name in s.table._fields:
        name, value = "table", s.table._replace(**{name: value})
    with pytest.raises(RuntimeError, match=words):
        cuda.steer_sample(s, **{name: value})
