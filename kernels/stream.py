"""The k largest of rows of products that stream by in tiles, each read while it is in L2.

A row keeps a list of packed keys (ordered.py): all that can still be among its k largest. `floor`
is the key of a proven lower bound of the k-th (values <= 0 need not be found). Of each tile only
groups are looked at twice whose largest value reaches the floor. A tile of which too many do, as
the first one, raises it by its own maxima, a list that has grown by what it proves. Packed keys are
distinct, so pruning leaves exactly k and a list never overflows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastsae.kernels.ordered import (
    COARSE,
    POSITIVE,
    SPAN,
    _keys,
    _kth_largest,
    _larger,
    _least,
    _pack,
    _pad_row,
    _ranked,
)
from torch import Tensor

MAX_K = 128  # a list holds as many and a program's BLOCK
TILE_ROWS, TILE_COLUMNS = 1024, 8192  # of a product: fp32, 32 MB
_CONFIG = {"STEPS": 4, "NG": 512, "V": 4, "C": 512, "BLOCK": 256, "num_warps": 4}
assert TILE_COLUMNS == _CONFIG["STEPS"] * _CONFIG["NG"] * _CONFIG["V"]
assert MAX_K + _CONFIG["BLOCK"] <= _CONFIG["C"]  # a pruned list has room for a block
_FINISH = {"C": 512, "FEW": 128, "BLOCK": 32, "num_warps": 4}


@triton.jit
def _prune(packed, count, k, C: tl.constexpr):
    """Leaves the k best of a list: (key of the k-th, or 0, how many are left)."""
    slot = tl.arange(0, C)
    inside = slot < count
    mine = tl.load(packed + slot, mask=inside, other=0)
    keys = (mine >> 31).to(tl.uint32)
    bound = _kth_largest(keys, k, C)
    above = (keys > bound).to(tl.int32)
    # Of those that equal the k-th the ones of the lowest columns: their low bits are the largest.
    low = tl.where(inside & (keys == bound), (mine & 0x7FFFFFFF) + 1, 0).to(tl.uint32)
    least = _kth_largest(low, k - tl.sum(above, axis=0), C)
    keep = above | ((low >= least) & (low > 0)).to(tl.int32)
    position = tl.cumsum(keep, axis=0) - keep
    tl.debug_barrier()
    tl.store(packed + position, mine, mask=keep == 1)
    tl.debug_barrier()
    return bound, tl.sum(keep, axis=0)


@triton.jit(do_not_specialize=["k", "first", "width"])
def _stream_kernel(
    h,
    bias,
    packed,
    counts,
    floors,
    listed,
    first,
    width,
    k,
    FULL: tl.constexpr,
    UNIT: tl.constexpr,
    STEPS: tl.constexpr,
    NG: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns UNIT·first.. of one row: h [rows, UNIT·width] without bias.

    Up to STEPS·NG·V columns, all of them if FULL. UNIT tells the compiler what it may load at once;
    with 1 it loads single numbers.
    """
    n = tl.program_id(0).to(tl.int64)
    first *= UNIT
    width *= UNIT
    h += n * width
    bias += first
    packed += n * C
    listed += n * NG
    count = tl.load(counts + n, mask=first > 0, other=0)
    floor = tl.load(floors + n, mask=first > 0, other=0).to(tl.uint32, bitcast=True)
    floor = tl.maximum(floor, POSITIVE)

    # Group g: the columns i·NG·V + g·V + (0..V-1) for all i, so that a thread holds whole groups.
    largest = tl.full([NG], -float("inf"), tl.float32)
    for step in tl.static_range(STEPS):
        column = step * (NG * V) + tl.arange(0, NG * V)
        inside = (column < width) | FULL
        s = tl.load(h + column, mask=inside, other=-float("inf"))
        s += tl.load(bias + column, mask=inside, other=0.0)
        largest = _larger(largest, tl.reduce(tl.reshape(s, [NG, V]), 1, _larger))
    reach = ((largest < _least(floor)) == 0).to(tl.int32)  # a NaN reaches
    # While there are fewer than k entries, the floor may not have risen at all.
    if (tl.sum(reach, axis=0) > SPAN * k) | (count < k):
        keys = _keys(largest, tl.arange(0, NG) < NG, True)
        floor = tl.maximum(floor, _kth_largest(keys, k, NG, COARSE))
        reach = ((largest < _least(floor)) == 0).to(tl.int32)
    tl.store(listed + tl.cumsum(reach, axis=0) - reach, tl.arange(0, NG), mask=reach == 1)
    n_groups = tl.sum(reach, axis=0)
    tl.debug_barrier()

    EACH: tl.constexpr = STEPS * V
    slot = tl.arange(0, BLOCK)
    for start in range(0, n_groups, BLOCK // EACH):
        at = start + slot // EACH
        group = tl.load(listed + at, mask=at < n_groups, other=0)
        mine = (slot % EACH) // V * (NG * V) + group * V + slot % V
        valid = (at < n_groups) & (mine < width)
        value = tl.load(h + mine, mask=valid, other=0.0)
        value += tl.load(bias + mine, mask=valid, other=0.0)
        keep = (valid & ((value < _least(floor)) == 0)).to(tl.int32)
        grown = count + tl.sum(keep, axis=0)
        # Early too, once it has grown to a few times k: a higher floor lets less pass.
        if (grown > C) | ((count >= k) & (count < SPAN * k) & (grown >= SPAN * k)):
            bound, count = _prune(packed, count, k, C)
            floor = tl.maximum(floor, bound)
            keep = (valid & ((value < _least(floor)) == 0)).to(tl.int32)
        position = count + tl.cumsum(keep, axis=0) - keep
        tl.store(packed + position, _pack(_keys(value, valid, True), first + mine), mask=keep == 1)
        count += tl.sum(keep, axis=0)
        tl.debug_barrier()
    tl.store(counts + n, count)
    tl.store(floors + n, floor.to(tl.int32, bitcast=True))


@triton.jit
def _write(packed, values, indices, count, k, C: tl.constexpr, BLOCK: tl.constexpr):
    """Every entry of a list of up to C to its rank."""
    mine, rank = _ranked(packed, count, C, BLOCK)
    write = (tl.arange(0, C) < count) & (rank < k)
    value = ((mine >> 31) & 0x7FFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)  # all are > 0
    tl.store(values + rank, value, mask=write)
    tl.store(indices + rank, (0x7FFFFFFF - (mine & 0x7FFFFFFF)).to(tl.int32), mask=write)


@triton.jit(do_not_specialize=["k"])
def _finish_kernel(
    packed, counts, values, indices, k, C: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr
):
    """The k best of a list in order, then padding. FEW entries, as mostly, take less work."""
    n = tl.program_id(0).to(tl.int64)
    packed += n * C
    values += n * k
    indices += n * k
    count = tl.load(counts + n)
    if count <= FEW:
        _write(packed, values, indices, count, k, FEW, BLOCK)
    else:
        _write(packed, values, indices, count, k, C, BLOCK)
    if count < k:
        tl.debug_barrier()
        _pad_row(values, indices, k, count, C, BLOCK)


class Lists(NamedTuple):
    """The best of N rows so far."""

    packed: Tensor  # int64 [N, C]
    counts: Tensor  # int32 [N]
    floors: Tensor  # int32 [N]: bits of ordered keys


def lists(N: int, device: torch.device) -> Lists:
    """Room for N rows; the tile that begins with column 0 makes their lists empty."""
    packed = torch.empty(N, _CONFIG["C"], dtype=torch.int64, device=device)
    # Allocations of their own, for all are aligned alike: else another N would be compiled again.
    counts, floors = (torch.empty(N, dtype=torch.int32, device=device) for _ in range(2))
    return Lists(packed, counts, floors)


def offer(h: Tensor, bias: Tensor, into: Lists, first: int, k: int) -> None:
    """Offers columns first.. of rows to their lists: h [n, width] fp32, contiguous, + bias [F].

    width <= TILE_COLUMNS, k <= MAX_K. Column 0 comes first, the other tiles in any order.
    """
    n, width = h.shape
    unit = 4 if width % 4 == 0 and first % 4 == 0 else 1
    listed = torch.empty(n, _CONFIG["NG"], dtype=torch.int32, device=h.device)
    _stream_kernel[(n,)](
        h,
        bias,
        *into,
        listed,
        first // unit,
        width // unit,
        k,
        FULL=width == TILE_COLUMNS,
        UNIT=unit,
        enable_fp_fusion=True,
        **_CONFIG,
    )


def finish(found: Lists, k: int, into: tuple[Tensor, Tensor]) -> None:
    """Fills values [N, k] fp32 and indices [N, k] int32: descending, ties to the lower index.

    Where fewer than k are > 0 or NaN the rest is padding: value 0, the lowest unused indices.
    """
    _finish_kernel[(found.counts.shape[0],)](
        found.packed, found.counts, *into, k, enable_fp_fusion=True, **_FINISH
    )


def _aot(full: bool, unit: int):
    signature = {"h": "*fp32:16", "bias": "*fp32:16", "packed": "*i64:16"}
    signature |= dict.fromkeys(("counts", "floors", "listed"), "*i32:16")
    signature |= dict.fromkeys(("first", "width", "k"), "i32")
    options = {"num_warps": _CONFIG["num_warps"]}
    constexprs = {name: n for name, n in _CONFIG.items() if name not in options}
    constexprs |= {"FULL": full, "UNIT": unit}
    # Without NaN they would be lost; flushed denormals would raise the floor above what there is.
    wanted = ("FMNMX.NAN", "!.ftz", *(["LDG.E.128"] if unit > 1 else []))
    return _stream_kernel, signature, constexprs, options, {"sm_80": wanted, "sm_90": wanted}


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options, what the
# code of an architecture must hold).
AOT = [
    _aot(True, 4),
    _aot(False, 4),
    _aot(False, 1),
    (
        _finish_kernel,
        {"packed": "*i64:16", "counts": "*i32:16", "values": "*fp32:16", "indices": "*i32:16"}
        | {"k": "i32"},
        {name: n for name, n in _FINISH.items() if name != "num_warps"},
        {"num_warps": _FINISH["num_warps"]},
    ),
]
