"""x Wᵀ through cuBLAS with fp32 accumulators and output, whatever the process-wide flags say."""

import contextlib
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

_lock = threading.Lock()
_users = 0
_restore: list[Callable[[], None]] = []


def _change(setting, name: str, wanted) -> None:
    """Sets a flag and remembers how to put it back; nothing if it is as wanted."""
    before = getattr(setting, name)
    if before != wanted:
        setattr(setting, name, wanted)
        _restore.append(functools.partial(setattr, setting, name, before))


def _sum_exactly(setting, name: str) -> None:
    """No reduced-precision sums; the flag's second half, which setting the first resets, stays."""
    if getattr(setting, name):
        split_k = getattr(setting, f"{name}_split_k", None)  # not in every torch
        before = True if split_k is None else (True, split_k)
        setattr(setting, name, False if split_k is None else (False, split_k))
        _restore.append(functools.partial(setattr, setting, name, before))


def _make_exact(device: torch.device) -> None:
    """torch keeps the TF32 state twice and its products raise when the two disagree.

    So a state set through `set_float32_matmul_precision` is changed and restored through that, one
    set through `fp32_precision` (then the older getter raises) through `fp32_precision`.
    """
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
        _restore.append(functools.partial(torch.set_float32_matmul_precision, legacy))
    cuda = torch.backends.cuda.matmul
    setting = cuda if device.type == "cuda" else torch.backends.mkldnn.matmul
    if setting.fp32_precision not in ("none", "ieee"):
        _change(setting, "fp32_precision", "ieee")
    if device.type == "cuda":
        _sum_exactly(cuda, "allow_bf16_reduced_precision_reduction")
        _sum_exactly(cuda, "allow_fp16_reduced_precision_reduction")
        _change(cuda, "allow_fp16_accumulation", False)


@contextlib.contextmanager
def full_fp32(device: torch.device):
    """Matrix products here use neither TF32, nor reduced-precision split-K sums, nor autocast.

    The flags belong to the process: the first thread in changes them, the last one out restores.
    """
    global _users
    with _lock:
        _users += 1
        _make_exact(device)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            while _users == 0 and _restore:
                _restore.pop()()


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
