"""encode_topk: a certified screen, exact values of the few candidates, selection.

| x, W_enc | screen | values |
|---|---|---|
| both bfloat16 or both float16, more than 64 rows | none | the product's, accumulated in fp32 |
| precision="fast" | none | a half-precision product's |
| anything else | bfloat16 tensor-core product | the rescoring dot's |

The rescoring dot (rescore.py) sums in one order whatever the batch, so its results are equal bit
for bit for any N. [N, F] never exists: pre-activations are tiles that are consumed while they are
in L2. Nothing synchronises with the host.
"""

import torch
from fastsae.kernels import rescore, screen, stream
from fastsae.kernels.candidates import candidates
from fastsae.kernels.matmul import full_fp32, product
from fastsae.kernels.topk import MAX_K, select
from torch import Tensor

WORKSPACE_BYTES = 64 << 20  # of a tile, where rows are few
CELL = 4096  # columns of a tile that is selected from
HALVES = (torch.bfloat16, torch.float16)
STREAMED_ROWS = 512  # fewer rows do not fill a GPU with a program each
FEW_ROWS = 64  # up to here half-precision products are rescored too, and do not depend on the batch


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
    N = x.shape[0]
    out = (
        torch.empty(N, k, dtype=torch.float32, device=x.device),
        torch.empty(N, k, dtype=torch.int32, device=x.device),
    )
    if N == 0:
        return out
    same_half = W_enc.dtype in HALVES and x.dtype == W_enc.dtype
    with full_fp32(x.device):
        if precision == "fast" or (same_half and N > FEW_ROWS):
            _multiplied(x, W_enc, b_enc, k, b_dec, out)
        elif k > MAX_K:
            _whole(x, W_enc, b_enc, k, b_dec, out)
        else:
            _screened(x, W_enc, b_enc, k, b_dec, out)
    return out


def _screened(x, W, b_enc, k: int, b_dec, out) -> None:
    rows, found, _, stale = candidates(x, W, b_enc, b_dec, None, k, capacity(k))
    exact, wrong = rescore.rescore(rows.centred, W, b_enc, found, k)
    select(exact, k, columns=found.indices, active=True, into=out)
    for places, h in rescore.full_rows(rows.centred, W, b_enc, found.counts, wrong, stale):
        select(h, k, active=True, into=out, places=places)


def capacity(k: int) -> int:
    """Candidates per row: several times what screens leave of real activations.

    Not more than 2048: longer lists do not fit the registers of a program.
    """
    return min(2048, max(512, 1 << (4 * k - 1).bit_length()))


def _whole(x, W, b_enc, k: int, b_dec, out) -> None:
    """Every pre-activation by the rescoring dot: more winners than a list of candidates holds."""
    for part, h in rescore.every_row(screen.centred(x, b_dec), W, b_enc):
        select(h, k, active=True, into=(out[0][part], out[1][part]))


def _tiles(N: int, F: int, k: int) -> tuple[int, int]:
    """(rows, columns) of a GEMM tile: 1024 rows re-read the weights rarely, whole rows are
    simplest.

    Column tiles are multiples of CELL and at least 16 k wide.
    """
    budget = WORKSPACE_BYTES // 4
    rows = max(1, min(N, 1024))
    columns = budget // rows // CELL * CELL
    if columns >= F or columns < 16 * k:
        return max(1, min(N, budget // F)), F
    return rows, columns


def _multiplied(x, W, b_enc, k: int, b_dec, out) -> None:
    """Selection from the tensor-core product of half-precision operands."""
    dtype = W.dtype if W.dtype in HALVES else torch.bfloat16
    W, bias = W.to(dtype), b_enc.float()
    if b_dec is not None and x.dtype == dtype:
        # x stays as it is: what b_dec does to h goes into the bias, by the rescoring dot.
        bias = bias - rescore.dots(b_dec, W)
        b_dec = None
    N, F = x.shape[0], W.shape[0]
    rows, columns = _tiles(N, F, k)
    streamed = N >= STREAMED_ROWS and F > stream.TILE_COLUMNS and k <= stream.MAX_K
    if streamed:
        rows, columns = stream.TILE_ROWS, stream.TILE_COLUMNS
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        operand = x[part] if b_dec is None else x[part].float() - b_dec.float()
        operand, here = operand.to(dtype), (out[0][part], out[1][part])
        if streamed:
            _streamed(operand, W, bias, k, here)
            continue
        if columns == F:
            select(product(operand, W), k, bias, active=True, into=here)
            continue
        winners, their_columns = [], []
        for first in range(0, F, columns):
            block = slice(first, min(first + columns, F))
            best = select(product(operand, W[block]), min(k, block.stop - first), bias[block])
            winners.append(best[0])
            their_columns.append(best[1] + first)
        # Tiles come in column order and each lists equal values by ascending column, so position
        # order among equals is column order: the merge keeps ties at the lower index.
        select(
            torch.cat(winners, 1), k, columns=torch.cat(their_columns, 1), active=True, into=here
        )


def _streamed(x, W, bias, k: int, out) -> None:
    found = stream.lists(x.shape[0], x.device)
    for first in range(0, W.shape[0], stream.TILE_COLUMNS):
        h = product(x, W[first : first + stream.TILE_COLUMNS])
        stream.offer(h, bias, found, first, k)
        del h  # the next product takes its memory, which is in L2
    stream.finish(found, k, out)
