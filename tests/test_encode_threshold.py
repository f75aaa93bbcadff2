"""encode_threshold against dense float64 formulas, by property and on integers."""

import pytest
import torch

from fastsae import ops
from fastsae.errors import FastsaeError

pytestmark = pytest.mark.op("encode_threshold")

SHAPES = [(0, 48, 131, 8), (1, 48, 131, 8), (7, 48, 131, 8), (1, 1, 1, 1), (7, 37, 20, 20)]


def check_threshold(s, backend, close):
    args = (s.x, s.W_enc, s.b_enc, s.threshold)
    values, indices, offsets = ops.encode_threshold(*args, b_dec=s.b_dec, backend=backend)
    n, f = s.x.shape[0], s.W_enc.shape[0]
    assert values.dtype == torch.float32 and indices.dtype == torch.int32
    assert offsets.dtype == torch.int64 and offsets.shape == (n + 1,) and offsets[0] == 0
    assert values.shape == indices.shape == (int(offsets[-1]),)
    row = torch.repeat_interleave(torch.arange(n, device=s.x.device), offsets.diff())
    step = indices.diff()[row.diff() == 0]
    assert (step > 0).all(), "indices do not ascend inside a row"
    kept = torch.zeros(n, f, dtype=torch.bool, device=s.x.device)
    kept[row, indices.long()] = True
    exact, slack, floor = s.pre_activations(), s.rounding(), s.threshold.double().clamp(min=0)
    assert kept[exact > floor + slack].all() and not kept[exact < floor - slack].any()
    by_torch = s.pre_activations(dtype=torch.float32)[row, indices.long()]
    close(values, exact[row, indices.long()], by_torch, "values")


def expected_threshold(h, threshold):
    keep = ~(h <= threshold.double().clamp(min=0))
    counts = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    return h[keep].float(), keep.nonzero()[:, 1].to(torch.int32), counts


def assert_threshold(got, wanted):
    assert got[1].tolist() == wanted[1].tolist() and got[2].tolist() == wanted[2].tolist()
    assert torch.equal(got[0].nan_to_num(nan=-1.0), wanted[0].nan_to_num(nan=-1.0))


@pytest.mark.parametrize("n,d,f,k", SHAPES + [(9, 24, 4500, 0), (2, 640, 1030, 0)])
def test_threshold_shapes(encode_sample, as_good_as_torch, n, d, f, k, device, backend):
    check_threshold(encode_sample(n, d, f, device=device), backend, as_good_as_torch)


def test_threshold_types(encode_sample, as_good_as_torch, mixed, device, backend):
    s = encode_sample(dtype=mixed[0], weights=mixed[1], device=device)
    check_threshold(s, backend, as_good_as_torch)


@pytest.mark.parametrize("kind", ["normal", "massive", "heavy"])
@pytest.mark.parametrize("d", [7, 641, 2304, 5376])
def test_threshold_many_rows(encode_sample, as_good_as_torch, d, kind, device, backend):
    s = encode_sample(40, d, 1501, kind=kind, device=device)
    check_threshold(s, backend, as_good_as_torch)


def test_threshold_massive_activations(encode_sample, as_good_as_torch, device, backend):
    s = encode_sample(11, 96, 260, kind="massive", device=device)
    s.x[:, :8] += 300 * s.x[:1, :8].sign()
    check_threshold(s, backend, as_good_as_torch)


@pytest.mark.parametrize("n", [1, 5, 11])
def test_threshold_is_strict_on_integers(encode_sample, n, dtype, device, backend):
    """θ equal to h, θ = 0, θ < 0: h > θ and h > 0, both strict."""
    s = encode_sample(n, 16, 150, kind="integers", dtype=dtype, device=device)
    h = s.pre_activations()
    s.threshold[:60] = h[0, :60].float()
    s.threshold[60:80] = 0
    s.threshold[80:100] = -5
    s.threshold[100:] = 7
    got = ops.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, b_dec=s.b_dec, backend=backend)
    assert_threshold(got, expected_threshold(h, s.threshold))
    first = got[1][: got[2][1]].tolist()
    assert not set(first) & set(range(60)), "h = θ is not active"


