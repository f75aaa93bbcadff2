"""x Wᵀ with fp32 accumulators and fp32 output through cuBLAS, whatever the process-wide flags say."""

import contextlib

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 << 20


@contextlib.contextmanager
def full_fp32(device: torch.device):
    """Matrix products here use neither TF32, nor reduced-precision split-K sums, nor autocast.

    torch keeps the TF32 state twice (`set_float32_matmul_precision` and `fp32_precision`) and raises when
    the two disagree, so the state is put back through the interface that it was set with.
    """
    flags = torch.backends.cuda.matmul
    new = getattr(flags, "fp32_precision", None)
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through fp32_precision alone
        legacy = None
    names = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
    reductions = {name: getattr(flags, name) for name in names if hasattr(flags, name)}
    try:
        if legacy is None:
            flags.fp32_precision = "ieee"
        elif legacy != "highest":
            torch.set_float32_matmul_precision("highest")
        for name in reductions:
            setattr(flags, name, False)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if legacy is None:
            flags.fp32_precision = new
        elif legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for name, value in reductions.items():
            setattr(flags, name, value)


def product(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ in float32 for x [N, D] and W [F, D] of one dtype; call inside `full_fp32`.

    bfloat16 and float16 operands use tensor cores: their products are exact in fp32, so only the
    accumulation rounds.
    """
    if x.dtype == torch.float32:
        return torch.mm(x, W.T)
    if x.is_cuda:
        return torch.mm(x, W.T, out_dtype=torch.float32)
    return torch.mm(x.float(), W.float().T)  # out_dtype exists on CUDA only


def split_bf16(x: Tensor) -> Tensor:
    """[3, N, D] bfloat16 whose sum is x (float32) up to 2⁻²⁴: fp32 operands for bf16 tensor cores."""
    high = x.bfloat16()
    rest = torch.where(high.isfinite(), x - high.float(), 0)  # Inf - Inf would turn Inf into NaN
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle.float()).bfloat16()])
