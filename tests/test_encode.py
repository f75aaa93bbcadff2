"""encode_topk against dense float64 formulas, by property and on integers."""

import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops.backend import interpreting

pytestmark = pytest.mark.op("encode_topk")

SHAPES = [(0, 48, 131, 8), (1, 48, 131, 8), (7, 48, 131, 8), (1, 1, 1, 1), (7, 37, 20, 20)]


def padding(used: set[int], count: int) -> list[int]:
    free = (i for i in range(len(used) + count) if i not in used)
    return [next(free) for _ in range(count)]


def check_form(values, indices, n, k):
    """Active first and descending, ties ascending, then padding; indices distinct."""
    assert values.shape == indices.shape == (n, k)
    assert values.dtype == torch.float32 and indices.dtype == torch.int32
    for v, i in zip(values.tolist(), indices.tolist(), strict=True):
        count = sum(not a <= 0 for a in v)
        assert all(not a <= 0 for a in v[:count]) and v[count:] == [0.0] * (k - count)
        order = [(a == a, -a if a == a else 0.0, j) for a, j in zip(v[:count], i, strict=False)]
        assert order == sorted(order), "not descending, or a tie is not in index order"
        assert i[count:] == padding(set(i[:count]), k - count)
        assert len(set(i)) == k


def check_topk(s, k, backend, close, centre=True):
    args = {"b_dec": s.b_dec if centre else None, "backend": backend}
    values, indices = ops.encode_topk(s.x, s.W_enc, s.b_enc, k, **args)
    n = s.x.shape[0]
    check_form(values, indices, n, k)
    exact, slack, column = s.pre_activations(centre), s.rounding(centre), indices.long()
    by_torch = s.pre_activations(centre, torch.float32).gather(1, column)
    active = values > 0
    wanted = torch.where(active, exact.gather(1, column), 0)
    close(values, wanted, torch.where(active, by_torch, 0), "values")
    # Nothing omitted beats anything kept (or 0, when padding shows that nothing more is positive).
    omitted = torch.ones_like(exact, dtype=torch.bool).scatter(1, column, ~active)
    upper = torch.where(active, wanted + slack.gather(1, column), 0)
    if n:
        floor = upper.min(1, keepdim=True).values
        assert not (omitted & (exact - slack > floor)).any(), "a larger pre-activation was left out"
    return values, indices


def expected_topk(h: torch.Tensor, k: int) -> tuple[list, list]:
    """Values and indices by sorting, for pre-activations that are exact in fp32."""
    values, indices = [], []
    for row in h.tolist():
        rank = sorted(range(len(row)), key=lambda j: (row[j] == row[j], -row[j], j))
        active = [j for j in rank[:k] if not row[j] <= 0]
        indices.append(active + padding(set(active), k - len(active)))
        values.append([row[j] for j in active] + [0.0] * (k - len(active)))
    return values, indices


def assert_rows(got, wanted):
    values, indices = got
    assert indices.tolist() == wanted[1]
    assert torch.equal(
        values.cpu().nan_to_num(nan=-1.0),
        torch.tensor(wanted[0], dtype=values.dtype).view(values.shape).nan_to_num(nan=-1.0),
    )


# --- encode_topk: values ------------------------------------------------------------------------


@pytest.mark.parametrize("n,d,f,k", SHAPES)
@pytest.mark.parametrize("centre", [True, False])
def test_topk_shapes(encode_sample, as_good_as_torch, n, d, f, k, centre, device, backend):
    check_topk(encode_sample(n, d, f, device=device), k, backend, as_good_as_torch, centre)


@pytest.mark.parametrize("n", [1, 7])
def test_topk_types(encode_sample, as_good_as_torch, mixed, n, device, backend):
    s = encode_sample(n, dtype=mixed[0], weights=mixed[1], device=device)
    check_topk(s, 8, backend, as_good_as_torch)


@pytest.mark.parametrize("n,d,f,k", [(9, 24, 4500, 40), (2, 640, 1030, 17), (33, 70, 515, 5)])
def test_topk_across_tiles(encode_sample, as_good_as_torch, n, d, f, k, device, backend):
    check_topk(encode_sample(n, d, f, device=device), k, backend, as_good_as_torch)


