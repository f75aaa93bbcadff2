"""Sparse decode and its gradient with respect to the values: gathers of decoder rows.

`decode` gives a program (row, slice of D). The slice is the slow grid axis: all rows of one slice
run together, so that F · BLOCK_D of the weights can stay in L2 while every row gathers from them.
Products are accumulated in fp32 in a fixed order; there are no atomics. An index outside [0, F)
reads nothing and makes its result NaN: a kernel cannot raise, and an error must show.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.cast import round_to
from torch import Tensor


@triton.jit(do_not_specialize=["K"])
def _decode_kernel(
    values,
    indices,
    W,
    b,
    out,
    K,
    F,
    D,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        value = tl.load(values + n * K + entry, mask=entry < K, other=0.0).to(tl.float32)
        row = tl.load(indices + n * K + entry, mask=entry < K, other=0).to(tl.int64)
        # Zero entries are padding: their rows are not read, so an Inf or NaN there does no harm.
        used = value != 0
        known = (row >= 0) & (row < F)
        value = tl.where(used & (known == 0), float("nan"), value)
        weights = tl.load(
            W + row[:, None] * D + columns[None, :],
            mask=(used & known)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(value[:, None] * weights, axis=0)
    if HAS_BIAS:
        total += tl.load(b + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * D + columns, round_to(total, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["K"])
def _gather_dot_kernel(g, W, indices, out, K, F, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(indices + n * K + entry, mask=entry < K, other=0).to(tl.int64)
    known = (row >= 0) & (row < F)
    partial = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        gradient = tl.load(g + n * D + columns, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(
            W + row[:, None] * D + columns[None, :],
            mask=(known & (entry < K))[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        partial += weights * gradient[None, :]
    result = tl.where(known, tl.sum(partial, axis=1), float("nan"))
    tl.store(out + n * K + entry, result, mask=entry < K)


def _decode_config(itemsize: int) -> dict:
    """One warp per program with 16 bytes per thread: the BLOCK_K rows of a tile then live in
    registers.

    Their sum runs in one thread in one order, so a row's result does not depend on the batch around
    it.
    """
    return {"BLOCK_K": 16, "BLOCK_D": 512 // itemsize, "num_warps": 1}


_GATHER_DOT_CONFIG = {"BLOCK_K": 8, "BLOCK_D": 256, "num_warps": 4}


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
    config = _decode_config(W_dec.element_size())
    _decode_kernel[(N, triton.cdiv(D, config["BLOCK_D"]))](
        values,
        indices,
        W_dec,
        W_dec if b_dec is None else b_dec,
        out,
        K,
        F,
        D,
        HAS_BIAS=b_dec is not None,
        enable_fp_fusion=True,
        **config,
    )
    return out


def gather_dot(g: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """⟨g[n], W[indices[n, k]]⟩ for every entry: the gradient of decode with respect to its values.

    g [N, D], W [F, D], indices [N, K] int32. Returns [N, K] float32.
    """
    N, K = indices.shape
    F, D = W.shape
    out = torch.empty(N, K, dtype=torch.float32, device=g.device)
    if out.numel() == 0:
        return out
    config = _GATHER_DOT_CONFIG
    _gather_dot_kernel[(N, triton.cdiv(K, config["BLOCK_K"]))](
        g, W, indices, out, K, F, D, enable_fp_fusion=True, **config
    )
    return out


def _aot_decode(values: str, weights: str):
    config = _decode_config(4 if weights == "fp32" else 2)
    warps = config.pop("num_warps")
    signature = {
        "values": f"*{values}:16",
        "indices": "*i32:16",
        "W": f"*{weights}:16",
        "b": f"*{weights}:16",
        "out": f"*{values}:16",
        "K": "i32",
        "F": "i32:16",
        "D": "i32:16",
    }
    return _decode_kernel, signature, {"HAS_BIAS": True, **config}, {"num_warps": warps}


def _aot_gather_dot(g: str, weights: str):
    config = dict(_GATHER_DOT_CONFIG)
    warps = config.pop("num_warps")
    signature = {
        "g": f"*{g}:16",
        "W": f"*{weights}:16",
        "indices": "*i32:16",
        "out": "*fp32:16",
        "K": "i32",
        "F": "i32:16",
        "D": "i32:16",
    }
    return _gather_dot_kernel, signature, config, {"num_warps": warps}


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = [
    _aot_decode("fp32", "bf16"),
    _aot_decode("fp32", "fp32"),
    _aot_decode("fp16", "fp16"),
    _aot_gather_dot("bf16", "bf16"),
    _aot_gather_dot("fp32", "fp32"),
]
