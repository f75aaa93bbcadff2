"""Candidates of every row: the screened product by tiles, each consumed while it is in L2."""

from typing import NamedTuple

import torch
from fastsae.kernels import fused, screen
from fastsae.kernels.collect import Lists, collect, lists
from fastsae.kernels.matmul import product
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 2048, 4096  # of a cuBLAS product: fp32, 32 MB
G = 8  # its features per group
FUSED_ROWS = 1024  # of a fused product, with fused.PREFILL_COLUMNS as large
# Which product screens, by the number of rows and D: the first line that fits. Derived from the
# bytes and operations of each; none of these limits has been measured. "fused" waits (D up to 0)
# for the run on a GPU that shows it right and faster; 2048 is where it should pay.
CHOICES = (
    # rows up to, D up to, product
    (fused.STEP8_ROWS, 1 << 30, "int8"),
    (fused.STEP_ROWS, 1 << 30, "step"),
    (1 << 62, 0, "fused"),
    (1 << 62, 1 << 30, "cublas"),
)


def choose(x: Tensor, W: Tensor) -> str:
    """The product that screens x: "int8", "step", "fused" or "cublas"."""
    N, D = x.shape
    for rows, width, name in CHOICES:
        # 16-bit weights are their own copy, or nearly: an int8 one would halve what is read.
        if N <= rows and D <= width and (name != "int8" or W.dtype == torch.float32):
            return name
    raise AssertionError("the last choice takes everything")


class Screened(NamedTuple):
    """What a screen leaves of a call."""

    rows: screen.Rows
    lists: Lists
    limits: Tensor  # fp32 [F, padded]: max(threshold, 0)
    stale: Tensor  # int32 [1]: set it if the copy proves to be of other weights


def candidates(
    x: Tensor,
    W: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    threshold: Tensor | None,
    k: int,
    capacity: int,
) -> Screened:
    """Every feature of x's rows whose exact pre-activation can be among the k largest, or above
    its threshold (then k = 0), in lists of `capacity` entries; call inside `full_fp32`.
    """
    (N, D), F, name = x.shape, W.shape[0], choose(x, W)
    w = screen.weights(W, "int8" if name == "int8" else "bf16", x, b_dec)
    rows = screen.rows(x, b_dec, w)
    if name == "fused" and not fused.has_tma(rows.rounded, w.copy):
        name = "cublas"
    group = {"fused": fused.PREFILL_GROUP, "cublas": G}.get(name, fused.STEP_GROUP)
    features = screen.features(W, w, b_enc, threshold, group)
    found = lists(N, capacity, x.device)
    if name in ("int8", "step"):
        h, maxima = fused.step(rows, w, features)
        for first in range(0, F, fused.STEP_COLUMNS):
            part = h[:, first : first + fused.STEP_COLUMNS]
            top = maxima[:, first // group : (first + fused.STEP_COLUMNS) // group]
            collect(part, top, rows.bounds, features, found, first, D, k, group)
        return Screened(rows, found, features.limits, w.stale)
    tile = (FUSED_ROWS, fused.PREFILL_COLUMNS) if name == "fused" else (TILE_ROWS, TILE_COLUMNS)
    for start in range(0, N, tile[0]):
        part = slice(start, min(start + tile[0], N))
        into, top = Lists(*(t[part] for t in found)), None
        for first in range(0, F, tile[1]):
            width, operand = min(tile[1], F - first), rows.rounded[part]
            if name == "fused":
                h, top = fused.prefill(operand, w.copy, features.bias, first, width)
            else:
                h = product(operand, w.copy[first : first + width])
            collect(h, top, rows.bounds[part], features, into, first, D, k, group)
            del h  # the next product takes its memory, which is in L2
    return Screened(rows, found, features.limits, w.stale)
