"""Every op through the compiled leaf ops `torch.ops.fastsae._*` (sources in csrc/).

Names and signatures are those of fastsae.ops.reference. Products of matrices are torch.mm; what is
compiled is everything around them. An exact value always comes from one rescoring dot (csrc/dot.h),
so results do not depend on the batch, the tile, the screen or the number of threads.
"""

import functools
import math

import torch
from torch import Tensor

from fastsae.ops import extension
from fastsae.ops.reference import full_precision

TILE_BYTES = 64 << 20  # pre-activations of one row tile
SCREEN_COLUMNS = 4096  # torch.mm is fastest on column tiles; a multiple of csrc's block of 256
DENSE_ROWS = 32  # up to here all fp32 dots cost less than rounding W for a screen
CANDIDATE_SHARE = 8  # rows with more than F / 8 candidates compute every pre-activation
MI_CHUNK_BYTES = 16 << 20  # logits of one chunk of features
MI_KEEP_BYTES = 128 << 20  # all logits are kept for the second pass when they fit

_OBJECTIVES = {"mi": 0, "pmi": 1, "paper": 2, "logit": 3}

if extension.problem() is None:
    _leaf = torch.ops.fastsae


def isa() -> str:
    """The instruction set in use on the CPU: "scalar", "avx2" or "avx512"."""
    return _leaf._get_isa()


def set_isa(name: str) -> None:
    """Forces an instruction set ("auto" for the best one); for tests and measurements.

    Raises ValueError if this processor lacks it.
    """
    if not _leaf._set_isa(name):
        raise ValueError(
            f"isa: got {name!r}, accepted are auto, scalar and what this processor has: "
            f"{', '.join(n for n in ('avx2', 'avx512') if cpu_features()[n]) or 'nothing else'}"
        )


def cpu_features() -> dict[str, object]:
    """What the processor offers, and under "isa" what is in use."""
    from fastsae import _C

    return _C.cpu_features()


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _leaf._topk_rows(x, k)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    return _leaf._decode_rows(values, indices, W_dec, b_dec)


def gather_dot(g: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    return _leaf._gather_dot(g, W, indices)


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, F: int) -> tuple[Tensor, Tensor]:
    return _leaf._sparse_outer(values, indices, g, F)


def encode_topk(x, W_enc, b_enc, k, b_dec=None, precision="exact") -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    exact = precision == "exact"
    screen = _Screen(W_enc, b_enc, n, dense=exact)
    parts = [
        _leaf._encode_topk_rows(*screen.operands(x[rows], b_dec), k, *screen.limits, exact)
        for rows in screen.row_tiles(n)
    ]
    values, indices = (_concatenate(column) for column in zip(*parts, strict=True))
    return values, indices


def encode_threshold(x, W_enc, b_enc, threshold, b_dec=None) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[0]
    screen = _Screen(W_enc, b_enc, n, dense=True)
    parts = [
        _leaf._encode_threshold_rows(
            *screen.operands(x[rows], b_dec), threshold.float(), *screen.limits
        )
        for rows in screen.row_tiles(n)
    ]
    values, indices, offsets = zip(*parts, strict=True)
    counts = _concatenate([o.diff() for o in offsets])
    row_offsets = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_offsets[1:])
    return _concatenate(values), _concatenate(indices), row_offsets


@functools.cache
def _bf16_is_fast() -> bool:
    """Whether torch.mm on bf16 uses hardware: elsewhere it is emulated and slower than fp32."""
    cpu = cpu_features()
    return (cpu["amx_bf16"] or cpu["avx512_bf16"]) and torch.backends.mkldnn.is_available()


