"""The Triton kernels in Triton's CPU interpreter, against the reference and by property.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it. On the CPU torch makes the matrix products in float32.
"""

import os

import pytest
import torch

from fastsae.ops import SteerTable, reference, watch

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import (
        decode,
        encode,
        encode_threshold,
        matmul,
        mi,
        sparse_outer,
        steer,
    )


def test_in_the_interpreter(run_again):
    run_again(__file__)


def same(got, wanted):
    """Equal bit by bit as far as torch.equal sees, with NaN equal to NaN."""
    got, wanted = got.float(), wanted.float()
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(
        got.nan_to_num(0), wanted.nan_to_num(0)
    )


def as_good_as_torch(got, oracle, by_torch):
    error = (got.double() - oracle).norm()
    limit = 2 * (by_torch.double() - oracle).norm() + 1e-7 * oracle.norm()
    assert error <= limit, f"error {error:.3g}, accepted {limit:.3g}"


def doubled(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def integer_sae(n, d, f):
    """Small integers: every fp32 sum is exact, so results must be equal, ties included."""

    def draw(*shape):
        return torch.randint(-3, 4, shape).float()

    return draw(n, d), draw(f, d), 5 * draw(f), draw(d), 3 * draw(f)


@pytest.mark.parametrize(
    "n,d,f,k", [(0, 5, 9, 3), (1, 7, 9, 9), (5, 37, 1003, 20), (3, 16, 4200, 16)]
)
@pytest.mark.parametrize("centred", [False, True])
def test_encoders_on_integers(n, d, f, k, centred):
    x, W, b, b_dec, threshold = integer_sae(n, d, f)
    b_dec = b_dec if centred else None
    got = encode.encode_topk(x, W, b, k, b_dec)
    wanted = reference.encode_topk(x, W, b, k, b_dec)
    assert same(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    got = encode_threshold.encode_threshold(x, W, b, threshold, b_dec)
    wanted = reference.encode_threshold(x, W, b, threshold, b_dec)
    assert same(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1]) and torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_encode_of_mixed_dtypes(x_dtype, weights):
    x, W, b, b_dec, _ = integer_sae(2, 16, 300)
    x, W = x.to(x_dtype) / 4, W.to(weights)
    got = encode.encode_topk(x, W, b, 8, b_dec / 8)
    wanted = reference.encode_topk(x, W, b, 8, b_dec / 8)
    assert torch.equal(got[1], wanted[1]) and same(got[0], wanted[0])


def test_encode_fast_is_near():
    x, W = torch.randn(3, 64), torch.randn(500, 64) / 8
    fast = encode.encode_topk(x, W, torch.zeros(500), 8, None, "fast")
    exact = encode.encode_topk(x, W, torch.zeros(500), 8)
    assert (fast[0] - exact[0]).abs().max() < 0.05


def test_half_precision_products_by_tiles(monkeypatch):
    """More rows than are rescored: tiles of few rows, then also of columns whose winners merge."""
    x, W, b, b_dec, _ = integer_sae(3, 16, 9001)
    x, W, b_dec = x.bfloat16(), W.bfloat16(), b_dec.bfloat16()
    wanted = reference.encode_topk(x, W, b, 16, b_dec)
    monkeypatch.setattr(encode, "FEW_ROWS", 0)
    for workspace in (64 << 20, 3 << 15):
        monkeypatch.setattr(encode, "WORKSPACE_BYTES", workspace)
        got = encode.encode_topk(x, W, b, 16, b_dec)
        assert torch.equal(got[1], wanted[1]) and same(got[0], wanted[0])


def test_threshold_keeps_everything_and_nan():
    """Every entry survives, more than a row was expected to have; a NaN row keeps everything."""
    x, W, f = torch.zeros(2, 3), torch.zeros(1500, 3), 1500
    x[1] = torch.nan
    values, indices, offsets = encode_threshold.encode_threshold(
        x, W, torch.ones(f), torch.zeros(f)
    )
    assert offsets.tolist() == [0, f, 2 * f]
    assert torch.equal(indices, torch.arange(f, dtype=torch.int32).repeat(2))
    assert (values[:f] == 1).all() and values[f:].isnan().all()


def test_threshold_is_strict():
    x, W, b = torch.ones(1, 1), torch.ones(4, 1), torch.zeros(4)
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    theta = torch.tensor([1.0, below, -1.0, 2.0])
    assert encode_threshold.encode_threshold(x, W, b, theta)[1].tolist() == [1, 2]


DECODE_SHAPES = [(0, 4, 10, 5), (1, 1, 7, 5), (7, 33, 20, 640), (5, 3, 50, 129)]


@pytest.mark.parametrize("n,k,f,d", DECODE_SHAPES)
def test_decode_and_its_gradients(n, k, f, d):
    values, indices = torch.randn(n, k), torch.randint(0, f, (n, k), dtype=torch.int32)
    values[values.abs() < 0.3] = 0
    W, b, g = torch.randn(f, d), torch.randn(d), torch.randn(n, d)
    for bias in (None, b):
        arguments = (values, indices, W, bias)
        as_good_as_torch(
            decode.decode(*arguments),
            reference.decode(*doubled(*arguments)),
            reference.decode(*arguments),
        )
    arguments = (g, W, indices)
    as_good_as_torch(
        decode.gather_dot(*arguments),
        reference.gather_dot(*doubled(*arguments)),
        reference.gather_dot(*arguments),
    )
    got = sparse_outer.sparse_outer(values, indices, g, f)
    oracle = reference.sparse_outer(*doubled(values, indices, g), f)
    by_torch = reference.sparse_outer(values, indices, g, f)
    for a, b, c in zip(got, oracle, by_torch, strict=True):
        as_good_as_torch(a, b, c)


def test_decode_skips_padding_and_keeps_borders():
    W = torch.randn(10, 37)
    W[3] = torch.nan
    values, indices = torch.tensor([[2.0, 0.0]]), torch.tensor([[1, 3]], dtype=torch.int32)
    buffer = torch.full((80,), 7.0)
    config = decode._decode_config(1, 37, 4)
    arguments = (values, indices, W, W, buffer[11:], 1, 2, 10, 37, 1)
    decode._decode_kernel[(1, 2)](*arguments, HAS_BIAS=False, **config)
    assert torch.equal(buffer[11:48], 2 * W[1])
    assert (buffer[:11] == 7).all() and (buffer[48:] == 7).all()


def test_an_index_out_of_range_shows():
    """Kernels cannot raise, so nothing is read and the result is NaN."""
    values, W = torch.ones(3, 2), torch.ones(4, 5)
    indices = torch.tensor([[0, 4], [-1, 1], [2, 3]], dtype=torch.int32)
    assert decode.decode(values, indices, W).isnan().all(1).tolist() == [True, True, False]
    dots = decode.gather_dot(torch.ones(3, 5), W, indices)
    assert torch.equal(dots.isnan(), (indices < 0) | (indices > 3))
    slots = torch.tensor([0, 5, -1]).int()
    steered = steer.steer(torch.ones(3, 64), slots, torch.ones(3), steer_table(64))
    assert steered.isnan().all(1).tolist() == [False, True, True]


def test_decode_does_not_depend_on_the_batch():
    values, indices = torch.randn(20, 6), torch.randint(0, 50, (20, 6), dtype=torch.int32)
    W = torch.randn(50, 130)
    together = decode.decode(values, indices, W)
    alone = torch.cat([decode.decode(values[i : i + 1], indices[i : i + 1], W) for i in range(20)])
    assert torch.equal(together, alone)


def test_watch_of_rows_that_are_not_side_by_side(monkeypatch):
    """As it runs on a GPU, where the kernel reads x by its number of columns alone."""
    monkeypatch.setenv("FASTSAE_BACKEND", "triton")
    slots, wide = torch.tensor([1, 0, 1, 2]).int(), torch.randn(4, 2, 40)
    r = wide[:, 0] + 1
    found = []
    for x in (wide[:, 0], wide[:, 0].clone()):
        enc, bias = torch.arange(240.0).view(3, 2, 40) / 240, torch.zeros(3, 2)
        sums, maxima = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, 3)
        above, count = torch.full((3,), -torch.inf), torch.full((3,), 2).int()
        table = watch.WatchTable(enc, bias, bias, bias, above, count, sums, maxima)
        watch.watch(x, r, slots, table)
        found.append((sums, maxima))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][0][1, 0] == 2 and (found[0][0][1, 4:] > 0).any()


