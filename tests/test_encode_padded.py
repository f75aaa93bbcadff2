"""encode_threshold_padded: encode_threshold in a fixed shape, with the true counts."""

import pytest
import torch

from fastsae import FastsaeError, ops

pytestmark = pytest.mark.op("encode_threshold_padded")


def arguments(s):
    return (s.x, s.W_enc, s.b_enc, s.threshold)


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("capacity", [100, 131])
def test_agrees_with_the_compressed_form(encode_sample, n, capacity, device, backend):
    s = encode_sample(n, device=device)
    kw = {"b_dec": s.b_dec, "backend": backend}
    values, indices, counts = ops.encode_threshold_padded(*arguments(s), capacity, **kw)
    assert values.shape == indices.shape == (n, capacity) and counts.shape == (n,)
    assert values.dtype == torch.float32 and indices.dtype == counts.dtype == torch.int32
    flat, columns, offsets = ops.encode_threshold(*arguments(s), **kw)
    assert torch.equal(counts, offsets.diff().int())
    used = torch.arange(capacity, device=device) < counts[:, None]
    assert torch.equal(values[used], flat) and torch.equal(indices[used], columns)
    assert (values[~used] == 0).all()
    for row, count in zip(indices.tolist(), counts.tolist(), strict=True):
        free = [f for f in range(capacity) if f not in set(row[:count])]
        assert row[count:] == free[: capacity - count]


@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (2, 0, 48)])
def test_leading_dimensions_and_one_threshold(encode_sample, shape, device, backend):
    s = encode_sample(torch.Size(shape[:-1]).numel(), device=device)
    got = ops.encode_threshold_padded(s.x.view(shape), s.W_enc, s.b_enc, 0.4, 131, backend=backend)
    flat = ops.encode_threshold_padded(s.x, s.W_enc, s.b_enc, 0.4, 131, backend=backend)
    assert got[0].shape == (*shape[:-1], 131) and got[2].shape == shape[:-1]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(got, flat, strict=True))


def test_a_row_that_does_not_fit_is_an_error(encode_sample, device, backend):
    """The op cuts and tells; the public function refuses."""
    s = encode_sample(5, device=device)
    full = ops.encode_threshold_padded(*arguments(s), 131, backend=backend)
    most = int(full[2].max())
    with pytest.raises(FastsaeError, match=f"capacity: got {most - 1}, but a row has {most}"):
        ops.encode_threshold_padded(*arguments(s), most - 1, backend=backend)
    op = torch.ops.fastsae.encode_threshold_padded
    values, indices, counts = op(*arguments(s), 3, None, backend)
    assert torch.equal(counts, full[2])
    assert torch.equal(values, full[0][:, :3]) and torch.equal(indices, full[1][:, :3])
    for wrong in (0, 132, 2.0):
        with pytest.raises(FastsaeError, match="capacity: got"):
            ops.encode_threshold_padded(*arguments(s), wrong, backend=backend)


def test_gradients_are_those_of_the_compressed_form(encode_sample, device, backend):
    s = encode_sample(5, device=device)
    leaves, other = s.leaves(), s.leaves()
    x, W, b, b_dec = leaves
    got = ops.encode_threshold_padded(x, W, b, s.threshold, 131, b_dec=b_dec, backend=backend)
    x, W, b, b_dec = other
    wanted = ops.encode_threshold(x, W, b, s.threshold, b_dec=b_dec, backend=backend)
    weights = torch.arange(1.0, 132.0, device=device)
    slot = torch.cat([weights[:count] for count in got[2].tolist()])
    (got[0] * weights).sum().backward()
    (wanted[0] * slot).sum().backward()
    for a, b in zip(leaves, other, strict=True):
        assert b.grad.abs().max() > 0
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


def test_gradcheck(encode_sample):
    s = encode_sample(3, 8, 20, dtype=torch.float64)
    inputs = s.leaves()

    def values(x, W, b, b_dec):
        threshold = s.threshold.double()
        return ops.encode_threshold_padded(x, W, b, threshold, 20, b_dec=b_dec)[0]

    assert torch.autograd.gradcheck(values, inputs)


def test_opcheck_and_one_graph(encode_sample, count_compiles, device, backend):
    s = encode_sample(3, 8, 20, device=device)
    op = torch.ops.fastsae.encode_threshold_padded.default
    torch.library.opcheck(op, (*arguments(s), 20, s.b_dec, backend))
    x, W, b, b_dec = s.leaves()
    torch.library.opcheck(op, (x, W, b, s.threshold, 20, b_dec, backend))

    def encode(x):
        return ops.encode_threshold_padded(x + 0, *arguments(s)[1:], 4, backend=backend)

    compiled, counter = count_compiles(encode)
    counts = compiled(s.x)[2]
    wanted = torch.ops.fastsae.encode_threshold_padded(*arguments(s), 4, None, backend)
    assert counter.frame_count == 1 and torch.equal(counts, wanted[2])


def test_torch_compile_meets_no_question_about_a_cuda_graph(monkeypatch):
    """It cannot trace the answer, a bool: on a GPU the call would break the graph."""

    def untraceable():
        raise AssertionError("asked while compiling")

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", untraceable)
    with torch._subclasses.FakeTensorMode():
        x, W = torch.empty(3, 8, device="cuda"), torch.empty(20, 8, device="cuda")
        bias = torch.empty(20, device="cuda")
        values, _, counts = ops.encode_threshold_padded(x, W, bias, bias, 4)
    assert x.is_cuda and values.shape == (3, 4) and counts.shape == (3,)