class _Screen:
    """Approximate pre-activations of row tiles, and what bounds their error.

    With bf16 hardware: bf16 operands. Without: the fp32 product, under the same bound, because a
    process-wide flag may have turned it into a bf16 one. A few rows need no screen at all.
    Nothing is kept between calls, so weights may be edited by any means.
    """

    def __init__(self, W: Tensor, b_enc: Tensor, n: int, dense: bool) -> None:
        self.W, self.b_enc = W, b_enc.float()
        self.dense = dense and n <= DENSE_ROWS
        self.half = _bf16_is_fast() and not self.dense
        features = W.shape[0]
        self.limits = SCREEN_COLUMNS, max(1, features // CANDIDATE_SHARE)
        self.row_bytes = features * (2 if self.half else 4)
        self.several = n * self.row_bytes > TILE_BYTES
        self.norms = self.b_enc
        self.tiles: list[Tensor] = []

    def row_tiles(self, n: int):
        step = max(1, TILE_BYTES // self.row_bytes)
        return [slice(i, min(i + step, n)) for i in range(0, n, step)] or [slice(0, 0)]

    def operands(self, x: Tensor, b_dec: Tensor | None) -> tuple[Tensor, ...]:
        """The leading arguments of the leaf ops: screen, centred x, bounds, W, b_enc, norms."""
        shift = None if b_dec is None else b_dec.float()
        centred, rounded, bounds = _leaf._encode_centre(x, shift, self.half)
        if self.dense or x.shape[0] == 0:
            screen = centred.new_empty(0)
        else:
            screen = self._product(rounded if self.half else centred)
        return screen, centred, bounds, self.W, self.b_enc, self.norms

    def _product(self, x: Tensor) -> Tensor:
        """x Wᵀ in column tiles: tile t is a contiguous [n, width] matrix."""
        n, features = x.shape[0], self.W.shape[0]
        out = x.new_empty(n * features)
        begin = 0
        with torch.autocast("cpu", enabled=False):
            for tile in self._weights():
                end = begin + n * tile.shape[0]
                torch.mm(x, tile.T, out=out[begin:end].view(n, tile.shape[0]))
                begin = end
        return out

    def _weights(self):
        """Column tiles as the product reads them; sets `norms` once all of them were made.

        One row tile meets each of them while it is still in the cache; several share a copy.
        """
        if self.tiles:
            yield from self.tiles
            return
        norms = []
        convert = self.half and self.W.dtype != torch.bfloat16
        for source in self.W.split(SCREEN_COLUMNS):
            rounded, bounds = _leaf._encode_weights(source, convert)
            norms.append(bounds)
            tile = rounded if convert else source if self.half else source.float()
            if self.several:
                self.tiles.append(tile)
            yield tile
        self.norms = torch.cat(norms, 1)


def _concatenate(parts) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mi_topk(features, words, top, objective, temperature) -> tuple[Tensor, Tensor]:
    f, w = features.float(), words.float()
    n, v = f.shape[0], w.shape[0]
    step = max(1, MI_CHUNK_BYTES // (4 * v))
    keep = n * v * 4 <= MI_KEEP_BYTES
    buffer = f.new_empty(n if keep else min(n, step), v)
    scale, kind = 1.0 / temperature, _OBJECTIVES[objective]

    def chunks():
        for i in range(0, n, step):
            j = min(i + step, n)
            yield torch.mm(f[i:j], w.T, out=buffer[i:j] if keep else buffer[: j - i])

    column_lse = f.new_zeros(v)
    with full_precision(f.device):
        ready = None
        if objective != "logit":
            maximum, total = f.new_full((v,), -math.inf), f.new_zeros(v)
            for chunk in chunks():
                _leaf._mi_columns(chunk, scale, maximum, total)
            column_lse = maximum + total.log()
            ready = buffer.split(step) if keep else None
        parts = [(f.new_empty(0, top), torch.empty(0, top, dtype=torch.int32))]
        for chunk in ready or chunks():
            parts.append(_leaf._mi_topk(chunk, column_lse, scale, kind, math.log(max(n, 1)), top))
    scores, indices = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(indices)


def steer(x: Tensor, slots: Tensor, strengths: Tensor, table) -> Tensor:
    return _leaf._steer_rows(x, slots, strengths, list(table))
