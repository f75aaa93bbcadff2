"""Screened products that take the maximum of every group of features before they store anything.

Prefill: TMA loads and tensor cores, a group is the BN features of a program. Decoding step: up to
64 rows meet 64 features per program, every weight is read once, in bf16, or in int8 with int16
activations as two int8 planes: integer sums over the 64 weights of a scale are exact.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.screen import BLOCK8, Features, Rows, Weights
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a Triton without TMA descriptors on the host
    TensorDescriptor = None


@triton.jit
def _maximum(h, bias, inside, AXIS: tl.constexpr):
    """Largest h + bias along an axis; a NaN counts as infinity."""
    s = h + bias
    s = tl.where(s == s, s, float("inf"))
    return tl.max(tl.where(inside, s, -float("inf")), axis=AXIS)


@triton.jit(do_not_specialize=["n", "width", "first", "groups"])
def _prefill_kernel(
    x,
    w,
    bias,
    h,
    maxima,
    n,
    width,
    first,
    D,
    groups,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h [n, width] of rows x [n, D] and features first.. of w [F, D], both as TMA descriptors."""
    row_tiles = tl.cdiv(n, BM)
    row = (tl.program_id(0) % row_tiles) * BM
    group = tl.program_id(0) // row_tiles
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        a = x.load([row, k])
        b = w.load([first + group * BN, k])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b.T, total)
    rows = row + tl.arange(0, BM)
    columns = group * BN + tl.arange(0, BN)
    inside = columns < width
    b = tl.load(bias + first + columns, mask=inside, other=0.0)
    top = _maximum(total, b[None, :], inside[None, :], 1)
    at = rows.to(tl.int64)
    tl.store(maxima + at * groups + group, top, mask=rows < n)
    mask = (rows < n)[:, None] & inside[None, :]
    tl.store(h + at[:, None] * width + columns[None, :], total, mask=mask)


@triton.jit
def _store_step(total, bias, h, maxima, n, F, groups, feature, BF: tl.constexpr, BN: tl.constexpr):
    inside = feature < F
    b = tl.load(bias + feature, mask=inside, other=0.0)
    top = _maximum(total, b[:, None], inside[:, None], 0)
    row = tl.arange(0, BN).to(tl.int64)
    tl.store(maxima + row * groups + tl.program_id(0), top, mask=row < n)
    mask = inside[:, None] & (row < n)[None, :]
    tl.store(h + row[None, :] * F + feature[:, None], total, mask=mask)


