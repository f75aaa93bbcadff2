"""decode and sparse_outer in Triton's interpreter: every tile gives the same bits, offsets beyond
2³¹ are right. What test_kernels_interpreter.py checks against the reference is not repeated here.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it.
"""

import os

import pytest
import torch

from fastsae.ops import reference

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import decode, sparse_outer


def test_in_the_interpreter(run_again):
    run_again(__file__)


def entries(n, k, f):
    values, indices = torch.randn(n, k), torch.randint(0, f, (n, k), dtype=torch.int32)
    values[values.abs() < 0.3] = 0
    return values, indices


def test_every_tile_of_decode_gives_the_same_bits(monkeypatch):
    """Narrow and wide slices, one row or four per program: the order of the sum stays."""
    (values, indices), W, b = entries(9, 37, 50), torch.randn(50, 260), torch.randn(260)
    found = {}
    for filled in (1, 9 * 2, 9 * 4, 10**6):
        monkeypatch.setattr(decode, "FILLED", filled)
        found[decode._decode_config(9, 260, 4)["BLOCK_D"], filled] = decode.decode(
            values, indices, W, b
        )
    assert {width for width, _ in found} == {32, 128}
    first, *others = found.values()
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, reference.decode(values, indices, W, b))


def test_decode_fills_a_gpu():
    """Reference shapes: enough programs for few rows, 16-byte loads as soon as there are enough."""
    for N, itemsize in ((1, 2), (1, 4), (16, 2), (64, 2), (64, 4), (16384, 2)):
        config = decode._decode_config(N, 4096, itemsize)
        assert N * 4096 // config["BLOCK_D"] >= 128
        assert N < 64 or config["BLOCK_D"] * itemsize == 32 * 16
    assert decode._decode_config(16384, 4096, 2)["BLOCK_D"] * 65536 * 2 <= 40 << 20  # of L2


def test_gathers_beyond_2_31_elements():
    """Rows whose offset needs more than 32 bits, in memory of which only those rows are touched."""
    D = 2048
    F = 2**31 // D + 3
    W = torch.empty(F, D, dtype=torch.bfloat16)
    used = torch.tensor([5, F - 4, F - 1], dtype=torch.int32)
    W[used.long()] = torch.randn(3, D).bfloat16()
    assert (F - 4) * D < 2**31 < (F - 1) * D
    values, g, indices = torch.randn(2, 3), torch.randn(2, D), used.repeat(2, 1)
    small, local = W[used.long()], torch.arange(3).int().repeat(2, 1)
    for got, wanted in (
        (decode.decode(values, indices, W), decode.decode(values, local, small)),
        (decode.gather_dot(g, W, indices), decode.gather_dot(g, small, local)),
    ):
        assert torch.equal(got, wanted) and got.abs().sum() > 0


@pytest.mark.parametrize("n,k,f,d", [(0, 3, 7, 5), (7, 3, 50, 5), (300, 4, 5, 260), (9, 5, 70, 33)])
def test_code_gradients(n, k, f, d):
    """Hot features included: 300 rows of 4 entries over 5 features make whole segments."""
    values, indices = entries(n, k, f)
    if f == 5:
        indices[:, 0] = 3
    g, x, W = torch.randn(n, d), torch.randn(n, d), torch.randn(f, d)
    got = sparse_outer.code_gradients(values, indices, g, x, W)
    oracle = dense_gradients(values.double(), indices, g.double(), x.double(), W.double())
    by_torch = dense_gradients(values, indices, g, x, W)
    for a, b, c in zip(got, oracle, by_torch, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        limit = 2 * (c.double() - b).norm() + 1e-7 * b.norm()
        assert (a.double() - b).norm() <= limit
    assert all(map(torch.equal, got, sparse_outer.code_gradients(values, indices, g, x, W)))
    # The slopes of both passes are those of the separate ops.
    alone = sparse_outer.sparse_outer(values, indices, g, f)
    assert torch.equal(got[0], alone[0])


def dense_gradients(values, indices, g, x, W):
    slopes = torch.where(values != 0, (g @ W.T).gather(1, indices.long()), 0)
    zero = torch.zeros(values.shape[0], W.shape[0], dtype=g.dtype)
    code, slope = (zero.scatter_add(1, indices.long(), v) for v in (values, slopes))
    return code.T @ g, slope.T @ x, slope.sum(0)


def test_gradients_ignore_padding_and_wrong_indices():
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0], [1.0, 1.0]])
    indices = torch.tensor([[1, 2], [1, 9], [-1, 0]], dtype=torch.int32)
    g, x, W = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    g[0], x[0] = 1.0, torch.nan  # x of a row counts where its entry is used, and only there
    dW_dec, dW_enc, db = sparse_outer.code_gradients(values, indices, g, x, W)
    torch.testing.assert_close(dW_dec[1], g[0] + 2 * g[1])
    assert dW_enc[1].isnan().all() and (dW_enc[2] == 0).all() and db[2] == 0
    torch.testing.assert_close(db[:2], torch.stack([W[0] @ g[2], W[1] @ (g[0] + g[1])]))


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