def test_sparse_outer_of_hot_features():
    """Feature 2 has whole segments of its own; two runs give the same bits."""
    values, g = torch.randn(700, 2), torch.randn(700, 20)
    indices = torch.randint(0, 3, (700, 2), dtype=torch.int32)
    indices[:, 0] = 2
    got = sparse_outer.sparse_outer(values, indices, g, 4)
    oracle = reference.sparse_outer(*doubled(values, indices, g), 4)
    by_torch = reference.sparse_outer(values, indices, g, 4)
    for a, b, c in zip(got, oracle, by_torch, strict=True):
        as_good_as_torch(a, b, c)
    again = sparse_outer.sparse_outer(values, indices, g, 4)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
    assert (got[0][3] == 0).all() and got[1][3] == 0


@pytest.mark.parametrize("objective", ["mi", "pmi", "paper", "logit"])
@pytest.mark.parametrize("f,v,d,workspace", [(6, 131, 64, None), (11, 50, 7, 50 * 4 * 4)])
def test_mi(objective, f, v, d, workspace, monkeypatch):
    if workspace:  # three tiles of four features
        monkeypatch.setattr(mi, "TILE_BYTES", workspace)
    features, words = torch.randn(f, d), torch.randn(v, d)
    arguments = (features, words, 5, objective, 3.0)
    scores, indices = mi.mi_topk(*arguments)
    oracle = reference.mi_topk(*doubled(features, words), *arguments[2:])
    as_good_as_torch(scores, oracle[0], reference.mi_topk(*arguments)[0])
    assert torch.equal(indices, oracle[1])


