"""A row's result depends on nothing but the row: not on the batch, its order, threads or reruns.

The reference is excused from batch invariance: it is torch.mm, whose order of summation depends on
the shape and the threads. Its reruns are bit-equal too.
"""

import pytest
import torch

from fastsae import ops

pytestmark = pytest.mark.op("encode_topk")
not_torch_mm = pytest.mark.op("encode_topk", but=("reference",))
# Values come from one dot. (Triton's of more than 64 rows that are in half precision as the weights
# are come from cuBLAS, which picks its order of summation by shape; N stays below that.)
one_dot = not_torch_mm

N, F, K = 37, 300, 12


def encode(s, rows, backend):
    return ops.encode_topk(s.x[rows], s.W_enc, s.b_enc, K, b_dec=s.b_dec, backend=backend)


def threshold_rows(s, rows, backend):
    """encode_threshold as a list of (values, indices) per row."""
    values, indices, offsets = ops.encode_threshold(
        s.x[rows], s.W_enc, s.b_enc, s.threshold, b_dec=s.b_dec, backend=backend
    )
    sizes = offsets.diff().tolist()
    return list(zip(values.split(sizes), indices.split(sizes), strict=True))


def everything(samples, rows, backend):
    """Results of every row-wise op but the encoders, as one list of tensors [len(rows), ...]."""
    s, d, t = samples
    return [
        *ops.topk(s.x[rows], 9, backend=backend),
        ops.decode(d.values[rows], d.indices[rows], d.W, d.b_dec, backend=backend),
        ops.gather_dot(d.g[rows], d.W, d.indices[rows], backend=backend),
        ops.steer(t.x[rows], t.slots[rows], t.strengths[rows], t.table, backend=backend),
    ]


@pytest.fixture(params=["float32", "bfloat16", "massive", "wide"])
def samples(request, encode_sample, decode_sample, steer_sample, device):
    kind = "massive" if request.param == "massive" else "normal"
    dtype = torch.bfloat16 if request.param == "bfloat16" else torch.float32
    return (
        encode_sample(
            N, 64, 4500 if request.param == "wide" else F, dtype=dtype, kind=kind, device=device
        ),
        decode_sample(N, 9, 64, F, dtype=dtype, device=device),
        steer_sample(N, 64, dtype=dtype, kind=kind, device=device),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reruns_are_bit_equal(samples, device, backend):
    rows = torch.arange(N, device=device)
    first = [*everything(samples, rows, backend), *encode(samples[0], rows, backend)]
    for _ in range(3):
        again = [*everything(samples, rows, backend), *encode(samples[0], rows, backend)]
        assert same(first, again)
    ragged = threshold_rows(samples[0], rows, backend)
    for (v, i), (w, j) in zip(ragged, threshold_rows(samples[0], rows, backend), strict=True):
        assert torch.equal(v, w) and torch.equal(i, j)


BATCHES = ([0], [36], [3, 4], list(range(5, 22)), list(range(36, -1, -1)), [7] * 19)


@not_torch_mm
def test_a_row_does_not_see_its_batch(samples, device, backend):
    whole = everything(samples, torch.arange(N, device=device), backend)
    for rows in BATCHES:
        index = torch.tensor(rows, device=device)
        assert same([t[index] for t in whole], everything(samples, index, backend)), rows


@one_dot
def test_an_encoded_row_does_not_see_its_batch(samples, device, backend):
    s, everyone = samples[0], torch.arange(N, device=device)
    whole, ragged = encode(s, everyone, backend), threshold_rows(s, everyone, backend)
    for rows in BATCHES:
        index = torch.tensor(rows, device=device)
        assert same([t[index] for t in whole], encode(s, index, backend)), rows
        for row, (v, i) in zip(rows, threshold_rows(s, index, backend), strict=True):
            assert torch.equal(v, ragged[row][0]) and torch.equal(i, ragged[row][1])


@one_dot
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_number_of_threads_does_not_matter(samples, threads, count, device, backend):
    s, rows = samples[0], torch.arange(N, device=device)
    whole, ragged = everything(samples, rows, backend), threshold_rows(s, rows, backend)
    encoded = encode(s, rows, backend)
    threads(count)
    assert same(whole, everything(samples, rows, backend))
    assert same(encoded, encode(s, rows, backend))
    for (v, i), (w, j) in zip(ragged, threshold_rows(s, rows, backend), strict=True):
        assert torch.equal(v, w) and torch.equal(i, j)


@one_dot
def test_values_of_both_encoders_are_the_same_numbers(samples, device, backend):
    """One dot defines a pre-activation: top-k and threshold agree bit for bit."""
    s = samples[0]
    values, indices = encode(s, torch.arange(N, device=device), backend)
    dense = torch.zeros(N, s.W_enc.shape[0], device=device).scatter(1, indices.long(), values)
    for row, (v, i) in enumerate(threshold_rows(s, torch.arange(N, device=device), backend)):
        both = dense[row, i.long()] > 0
        assert torch.equal(dense[row, i.long()][both], v[both])


def test_an_equal_row_gives_an_equal_result_across_weights_in_place(encode_sample, device, backend):
    """Weights edited in place, and new weights at a reused address, never meet a stale copy."""
    s = encode_sample(9, 64, F, device=device)
    encode(s, slice(None), backend)
    for step in range(3):
        s.W_enc.mul_(-1.0 - step)
        s.b_enc.add_(0.1)
        fresh = encode_sample(9, 64, F, device=device)
        fresh.W_enc, fresh.b_enc = s.W_enc.clone(), s.b_enc.clone()
        assert same(encode(s, slice(None), backend), encode(fresh, slice(None), backend))
        del fresh
    with torch.no_grad():
        weights = torch.nn.Parameter(s.W_enc.clone())
        s.W_enc = weights
        encode(s, slice(None), backend)
        weights.data = torch.randn_like(weights)  # a move or cast of a module swaps .data
        got = encode(s, slice(None), backend)
        s.W_enc = weights.detach().clone()
        assert same(got, encode(s, slice(None), backend))
