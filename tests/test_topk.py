"""topk: exact selection, ties to the lower index, NaN never lost."""

import numpy as np
import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops import BackendError
from fastsae.ops.backend import interpreting

pytestmark = pytest.mark.op("topk")


def oracle(x: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest: NaN first, then by value, then by index (−0.0 equals 0.0)."""
    rows = x.double().cpu().numpy().reshape(-1, x.shape[-1])
    nan, value = np.isnan(rows), np.where(np.isnan(rows), 0.0, rows)
    index = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    order = np.lexsort((index, -value, ~nan), axis=-1)[:, :k]
    return torch.from_numpy(order.copy()).view(*x.shape[:-1], k)


def check(x, k, backend):
    before = x.clone()
    values, indices = ops.topk(x, k, backend=backend)
    assert values.dtype == x.dtype and indices.dtype == torch.int32
    assert values.device == indices.device == x.device
    wanted = oracle(x, k).to(x.device)
    assert torch.equal(indices.long(), wanted)
    # Bit for bit: a value is gathered, never recomputed, so −0.0 keeps its sign (NaN its NaN-ness).
    kept = x.gather(-1, wanted)
    assert torch.equal(values.isnan(), kept.isnan())
    assert torch.equal(values.nan_to_num(nan=0.0).signbit(), kept.nan_to_num(nan=0.0).signbit())
    assert torch.equal(values.nan_to_num(nan=0.0), kept.nan_to_num(nan=0.0))
    assert torch.equal(x.nan_to_num(nan=0.5), before.nan_to_num(nan=0.5)), "x was written"


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("f,k", [(1, 1), (3, 3), (131, 1), (131, 8), (131, 131), (640, 32)])
def test_agrees_with_a_sort(topk_sample, n, f, k, dtype, device, backend):
    check(topk_sample(n, f, dtype=dtype, device=device), k, backend)


def test_every_memory_layout(topk_sample, relayout, layout, device, backend):
    check(relayout(topk_sample(5, 67, device=device), layout), 9, backend)


@pytest.mark.parametrize("shape", [(67,), (2, 3, 67), (2, 0, 67), (0, 67), (1, 1, 1, 1)])
def test_leading_dimensions(topk_sample, shape, device, backend):
    x = topk_sample(int(np.prod(shape[:-1])), shape[-1], device=device).view(shape)
    values, indices = ops.topk(x, 1, backend=backend)
    assert values.shape == indices.shape == (*shape[:-1], 1)
    check(x, min(5, shape[-1]), backend)


@pytest.mark.parametrize("k", [1, 3, 64, 4500, 5000])
def test_a_row_of_ties_and_a_crowded_bucket(k, device, backend):
    x = torch.zeros(4, 5000, device=device)
    x[1] = 3.5
    x[2, ::7] = -0.0  # signed zeros tie, and keep their sign in values
    # More than 4096 values that differ in the last bits only: they crowd one radix bucket.
    x[3] = torch.nextafter(torch.ones(5000), torch.full((5000,), 2.0)).to(device)
    x[3, 17::3] = 1.0
    check(x, k, backend)


def test_ties_at_the_last_place(device, backend):
    x = torch.tensor([[5.0, 1.0, 7.0, 1.0, 1.0, 9.0, 1.0, 1.0]], device=device)
    assert ops.topk(x, 5, backend=backend)[1].tolist() == [[5, 2, 0, 1, 3]]


def test_two_values_that_differ_in_the_last_bit(device, backend):
    x = torch.full((1, 300), 0.1, device=device)
    x[0, 250] = torch.nextafter(torch.tensor(0.1), torch.tensor(1.0))
    assert ops.topk(x, 2, backend=backend)[1].tolist() == [[250, 0]]


@pytest.mark.parametrize("k", [1, 4, 20, 97])
def test_special_values(k, dtype, device, backend):
    inf, nan = float("inf"), float("nan")
    tiny = torch.finfo(dtype).smallest_normal
    if interpreting() and dtype == torch.bfloat16:
        tiny *= 16  # Triton's interpreter flushes bfloat16 denormals; the compiled kernel does not
    x = torch.zeros(6, 97, device=device, dtype=dtype)
    x[0, [5, 90]] = torch.tensor([nan, inf], device=device, dtype=dtype)
    x[1, :] = nan
    x[2, :] = -inf
    x[3, [1, 2, 3, 40]] = torch.tensor([-inf, inf, -nan, inf], device=device, dtype=dtype)
    # Denormals, both signs, around a lot of signed zeros.
    x[4, [3, 60]] = torch.tensor([tiny / 4, tiny / 2], device=device, dtype=dtype)
    x[4, 70:80] = -tiny / 2
    x[4, 10:20] = -0.0
    x[5] = torch.linspace(-1, 1, 97).flip(0)
    check(x, k, backend)


def test_massive_rows_of_the_largest_numbers(device, backend):
    x = torch.full((2, 130), torch.finfo(torch.float32).max, device=device)
    x[1] = torch.finfo(torch.float32).min
    x[0, 100] = float("inf")
    check(x, 3, backend)


def test_a_long_row(topk_sample, device, backend):
    check(topk_sample(2, 20011, device=device), 37, backend)
    check(topk_sample(1, 4099, device=device, seed=5), 700, backend)


def test_reruns_are_bit_equal(topk_sample, device, backend):
    x = topk_sample(11, 517, device=device)
    first = ops.topk(x, 16, backend=backend)
    for _ in range(3):
        again = ops.topk(x, 16, backend=backend)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_process_wide_modes_change_nothing(topk_sample, process_mode, mode, device, backend):
    x = topk_sample(5, 131, device=device)
    with process_mode(mode, device):
        check(x, 9, backend)


def test_float64_is_served_by_the_reference(topk_sample, device):
    check(topk_sample(3, 50, dtype=torch.float64, device=device), 7, None)


def test_no_gradient(topk_sample, device, backend):
    x = topk_sample(3, 50, device=device).requires_grad_()
    values, _ = ops.topk(x, 4, backend=backend)
    assert not values.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        values.sum().backward()


@pytest.mark.parametrize("shape", [(1, 50), (3, 50), (0, 50), (50,), (2, 3, 50)])
def test_the_short_way_serves_what_the_long_way_serves(topk_sample, shape, dtype, device):
    x = topk_sample(torch.Size(shape[:-1]).numel(), 50, dtype=dtype, device=device)
    wanted = torch.ops.fastsae.topk(x, 4, "")
    x = x.view(shape)
    for given in (x, x.mT.contiguous().mT if len(shape) > 1 else x):
        got = ops.topk(given, 4)
        for part, right in zip(got, wanted, strict=True):
            assert part.dtype == right.dtype and torch.equal(part, right.view(*shape[:-1], 4))


def test_the_environment_still_chooses(topk_sample, monkeypatch, device):
    monkeypatch.setenv("FASTSAE_BACKEND", "none such")
    with pytest.raises(BackendError, match="none such"):
        ops.topk(topk_sample(3, 50, device=device), 4)


def test_fake_tensors_stay_fake(topk_sample, device):
    with torch._subclasses.FakeTensorMode() as mode:
        got = ops.topk(mode.from_tensor(topk_sample(3, 50, device=device)), 4)
    assert all(isinstance(t, torch._subclasses.FakeTensor) and t.shape == (3, 4) for t in got)


def test_opcheck(topk_sample, device, backend):
    for n in (0, 3):
        torch.library.opcheck(
            torch.ops.fastsae.topk.default, (topk_sample(n, 40, device=device), 4, backend)
        )


def test_compiles_to_one_graph_for_every_batch_size(topk_sample, count_compiles, device, backend):
    compiled, counter = count_compiles(lambda x: ops.topk(x * 2, 5, backend=backend))
    for n in (3, 5, 8, 13):
        x = topk_sample(n, 67, device=device)
        got, wanted = compiled(x), ops.topk(x * 2, 5)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert counter.frame_count <= 2, "a new N recompiled"


@pytest.mark.parametrize(
    "x,k,words",
    [
        (torch.zeros(2, 5), 0, ["k: got 0", "1 to the last dimension of x = 5"]),
        (torch.zeros(2, 5), 6, ["k: got 6", "= 5"]),
        (torch.zeros(2, 5), True, ["k: got True"]),
        (torch.zeros(2, 5), 2.0, ["k: got 2.0", "integer"]),
        (torch.zeros(2, 0), 1, ["k: got 1"]),
        (torch.tensor(1.0), 1, ["x: got shape []", "at least one dimension"]),
        (torch.zeros(2, 5, dtype=torch.int64), 1, ["x: got dtype torch.int64", "float32"]),
        ([[1.0]], 1, ["x: got list", "torch.Tensor"]),
        (torch.empty(1, 2**31, device="meta"), 1, ["x: got rows of 2147483648", "at most"]),
    ],
)
def test_errors_name_the_argument_and_what_is_accepted(x, k, words):
    with pytest.raises(FastsaeError) as error:
        ops.topk(x, k)
    assert all(word in str(error.value) for word in words), error.value


def test_the_reference_keeps_its_memory_in_tiles(monkeypatch, largest_allocation):
    from fastsae.ops import reference

    monkeypatch.setattr(reference, "TILE_BYTES", 1 << 16)
    x = torch.randn(512, 1024)
    reference.topk(x, 4)
    assert largest_allocation(lambda: reference.topk(x, 4)) <= 1 << 16
