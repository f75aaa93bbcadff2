"""decode and the two products of its gradients, gather_dot and sparse_outer."""

import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops.backend import BackendError, interpreting
from fastsae.ops.check import indices as checked_indices
from fastsae.ops.decode import decode_dense

pytestmark = pytest.mark.op("decode")
gather_op = pytest.mark.op("gather_dot")
outer_op = pytest.mark.op("sparse_outer")

SHAPES = [(0, 5, 48, 131), (1, 5, 48, 131), (7, 5, 48, 131), (7, 1, 1, 1), (5, 33, 70, 35)]


def dense_code(s, dtype=torch.float64):
    code = torch.zeros(s.values.shape[0], s.W.shape[0], dtype=dtype, device=s.values.device)
    return code.scatter_add(1, s.indices.long(), s.values.to(dtype))


def dense_decode(s, dtype=torch.float64, bias=True):
    out = dense_code(s, dtype) @ s.W.to(dtype)
    return out + s.b_dec.to(dtype) if bias else out


def check(s, backend, close, bias=True):
    b_dec = s.b_dec if bias else None
    got = ops.decode(s.values, s.indices, s.W, b_dec, backend=backend)
    dtype = torch.promote_types(s.values.dtype, s.W.dtype)
    assert got.dtype == dtype
    # Products in fp32, one rounding to the result's type: what torch would give at its best.
    close(got, dense_decode(s, bias=bias), dense_decode(s, torch.float32, bias).to(dtype))


@pytest.mark.parametrize("n,k,d,f", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes(decode_sample, as_good_as_torch, n, k, d, f, bias, device, backend):
    check(decode_sample(n, k, d, f, device=device), backend, as_good_as_torch, bias)


@pytest.mark.parametrize("n", [1, 7])
def test_types(decode_sample, as_good_as_torch, mixed, n, device, backend):
    s = decode_sample(n, dtype=mixed[0], weights=mixed[1], device=device)
    check(s, backend, as_good_as_torch)


@pytest.mark.parametrize("d", [640, 2304, 5376])
def test_wide_rows(decode_sample, as_good_as_torch, d, device, backend):
    check(decode_sample(2, 9, d, 37, device=device), backend, as_good_as_torch)


@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (0, 5), (7, 0), (5,), (2, 3, 5)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_without_gradients(decode_sample, mixed, shape, index, device):
    """The short way to the kernel serves what the long way serves, with the same bits."""
    n = int(torch.tensor(shape[:-1]).prod())
    s = decode_sample(n, shape[-1], dtype=mixed[0], weights=mixed[1], device=device)
    values, indices = s.values.view(shape), s.indices.view(shape).to(index)
    for arguments in (
        (values, indices, s.W, s.b_dec),
        (values, indices, s.W),
        (values.mT.contiguous().mT if len(shape) > 1 else values, indices, s.W.T.contiguous().T),
        (values.double(), indices, s.W.double(), s.b_dec.double()),
    ):
        wanted = ops.decode(*arguments)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = ops.decode(*arguments)
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_without_gradients_the_environment_still_chooses(decode_sample, monkeypatch, device):
    s = decode_sample(device=device)
    monkeypatch.setenv("FASTSAE_BACKEND", "none such")
    with torch.no_grad(), pytest.raises(BackendError, match="none such"):
        ops.decode(s.values, s.indices, s.W)


def test_repeated_indices_add_up(decode_sample, as_good_as_torch, device, backend):
    s = decode_sample(6, 8, 48, 20, device=device)
    s.indices[:, 4:] = s.indices[:, :4]
    check(s, backend, as_good_as_torch)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 0, 5), (2, 3, 0), (0,)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_leading_dimensions_and_no_entries(decode_sample, shape, index, device, backend):
    n = int(torch.tensor(shape[:-1]).prod()) if len(shape) > 1 else 1
    s = decode_sample(n, shape[-1], device=device)
    values, indices = s.values.view(shape), s.indices.view(shape).to(index)
    got = ops.decode(values, indices, s.W, s.b_dec, backend=backend)
    assert got.shape == (*shape[:-1], 48)
    torch.testing.assert_close(got.reshape(n, 48), dense_decode(s).float())


def test_every_memory_layout(decode_sample, relayout, layout, device, backend):
    s = decode_sample(6, 4, 32, 67, device=device)
    for name in ("values", "W", "b_dec"):
        setattr(s, name, relayout((getattr(s, name) * 64).round(), layout))  # exact in fp32
    s.indices = s.indices.mT.contiguous().mT if layout == "transposed" else s.indices
    got = ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend)
    assert torch.equal(got.double(), dense_decode(s))


