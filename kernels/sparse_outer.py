"""dW[f] = Σ v_nk g_n and db[f] = Σ v_nk over the entries (n, k) of feature f: gradients of sparse
codes.

One stable sort lists the entries by feature in ascending token order. A program (feature, slice of
D) then owns one output and adds its entries in that order: no atomics, the same bits in every run,
and N·K·D is never materialised. A hot feature would be a long serial sum, so every run of SEGMENT
sorted entries that belongs to one feature is first reduced by a program of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 256


@triton.jit
def _sum_entries(
    values, order, g, begin, end, K, D, columns, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Σ v·g[token, columns] and Σ v over the sorted entries begin..end-1, ascending."""
    total = tl.zeros([BLOCK_D], tl.float32)
    total_value = tl.zeros([BLOCK_E], tl.float32)
    inside = columns < D
    for start in range(begin, end, BLOCK_E):
        sorted_position = start + tl.arange(0, BLOCK_E)
        entry = tl.load(order + sorted_position, mask=sorted_position < end, other=0)
        value = tl.load(values + entry, mask=sorted_position < end, other=0.0).to(tl.float32)
        used = value != 0  # padding must not meet an Inf or NaN in g
        gradient = tl.load(
            g + (entry // K)[:, None] * D + columns[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(value[:, None] * gradient, axis=0)
        total_value += value
    return total, tl.sum(total_value, axis=0)


@triton.jit(do_not_specialize=["K"])
def _segment_kernel(
    values,
    features,
    order,
    g,
    partial,
    partial_value,
    K,
    D,
    SEGMENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0)
    begin = segment.to(tl.int64) * SEGMENT
    first = tl.load(features + begin)
    last = tl.load(features + begin + SEGMENT - 1)
    if first == last:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total, total_value = _sum_entries(
            values, order, g, begin, begin + SEGMENT, K, D, columns, BLOCK_E, BLOCK_D
        )
        tl.store(partial + segment.to(tl.int64) * D + columns, total, mask=columns < D)
        if tl.program_id(1) == 0:
            tl.store(partial_value + segment, total_value)


@triton.jit(do_not_specialize=["K"])
def _feature_kernel(
    values,
    offsets,
    order,
    g,
    partial,
    partial_value,
    dW,
    db,
    K,
    D,
    SEGMENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    begin = tl.load(offsets + feature)
    end = tl.load(offsets + feature + 1)
    whole_begin = (begin + SEGMENT - 1) // SEGMENT
    whole_end = end // SEGMENT
    has_whole = whole_begin < whole_end
    head_end = tl.where(has_whole, whole_begin * SEGMENT, end)
    tail_begin = tl.where(has_whole, whole_end * SEGMENT, end)

    total, total_value = _sum_entries(
        values, order, g, begin, head_end, K, D, columns, BLOCK_E, BLOCK_D
    )
    if has_whole:
        for start in range(whole_begin, whole_end, BLOCK_E):
            segment = start + tl.arange(0, BLOCK_E)
            whole = segment < whole_end
            mask = whole[:, None] & inside[None, :]
            rows = tl.load(partial + segment[:, None] * D + columns[None, :], mask=mask, other=0.0)
            total += tl.sum(rows, axis=0)
            total_value += tl.sum(tl.load(partial_value + segment, mask=whole, other=0.0), axis=0)
        tail, tail_value = _sum_entries(
            values, order, g, tail_begin, end, K, D, columns, BLOCK_E, BLOCK_D
        )
        total += tail
        total_value += tail_value
    tl.store(dW + feature * D + columns, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(db + feature, total_value)


def _config(itemsize: int) -> dict:
    return {"SEGMENT": SEGMENT, "BLOCK_E": 8, "BLOCK_D": 512 // itemsize, "num_warps": 1}


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """(dW [F, D], db [F]) float32: dW[f] = Σ v_nk g_n, db[f] = Σ v_nk over the entries with index
    f.

    values [N, K], indices [N, K] int32, g [N, D]; an index outside [0, F) adds to nothing.
    Bit-reproducible. Extra memory: N·K·D/256 floats
    and the sort's 20 bytes per entry. No host synchronisation.
    """
    N, K = values.shape
    D = g.shape[1]
    dW = torch.empty(F, D, dtype=torch.float32, device=g.device)
    db = torch.empty(F, dtype=torch.float32, device=g.device)
    if N * K == 0 or D == 0 or F == 0:
        return dW.zero_(), db.zero_()
    features, order = torch.sort(indices.view(-1), stable=True)
    edges = torch.arange(F + 1, dtype=features.dtype, device=g.device)
    offsets = torch.searchsorted(features, edges)
    config = _config(g.element_size())
    slices = triton.cdiv(D, config["BLOCK_D"])
    segments = features.numel() // SEGMENT
    partial = torch.empty(max(segments, 1), D, dtype=torch.float32, device=g.device)
    partial_value = torch.empty(max(segments, 1), dtype=torch.float32, device=g.device)
    shared = {"enable_fp_fusion": True, **config}
    if segments:
        _segment_kernel[(segments, slices)](
            values, features, order, g, partial, partial_value, K, D, **shared
        )
    _feature_kernel[(F, slices)](
        values, offsets, order, g, partial, partial_value, dW, db, K, D, **shared
    )
    return dW, db


def _aot(values: str, g: str):
    config = _config(4 if g == "fp32" else 2)
    options = {"num_warps": config.pop("num_warps")}
    entries = {"values": f"*{values}:16"}
    sorted_entries = {"order": "*i64:16", "g": f"*{g}:16"}
    sums = {"partial": "*fp32:16", "partial_value": "*fp32:16"}
    sizes = {"K": "i32", "D": "i32:16"}
    segment = {**entries, "features": "*i32:16", **sorted_entries, **sums, **sizes}
    feature = {**entries, "offsets": "*i64:16", **sorted_entries, **sums}
    feature |= {"dW": "*fp32:16", "db": "*fp32:16", **sizes}
    return [
        (_segment_kernel, segment, config, options),
        (_feature_kernel, feature, config, options),
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = [*_aot("fp32", "bf16"), *_aot("fp32", "fp32")]
