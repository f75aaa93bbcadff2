"""Ordered keys, and what selection makes of them.

Values are compared through ordered 32-bit keys: -0.0 equals 0.0, NaN is above +inf. Key and column
are packed into one int64 (key · 2³¹ + 2³¹ - 1 - column): distinct numbers that order by value and
break ties towards the lower column. A number's place is how many beat it, which for a few hundred
of them is cheaper to run and to compile than tl.sort.
"""

import triton
import triton.language as tl

COARSE = tl.constexpr(11)  # steps of two bits: a bound within 2^-12 lets hardly more pass
POSITIVE = tl.constexpr(0x80000001)  # key of the smallest positive number
SPAN = tl.constexpr(4)  # times k: a list, or the groups of a tile, that is longer raises the floor


@triton.jit
def _keys(x, inside, ACTIVE: tl.constexpr):
    """Ordered uint32 keys of fp32 values; 0 where masked, or x <= 0 if only actives count."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = bits >> 31
    key = tl.where(sign == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    # Integer tests: they see denormals as they are, whatever the flush mode of the compiler.
    key = tl.where(magnitude == 0, tl.full([], 0x80000000, tl.uint32), key)
    if ACTIVE:
        key = tl.where(key > 0x80000000, key, tl.full([], 0, tl.uint32))
    key = tl.where(magnitude > 0x7F800000, tl.full([], 0xFFFFFFFF, tl.uint32), key)
    return tl.where(inside, key, tl.full([], 0, tl.uint32))


@triton.jit
def _least(floor):
    """The number that `floor`, at least POSITIVE, is the key of; where k numbers are NaN it may be
    NaN too, below which nothing is: then all is let through, and pruned."""
    return (floor & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b):
    """The larger of two; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pack(keys, columns):
    return (keys.to(tl.int64) << 31) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit
def _kth_largest(keys, k, NG: tl.constexpr, STEPS: tl.constexpr = 16):
    """Largest t such that at least k of the NG keys are >= t (0 when there are fewer than k keys).

    Two bits at a time: the counts of the three candidates travel in one number, because the block
    reduction, not the comparison, is what takes the time. Fewer STEPS than 16 give t's leading bits
    alone, a bound that is lower.
    """
    WIDTH: tl.constexpr = 10 if NG <= 512 else 14
    COUNT: tl.constexpr = tl.int32 if NG <= 512 else tl.int64
    t = tl.full([], 0, tl.uint32)
    unit = tl.full([], 0x40000000, tl.uint32)
    for _ in range(STEPS):
        first = t + unit
        second = first + unit
        third = second + unit
        counts = (keys >= first).to(COUNT) + ((keys >= second).to(COUNT) << WIDTH)
        counts += (keys >= third).to(COUNT) << (2 * WIDTH)
        counts = tl.sum(counts, axis=0)
        t = tl.where((counts & ((1 << WIDTH) - 1)) >= k, first, t)
        t = tl.where(((counts >> WIDTH) & ((1 << WIDTH) - 1)) >= k, second, t)
        t = tl.where((counts >> (2 * WIDTH)) >= k, third, t)
        unit = unit >> 2
    return t


@triton.jit
def _ranked(packed, count, C: tl.constexpr, BLOCK: tl.constexpr):
    """`count` survivors (all distinct) and how many of them beat each."""
    slot = tl.arange(0, C)
    mine = tl.load(packed + slot, mask=slot < count, other=-1)
    rank = tl.zeros([C], tl.int32)
    for start in range(0, count, BLOCK):
        listed = start + tl.arange(0, BLOCK)
        other = tl.load(packed + listed, mask=listed < count, other=-1)
        rank += tl.sum((other[:, None] > mine[None, :]).to(tl.int32), axis=0)
    return mine, rank


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
