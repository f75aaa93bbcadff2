"""The certified encoders of the Triton backend in the interpreter: one dot defines every value.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it.
"""

import os

import numpy as np
import pytest
import torch

from fastsae.ops import reference, screens

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import (
        candidates,
        collect,
        copies,
        encode,
        encode_threshold,
        fused,
        matmul,
        rescore,
        screen,
        topk,
    )


def test_in_the_interpreter(run_again):
    run_again(__file__, timeout=1200)


def same(got, wanted):
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))
        for a, b in zip(got, wanted, strict=True)
    )


def sae(n, d, f, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    x, W = normal(n, d), normal(f, d) / d**0.5
    x[:, : d // 8] *= 20  # activations lie far from 0
    return x, W, normal(f) / 10, normal(d) / 3


PRODUCTS = ("int8", "step", "fused", "cublas")


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    """Every way to screen, on a problem that spans tiles of rows and of columns."""
    monkeypatch.setattr(candidates, "CHOICES", ((99, 9999, request.param),))
    monkeypatch.setattr(candidates, "TILE_ROWS", 3)
    monkeypatch.setattr(candidates, "TILE_COLUMNS", 128)
    monkeypatch.setattr(candidates, "FUSED_ROWS", 3)
    monkeypatch.setattr(fused, "PREFILL_COLUMNS", 128)
    monkeypatch.setattr(fused, "STEP_COLUMNS", 256)
    return request.param


@pytest.fixture(scope="module")
def oracle():
    """A problem, and its result in one product."""
    k, (x, W, b, b_dec) = 9, sae(5, 152, 330)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "CHOICES", ((99, 9999, "cublas"),))
        whole = encode.encode_topk(x, W, b, k, b_dec)
    wanted = reference.encode_topk(x.double(), W.double(), b.double(), k, b_dec.double())
    assert torch.equal(whole[1], wanted[1]) and (whole[0] - wanted[0]).abs().max() < 1e-5
    return (x, W, b, k, b_dec), whole


def test_no_product_or_tile_shows(product, oracle):
    arguments, whole = oracle
    assert same(whole, encode.encode_topk(*arguments))


def test_no_batch_or_step_shows(oracle, monkeypatch):
    """Alone and together; rescored in two steps; by slices whose sums pass through memory."""
    (x, *rest), whole = oracle
    for rows in ([0], [4, 3], [2] * 3):
        assert same([t[rows] for t in whole], encode.encode_topk(x[rows], *rest)), rows
    monkeypatch.setattr(rescore, "TWO_STEPS", 3)
    assert same(whole, encode.encode_topk(x, *rest))
    monkeypatch.setattr(rescore, "SLICE_BYTES", 0)
    assert same(whole, encode.encode_topk(x, *rest))


def test_no_fallback_shows(product, oracle, monkeypatch):
    """Lists that overflow for some rows, rows computed whole two by two, no screen at all."""
    (x, W, b, k, b_dec), whole = oracle
    monkeypatch.setattr(rescore, "FULL_BYTES", 2 * 330 * 4)
    monkeypatch.setattr(encode, "capacity", lambda k: 16)
    counts = candidates.candidates(x, W, b, b_dec, None, k, 16).lists.counts
    assert (counts == -1).any(), "some rows should overflow"
    assert same(whole, encode.encode_topk(x, W, b, k, b_dec))
    if product == "cublas":
        monkeypatch.setattr(encode, "MAX_K", 0)
        assert same(whole, encode.encode_topk(x, W, b, k, b_dec))


def test_half_precision_weights_are_their_own_copy(oracle, monkeypatch):
    """bf16 rows meet bf16 weights in a product that needs no centre; fp32 rows in the same one."""
    (x, W, b, k, _), _ = oracle
    half = x.bfloat16(), W.bfloat16()
    for rows in half[0], half[0].float():
        got = encode.encode_topk(rows, half[1], b, k)
        wanted = reference.encode_topk(half[0].double(), half[1].double(), b.double(), k)
        assert torch.equal(got[1], wanted[1]) and (got[0] - wanted[0]).abs().max() < 1e-4


def test_certificate_holds_and_says_something():
    """Every screened value lies within its bound, and the bound is no wider than it must be."""
    x, W, b, b_dec = sae(6, 136, 200)
    W[7] *= 1e4
    W[8] *= 1e-30
    x[5] *= 1e10
    with matmul.full_fp32(x.device):
        found = candidates.candidates(x, W, b - 1e9, b_dec, None, 200, 512).lists
    assert (found.counts[:5] <= 1).all(), "only what may be positive is a candidate"
    threshold = torch.full((200,), -1.0)
    with matmul.full_fp32(x.device):
        w = screen.weights(W, "bf16", x, b_dec)
        rows = screen.rows(x, b_dec, w)
        features = screen.features(W, w, b, threshold, candidates.G)
        found = collect.lists(6, 512, x.device)
        found.floors.fill_(0)
        h = matmul.product(rows.rounded, w.copy)
        limits = features._replace(
            limits=features.limits - torch.inf, group_limits=features.group_limits - torch.inf
        )
        collect.collect(h, None, rows.bounds, limits, found, 0, 136, 0, candidates.G)
    assert (found.counts == 200).all()
    exact = (x.double() - b_dec.double()) @ W.double().T + b.double()
    off = (found.heads[:, :200].double() - exact).abs()
    error = found.errors[:, :200].double()
    assert (off <= error).all()
    size = (x - b_dec - w.centre).norm(dim=1, keepdim=True) * W.norm(dim=1) + b.abs()
    assert (error <= 0.02 * size.double() + 1e-30).all()


def test_values_that_have_no_bound():
    x, W, b, b_dec = sae(6, 24, 150)
    W[:, 5] = W[:, 5].abs() + 1  # h is signed infinity, not NaN, where x is infinite
    W[40, 7], b[60], b[61] = torch.nan, torch.nan, torch.inf
    x[0, 5], x[1, 5], x[2, 3] = torch.inf, -torch.inf, torch.nan
    x[3] *= 1e30
    W[9] = 0
    got = encode.encode_topk(x, W, b, 8, b_dec)
    wanted = reference.encode_topk(x, W, b, 8, b_dec)
    assert torch.equal(got[1], wanted[1]) and torch.equal(got[0].isnan(), wanted[0].isnan())
    threshold = torch.full((150,), 0.5)
    threshold[61], threshold[3] = torch.inf, torch.nan
    got = encode_threshold.encode_threshold(x, W, b, threshold, b_dec)
    wanted = reference.encode_threshold(x, W, b, threshold, b_dec)
    assert torch.equal(got[1], wanted[1]) and torch.equal(got[2], wanted[2])


def test_ties_and_last_bits():
    """Equal rows, and rows that differ by one unit in the last place: a screen cannot tell."""
    W = torch.zeros(700, 24)
    W[:, 3] = 0.3
    W[600, 3] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
    x = torch.zeros(3, 24)
    x[:, 3] = 1.0
    values, indices = encode.encode_topk(x, W, torch.zeros(700), 3)
    assert indices.tolist() == [[600, 0, 1]] * 3
    assert torch.equal(values, W[[600, 0, 1], 3].expand(3, 3))


@pytest.mark.parametrize("k", [513, 1000, 1024, 1025, 1500, 2500])
@pytest.mark.parametrize("kind", ["normal", "ties", "few positive"])
def test_encode_of_a_large_k(k, kind):
    """Lists of candidates up to k = 1024, which overflow where many tie; whole rows above."""
    draw = torch.Generator().manual_seed(k)
    x, W = torch.randn(2, 16, generator=draw), torch.randn(2500, 16, generator=draw)
    b = torch.randn(2500, generator=draw)
    if kind != "normal":
        x, W, b = (x.round(), W.round(), b.round())
    if kind == "few positive":
        b -= 12
    got = encode.encode_topk(x, W, b, k)
    wanted = reference.encode_topk(x.double(), W.double(), b.double(), k)
    assert torch.equal(got[1], wanted[1]) and (got[0] - wanted[0]).abs().max() < 1e-4
    alone = encode.encode_topk(x[1:], W, b, k)
    assert same(alone, [t[1:] for t in got])


def test_a_large_k_in_two_steps(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x, W = torch.randn(2, 16, generator=draw), torch.randn(2500, 16, generator=draw)
    one = encode.encode_topk(x, W, torch.zeros(2500), 700)
    monkeypatch.setattr(rescore, "TWO_STEPS", 0)
    assert same(one, encode.encode_topk(x, W, torch.zeros(2500), 700))


@pytest.mark.parametrize("capacity", [40, 90, 150])
def test_padded_threshold(capacity, monkeypatch):
    """Fewer, about as many, and more places than members; some rows too long for their list."""
    x, W, b, b_dec = sae(5, 16, 150)
    threshold = torch.rand(150, generator=torch.Generator().manual_seed(1)) - 0.5
    monkeypatch.setattr(encode_threshold, "LIST", 64)
    arguments = (x, W, b, threshold, capacity, b_dec)
    got = encode_threshold.encode_threshold_padded(*arguments)
    wanted = reference.encode_threshold_padded(*arguments)
    assert got[2].tolist() == wanted[2].tolist() and max(got[2]) > 64
    assert torch.equal(got[1], wanted[1])
    assert (got[0] - wanted[0]).abs().max() < 1e-4
    assert torch.equal(got[0] == 0, wanted[0] == 0)
    assert all(len(set(row)) == capacity for row in got[1].tolist())
    dense = torch.zeros(5, 150).scatter(1, got[1].long(), got[0])
    values, indices = encode.encode_topk(x, W, b, 20, b_dec)
    both = dense.gather(1, indices.long()) > 0
    assert torch.equal(dense.gather(1, indices.long())[both], values[both]), "one dot, one value"


def test_rows_longer_than_expected_are_computed_again(monkeypatch):
    x, W, b, b_dec = sae(5, 16, 150)
    threshold = torch.zeros(150)
    whole = encode_threshold.encode_threshold(x, W, b, threshold, b_dec)
    wanted = reference.encode_threshold(x, W, b, threshold, b_dec)
    assert torch.equal(whole[1], wanted[1]) and torch.equal(whole[2], wanted[2])
    monkeypatch.setattr(encode_threshold, "CAPACITY", int(whole[2].diff().median()))
    monkeypatch.setattr(encode_threshold, "REPEAT_BYTES", 0)
    assert same(whole, encode_threshold.encode_threshold(x, W, b, threshold, b_dec))


def test_copies_of_weights(monkeypatch):
    """Made on the second use, dropped with a change that torch sees, harmless after one it does
    not, and never made while gradients are recorded."""
    monkeypatch.setattr(copies, "SMALLEST", 0)
    x, W, b, b_dec = sae(2, 40, 150)
    copies.clear()

    def encoded():
        return encode.encode_topk(x, W, b, 6, b_dec)

    def fresh():
        return encode.encode_topk(x, W.clone(), b, 6, b_dec)

    first = encoded()
    assert copies.total_bytes() == 0
    assert same(first, encoded())
    made = copies.total_bytes()
    assert made >= 150 * 40 * 2 and screens.total_bytes() == made
    edits = [lambda: W.mul_(-1.5), lambda: W.data.mul_(-0.7), lambda: W.data[3:9].neg_()]
    edits.append(lambda: W.data[:, 3].add_(5.0))  # a digest sees it in every fifth row
    for edit in edits:
        edit()
        assert same(encoded(), fresh())
        assert same(encoded(), fresh())
    screens.clear()
    assert copies.total_bytes() == 0
    half = W.bfloat16()
    for _ in range(2):
        encode.encode_topk(x, half, b, 6, b_dec)
    assert 0 < copies.total_bytes() < made, "bf16 weights are not copied"
    del half
    encoded()
    screens.clear()
    with screens.paused():
        encoded(), encoded(), encoded()
    assert copies.total_bytes() == 0


def far(path, count, dtype):
    """A tensor at the start of `count` elements that no memory holds until they are touched.

    Only a few elements belong to the tensor itself: the interpreter copies what does.
    """
    space = np.memmap(path, dtype=dtype, mode="w+", shape=(count,))
    return space, torch.from_numpy(space[:16])


FAR_ROWS, FAR_WIDTH = 2200, 1_000_000  # 2.2e9 elements, more than 2^31


def test_offsets_beyond_two_billion(tmp_path):
    """N·F and F·D above 2^31: the last row of a huge matrix is what its kernels read."""
    space, h = far(tmp_path / "h", FAR_ROWS * FAR_WIDTH, "float32")
    row = space[(FAR_ROWS - 1) * FAR_WIDTH :]
    row[:300] = np.random.default_rng(0).standard_normal(300)
    row[700:] = -1
    wanted = torch.from_numpy(row[:300].copy())
    places = torch.full((FAR_ROWS,), -1)
    places[-1] = 1

    values, indices = torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.int32)
    config = {**topk._config(FAR_ROWS, FAR_WIDTH, 7, 4), "UNIT": 1}
    packed, packed_small = far(tmp_path / "packed", FAR_ROWS * 2 * config["C"], "int64")
    flags = {"HAS_BIAS": False, "MAPPED": False, "ACTIVE": True, "PLACED": True}
    arguments = (h, h, indices, values, indices, packed_small, places, FAR_WIDTH, 7)
    topk._select_kernel[(FAR_ROWS,)](*arguments, **flags, **config)
    assert torch.equal(values[1], wanted.topk(7).values) and packed.any()

    counts, limits = torch.zeros(2, dtype=torch.int32), torch.zeros(300)
    values, indices = torch.zeros(2, 300), torch.zeros(2, 300, dtype=torch.int32)
    arguments = (h, indices, places, limits, counts, values, indices, counts)
    encode_threshold._members_kernel[(FAR_ROWS,)](
        *arguments, FAR_WIDTH, 300, 300, MAPPED=False, **encode_threshold._MEMBERS_CONFIG
    )
    assert counts[1] == (wanted > 0).sum()
    assert torch.equal(values[1, : counts[1]], wanted[wanted > 0])

    found = collect.lists(FAR_ROWS, 16, h.device)
    found.counts[:-1], found.counts[-1], found.floors[:] = -1, 0, 0
    zeros = torch.zeros(1024)
    features = screen.Features(*[zeros] * 8)
    listed = torch.zeros(FAR_ROWS, 64, dtype=torch.int32)
    arguments = (h, h, torch.zeros(2 * FAR_ROWS), *features, *found, listed)
    flags = {"HAS_MAXIMA": False, "LIMIT": False, "UNIT": 1}
    sizes = {"NG": 64, "G": 8, "C": 16, "BLOCK": 256, **flags}
    # Not the first tile, which would make the lists empty: features 8 and on.
    collect._collect_kernel[(FAR_ROWS,)](*arguments, 1, 300, FAR_WIDTH, 0, 5, 0.0, **sizes)
    assert found.counts[-1] >= 5
    kept = found.indices[-1, : found.counts[-1]].long() - 8
    assert set(wanted.topk(5).indices.tolist()) <= set(kept.tolist())
    assert torch.equal(found.heads[-1, : len(kept)], wanted[kept])


def test_weights_beyond_two_billion(tmp_path):
    F, D = 65538, 32768
    space, W = far(tmp_path / "W", F * D, "float32")
    w = space[(F - 1) * D :]
    w[:128] = np.random.default_rng(0).standard_normal(128)
    x, out = torch.ones(1, D), torch.zeros(1, 16)
    lists = torch.tensor([[F - 1] + [0] * 15], dtype=torch.int32)
    todo, one = torch.zeros(1, 16, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    row = torch.zeros(1, dtype=torch.int64)
    found = (x, x + torch.inf, one)  # nothing screened, nothing to contradict
    arguments = (x, W, x, row, one, todo, lists, *found, out, D, D, 16, 16, 1, 0, 1, 256, 1)
    rescore._dot_kernel[(1, 1)](*arguments, **rescore._DOT_CONFIG)
    assert out[0, 0] == pytest.approx(float(w[:128].sum()), rel=1e-5)


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
