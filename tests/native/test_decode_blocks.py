"""Decoding many rows by blocks of weights: the same sums in the same order as of a row alone."""

import math

import pytest
import torch

from fastsae.ops import native

BLOCK = 2048  # features of fp32 weights that pass at a time; 4096 of two bytes


def sample(n, k, f, d, dtype):
    """Codes with zeros, repeated indices, a row without entries; zeros point at a row of NaN."""
    values, indices = torch.randn(n, k), torch.randint(0, f, (n, k), dtype=torch.int32)
    indices[:, 1] = indices[:, 0]
    values[:, 2::3] = 0
    if n > 1:
        values[n // 2] = -0.0
    W, b = torch.randn(f, d).to(dtype), torch.randn(d)
    W[f // 3] = math.nan
    values[indices == f // 3] = 0
    return values, indices, W, b


def alone(values, indices, W, b=None):
    rows = range(len(values))
    return torch.cat([native.decode(values[[i]], indices[[i]], W, b) for i in rows])


@pytest.mark.parametrize(
    "n,k,f,d",
    [
        (110, 100, BLOCK + 52, 257),  # the last block of features and that of columns are short
        (210, 64, 300, 900),  # all features in one block
        (95, 120, BLOCK, 192),  # whole blocks
    ],
)
def test_blocks_give_the_bits_of_a_row_alone(threads, dtype, isa, n, k, f, d):
    values, indices, W, b = sample(n, k, f, d, dtype)
    one = alone(values, indices, W, b)
    code = torch.zeros(n, f, dtype=torch.float64)
    code.scatter_add_(1, indices.long(), values.double())
    wanted = code @ W.double().nan_to_num() + b.double()
    assert ((one.double() - wanted).norm() / wanted.norm()) < (
        1e-6 if dtype == torch.float32 else 1e-2
    )
    for count in (1, 2, 7):
        threads(count)
        assert torch.equal(native.decode(values, indices, W, b), one)
        unbiased = native.decode(values, indices, W)
        assert torch.equal(unbiased[:2], alone(values[:2], indices[:2], W))
        assert not unbiased[n // 2].any()


def test_more_rows_than_a_block_has(threads):
    values, indices, W, b = sample(4100, 12, 1030, 257, torch.float32)
    some = [0, 2049, 2050, 2051, 4099]
    threads(2)
    got = native.decode(values, indices, W, b)
    assert torch.equal(got[some], alone(values[some], indices[some], W, b))
    assert torch.equal(native.decode(values[1:], indices[1:], W, b), got[1:])


@pytest.mark.parametrize("k", [48, 200])  # few entries of a row and many are sorted in two ways
@pytest.mark.parametrize("n", [1, 200])
def test_sums_go_by_ascending_index(isa, n, k):
    """However the entries lie; those of one feature go in their own order."""
    values, indices, W, b = sample(n, k, 1030, 257, torch.float32)
    got = native.decode(values, indices, W, b)
    order = indices.argsort(stable=True)
    assert torch.equal(native.decode(values.gather(1, order), indices.gather(1, order), W, b), got)
    distinct = torch.stack([torch.randperm(1030)[:k] for _ in range(n)]).int()
    any_order = torch.randperm(k)
    got = native.decode(values, distinct, W.nan_to_num(), b)
    shuffled = values[:, any_order], distinct[:, any_order]
    assert torch.equal(native.decode(*shuffled, W.nan_to_num(), b), got)
    W, indices, values = torch.ones(1030, 257), torch.zeros_like(indices), torch.zeros(n, k)
    indices[:, :2] = 5  # nothing ascends
    values[:, 1], values[:, 9], values[:, 10], values[:, 11] = 2.0, 1e8, 1.0, -1e8
    assert (native.decode(values, indices, W) == 2.0).all()  # (1e8 + 1) - 1e8 = 0
    values[:, 10], values[:, 11] = -1e8, 1.0
    assert (native.decode(values, indices, W) == 3.0).all()


def test_nan_and_infinity_travel_through_blocks(isa):
    values, indices, W, _ = sample(200, 48, 1030, 257, torch.float32)
    W = W.nan_to_num()
    clean = native.decode(values, indices, W)
    values[3, 0], values[4, 0] = math.nan, math.inf
    got = native.decode(values, indices, W)
    assert got[3].isnan().all() and not got[4].isfinite().any()
    assert torch.equal(got[5:], clean[5:])


def test_more_features_than_short_keys_number(isa):
    f = 2**24 + 5
    W, indices = torch.zeros(f, 1), torch.tensor([[f - 1, 3, f - 2, 3]], dtype=torch.int32)
    W[3], W[f - 2], W[f - 1] = 1.0, 1e8, -1e8
    assert native.decode(torch.tensor([[1.0, 4.0, 1.0, 2.0]]), indices, W).item() == 8.0