def test_zero_entries_never_meet_the_weights(decode_sample, device, backend):
    """Padding may point at any row: a NaN or infinity there must not reach the output."""
    s = decode_sample(device=device)
    clean = ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend)
    s.W[3] = float("nan")
    s.W[4] = float("inf")
    pad = torch.tensor([3, 4, 3], dtype=torch.int32, device=device).expand(7, 3)
    keep = ((s.indices != 3) & (s.indices != 4)).all(1)
    assert keep.any()
    values = torch.cat([s.values, torch.tensor([0.0, -0.0, 0.0], device=device).expand(7, 3)], 1)
    got = ops.decode(values, torch.cat([s.indices, pad], 1), s.W, s.b_dec, backend=backend)
    assert torch.equal(got[keep], clean[keep])


def test_nan_and_infinity_travel(decode_sample, device, backend):
    s = decode_sample(4, device=device)
    s.values[0, 0] = float("nan")
    s.values[1, 0] = float("inf")
    s.W[s.indices[2, 0].long()] = float("nan")
    s.values[2, 0] = 1.0
    got = ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend)
    assert got[0].isnan().all() and got[1].isinf().all() and got[2].isnan().all()


def test_cancellation_of_massive_terms(decode_sample, as_good_as_torch, device, backend):
    s = decode_sample(5, 12, device=device)
    s.values[:, :6] *= 1e5
    s.values[:, 6:] = -s.values[:, :6]
    s.W[s.indices[:, 6:].long()] = s.W[s.indices[:, :6].long()] * (1 + 1e-3)
    check(s, backend, as_good_as_torch)


def test_process_wide_modes(decode_sample, process_mode, mode, device, backend):
    s = decode_sample(9, 6, device=device)
    plain = ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend)
    with process_mode(mode, device):
        assert torch.equal(ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend), plain)


# --- gather_dot and sparse_outer ----------------------------------------------------------------


def dense_dots(s, dtype=torch.float64):
    return (s.g.to(dtype) @ s.W.to(dtype).T).gather(1, s.indices.long())


@gather_op
@pytest.mark.parametrize("n,k,d,f", SHAPES)
def test_gather_dot_shapes(decode_sample, as_good_as_torch, n, k, d, f, device, backend):
    s = decode_sample(n, k, d, f, device=device)
    got = ops.gather_dot(s.g, s.W, s.indices, backend=backend)
    assert got.dtype == torch.float32
    as_good_as_torch(got, dense_dots(s), dense_dots(s, torch.float32))


@gather_op
def test_gather_dot_types(decode_sample, as_good_as_torch, mixed, device, backend):
    s = decode_sample(dtype=mixed[0], weights=mixed[1], device=device)
    got = ops.gather_dot(s.g, s.W, s.indices.long(), backend=backend)
    assert got.dtype == torch.float32
    as_good_as_torch(got, dense_dots(s), dense_dots(s, torch.float32))


@gather_op
def test_the_op_itself_takes_any_layout(decode_sample, device, backend):
    """As other modules call it, without the checks of the public function."""
    s = decode_sample(9, 6, device=device)
    g, W, indices = (t.T.contiguous().T for t in (s.g, s.W, s.indices))
    got = torch.ops.fastsae.gather_dot(g, W, indices, backend)
    assert torch.equal(got, ops.gather_dot(s.g, s.W, s.indices, backend=backend))


def dense_outer(s, dtype=torch.float64):
    code = dense_code(s, dtype)
    return code.T @ s.g.to(dtype), code.sum(0)


def check_outer(s, backend, close):
    f = s.W.shape[0]
    dW, db = ops.sparse_outer(s.values, s.indices, s.g, f, backend=backend)
    assert dW.dtype == db.dtype == torch.float32
    assert dW.shape == (f, s.g.shape[1]) and db.shape == (f,)
    (wanted_W, wanted_b), (torch_W, torch_b) = dense_outer(s), dense_outer(s, torch.float32)
    close(dW, wanted_W, torch_W, "dW")
    close(db, wanted_b, torch_b, "db")
    unused = dense_code(s).abs().sum(0) == 0
    assert (dW[unused] == 0).all() and (db[unused] == 0).all()


@outer_op
@pytest.mark.parametrize("n,k,d,f", SHAPES)
def test_sparse_outer_shapes(decode_sample, as_good_as_torch, n, k, d, f, device, backend):
    check_outer(decode_sample(n, k, d, f, device=device), backend, as_good_as_torch)


@outer_op
def test_sparse_outer_types(decode_sample, as_good_as_torch, mixed, device, backend):
    s = decode_sample(dtype=mixed[0], device=device)
    s.g = s.g.to(mixed[1])
    check_outer(s, backend, as_good_as_torch)


