"""Operands of the certified screen: weights and activations rounded, with what that changed.

Norms are rounded up; one that is not finite, or so large that a product could overflow, becomes
infinity: nothing is concluded from products with it.
"""

import triton
import triton.language as tl
from fastsae.kernels.cast import round_to

LANES = 128  # columns of a slice of the rescoring dot; rows of `Rows.centred` are padded to it
BLOCK8 = 64  # weights that share a scale in the int8 copy
HUGE = tl.constexpr(1e18)  # larger norms could overflow inside a product
COPY_CONFIG = {"BF": 16, "num_warps": 4}


def rows_config(N: int, D: int) -> dict:
    """Columns of x at a time. Few rows take as long as one: it is read at once."""
    if N > 64:
        return {"BD": 1024, "num_warps": 4}
    return {"BD": max(512, min(4096, triton.next_power_of_2(D))), "num_warps": 16}


@triton.jit
def _norm_above(squares, slack, least):
    """sqrt of sums of squares, rounded up: `slack` covers the sum, `least` its underflow."""
    up = tl.sqrt(squares * (1.0 + slack) + least) * 1.000001
    return tl.where(up <= HUGE, up, float("inf"))  # NaN too


@triton.jit
def _any(flags, count):
    """Whether one of `count` flags is not 0."""
    found = tl.zeros([512], tl.int32)
    for start in range(0, count, 512):
        at = start + tl.arange(0, 512)
        found |= tl.load(flags + at, mask=at < count, other=0)
    return tl.max(found, axis=0) != 0


@triton.jit
def _sketch(bits, feature, inside, D, LINE: tl.constexpr):
    """A digest of LINE neighbouring weights (64 bytes) of each feature, at a place that differs."""
    lane = tl.arange(0, LINE)
    column = (feature % tl.cdiv(D, LINE)) * LINE
    mask = inside[:, None] & (column[:, None] + lane[None, :] < D)
    at = (feature * D + column)[:, None] + lane[None, :]
    word = tl.load(bits + at, mask=mask, other=0).to(tl.int64)
    odd = (lane + 1).to(tl.int64) * 0x1E3779B97F4A7C16 + 1
    return tl.sum(word * odd[None, :], axis=1)


