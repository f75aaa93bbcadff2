"""Every op through the compiled leaf ops `torch.ops.fastsae._*` (sources in csrc/).

Names and signatures are those of fastsae.ops.reference. An exact value always comes from one
rescoring dot (csrc/dot.h), so results do not depend on the batch, the tile, the screen or the
number of threads. What is kept of the weights between calls is in screens.py.
"""

import math

import torch
from torch import Tensor

from fastsae.ops import csr, extension, screens
from fastsae.ops.reference import full_precision

TILE_ROWS = 8  # more rows are screened in AMX tiles where there are any,
BYTE_ROWS = 16  # and more than these by fp32 products elsewhere; fewer by an int8 copy of W, which
# pays here too where tiles of narrower weights would have to be packed at every call
DENSE_SHARE = 5  # from k = F / 5 on all fp32 dots, side by side, cost less than those of a screen
CANDIDATES = 512  # entries of a candidate list, at least; rows with more compute every dot
WORKSPACE = 44 << 20  # bytes that encoding may use for a tile of rows
MI_CHUNK_BYTES = 16 << 20  # logits of one chunk of features, and as much for the features
MI_BYTES = 232 << 20  # chunks, words and the logits that are kept for the second pass
MI_WORDS_BYTES = 80 << 20  # words in tiles
MI_TILE_ROWS = 32  # fewer features do not repay the splitting of words

_OBJECTIVES = {"mi": 0, "pmi": 1, "paper": 2, "logit": 3}

if extension.problem() is None:
    _leaf = torch.ops.fastsae
    _topk_rows, _decode_rows = _leaf._topk_rows.default, _leaf._decode_rows.default


def isa() -> str:
    """The instruction set in use on the CPU: "scalar", "avx2", "avx512" or "amx"."""
    return _leaf._get_isa()


def set_isa(name: str) -> None:
    """Forces an instruction set ("auto" for the best one); for tests and measurements.

    Raises ValueError if this processor lacks it.
    """
    if not _leaf._set_isa(name):
        raise ValueError(
            f"isa: got {name!r}, accepted are auto, scalar and what this processor has: "
            f"{', '.join(n for n in ('avx2', 'avx512', 'amx') if cpu_features()[n]) or 'no other'}"
        )


def cpu_features() -> dict[str, object]:
    """What the processor offers, and under "isa" what is in use."""
    from fastsae import _C

    return _C.cpu_features()


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _topk_rows(x, k)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    return _decode_rows(values, indices, W_dec, b_dec)


def gather_dot(g: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    return _leaf._gather_dot(g, W, indices)


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, F: int) -> tuple[Tensor, Tensor]:
    return _leaf._sparse_outer(values, indices, g, F)


def encode_topk(x, W_enc, b_enc, k, b_dec=None, precision="exact") -> tuple[Tensor, Tensor]:
    exact = precision == "exact"
    shift = None if b_dec is None else b_dec.float()

    def run(*screen):
        return _leaf._encode_topk(x, W_enc, b_enc.float(), shift, k, exact, *screen)

    if not exact:
        many = isa() == "amx" or x.shape[0] > BYTE_ROWS
        return run(many, [], CANDIDATES, WORKSPACE)[:2]
    if k * DENSE_SHARE >= W_enc.shape[0]:
        return run(False, [], CANDIDATES, WORKSPACE)[:2]
    return _screened(run, x, W_enc, shift)


def encode_threshold(x, W_enc, b_enc, threshold, b_dec=None) -> tuple[Tensor, Tensor, Tensor]:
    shift = None if b_dec is None else b_dec.float()

    def run(*screen):
        return _leaf._encode_threshold(x, W_enc, b_enc.float(), shift, threshold.float(), *screen)

    return _screened(run, x, W_enc, shift)


def encode_threshold_padded(
    x, W_enc, b_enc, threshold, capacity, b_dec=None
) -> tuple[Tensor, Tensor, Tensor]:
    return csr.fit(*encode_threshold(x, W_enc, b_enc, threshold, b_dec), capacity)


