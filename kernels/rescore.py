"""Exact values of candidates, by one dot whose order of summation nothing changes.

h = bias + sum over slices of 128 columns, in order, of (x - b_dec) · w summed over the slice, in
fp32. One compiled kernel makes it for the few candidates of a row and for all features of a row
that no screen could help; a launch may cover all slices or, where the weights are read from L2, a
few: partial sums pass through memory unchanged. So no batch, tile, screen or fallback shows in the
result.

Every exact value of a candidate is compared with its screened one: outside the bound, the copy that
screened is not one of these weights (edited unseen, or corrupted), and other members may be
missing. Then all rows of the call are computed whole.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.collect import OVERFLOW, Lists, _lower_keys
from fastsae.kernels.ordered import COARSE, _keys, _kth_largest
from fastsae.kernels.screen import LANES, centred
from torch import Tensor

TWO_STEPS = 64  # more rows are rescored in two steps; for fewer a launch costs more than it saves
SLICE_BYTES = 34 << 20  # weights that stay in L2 while all rows meet them
FULL_BYTES = 64 << 20  # rows computed whole at a time


@triton.jit
def _seeds_kernel(
    heads,
    errors,
    counts,
    floors,
    exact,
    todo,
    todo_counts,
    wrong,
    k,
    TWO: tl.constexpr,
    LIMIT: tl.constexpr,
    C: tl.constexpr,
):
    """Lists what the first rescoring computes: of the candidates left by a floor of the whole list
    about k that screen best (marked by a negative error), or all. Nothing has an exact value yet,
    and none is wrong."""
    n = tl.program_id(0).to(tl.int64)
    if n == 0:
        tl.store(wrong, 0)
    slot = tl.arange(0, C)
    at = n * C + slot
    count = tl.load(counts + n)
    inside = slot < count
    chosen = inside.to(tl.int32)
    if not LIMIT:
        s = tl.load(heads + at, mask=inside, other=0.0)
        e = tl.load(errors + at, mask=inside, other=0.0)
        floor = tl.load(floors + n).to(tl.uint32, bitcast=True)
        floor = tl.maximum(floor, _kth_largest(_lower_keys(s, e, inside), k, C, COARSE))
        keep = _keys(s + e, inside, True) >= floor
        chosen = keep.to(tl.int32)
        if TWO:
            keys = _keys(s, keep, False)
            chosen = (keep & (keys >= _kth_largest(keys, k, C, COARSE))).to(tl.int32)
            tl.store(errors + at, tl.where(chosen == 1, -e, e), mask=inside)
            tl.store(floors + n, floor.to(tl.int32, bitcast=True))
    position = tl.cumsum(chosen, axis=0) - chosen
    tl.store(exact + at, tl.zeros([C], tl.float32))
    tl.store(todo + n * C + position, slot, mask=chosen == 1)
    tl.store(todo_counts + n, tl.sum(chosen, axis=0))


@triton.jit
def _rest_kernel(heads, errors, counts, floors, exact, todo, todo_counts, k, C: tl.constexpr):
    """Lists what the second rescoring computes: what can still reach the first one's k-th value."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, C)
    at = n * C + slot
    inside = slot < tl.load(counts + n)
    s = tl.load(heads + at, mask=inside, other=0.0)
    e = tl.load(errors + at, mask=inside, other=0.0)
    value = tl.load(exact + at, mask=inside, other=0.0)
    floor = tl.load(floors + n).to(tl.uint32, bitcast=True)
    seed = inside & (e < 0)
    floor = tl.maximum(floor, _kth_largest(_keys(value, seed, True), k, C, COARSE))
    rest = inside & (seed == 0)
    chosen = (_keys(s + e, rest, True) >= floor).to(tl.int32)
    position = tl.cumsum(chosen, axis=0) - chosen
    tl.store(todo + n * C + position, slot, mask=chosen == 1)
    tl.store(todo_counts + n, tl.sum(chosen, axis=0))


