"""The few features of a row that can still be members, kept while pre-activations stream by.

A row has a list of C entries in ascending order of features: the feature, its screened
pre-activation and a bound of the error. `floor` is the ordered key of a proven lower bound of the
row's k-th largest exact value (members <= 0 need not be found). Of each tile only groups of G
features are read whose largest pre-activation can reach the floor. A tile of which too many can, as
the first one, raises it by its own maxima; a list that has grown raises it by what it proves. A row
whose candidates still do not fit is marked, and computed whole (rescore.py): nothing is ever
truncated.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastsae.kernels.ordered import COARSE, POSITIVE, SPAN, _keys, _kth_largest, _larger, _least
from fastsae.kernels.screen import TINY, Features
from torch import Tensor

OVERFLOW = tl.constexpr(-1)


@triton.jit
def _error(s, b, norm, lost, x_error, x_norm, tiny):
    """Bound of |s - exact|; the relative term covers the fp32 sums made with a bias of size b.

    s + error grows with s, so that of a group's largest s bounds the whole group.
    """
    rounding = 9.6e-7 * (tl.abs(s) + b) + tiny
    return x_error * norm + (x_norm * lost + rounding)


@triton.jit
def _lower_keys(s, e, inside):
    """Keys of s - e where it is positive; a NaN bounds nothing."""
    lower = s - e
    lower = tl.where(lower == lower, lower, -float("inf"))
    return _keys(lower, inside, True)


@triton.jit
def _may_exceed(upper, limit):
    """Whether a value up to `upper` is a member; what has no bound may be NaN, which is one."""
    return ((upper <= limit) & (upper < float("inf"))) == 0


@triton.jit
def _group_maxima(h, bias, width, NG: tl.constexpr, G: tl.constexpr):
    """[NG] the largest h + bias of every G neighbours; a NaN counts as infinity."""
    column = tl.arange(0, NG * G)
    s = tl.load(h + column, mask=column < width, other=-float("inf"))
    s += tl.load(bias + column)
    top = tl.reduce(tl.reshape(s, [NG, G]), 1, _larger)
    return tl.where(top == top, top, float("inf"))


@triton.jit
def _prune(heads, errors, indices, count, k, floor, C: tl.constexpr):
    """Raises the floor by what a list proves and drops what is below it: (floor, count)."""
    slot = tl.arange(0, C)
    inside = slot < count
    s = tl.load(heads + slot, mask=inside, other=0.0)
    e = tl.load(errors + slot, mask=inside, other=0.0)
    index = tl.load(indices + slot, mask=inside, other=0)
    floor = tl.maximum(floor, _kth_largest(_lower_keys(s, e, inside), k, C))
    keep = (inside & ((s + e < _least(floor)) == 0)).to(tl.int32)
    position = tl.cumsum(keep, axis=0) - keep
    tl.debug_barrier()
    tl.store(heads + position, s, mask=keep == 1)
    tl.store(errors + position, e, mask=keep == 1)
    tl.store(indices + position, index, mask=keep == 1)
    tl.debug_barrier()
    return floor, tl.sum(keep, axis=0)


@triton.jit(do_not_specialize=["k", "first", "width", "stride", "groups"])
def _collect_kernel(
    h,
    maxima,
    bounds,
    bias,
    norms,
    lost,
    limits,
    group_bias,
    group_norms,
    group_lost,
    group_limits,
    heads,
    errors,
    indices,
    counts,
    floors,
    listed,
    first,
    width,
    stride,
    groups,
    k,
    tiny,
    HAS_MAXIMA: tl.constexpr,
    LIMIT: tl.constexpr,
    UNIT: tl.constexpr,
    NG: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Features G·first.. of one row: h [rows, UNIT·width] without bias, UNIT·stride apart.

    The factors tell the compiler what it may load at once; without them it loads single numbers.
    LIMIT: members exceed the limit of their feature, else they are the k largest.
    """
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + n, mask=first > 0, other=0)
    if count == OVERFLOW:
        return
    first *= G
    width *= UNIT
    h += n * (stride * UNIT)
    heads += n * C
    errors += n * C
    indices += n * C
    listed += n * NG
    x_error = tl.load(bounds + 2 * n)
    x_norm = tl.load(bounds + 2 * n + 1)
    floor = tl.load(floors + n, mask=first > 0, other=0).to(tl.uint32, bitcast=True)
    floor = tl.maximum(floor, POSITIVE)

    # Groups of G neighbours: the largest pre-activation, and an error that holds for all of them.
    group = tl.arange(0, NG)
    inside = group * G < width
    if HAS_MAXIMA:
        top = tl.load(maxima + n * groups + group, mask=inside, other=-float("inf"))
    else:
        top = _group_maxima(h, bias + first, width, NG, G)
    error = _error(
        top,
        tl.load(group_bias + first // G + group, mask=inside, other=0.0),
        tl.load(group_norms + first // G + group, mask=inside, other=0.0),
        tl.load(group_lost + first // G + group, mask=inside, other=0.0),
        x_error,
        x_norm,
        tiny,
    )
    if LIMIT:
        least = tl.load(group_limits + first // G + group, mask=inside, other=float("inf"))
        reach = (inside & _may_exceed(top + error, least)).to(tl.int32)
    else:
        upper = top + error
        reach = (inside & ((upper < _least(floor)) == 0)).to(tl.int32)
        # While there are fewer than k candidates, the floor may not have risen at all.
        if (tl.sum(reach, axis=0) > SPAN * k) | (count < k):
            lower = _lower_keys(top, error, inside & (top < float("inf")))
            floor = tl.maximum(floor, _kth_largest(lower, k, NG, COARSE))
            reach = (inside & ((upper < _least(floor)) == 0)).to(tl.int32)
    tl.store(listed + tl.cumsum(reach, axis=0) - reach, group, mask=reach == 1)
    n_groups = tl.sum(reach, axis=0)
    tl.debug_barrier()

    slot = tl.arange(0, BLOCK)
    for start in range(0, n_groups, BLOCK // G):
        if count != OVERFLOW:
            at = start + slot // G
            mine = tl.load(listed + at, mask=at < n_groups, other=0)
            column = mine * G + slot % G
            valid = (at < n_groups) & (column < width)
            feature = first + column
            b = tl.load(bias + feature, mask=valid, other=0.0)
            s = tl.load(h + column, mask=valid, other=0.0) + b
            norm = tl.load(norms + feature, mask=valid, other=0.0)
            change = tl.load(lost + feature, mask=valid, other=0.0)
            e = _error(s, tl.abs(b), norm, change, x_error, x_norm, tiny)
            if LIMIT:
                limit = tl.load(limits + feature, mask=valid, other=float("inf"))
                keep = (valid & _may_exceed(s + e, limit)).to(tl.int32)
            else:
                keep = (valid & ((s + e < _least(floor)) == 0)).to(tl.int32)
                grown = count + tl.sum(keep, axis=0)
                # Early too, once it has grown to a few times k: a higher floor lets less pass.
                if (grown > C) | ((count >= k) & (count < SPAN * k) & (grown >= SPAN * k)):
                    floor, count = _prune(heads, errors, indices, count, k, floor, C)
                    keep = (valid & ((s + e < _least(floor)) == 0)).to(tl.int32)
            new = tl.sum(keep, axis=0)
            position = count + tl.cumsum(keep, axis=0) - keep
            write = (keep == 1) & (position < C)
            tl.store(heads + position, s, mask=write)
            tl.store(errors + position, e, mask=write)
            tl.store(indices + position, feature, mask=write)
            tl.debug_barrier()
            count = tl.where(count + new <= C, count + new, OVERFLOW)
    tl.store(counts + n, count)
    tl.store(floors + n, floor.to(tl.int32, bitcast=True))


class Lists(NamedTuple):
    """Candidates of N rows, C entries each, and scratch."""

    heads: Tensor  # fp32 [N, C]: screened, with bias
    errors: Tensor  # fp32 [N, C]
    indices: Tensor  # int32 [N, C], ascending
    counts: Tensor  # int32 [N]; -1: too many, the row is computed whole
    floors: Tensor  # int32 [N]: bits of ordered keys


def lists(N: int, C: int, device: torch.device) -> Lists:
    """Room for N lists; the tile that begins with feature 0 makes them empty."""
    heads, errors = torch.empty(2, N, C, device=device)
    indices = torch.empty(N, C, dtype=torch.int32, device=device)
    # Allocations of their own, for all are aligned alike: else another N would be compiled again.
    counts, floors = (torch.empty(N, dtype=torch.int32, device=device) for _ in range(2))
    return Lists(heads, errors, indices, counts, floors)


def _config(C: int, NG: int, G: int) -> dict:
    """Enough warps that a list and all groups stay in registers. What is looked at together, BLOCK,
    fits an empty list, which cannot be pruned."""
    warps = 16 if C > 1024 else 4 if NG * G <= 4096 else 8
    return {"BLOCK": min(512, 64 * warps), "num_warps": warps, "maxnreg": 128}


def collect(
    h: Tensor,
    maxima: Tensor | None,
    bounds: Tensor,
    features: Features,
    into: Lists,
    first: int,
    D: int,
    k: int,
    G: int,
) -> None:
    """Offers a tile h [rows, width] of screened products (no bias) to the lists of its rows.

    `maxima` [rows, width / G]: the largest h + bias of every G features, NaN as infinity; else
    they are taken here. Tiles of a row come in ascending order of `first`, a multiple of G, from 0.
    k = 0: members are those above the limits of `features`.
    """
    n, width = h.shape
    unit = 4 if width % 4 == 0 and h.stride(0) % 4 == 0 else 1
    C = into.heads.shape[1]
    NG = max(16, triton.next_power_of_2(triton.cdiv(width, G)))
    listed = torch.empty(n, NG, dtype=torch.int32, device=h.device)
    _collect_kernel[(n,)](
        h,
        h if maxima is None else maxima,
        bounds,
        features.bias,
        features.norms,
        features.lost,
        features.limits,
        features.group_bias,
        features.group_norms,
        features.group_lost,
        features.group_limits,
        *into,
        listed,
        first // G,
        width // unit,
        h.stride(0) // unit,
        0 if maxima is None else maxima.stride(0),
        k,
        D * TINY,
        HAS_MAXIMA=maxima is not None,
        LIMIT=k == 0,
        UNIT=unit,
        NG=NG,
        G=G,
        C=C,
        enable_fp_fusion=True,
        **_config(C, NG, G),
    )


def _aot(C: int, NG: int, G: int, *flags: str):
    floats = "h maxima bounds bias norms lost limits group_bias group_norms group_lost group_limits"
    signature = dict.fromkeys([*floats.split(), "heads", "errors"], "*fp32:16")
    signature |= dict.fromkeys(["indices", "counts", "floors", "listed"], "*i32:16")
    signature |= dict.fromkeys(["first", "width", "stride", "groups", "k"], "i32")
    config = _config(C, NG, G)
    options = {name: config.pop(name) for name in ("num_warps", "maxnreg")}
    constexprs = {flag: flag in flags for flag in ("HAS_MAXIMA", "LIMIT")}
    constexprs |= {"UNIT": 4, "NG": NG, "G": G, "C": C, **config}
    # Single loads would take most of the time. What is NaN has no bound either, but make sure.
    wanted = ("!.ftz",) if "HAS_MAXIMA" in flags else ("!.ftz", "FMNMX.NAN", "LDG.E.128")
    expected = {"sm_80": wanted, "sm_90": wanted}
    return _collect_kernel, signature | {"tiny": "fp32"}, constexprs, options, expected


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options, what the
# code of an architecture must hold).
AOT = [
    _aot(512, 512, 8),
    _aot(512, 512, 8, "LIMIT"),
    _aot(2048, 512, 8),
    _aot(4096, 512, 8, "LIMIT"),
    _aot(512, 1024, 64, "HAS_MAXIMA"),
    _aot(512, 64, 128, "HAS_MAXIMA", "LIMIT"),
]
