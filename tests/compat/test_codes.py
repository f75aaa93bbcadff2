"""Dense tensors that remember their codes: exact checks, memory, gradients. Needs no peer."""

import gc
import math

import pytest
import torch

from fastsae.compat import buffers, codes
from fastsae.ops.decode import holds_codes

F, D = 512, 16


def sample(rows=6, k=9, features=F):
    values = torch.rand(rows, k) + 0.1
    values[:, 7:] = 0
    indices = torch.stack([torch.randperm(40)[:k] for _ in range(rows)]).int()
    indices[:, 8] = indices[:, 0]  # padding that names an index in use
    return codes.Codes(values, indices, features)


@pytest.mark.parametrize("features", [F, F + 1])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_every_single_edit_is_seen(features, kind, context):
    with context():
        dense = codes.dense(sample(2, features=features), (2,), kind)
        found = codes.recall(dense)
        assert codes.unedited(dense, found)
        for row in range(2):
            for feature in range(features):
                old = float(dense[row, feature])
                for new in (old + 1.5, -0.5, float("nan")):
                    dense[row, feature] = new
                    assert not codes.unedited(dense, found), (row, feature, new)
                dense[row, feature] = old
        assert codes.unedited(dense, found)


@pytest.mark.parametrize("edit", ["item", "data", "numpy", "detached", "moved", "opposite"])
def test_an_edited_tensor_is_decoded_as_edited(edit, close):
    W, b = torch.randn(F, D), torch.randn(D)
    dense = codes.dense(sample(), (6,), torch.float32)
    if edit == "item":
        dense[0, 500] = 3.0
    elif edit == "data":
        dense.data[0, 500] = 3.0
    elif edit == "numpy":
        dense.numpy()[0, 500] = 3.0
    elif edit == "detached":
        dense.detach().mul_(2)
    elif edit == "moved":
        dense.copy_(dense.roll(2, 1))
    else:
        dense[0, 501], dense[0, 503] = 2.0, -2.0  # bit patterns that add up to zero
    close(codes.decode(dense, W, b), dense @ W + b)


def test_decoding_reads_the_codes_of_an_unedited_tensor(close):
    """Rows of W_dec that no code names may hold anything."""
    W, b = torch.full((F, D), torch.nan), torch.randn(D)
    z = sample()
    W[:40] = torch.randn(40, D)
    dense = codes.dense(z, (2, 3), torch.float32)
    close(codes.decode(dense, W, b), (dense[..., :40] @ W[:40]) + b)


def test_a_buffer_comes_back_only_when_nothing_can_see_it():
    buffers.release()
    dense = buffers.zeros((64, 8192), torch.float32, torch.device("cpu"))
    address, alias = dense.data_ptr(), dense.numpy()
    assert address % 64 == 0
    del dense
    gc.collect()
    alias[0, 0] = 5
    other = buffers.zeros((64, 8192), torch.float32, torch.device("cpu"))
    assert other.data_ptr() != address and float(other.sum()) == 0 and alias[0, 0] == 5
    del alias
    gc.collect()
    again = buffers.zeros((64, 8192), torch.float32, torch.device("cpu"))
    assert again.data_ptr() == address and float(again.abs().sum()) == 0
    del again, other
    gc.collect()
    assert buffers.release() >= 2 * 64 * 8192 * 4 and buffers.release() == 0


def test_kept_buffers_are_bounded(monkeypatch):
    buffers.release()
    monkeypatch.setattr(buffers, "KEPT", 5 << 20)
    held = [buffers.zeros((1 << 19,), torch.float32, torch.device("cpu")) for _ in range(4)]
    del held
    gc.collect()
    assert 0 < sum(b.nbytes for b in buffers._free) <= 5 << 20


def leaves():
    values = (torch.rand(6, 9, dtype=torch.float64) + 0.1).requires_grad_()
    W = torch.randn(F, D, dtype=torch.float64).requires_grad_()
    return values, W, torch.randn(D, dtype=torch.float64).requires_grad_()


def decoded(values, W, b, sparse):
    torch.manual_seed(1)
    indices = torch.stack([torch.randperm(F)[:9] for _ in range(6)])
    if sparse:
        dense = codes.dense(codes.Codes(values, indices.int(), F), (6,), values.dtype)
        return dense, codes.decode(dense, W, b)
    dense = values.new_zeros(6, F).scatter(1, indices, values)
    return dense, dense @ W + b


@pytest.mark.parametrize("used", ["decode", "both", "hook", "retained", "asked"])
def test_gradients_are_those_of_the_dense_computation(used, close):
    found = {}
    for sparse in (True, False):
        torch.manual_seed(0)
        given = leaves()
        dense, out = decoded(*given, sparse)
        seen = []
        if used == "hook":
            dense.register_hook(lambda g, seen=seen: seen.append(g * 1))
        if used == "retained":
            dense.retain_grad()
        loss = out.square().sum() + (dense.abs().sum() if used == "both" else 0)
        if used == "asked":
            seen = [torch.autograd.grad(loss, dense)[0] + 0]
        else:
            loss.backward()
        if used == "retained":
            seen = [dense.grad + 0]
        found[sparse] = [*(t.grad for t in given if t.grad is not None), *seen]
    assert len(found[True]) == len(found[False]) > 0
    for got, wanted in zip(found[True], found[False], strict=True):
        close(got, wanted, used, 1e-12)


def test_second_derivatives(close):
    found = {}
    for sparse in (True, False):
        torch.manual_seed(0)
        given = leaves()
        _, out = decoded(*given, sparse)
        first = torch.autograd.grad(out.pow(3).sum(), given, create_graph=True)
        found[sparse] = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    for got, wanted in zip(found[True], found[False], strict=True):
        close(got, wanted, "second", 1e-11)


def test_an_edit_between_decode_and_backward_is_torch_s_error():
    values, W, b = leaves()
    dense, out = decoded(values, W, b, sparse=True)
    with torch.no_grad():
        dense[0, 0] = 7.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("which", ["native", "torch"])
@pytest.mark.parametrize("f", [1, 31, 200, 1300])
def test_a_dense_tensor_holds_its_codes_and_no_other(kind, which, f, monkeypatch):
    if which == "native":
        monkeypatch.delenv("FASTSAE_BACKEND", raising=False)
    else:
        monkeypatch.setenv("FASTSAE_BACKEND", which)
    k = min(f, 9)
    values = torch.rand(5, k).add(0.1).to(kind)
    values[:, 7:] = 0
    values[2] = 0
    indices = torch.stack([torch.randperm(f)[:k] for _ in range(5)]).int()
    if f > 9:
        values[3, 0] = math.nan  # bits are compared: a NaN that is where it was is the same
        indices[:, 8] = indices[:, 0]  # padding that names an index in use
    dense = torch.zeros(5, f, dtype=kind)
    for n in range(5):
        for j in range(min(k, 7)):
            dense[n, indices[n, j]] = values[n, j]
    assert holds_codes(dense, values, indices)
    for n in range(5):
        for column in range(0, f, 13 if f > 200 else 1):
            old = dense[n, column].clone()
            for new in (7.0, -0.0, math.inf):
                dense[n, column] = new
                assert not holds_codes(dense, values, indices), (n, column, new)
            dense[n, column] = old
    assert holds_codes(dense, values, indices)
