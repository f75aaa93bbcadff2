"""Copies of weights that screens read, and how they are kept from going stale.

A copy (bf16 in AMX tiles for many rows, int8 for a few) only decides which exact values are
computed, from the weights themselves; but one of weights that have changed could leave a member
out. So:
- a copy is made when the same weights, unchanged, are used for the second time, never by a call
  that records gradients of them, and dropped with them: it is keyed by storage, version counter
  and shape;
- edits that no version counter sees (`.data`, NumPy, fused optimizers; any edit where `.data` is
  what is encoded with) are caught by a digest of one cache line of every row, compared before every
  use, and by the certificate: a value outside its bound proves that the copy is of other weights.
  Either way the call goes on without it.
An edit of a few single weights in such a way can escape both: call `clear()` after it.
"""

import contextlib
import dataclasses
import os
import sys
import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastsae.errors import FastsaeError

SMALLEST = 16 << 20  # bytes of weights from which reading a copy instead pays
REMEMBERED = 64  # weights seen once, or copied
SETTLED = 64  # rows whose mean is centre enough
_STRIKES = 3  # calls that a copy mostly did not help, after which it is made anew
_VARIABLE = "FASTSAE_SCREENS"

_seen: "dict[tuple, _Weights]" = {}  # least recently used first
_lock = threading.RLock()
_local = threading.local()


@dataclasses.dataclass
class _Weights:
    """What is known of one encoder's weights: its copies while it is used, changed or not."""

    storage: StorageWeakRef
    version: int
    digest: int | None = None
    centre: Tensor | None = None
    rows: list[Tensor] = dataclasses.field(default_factory=list)  # while they are too few
    strikes: int = 0
    copies: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    lock: "threading.RLock" = dataclasses.field(default_factory=threading.RLock)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for copy in self.copies.values() for t in copy)

    def forget(self) -> None:
        """Drops the copies and what they were made with."""
        self.copies, self.centre, self.rows, self.strikes = {}, None, [], 0


class Found:
    """The use of a copy by one call."""

    def __init__(self, weights: _Weights, W: Tensor, kind: str):
        self._weights, self._W, self._kind = weights, W, kind

    def copy(self, x: Tensor, b_dec: Tensor | None) -> list[Tensor]:
        """The copy as `_encode_topk` takes it.

        A first one screens about the mean of x - b_dec; if that is of a few rows, as while
        generating, the copy is made once more when SETTLED rows have passed.
        """
        weights, W, kind = self._weights, self._W, self._kind
        with weights.lock:
            digest = torch.ops.fastsae._encode_digest(W)
            if digest != weights.digest:
                weights.forget()
                weights.digest = digest
            if weights.centre is None or weights.rows:
                self._settle(x if b_dec is None else x - b_dec)
            if kind not in weights.copies:
                parts = torch.ops.fastsae._encode_copy(W, weights.centre, kind == "int8")
                weights.copies[kind] = [*parts, weights.centre]
            return weights.copies[kind]

    def _settle(self, x: Tensor) -> None:
        """The centre: of x at once, and again when there are enough rows."""
        weights = self._weights
        few = x.shape[0] < SETTLED
        rows = [*weights.rows, x.detach().clone()] if few else [x]
        settled = sum(len(part) for part in rows) >= SETTLED
        if weights.centre is None or settled:
            weights.forget()
            weights.centre = torch.ops.fastsae._encode_centre(torch.cat(rows), None)
        weights.rows = [] if settled else rows

    def judge(self, full: int, rows: int) -> None:
        """Drops a copy that did not help most rows of several calls: its centre is a bad one."""
        weights = self._weights
        weights.strikes = weights.strikes + 1 if 2 * full > rows else 0
        if weights.strikes >= _STRIKES:
            with weights.lock:
                weights.forget()


def enabled() -> bool:
    """FASTSAE_SCREENS=0 turns copies off: every screen is then made anew, or not at all."""
    value = os.environ.get(_VARIABLE, "1")
    if value not in ("0", "1"):
        raise FastsaeError(f"{_VARIABLE}: got {value!r}, expected 0 or 1")
    return value == "1"


@contextlib.contextmanager
def paused():
    """No copy is made or used by this thread: the weights are being trained."""
    places = [_local] + [copies.local for copies in _on_gpus()]
    before = [getattr(place, "paused", False) for place in places]
    for place in places:
        place.paused = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.paused = value


def size(W: Tensor, kind: str) -> int:
    """Bytes of a copy of W [F, D]: "bf16" or "int8" (with its scales), and three norms a row."""
    rows = -(-W.shape[0] // 256) * 256
    if kind == "bf16":
        return rows * (-(-W.shape[1] // 32) * 64 + 12)
    return rows * (-(-W.shape[1] // 128) * 132 + 12)


def total_bytes() -> int:
    """Memory that all copies take now."""
    with _lock:
        here = sum(weights.bytes() for weights in _seen.values())
    return here + sum(copies.total_bytes() for copies in _on_gpus())


def clear() -> None:
    """Drops every copy; they come back when they are needed."""
    with _lock:
        _seen.clear()
    for copies in _on_gpus():
        copies.clear()


def _on_gpus() -> list:
    """The module that holds the copies of the Triton kernels, once one of them has run."""
    return [sys.modules[name] for name in ("fastsae.kernels.copies",) if name in sys.modules]


def find(W: Tensor, kind: str) -> Found | None:
    """The use of a copy of W for this call, or None if it should do without."""
    if W.nbytes < SMALLEST or W.is_inference() or getattr(_local, "paused", False):
        return None
    if not enabled():
        return None
    storage = W.untyped_storage()
    key = (storage._cdata, W.data_ptr(), W.dtype, tuple(W.shape))
    with _lock:
        weights = _seen.pop(key, None)
        if weights is not None and not weights.storage.expired() and weights.version == W._version:
            _seen[key] = weights
            return Found(weights, W, kind)
        for other in [k for k, w in _seen.items() if w.storage.expired()]:
            del _seen[other]
        while len(_seen) >= REMEMBERED:
            idle = (k for k, w in _seen.items() if not w.copies)
            del _seen[next(idle, next(iter(_seen)))]
        _seen[key] = _Weights(StorageWeakRef(storage), W._version)
        return None


def drop(W: Tensor) -> None:
    """Forgets the copies of W: they have turned out to be of other weights."""
    with _lock:
        for key in [k for k in _seen if k[1] == W.data_ptr()]:
            del _seen[key]


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it
    _seen.clear()


os.register_at_fork(after_in_child=_after_fork)
