"""A limit on how far steering may move one token's residual."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.errors import FastsaeError

ACTIONS = ("warn", "clamp", "refuse")


@dataclass(frozen=True)
class Dose:
    """‖r − x‖ / ‖x‖ ≤ limit for every steered token: x its residual before a site, r after.

    A pure number, per token and site, strengths and `norm="preserve"` included; x = 0 counts as
    infinite unless r = x. action: "warn" once per `set` (the text goes on as it was steered),
    "clamp" to r = x + limit · ‖x‖ · (r − x) / ‖r − x‖, or "refuse": FastsaeError, before the model
    goes on with r. warn and refuse read one number per forward on the host and cannot be compiled;
    clamp can. ‖x‖ is dominated by a few massive dimensions in most models, so a limit is a
    safeguard of one model and layer, not a scale to compare models by: measure it with
    `fastsae sweep`.
    """

    limit: float
    action: str = "warn"

    def __post_init__(self):
        number = isinstance(self.limit, int | float) and not isinstance(self.limit, bool)
        if not number or not math.isfinite(self.limit) or self.limit <= 0:
            raise FastsaeError(f"limit: expected a finite number above 0, got {self.limit!r}")
        if self.action not in ACTIONS:
            raise FastsaeError(f"action: expected one of {', '.join(ACTIONS)}, got {self.action!r}")


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
