"""Copies of weights that screens read, and how they are kept from going stale.

A copy (bf16 in AMX tiles for many rows, int8 for a few) only decides which exact values are
computed, from the weights themselves; but one of weights that have changed could leave a member
out. So:
- a copy is made when the same weights, unchanged, are used for the second time, never while they
  are being trained, and dropped with them: it is keyed by storage, version counter and shape;
- edits that no version counter sees (`.data`, NumPy) are caught by a digest of one cache line of
  every row, compared before every use, and by the certificate: a value outside its bound proves
  that the copy is of other weights. Either way the call is repeated without it.
An edit of a few single weights through `.data` or NumPy can escape both: call `clear()` after it.
"""

import dataclasses
import os
import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastsae.errors import FastsaeError

SMALLEST = 16 << 20  # bytes of weights from which reading a copy instead pays
REMEMBERED = 64  # weights seen once, or copied
_VARIABLE = "FASTSAE_SCREENS"

_lock = threading.Lock()
_seen: "dict[tuple, _Weights]" = {}


@dataclasses.dataclass
class _Weights:
    storage: StorageWeakRef
    version: int
    digest: int | None = None
    centre: Tensor | None = None
    copies: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for copy in self.copies.values() for t in copy)


def enabled() -> bool:
    """FASTSAE_SCREENS=0 turns copies off: every screen is then made anew, or not at all."""
    value = os.environ.get(_VARIABLE, "1")
    if value not in ("0", "1"):
        raise FastsaeError(f"{_VARIABLE}: got {value!r}, expected 0 or 1")
    return value == "1"


def size(W: Tensor, kind: str) -> int:
    """Bytes of a copy of W [F, D]: "bf16" or "int8" (with its scales), and three norms a row."""
    rows = -(-W.shape[0] // 256) * 256
    if kind == "bf16":
        return rows * (-(-W.shape[1] // 32) * 64 + 12)
    return rows * (-(-W.shape[1] // 64) * 68 + 12)


def total_bytes() -> int:
    """Memory that all copies take now."""
    with _lock:
        return sum(weights.bytes() for weights in _seen.values())


def clear() -> None:
    """Drops every copy; they come back when they are needed."""
    with _lock:
        _seen.clear()


def _key(W: Tensor) -> tuple:
    return W.untyped_storage()._cdata, W.data_ptr(), W.dtype, tuple(W.shape)


def find(W: Tensor, kind: str, centre) -> list[Tensor] | None:
    """The copy of W as `_encode_topk` takes it, or None if this call should do without.

    `centre()` gives the point [D] about which a first copy of W screens.
    """
    if W.nbytes < SMALLEST or W.is_inference() or not enabled():
        return None
    if W.requires_grad and torch.is_grad_enabled():
        return None  # about to be trained
    storage, key = W.untyped_storage(), _key(W)
    with _lock:
        weights = _seen.get(key)
        if weights is None or weights.storage.expired() or weights.version != W._version:
            for other in [k for k, w in _seen.items() if w.storage.expired()]:
                del _seen[other]
            _seen.pop(key, None)
            while len(_seen) >= REMEMBERED:
                del _seen[next(iter(_seen))]
            _seen[key] = _Weights(StorageWeakRef(storage), W._version)
            return None
        digest = _digest(W)
        if digest != weights.digest:
            weights.copies.clear()
            weights.digest, weights.centre = digest, None
        if kind not in weights.copies:
            if weights.centre is None:
                weights.centre = centre()
            parts = torch.ops.fastsae._encode_copy(W, weights.centre, kind == "int8")
            weights.copies[kind] = [*parts, weights.centre]
        return weights.copies[kind]


def _digest(W: Tensor) -> int:
    return torch.ops.fastsae._encode_digest(W)


def drop(W: Tensor) -> None:
    """Forgets the copies of W: the certificate has shown that they are of other weights."""
    with _lock:
        for key in [k for k in _seen if k[1] == W.data_ptr()]:
            del _seen[key]
