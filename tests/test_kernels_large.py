"""Every kernel that addresses rows of a matrix of more than 2³¹ elements, in Triton's interpreter:
only the last row is in memory.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it. (topk, encode_threshold, collect, rescore's dots, decode
and gather_dot have such tests in test_screen_interpreter.py and test_kernels_sparse.py.)
"""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import (
        decode,
        encode_threshold,
        fused,
        mi,
        rescore,
        rounding,
        screen,
        sparse_outer,
        steer,
        topk,
    )
    from triton.runtime import interpreter


def test_in_the_interpreter(run_again):
    run_again(__file__)


ROWS, WIDTH = 2**19 + 3, 4096  # more than 2^31 elements


@pytest.fixture
def far(tmp_path):
    """far(name, count, dtype): (the whole as numpy, a tensor at its start) of `count` elements that
    no memory holds until they are touched. Only a few belong to the tensor itself: the interpreter
    copies what does."""

    def make(name, count, dtype=torch.float32):
        stored = {torch.bfloat16: torch.int16}.get(dtype, dtype)
        numpy = str(stored).removeprefix("torch.")
        space = np.memmap(tmp_path / name, dtype=numpy, mode="w+", shape=(count,))
        return space, torch.from_numpy(space[:16]).view(dtype)

    return make


@pytest.fixture
def program(monkeypatch):
    """program(x, y): the next launches run this program of the grid alone."""

    def only(x, y=0):
        builder = interpreter.interpreter_builder

        def place(*_):
            builder.grid_idx = (x, y, 0)

        monkeypatch.setattr(builder, "set_grid_idx", place)

    return only