@pytest.mark.parametrize("kind", ["normal", "massive", "heavy"])
@pytest.mark.parametrize("d", [7, 641, 1111, 2304, 5376])
def test_topk_many_rows(encode_sample, as_good_as_torch, d, kind, device, backend):
    """Enough rows for the screens of every backend, at widths of real models and odd ones."""
    s = encode_sample(40, d, 1501, kind=kind, device=device)
    check_topk(s, 19, backend, as_good_as_torch)


@pytest.mark.parametrize("f", [9001, 16384])
def test_topk_of_many_half_rows(encode_sample, as_good_as_torch, f, device, backend):
    """Products that stream by in tiles on a GPU, the last one ragged or whole."""
    s = encode_sample(600, 64, f, dtype=torch.bfloat16, weights=torch.bfloat16, device=device)
    check_topk(s, 16, backend, as_good_as_torch)


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("k", [1, 700, 1500, 1501])
def test_topk_every_size_of_k(encode_sample, as_good_as_torch, n, k, device, backend):
    check_topk(encode_sample(n, 64, 1501, device=device), k, backend, as_good_as_torch)


@pytest.mark.parametrize("k", [1, 130, 131])
def test_topk_extreme_k(encode_sample, as_good_as_torch, k, device, backend):
    check_topk(encode_sample(device=device), k, backend, as_good_as_torch)


@pytest.mark.parametrize("w", [torch.float32, torch.bfloat16])
def test_topk_massive_activations(encode_sample, as_good_as_torch, w, device, backend):
    """Half of ‖x‖² in 8 dimensions, far from 0: what screens about the wrong centre get wrong."""
    s = encode_sample(11, 96, 260, kind="massive", weights=w, device=device)
    s.x[:, :8] += 300 * s.x[:1, :8].sign()
    check_topk(s, 16, backend, as_good_as_torch)


def test_topk_cancellation(encode_sample, as_good_as_torch, device, backend):
    """Terms of size 10⁴ that cancel to 1: the error bound must count the accumulation."""
    s = encode_sample(6, 64, 140, device=device)
    s.W_enc[:, :32] = s.W_enc[:, 32:] + s.W_enc[:, :32] * 1e-4
    s.x[:, :32] = -1e4 * s.x[:, 32:]
    s.x[:, 32:] *= 1e4
    check_topk(s, 9, backend, as_good_as_torch)


def test_topk_every_memory_layout(encode_sample, relayout, layout, device, backend):
    s = encode_sample(6, 32, 67, kind="integers", device=device)
    x, W, b, centre = (relayout(t, layout) for t in (s.x, s.W_enc, s.b_enc, s.b_dec))
    h = (x - centre) @ W.T + b
    got = ops.encode_topk(x, W, b, 9, b_dec=centre, backend=backend)
    assert_rows(got, expected_topk(h, 9))


@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (2, 0, 48)])
def test_topk_leading_dimensions(encode_sample, shape, device, backend):
    s = encode_sample(torch.Size(shape[:-1]).numel(), device=device)
    values, indices = ops.encode_topk(s.x.view(shape), s.W_enc, s.b_enc, 5, backend=backend)
    assert values.shape == indices.shape == (*shape[:-1], 5)
    flat = ops.encode_topk(s.x, s.W_enc, s.b_enc, 5, backend=backend)
    assert torch.equal(values.view(-1, 5), flat[0]) and torch.equal(indices.view(-1, 5), flat[1])


@pytest.mark.parametrize("k", [1, 7, 64, 150])
@pytest.mark.parametrize("n", [1, 5, 11])
def test_topk_exact_ties_on_integers(encode_sample, k, n, dtype, device, backend):
    """Small integers are exact in every type and order of summation, and tie a lot."""
    s = encode_sample(n, 16, 150, kind="integers", dtype=dtype, device=device)
    s.W_enc[100:120] = s.W_enc[20:40]  # duplicated rows
    h = s.pre_activations()
    got = ops.encode_topk(s.x, s.W_enc, s.b_enc, k, b_dec=s.b_dec, backend=backend)
    assert_rows(got, expected_topk(h, k))


