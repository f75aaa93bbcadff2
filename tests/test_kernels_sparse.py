"""decode and sparse_outer in Triton's interpreter: every tile gives the same bits, offsets beyond
2³¹ are right. What test_kernels_interpreter.py checks against the reference is not repeated here.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsae.ops import reference

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import decode


def test_in_the_interpreter():
    if INTERPRETING:
        return  # the tests below are running in this very process
    environment = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "only 0-dimensional arrays can be converted" in result.stdout:
        pytest.skip(
            "the interpreter of this Triton does not work with this numpy (3.6 needs < 2.4)"
        )
    assert result.returncode == 0, result.stdout + result.stderr


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


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