def row_of(space, index, width=WIDTH, dtype=torch.float32):
    """A row of the whole, as a tensor that shares its memory."""
    return torch.from_numpy(space[index * width : (index + 1) * width]).view(dtype)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_copies_of_weights(far, program, kind):
    """W and its copy; made, and made anew; the digest of a line of the last row."""
    space, W = far("W", ROWS * WIDTH)
    w, last = row_of(space, ROWS - 1), ROWS - 1
    w.normal_()
    copies, copy = far("copy", ROWS * WIDTH, torch.bfloat16 if kind == "bf16" else torch.int8)
    _, scales = far("scales", ROWS * WIDTH // 64)
    norms, lost, products = torch.zeros(3, ROWS).unbind(0)
    digests, now = torch.zeros(2, ROWS, dtype=torch.int64).unbind(0)
    one, parts = torch.ones(1, dtype=torch.int32), torch.zeros(ROWS, dtype=torch.int32)
    block = last // 16
    flags = {"HAS_CENTRE": False, "KIND": kind, "LINE": 16, "BF": 16}
    flags["BD"] = 128 if kind == "bf16" else 64
    arguments = (W, W.view(torch.int32), W, copy, scales, norms, lost, products, digests, one)
    for again in (False, True):
        program(block)
        rounding._copy_kernel[(1,)](*arguments, 1, ROWS, WIDTH, 1e-3, 0.0, AGAIN=again, **flags)
        rounded = row_of(copies, last, dtype=copy.dtype).float()
        assert norms[last] == pytest.approx(float(w.norm()), rel=1e-3)
        if kind == "bf16":
            assert torch.equal(rounded, w.bfloat16().float())
        else:
            top = w.view(-1, 64).abs().amax(1, keepdim=True)
            assert (rounded.view(-1, 64) * top / 127 - w.view(-1, 64)).abs().max() < top.max() / 200
        w.normal_()
        norms.zero_()
    first = last % (WIDTH // 16) * 16
    odd = torch.arange(1, 17) * 0x1E3779B97F4A7C16 + 1
    program(last // 128)
    bits = W.view(torch.int32)
    screen._changed_kernel[(1,)](
        bits, digests, now, one, parts, ROWS, WIDTH, LINE=16, **screen._FEATURES_CONFIG
    )
    assert now[last] == (w[first : first + 16].view(torch.int32).long() * odd).sum()


@pytest.mark.parametrize("words", [False, True])
def test_rows_of_activations(far, program, words):
    space, x = far("x", ROWS * WIDTH)
    last, v = ROWS - 1, row_of(space, ROWS - 1)
    v.normal_()
    outs, centred = far("centred", ROWS * WIDTH)
    kind = torch.int8 if words else torch.bfloat16
    highs, high = far("high", ROWS * WIDTH, kind)
    lows, low = far("low", ROWS * WIDTH, kind)
    scales, bounds = torch.zeros(ROWS), torch.zeros(2 * ROWS)
    program(last)
    rounding._rows_kernel[(1,)](
        *(x, x, x, centred, high, low, scales, bounds, WIDTH, WIDTH, WIDTH, 0.0, 0.0, 0.0, 0.0),
        HAS_B=False,
        HAS_CENTRE=False,
        WORDS=words,
        **rounding.rows_config(1, WIDTH),
    )
    assert torch.equal(row_of(outs, last), v) and (bounds[-2:] > 0).all()
    coarse = row_of(highs, last, dtype=kind).float()
    if words:
        fine = row_of(lows, last, dtype=kind).float()
        assert ((coarse * 256 + fine) * scales[last] - v).abs().max() < 1e-3
    else:
        assert torch.equal(coarse, v.bfloat16().float())


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_products_of_a_step(far, program, kind):
    """The last 64 features of 64 rows: W and h have more than 2^31 elements, maxima do not."""
    N, D, F = 64, 128, 2**25 + 2**20
    space, w = far("w", F * D, torch.bfloat16 if kind == "bf16" else torch.int8)
    products, h = far("h", N * F)
    _, bias = far("bias", F)
    factors, scales = far("scales", F * D // 64)
    _, maxima = far("maxima", N * (F // 64))
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (N, D), generator=draw)
    W = torch.randint(-8, 9, (64, D), generator=draw)
    last = torch.from_numpy(space[(F - 64) * D :]).view(w.dtype)
    last.copy_(W.flatten())
    program(F // 64 - 1)
    if kind == "bf16":
        tail = (bias, h, maxima, N, F, D, F // 64)
        config = fused._step_config(64, 1 << 30)
        fused._step_kernel[(1,)](x.bfloat16(), w, *tail, BN=64, UPCAST=True, **config)
    else:
        factors[(F - 64) * 2 :] = 1.0
        tail = (bias, h, maxima, N, F, D // 64, F // 64)
        high, low = torch.zeros(N, D, dtype=torch.int8), x.to(torch.int8)
        head = (high, low, torch.ones(N), w, scales)
        fused._step8_kernel[(1,)](*head, *tail, BN=64, **fused._STEP8)
    wanted = (x @ W.T).float()
    for n in (0, 1, N - 1):
        assert torch.equal(row_of(products, n, F)[-64:], wanted[n]), n


def test_lists_of_candidates(far, program):
    """N C above 2^31: the lists of the last row are planned, twice."""
    C, last = WIDTH, ROWS - 1
    heads, head = far("heads", ROWS * C)
    errors, error = far("errors", ROWS * C)
    values, exact = far("exact", ROWS * C)
    listed, todo = far("todo", ROWS * C, torch.int32)
    counts, todo_counts = torch.full((2, ROWS), 9, dtype=torch.int32).unbind(0)
    floors = torch.full((ROWS,), -(1 << 31), dtype=torch.int32)
    row_of(heads, last)[:9] = torch.arange(9.0)
    row_of(errors, last)[:9] = 1.2
    state = (head, error, counts, floors, exact, todo, todo_counts)
    wrong = torch.zeros(1, dtype=torch.int32)
    config = {"C": C, "num_warps": 16}
    program(last)
    rescore._seeds_kernel[(1,)](*state, wrong, 3, TWO=True, LIMIT=False, **config)
    found = row_of(listed, last, dtype=torch.int32)
    assert found[: todo_counts[last]].tolist() == [6, 7, 8]
    row_of(values, last)[6:9] = torch.tensor([6.0, 7.0, 8.0])
    rescore._rest_kernel[(1,)](*state, 3, **config)
    assert found[: todo_counts[last]].tolist() == [5]


def test_dots_of_the_last_list(far, program):
    """The activations of a row, its list and where its values go."""
    C, last = WIDTH, ROWS - 1
    xs, x = far("x", ROWS * WIDTH)
    todos, todo = far("todo", ROWS * C, torch.int32)
    lists, listed = far("indices", ROWS * C, torch.int32)
    _, head = far("heads", ROWS * C)
    bounds, error = far("errors", ROWS * C)
    values, out = far("out", ROWS * C)
    v, W = row_of(xs, last), torch.randn(9, WIDTH)
    v.normal_()
    row_of(todos, last, dtype=torch.int32)[:2] = torch.tensor([0, 3], dtype=torch.int32)
    row_of(lists, last, dtype=torch.int32)[:4] = torch.tensor([5, 0, 0, 8], dtype=torch.int32)
    row_of(bounds, last)[:4] = 1.0
    wrong = torch.zeros(1, dtype=torch.int32)
    counts, slices = torch.full((ROWS,), 2, dtype=torch.int32), WIDTH // 128
    program(last)
    arguments = (x, W, torch.zeros(9), torch.arange(ROWS), counts, todo, listed, head, error, wrong)
    sizes = (WIDTH, WIDTH, C, C, 1, 0, slices, slices, 1)
    rescore._dot_kernel[(1,)](*arguments, out, *sizes, **rescore._DOT_CONFIG)
    torch.testing.assert_close(row_of(values, last)[[0, 3]], W[[5, 8]] @ v, rtol=1e-4, atol=1e-3)
    assert wrong.item() == 1, "what was screened is 0, with a bound of 1"


def test_members_and_their_compression(far, program):
    capacity, last = WIDTH, ROWS - 1
    space, h = far("h", ROWS * capacity)
    columns, column = far("columns", ROWS * capacity, torch.int32)
    values, value = far("values", ROWS * capacity)
    _, index = far("indices", ROWS * capacity, torch.int32)
    sizes, counts = torch.full((2, ROWS), 3, dtype=torch.int32).unbind(0)
    row_of(space, last)[:3] = torch.tensor([1.0, -1.0, 2.0])
    row_of(columns, last, dtype=torch.int32)[:3] = torch.tensor([4, 5, 6], dtype=torch.int32)
    program(last)
    encode_threshold._members_kernel[(1,)](
        *(h, column, sizes, torch.zeros(16), sizes, value, index, counts, capacity, 16, capacity),
        MAPPED=True,
        **encode_threshold._MEMBERS_CONFIG,
    )
    assert counts[last] == 2 and row_of(values, last)[:3].tolist() == [1, 2, 0]
    offsets = torch.zeros(ROWS + 1, dtype=torch.int64)
    offsets[-1] = 2
    out, where = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    rows = torch.arange(ROWS)
    encode_threshold._compact_kernel[(1,)](
        value, index, rows, offsets, out, where, capacity, **encode_threshold._COMPACT_CONFIG
    )
    assert out.tolist() == [1, 2] and where.tolist() == [4, 6]


def test_gradients_of_the_last_feature(far, program):
    """g, W, dW, the segments' partial sums and the slopes of the second slice."""
    last, segment = ROWS - 1, sparse_outer.SEGMENT
    config = {"SEGMENT": segment, "BLOCK_E": 8, "BLOCK_D": 1024, "num_warps": 4}
    entries = ROWS * segment
    gs, g = far("g", ROWS * WIDTH)
    Ws, W = far("W", ROWS * WIDTH)
    dWs, dW = far("dW", ROWS * WIDTH)
    partials, partial = far("partial", ROWS * WIDTH)
    values, value = far("values", entries)
    features, feature = far("features", entries, torch.int32)
    rows, row = far("rows", entries, torch.int32)
    count = 2**30  # of the entries, so that slopes of the last slice lie beyond
    dots, dot = far("dots", 3 * count + entries)
    partial_value, db = torch.zeros(2, ROWS).unbind(0)
    x, w = row_of(gs, last), row_of(Ws, last)
    x.normal_(), w.normal_()
    values[-segment:], features[-segment:], rows[-segment:] = 2.0, last, last
    program(last, 3)
    shared = (row, g, W, dot, partial, partial_value)
    sparse_outer._segment_kernel[(1,)](
        value, feature, *shared, count, ROWS, WIDTH, DOT=True, **config
    )
    torch.testing.assert_close(row_of(partials, last)[3072:], 512 * x[3072:])
    wanted = float(x[3072:] @ w[3072:])  # of every entry
    assert dots[3 * count + entries - 1] == pytest.approx(wanted, rel=1e-4)
    dots[3 * count + entries - 1] = 0
    offsets = torch.full((ROWS + 1,), entries)
    offsets[last] = entries - segment - 1  # one entry before the segment: of another row, zero
    sparse_outer._feature_kernel[(1,)](
        value, offsets, *shared, dW, db, count, WIDTH, DOT=True, **config
    )
    torch.testing.assert_close(row_of(dWs, last)[3072:], 512 * x[3072:])
    program(0)
    slices, out = far("slices", 9 * 2**28), torch.zeros(4)
    slices[0][8 * 2**28 : 8 * 2**28 + 4] = 1.0
    decode._add_slices_kernel[(1,)](slices[1], out, 2**28, 9, BLOCK=4)
    assert out.tolist() == [1, 1, 1, 1]


def test_rows_of_logits(far, program):
    last = ROWS - 1
    space, raw = far("raw", ROWS * WIDTH)
    row = row_of(space, last)
    row.normal_()
    logits = row.clone()
    groups = -(-ROWS // 128)
    maxima, sums = torch.zeros(2, groups, WIDTH).unbind(0)
    program(groups - 1, 31)
    mi._column_partial_kernel[(1,)](raw, maxima, sums, ROWS, WIDTH, 1.0, **mi._PARTIAL_CONFIG)
    others = last % 128  # rows of the last group before the last one: logits of 0
    wanted = logits[-128:].exp() + others
    torch.testing.assert_close(sums[-1, -128:] * maxima[-1, -128:].exp(), wanted)
    program(last)
    mi._score_kernel[(1,)](
        raw, torch.zeros(WIDTH), WIDTH, 1.0, 0.0, OBJECTIVE=2, **mi._SCORE_CONFIG
    )
    torch.testing.assert_close(row, logits.softmax(0) * logits)
    tops, top = far("maxima", 9 * 2**28)
    parts, part = far("sums", 9 * 2**28)
    tops[: 9 * 2**28 : 2**28], parts[8 * 2**28] = -np.inf, 3.0
    tops[8 * 2**28] = 2.0
    maximum, total = torch.full((4,), -torch.inf), torch.zeros(4)
    program(0)
    mi._column_combine_kernel[(1,)](top, part, maximum, total, 9, 2**28, BLOCK=4)
    assert maximum[0] == 2 and total[0] == 3


def test_steered_rows(far, program):
    """x, its result, and the encoder and decoder rows of a policy."""
    last, D = ROWS - 1, 4096
    xs, x = far("x", ROWS * D)
    outs, out = far("out", ROWS * D)
    encoders, enc = far("enc", ROWS * D)
    decoders, dec = far("dec", ROWS * D)
    v, w, d = row_of(xs, last), row_of(encoders, last), row_of(decoders, last)
    v.normal_(), d.normal_()
    w.copy_(v / (v @ v))
    slots, strengths = torch.ones(ROWS, dtype=torch.int32), torch.ones(ROWS)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    table = (enc, torch.zeros(ROWS), torch.zeros(ROWS), dec, ints(0, 1), ints(0, 0), ints(0, 1))
    table += (torch.zeros(2), ints(last), torch.full((1,), 3.0), ints(0, 0), ints(0, 1))
    table += (torch.full((2,), 0.9), ints(0, 0))  # a gate that the row opens
    program(last)
    config = steer._config(D)
    config.pop("maxnreg")
    steer._steer_kernel[(1,)](x, slots, strengths, out, *table, D, 2, 1, **config)
    torch.testing.assert_close(row_of(outs, last), v + 3 * d, rtol=1e-4, atol=1e-4)


def test_packed_survivors(far, program):
    """The scratch of a selection: rows of 2 C numbers of 64 bits."""
    C, last = 2048, ROWS - 1
    config = {**topk._config(1, WIDTH, 1000, 4), "C": C}
    space, x = far("x", ROWS * WIDTH)
    values, value = far("values", ROWS * WIDTH)
    indices, index = far("indices", ROWS * WIDTH, torch.int32)
    _, packed = far("packed", ROWS * 2 * C, torch.int64)
    row_of(space, last).normal_()
    k = 1000
    flags = {"HAS_BIAS": False, "MAPPED": False, "ACTIVE": False, "PLACED": False}
    program(last)
    topk._select_kernel[(1,)](
        *(x, x, index, value, index, packed, packed),
        *(WIDTH // config["UNIT"], k),
        **flags,
        **config,
    )
    wanted = row_of(space, last).topk(k)
    assert torch.equal(row_of(values, last, k), wanted.values)
    assert torch.equal(row_of(indices, last, k, torch.int32).long(), wanted.indices)


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