@triton.jit
def _round_block(
    W,
    bits,
    centre,
    copy,
    scales,
    norms,
    lost,
    products,
    digests,
    feature,
    F,
    D,
    slack,
    least,
    HAS_CENTRE: tl.constexpr,
    KIND: tl.constexpr,
    AGAIN: tl.constexpr,
    LINE: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
):
    inside = feature < F
    whole = tl.zeros([BF, BD], tl.float32)
    error = tl.zeros([BF, BD], tl.float32)
    product = tl.zeros([BF, BD], tl.float32)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        mask = inside[:, None] & (column < D)[None, :]
        at = feature[:, None] * D + column[None, :]
        w = tl.load(W + at, mask=mask, other=0.0).to(tl.float32)
        whole += w * w
        if KIND == "bf16":
            rounded = round_to(w, tl.bfloat16)
            tl.store(copy + at, rounded, mask=mask)
            off = w - rounded.to(tl.float32)
            error += off * off
        if KIND == "int8":
            blocks = tl.cdiv(D, BD)
            top = tl.max(tl.abs(w), axis=1)
            scale = top / 127.0
            # Quotients by a tinier scale could overflow; nothing is lost but precision.
            scale = tl.where((scale >= 7.9e-31) & (top < HUGE), scale, 0.0)
            inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
            q = (w * inverse[:, None] + 12582912.0) - 12582912.0
            q = tl.where(q == q, tl.minimum(tl.maximum(q, -127.0), 127.0), 0.0)
            wide = feature[:, None] * (blocks * BD) + column[None, :]
            tl.store(copy + wide, q.to(tl.int8), mask=inside[:, None] & (column >= 0)[None, :])
            tl.store(scales + feature * blocks + start // BD, scale, mask=inside)
            off = tl.abs(w - scale[:, None] * q) + tl.abs(w) * 1.2e-7
            error += off * off
        if HAS_CENTRE:
            c = tl.load(centre + column, mask=column < D, other=0.0)
            product += c[None, :] * w
    norm = _norm_above(tl.sum(whole, axis=1), slack, least)
    tl.store(norms + feature, norm, mask=inside)
    if KIND == "same":
        # Exact weights need no error, unless they are not numbers.
        change = tl.where(norm <= HUGE, 0.0, float("inf"))
    else:
        change = _norm_above(tl.sum(error, axis=1), slack, least)
    tl.store(lost + feature, change, mask=inside)
    tl.store(products + feature, tl.sum(product, axis=1), mask=inside)
    if not AGAIN:
        tl.store(digests + feature, _sketch(bits, feature, inside, D, LINE), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _copy_kernel(
    W,
    bits,
    centre,
    copy,
    scales,
    norms,
    lost,
    products,
    digests,
    changed,
    parts,
    F,
    D,
    slack,
    least,
    HAS_CENTRE: tl.constexpr,
    KIND: tl.constexpr,
    AGAIN: tl.constexpr,
    LINE: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
):
    """Rounds all features, BF at a time: KIND "bf16", "int8" (a scale per BD columns) or "same" (no
    copy). AGAIN: only where one of the `parts` of `changed` says so, and without digests: who has
    read those of weights that changed must not find the new ones before all of the copy is new."""
    if AGAIN:
        if not _any(changed, parts):
            return
    for block in range(tl.program_id(0), tl.cdiv(F, BF), tl.num_programs(0)):
        feature = tl.cast(block, tl.int64) * BF + tl.arange(0, BF)
        _round_block(
            W,
            bits,
            centre,
            copy,
            scales,
            norms,
            lost,
            products,
            digests,
            feature,
            F,
            D,
            slack,
            least,
            HAS_CENTRE,
            KIND,
            AGAIN,
            LINE,
            BF,
            BD,
        )


@triton.jit
def _rows_kernel(
    x,
    b_dec,
    centre,
    centred,
    rounded,
    low,
    scales,
    bounds,
    D,
    stride,
    width,
    screened,
    rescored,
    slack,
    least,
    HAS_B: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    WORDS: tl.constexpr,
    BD: tl.constexpr,
):
    """A row of x - b_dec in fp32 and, about the centre, rounded: bf16, or int16 in two int8 planes.

    bounds: the factors of |w| and of |w - w~| in the screen's error.
    """
    n = tl.program_id(0).to(tl.int64)
    about = tl.arange(0, BD)
    scale = tl.full([], 0.0, tl.float32)
    if WORDS:
        top = tl.zeros([BD], tl.float32)
        for start in range(0, D, BD):
            column = start + about
            mask = column < D
            d = tl.load(x + n * D + column, mask=mask, other=0.0).to(tl.float32)
            if HAS_B:
                d -= tl.load(b_dec + column, mask=mask, other=0.0).to(tl.float32)
            if HAS_CENTRE:
                d -= tl.load(centre + column, mask=mask, other=0.0)
            top = tl.maximum(top, tl.abs(d))
        largest = tl.max(top, axis=0)
        scale = largest / 32512.0  # 127 * 256: the high plane stays within int8
        scale = tl.where((scale >= 7.9e-31) & (largest < HUGE), scale, 0.0)
        tl.store(scales + n, scale)
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    whole = tl.zeros([BD], tl.float32)
    error = tl.zeros([BD], tl.float32)
    away = tl.zeros([BD], tl.float32)
    for start in range(0, stride, BD):
        column = start + about
        mask = column < D
        d = tl.load(x + n * D + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_B:
            d -= tl.load(b_dec + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(centred + n * stride + column, d, mask=column < stride)
        if HAS_CENTRE:
            c = tl.load(centre + column, mask=mask, other=0.0)
            d -= c
            away += c * c
        if WORDS:
            q = (d * inverse + 12582912.0) - 12582912.0
            q = tl.where(q == q, tl.minimum(tl.maximum(q, -32512.0), 32512.0), 0.0)
            off = tl.abs(d - scale * q) + tl.abs(d) * 1.2e-7
            word = q.to(tl.int32)
            high = (word + 128) >> 8
            tl.store(rounded + n * width + column, high.to(tl.int8), mask=column < width)
            tl.store(low + n * width + column, (word - high * 256).to(tl.int8), mask=column < width)
        else:
            r = round_to(d, tl.bfloat16)
            tl.store(rounded + n * width + column, r, mask=column < width)
            off = d - r.to(tl.float32)
        whole += d * d
        error += off * off
    size = _norm_above(tl.sum(whole, axis=0), slack, least)
    change = _norm_above(tl.sum(error, axis=0), slack, least)
    # |d~| <= |d| + |d - d~|, |x - b_dec| <= |d| + |c|; 1.2e-7 |d| is the rounding of d itself.
    far = _norm_above(tl.sum(away, axis=0), slack, least if HAS_CENTRE else 0.0)
    total = size + change
    factor = change + screened * total + rescored * (size + 2.0 * far) + 1.2e-7 * size
    tl.store(bounds + 2 * n, (factor + least) * 1.000001)
    tl.store(bounds + 2 * n + 1, total * 1.000001)


def _aot():
    def case(kernel, config, pointers, numbers, **constexprs):
        signature = {n: f"*{t}:16" for t, names in pointers for n in names.split()}
        signature |= {n: t for t, names in numbers.items() for n in names.split()}
        options = {"num_warps": config["num_warps"]}
        rest = {n: v for n, v in config.items() if n != "num_warps"}
        return kernel, signature, rest | constexprs, options

    def copy(kind, W, bits, width, again):
        pointers = [(W, "W"), (bits, "bits"), ("fp32", "centre scales norms lost products")]
        pointers += [("i64", "digests"), ("i8" if kind == "int8" else "bf16", "copy")]
        pointers += [("i32", "changed")]
        numbers = {"i32": "parts", "i32:16": "F D", "fp32": "slack least"}
        line = 16 if bits == "i32" else 32
        flags = {"HAS_CENTRE": True, "KIND": kind, "AGAIN": again, "LINE": line, "BD": width}
        return case(_copy_kernel, COPY_CONFIG, pointers, numbers, **flags)

    def rows(words, N):
        pointers = [("fp32", "x b_dec centre centred scales bounds")]
        pointers += [("i8" if words else "bf16", "rounded low")]
        numbers = {"i32:16": "D stride width", "fp32": "screened rescored slack least"}
        flags = {"HAS_B": True, "HAS_CENTRE": True, "WORDS": words}
        return case(_rows_kernel, rows_config(N, 4096), pointers, numbers, **flags)

    return [
        copy("bf16", "fp32", "i32", LANES, False),
        copy("bf16", "fp32", "i32", LANES, True),
        copy("int8", "fp32", "i32", BLOCK8, False),
        copy("int8", "fp32", "i32", BLOCK8, True),
        copy("same", "bf16", "i16", LANES, True),
        *(rows(words, N) for words in (False, True) for N in (1, 4096)),
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = _aot()
