"""The certified screen: operands rounded for tensor cores, and how far their products can be off.

Products are of activations about a centre, d = x - b_dec - c, and of weights, both rounded (~):
|<d, w> - <d~, w~>| <= |d - d~| |w| + |d~| |w - w~| (Cauchy-Schwarz), and <x - b_dec, w> =
<d, w> + <c, w>. The accumulation of D products costs at most D 2^-24 |d~| |w~| in fp32; tensor
cores are granted four times as much. The rescoring dot (rescore.py) and <c, w> sum slices of 128
columns: at most (D / 128 + 136) 2^-24 |x| |w| each. Norms are rounded up. A row or feature whose
norms are not finite has no bound: everything of it is a candidate.
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
    ROWS_CONFIG,
    _copy_kernel,
    _rows_kernel,
    _sketch,
)
from torch import Tensor

PAD = 4096  # features of the per-feature vectors, padded: kernels read them without a mask
UNIT = 2.0**-24
TINY = 2.0**-125  # what flushing a denormal can cost: twice the least normal number


@triton.jit
def _changed_kernel(bits, digests, changed, F, D, BLOCK: tl.constexpr):
    """Whether any of BLOCK features no longer matches its digest, per program."""
    feature = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    differs = inside & (_sketch(bits, feature, inside, D) != tl.load(digests + feature))
    tl.store(changed + tl.program_id(0), tl.max(differs.to(tl.int32), axis=0))


@triton.jit
def _features_kernel(
    changed,
    b_enc,
    products,
    threshold,
    norms,
    lost,
    bias,
    lost_now,
    limits,
    group_bias,
    group_norms,
    group_lost,
    group_limits,
    F,
    HAS_LIMIT: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What selection reads of BLOCK features, and the extremes of their groups of G.

    If any weight is known to have changed, none has a bound: a digest sees few weights of a row, so
    an edit of one column shows in few rows.
    """
    feature = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < F
    error = tl.where(tl.load(changed) != 0, float("inf"), tl.load(lost + feature))
    b = tl.load(b_enc + feature, mask=inside, other=0.0).to(tl.float32)
    b += tl.load(products + feature)
    tl.store(bias + feature, b)
    tl.store(lost_now + feature, error)
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
    digests: Tensor
    centre: Tensor  # c [D], or empty: 0


class Features(NamedTuple):
    """Per feature, and per group of G features, what selection adds to products."""

    bias: Tensor  # b_enc + <c, w>
    norms: Tensor
    lost: Tensor  # infinite where weights have changed since the copy
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


def _bits(W: Tensor) -> Tensor:
    return W.view(torch.int32 if W.dtype == torch.float32 else torch.int16)


_FEATURES_CONFIG = {"BLOCK": 128, "num_warps": 4}


def _make(W: Tensor, kind: str, x: Tensor | None, b_dec: Tensor | None) -> Weights:
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
    norms, lost, products = torch.zeros(3, padded, device=device)
    digests = torch.zeros(padded, dtype=torch.int64, device=device)
    width = BLOCK8 if kind == "int8" else LANES
    # The interpreter is quicker with few large programs.
    config = COPY_CONFIG if W.is_cuda else {**COPY_CONFIG, "BF": 256}
    _copy_kernel[(triton.cdiv(F, config["BF"]),)](
        W,
        _bits(W),
        centre,
        copy,
        scales,
        norms,
        lost,
        products,
        digests,
        F,
        D,
        (D / width + width + 16) * 2 * UNIT,
        D * TINY,
        HAS_CENTRE=x is not None,
        KIND=kind,
        BD=width,
        enable_fp_fusion=True,
        **config,
    )
    return Weights(copy, scales, norms, lost, products, digests, centre)


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
    made = Weights(*copies.of(W, name, lambda: _make(W, kind, None if bare else x, b_dec)))
    return made._replace(copy=W) if exact else made


def features(W: Tensor, w: Weights, b_enc: Tensor, threshold: Tensor | None, G: int) -> Features:
    """`Features` of all F features in groups of G (a power of two up to 128)."""
    F, D = W.shape
    padded = w.norms.shape[0]
    bias, lost, limits = torch.zeros(3, padded, device=W.device)
    groups = torch.zeros(4, padded // G, device=W.device).unbind(0)
    grid = (triton.cdiv(F, _FEATURES_CONFIG["BLOCK"]),)
    changed = torch.empty(grid, dtype=torch.int32, device=W.device)
    _changed_kernel[grid](_bits(W), w.digests, changed, F, D, **_FEATURES_CONFIG)
    _features_kernel[grid](
        changed.amax(0, keepdim=True),
        b_enc,
        w.products,
        b_enc if threshold is None else threshold,
        w.norms,
        w.lost,
        bias,
        lost,
        limits,
        *groups,
        F,
        HAS_LIMIT=threshold is not None,
        G=G,
        enable_fp_fusion=True,
        **_FEATURES_CONFIG,
    )
    return Features(bias, w.norms, lost, limits, *groups)


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
            (D / ROWS_CONFIG["BD"] + ROWS_CONFIG["BD"] + 16) * 2 * UNIT,
            D * TINY,
            HAS_B=b_dec is not None,
            HAS_CENTRE=centre,
            WORDS=words,
            enable_fp_fusion=True,
            **ROWS_CONFIG,
        )
    return Rows(centred, rounded, low, scales, bounds)


def centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    """`Rows.centred` alone."""
    N, D = x.shape
    out = torch.zeros(N, -(-D // LANES) * LANES, device=x.device)
    out[:, :D] = x if b_dec is None else x.float() - b_dec.float()
    return out


def _aot(G: int, limit: bool):
    floats = "b_enc products threshold norms lost bias lost_now limits group_bias group_norms"
    pointers = dict.fromkeys([*floats.split(), "group_lost", "group_limits"], "*fp32:16")
    pointers |= {"changed": "*i32:16", "F": "i32:16"}
    constexprs = {"HAS_LIMIT": limit, "G": G, "BLOCK": _FEATURES_CONFIG["BLOCK"]}
    options = {"num_warps": _FEATURES_CONFIG["num_warps"]}
    return _features_kernel, pointers, constexprs, options


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = [_aot(8, False), _aot(64, False), _aot(128, True)]
AOT += [
    (
        _changed_kernel,
        {"bits": f"*{bits}:16", "digests": "*i64:16", "changed": "*i32:16"}
        | {"F": "i32:16", "D": "i32:16"},
        {"BLOCK": _FEATURES_CONFIG["BLOCK"]},
        {"num_warps": _FEATURES_CONFIG["num_warps"]},
    )
    for bits in ("i32", "i16")
]
