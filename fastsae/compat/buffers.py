"""Zeroed memory for dense codes, used again once its tensor is gone.

A fresh 64 MB tensor costs 50-100 ms here, nearly all of it page faults; clearing memory that the
process already has costs 1.3 ms. A buffer comes back only when torch frees the tensor's storage, so
no view, alias or NumPy array of a dense code can see it being used again.
"""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes from which malloc maps fresh pages every time
KEPT = 256 << 20  # bytes of free buffers that are kept; what exceeds them is given back
_ALIGN = 64

_free: list[np.ndarray] = []  # least recently used first
_lock = threading.RLock()  # a finalizer may run while this thread holds it


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros(shape, dtype=dtype, device=device) in memory that is already mapped."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not SMALLEST <= size <= KEPT:
        return torch.zeros(shape, dtype=dtype, device=device)
    whole = _take(size + _ALIGN)
    start = -whole.ctypes.data % _ALIGN
    part = whole[start : start + size]
    weakref.finalize(part, _give_back, whole).atexit = False
    # The storage owns `part`: its finalizer runs when torch frees the storage, not earlier.
    return torch.frombuffer(part, dtype=dtype).zero_().view(shape)


def release() -> int:
    """Gives every free buffer back to the system; returns their bytes."""
    with _lock:
        freed = sum(buffer.nbytes for buffer in _free)
        _free.clear()
        return freed


def _take(size: int) -> np.ndarray:
    with _lock:
        fitting = [i for i, b in enumerate(_free) if size <= b.nbytes <= 2 * size]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].nbytes))
    return np.empty(size, np.uint8)


def _give_back(whole: np.ndarray) -> None:
    with _lock:
        _free.append(whole)
        while sum(buffer.nbytes for buffer in _free) > KEPT:
            _free.pop(0)
