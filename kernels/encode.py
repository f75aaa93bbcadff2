"""Encoders: GEMM tiles of at most 64 MB, each consumed by a Triton kernel while it is hot in L2.

[N, F] never exists. `encode_topk` selects inside every column tile and merges the tiles' winners;
`encode_threshold` counts and compacts the survivors of every (row, BLOCK columns) cell. Neither
uses atomics, and only `encode_threshold` synchronises with the host, once, for its exact output
size.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.matmul import WORKSPACE_BYTES, full_fp32, product, split_bf16
from fastsae.kernels.topk import select
from torch import Tensor

CELL = 4096  # columns per compaction program
ARENA_LEAST = 1 << 16  # first guess of encode_threshold's output: so many entries,
ARENA_PER_ROW = 256  # or so many per row if that is more


def _tiles(N: int, F: int, planes: int, least: int) -> tuple[int, int]:
    """(rows, columns) of a GEMM tile: 1024 rows re-read the weights rarely, whole rows are
    simplest.

    Column tiles are multiples of CELL and at least `least` wide.
    """
    budget = WORKSPACE_BYTES // (4 * planes)
    rows = max(1, min(N, 1024))
    columns = budget // rows // CELL * CELL
    if columns >= F or columns < least:
        return max(1, min(N, budget // F)), F
    return rows, columns


class _Preactivation:
    """h = W_enc (x - b_dec) + b_enc by tiles, as fp32 products `tile` plus the fp32 vector `bias`.

    | x, W_enc | operands of the GEMM |
    |---|---|
    | both bfloat16 or both float16 | as they are; W_enc b_dec is folded into the bias |
    | float32 x, bfloat16 W_enc | x - b_dec as three bfloat16 planes (2⁻²⁴), three products |
    | otherwise | float32 |
    | precision="fast" | x - b_dec and W_enc rounded to W_enc's half type, or bfloat16 |
    """

    def __init__(self, x, W_enc, b_enc, b_dec, precision: str):
        self.x, self.W, self.b_dec = x, W_enc, b_dec
        self.bias = b_enc.float()
        half = W_enc.dtype in (torch.bfloat16, torch.float16)
        self.planes, self.dtype = 1, torch.float32
        if precision == "fast":
            self.dtype = W_enc.dtype if half else torch.bfloat16
            self.W = W_enc.to(self.dtype)
        elif half and x.dtype == W_enc.dtype:
            self.dtype = W_enc.dtype
            if b_dec is not None:
                self.bias, self.b_dec = self.bias - self._centre(b_dec), None
        elif W_enc.dtype == torch.bfloat16:
            self.planes, self.dtype = 3, torch.bfloat16

    def _centre(self, b_dec: Tensor) -> Tensor:
        if b_dec.dtype == self.W.dtype:
            return product(b_dec[None], self.W)[0]
        if self.W.dtype == torch.bfloat16:
            return product(split_bf16(b_dec.float()), self.W).sum(0)
        return torch.cat([product(b_dec.float()[None], w.float())[0] for w in self.W.split(CELL)])

    def operand(self, rows: slice) -> Tensor:
        x = self.x[rows]
        if self.b_dec is not None:
            x = x.float() - self.b_dec.float()
        if self.planes == 3:
            return split_bf16(x.float()).view(-1, x.shape[1])
        return x.to(self.dtype)

    def tile(self, operand: Tensor, columns: slice) -> Tensor:
        h = product(operand, self.W[columns].to(self.dtype))
        if self.planes == 1:
            return h
        high, middle, low = h.view(3, -1, h.shape[1])
        return (middle.add_(low)).add_(high)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:
    """(values [N, k] float32, indices [N, k] int32): the k largest of h = W_enc (x - b_dec) +
    b_enc, ReLU.

    x [N, D], W_enc [F, D], b_enc [F], b_dec [D] or None. Actives (h > 0 or NaN) come first,
    descending, ties to the lower index; the rest is padding: value 0, the lowest unused indices,
    ascending. h is accumulated in fp32; precision="fast" rounds the operands to a half type first.
    """
    N, F = x.shape[0], W_enc.shape[0]
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    if N == 0:
        return values, indices
    with full_fp32(x.device):
        h = _Preactivation(x, W_enc, b_enc, b_dec, precision)
        rows, columns = _tiles(N, F, h.planes, 16 * k)
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            operand = h.operand(part)
            if columns == F:
                tile = h.tile(operand, slice(0, F))
                values[part], indices[part] = select(tile, k, h.bias, active=True)
                continue
            winners, their_columns = [], []
            for first in range(0, F, columns):
                block = slice(first, min(first + columns, F))
                best = select(h.tile(operand, block), min(k, block.stop - first), h.bias[block])
                winners.append(best[0])
                their_columns.append(best[1] + first)
            # Tiles come in column order and each lists equal values by ascending column, so
            # position order among equals is column order: the merge keeps ties at the lower index.
            values[part], indices[part] = select(
                torch.cat(winners, 1), k, columns=torch.cat(their_columns, 1), active=True
            )
    return values, indices


@triton.jit
def _survivors(h, bias, threshold, n, width, first, BLOCK: tl.constexpr):
    """(h, kept, feature) of one cell: kept is h > max(threshold, 0), or NaN."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    feature = first + column
    value = tl.load(h + n * width + column, mask=inside, other=0.0)
    value += tl.load(bias + feature, mask=inside, other=0.0)
    floor = tl.load(threshold + feature, mask=inside, other=0.0).to(tl.float32)
    floor = tl.where(floor < 0, 0.0, floor)
    return value, (inside & ((value <= floor) == 0)).to(tl.int32), feature


