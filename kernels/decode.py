"""Sparse decode and its gradient with respect to the values: gathers of decoder rows.

Both cut the columns into slices, the slow axis of the grid: all rows of one slice run together, so
F · BLOCK_D of the weights (33 MB at F = 65536 in bf16) can stay in L2 while every row gathers from
them. A warp reads 512 consecutive bytes of a weight row, 16 per lane, and asks for eight such rows
before it waits. Terms are added in the order of the entries, whatever the tiles are, so a row's
bits do not depend on the batch around it; there are no atomics. An index outside [0, F) reads
nothing and makes its result NaN: a kernel cannot raise, and an error must show.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.cast import round_to
from torch import Tensor


@triton.jit
def _add_entry(total, values, indices, W, entry, end, columns, F, D):
    """total + v · W[i, columns] of one entry; the entry at `end` and later ones add nothing."""
    value = tl.load(values + entry, mask=entry < end, other=0.0).to(tl.float32)
    row = tl.load(indices + entry, mask=entry < end, other=0).to(tl.int64)
    # Zero entries are padding: their rows are not read, so an Inf or NaN there does no harm.
    used = value != 0
    known = (row >= 0) & (row < F)
    value = tl.where(used & (known == 0), float("nan"), value)
    width = tl.where(used & known, D, 0)
    weights = tl.load(W + row * D + columns, mask=columns < width, other=0.0).to(tl.float32)
    # Left to the compiler, some tiles round the product and some do not (sm_100, UNROLL = 32).
    return tl.fma(value, weights, total)


@triton.jit(do_not_specialize=["N", "K", "tokens"])
def _decode_kernel(
    values,
    indices,
    W,
    b,
    out,
    N,
    K,
    F,
    D,
    tokens,
    HAS_BIAS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`tokens` rows of one slice of columns, one after the other."""
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    first = tl.program_id(0).to(tl.int64) * tokens
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(b + columns, mask=inside, other=0.0).to(tl.float32)
    for n in range(first, tl.minimum(first + tokens, N.to(tl.int64))):
        total = tl.zeros([BLOCK_D], tl.float32)
        end = (n + 1) * K
        for start in range(n * K, end, UNROLL):
            for i in tl.static_range(UNROLL):
                total = _add_entry(total, values, indices, W, start + i, end, columns, F, D)
        total = round_to(total + bias, out.dtype.element_ty)
        tl.store(out + n * D + columns, total, mask=inside)


