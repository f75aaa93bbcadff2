"""Who computes an op, on which device, and why.

Three modules implement the same functions under the same names: `fastsae.ops.reference` (plain
torch, the oracle), `fastsae.ops.native` (compiled C++/CUDA leaf ops) and `fastsae.kernels.<stem>`
(Triton). `choose` picks one from the device, the dtype and what is built. `FASTSAE_BACKEND` or the
argument
`backend=` forces one; a backend that cannot serve the call is an error, never a silent substitute.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastsae.errors import FastsaeError

BACKENDS = ("reference", "native", "triton")
_ORDER = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# op -> (stem of the Triton file, leaf ops the native implementation calls)
OPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "topk": ("topk", ("_topk_rows",)),
    "encode_topk": ("encode", ("_encode_topk",)),
    "encode_threshold": ("encode_threshold", ("_encode_threshold",)),
    "encode_threshold_padded": ("encode_threshold", ("_encode_threshold",)),
    "decode": ("decode", ("_decode_rows",)),
    "gather_dot": ("decode", ("_gather_dot",)),
    "sparse_outer": ("sparse_outer", ("_sparse_outer",)),
    "mi_topk": ("mi", ("_mi_columns", "_mi_topk")),
    "steer": ("steer", ("_steer_rows",)),
}


class BackendError(FastsaeError, RuntimeError):
    """A backend was asked for that cannot serve this call; the message ends with the fix."""


class Choice(NamedTuple):
    """The backend that serves an op and the reason, as `fastsae env` prints them."""

    name: str
    reason: str


def interpreting() -> bool:
    """True when Triton kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if importlib.util.find_spec("fastsae.kernels") is None:
        return "fastsae.kernels is not installed (pip install --no-build-isolation -e .)"
    return None


@functools.cache
def _native_missing(op: str, key: str) -> str | None:
    from fastsae.ops import extension

    if extension.problem() is not None:
        return extension.problem()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    absent = [leaf for leaf in OPS[op][1] if not has(f"fastsae::{leaf}", key)]
    if not absent:
        return None
    if key == "CUDA":
        return "not in the extension for CUDA (rebuild with FASTSAE_BUILD=cuda)"
    return f"the extension lacks {', '.join(absent)} (rebuild: make build)"


def unavailable(op: str, name: str, device: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why backend `name` cannot serve `op` on this device type and dtype; None when it can."""
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, accepted are {', '.join(OPS)}")
    if name not in BACKENDS:
        raise BackendError(
            f"backend: got {name!r}, accepted are {', '.join(BACKENDS)} (argument backend= or the "
            "environment variable FASTSAE_BACKEND)"
        )
    if name == "reference":
        return None
    if dtype not in _FAST_DTYPES:
        return (
            f"{name} computes in fp32; {str(dtype).removeprefix('torch.')} is served by reference"
        )
    if name == "native":
        return _native_missing(op, device.upper())
    if device == "cpu" and not interpreting():
        return "Triton needs a GPU (on the CPU only its interpreter: TRITON_INTERPRET=1)"
    return _triton_missing()


def supported(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Backends that can serve `op` here, the chosen one first."""
    names = _ORDER.get(device, ("reference",))
    if interpreting():
        names = (*names, *(n for n in BACKENDS if n not in names))
    return tuple(n for n in names if unavailable(op, n, device, dtype) is None)


def choose(op: str, *tensors: torch.Tensor, backend: str | None = None) -> Choice:
    """Backend for `op` on these tensors.

    Raises BackendError when `backend` (or FASTSAE_BACKEND) names one that cannot serve the call.
    float64 calls go to reference unless a backend is named by argument: it is the oracle.
    """
    device = tensors[0].device.type
    dtype = functools.reduce(
        torch.promote_types, (t.dtype for t in tensors if t.is_floating_point())
    )
    forced = backend or os.environ.get("FASTSAE_BACKEND") or None
    return _choose(op, device, dtype, forced, "argument" if backend else "FASTSAE_BACKEND")


@functools.cache
def _choose(op: str, device: str, dtype: torch.dtype, forced: str | None, by: str) -> Choice:
    if forced is not None:
        if dtype == torch.float64 and by == "FASTSAE_BACKEND" and forced in BACKENDS:
            return Choice("reference", "float64: the oracle serves it")
        why = unavailable(op, forced, device, dtype)
        if why is not None:
            raise BackendError(f"backend {forced!r} ({by}) cannot serve {op} on {device}: {why}")
        return Choice(forced, f"forced by {by}")
    passed: list[str] = []
    for name in _ORDER.get(device, ("reference",)):
        why = unavailable(op, name, device, dtype)
        if why is None:
            return Choice(name, "; ".join(passed) or f"first choice on {device}")
        passed.append(f"{name}: {why}")
    raise AssertionError("reference serves everything")


@functools.cache
def implementation(op: str, name: str) -> Callable:
    """The function that computes `op` in backend `name` (imported on first use)."""
    if name == "triton":
        module = importlib.import_module(f"fastsae.kernels.{OPS[op][0]}")
    else:
        module = importlib.import_module(f"fastsae.ops.{name}")
    return getattr(module, op)


def kernel(stem: str, name: str) -> Callable:
    """The Triton function `name` of kernels/<stem>.py, for leaf ops that CUDA serves in Triton."""
    return getattr(importlib.import_module(f"fastsae.kernels.{stem}"), name)


def direct(op: str, backend: str | None, tensor: torch.Tensor) -> Callable | None:
    """The compiled implementation of `op` where a call may skip checks and dispatch, else None.

    For one row these take several times as long as the work. Leaf ops check everything that they
    read, so a caller tries this first, and after a RuntimeError or TypeError goes the long way,
    which serves what the leaf does not take and names the argument that is wrong.
    """
    if not getattr(tensor, "is_cpu", False) or torch.compiler.is_compiling():
        return None
    if backend != "native" and (backend is not None or "FASTSAE_BACKEND" in os.environ):
        return None
    return _compiled(op)


@functools.cache
def _compiled(op: str) -> Callable | None:
    return implementation(op, "native") if _native_missing(op, "CPU") is None else None


def leaf(name: str, tensor: torch.Tensor) -> bool:
    """Whether a CPU call may use this leaf op: built, for the tensor's type, and nothing forbids.

    For ops without a choice of their own, which do the same in plain torch everywhere else.
    """
    forced = os.environ.get("FASTSAE_BACKEND") or "native"
    return forced == "native" and tensor.dtype in _FAST_DTYPES and _has_leaf(name)


@functools.cache
def _has_leaf(name: str) -> bool:
    from fastsae.ops import extension

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return extension.problem() is None and has(f"fastsae::{name}", "CPU")


def call(op: str, backend: str, tensors: tuple[torch.Tensor, ...], *args):
    """Run `op` with the chosen backend; `tensors` decide device and dtype.

    Kernels go by a tensor's shape alone, so tensors arrive contiguous whoever calls.
    """
    args = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    run = implementation(op, choose(op, *tensors, backend=backend or None).name)
    if not tensors[0].is_cuda:
        return run(*args)
    with torch.cuda.device(tensors[0].device):  # Triton launches on the current device
        return run(*args)