def test_topk_rows_of_equal_weights_and_of_nothing_positive(encode_sample, device, backend):
    s = encode_sample(5, 16, 150, kind="integers", device=device)
    s.W_enc[:] = s.W_enc[0]
    s.b_enc[:] = 2
    s.x[0] = s.b_dec  # h = 2 in the whole row, and 2 + c elsewhere
    s.x[1] = s.b_dec - 5 * s.W_enc[0]  # nothing positive: all padding
    got = ops.encode_topk(s.x, s.W_enc, s.b_enc, 6, b_dec=s.b_dec, backend=backend)
    assert_rows(got, expected_topk(s.pre_activations(), 6))
    assert got[0][1].tolist() == [0.0] * 6 and got[1][1].tolist() == list(range(6))


def test_topk_fewer_positive_than_k(encode_sample, device, backend):
    s = encode_sample(7, 16, 90, kind="integers", device=device)
    s.b_enc[:] = -1000
    s.b_enc[[3, 50, 89]] = 1000
    got = ops.encode_topk(s.x, s.W_enc, s.b_enc, 8, b_dec=s.b_dec, backend=backend)
    assert_rows(got, expected_topk(s.pre_activations(), 8))
    assert (got[0] > 0).sum(1).tolist() == [3] * 7


def test_topk_features_that_differ_in_the_last_bit(device, backend):
    """h of feature 200 exceeds all others by one unit in the last place; a screen cannot see it."""
    W = torch.zeros(300, 24, device=device)
    W[:, 3] = 0.3
    W[200, 3] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
    x = torch.zeros(9, 24, device=device)
    x[:, 3] = 1.0
    values, indices = ops.encode_topk(x, W, torch.zeros(300, device=device), 2, backend=backend)
    assert indices.tolist() == [[200, 0]] * 9
    assert torch.equal(values, torch.stack([W[200, 3], W[0, 3]]).expand(9, 2))


@pytest.mark.parametrize("n", [1, 6])
def test_topk_nan_and_infinity(encode_sample, n, device, backend):
    s = encode_sample(n, 16, 90, kind="integers", device=device)
    s.W_enc[:, 5] = s.W_enc[:, 5].abs() + 1
    s.W_enc[40, 7] = float("nan")
    s.b_enc[60] = float("nan")
    s.b_enc[61] = float("inf")
    s.b_enc[62] = -float("inf")
    got = ops.encode_topk(s.x, s.W_enc, s.b_enc, 9, b_dec=s.b_dec, backend=backend)
    assert_rows(got, expected_topk(s.pre_activations(), 9))
    assert got[1][:, :3].tolist() == [[40, 60, 61]] * n
    for bad in (float("nan"), float("inf"), -float("inf")):
        s.x[0, 5] = bad
        got = ops.encode_topk(s.x, s.W_enc, s.b_enc, 9, b_dec=s.b_dec, backend=backend)
        assert_rows(got, expected_topk(s.pre_activations(), 9))


def test_topk_denormals_and_extreme_scales(device, backend):
    W = torch.zeros(70, 16, device=device)
    W[:, 0] = torch.arange(70, device=device) * 2.0**-80
    x = torch.zeros(5, 16, device=device)
    x[:, 0] = 2.0**-60  # products from 2⁻¹⁴⁰ on are denormal, and still ranked
    bias = torch.zeros(70, device=device)
    got = ops.encode_topk(x, W, bias, 4, backend=backend)
    assert_rows(got, expected_topk(x.double() @ W.double().T, 4))
    big = torch.finfo(torch.float32).max  # rounds to infinity in bfloat16
    x[:, 0] = big
    W[:, 0] = torch.arange(70, device=device) * 2.0**-130
    got = ops.encode_topk(x, W, bias, 4, backend=backend)
    assert_rows(got, expected_topk((x.double() @ W.double().T).float(), 4))


def test_topk_fast_is_close(encode_sample, device, backend):
    s = encode_sample(9, 64, 300, device=device)
    exact = ops.encode_topk(s.x, s.W_enc, s.b_enc, 16, b_dec=s.b_dec, backend=backend)
    fast = ops.encode_topk(
        s.x, s.W_enc, s.b_enc, 16, b_dec=s.b_dec, precision="fast", backend=backend
    )
    check_form(*fast, 9, 16)
    dense = [torch.zeros(9, 300, device=device).scatter(1, i.long(), v) for v, i in (exact, fast)]
    kept = (dense[0] > 0) & (dense[1] > 0)
    assert kept.sum() >= 0.9 * (dense[0] > 0).sum()
    scale = s.x.norm(dim=1, keepdim=True) * s.W_enc.norm(dim=1) + 1
    assert ((dense[0] - dense[1]).abs() <= 2.0**-7 * scale)[kept].all()


