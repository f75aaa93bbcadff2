"""Mutual-information scores and the best words of every feature, by tiles of the logits L = ⟨f, w⟩
/ T.

[F, V] never exists: a tile of whole feature rows (34 MB, which L2 holds) comes from cuBLAS in fp32.
The first sweep reduces tiles to column log-sum-exps through partial (maximum, sum) pairs that are
combined in a fixed order, without locks; the second recomputes the tile (or keeps it, when there is
one tile only), scores it in place and selects. The row log-sum-exp falls out of the scoring kernel.
"""

import math

import torch
import triton
import triton.language as tl
from fastsae.kernels.matmul import full_fp32, product
from fastsae.kernels.topk import select
from torch import Tensor

TILE_BYTES = 34 << 20
OBJECTIVES = {"logit": 0, "pmi": 1, "mi": 2, "paper": 3}


@triton.jit
def _exp_shift(maximum):
    """What to subtract before exp: the maximum, but 0 when all are -inf (else NaN = -inf + inf)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["rows"])
def _column_partial_kernel(
    raw,
    maxima,
    sums,
    rows,
    V,
    inverse_T,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(m, Σ e^(L - m)) of BLOCK columns over ROWS rows."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ROWS, STEP):
        row = group * ROWS + start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < V)[None, :]
        logit = tl.load(raw + row[:, None] * V + column[None, :], mask=inside, other=float("-inf"))
        logit = tl.where(inside, logit * inverse_T, float("-inf"))
        above = tl.maximum(maximum, tl.max(logit, axis=0))
        shift = _exp_shift(above)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logit - shift[None, :]), axis=0)
        maximum = above
    tl.store(maxima + group * V + column, maximum, mask=column < V)
    tl.store(sums + group * V + column, total, mask=column < V)


@triton.jit(do_not_specialize=["groups"])
def _column_combine_kernel(
    maxima, sums, running_maximum, running_sum, groups, V, BLOCK: tl.constexpr
):
    """Running (m, s) of BLOCK columns joined with a tile's partials, in the order of the rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    maximum = tl.load(running_maximum + column, mask=inside, other=float("-inf"))
    total = tl.load(running_sum + column, mask=inside, other=0.0)
    for group in range(0, groups):
        position = tl.cast(group, tl.int64) * V + column
        other = tl.load(maxima + position, mask=inside, other=float("-inf"))
        above = tl.maximum(maximum, other)
        shift = _exp_shift(above)
        part = tl.load(sums + position, mask=inside, other=0.0)
        total = total * tl.exp(maximum - shift) + part * tl.exp(other - shift)
        maximum = above
    tl.store(running_maximum + column, maximum, mask=inside)
    tl.store(running_sum + column, total, mask=inside)


