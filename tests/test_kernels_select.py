"""Selection from rows, and from tiles that stream by, in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it.
"""

import os
import weakref

import pytest
import torch

from fastsae.ops import reference

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import candidates, encode, mi, stream, topk


def test_in_the_interpreter(run_again):
    run_again(__file__)


def same(got, wanted):
    """Equal bit by bit as far as torch.equal sees, with NaN equal to NaN."""
    got, wanted = got.float(), wanted.float()
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(
        got.nan_to_num(0), wanted.nan_to_num(0)
    )


def special_rows(kind, n, f):
    h = torch.randn(n, f)
    if kind == "ties":
        h = torch.randint(-2, 3, (n, f)).float()
    elif kind == "near ties":
        h = 1 + torch.rand(n, f) * 3e-5
    elif kind == "constant":
        h = torch.full((n, f), 1.5)
    elif kind == "negative constant":
        h = torch.full((n, f), -1.5)
    elif kind == "few positive":
        h = torch.where(torch.rand(n, f) < 3 / f, h.abs(), -h.abs())
    elif kind == "mostly zeros":
        h = torch.where(torch.rand(n, f) < 3 / f, h.abs(), 0)
    elif kind == "few among zeros":
        h = torch.full((n, f), -1.0)
        h[:, [5, 9, 100]], h[:, 7], h[:, [3, 200]] = 0.0, -0.0, 1.0
    elif kind == "ascending":
        h = torch.arange(float(f)).repeat(n, 1)
    elif kind == "nan and infinity":
        h[:, 3], h[:, f - 1], h[:, 1], h[:, 0] = torch.nan, torch.nan, torch.inf, -torch.inf
    elif kind == "only nan":
        h[:] = torch.nan
    elif kind == "signed zeros":
        h = torch.where(torch.rand(n, f) < 0.5, 0.0, -0.0)
        h[:, f // 2] = 1e-45  # the smallest denormal is above both zeros
    elif kind == "denormal":
        h = torch.randint(-9, 9, (n, f)) * 1e-45
    return h


KINDS = (
    *("normal", "ties", "near ties", "constant", "negative constant", "few positive"),
    *("mostly zeros", "few among zeros", "ascending", "nan and infinity", "only nan"),
    *("signed zeros", "denormal"),
)


# --- rows that are there: topk, select ------------------------------------------------------------


@pytest.mark.parametrize(
    "n,f,k,x_dtype",
    [
        (0, 50, 4, torch.float32),
        (1, 1, 1, torch.float32),
        (7, 129, 1, torch.float32),
        (2, 640, 640, torch.float32),
        (3, 5003, 32, torch.float32),
        (2, 20011, 100, torch.bfloat16),
        (2, 9000, 256, torch.float16),
        (1, 5000, 1024, torch.float32),
        (2, 3000, 1025, torch.float32),
    ],
)
def test_topk_of_random_rows(n, f, k, x_dtype):
    x = torch.randn(n, f).to(x_dtype)
    values, indices = topk.topk(x, k)
    wanted = reference.topk(x, k)
    assert values.dtype == x_dtype and indices.dtype == torch.int32
    assert same(values, wanted[0]) and torch.equal(indices, wanted[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f,k", [(2100, 20), (700, 300)])
def test_topk_of_special_rows(kind, f, k):
    x = special_rows(kind, 2, f)
    got, wanted = topk.topk(x, k), reference.topk(x, k)
    assert same(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("k", [5, 300, 1100])
def test_select_keeps_actives_and_pads(k):
    h, bias = torch.randn(4, 1500) - 3, torch.randn(1500)
    h[0], h[1, 7], h[2, :4] = -5, torch.nan, 9
    bias[0] = -0.0
    wanted = reference.relu_with_padding(*reference.topk(h + bias, k))
    got = topk.select(h, k, bias, active=True)
    assert same(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_select_writes_its_rows_only():
    """Rows between sentinels at an odd offset: nothing beside them changes."""
    x = torch.randn(3, 300)
    wanted = reference.topk(x, 10)
    values, indices = torch.full((61,), 7.0), torch.full((61,), -7, dtype=torch.int32)
    config = topk._config(3, 300, 10, 4)
    packed = torch.full((3 * 2 * config["C"] + 2,), -7, dtype=torch.int64)
    flags = {"HAS_BIAS": False, "MAPPED": False, "ACTIVE": False, "PLACED": False}
    arguments = (
        x,
        x,
        indices,
        values[13:],
        indices[13:],
        packed[1:],
        packed,
        300 // config["UNIT"],
        10,
    )
    topk._select_kernel[(3,)](*arguments, **flags, **config)
    assert torch.equal(values[13:43], wanted[0].flatten())
    assert torch.equal(indices[13:43], wanted[1].flatten())
    assert (values[:13] == 7).all() and (values[43:] == 7).all()
    assert (indices[:13] == -7).all() and (indices[43:] == -7).all()
    assert packed[0] == packed[-1] == -7


# --- rows that stream by in tiles -----------------------------------------------------------------


def streamed(h, bias, k, starts):
    """Tiles [start, next start) of h, in the order given."""
    n, f = h.shape
    ends = dict(zip(sorted(starts), [*sorted(starts)[1:], f], strict=True))
    found = stream.lists(n, h.device)
    for start in starts:
        stream.offer(h[:, start : ends[start]].contiguous(), bias, found, start, k)
    out = torch.full((n, k), 7.0), torch.full((n, k), -7, dtype=torch.int32)
    stream.finish(found, k, out)
    return out


def check(h, bias, k, starts):
    wanted = reference.relu_with_padding(*reference.topk(h + bias, k))
    got = streamed(h, bias, k, starts)
    assert same(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [20, 128])
def test_special_rows_that_stream(kind, k):
    h, bias = special_rows(kind, 1, 6000), torch.zeros(6000)
    check(h, bias, k, [0, 4096])


@pytest.mark.parametrize(
    "starts,f",
    [
        ([0], 8192),  # a whole tile
        ([0, 8192], 8193),  # whole and a single column: loads of single numbers
        ([0, 4, 2052], 5000),
        ([0, 1, 700], 1001),  # nothing is aligned
        ([0, 1, 701], 1001),  # 700 columns, but from column 1
        ([0, 3000, 1000, 2000], 4000),  # not in order: equals go by column all the same
    ],
)
@pytest.mark.parametrize("k", [1, 33])
def test_tiles(starts, f, k):
    h, bias = torch.randint(-40, 40, (3, f)) / 8, torch.randint(-3, 4, (f,)) / 8
    check(h, bias, k, starts)


def test_what_was_in_the_lists_before_does_not_matter():
    h, bias = torch.randn(2, 500), torch.randn(500)
    found = stream.lists(2, h.device)
    found.counts[:], found.floors[:] = 300, -1
    out = torch.empty(2, 9), torch.empty(2, 9, dtype=torch.int32)
    stream.offer(h, bias, found, 0, 9)
    stream.finish(found, 9, out)
    wanted = reference.relu_with_padding(*reference.topk(h + bias, 9))
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1])


def test_its_lists_only_are_written():
    h, bias, C = torch.randn(3, 600), torch.randn(600), stream._CONFIG["C"]
    packed = torch.full((3 * C + 2,), -7, dtype=torch.int64)
    counts, floors = torch.full((2, 5), -7, dtype=torch.int32)
    listed = torch.full((3 * stream._CONFIG["NG"] + 2,), -7, dtype=torch.int32)
    stream._stream_kernel[(3,)](
        h,
        bias,
        packed[1:],
        counts[1:],
        floors[1:],
        listed[1:],
        *(0, 150, 10),
        FULL=False,
        UNIT=4,
        **stream._CONFIG,
    )
    for sentinels in (packed, counts, floors, listed):
        assert sentinels[0] == sentinels[-1] == -7
    assert (counts[1:4] >= 10).all()


@pytest.mark.parametrize("k", [16, 129])
def test_encode_streams(monkeypatch, k):
    """Tiles of rows and of columns; a k that no list holds goes another way."""
    x, W = torch.randint(-3, 4, (3, 16)).bfloat16(), torch.randint(-3, 4, (9001, 16)).bfloat16()
    b, b_dec = torch.randint(-9, 9, (9001,)) / 4, torch.randint(-3, 4, (16,)).bfloat16()
    wanted = reference.encode_topk(x, W, b, k, b_dec)
    monkeypatch.setattr(encode, "FEW_ROWS", 0)
    monkeypatch.setattr(encode, "STREAMED_ROWS", 2)
    monkeypatch.setattr(stream, "TILE_ROWS", 2)
    offered, offer = [], stream.offer
    monkeypatch.setattr(stream, "offer", lambda *a: offered.append(a[0].shape) or offer(*a))
    got = encode.encode_topk(x, W, b, k, b_dec)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    shapes = [(2, 8192), (2, 809), (1, 8192), (1, 809)]
    assert offered == (shapes if k <= stream.MAX_K else [])


def streamed_encoding(monkeypatch):
    monkeypatch.setattr(encode, "FEW_ROWS", 0)
    monkeypatch.setattr(encode, "STREAMED_ROWS", 2)
    x, W = torch.randn(2, 8).bfloat16(), torch.randn(20000, 8).bfloat16()
    encode.encode_topk(x, W, torch.zeros(20000), 4)


def screened_encoding(monkeypatch):
    monkeypatch.setattr(candidates, "TILE_ROWS", 35)
    monkeypatch.setattr(candidates, "TILE_COLUMNS", 64)
    encode.encode_topk(torch.randn(70, 8), torch.randn(100, 8), torch.zeros(100), 4)


def mutual_information(monkeypatch):
    monkeypatch.setattr(mi, "TILE_BYTES", 400)
    mi.mi_topk(torch.randn(30, 8), torch.randn(10, 8), 3)


@pytest.mark.parametrize("caller", ["encode", "candidates", "mi"])
def test_a_tile_is_gone_before_the_next_is_made(monkeypatch, caller):
    """So that the next one takes its memory, which is in L2."""
    module = {"encode": encode, "candidates": candidates, "mi": mi}[caller]
    product, made = module.product, []

    def watched(x, W):
        assert all(tile() is None for tile in made)
        made.append(weakref.ref(h := product(x, W)))
        return h

    monkeypatch.setattr(module, "product", watched)
    run = {"encode": streamed_encoding, "candidates": screened_encoding, "mi": mutual_information}
    run[caller](monkeypatch)
    assert len(made) > 2


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
