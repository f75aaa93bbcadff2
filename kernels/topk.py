"""Exact top-k of every row by group-max pruning: no sampling, no histogram, no atomics.

A program owns a row. Pass 1 keeps the maximum of each of NG column groups; the k-th largest maximum
t is a lower bound of the k-th largest value, so pass 2 reads only the groups whose maximum reaches
t (about k of them) and keeps what reaches t. A row with too many survivors, because of ties or
because its large values sit in few groups, takes the slow path: the exact threshold by bisection
over the whole row, then an ordered sweep. Nothing is ever truncated.

Survivors are packed as ordered.py says; a survivor's place is the number of those that beat it.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.ordered import (
    COARSE,
    _keys,
    _kth_largest,
    _larger,
    _pack,
    _pad_row,
    _ranked,
)
from fastsae.kernels.topk_wide import packed_keys, write_best
from torch import Tensor

SCRATCH_BYTES = 64 << 20
MAX_K = 1024  # larger k: torch.topk on the packed keys, which are distinct


@triton.jit
def _load_values(row, bias, columns, F, HAS_BIAS: tl.constexpr):
    """fp32 values; -inf past the last column."""
    inside = columns < F
    x = tl.load(row + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _load_keys(row, bias, columns, F, HAS_BIAS: tl.constexpr, ACTIVE: tl.constexpr):
    return _keys(_load_values(row, bias, columns, F, HAS_BIAS), columns < F, ACTIVE)


@triton.jit
def _count_above(
    row, bias, F, bound, HAS_BIAS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """How many keys of the row are > bound."""
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, F, BLOCK):
        keys = _load_keys(row, bias, start + tl.arange(0, BLOCK), F, HAS_BIAS, ACTIVE)
        counts += (keys > bound).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _sweep_row(
    row, bias, packed, F, k, t, HAS_BIAS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """Slow path: exact threshold by bisection, then the survivors in column order; their count."""
    exact = t
    above = _count_above(row, bias, F, t, HAS_BIAS, ACTIVE, BLOCK)
    if above >= k:  # else t itself is the threshold: ties at t brought us here (zeros after a ReLU)
        exact = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            candidate = exact | bit
            bit = bit >> 1
            if candidate <= t:
                exact = candidate
            else:
                reached = _count_above(row, bias, F, candidate - 1, HAS_BIAS, ACTIVE, BLOCK)
                if reached >= k:
                    exact = candidate
        above = _count_above(row, bias, F, exact, HAS_BIAS, ACTIVE, BLOCK)
    ties_wanted = k - above
    ties = tl.full([], 0, tl.int32)
    taken = tl.full([], 0, tl.int32)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keys = _load_keys(row, bias, columns, F, HAS_BIAS, ACTIVE)
        tie = (keys == exact).to(tl.int32)
        tie_rank = ties + tl.cumsum(tie, axis=0) - tie
        take = ((keys > exact) | ((tie == 1) & (tie_rank < ties_wanted))).to(tl.int32)
        position = taken + tl.cumsum(take, axis=0) - take
        tl.store(packed + position, _pack(keys, columns), mask=take == 1)
        ties += tl.sum(tie, axis=0)
        taken += tl.sum(take, axis=0)
    return taken


@triton.jit
def _collect_groups(
    row,
    bias,
    packed,
    F,
    t,
    n_groups,
    HAS_BIAS: tl.constexpr,
    ACTIVE: tl.constexpr,
    NG: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Packs the keys >= t of the groups listed behind the row's C slots into those; true count."""
    BE: tl.constexpr = 32
    BG: tl.constexpr = BLOCK // BE
    slot = tl.arange(0, BLOCK)
    per_group = tl.cdiv(F, NG * V) * V
    found = tl.full([], 0, tl.int32)
    for g in range(0, n_groups, BG):
        listed = g + slot // BE
        group = tl.load(packed + C + listed, mask=listed < n_groups, other=NG).to(tl.int32)
        for e in range(0, per_group, BE):
            element = e + slot % BE
            columns = (element // V) * (NG * V) + group * V + element % V
            columns = tl.where((group < NG) & (element < per_group), columns, F)
            keys = _load_keys(row, bias, columns, F, HAS_BIAS, ACTIVE)
            keep = (keys >= t).to(tl.int32)
            position = found + tl.cumsum(keep, axis=0) - keep
            tl.store(packed + position, _pack(keys, columns), mask=(keep == 1) & (position < C))
            found += tl.sum(keep, axis=0)
    return found


@triton.jit
def _write_row(
    row,
    bias,
    columns,
    values,
    indices,
    packed,
    k,
    count,
    HAS_BIAS: tl.constexpr,
    MAPPED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes every survivor to its rank."""
    mine, rank = _ranked(packed, count, C, BLOCK)
    index = (0x7FFFFFFF - (mine & 0x7FFFFFFF)).to(tl.int32)
    write = (tl.arange(0, C) < count) & (rank < k)
    value = tl.load(row + index, mask=write, other=0.0)
    if HAS_BIAS:
        value = value.to(tl.float32) + tl.load(bias + index, mask=write, other=0.0).to(tl.float32)
    if MAPPED:
        index = tl.load(columns + index, mask=write, other=0)
    tl.store(values + rank, value.to(values.dtype.element_ty), mask=write)
    tl.store(indices + rank, index, mask=write)


@triton.jit(do_not_specialize=["F", "k"])
def _select_kernel(
    x,
    bias,
    columns,
    values,
    indices,
    packed,
    places,
    F,
    k,
    HAS_BIAS: tl.constexpr,
    MAPPED: tl.constexpr,
    ACTIVE: tl.constexpr,
    PLACED: tl.constexpr,
    UNIT: tl.constexpr,
    NG: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    C: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of UNIT·F columns: UNIT tells the compiler how many it may load at once."""
    n = tl.program_id(0).to(tl.int64)
    F *= UNIT
    row = x + n * F
    columns += n * F
    packed += n * 2 * C
    if PLACED:
        n = tl.load(places + n)
        if n < 0:
            return
    values += n * k
    indices += n * k

    # Pass 1: group g holds the columns i·NG·V + g·V + (0..V-1) for all i: V fill one load, so that
    # a thread holds whole groups, and U loads are under way together. The maxima are of numbers,
    # one instruction each: keys take ten.
    largest = tl.full([NG], -float("inf"), tl.float32)
    for start in range(0, F, U * NG * V):
        for u in tl.static_range(U):
            column = start + u * (NG * V) + tl.arange(0, NG * V)
            part = _load_values(row, bias, column, F, HAS_BIAS)
            largest = _larger(largest, tl.reduce(tl.reshape(part, [NG, V]), 1, _larger))
    maxima = _keys(largest, tl.arange(0, NG) < NG, ACTIVE)
    # Key 0 means "no value": with the bound at 1 it never survives, nor do columns past the last.
    t = tl.maximum(_kth_largest(maxima, k, NG, COARSE), tl.full([], 1, tl.uint32))

    # Pass 2: list the groups that reach t and keep their survivors.
    reach = (maxima >= t).to(tl.int32)
    n_groups = tl.sum(reach, axis=0)
    count = tl.full([], C + 1, tl.int32)
    if n_groups > C:  # all bits of the bound: a row of equals is then done after one more look
        t = tl.maximum(t, _kth_largest(maxima, k, NG))
    else:
        position = tl.cumsum(reach, axis=0) - reach
        tl.store(packed + C + position, tl.arange(0, NG).to(tl.int64), mask=reach == 1)
        tl.debug_barrier()
        count = _collect_groups(
            row, bias, packed, F, t, n_groups, HAS_BIAS, ACTIVE, NG, V, C, BLOCK
        )
    if count > C:
        tl.debug_barrier()
        count = _sweep_row(row, bias, packed, F, k, t, HAS_BIAS, ACTIVE, BLOCK)
    tl.debug_barrier()

    _write_row(row, bias, columns, values, indices, packed, k, count, HAS_BIAS, MAPPED, C, RANK)
    if ACTIVE:
        active = tl.minimum(count, k)
        if active < k:
            tl.debug_barrier()
            _pad_row(values, indices, k, active, C, RANK)


def _config(N: int, F: int, k: int, item: int) -> dict:
    """NG groups of runs of V columns, capacity C for survivors, warps: for N rows of F columns of
    `item` bytes.

    Many rows: small programs, so that one row's bisection overlaps another's loads. Few: wide ones.
    """
    NG, warps = (512, 4) if k <= 64 else (1024, 8) if k <= 128 else (2048, 8)
    if k > 256:
        NG, warps = 4096, 16
    elif N < 512:
        warps = 16
    unit = next(u for u in (8, 4, 1) if F % u == 0)
    V = min(16 // item, unit, 4 if NG > 1024 else 8)
    while V > 1 and F // V < 8 * k:  # smaller groups, or pruning would keep most of the row
        V //= 2
    C = max(32, triton.next_power_of_2(2 * k))
    block = 128 * warps
    rank = max(2, 512 * warps // C)  # survivors compared at a time: 16 comparisons per thread
    U = max(1, min(1024 * warps // (NG * V), triton.cdiv(F, NG * V)))  # 32 columns per thread
    # Without an explicit limit ptxas spills a scalar or two to reach a higher occupancy.
    options = {"num_warps": warps, "maxnreg": 128}
    sizes = {"UNIT": unit, "NG": NG, "V": V, "U": U, "C": C, "RANK": rank, "BLOCK": block}
    return sizes | options


def select(
    h: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    columns: Tensor | None = None,
    active: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of every row of h (+ bias, in fp32), descending, ties to the lower index.

    h [N, F] float32/bfloat16/float16, contiguous. `columns` [N, F] int32: what to return in place
    of a column's own number (ties are still broken by position). `active`: keep only h > 0 and NaN,
    the rest of the k entries is padding (value 0, lowest unused indices ascending). Returns values
    [N, k] (h's dtype; float32 with a bias) and indices [N, k] int32, or fills `into`. `places` [N]
    int64, for k <= MAX_K: the rows of `into` that h's rows go to, -1: nowhere.
    """
    N, F = h.shape
    dtype = h.dtype if bias is None else torch.float32
    values, indices = into or (
        torch.empty(N, k, dtype=dtype, device=h.device),
        torch.empty(N, k, dtype=torch.int32, device=h.device),
    )
    if N == 0:
        return values, indices
    config = _config(N, F, min(k, MAX_K), h.element_size())
    C = config["C"]
    rows = max(1, SCRATCH_BYTES // (16 * C if k <= MAX_K else 24 * F))
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        n = part.stop - part.start
        if k > MAX_K:
            packed = packed_keys(h[part], bias, active)
            mapped = None if columns is None else columns[part]
            write_best(h[part], bias, mapped, packed, values[part], indices[part], active)
        else:
            packed = torch.empty(n, 2 * C, dtype=torch.int64, device=h.device)
            _select_kernel[(n,)](
                h[part],
                h if bias is None else bias,
                indices if columns is None else columns[part],
                values[part] if places is None else values,
                indices[part] if places is None else indices,
                packed,
                packed if places is None else places[part],
                F // config["UNIT"],
                k,
                HAS_BIAS=bias is not None,
                MAPPED=columns is not None,
                ACTIVE=active,
                PLACED=places is not None,
                enable_fp_fusion=True,
                **config,
            )
    return values, indices


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row: (values [N, k] of x's dtype, indices [N, k] int32), descending.

    x [N, F] float32/bfloat16/float16, 1 <= k <= F < 2³¹. Ties go to the lower index, -0.0 equals
    0.0, NaN ranks above +inf. k > 1024 takes another exact path: torch.topk on packed 64-bit keys,
    in row tiles of 64 MB. No host synchronisation.
    """
    return select(x, k)


def _aot(dtype: str, N: int, F: int, k: int, *flags: str):
    """One compile case: what `select` launches for N rows of F columns and k winners."""
    config = _config(N, F, k, 4 if dtype == "fp32" else 2)
    options = {name: config.pop(name) for name in ("num_warps", "maxnreg")}
    constexprs = {flag: flag in flags for flag in ("HAS_BIAS", "MAPPED", "ACTIVE", "PLACED")}
    integers = {"columns": "*i32:16", "indices": "*i32:16", "packed": "*i64:16"}
    integers["places"] = "*i64:16"
    signature = dict.fromkeys(("x", "bias", "values"), f"*{dtype}:16") | integers
    # Without NaN they would be lost; flushed denormals would raise the bound above what there is.
    wanted = (".NAN", "!.ftz", *(["LDG.E.128|LDG.E.64"] if config["V"] > 1 else []))
    integers = {"F": "i32", "k": "i32"}
    expected = {"sm_80": wanted, "sm_90": wanted}
    return _select_kernel, signature | integers, constexprs | config, options, expected


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options, what the
# code of an architecture must hold).
AOT = [
    _aot("bf16", 4096, 65536, 32),
    _aot("fp32", 4096, 65536, 32, "HAS_BIAS", "ACTIVE"),
    _aot("bf16", 1, 65536, 32),
    _aot("fp32", 1, 65536, 256, "HAS_BIAS", "ACTIVE"),
    _aot("bf16", 4096, 65536, 100),
    _aot("bf16", 4096, 65536, 256),
    _aot("fp32", 256, 65536, 1024, "HAS_BIAS", "ACTIVE"),
    _aot("fp32", 1024, 512, 32, "MAPPED", "ACTIVE"),
    _aot("fp32", 1024, 2048, 1000, "MAPPED", "ACTIVE"),
    _aot("fp32", 256, 65536, 32, "ACTIVE", "PLACED"),
    _aot("fp32", 3328, 5000, 20),
    _aot("bf16", 3328, 5001, 20),
]
