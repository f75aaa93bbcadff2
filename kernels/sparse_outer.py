"""dW[f] = Σ v_nk g_n and db[f] = Σ v_nk over the entries (n, k) of feature f: gradients of sparse
codes.

One stable sort lists the entries by feature in ascending token order. A program (feature, slice of
D) then owns one output and adds its entries in that order: no atomics, the same bits in every run,
and N·K·D is never materialised. A hot feature would be a long serial sum, so every run of SEGMENT
sorted entries that belongs to one feature is first reduced by a program of its own. Slices are the
slow axis of the grid: all features gather from one slice of g, which stays in L2.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.decode import WIDE, add_slices
from torch import Tensor

SEGMENT = 256


@triton.jit
def _sum_entries(
    values,
    rows,
    g,
    weight,
    dots,
    begin,
    end,
    D,
    columns,
    DOT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ v·g[row, columns] and Σ v over the sorted entries begin..end-1, ascending.

    DOT: also writes dots[e] = ⟨weight, g[row, columns]⟩, 0 where v = 0.
    """
    total = tl.zeros([BLOCK_D], tl.float32)
    total_value = tl.zeros([BLOCK_E], tl.float32)
    for start in range(begin, end, BLOCK_E):
        entry = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_E)
        value = tl.load(values + entry, mask=entry < end, other=0.0)
        row = tl.load(rows + entry, mask=entry < end, other=0).to(tl.int64)
        used = value != 0  # padding must not meet an Inf or NaN in g
        gradient = tl.load(
            g + row[:, None] * D + columns[None, :],
            mask=used[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(value[:, None] * gradient, axis=0)
        total_value += value
        if DOT:
            tl.store(dots + entry, tl.sum(gradient * weight[None, :], axis=1), mask=entry < end)
    return total, tl.sum(total_value, axis=0)


@triton.jit(do_not_specialize=["count"])
def _segment_kernel(
    values,
    features,
    rows,
    g,
    W,
    dots,
    partial,
    partial_value,
    count,
    F,
    D,
    DOT: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin = segment * SEGMENT
    first = tl.load(features + begin)
    last = tl.load(features + begin + SEGMENT - 1)
    if (first == last) & (first >= 0) & (first < F):
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        weight = tl.zeros([BLOCK_D], tl.float32)
        if DOT:
            weight = tl.load(W + first.to(tl.int64) * D + columns, mask=columns < D, other=0.0)
            weight = weight.to(tl.float32)
            dots += tl.program_id(1) * count.to(tl.int64)
        total, total_value = _sum_entries(
            values,
            rows,
            g,
            weight,
            dots,
            begin,
            begin + SEGMENT,
            D,
            columns,
            DOT,
            BLOCK_E,
            BLOCK_D,
        )
        tl.store(partial + segment * D + columns, total, mask=columns < D)
        if tl.program_id(1) == 0:
            tl.store(partial_value + segment, total_value)


@triton.jit(do_not_specialize=["count"])
def _feature_kernel(
    values,
    offsets,
    rows,
    g,
    W,
    dots,
    partial,
    partial_value,
    dW,
    db,
    count,
    D,
    DOT: tl.constexpr,
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

    weight = tl.zeros([BLOCK_D], tl.float32)
    if DOT:
        if end > begin:
            weight = tl.load(W + feature * D + columns, mask=inside, other=0.0).to(tl.float32)
        dots += tl.program_id(1) * count.to(tl.int64)
    total, total_value = _sum_entries(
        values, rows, g, weight, dots, begin, head_end, D, columns, DOT, BLOCK_E, BLOCK_D
    )
    if has_whole:
        for start in range(whole_begin, whole_end, BLOCK_E):
            segment = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_E)
            whole = segment < whole_end
            mask = whole[:, None] & inside[None, :]
            sums = tl.load(partial + segment[:, None] * D + columns[None, :], mask=mask, other=0.0)
            total += tl.sum(sums, axis=0)
            total_value += tl.sum(tl.load(partial_value + segment, mask=whole, other=0.0), axis=0)
        tail, tail_value = _sum_entries(
            values, rows, g, weight, dots, tail_begin, end, D, columns, DOT, BLOCK_E, BLOCK_D
        )
        total += tail
        total_value += tail_value
    tl.store(dW + feature * D + columns, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(db + feature, total_value)


def _config(D: int, itemsize: int) -> dict:
    """16 bytes per lane, eight rows in flight; up to four warps a program: starting one costs as
    much as an entry, and there are F times the number of slices."""
    lane = 512 // itemsize
    warps = max(1, min(4, triton.next_power_of_2(triton.cdiv(D, lane))))
    return {"SEGMENT": SEGMENT, "BLOCK_E": 8, "BLOCK_D": lane * warps, "num_warps": warps}


class _Entries:
    """The entries of a sparse code, sorted by feature and then by token."""

    def __init__(self, indices: Tensor, F: int):
        self.F, self.count = F, indices.numel()
        self.features, self.order = torch.sort(indices.view(-1), stable=True)
        edges = torch.arange(F + 1, dtype=self.features.dtype, device=indices.device)
        self.offsets = torch.searchsorted(self.features, edges)
        self.rows = (self.order // indices.shape[1]).to(torch.int32)

    def sums(
        self, values: Tensor, g: Tensor, W: Tensor | None = None, dots: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(dW, db) of sorted float32 values; with W also dots[slice, e] = ⟨W[f_e], g[row_e]⟩."""
        D = g.shape[1]
        new = {"dtype": torch.float32, "device": g.device}
        dW, db = torch.empty(self.F, D, **new), torch.empty(self.F, **new)
        config = {"DOT": W is not None, **_config(D, g.element_size())}
        slices = triton.cdiv(D, config["BLOCK_D"])
        segments = self.count // SEGMENT
        partial = torch.empty(max(segments, 1), D, **new)
        partial_value = torch.empty(max(segments, 1), **new)
        W, dots = (g, values) if W is None else (W, dots)
        if segments:
            _segment_kernel[(segments, slices)](
                values,
                self.features,
                self.rows,
                g,
                W,
                dots,
                partial,
                partial_value,
                self.count,
                self.F,
                D,
                enable_fp_fusion=True,
                **config,
            )
        _feature_kernel[(self.F, slices)](
            values,
            self.offsets,
            self.rows,
            g,
            W,
            dots,
            partial,
            partial_value,
            dW,
            db,
            self.count,
            D,
            enable_fp_fusion=True,
            **config,
        )
        return dW, db


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """(dW [F, D], db [F]) float32: dW[f] = Σ v_nk g_n, db[f] = Σ v_nk over the entries with index
    f.

    values [N, K], indices [N, K] int32, g [N, D]; an index outside [0, F) adds to nothing.
    Bit-reproducible. Extra memory: N·K·D/256 floats and 32 bytes per entry for the sort. No host
    synchronisation, no shape that depends on data.
    """
    N, K = values.shape
    D = g.shape[1]
    if N * K == 0 or D == 0 or F == 0:
        return g.new_zeros(F, D, dtype=torch.float32), g.new_zeros(F, dtype=torch.float32)
    entries = _Entries(indices, F)
    return entries.sums(values.view(-1)[entries.order].float(), g)


def code_gradients(
    values: Tensor, indices: Tensor, g: Tensor, x: Tensor, W: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dW_dec [F, D], dW_enc [F, D], db_enc [F]) float32 of z W with z = ReLU(x W_encᵀ + b), k
    kept.

    values, indices [N, K] (int32) the code z, g [N, D] the gradient of z W, x [N, D] the centred
    input, W [F, D] the decoder: dW_dec[f] = Σ z g_n, dW_enc[f] = Σ s x_n, db_enc[f] = Σ s with
    s = ⟨W[f], g_n⟩ over the entries with z ≠ 0. One sort; one pass over the rows of g gives dW_dec
    and s, one over those of x the rest. Bit-reproducible, no host synchronisation.
    """
    (N, K), (F, D) = values.shape, W.shape
    if N * K == 0 or D == 0 or F == 0:
        dW_dec, db = g.new_zeros(F, D, dtype=torch.float32), g.new_zeros(F, dtype=torch.float32)
        return dW_dec, torch.zeros_like(dW_dec), db
    entries = _Entries(indices, F)
    slices = triton.cdiv(D, _config(D, g.element_size())["BLOCK_D"])
    # Entries whose index is out of range are in no feature: nobody writes or reads their slopes.
    dots = torch.empty(slices, entries.count, dtype=torch.float32, device=g.device)
    dW_dec, _ = entries.sums(values.view(-1)[entries.order].float(), g, W, dots)
    slopes = dots[0] if slices == 1 else add_slices(dots, torch.empty_like(dots[0]))
    return dW_dec, *entries.sums(slopes, x)


def _aot(g: str, DOT: bool):
    config = _config(4096, 4 if g == "fp32" else 2)
    options = {"num_warps": config.pop("num_warps")}
    config["DOT"] = DOT
    matrices = {"rows": "*i32:16", "g": f"*{g}:16", "W": f"*{g}:16", "dots": "*fp32:16"}
    sums = {"partial": "*fp32:16", "partial_value": "*fp32:16"}
    sizes = {"count": "i32", "D": "i32:16"}
    segment = {"values": "*fp32:16", "features": "*i32:16", **matrices, **sums, **sizes}
    feature = {"values": "*fp32:16", "offsets": "*i64:16", **matrices, **sums, **sizes}
    feature |= {"dW": "*fp32:16", "db": "*fp32:16"}
    return [
        (_segment_kernel, {**segment, "F": "i32"}, config, options, WIDE),
        (_feature_kernel, feature, config, options, WIDE),
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options, expected).
AOT = [*_aot("bf16", False), *_aot("bf16", True), *_aot("fp32", False), *_aot("fp32", True)]
