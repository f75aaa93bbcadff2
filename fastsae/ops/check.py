"""Argument checks shared by the public ops: one clear error before any kernel sees a tensor."""

import math
import operator

import torch
from torch import Tensor

from fastsae.errors import FastsaeError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise FastsaeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise FastsaeError(
            f"{name}: got dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64"
        )


def matrix(name: str, tensor: Tensor, columns: int | None = None) -> Tensor:
    """A floating [rows, columns] tensor, contiguous."""
    floating(name, tensor)
    if tensor.dim() != 2 or (columns is not None and tensor.shape[1] != columns):
        wanted = f"[rows, {columns}]" if columns is not None else "a 2-D tensor"
        raise FastsaeError(f"{name}: got shape {list(tensor.shape)}, expected {wanted}")
    return tensor.contiguous()


def vector(name: str, tensor: Tensor | None, length: int) -> Tensor | None:
    """A floating [length] tensor, contiguous; None stays None."""
    if tensor is None:
        return None
    floating(name, tensor)
    if tensor.shape != (length,):
        raise FastsaeError(f"{name}: got shape {list(tensor.shape)}, expected [{length}]")
    return tensor.contiguous()


def rows(name: str, tensor: Tensor, width: int | None = None) -> Tensor:
    """Any [..., width] floating tensor as a contiguous 2-D one."""
    floating(name, tensor)
    if tensor.dim() == 0 or (width is not None and tensor.shape[-1] != width):
        wanted = f"[..., {width}]" if width is not None else "at least one dimension"
        raise FastsaeError(f"{name}: got shape {list(tensor.shape)}, expected {wanted}")
    return flat(tensor)


def flat(tensor: Tensor) -> Tensor:
    """[..., width] -> [N, width], contiguous. N is counted: reshape(-1, 0) would be ambiguous."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


def indices(name: str, tensor: Tensor, limit: int) -> Tensor:
    """Row numbers in [0, limit) as contiguous int32; int64 is accepted."""
    if not isinstance(tensor, Tensor):
        raise FastsaeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise FastsaeError(f"{name}: got dtype {tensor.dtype}, expected int32 or int64")
    # Reading the extremes of a GPU tensor would synchronise, and under compile there is no data:
    # there the kernels do the checking, of numbers that must not wrap around on their way to int32.
    if tensor.device.type == "cpu" and tensor.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(tensor))
        if low < 0 or high >= limit:
            raise FastsaeError(
                f"{name}: got values from {low} to {high}, expected 0 to {limit - 1}"
            )
    elif tensor.dtype == torch.int64:
        tensor = tensor.clamp(-1, limit)
    return tensor.to(torch.int32).contiguous()


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if isinstance(t, Tensor)}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise FastsaeError(
            f"all tensors must be on one device: {found}; move them with .to(device)"
        )


def count(name: str, k: int, limit: int, limit_name: str) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= limit:
        raise FastsaeError(
            f"{name}: got {k!r}, expected an integer from 1 to {limit_name} = {limit}"
        )
    return operator.index(k)


def one_of(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise FastsaeError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")
    return value
