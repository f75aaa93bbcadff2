"""Lists of candidates, and fresh memory, in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import (
        collect,
        encode,
        encode_threshold,
        rescore,
        rounding,
        screen,
        stream,
    )


def test_in_the_interpreter(run_again):
    run_again(__file__)


def collected(h, k, G, maxima=None):
    """The lists of rows h, screened with an error of about a millionth."""
    n, f = h.shape
    features = screen.Features(*[torch.zeros(-(-f // 4096) * 4096)] * 8)
    found = collect.lists(n, 512, h.device)
    collect.collect(h, maxima, torch.zeros(2 * n), features, found, 0, 64, k, G)
    return found


@pytest.mark.parametrize("f,k", [(16384, 64), (32768, 128), (65536, 32)])
@pytest.mark.parametrize("kind", ["half positive", "together"])
def test_ordinary_rows_of_a_decoding_step_fit(f, k, kind):
    """Else rows would be computed whole: right, but slow, and nothing would show it."""
    h = torch.randn(2, f) + 0.1
    if kind == "together":  # few groups, all of them in the first block
        h = torch.where(torch.arange(f) < 600, h.abs(), -1.0)
    found = collected(h, k, 64, h.view(2, -1, 64).amax(2))
    assert (found.counts >= k).all()
    for row, count, listed in zip(h, found.counts, found.indices, strict=True):
        assert set(row.topk(k).indices.tolist()) <= set(listed[:count].tolist())


@pytest.mark.parametrize("first,width", [(0, 512), (3, 512), (1, 1000)])
def test_rows_of_any_stride(first, width):
    """Columns of rows whose length is odd: the second row does not begin where words do."""
    h = torch.randn(3, 1003)
    part = h[:, first : first + width]
    got, wanted = collected(part, 20, 8), collected(part.contiguous(), 20, 8)
    assert torch.equal(got.counts, wanted.counts) and (got.counts >= 20).all()
    for a, b, count in zip(got.indices, wanted.indices, got.counts, strict=True):
        assert torch.equal(a[:count], b[:count])


def dirty(*shape, **options):
    """As torch.empty, of memory that was used before."""
    made = torch.zeros(*shape, **options)
    return made.fill_(torch.nan if made.is_floating_point() else 9)


def encoded(x, W, b):
    yield encode.encode_topk(x, W, b, 7)
    yield encode.encode_topk(x.bfloat16(), W.bfloat16(), b, 7)
    yield encode_threshold.encode_threshold_padded(x, W, b, torch.ones(300), 64)


@pytest.mark.parametrize("n", [2, 70])
def test_fresh_memory_may_hold_anything(monkeypatch, n):
    x, W, b = torch.randn(n, 40), torch.randn(300, 40) / 6, torch.randn(300)
    x[0, 0] = torch.inf  # a row that is computed whole
    wanted = list(encoded(x, W, b))
    monkeypatch.setattr(torch, "empty", dirty)
    look, seen = rescore.rescore, []
    monkeypatch.setattr(rescore, "rescore", lambda *a: seen.append(look(*a)) or seen[-1])
    for got, clean in zip(encoded(x, W, b), wanted, strict=True):
        for a, c in zip(got, clean, strict=True):
            assert torch.equal(a.nan_to_num(-1), c.nan_to_num(-1))
    assert seen and not any(wrong for _, wrong in seen), "all rows were computed whole"


def test_the_floor_carries_over_tiles():
    h, found = torch.randn(2, 4000), stream.lists(2, torch.device("cpu"))
    stream.offer(h[:, :2000].contiguous(), torch.zeros(4000), found, 0, 5)
    first = found.floors.clone()
    assert (first & 0x7FFFFFFF).view(torch.float32).min() > 1  # the 5th of 2000 is above 2
    stream.offer(torch.full((2, 2000), -1.0), torch.zeros(4000), found, 2000, 5)
    assert torch.equal(found.floors, first)


@pytest.mark.parametrize("flag", [None, 3, 511, 512, 900])
def test_one_part_of_many_has_a_copy_made_anew(flag):
    W, copy = torch.randn(16, 128), torch.zeros(16, 128, dtype=torch.bfloat16)
    changed = torch.zeros(1000, dtype=torch.int32)
    if flag is not None:
        changed[flag] = 1
    norms, lost, products = torch.zeros(3, 16).unbind(0)
    digests = torch.zeros(16, dtype=torch.int64)
    rounding._copy_kernel[(1,)](
        *(W, W.view(torch.int32), W, copy, W, norms, lost, products, digests, changed),
        *(1000, 16, 128, 1e-3, 0.0),
        **{"HAS_CENTRE": False, "KIND": "bf16", "AGAIN": True, "LINE": 16, "BF": 16, "BD": 128},
    )
    assert torch.equal(copy, W.bfloat16() if flag is not None else torch.zeros_like(copy))


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