@triton.jit
def _score_kernel(
    raw,
    column_lse,
    V,
    inverse_T,
    log_F,
    OBJECTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces a row of raw logits by its scores."""
    raw += tl.program_id(0).to(tl.int64) * V
    row_lse = 0.0
    if OBJECTIVE >= 2:
        maximum = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit = tl.load(raw + column, mask=column < V, other=float("-inf"))
            logit = tl.where(column < V, logit * inverse_T, float("-inf"))
            above = tl.maximum(maximum, logit)
            shift = _exp_shift(above)
            total = total * tl.exp(maximum - shift) + tl.exp(logit - shift)
            maximum = above
        row_maximum = tl.max(maximum, axis=0)
        shift = _exp_shift(row_maximum)
        row_lse = shift + tl.log(tl.sum(total * tl.exp(maximum - shift), axis=0))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        logit = tl.load(raw + column, mask=inside, other=0.0) * inverse_T
        score = logit - tl.load(column_lse + column, mask=inside, other=0.0)
        if OBJECTIVE == 2:
            score = tl.exp(logit - row_lse) * (score + log_F)
        if OBJECTIVE == 3:
            score = tl.exp(logit - row_lse) * score
        tl.store(raw + column, score, mask=inside)


_PARTIAL_CONFIG = {"ROWS": 128, "STEP": 16, "BLOCK": 128, "num_warps": 4}
_COMBINE_CONFIG = {"BLOCK": 128, "num_warps": 4}
_SCORE_CONFIG = {"BLOCK": 2048, "num_warps": 8}


class _ColumnLSE:
    """log Σ_f e^(L/T) of every word, tile by tile."""

    def __init__(self, V: int, inverse_T: float, device: torch.device):
        self.V, self.inverse_T = V, inverse_T
        self.maximum = torch.full((V,), -math.inf, dtype=torch.float32, device=device)
        self.sum = torch.zeros(V, dtype=torch.float32, device=device)

    def add(self, raw: Tensor) -> None:
        rows, V = raw.shape
        groups = triton.cdiv(rows, _PARTIAL_CONFIG["ROWS"])
        maxima = torch.empty(groups, V, dtype=torch.float32, device=raw.device)
        sums = torch.empty_like(maxima)
        _column_partial_kernel[(groups, triton.cdiv(V, _PARTIAL_CONFIG["BLOCK"]))](
            raw, maxima, sums, rows, V, self.inverse_T, enable_fp_fusion=True, **_PARTIAL_CONFIG
        )
        _column_combine_kernel[(triton.cdiv(V, _COMBINE_CONFIG["BLOCK"]),)](
            maxima,
            sums,
            self.maximum,
            self.sum,
            groups,
            V,
            enable_fp_fusion=True,
            **_COMBINE_CONFIG,
        )

    def value(self) -> Tensor:
        return self.maximum + self.sum.log()


def mi_topk(
    features: Tensor, words: Tensor, top: int, objective: str = "mi", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(scores [F, top] float32, indices [F, top] int32) of the best words of every feature,
    descending.

    features [F, D], words [V, D]; L = ⟨f, w⟩ / T. "mi": p(v|f) (log p(f|v) + log F); "pmi": log
    p(f|v); "paper": p(v|f) log p(f|v); "logit": ⟨f, w⟩. Ties go to the lower index. Cost: two GEMM
    sweeps (one for "logit" or when the logits fit one tile of 34 MB). Operands that are both
    bfloat16 or both float16 go to tensor cores, whose products of them are exact in fp32; all
    others are multiplied in full fp32.
    """
    F, V = features.shape[0], words.shape[0]
    scores = torch.empty(F, top, dtype=torch.float32, device=features.device)
    indices = torch.empty(F, top, dtype=torch.int32, device=features.device)
    if F == 0:
        return scores, indices
    f, w = features, words
    if f.dtype != w.dtype:
        f, w = f.float(), w.float()
    rows = max(1, TILE_BYTES // (4 * V))
    if rows > 128:
        rows -= rows % 128  # a product works by as many rows: a few more would cost as many
    parts = [slice(start, min(start + rows, F)) for start in range(0, F, rows)]
    with full_fp32(f.device):
        raw = product(f[parts[0]], w)
        if objective != "logit":
            columns = _ColumnLSE(V, 1.0 / temperature, f.device)
            columns.add(raw)
            for part in parts[1:]:
                raw = None  # the next product takes its memory, which is in L2
                raw = product(f[part], w)
                columns.add(raw)
            column_lse = columns.value()
        # The last tile of the first sweep is still at hand: the second sweep runs backwards from
        # it.
        order = parts if objective == "logit" else parts[::-1]
        for i, part in enumerate(order):
            if i > 0:
                raw = None
                raw = product(f[part], w)
            if objective != "logit":
                _score_kernel[(raw.shape[0],)](
                    raw,
                    column_lse,
                    V,
                    1.0 / temperature,
                    math.log(F),
                    OBJECTIVE=OBJECTIVES[objective],
                    enable_fp_fusion=True,
                    **_SCORE_CONFIG,
                )
            scores[part], indices[part] = select(raw, top)
    return scores, indices


def _aot():
    partial = {"raw": "*fp32:16", "maxima": "*fp32:16", "sums": "*fp32:16"}
    partial |= {"rows": "i32", "V": "i32", "inverse_T": "fp32"}
    combine = {"maxima": "*fp32:16", "sums": "*fp32:16", "running_maximum": "*fp32:16"}
    combine |= {"running_sum": "*fp32:16", "groups": "i32", "V": "i32"}
    score = {"raw": "*fp32:16", "column_lse": "*fp32:16", "V": "i32"}
    score |= {"inverse_T": "fp32", "log_F": "fp32"}
    cases = [
        (_column_partial_kernel, partial, _PARTIAL_CONFIG),
        (_column_combine_kernel, combine, _COMBINE_CONFIG),
        (_score_kernel, score, {"OBJECTIVE": 1, **_SCORE_CONFIG}),
        (_score_kernel, score, {"OBJECTIVE": 2, **_SCORE_CONFIG}),
    ]
    return [
        (
            kernel,
            signature,
            {name: value for name, value in config.items() if name != "num_warps"},
            {"num_warps": config["num_warps"]},
        )
        for kernel, signature, config in cases
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = _aot()