@outer_op
def test_sparse_outer_of_a_hot_feature(decode_sample, as_good_as_torch, device, backend):
    """One feature active in every token: more entries than any segment or tile holds."""
    s = decode_sample(701, 3, 16, 9, device=device)
    s.indices[:, 0] = 4
    s.indices[:, 1:] = s.indices[:, 1:] % 4
    check_outer(s, backend, as_good_as_torch)


@outer_op
def test_sparse_outer_is_bit_reproducible(decode_sample, threads, device, backend):
    s = decode_sample(701, 3, 16, 9, device=device)
    first = ops.sparse_outer(s.values, s.indices, s.g, 9, backend=backend)
    for count in (1, 2, 7):
        threads(count)
        again = ops.sparse_outer(s.values, s.indices, s.g, 9, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# --- gradients ----------------------------------------------------------------------------------


def test_gradcheck(decode_sample, device):
    s = decode_sample(3, 4, 5, 9, dtype=torch.float64, device=device)
    s.values[0, 0] = 0  # a zero entry has a gradient: ⟨g, W⟩
    inputs = [t.requires_grad_() for t in (s.values, s.W, s.b_dec)]

    def decode(values, W, b_dec=None):
        return ops.decode(values, s.indices, W, b_dec)

    for arguments in (inputs, inputs[:2]):
        assert torch.autograd.gradcheck(decode, arguments)
        assert torch.autograd.gradgradcheck(decode, arguments, fast_mode=True)
    g = s.g.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, W: ops.gather_dot(g, W, s.indices), (g, s.W))

    def outer(values, g):
        return ops.sparse_outer(values, s.indices, g, 9)

    assert torch.autograd.gradcheck(outer, (s.values, g))


def test_gradients_of_every_backend(decode_sample, as_good_as_torch, mixed, device, backend):
    s = decode_sample(11, dtype=mixed[0], weights=mixed[1], device=device)
    inputs = [t.requires_grad_() for t in (s.values, s.W, s.b_dec)]
    out = ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend)
    weight = torch.randn(out.shape).to(device, out.dtype)
    got = torch.autograd.grad(out, inputs, weight)

    def dense(dtype):
        values, W, b_dec = (t.detach().to(dtype).requires_grad_() for t in inputs)
        rows = W[s.indices.long()]
        out = (values.unsqueeze(-1) * rows).sum(1) + b_dec
        return torch.autograd.grad(out, (values, W, b_dec), weight.to(dtype))

    names = ("values", "W_dec", "b_dec")
    everything = zip(names, got, dense(torch.float64), dense(torch.float32), inputs, strict=True)
    for name, ours, exact, torchs, like in everything:
        assert ours.dtype == like.dtype
        as_good_as_torch(ours, exact, torchs.to(like.dtype), name)


def test_dense_code(decode_sample, as_good_as_torch, device, backend):
    s = decode_sample(11, device=device)
    code = dense_code(s, torch.float32).view(11, 1, -1)
    inputs = [t.requires_grad_() for t in (code, s.W, s.b_dec)]
    out = decode_dense(*inputs, backend=backend)
    as_good_as_torch(out[:, 0], dense_decode(s), dense_decode(s, torch.float32))
    with torch.no_grad():
        assert torch.equal(decode_dense(*inputs, backend=backend), out)
    got = torch.autograd.grad(out.square().sum(), inputs)
    dense = code @ s.W + s.b_dec
    for ours, wanted in zip(got, torch.autograd.grad(dense.square().sum(), inputs), strict=True):
        torch.testing.assert_close(ours, wanted)
    zero = torch.zeros(2, 131, device=device)
    assert torch.equal(decode_dense(zero, s.W, s.b_dec), s.b_dec.expand(2, -1))
    assert decode_dense(zero[:0], s.W, s.b_dec).shape == (0, 48)


def test_dense_gradcheck(decode_sample, device):
    s = decode_sample(3, 4, 5, 9, dtype=torch.float64, device=device)
    # Entries near 0 cross it under the finite difference: any value will do, 0 included.
    inputs = [t.requires_grad_() for t in (dense_code(s), s.W, s.b_dec)]
    assert torch.autograd.gradcheck(decode_dense, inputs, fast_mode=True)


# --- dispatch, compilation, memory, errors ------------------------------------------------------


def test_opcheck(decode_sample, device, backend):
    s = decode_sample(3, 4, 8, 20, device=device)
    decode = torch.ops.fastsae.decode.default
    torch.library.opcheck(decode, (s.values, s.indices, s.W, None, backend))
    leaves = [t.requires_grad_() for t in (s.values, s.W, s.b_dec)]
    torch.library.opcheck(decode, (leaves[0], s.indices, *leaves[1:], backend))


