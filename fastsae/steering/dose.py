"""A limit on how far steering may move one token's residual."""

import math
from dataclasses import dataclass

from fastsae.errors import FastsaeError
from fastsae.ops.dose import clamp, relative_change

__all__ = ["Dose", "clamp", "relative_change"]

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
