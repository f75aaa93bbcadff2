"""The certified screen: operands rounded for tensor cores, and how far their products can be off.

Products are of activations about a centre, d = x - b_dec - c, and of weights, both rounded (~):
|<d, w> - <d~, w~>| <= |d - d~| |w| + |d~| |w - w~| (Cauchy-Schwarz), and <x - b_dec, w> =
<d, w> + <c, w>. The accumulation of D products costs at most D 2^-24 |d~| |w~| in fp32; tensor
cores are granted four times as much. The rescoring dot (rescore.py) and <c, w> sum slices of 128
columns: at most (D / 128 + 136) 2^-24 |x| |w| each. Norms are rounded up. A row or feature whose
norms are not finite has no bound: everything of it is a candidate.

A copy that is kept between calls is compared with its weights by every call, captured ones
included, and made anew in place where they have changed: on the device, without a look from the
host. The comparison reads one line of 64 bytes of every row: 4 MB of 65 536 features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastsae.kernels import copies
from fastsae.kernels.rounding import (
    BLOCK8,
    COPY_CONFIG,
    LANES,
    _any,
    _copy_kernel,
    _rows_kernel,
    _sketch,
    rows_config,
)
from torch import Tensor

PAD = 4096  # features of the per-feature vectors, padded: kernels read them without a mask
UNIT = 2.0**-24
TINY = 2.0**-125  # what flushing a denormal can cost: twice the least normal number


@triton.jit
def _changed_kernel(
    bits, digests, now, stale, changed, F, D, LINE: tl.constexpr, BLOCK: tl.constexpr
):
    """Whether any of BLOCK features no longer matches its digest, per program; what they are now.

    `stale`: not 0 where something else has shown that the copy is of other weights.
    """
    feature = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    sketch = _sketch(bits, feature, inside, D, LINE)
    tl.store(now + feature, sketch, mask=inside)
    differs = inside & (sketch != tl.load(digests + feature, mask=inside, other=0))
    known = (tl.load(stale) != 0).to(tl.int32)
    tl.store(changed + tl.program_id(0), tl.maximum(tl.max(differs.to(tl.int32), axis=0), known))


@triton.jit(do_not_specialize=["parts"])
def _features_kernel(
    changed,
    now,
    digests,
    stale,
    b_enc,
    products,
    threshold,
    norms,
    lost,
    bias,
    limits,
    group_bias,
    group_norms,
    group_lost,
    group_limits,
    parts,
    F,
    COMPARED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What selection reads of BLOCK features, padding too, and the extremes of groups of G.

    COMPARED: the `parts` of `changed` say whether the copy was made anew; then its digests are
    those of `now`.
    """
    feature = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    if COMPARED:
        if _any(changed, parts):
            tl.store(digests + feature, tl.load(now + feature, mask=inside), mask=inside)
            tl.store(stale, 0)
    error = tl.load(lost + feature)
    b = tl.load(b_enc + feature, mask=inside, other=0.0).to(tl.float32)
    b += tl.load(products + feature)
    tl.store(bias + feature, b)
    group = tl.program_id(0).to(tl.int64) * (BLOCK // G) + tl.arange(0, BLOCK // G)
    size = tl.where(b == b, tl.abs(b), float("inf"))
    norm = tl.load(norms + feature)
    tl.store(group_bias + group, tl.max(tl.reshape(size, [BLOCK // G, G]), axis=1))
    tl.store(group_norms + group, tl.max(tl.reshape(norm, [BLOCK // G, G]), axis=1))
    tl.store(group_lost + group, tl.max(tl.reshape(error, [BLOCK // G, G]), axis=1))
    if HAS_LIMIT:
        limit = tl.load(threshold + feature, mask=inside, other=float("inf")).to(tl.float32)
        limit = tl.where(limit < 0, 0.0, limit)
        tl.store(limits + feature, limit)
        least = tl.where(limit == limit, limit, -float("inf"))
        tl.store(group_limits + group, tl.min(tl.reshape(least, [BLOCK // G, G]), axis=1))


class Weights(NamedTuple):
    """A copy of weights [F, D] for the screen, and what its certificate needs (padded to PAD)."""

    copy: Tensor  # bf16 [F, D], or int8 [F, D padded to 64]
    scales: Tensor  # fp32 [F, D / 64] of int8, else empty
    norms: Tensor  # |w|
    lost: Tensor  # |w - w~|
    products: Tensor  # <c, w>
    digests: Tensor  # int64, of a line of every row
    centre: Tensor  # c [D], or empty: 0
    stale: Tensor  # int32 [1]: not 0 makes the next call make the copy anew
    kind: str  # "bf16", "int8", or "same": `copy` is W itself
    compared: bool  # with the weights before its use: it may be of an earlier call


class Features(NamedTuple):
    """Per feature, and per group of G features, what selection adds to products."""

    bias: Tensor  # b_enc + <c, w>
    norms: Tensor
    lost: Tensor
    limits: Tensor  # max(threshold, 0), or empty
    group_bias: Tensor  # largest |bias|
    group_norms: Tensor
    group_lost: Tensor
    group_limits: Tensor


class Rows(NamedTuple):
    """Rows of x for the screen and for the rescoring dot."""

    centred: Tensor  # fp32 [N, D padded to LANES]: x - b_dec, then zeros
    rounded: Tensor  # bf16 [N, D], or the high int8 plane [N, D padded to 64]
    low: Tensor  # the low int8 plane, or empty
    scales: Tensor  # fp32 [N] of the int8 planes, or empty
    bounds: Tensor  # fp32 [N, 2]


def _line(W: Tensor) -> int:
    return 64 // W.element_size()


def _bits(W: Tensor) -> Tensor:
    return W.view(torch.int32 if W.dtype == torch.float32 else torch.int16)


_FEATURES_CONFIG = {"BLOCK": 128, "num_warps": 4}
AGAIN_PROGRAMS = 1024  # that look whether a copy must be made anew: launched always, idle mostly


def _make(W: Tensor, kind: str, x: Tensor | None, b_dec: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors of `Weights`, in order."""
    F, D = W.shape
    device, padded = W.device, -(-F // PAD) * PAD
    empty = torch.empty(0, device=device)
    centre = empty
    if x is not None:
        mean = x.float().mean(0) if b_dec is None else x.float().mean(0) - b_dec.float()
        centre = torch.where(mean.isfinite() & (mean.abs() < 1e9), mean, 0)
    copy, scales = empty, empty
    if kind == "bf16":
        copy = torch.empty(F, D, dtype=torch.bfloat16, device=device)
    elif kind == "int8":
        blocks = -(-D // BLOCK8)
        copy = torch.empty(F, blocks * BLOCK8, dtype=torch.int8, device=device)
        scales = torch.empty(F, blocks, device=device)
    norms, lost, products = torch.zeros(3, padded, device=device).unbind(0)
    digests = torch.zeros(padded, dtype=torch.int64, device=device)
    stale = torch.zeros(1, dtype=torch.int32, device=device)
    tensors = (copy, scales, norms, lost, products, digests, centre, stale)
    _round(W, Weights(*tensors, kind, False), None)
    return tensors


def _round(W: Tensor, w: Weights, changed: Tensor | None) -> None:
    """Fills a copy of W; with `changed` only where that is not 0, all of it but the digests."""
    F, D = W.shape
    width = BLOCK8 if w.kind == "int8" else LANES
    # The interpreter is quicker with few large programs.
    config = COPY_CONFIG if W.is_cuda else {**COPY_CONFIG, "BF": 256}
    blocks = triton.cdiv(F, config["BF"])
    _copy_kernel[(blocks if changed is None else min(blocks, AGAIN_PROGRAMS),)](
        W,
        _bits(W),
        w.centre,
        w.copy,
        w.scales,
        w.norms,
        w.lost,
        w.products,
        w.digests,
        w.stale if changed is None else changed,
        0 if changed is None else changed.shape[0],
        F,
        D,
        (D / width + width + 16) * 2 * UNIT,
        D * TINY,
        HAS_CENTRE=w.centre.numel() > 0,
        KIND=w.kind,
        AGAIN=changed is not None,
        LINE=_line(W),
        BD=width,
        enable_fp_fusion=True,
        **config,
    )


def _renew(W: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Makes a copy anew if W has changed: (int32, one not 0 if so; int64 [F], the digests then)."""
    F, D = W.shape
    grid = (triton.cdiv(F, _FEATURES_CONFIG["BLOCK"]),)
    changed = torch.empty(grid, dtype=torch.int32, device=W.device)
    now = torch.empty_like(w.digests)
    _changed_kernel[grid](
        _bits(W), w.digests, now, w.stale, changed, F, D, LINE=_line(W), **_FEATURES_CONFIG
    )
    _round(W, w, changed)
    return changed, now


def weights(W: Tensor, kind: str, x: Tensor, b_dec: Tensor | None) -> Weights:
    """The copy of W that screens x - b_dec: "bf16" or "int8".

    bf16 weights are their own copy. They need no centre for x that is exact in bf16; everything
    else is screened about the mean of the rows that the copy was made for.
    """
    exact = W.dtype == torch.bfloat16 and kind == "bf16"
    if exact:
        kind = "same"
    bare = exact and x.dtype == torch.bfloat16 and b_dec is None
    name = f"{kind} bare" if bare else kind
    tensors, compared = copies.of(W, name, lambda: _make(W, kind, None if bare else x, b_dec))
    made = Weights(*tensors, kind, compared)
    return made._replace(copy=W) if exact else made


def features(W: Tensor, w: Weights, b_enc: Tensor, threshold: Tensor | None, G: int) -> Features:
    """`Features` of all F features in groups of G (a power of two up to 128).

    A copy of weights that have changed is made anew first: products with it come after this.
    """
    F, padded = W.shape[0], w.norms.shape[0]
    changed, now = _renew(W, w) if w.compared else (w.stale, w.digests)
    bias, limits = torch.empty(2, padded, device=W.device)
    groups = torch.empty(4, padded // G, device=W.device)
    _features_kernel[(padded // _FEATURES_CONFIG["BLOCK"],)](
        changed,
        now,
        w.digests,
        w.stale,
        b_enc,
        w.products,
        b_enc if threshold is None else threshold,
        w.norms,
        w.lost,
        bias,
        limits,
        *groups,
        changed.shape[0],
        F,
        COMPARED=w.compared,
        HAS_LIMIT=threshold is not None,
        G=G,
        enable_fp_fusion=True,
        **_FEATURES_CONFIG,
    )
    return Features(bias, w.norms, w.lost, limits, *groups)


def rows(x: Tensor, b_dec: Tensor | None, w: Weights) -> Rows:
    """`Rows` of x for a screen with the copy w."""
    N, D = x.shape
    device, words = x.device, w.scales.numel() > 0
    stride, blocks = -(-D // LANES) * LANES, -(-D // BLOCK8)
    width = blocks * BLOCK8 if words else D
    centred, bounds = torch.empty(N, stride, device=device), torch.empty(N, 2, device=device)
    kind = torch.int8 if words else torch.bfloat16
    rounded = torch.empty(N, width, dtype=kind, device=device)
    low = torch.empty(N if words else 0, width, dtype=kind, device=device)
    scales = torch.empty(N if words else 0, device=device)
    centre = w.centre.numel() > 0
    # Integer sums over a block are exact; fp32 adds one rounded product a block.
    terms = blocks + 8 if words else 4 * (D + 8)
    config = rows_config(N, D)
    if N:
        _rows_kernel[(N,)](
            x,
            x if b_dec is None else b_dec,
            w.centre,
            centred,
            rounded,
            low,
            scales,
            bounds,
            D,
            stride,
            width,
            1.04 * terms * UNIT,
            (D / (BLOCK8 if words else LANES) + LANES + 8) * UNIT,  # <c, w> of int8 copies: BLOCK8
            (D / config["BD"] + config["BD"] + 16) * 2 * UNIT,
            D * TINY,
            HAS_B=b_dec is not None,
            HAS_CENTRE=centre,
            WORDS=words,
            enable_fp_fusion=True,
            **config,
        )
    return Rows(centred, rounded, low, scales, bounds)


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """`Rows.centred` alone."""
    N, D = x.shape
    out = torch.zeros(N, -(-D // LANES) * LANES, device=x.device)
    out[:, :D] = x if b_dec is None else x.float() - b_dec.float()
    return out


def _aot(G: int, limit: bool):
    floats = "b_enc products threshold norms lost bias limits group_bias group_norms"
    pointers = dict.fromkeys([*floats.split(), "group_lost", "group_limits"], "*fp32:16")
    pointers |= {"changed": "*i32:16", "now": "*i64:16", "digests": "*i64:16", "stale": "*i32:16"}
    pointers |= {"parts": "i32", "F": "i32:16"}
    constexprs = {"COMPARED": True, "HAS_LIMIT": limit, "G": G, "BLOCK": _FEATURES_CONFIG["BLOCK"]}
    options = {"num_warps": _FEATURES_CONFIG["num_warps"]}
    return _features_kernel, pointers, constexprs, options


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = [_aot(8, False), _aot(64, False), _aot(128, True)]
AOT += [
    (
        _changed_kernel,
        {"bits": f"*{bits}:16", "digests": "*i64:16", "now": "*i64:16", "stale": "*i32:16"}
        | {"changed": "*i32:16", "F": "i32:16", "D": "i32:16"},
        {"LINE": line, "BLOCK": _FEATURES_CONFIG["BLOCK"]},
        {"num_warps": _FEATURES_CONFIG["num_warps"]},
    )
    for bits, line in (("i32", 16), ("i16", 32))
]