@gather_op
def test_opcheck_of_the_gradients(decode_sample, device, backend):
    s = decode_sample(3, 4, 8, 20, device=device)
    ops_ = torch.ops.fastsae
    leaves = [t.requires_grad_() for t in (s.values, s.g, s.W)]
    torch.library.opcheck(ops_.gather_dot.default, (leaves[1], leaves[2], s.indices, backend))
    arguments = (leaves[0], s.indices, leaves[1], 20, backend)
    torch.library.opcheck(ops_.sparse_outer.default, arguments)


def test_opcheck_of_csr_to_padded(device):
    values = torch.rand(6, device=device, requires_grad=True)
    indices = torch.tensor([0, 2, 1, 3, 4, 5], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 2, 2, 6], device=device)
    torch.library.opcheck(torch.ops.fastsae.csr_to_padded.default, (values, indices, offsets))


def test_compiles_to_one_graph_for_every_batch_size(decode_sample, count_compiles, device, backend):
    s = decode_sample(0, device=device)

    def decode(values, indices):
        return ops.decode(values * 2, indices, s.W, s.b_dec, backend=backend)

    compiled, counter = count_compiles(decode)
    for n in (3, 5, 8, 13):
        t = decode_sample(n, device=device)
        assert torch.equal(compiled(t.values, t.indices), decode(t.values, t.indices))
    assert counter.frame_count <= 2, "a new N recompiled"


@pytest.mark.parametrize("op", ["decode", "gather_dot", "sparse_outer"])
def test_nothing_of_size_n_k_d(decode_sample, largest_allocation, op, device, backend):
    if interpreting():
        pytest.skip("too slow in Triton's interpreter")
    n = 1500 if device == "cpu" else 6000  # N·K·D·4 bytes = 197 MB
    s = decode_sample(n, 64, 512, 200, device=device)
    run = {
        "decode": lambda: ops.decode(s.values, s.indices, s.W, s.b_dec, backend=backend),
        "gather_dot": lambda: ops.gather_dot(s.g, s.W, s.indices, backend=backend),
        "sparse_outer": lambda: ops.sparse_outer(s.values, s.indices, s.g, 200, backend=backend),
    }[op]
    assert largest_allocation(run, device) < 0.4 * n * 64 * 512 * 4


def test_an_index_beyond_int32_does_not_wrap_into_range(monkeypatch):
    """Where kernels check the range (on a GPU, under compile) they see int32."""
    far = torch.tensor([[1 + 2**32, 3, -(2**32), 20, -7]])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert checked_indices("indices", far, 20).tolist() == [[20, 3, -1, 20, -1]]


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
def test_errors_name_the_argument_and_the_fix(decode_sample, grad):
    s = decode_sample(3, 4, 8, 20)
    good = {"values": s.values, "indices": s.indices, "W_dec": s.W, "b_dec": s.b_dec}
    bad_row = s.indices.clone()
    bad_row[1, 2] = 20
    for change, words in (
        ({"indices": bad_row}, ["indices: got values from", "to 20, expected 0 to 19"]),
        ({"indices": -s.indices - 1}, ["indices: got values from -"]),
        ({"indices": s.indices.float()}, ["indices: got dtype torch.float32", "int32 or int64"]),
        ({"indices": s.indices[:, :3]}, ["indices: got shape [3, 3]", "values, [3, 4]"]),
        ({"values": s.values.int()}, ["values: got dtype torch.int32"]),
        ({"values": None}, ["values: got NoneType", "torch.Tensor"]),
        ({"W_dec": s.W[0]}, ["W_dec: got shape [8]", "2-D"]),
        ({"b_dec": s.W[0, :7]}, ["b_dec: got shape [7], expected [8]"]),
        ({"b_dec": s.b_dec.to("meta")}, ["b_dec on meta", ".to(device)"]),
    ):
        with pytest.raises(FastsaeError) as error, grad():
            ops.decode(**good | change)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(FastsaeError, match=r"g: got shape \[3, 7\], expected \[rows, 8\]"):
        ops.gather_dot(s.g[:, :7], s.W, s.indices)
    with pytest.raises(FastsaeError, match=r"indices: got shape \[2, 4\], expected \[3, K\]"):
        ops.gather_dot(s.g, s.W, s.indices[:2])
    with pytest.raises(FastsaeError, match=r"values: got shape \[2, 4\], expected \[3, K\]"):
        ops.sparse_outer(s.values[:2], s.indices[:2], s.g, 20)
    with pytest.raises(FastsaeError, match="d_sae: got 0"):
        ops.sparse_outer(s.values, s.indices, s.g, 0)
    with pytest.raises(FastsaeError, match=r"z: got shape \[3, 4\], expected \[..., 20\]"):
        decode_dense(s.values, s.W)