@triton.jit(do_not_specialize=["first"])
def _count_kernel(h, bias, threshold, counts, width, first, cells, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    _, keep, _ = _survivors(h, bias, threshold, n, width, first, BLOCK)
    tl.store(counts + n * cells + first // BLOCK + tl.program_id(1), tl.sum(keep, axis=0))


@triton.jit(do_not_specialize=["first", "capacity"])
def _compact_kernel(
    h,
    bias,
    threshold,
    starts,
    values,
    indices,
    width,
    first,
    cells,
    capacity,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    value, keep, feature = _survivors(h, bias, threshold, n, width, first, BLOCK)
    start = tl.load(starts + n * cells + first // BLOCK + tl.program_id(1))
    position = start + tl.cumsum(keep, axis=0) - keep
    write = (keep == 1) & (position < capacity)  # an overflow is seen in the counts and repeated
    tl.store(values + position, value, mask=write)
    tl.store(indices + position, feature, mask=write)


@triton.jit
def _copy_kernel(
    counts, sources, targets, arena_values, arena_indices, values, indices, BLOCK: tl.constexpr
):
    cell = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + cell)
    source = tl.load(sources + cell)
    target = tl.load(targets + cell)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < count
        value = tl.load(arena_values + source + entry, mask=mask, other=0.0)
        index = tl.load(arena_indices + source + entry, mask=mask, other=0)
        tl.store(values + target + entry, value, mask=mask)
        tl.store(indices + target + entry, index, mask=mask)


_CELL_CONFIG = {"BLOCK": CELL, "num_warps": 8}
_COPY_CONFIG = {"BLOCK": 32, "num_warps": 1}


def _fill_arena(h: _Preactivation, threshold: Tensor, counts: Tensor, capacity: int):
    """At most `capacity` survivors of all cells in tile order; fills `counts` with all of them."""
    N, cells = counts.shape
    F = h.W.shape[0]
    device = counts.device
    values = torch.empty(capacity, dtype=torch.float32, device=device)
    indices = torch.empty(capacity, dtype=torch.int32, device=device)
    starts = torch.empty(N, cells, dtype=torch.int64, device=device)
    filled = torch.zeros((), dtype=torch.int64, device=device)
    rows, columns = _tiles(N, F, h.planes, CELL)
    shared = {"enable_fp_fusion": True, **_CELL_CONFIG}
    for begin in range(0, N, rows):
        part = slice(begin, min(begin + rows, N))
        operand = h.operand(part)
        for first in range(0, F, columns):
            block = slice(first, min(first + columns, F))
            tile = h.tile(operand, block)
            n, width = tile.shape
            here = slice(first // CELL, triton.cdiv(block.stop, CELL))
            grid = (n, here.stop - here.start)
            _count_kernel[grid](
                tile, h.bias, threshold, counts[part], width, first, cells, **shared
            )
            count = counts[part, here]
            ends = count.reshape(-1).cumsum(0).view(count.shape)
            starts[part, here] = filled + ends - count
            filled = filled + ends[-1, -1]
            _compact_kernel[grid](
                tile,
                h.bias,
                threshold,
                starts[part],
                values,
                indices,
                width,
                first,
                cells,
                capacity,
                **shared,
            )
    return starts, values, indices


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """CSR (values [nnz] float32, indices [nnz] int32, row_offsets [N + 1] int64) of h >
    max(threshold, 0).

    h as in `encode_topk`, compared strictly in fp32 with the threshold of its feature; NaN is kept.
    Indices ascend in a row. One host synchronisation: nnz. Survivors go to an arena sized for 256
    per row on average; more than that is seen in the counts, and the pass repeats with the exact
    size.
    """
    N, F = x.shape[0], W_enc.shape[0]
    cells = triton.cdiv(F, CELL)
    counts = torch.zeros(N, cells, dtype=torch.int32, device=x.device)
    capacity = min(N * F, max(ARENA_LEAST, ARENA_PER_ROW * N))
    nnz = 0
    if N:
        with full_fp32(x.device):
            h = _Preactivation(x, W_enc, b_enc, b_dec, "exact")
            arena = _fill_arena(h, threshold, counts, capacity)
            nnz = int(counts.sum())
            if nnz > capacity:
                arena = _fill_arena(h, threshold, counts, nnz)
    values = torch.empty(nnz, dtype=torch.float32, device=x.device)
    indices = torch.empty(nnz, dtype=torch.int32, device=x.device)
    ends = counts.view(-1).cumsum(0).view(counts.shape)
    row_offsets = torch.zeros(N + 1, dtype=torch.int64, device=x.device)
    row_offsets[1:] = ends[:, -1]
    if nnz:
        starts, arena_values, arena_indices = arena
        _copy_kernel[(N * cells,)](
            counts,
            starts,
            ends - counts,
            arena_values,
            arena_indices,
            values,
            indices,
            enable_fp_fusion=True,
            **_COPY_CONFIG,
        )
    return values, indices, row_offsets


def _aot():
    tile = {"h": "*fp32:16", "bias": "*fp32:16", "threshold": "*fp32:16"}
    sizes = {"width": "i32:16", "first": "i32", "cells": "i32:16"}
    arena = {"values": "*fp32:16", "indices": "*i32:16"}
    count = {**tile, "counts": "*i32:16", **sizes}
    compact = {**tile, "starts": "*i64:16", **arena, **sizes, "capacity": "i32"}
    copy = {"counts": "*i32:16", "sources": "*i64:16", "targets": "*i64:16"}
    copy |= {"arena_values": "*fp32:16", "arena_indices": "*i32:16", **arena}
    return [
        (kernel, signature, {"BLOCK": config["BLOCK"]}, {"num_warps": config["num_warps"]})
        for kernel, signature, config in (
            (_count_kernel, count, _CELL_CONFIG),
            (_compact_kernel, compact, _CELL_CONFIG),
            (_copy_kernel, copy, _COPY_CONFIG),
        )
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = _aot()
