"""Exact top-k of every row by group-max pruning: no sampling, no histogram, no atomics.

A program owns a row. Pass 1 keeps the maximum of each of NG column groups; the k-th largest maximum t
is a lower bound of the k-th largest value, so pass 2 reads only the groups whose maximum reaches t
(about k of them) and keeps what reaches t. A row with too many survivors, because of ties or because
its large values sit in few groups, takes the slow path: the exact threshold by bisection over the whole
row, then an ordered sweep. Nothing is ever truncated.

Values are compared through ordered 32-bit keys: -0.0 equals 0.0, NaN is above +inf. Key and column are
packed into one int64 (key · 2³¹ + 2³¹ - 1 - column): distinct numbers that order by value and break ties
towards the lower column. A survivor's place is the number of survivors that beat it, which for a few
hundred of them is cheaper to run and to compile than tl.sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SCRATCH_BYTES = 64 << 20
MAX_K = 1024  # larger k: torch.topk on the packed keys, which are distinct


@triton.jit
def _keys(x, COLUMN_MASK, ACTIVE: tl.constexpr):
    """Ordered uint32 keys of fp32 values; 0 where masked, and where x <= 0 if only actives count."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = bits >> 31
    key = tl.where(sign == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    # Integer tests: they see denormals as they are, whatever the flush mode of the compiler.
    key = tl.where(magnitude == 0, tl.full([], 0x80000000, tl.uint32), key)
    if ACTIVE:
        key = tl.where(key > 0x80000000, key, tl.full([], 0, tl.uint32))
    key = tl.where(magnitude > 0x7F800000, tl.full([], 0xFFFFFFFF, tl.uint32), key)
    return tl.where(COLUMN_MASK, key, tl.full([], 0, tl.uint32))


@triton.jit
def _load_keys(row, bias, columns, F, HAS_BIAS: tl.constexpr, ACTIVE: tl.constexpr):
    inside = columns < F
    x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return _keys(x, inside, ACTIVE)


@triton.jit
def _pack(keys, columns):
    return (keys.to(tl.int64) << 31) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _kth_largest(keys, k):
    """Largest t such that at least k of the keys are >= t (0 when there are fewer than k keys)."""
    t = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = t | bit
        bit = bit >> 1
        t = tl.where(tl.sum((keys >= candidate).to(tl.int32), axis=0) >= k, candidate, t)
    return t


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
    """Slow path: exact threshold by bisection, then the k survivors in column order. Returns how many."""
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
    groups,
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
    """Keys >= t of the listed groups, packed into the row's buffer of C; returns the true count."""
    BE: tl.constexpr = 32
    BG: tl.constexpr = BLOCK // BE
    slot = tl.arange(0, BLOCK)
    per_group = tl.cdiv(F, NG * V) * V
    found = tl.full([], 0, tl.int32)
    for g in range(0, n_groups, BG):
        listed = g + slot // BE
        group = tl.load(groups + listed, mask=listed < n_groups, other=NG)
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
def _pad_row(values, indices, k, active, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Padding of a row with fewer than k actives: value 0, the lowest unused indices, ascending."""
    candidate = tl.arange(0, KP)
    used = tl.zeros([KP], tl.int32)
    for start in range(0, active, BLOCK):
        listed = start + tl.arange(0, BLOCK)
        index = tl.load(indices + listed, mask=listed < active, other=-1)
        used += tl.sum((candidate[None, :] == index[:, None]).to(tl.int32), axis=0)
    free = ((used == 0) & (candidate < k)).to(tl.int32)
    position = active + tl.cumsum(free, axis=0) - free
    write = (free == 1) & (position < k)
    # The barrier keeps the reads above ahead of these writes: both touch the same row of indices.
    tl.debug_barrier()
    tl.store(indices + position, candidate, mask=write)
    tl.store(values + position, tl.zeros([KP], values.dtype.element_ty), mask=write)


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
    """Writes every survivor to the position of its rank: how many (all distinct) survivors beat it."""
    slot = tl.arange(0, C)
    mine = tl.load(packed + slot, mask=slot < count, other=-1)
    rank = tl.zeros([C], tl.int32)
    for start in range(0, count, BLOCK):
        listed = start + tl.arange(0, BLOCK)
        other = tl.load(packed + listed, mask=listed < count, other=-1)
        rank += tl.sum((other[:, None] > mine[None, :]).to(tl.int32), axis=0)
    index = (0x7FFFFFFF - (mine & 0x7FFFFFFF)).to(tl.int32)
    write = (slot < count) & (rank < k)
    value = tl.load(row + index, mask=write, other=0.0)
    if HAS_BIAS:
        value = value.to(tl.float32) + tl.load(bias + index, mask=write, other=0.0).to(tl.float32)
    if MAPPED:
        index = tl.load(columns + index, mask=write, other=0)
    tl.store(values + rank, value.to(values.dtype.element_ty), mask=write)
    tl.store(indices + rank, index, mask=write)


@triton.jit(do_not_specialize=["k"])
def _select_kernel(
    x,
    bias,
    columns,
    values,
    indices,
    groups,
    packed,
    F,
    k,
    HAS_BIAS: tl.constexpr,
    MAPPED: tl.constexpr,
    ACTIVE: tl.constexpr,
    NG: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = x + n * F
    columns += n * F
    groups += n * C
    packed += n * C
    values += n * k
    indices += n * k

    # Pass 1: group g holds the columns i·NG·V + g·V + (0..V-1) for all i: contiguous wide loads, and the
    # maxima stay in registers.
    maxima = tl.zeros([NG], tl.uint32)
    for start in range(0, F, NG * V):
        keys = _load_keys(row, bias, start + tl.arange(0, NG * V), F, HAS_BIAS, ACTIVE)
        maxima = tl.maximum(maxima, tl.max(tl.reshape(keys, [NG, V]), axis=1))
    # Key 0 means "no value": with the floor at 1 padding columns never count as survivors.
    t = tl.maximum(_kth_largest(maxima, k), tl.full([], 1, tl.uint32))

    # Pass 2: list the groups that reach t and keep their survivors.
    reach = (maxima >= t).to(tl.int32)
    n_groups = tl.sum(reach, axis=0)
    count = tl.full([], C + 1, tl.int32)
    if n_groups <= C:
        position = tl.cumsum(reach, axis=0) - reach
        tl.store(groups + position, tl.arange(0, NG), mask=reach == 1)
        tl.debug_barrier()
        count = _collect_groups(
            row, bias, groups, packed, F, t, n_groups, HAS_BIAS, ACTIVE, NG, V, C, BLOCK
        )
    if count > C:
        tl.debug_barrier()
        count = _sweep_row(row, bias, packed, F, k, t, HAS_BIAS, ACTIVE, BLOCK)
    tl.debug_barrier()

    _write_row(
        row, bias, columns, values, indices, packed, k, count, HAS_BIAS, MAPPED, C, RANK
    )
    if ACTIVE:
        active = tl.minimum(count, k)
        if active < k:
            tl.debug_barrier()
            _pad_row(values, indices, k, active, C, RANK)


def _config(N: int, F: int, k: int) -> dict:
    """Groups NG, contiguous columns per group V, candidate capacity C and warps for N rows of F columns.

    Many rows: small programs, so that one row's bisection overlaps another's loads. Few rows: wide ones.
    """
    NG, V, warps = (512, 8, 4) if k <= 64 else (1024, 8, 8) if k <= 128 else (2048, 4, 8)
    if k > 256:
        NG, V, warps = 4096, 4, 16
    elif N < 512:
        V, warps = 4 * V, 16
    while V > 1 and F // V < 8 * k:  # few columns: smaller groups, or pruning would keep most of them
        V //= 2
    C = max(32, triton.next_power_of_2(2 * k))
    block = 1024 if warps < 16 else 4096
    rank = max(2, 512 * warps // C)  # survivors compared at a time: 16 comparisons per thread
    return {"NG": NG, "V": V, "C": C, "RANK": rank, "BLOCK": block, "num_warps": warps}


def select(
    h: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    columns: Tensor | None = None,
    active: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k largest of every row of h (+ bias, in fp32), descending, ties to the lower index.

    h [N, F] float32/bfloat16/float16, contiguous. `columns` [N, F] int32: what to return in place of a
    column's own number (ties are still broken by position). `active`: keep only h > 0 and NaN, the rest of
    the k entries is padding (value 0, lowest unused indices ascending).
    Returns values [N, k] (h's dtype; float32 with a bias) and indices [N, k] int32.
    """
    N, F = h.shape
    dtype = h.dtype if bias is None else torch.float32
    values = torch.empty(N, k, dtype=dtype, device=h.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=h.device)
    if N == 0:
        return values, indices
    config = _config(N, F, min(k, MAX_K))
    C = config["C"]
    rows = max(1, SCRATCH_BYTES // (max(12 * C, 8 * k) if k <= MAX_K else 24 * F))
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        n = part.stop - part.start
        if k > MAX_K:
            packed = _packed_keys(h[part], bias, active)
            mapped = None if columns is None else columns[part]
            _finish(h[part], bias, mapped, packed, values[part], indices[part], active)
        else:
            groups = torch.empty(n, C, dtype=torch.int32, device=h.device)
            packed = torch.empty(n, C, dtype=torch.int64, device=h.device)
            _select_kernel[(n,)](
                h[part],
                h if bias is None else bias,
                indices if columns is None else columns[part],
                values[part],
                indices[part],
                groups,
                packed,
                F,
                k,
                HAS_BIAS=bias is not None,
                MAPPED=columns is not None,
                ACTIVE=active,
                enable_fp_fusion=True,
                **config,
            )
    return values, indices


def _packed_keys(h: Tensor, bias: Tensor | None, active: bool) -> Tensor:
    """What `_pack(_keys(h + bias))` computes, for every column, in torch: the path of k > MAX_K."""
    x = h.float() if bias is None else h.float() + bias.float()
    bits = x.view(torch.int32).long()
    key = torch.where(bits < 0, -1 - bits, bits + (1 << 31))  # bits are sign-extended here
    key = torch.where(x == 0, 1 << 31, key)
    if active:
        key = torch.where(x <= 0, 0, key)
    key = torch.where(torch.isnan(x), (1 << 32) - 1, key)
    columns = torch.arange(h.shape[1], device=h.device)
    packed = (key << 31) | (0x7FFFFFFF - columns)
    return torch.where(key == 0, -1, packed)


def _finish(h, bias, columns, packed, values, indices, active: bool) -> None:
    """Order packed survivors (-1 in unused slots) and write values and indices, padding included."""
    k = values.shape[1]
    best = torch.topk(packed, k, dim=1).values
    index = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    member = best >= 0
    index = torch.where(member, index, 0)
    value = h.gather(1, index)
    if bias is not None:
        value = value.float() + bias.float()[index]
    if columns is not None:
        index = columns.gather(1, index)
    if active:
        used = torch.zeros(h.shape[0], k + 1, dtype=torch.uint8, device=h.device)
        used.scatter_(1, torch.where(member, index, k).clamp(max=k), 1)
        unused = torch.argsort(used[:, :k], dim=1, stable=True)
        slot = torch.arange(k, device=h.device) - member.sum(1, keepdim=True)
        index = torch.where(member, index, unused.gather(1, slot.clamp(min=0)))
        value = torch.where(member, value, 0)
    values.copy_(value)
    indices.copy_(index)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row: (values [N, k] of x's dtype, indices [N, k] int32), descending.

    x [N, F] float32/bfloat16/float16, 1 <= k <= F < 2³¹. Ties go to the lower index, -0.0 equals 0.0,
    NaN ranks above +inf. k > 1024 takes another exact path: torch.topk on packed 64-bit keys, in row tiles of 64 MB. No host synchronisation.
    """
    return select(x, k)


def _aot(dtype: str, N: int, F: int, k: int, bias: bool, active: bool, mapped=False):
    """One compile case: what `select` launches for rows of F columns and k winners."""
    config = _config(N, F, k)
    warps = config.pop("num_warps")
    signature = {
        "x": f"*{dtype}:16",
        "bias": "*fp32:16" if bias else f"*{dtype}:16",
        "columns": "*i32:16",
        "values": "*fp32:16" if bias else f"*{dtype}:16",
        "indices": "*i32:16",
        "groups": "*i32:16",
        "packed": "*i64:16",
        "F": "i32:16",
        "k": "i32",
    }
    constexprs = {"HAS_BIAS": bias, "MAPPED": mapped, "ACTIVE": active, **config}
    return _select_kernel, signature, constexprs, {"num_warps": warps}


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = [
    _aot("bf16", 4096, 65536, 32, False, False),
    _aot("fp32", 4096, 65536, 32, True, True),
    _aot("bf16", 1, 65536, 32, False, False),
    _aot("bf16", 4096, 65536, 100, False, False),
    _aot("bf16", 4096, 65536, 256, False, False),
    _aot("fp32", 256, 65536, 1024, True, True),
    _aot("fp32", 1024, 128, 32, False, True, True),
]