def test_topk_process_wide_modes(
    encode_sample, as_good_as_torch, process_mode, mode, device, backend
):
    s = encode_sample(9, 64, 300, device=device)
    plain = ops.encode_topk(s.x, s.W_enc, s.b_enc, 16, b_dec=s.b_dec, backend=backend)
    with process_mode(mode, device):
        again = ops.encode_topk(s.x, s.W_enc, s.b_enc, 16, b_dec=s.b_dec, backend=backend)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


# --- dispatch, compilation, memory, errors ------------------------------------------------------


def test_opcheck(encode_sample, device, backend):
    s = encode_sample(3, 8, 20, device=device)
    op = torch.ops.fastsae.encode_topk.default
    torch.library.opcheck(op, (s.x, s.W_enc, s.b_enc, 4, None, "exact", backend))
    torch.library.opcheck(op, (*s.leaves()[:3], 4, s.leaves()[3], "exact", backend))


def test_compiles_to_one_graph_for_every_batch_size(encode_sample, count_compiles, device, backend):
    s = encode_sample(0, device=device)

    def encode(x):
        return ops.encode_topk(x + 0, s.W_enc, s.b_enc, 8, b_dec=s.b_dec, backend=backend)

    compiled, counter = count_compiles(encode)
    for n in (3, 5, 8, 13):
        x = encode_sample(n, device=device).x
        got, wanted = compiled(x), encode(x)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert counter.frame_count <= 2, "a new N recompiled"


@pytest.mark.parametrize("op", ["encode_topk", "encode_threshold"])
def test_nothing_of_size_n_f(encode_sample, largest_allocation, op, device, backend):
    if interpreting():
        pytest.skip("too slow in Triton's interpreter")
    # N·F·4 bytes = 168 MB against a tile of 64 MB; on CUDA the sum of all temporaries is counted.
    n, f = 2560 if device == "cpu" else 10240, 16384
    s = encode_sample(n, 16, f, device=device)
    s.threshold += 3  # about 70 active latents a row
    if op == "encode_topk":

        def run():
            return ops.encode_topk(s.x, s.W_enc, s.b_enc, 8, backend=backend)

    else:

        def run():
            return ops.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, backend=backend)

    assert largest_allocation(run, device) < 0.6 * n * f * 4


def test_errors_name_the_argument_and_the_fix(encode_sample):
    s = encode_sample(3, 8, 20)
    good = {"x": s.x, "W_enc": s.W_enc, "b_enc": s.b_enc, "k": 4, "b_dec": s.b_dec}
    meta = torch.empty(8, device="meta")
    for change, words in (
        ({"k": 0}, ["k: got 0", "d_sae = 20"]),
        ({"k": 21}, ["k: got 21", "1 to d_sae = 20"]),
        ({"x": torch.zeros(3, 9)}, ["x: got shape [3, 9]", "[..., 8]"]),
        ({"x": s.x.int()}, ["x: got dtype torch.int32", "bfloat16"]),
        ({"W_enc": s.W_enc[0]}, ["W_enc: got shape [8]", "2-D"]),
        ({"W_enc": torch.zeros(0, 8)}, ["W_enc: got shape [0, 8]", "non-empty"]),
        ({"b_enc": torch.zeros(8)}, ["b_enc: got shape [8]", "expected [20]"]),
        ({"b_dec": torch.zeros(20)}, ["b_dec: got shape [20]", "expected [8]"]),
        ({"b_dec": meta}, ["b_dec on meta", ".to(device)"]),
        ({"precision": "best"}, ["precision: got 'best'", "exact, fast"]),
    ):
        with pytest.raises(FastsaeError) as error:
            ops.encode_topk(**good | change)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(FastsaeError, match=r"threshold: got shape \[8\], expected \[20\]"):
        ops.encode_threshold(s.x, s.W_enc, s.b_enc, torch.zeros(8))
    with pytest.raises(FastsaeError, match="threshold: got str, expected a"):
        ops.encode_threshold(s.x, s.W_enc, s.b_enc, "0.5")