def _screened(run, x: Tensor, W: Tensor, b_dec: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors of run(screen, copy, CANDIDATES, WORKSPACE) with the cheapest screen.

    The last thing that `run` returns is how many rows no screen could help, or -1: the copy is of
    other weights, and the call is repeated without it.
    """
    n, tiles = x.shape[0], isa() == "amx"
    many, found = n > (TILE_ROWS if tiles else BYTE_ROWS), None
    if tiles and many and W.dtype == torch.float32:
        found = screens.find(W, "bf16")
    elif 0 < n <= BYTE_ROWS:
        found = screens.find(W, "int8")
    if found is not None:
        *result, full = run(many, found.copy(x, b_dec), CANDIDATES, WORKSPACE)
        if full >= 0:
            found.judge(full, n)
            return tuple(result)
        screens.drop(W)
    *result, full = run(many, [], CANDIDATES, WORKSPACE)
    if full < 0:
        raise RuntimeError("encode: a value lies outside its certified bound; report this bug")
    return tuple(result)


def release_workspaces() -> int:
    """Gives back memory that ops keep for their next call (at most 64 MB); returns its bytes."""
    return _leaf._release_workspaces()


def encode_stages() -> dict[str, float]:
    """Seconds that the stages of this thread's last encode took; see csrc/encode.h.

    "full" is the part of all others that rows without a certificate took.
    """
    names = ("rows", "scan", "plan", "rescore", "write", "full")
    return dict(zip(names, _leaf._encode_stages().tolist(), strict=True))


def mi_topk(features, words, top, objective, temperature) -> tuple[Tensor, Tensor]:
    n, v = features.shape[0], words.shape[0]
    scale, kind = 1.0 / temperature, _OBJECTIVES[objective]
    product, row_bytes = _tile_product(features, words, scale) or _dense_product(words, scale)
    step = max(1, MI_CHUNK_BYTES // max(4 * v, row_bytes))
    step = min(max(n, 1), step if step < 32 else step // 32 * 32)
    rows = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    rest = max(0, MI_BYTES - 2 * MI_CHUNK_BYTES - v * row_bytes)
    keep = 0 if objective == "logit" else min(n, rest // (4 * v))
    kept, buffer = torch.empty(keep, v), torch.empty(step, v)

    def room(part: slice) -> Tensor | None:
        return kept[part] if part.stop <= keep else None

    column_lse = torch.zeros(v)
    parts = [(torch.empty(0, top), torch.empty(0, top, dtype=torch.int32))]
    with full_precision(features.device):
        if objective != "logit":
            maximum, total = torch.full((v,), -math.inf), torch.zeros(v)
            for part in rows:
                product(features[part], [maximum, total], room(part), buffer)
            column_lse = maximum + total.log()
        for part in rows:
            logits = room(part)
            if logits is None:
                logits = buffer[: part.stop - part.start]
                product(features[part], [], logits, buffer)
            parts.append(_leaf._mi_topk(logits, column_lse, scale, kind, math.log(max(n, 1)), top))
    scores, indices = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(indices)


def _dense_product(words: Tensor, scale: float):
    """product(f, sums, logits, buffer) by torch.mm in fp32, and the bytes it needs per row.

    Adds f's rows to the column sums [maximum, sum] where given, and writes ⟨f, w⟩ into logits
    [f rows, V] where given.
    """
    w = words.float()

    def product(f, sums, logits, buffer):
        out = buffer[: f.shape[0]] if logits is None else logits
        torch.mm(f.float(), w.T, out=out)
        if sums:
            _leaf._mi_columns(out, scale, *sums)

    return product, 4 * w.shape[1]


def _tile_product(features: Tensor, words: Tensor, scale: float):
    """_dense_product on AMX tiles with the error of an fp32 product (csrc/mi_product.h); None where
    tiles cannot have it, or do not pay."""
    bf16 = features.dtype == words.dtype == torch.bfloat16
    parts = 1 if bf16 else 3
    row_bytes = 2 * parts * words.shape[1]
    if (
        isa() != "amx"
        or features.shape[0] < MI_TILE_ROWS
        or words.shape[0] * row_bytes > MI_WORDS_BYTES
        or not (_splittable(features) and _splittable(words))
    ):
        return None
    tiles = _leaf._mi_words(words, parts)

    def product(f, sums, logits, buffer):
        out = [] if logits is None else [logits]
        _leaf._mi_product(f, tiles, words.shape[0], parts, scale, sums, out)

    return product, row_bytes


def _splittable(x: Tensor) -> bool:
    """Whether no part of a value, nor a product of two, overflows, or underflows and counts."""
    if x.numel() == 0:
        return False
    largest = torch.maximum(x.amax(1), -x.amin(1))  # NaN stays; aminmax(dim=1) takes 5x longer
    return bool(((largest == 0) | (largest > 2.0**-40) & (largest < 2.0**40)).all())


def steer(x: Tensor, slots: Tensor, strengths: Tensor, table) -> Tensor:
    return _leaf._steer_rows.default(x, slots, strengths, table)


def steer_tokens(x, mask, ids, base, end, first, slots, strengths, *rest) -> None:
    """`steer` for the tokens of a batch that its rows' policies are for; see csrc/ops_steer.cpp."""
    _leaf._steer_tokens.default(x, mask, ids, base, end, first, slots, strengths, *rest)