@triton.jit(do_not_specialize=["N", "K"])
def _gather_dot_kernel(
    g, W, indices, partial, N, K, F, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """partial[slice, n, k] = ⟨g[n], W[i_nk]⟩ over one slice of the columns."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    partial += (tl.program_id(1) * N.to(tl.int64) + n) * K
    gradient = tl.load(g + n * D + columns, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        row = tl.load(indices + n * K + entry, mask=entry < K, other=0).to(tl.int64)
        known = (row >= 0) & (row < F)
        weights = tl.load(
            W + row[:, None] * D + columns[None, :],
            mask=(known & (entry < K))[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        dots = tl.sum(weights * gradient[None, :], axis=1)
        tl.store(partial + entry, tl.where(known, dots, float("nan")), mask=entry < K)


@triton.jit(do_not_specialize=["count", "slices"])
def _add_slices_kernel(partial, out, count, slices, BLOCK: tl.constexpr):
    """out[e] = Σ_s partial[s, e], ascending s."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(0, slices):
        part = partial + tl.cast(s, tl.int64) * count
        total += tl.load(part + entry, mask=entry < count, other=0.0)
    tl.store(out + entry, total, mask=entry < count)


FILLED = 512  # programs of one warp that fill a GPU: about four per multiprocessor
TOKENS = 4  # rows a program handles where there are many: launching it costs as much as a row


def _decode_config(N: int, D: int, itemsize: int) -> dict:
    """One warp per program: 16 bytes per lane, or fewer where the rows are too few to fill a GPU.

    Narrow programs keep more rows in flight: they exist to hide the latency of a few rows.
    """
    for lane_bytes, unroll in ((16, 8), (4, 16)):
        width = 32 * lane_bytes // itemsize
        if N * triton.cdiv(D, width) >= FILLED:
            return {"BLOCK_D": width, "UNROLL": unroll, "num_warps": 1}
    return {"BLOCK_D": 32, "UNROLL": 32, "num_warps": 1}


def _gather_dot_config(itemsize: int) -> dict:
    return {"BLOCK_K": 8, "BLOCK_D": 512 // itemsize, "num_warps": 1}


_ADD_CONFIG = {"BLOCK": 256, "num_warps": 4}


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Σ_k values[n, k] · W_dec[indices[n, k]] + b_dec, accumulated in fp32.

    values [N, K], indices [N, K] int32, W_dec [F, D], b_dec [D] or None; float32/bfloat16/float16.
    Returns [N, D] of the promoted dtype of values and W_dec. Entries with value 0 are skipped.
    """
    N, K = values.shape
    F, D = W_dec.shape
    dtype = torch.promote_types(values.dtype, W_dec.dtype)
    out = torch.empty(N, D, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    config = _decode_config(N, D, W_dec.element_size())
    slices = triton.cdiv(D, config["BLOCK_D"])
    tokens = TOKENS if N * slices >= TOKENS * TOKENS * FILLED else 1
    _decode_kernel[(triton.cdiv(N, tokens), slices)](
        values,
        indices,
        W_dec,
        W_dec if b_dec is None else b_dec,
        out,
        N,
        K,
        F,
        D,
        tokens,
        HAS_BIAS=b_dec is not None,
        enable_fp_fusion=True,
        **config,
    )
    return out


def gather_dot(g: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """⟨g[n], W[indices[n, k]]⟩ for every entry: the gradient of decode with respect to its values.

    g [N, D], W [F, D], indices [N, K] int32. Returns [N, K] float32. Extra memory: N·K floats per
    slice of 256 (bf16) or 128 (fp32) columns.
    """
    N, K = indices.shape
    F, D = W.shape
    out = torch.empty(N, K, dtype=torch.float32, device=g.device)
    if out.numel() == 0:
        return out
    if D == 0:
        return out.zero_()
    config = _gather_dot_config(W.element_size())
    slices = triton.cdiv(D, config["BLOCK_D"])
    partial = out if slices == 1 else out.new_empty(slices, N, K)
    _gather_dot_kernel[(N, slices)](
        g, W, indices, partial, N, K, F, D, enable_fp_fusion=True, **config
    )
    return out if slices == 1 else add_slices(partial, out)


def add_slices(partial: Tensor, out: Tensor) -> Tensor:
    """Writes the sum of partial [S, ...] float32 over its first axis into out, ascending."""
    grid = (triton.cdiv(out.numel(), _ADD_CONFIG["BLOCK"]),)
    _add_slices_kernel[grid](partial, out, out.numel(), partial.shape[0], **_ADD_CONFIG)
    return out


# Every gather of a divisible shape moves 16 bytes per lane, never one element at a time.
WIDE = dict.fromkeys(("sm_80", "sm_90", "sm_100"), ("LDG.E.128", "!LDG.E.U16", "!ATOM", "!RED."))
NARROW = dict.fromkeys(WIDE, ("!ATOM", "!RED."))


def _aot_decode(values: str, weights: str, N: int):
    config = _decode_config(N, 4096, 4 if weights == "fp32" else 2)
    options = {"num_warps": config.pop("num_warps")}
    signature = {
        "values": f"*{values}:16",
        "indices": "*i32:16",
        "W": f"*{weights}:16",
        "b": f"*{weights}:16",
        "out": f"*{values}:16",
        "N": "i32",
        "K": "i32",
        "F": "i32:16",
        "D": "i32:16",
        "tokens": "i32",
    }
    expected = WIDE if N > 16 and values == "fp32" else NARROW
    expected = {arch: (*texts, "!FMUL") for arch, texts in expected.items()}
    return _decode_kernel, signature, {"HAS_BIAS": True, **config}, options, expected


def _aot_gather_dot(g: str, weights: str):
    config = _gather_dot_config(4 if weights == "fp32" else 2)
    options = {"num_warps": config.pop("num_warps")}
    signature = {
        "g": f"*{g}:16",
        "W": f"*{weights}:16",
        "indices": "*i32:16",
        "partial": "*fp32:16",
        "N": "i32",
        "K": "i32",
        "F": "i32:16",
        "D": "i32:16",
    }
    return _gather_dot_kernel, signature, config, options, WIDE


def _aot_add_slices():
    signature = {"partial": "*fp32:16", "out": "*fp32:16", "count": "i32", "slices": "i32"}
    constexprs = {"BLOCK": _ADD_CONFIG["BLOCK"]}
    return (
        _add_slices_kernel,
        signature,
        constexprs,
        {"num_warps": _ADD_CONFIG["num_warps"]},
        NARROW,
    )


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options, expected).
AOT = [
    *(_aot_decode("fp32", weights, N) for weights in ("bf16", "fp32") for N in (1, 16, 64)),
    _aot_decode("fp16", "fp16", 64),
    _aot_gather_dot("bf16", "bf16"),
    _aot_gather_dot("fp32", "fp32"),
    _aot_add_slices(),
]
