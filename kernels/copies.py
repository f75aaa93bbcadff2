"""What screens keep of weights between calls, and when they must not.

A copy is made when the same weights, unchanged, are used for the second time; it is keyed by
storage, version counter and shape, and dropped with the weights. A call that records gradients
neither makes nor uses one: fastsae.ops.screens sets `local.paused` around it.

Edits that no version counter sees are found on the device by every call (`screen.features`), which
then makes the copy anew in place. So a copy that a CUDA graph reads follows its weights through
replays. What the device looks at is one line of every row and every value that is rescored: an edit
of a few single weights can escape both. Where torch sees it, the next call outside of graphs on the
same weights marks the copies that graphs read, and their next replay makes them anew; so does
`clear`. Such copies live as long as their weights.

A copy is kept in ordinary memory only. What is allocated while a graph is captured, or while
torch.compile warms one up, or under `torch.cuda.use_mem_pool`, belongs to a pool that is used again
or emptied without notice: such a copy serves the call that made it, and a captured call rounds the
weights in every replay. Two calls before the capture avoid that.
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
_captured: "list[_Captured]" = []


@dataclasses.dataclass
class _Weights:
    storage: StorageWeakRef
    version: int
    copies: "dict[str, _Copy]" = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Captured:
    """A copy that a graph reads; its last tensor, int32 [1], asks the graph to make it anew."""

    storage: StorageWeakRef
    version: int
    tensors: tuple[Tensor, ...]


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


def ordinary(tensors: tuple[Tensor, ...]) -> bool:
    """Whether torch's allocator has these in its common pool, not in one of a graph or a user.

    A look at all segments, once for every copy that is made. Other allocators have no pools.
    """
    if not tensors[0].is_cuda or torch.cuda.get_allocator_backend() != "native":
        return True
    private = [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    ]
    places = [t.data_ptr() for t in tensors if t.numel()]
    return not any(begin <= place < end for place in places for begin, end in private)


def of(
    W: Tensor, kind: str, make: Callable[[], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], bool]:
    """(the copy of that kind of W, kept or made now; whether W is compared with it before its use).

    Where copies may be kept all are compared, new ones too: a captured call can load no kernel, so
    it must launch the same ones as the calls before it, be it the second call or the third.

    The last tensor of a copy is int32 [1]; not 0 asks the next call to make the copy anew.
    """
    if W.nbytes < SMALLEST or W.is_inference() or getattr(local, "paused", False):
        return make(), False
    if os.environ.get("FASTSAE_SCREENS", "1") == "0":
        return make(), False
    storage, capture = W.untyped_storage(), capturing(W.device)
    key = (storage._cdata, W.data_ptr(), W.dtype, tuple(W.shape))
    with _lock:
        _captured[:] = [entry for entry in _captured if not entry.storage.expired()]
        if not capture:
            old = [c for c in _captured if c.storage.cdata == storage._cdata]
            old = [c for c in old if c.version != W._version]
            _mark(old)
            for copy in old:
                copy.version = W._version
        weights = _seen.pop(key, None)
        if weights is None or weights.storage.expired() or weights.version != W._version:
            for gone in [k for k, w in _seen.items() if w.storage.expired()]:
                del _seen[gone]
            while len(_seen) >= REMEMBERED:
                del _seen[next(iter(_seen))]
            _seen[key] = _Weights(StorageWeakRef(storage), W._version)
            return make(), True
        _seen[key] = weights
        if kind not in weights.copies:
            made = make()
            if not capture and ordinary(made):
                weights.copies[kind] = _Copy(made)
            return made, True
        if capture:
            # torch.cuda.graph synchronises the device before it captures: the copy is ready.
            tensors = weights.copies[kind].tensors
            _captured.append(_Captured(weights.storage, weights.version, tensors))
            return tensors, True
        return weights.copies[kind].use(), True


def _mark(captured: "list[_Captured]") -> None:
    """Has the graphs that read these copies make them anew."""
    with torch.inference_mode():  # some were made there, and nothing else may change those
        for copy in captured:
            copy.tensors[-1].fill_(1)


def total_bytes() -> int:
    """Memory that all copies take now."""
    with _lock:
        kept = [t for w in _seen.values() for copy in w.copies.values() for t in copy.tensors]
        kept += [t for copy in _captured for t in copy.tensors]
        return sum({t.data_ptr(): t.nbytes for t in kept}.values())


def clear() -> None:
    """Drops every copy; those that graphs read are made anew by the next replay."""
    with _lock:
        _seen.clear()
        _mark(_captured)