@triton.jit(do_not_specialize=["listed", "begin", "end", "slices", "programs", "out_stride", "C"])
def _dot_kernel(
    centred,
    W,
    b_enc,
    rows,
    counts,
    todo,
    indices,
    heads,
    errors,
    wrong,
    out,
    D,
    stride,
    out_stride,
    C,
    listed,
    begin,
    end,
    slices,
    programs,
    R: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[i, slot] of R entries of list i at a time, over the slices begin..end of D.

    Row i of `centred` meets counts[i] features, those of the slots in `todo`; where `listed` is 0
    it is row rows[i], and feature j is in slot j. A listed value outside the bound of its screened
    one sets `wrong`; one without a finite bound proves nothing.
    """
    i = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + i)
    row = tl.load(rows + i, mask=listed == 0, other=0)
    x = centred + tl.where(listed == 0, row, i) * stride
    lane = tl.arange(0, LANES)
    for start in range(tl.program_id(1) * R, count, programs * R):
        entry = start + tl.arange(0, R)
        inside = entry < count
        mine = entry < tl.where(listed != 0, count, 0)
        slot = tl.load(todo + i * C + entry, mask=mine, other=0)
        slot = tl.where(listed != 0, slot, entry)
        feature = tl.load(indices + i * C + slot, mask=mine, other=0)
        feature = tl.where(listed != 0, feature, entry).to(tl.int64)
        into = out + i * out_stride + slot
        total = tl.load(into, mask=entry < tl.where(begin > 0, count, 0), other=0.0)
        weights = W + feature * D
        for part in tl.range(begin, end, num_stages=4):
            column = part * LANES + lane
            a = tl.load(x + column)
            mask = inside[:, None] & (column < D)[None, :]
            w = tl.load(weights[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(a[None, :] * w, axis=1)
        if end == slices:
            total += tl.load(b_enc + feature, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(heads + i * C + slot, mask=mine, other=0.0)
            e = tl.abs(tl.load(errors + i * C + slot, mask=mine, other=float("inf")))
            within = tl.abs(total - s) <= e * 1.000001 + 9.6e-7 * tl.abs(s)  # this rounds as well
            outside = mine & (e < float("inf")) & (within == 0)
            tl.store(wrong + tl.zeros_like(slot), tl.full([R], 1, tl.int32), mask=outside)
        tl.store(into, total, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _overflow_kernel(counts, wrong, stale, rows, entries, N, F, BLOCK: tl.constexpr):
    """Lists the rows to compute whole, in order, then -1; each has F entries to compute.

    They are those whose candidates did not fit; all, where a value was `wrong`, and then the next
    call makes the copy anew.
    """
    found = tl.full([], 0, tl.int32)
    every = tl.load(wrong) != 0
    if every:
        tl.store(stale, 1)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        full = tl.load(counts + n, mask=n < N, other=0) == OVERFLOW
        full = ((full | every) & (n < N)).to(tl.int32)
        position = found + tl.cumsum(full, axis=0) - full
        tl.store(rows + position, n.to(tl.int64), mask=full == 1)
        tl.store(entries + position, tl.zeros_like(n) + F, mask=full == 1)
        found += tl.sum(full, axis=0)
    for start in range(found, N, BLOCK):
        unused = start + tl.arange(0, BLOCK)
        tl.store(rows + unused, tl.full([BLOCK], -1, tl.int64), mask=unused < N)
        tl.store(entries + unused, tl.zeros([BLOCK], tl.int32), mask=unused < N)


_DOT_CONFIG = {"R": 16, "LANES": LANES, "num_warps": 4}
_OVERFLOW_CONFIG = {"BLOCK": 1024, "num_warps": 4}


def _plan_config(C: int) -> dict:
    return {"C": C, "num_warps": 4 if C <= 1024 else 8 if C <= 2048 else 16, "maxnreg": 128}


def _dot(centred, W, b_enc, rows, counts, out, most: int, lists: Lists | None, todo, wrong) -> None:
    """Fills out [lists, slots] with the dots of at most `most` entries of every list."""
    D, n = W.shape[1], out.shape[0]
    slices = -(-D // LANES)
    step = slices
    if n > TWO_STEPS and lists is not None:
        step = max(1, SLICE_BYTES // (W.shape[0] * LANES * W.element_size()))
    # As many as fill a GPU. The interpreter has no use for more than one.
    programs = max(1, min(triton.cdiv(most, 2 * _DOT_CONFIG["R"]), triton.cdiv(2048, n)))
    programs = programs if W.is_cuda else 1
    for begin in range(0, slices, step):
        _dot_kernel[(n, programs)](
            centred,
            W,
            b_enc,
            rows,
            counts,
            counts if lists is None else todo,
            counts if lists is None else lists.indices,
            out if lists is None else lists.heads,
            out if lists is None else lists.errors,
            wrong,
            out,
            D,
            centred.shape[1],
            out.shape[1],
            0 if lists is None else lists.indices.shape[1],
            int(lists is not None),
            begin,
            min(begin + step, slices),
            slices,
            programs,
            enable_fp_fusion=True,
            **_DOT_CONFIG,
        )


def rescore(
    centred: Tensor, W: Tensor, b_enc: Tensor, lists: Lists, k: int
) -> tuple[Tensor, Tensor]:
    """(exact [N, C] fp32, wrong [1] int32): exact pre-activations of the candidates that can be
    members, 0 elsewhere; not 0 where one contradicts its bound.

    k = 0: of all candidates. Rows marked as overflowed have none.
    """
    N, C = lists.heads.shape
    exact = torch.empty_like(lists.heads)
    todo = torch.empty_like(lists.indices)
    todo_counts = torch.empty_like(lists.counts)
    rows = torch.empty(N, dtype=torch.int64, device=W.device)  # not read: list i is of row i
    wrong = torch.empty(1, dtype=torch.int32, device=W.device)
    two = N > TWO_STEPS and k > 0
    state = (lists.heads, lists.errors, lists.counts, lists.floors, exact, todo, todo_counts)
    config = {"enable_fp_fusion": True, **_plan_config(C)}
    _seeds_kernel[(N,)](*state, wrong, k, TWO=two, LIMIT=k == 0, **config)
    _dot(centred, W, b_enc, rows, todo_counts, exact, C, lists, todo, wrong)
    if two:
        _rest_kernel[(N,)](*state, k, **config)
        _dot(centred, W, b_enc, rows, todo_counts, exact, C, lists, todo, wrong)
    return exact, wrong


def full_rows(
    centred: Tensor, W: Tensor, b_enc: Tensor, counts: Tensor, wrong: Tensor, stale: Tensor
):
    """Rows with counts = -1, or all if `wrong`, whole: yields (rows [S] int64, -1 where there is
    none; h [S, F]).

    Every batch of S rows is always launched, and returns at once where there is nothing to do: the
    host does not know which rows overflowed. h is undefined where `rows` is -1. `stale` is set
    where `wrong` is.
    """
    N, F = counts.shape[0], W.shape[0]
    rows = torch.empty(N, dtype=torch.int64, device=W.device)
    entries = torch.empty(N, dtype=torch.int32, device=W.device)
    _overflow_kernel[(1,)](counts, wrong, stale, rows, entries, N, F, **_OVERFLOW_CONFIG)
    for part, h in _batches(N, F, W.device):
        _dot(centred, W, b_enc, rows[part], entries[part], h, F, None, None, wrong)
        yield rows[part], h


def every_row(centred: Tensor, W: Tensor, b_enc: Tensor):
    """All rows, whole: yields (rows as a slice; h [rows, F])."""
    rows = torch.arange(centred.shape[0], device=W.device)
    for part, h in _batches(centred.shape[0], W.shape[0], W.device):
        counts = torch.full((h.shape[0],), W.shape[0], dtype=torch.int32, device=W.device)
        _dot(centred, W, b_enc, rows[part], counts, h, W.shape[0], None, None, counts)
        yield part, h


def _batches(N: int, F: int, device: torch.device):
    step = max(1, min(N, FULL_BYTES // (4 * F)))
    h = torch.empty(step, F, device=device)
    for start in range(0, N, step):
        part = slice(start, min(start + step, N))
        yield part, h[: part.stop - part.start]


def dots(v: Tensor, W: Tensor) -> Tensor:
    """W v [F] in fp32, by the rescoring dot."""
    none = torch.zeros(W.shape[0], device=W.device)
    ((_, h),) = every_row(centred(v[None], None), W, none)
    return h[0].clone()


def _aot():
    row = {"heads": "*fp32:16", "errors": "*fp32:16", "counts": "*i32:16", "floors": "*i32:16"}
    plan = {**row, "exact": "*fp32:16", "todo": "*i32:16", "todo_counts": "*i32:16", "k": "i32"}
    seeds = {**plan, "wrong": "*i32:16"}
    dot = {"centred": "*fp32:16", "b_enc": "*fp32:16", "rows": "*i64:16", "counts": "*i32:16"}
    dot |= {"todo": "*i32:16", "indices": "*i32:16", "out": "*fp32:16", "D": "i32:16"}
    dot |= {"stride": "i32:16", "out_stride": "i32", "C": "i32", "listed": "i32", "begin": "i32"}
    dot |= {"end": "i32", "slices": "i32", "programs": "i32"}
    dot |= {"heads": "*fp32:16", "errors": "*fp32:16", "wrong": "*i32:16"}
    overflow = {"counts": "*i32:16", "rows": "*i64:16", "entries": "*i32:16", "N": "i32"}
    overflow |= {"wrong": "*i32:16", "stale": "*i32:16"}

    def case(kernel, signature, config, **flags):
        options = {n: v for n, v in config.items() if n in ("num_warps", "maxnreg")}
        constexprs = {n: v for n, v in config.items() if n not in options}
        return kernel, signature, constexprs | flags, options

    return [
        *(
            case(_seeds_kernel, seeds, _plan_config(c), TWO=True, LIMIT=False)
            for c in (512, 2048, 4096)
        ),
        case(_seeds_kernel, seeds, _plan_config(512), TWO=False, LIMIT=True),
        *(case(_rest_kernel, plan, _plan_config(c)) for c in (512, 2048, 4096)),
        *(case(_dot_kernel, dot | {"W": f"*{t}:16"}, _DOT_CONFIG) for t in ("fp32", "bf16")),
        case(_overflow_kernel, overflow | {"F": "i32:16"}, _OVERFLOW_CONFIG),
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = _aot()
