"""How far steering moved a residual, and back to a limit: elementwise, for any device and graph."""

import torch
from torch import Tensor


def relative_change(x: Tensor, r: Tensor) -> Tensor:
    """‖r − x‖ / ‖x‖ per token: x, r [..., D] of any float type -> [...] float32.

    0 where r = x, infinite where only x is 0, NaN where r or x has NaN.
    """
    change = (r.float() - x.float()).norm(dim=-1)
    return torch.where(change == 0, 0.0, change / x.float().norm(dim=-1))


def clamp(x: Tensor, r: Tensor, limit: float) -> Tensor:
    """r, or x + limit · ‖x‖ · (r − x) / ‖r − x‖ where nearer to x; else r's own bits."""
    ratio = relative_change(x, r)
    nearer = x.float() + (r.float() - x.float()) * (limit / ratio).unsqueeze(-1)
    return torch.where((ratio > limit).unsqueeze(-1), nearer.to(r.dtype), r)