@triton.jit(do_not_specialize=["n", "groups"])
def _step_kernel(
    x,
    w,
    bias,
    h,
    maxima,
    n,
    F,
    D,
    groups,
    BF: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h [n, F] of bf16 x [n, D] and BF features of bf16 w [F, D]; n <= BN."""
    feature = tl.program_id(0).to(tl.int64) * BF + tl.arange(0, BF)
    row = tl.arange(0, BN).to(tl.int64)
    column = tl.arange(0, BK)
    total = tl.zeros([BF, BN], tl.float32)
    for k in tl.range(0, D, BK, num_stages=STAGES):
        mask = column < D - k
        a = tl.load(
            w + feature[:, None] * D + (k + column)[None, :],
            mask=(feature < F)[:, None] & mask[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        b = tl.load(
            x + row[None, :] * D + (k + column)[:, None],
            mask=(row < n)[None, :] & mask[:, None],
            other=0.0,
        )
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
    _store_step(total, bias, h, maxima, n, F, groups, feature, BF, BN)


@triton.jit(do_not_specialize=["n", "groups"])
def _step8_kernel(
    high,
    low,
    x_scales,
    w,
    w_scales,
    bias,
    h,
    maxima,
    n,
    F,
    blocks,
    groups,
    BF: tl.constexpr,
    BN: tl.constexpr,
    B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h [n, F] of x = x_scales (256 high + low) and w = w_scales w8, a scale per B weights."""
    feature = tl.program_id(0).to(tl.int64) * BF + tl.arange(0, BF)
    row = tl.arange(0, BN).to(tl.int64)
    column = tl.arange(0, B)
    valid = feature < F
    total = tl.zeros([BF, BN], tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        at = block * B + column
        a = tl.load(
            w + feature[:, None] * (blocks * B) + at[None, :],
            mask=valid[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        scale = tl.load(w_scales + feature * blocks + block, mask=valid, other=0.0)
        here = row[None, :] * (blocks * B) + at[:, None]
        mask = (row < n)[None, :]
        coarse = tl.dot(a, tl.load(high + here, mask=mask, other=0), out_dtype=tl.int32)
        fine = tl.dot(a, tl.load(low + here, mask=mask, other=0), out_dtype=tl.int32)
        total += (coarse * 256 + fine).to(tl.float32) * scale[:, None]
    total *= tl.load(x_scales + row, mask=row < n, other=0.0)[None, :]
    _store_step(total, bias, h, maxima, n, F, groups, feature, BF, BN)


PREFILL_COLUMNS = 8192  # columns of a tile: 64 groups
STEP_COLUMNS = 65536  # columns that one pass selects from: 1024 groups
# BK = 64 spills where TMA loads become plain ones (sm_80).
_PREFILL = {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 5}
_STEP = {"BF": 64, "BK": 128, "STAGES": 5, "num_warps": 4}
_STEP8 = {"BF": 64, "B": BLOCK8, "STAGES": 6, "num_warps": 4}
STEP_ROWS = 64
STEP8_ROWS = 16
PREFILL_GROUP, STEP_GROUP = _PREFILL["BN"], _STEP["BF"]


def has_tma(x: Tensor, w: Tensor) -> bool:
    """Whether TMA can load rows of both: sixteen-byte alignment, a GPU and a Triton with it."""
    aligned = x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0 and w.shape[1] % 8 == 0
    able = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return TensorDescriptor is not None and aligned and able


def prefill(x: Tensor, w: Tensor, bias: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(h [n, width], maxima [n, width / 128]) of features first.. on, for bf16 x [n, D], w [F, D].

    h is without bias, the maxima of 128 features with it (NaN counts as infinity).
    """
    (n, D), config = x.shape, dict(_PREFILL)
    BM, BN, BK = (config[name] for name in ("BM", "BN", "BK"))
    groups = triton.cdiv(width, BN)
    h = torch.empty(n, width, device=x.device)
    maxima = torch.empty(n, groups, device=x.device)
    _prefill_kernel[(triton.cdiv(n, BM) * groups,)](
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(w, [BN, BK]),
        bias,
        h,
        maxima,
        n,
        width,
        first,
        D,
        groups,
        UPCAST=not x.is_cuda,
        enable_fp_fusion=True,
        **config,
    )
    return h, maxima


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have: 227 KB on an H100, 99 on sm_86, sm_89 and sm_120."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _step_config(BN: int, shared: int) -> dict:
    """As many stages, up to five, as `shared` bytes hold tiles of."""
    tile = 2 * _STEP["BK"] * (_STEP["BF"] + BN)
    return {**_STEP, "STAGES": min(_STEP["STAGES"], shared // tile)}


def step(rows: Rows, w: Weights, features: Features) -> tuple[Tensor, Tensor]:
    """(h [N, F], maxima [N, F / 64]) of at most 64 rows, 16 with an int8 copy; as `prefill`."""
    N, F = rows.rounded.shape[0], w.copy.shape[0]
    groups = triton.cdiv(F, STEP_GROUP)
    h = torch.empty(N, F, device=w.copy.device)
    maxima = torch.empty(N, groups, device=w.copy.device)
    BN = max(16, triton.next_power_of_2(N))
    if w.scales.numel():
        x = (rows.rounded, rows.low, rows.scales)
        tail = (features.bias, h, maxima, N, F, w.scales.shape[1], groups)
        _step8_kernel[(groups,)](
            *x, w.copy, w.scales, *tail, BN=BN, enable_fp_fusion=True, **_STEP8
        )
    else:
        tail = (features.bias, h, maxima, N, F, w.copy.shape[1], groups)
        flags = {"BN": BN, "UPCAST": not h.is_cuda, "enable_fp_fusion": True}
        config = _step_config(BN, shared_bytes(h.device))
        _step_kernel[(groups,)](rows.rounded, w.copy, *tail, **flags, **config)
    return h, maxima


def _aot():
    floats = dict.fromkeys(("bias", "h", "maxima"), "*fp32:16")
    numbers = dict.fromkeys(("n", "groups"), "i32")
    BM, BN, BK = (_PREFILL[name] for name in ("BM", "BN", "BK"))
    tiles = {"x": f"tensordesc<bf16[{BM}, {BK}]>", "w": f"tensordesc<bf16[{BN}, {BK}]>"}
    prefill = {**tiles, **floats, **numbers, "width": "i32", "first": "i32", "D": "i32:16"}
    step = {"x": "*bf16:16", "w": "*bf16:16", **floats, **numbers, "F": "i32:16", "D": "i32:16"}
    step8 = dict.fromkeys(("high", "low", "w"), "*i8:16") | floats | numbers
    step8 |= {"x_scales": "*fp32:16", "w_scales": "*fp32:16", "F": "i32:16", "blocks": "i32:16"}

    def case(kernel, signature, config, expected, **flags):
        names = ("num_warps", "num_stages")
        options = {n: v for n, v in config.items() if n in names}
        constexprs = {n: v for n, v in config.items() if n not in names}
        return kernel, signature, constexprs | flags, options, expected

    tma = {"sm_90": ("wgmma", "cp.async.bulk.tensor"), "sm_80": ("mma.sync",)}
    tma["sm_100"] = ("tcgen05.mma", "cp.async.bulk.tensor")
    tma["sm_120"] = ("mma.sync", "cp.async.bulk.tensor")
    large, small = ("sm_80", "sm_90", "sm_100"), ("sm_89", "sm_120")
    copies = dict.fromkeys((*large, *small), ("cp.async", "mma"))
    sizes = ((160 << 10, large), (99 << 10, small))
    return [
        (*case(_prefill_kernel, prefill, _PREFILL, tma, UPCAST=False), tuple(tma)),
        *(
            (*case(_step_kernel, step, _step_config(BN, has), copies, BN=BN, UPCAST=False), where)
            for BN in (16, 64)
            for has, where in sizes
        ),
        (*case(_step8_kernel, step8, _STEP8, copies, BN=16), (*large, *small)),
    ]


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options, what the PTX
# of an architecture must contain, the architectures).
AOT = _aot()