def steer_table(d):
    """Slots: 0 nothing, 1 amplify + set + floor, 2 add + enforce, 3 gated, 4 norm preserved."""
    R = 9
    kinds = torch.tensor([[0, 0, 0], [1, 2, 3], [4, 0, 5], [1, 0, 4], [4, 1, 0]])
    begin = torch.tensor([[0, 0, 0], [0, 3, 8], [8, 0, 2], [0, 0, 5], [3, 5, 0]])
    end = torch.tensor([[0, 0, 0], [3, 8, 13], [13, 0, 7], [5, 0, 6], [5, 5, 0]])
    scalar = torch.zeros(5, 3)
    scalar[2, 2] = 2.0

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    return SteerTable(
        enc=torch.randn(R, d) / d**0.5,
        bias=torch.randn(R) / 10,
        theta=torch.tensor([0, 0.5, -1, 0, 0, 0, 0.2, 0, 0]),
        dec=torch.randn(R, d) / d**0.5,
        op_kind=kinds.int(),
        op_begin=begin.int(),
        op_end=end.int(),
        op_scalar=scalar,
        item_row=ints(0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 3, 5, 2),
        item_value=torch.randn(13) * 2,
        gate_begin=ints(0, 0, 0, 3, 0),
        gate_end=ints(0, 0, 0, 5, 0),
        gate_above=torch.tensor([0, 0, 0, 0.2, 0]),
        norm_preserve=ints(0, 0, 0, 0, 1),
    )


@pytest.mark.parametrize("d", [64, 129, 640])
def test_steer(d):
    table, slots, strengths = steer_table(d), torch.arange(15).int() % 5, torch.rand(15) * 2
    x = torch.randn(15, d)
    x[4] = 0  # the norm cannot be preserved
    x[3], x[8] = 0, 4 * (table.enc[3] + table.enc[4])  # the gate of slot 3: closed, open
    x[5, 0] = torch.nan  # slot 0: copied, bits and all
    got = steer.steer(x, slots, strengths, table)
    assert torch.equal(got[slots == 0].view(torch.int32), x[slots == 0].view(torch.int32))
    rows = slots != 0
    arguments = (x[rows], slots[rows], strengths[rows])
    oracle = reference.steer(*doubled(*arguments), SteerTable(*doubled(*table)))
    as_good_as_torch(got[rows], oracle, reference.steer(*arguments, table))
    assert torch.equal(got[3], x[3]) and not torch.equal(got[8], x[8])
    assert steer.steer(x[:0], slots[:0], strengths[:0], table).shape == (0, d)


def test_steer_rounds_bfloat16_once():
    table, x = steer_table(64), torch.randn(4, 64).bfloat16()
    slots, strengths = torch.tensor([1, 2, 4, 0]).int(), torch.ones(4)
    oracle = reference.steer(x.double(), slots, strengths, SteerTable(*doubled(*table)))
    by_torch = reference.steer(x, slots, strengths, table)
    as_good_as_torch(steer.steer(x, slots, strengths, table), oracle, by_torch)


def test_steer_names_its_limit():
    x = torch.zeros(1, steer.MAX_D + 1)
    with pytest.raises(ValueError, match="16384"):
        steer.steer(x, torch.zeros(1).int(), torch.zeros(1), None)


def test_full_fp32_restores_flags():
    torch.set_float32_matmul_precision("medium")
    try:
        with matmul.full_fp32(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            with matmul.full_fp32(torch.device("cpu")):
                pass
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_full_fp32_restores_both_halves_of_a_sum_s_flag(wanted):
    flags, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    setattr(flags, name, wanted)
    try:
        with matmul.full_fp32(torch.device("cuda")):
            assert not getattr(flags, name)
        assert (getattr(flags, name), getattr(flags, f"{name}_split_k", wanted[1])) == wanted
    finally:
        setattr(flags, name, True)


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
