"""What screens keep of weights between calls, and when they must not.

A copy is made when the same weights, unchanged, are used for the second time; it is keyed by
storage, version counter and shape, and dropped with the weights. Edits that no version counter sees
are found on the device (`_features_kernel`). A call that records gradients neither makes nor uses
one: fastsae.ops.screens sets `local.paused` around it. A copy that a CUDA graph reads lives as long
as its weights, whatever `clear` drops.
"""

import dataclasses
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 16 << 20  # bytes of weights; smaller ones are rounded again by every call
REMEMBERED = 64  # weights seen

local = threading.local()
_lock = threading.RLock()
_seen: "dict[tuple, _Weights]" = {}  # least recently used first
_captured: list[tuple[StorageWeakRef, tuple[Tensor, ...]]] = []  # what graphs read


@dataclasses.dataclass
class _Weights:
    storage: StorageWeakRef
    version: int
    copies: "dict[str, _Copy]" = dataclasses.field(default_factory=dict)


class _Copy:
    """Tensors made on one stream, and the way to use them on another."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        self.tensors = tensors
        self.stream = self.ready = None
        if tensors[0].is_cuda:
            self.stream = torch.cuda.current_stream(tensors[0].device)
            self.ready = self.stream.record_event()

    def use(self) -> tuple[Tensor, ...]:
        if self.stream is not None:
            here = torch.cuda.current_stream(self.tensors[0].device)
            if here != self.stream:
                here.wait_event(self.ready)
                for tensor in self.tensors:
                    tensor.record_stream(here)
        return self.tensors


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records this call."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def of(W: Tensor, kind: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The copy of that kind of W: kept from an earlier call if there is one, else made."""
    if W.nbytes < SMALLEST or W.is_inference() or getattr(local, "paused", False):
        return make()
    if os.environ.get("FASTSAE_SCREENS", "1") == "0":
        return make()
    storage, capture = W.untyped_storage(), capturing(W.device)
    key = (storage._cdata, W.data_ptr(), W.dtype, tuple(W.shape))
    with _lock:
        _captured[:] = [entry for entry in _captured if not entry[0].expired()]
        weights = _seen.pop(key, None)
        if weights is None or weights.storage.expired() or weights.version != W._version:
            for old in [k for k, w in _seen.items() if w.storage.expired()]:
                del _seen[old]
            while len(_seen) >= REMEMBERED:
                del _seen[next(iter(_seen))]
            _seen[key] = _Weights(StorageWeakRef(storage), W._version)
            return make()
        _seen[key] = weights
        if kind not in weights.copies:
            made = make()
            # What is made under capture lives in the graph's memory, and only there.
            if not capture:
                weights.copies[kind] = _Copy(made)
            return made
        if capture:
            # torch.cuda.graph synchronises the device before it captures: the copy is ready.
            _captured.append((weights.storage, weights.copies[kind].tensors))
            return weights.copies[kind].tensors
        return weights.copies[kind].use()


def total_bytes() -> int:
    """Memory that all copies take now."""
    with _lock:
        kept = [t for w in _seen.values() for copy in w.copies.values() for t in copy.tensors]
        kept += [t for _, copy in _captured for t in copy]
        return sum({t.data_ptr(): t.nbytes for t in kept}.values())


def clear() -> None:
    """Drops every copy but those that graphs read."""
    with _lock:
        _seen.clear()
