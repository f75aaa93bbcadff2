"""encode_threshold: the screen and the rescoring dot of encode_topk, members above a threshold.

Candidates of a row are the features whose upper bound exceeds their threshold; exact values then
remove what is not a member. Rows with too many candidates are computed whole. The padded form has
a fixed shape and never synchronises; compressed rows are made of it with one synchronisation.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels import rescore
from fastsae.kernels.candidates import candidates
from fastsae.kernels.matmul import full_fp32
from torch import Tensor

CAPACITY = 256  # members per row that compressed rows count on; rows with more are computed again
LIST = 4096  # the longest list of candidates
REPEAT_BYTES = 64 << 20  # rows that are computed again, at a time


@triton.jit(do_not_specialize=["C", "F", "capacity"])
def _members_kernel(
    h,
    columns,
    places,
    limits,
    sizes,
    values,
    indices,
    counts,
    C,
    F,
    capacity,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    """Members of a row [C] in order, at most `capacity`; their true number; then padding.

    MAPPED: row n has sizes[n] entries of the features `columns`; else it has all features, and goes
    to places[n] (-1: nowhere).
    """
    n = tl.program_id(0).to(tl.int64)
    h += n * C
    columns += n * C
    if MAPPED:
        size = tl.load(sizes + n)
    else:
        size = F
        n = tl.load(places + n)
        if n < 0:
            return
    values += n * capacity
    indices += n * capacity
    lane = tl.arange(0, BLOCK)
    count = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        slot = start + lane
        inside = slot < size
        value = tl.load(h + slot, mask=inside, other=0.0)
        feature = slot
        if MAPPED:
            feature = tl.load(columns + slot, mask=inside, other=0)
        limit = tl.load(limits + feature, mask=inside, other=0.0)
        keep = (inside & ((value <= limit) == 0)).to(tl.int32)
        position = count + tl.cumsum(keep, axis=0) - keep
        write = (keep == 1) & (position < capacity)
        tl.store(values + position, value, mask=write)
        tl.store(indices + position, feature, mask=write)
        count += tl.sum(keep, axis=0)
    tl.store(counts + n, count)
    tl.debug_barrier()

    filled = count
    for start in range(0, tl.where(count < capacity, capacity, 0), BLOCK):
        candidate = start + lane
        used = tl.zeros([BLOCK], tl.int32)
        for listed in range(0, count, RANK):
            at = listed + tl.arange(0, RANK)
            index = tl.load(indices + at, mask=at < count, other=-1)
            used += tl.sum((candidate[None, :] == index[:, None]).to(tl.int32), axis=0)
        free = (used == 0).to(tl.int32)
        position = filled + tl.cumsum(free, axis=0) - free
        write = (free == 1) & (position < capacity)
        tl.store(indices + position, candidate, mask=write)
        tl.store(values + position, tl.zeros([BLOCK], tl.float32), mask=write)
        filled += tl.sum(free, axis=0)


@triton.jit(do_not_specialize=["capacity"])
def _compact_kernel(
    padded, columns, rows, row_offsets, values, indices, capacity, BLOCK: tl.constexpr
):
    """Row i of the padded form becomes row rows[i] of the compressed one, if it fits."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + i)
    begin = tl.load(row_offsets + n)
    count = (tl.load(row_offsets + n + 1) - begin).to(tl.int32)
    for start in range(0, tl.where(count <= capacity, count, 0), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < count
        value = tl.load(padded + i * capacity + slot, mask=inside, other=0.0)
        index = tl.load(columns + i * capacity + slot, mask=inside, other=0)
        tl.store(values + begin + slot, value, mask=inside)
        tl.store(indices + begin + slot, index, mask=inside)


_MEMBERS_CONFIG = {"BLOCK": 512, "RANK": 8, "num_warps": 4}
_COMPACT_CONFIG = {"BLOCK": 128, "num_warps": 1}


def encode_threshold_padded(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    capacity: int,
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [N, capacity] float32, indices [N, capacity] int32, counts [N] int32) of
    h > max(threshold, 0).

    h as in `encode_topk`, compared strictly in fp32 with the threshold of its feature; NaN is kept.
    Indices ascend; the rest of a row is padding: value 0, the lowest unused indices, ascending.
    `counts` is the true number: where it exceeds `capacity`, the row holds its first members only.
    No host synchronisation, no shape that depends on data.
    """
    N, F = x.shape[0], W_enc.shape[0]
    values = torch.empty(N, capacity, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, capacity, dtype=torch.int32, device=x.device)
    counts = torch.zeros(N, dtype=torch.int32, device=x.device)
    if N == 0:
        return values, indices, counts
    size = min(LIST, max(512, triton.next_power_of_2(2 * capacity)))
    with full_fp32(x.device):
        rows, found, limits, stale = candidates(x, W_enc, b_enc, b_dec, threshold, 0, size)

        def write(h, columns, places, sizes, mapped):
            _members_kernel[(h.shape[0],)](
                h,
                columns,
                places,
                limits,
                sizes,
                values,
                indices,
                counts,
                h.shape[1],
                F,
                capacity,
                MAPPED=mapped,
                enable_fp_fusion=True,
                **_MEMBERS_CONFIG,
            )

        exact, wrong = rescore.rescore(rows.centred, W_enc, b_enc, found, 0)
        write(exact, found.indices, found.indices, found.counts, True)
        whole = (rows.centred, W_enc, b_enc, found.counts, wrong, stale)
        for places, h in rescore.full_rows(*whole):
            write(h, found.indices, places, found.counts, False)
    return values, indices, counts


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """CSR (values [nnz] float32, indices [nnz] int32, row_offsets [N + 1] int64) of h >
    max(threshold, 0), as `encode_threshold_padded` has them.

    One host synchronisation: nnz and the largest row. Rows of more than 256 members are computed
    again, as many at a time as fit 64 MB.
    """
    N, F = x.shape[0], W_enc.shape[0]
    arguments, device = (W_enc, b_enc, threshold), x.device
    first = encode_threshold_padded(x, *arguments, min(F, CAPACITY), b_dec)
    row_offsets = torch.zeros(N + 1, dtype=torch.int64, device=device)
    torch.cumsum(first[2], 0, out=row_offsets[1:])
    nnz = most = 0
    if N:
        nnz, most = torch.stack([row_offsets[-1], first[2].max()]).tolist()
    values = torch.empty(nnz, dtype=torch.float32, device=device)
    indices = torch.empty(nnz, dtype=torch.int32, device=device)
    _compact(first, torch.arange(N, device=device), row_offsets, values, indices)
    if most > CAPACITY:
        capacity = min(F, triton.next_power_of_2(most))
        rows = (first[2] > CAPACITY).nonzero()[:, 0]
        for part in rows.split(max(1, REPEAT_BYTES // (8 * capacity))):
            again = encode_threshold_padded(x[part], *arguments, capacity, b_dec)
            _compact(again, part, row_offsets, values, indices)
    return values, indices, row_offsets


def _compact(padded, rows: Tensor, row_offsets: Tensor, values: Tensor, indices: Tensor) -> None:
    if rows.shape[0] and values.shape[0]:
        _compact_kernel[(rows.shape[0],)](
            *padded[:2],
            rows,
            row_offsets,
            values,
            indices,
            padded[0].shape[1],
            **_COMPACT_CONFIG,
        )


def _aot():
    members = {"h": "*fp32:16", "limits": "*fp32:16", "places": "*i64:16", "columns": "*i32:16"}
    members |= {"sizes": "*i32:16", "values": "*fp32:16", "indices": "*i32:16"}
    members |= {"counts": "*i32:16", "C": "i32", "F": "i32", "capacity": "i32"}
    compact = {"padded": "*fp32:16", "columns": "*i32:16", "rows": "*i64:16"}
    compact |= {"row_offsets": "*i64:16", "values": "*fp32:16", "indices": "*i32:16"}
    sizes = {n: v for n, v in _MEMBERS_CONFIG.items() if n != "num_warps"}
    warps = {"num_warps": _MEMBERS_CONFIG["num_warps"]}
    return [
        *((_members_kernel, members, {**sizes, "MAPPED": m}, warps) for m in (True, False)),
        (_compact_kernel, compact | {"capacity": "i32"}, {"BLOCK": 128}, {"num_warps": 1}),
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = _aot()