def test_threshold_stays_fp32_with_half_precision_weights(device, backend):
    """θ = 1 + 2⁻²⁰ is 1 in bfloat16; h = 1 + 2⁻²¹ must stay below it."""
    W = torch.ones(4, 2, device=device, dtype=torch.bfloat16)
    x = torch.tensor([[1.0, 2.0**-21]], device=device)
    bias = torch.zeros(4, device=device, dtype=torch.bfloat16)
    theta = torch.tensor([1.0, 1 + 2.0**-20, 1 + 2.0**-21, 1 + 2.0**-22], device=device)
    values, indices, _ = ops.encode_threshold(x, W, bias, theta, backend=backend)
    assert indices.tolist() == [0, 3] and values.tolist() == [1 + 2.0**-21] * 2


def test_threshold_everything_nothing_and_scalar(encode_sample, device, backend):
    s = encode_sample(5, 16, 90, kind="integers", device=device)
    for bias, theta in ((1000, 0.0), (-1000, 0.0), (0, 1e9), (0, 3.0)):
        s.b_enc[:] = bias
        got = ops.encode_threshold(
            s.x, s.W_enc, s.b_enc, torch.tensor(theta, device=device), backend=backend
        )
        h = s.pre_activations(centre=False)
        assert_threshold(got, expected_threshold(h, torch.full((90,), theta, device=device)))


@pytest.mark.parametrize("n", [1, 6])
def test_threshold_nan_and_infinity(encode_sample, n, device, backend):
    s = encode_sample(n, 16, 90, kind="integers", device=device)
    s.W_enc[:, 5] = s.W_enc[:, 5].abs() + 1
    s.W_enc[40, 7] = float("nan")
    s.b_enc[60] = float("nan")
    s.b_enc[61] = float("inf")
    s.threshold[61:63] = float("inf")
    for bad in (1.0, float("nan"), float("inf"), -float("inf")):
        s.x[0, 5] = bad
        got = ops.encode_threshold(
            s.x, s.W_enc, s.b_enc, s.threshold, b_dec=s.b_dec, backend=backend
        )
        assert_threshold(got, expected_threshold(s.pre_activations(), s.threshold))


def test_threshold_every_memory_layout(encode_sample, relayout, layout, device, backend):
    s = encode_sample(6, 32, 67, kind="integers", device=device)
    for name in ("x", "W_enc", "b_enc", "b_dec", "threshold"):
        setattr(s, name, relayout(getattr(s, name), layout))
    got = ops.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, b_dec=s.b_dec, backend=backend)
    assert_threshold(got, expected_threshold(s.pre_activations(), s.threshold))


def test_threshold_process_wide_modes(encode_sample, process_mode, mode, device, backend):
    s = encode_sample(9, 64, 300, device=device)
    args = (s.x, s.W_enc, s.b_enc, s.threshold)
    plain = ops.encode_threshold(*args, b_dec=s.b_dec, backend=backend)
    with process_mode(mode, device):
        again = ops.encode_threshold(*args, b_dec=s.b_dec, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_opcheck_threshold(encode_sample, device, backend):
    s = encode_sample(3, 8, 20, device=device)
    op = torch.ops.fastsae.encode_threshold.default
    torch.library.opcheck(op, (s.x, s.W_enc, s.b_enc, s.threshold, s.b_dec, backend))
    inputs = s.leaves()
    torch.library.opcheck(op, (*inputs[:3], s.threshold, inputs[3], backend))


def test_threshold_compiles_to_one_graph(encode_sample, count_compiles, device, backend):
    s = encode_sample(device=device)

    def encode(x):
        values, indices, offsets = ops.encode_threshold(
            x + 0, s.W_enc, s.b_enc, s.threshold, backend=backend
        )
        return values * 2, indices, offsets

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled, _ = count_compiles(encode)
        for got, wanted in zip(compiled(s.x), encode(s.x), strict=True):
            assert torch.equal(got, wanted)


def test_one_number_serves_as_threshold_and_a_missing_bias_is_named():
    x, W, b = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    whole = ops.encode_threshold(x, W, b, torch.full((12,), 0.3))
    for given in (0.3, torch.tensor(0.3)):
        for one, other in zip(ops.encode_threshold(x, W, b, given), whole, strict=True):
            assert torch.equal(one, other)
    with pytest.raises(FastsaeError, match="b_enc: got NoneType"):
        ops.encode_threshold(x, W, None, 0.3)
    with pytest.raises(FastsaeError, match="b_enc: got NoneType"):
        ops.encode_topk(x, W, None, 3)
