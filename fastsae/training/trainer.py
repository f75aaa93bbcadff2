"""The numerics of training one TopK SAE: loss with AuxK, unit-norm decoder, Adam, exact state."""

import math
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.sae import SAE, SAEConfig
from fastsae.training import fused
from fastsae.training.config import Plan
from fastsae.training.loss import Loss, sae_loss

_BETAS = (0.9, 0.999)
# A rare feature's gradients are near 1e-7 under a loss that is a mean over all tokens and
# dimensions: Adam's usual 1e-8 would slow it down.
_EPS = 6.25e-10


def autograd_step(x: Tensor, weights: dict, adam: torch.optim.Adam, k: int, **options) -> Loss:
    """One Adam step on `sae_loss(x, **weights, ...)`; the rows of W_dec keep norm 1."""
    loss = sae_loss(x, **weights, k=k, **options)
    adam.zero_grad()
    loss.total.backward()
    with torch.no_grad():
        # Adam must not spend its moments on a radial component that the constraint removes.
        rows = weights["W_dec"]
        radial = torch.linalg.vecdot(rows.grad, rows).unsqueeze(1)
        rows.grad.addcmul_(rows, radial, value=-1)
        adam.step()
        torch.autograd.graph.increment_version(list(weights.values()))  # fused Adam does not
        rows.div_(rows.norm(dim=-1, keepdim=True))
    return loss


class Trainer:
    """Weights, Adam and the dead-feature clock of one run; `step(x)` is one optimiser step.

    Training happens in the space of s·x, where s is the power of two for which the mean norm of
    s·(x − x̄) is nearest to √D: the learning rate then does not depend on the model, and `export`
    folds s into the biases without rounding. float32 throughout.

    Activations further from the mean than outlier_norm medians of that distance are left out
    everywhere. In Gemma 3 270M such attention sinks are one token in 2500, up to 41 medians out at
    layer 9 with 31 % of the variance, 6 to 10 medians out at layer 14; no other token exceeds 3.
    """

    def __init__(
        self,
        plan: Plan,
        k: int,
        *,
        loss: str = "fvu",
        aux_coefficient: float = 1 / 32,
        outlier_norm: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.plan, self.k, self.loss, self.aux_coefficient = plan, k, loss, aux_coefficient
        self.outlier_norm = outlier_norm
        self.steps_done, self.scale, self.limit = 0, 0.0, math.inf
        self.centre = torch.zeros(plan.d_in, device=device)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(plan.d_sae, plan.d_in, generator=generator)
        rows = torch.nn.functional.normalize(rows, dim=-1).to(device)
        self.weights = {
            "W_enc": rows.clone(),
            "b_enc": torch.zeros(plan.d_sae, device=device),
            "W_dec": rows,
            "b_dec": torch.zeros(plan.d_in, device=device),
        }
        for tensor in self.weights.values():
            tensor.requires_grad_()
        self.adam = torch.optim.Adam(
            self.weights.values(), lr=plan.lr, betas=_BETAS, eps=_EPS, fused=True
        )
        # Tokens since each feature was last active.
        self.idle = torch.zeros(plan.d_sae, dtype=torch.int64, device=device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def start(self, rows: Tensor) -> None:
        """Choose the scale, the mean as b_dec, and the outlier limit from activations [n, D]."""
        self.centre = rows.double().mean(0).float()
        if self.outlier_norm:
            self.limit = self.outlier_norm * float((rows - self.centre).norm(dim=-1).median())
            self.centre = self.typical(rows).double().mean(0).float()
        norm = float((self.typical(rows) - self.centre).norm(dim=-1).mean())
        if not norm > 0:
            raise FastsaeError("text: all activations are equal; give more, and more varied, text")
        self.scale = 2.0 ** round(math.log2(math.sqrt(rows.shape[1]) / norm))
        with torch.no_grad():
            self.weights["b_dec"].copy_(self.centre * self.scale)

    def typical(self, x: Tensor) -> Tensor:
        """The rows of x [N, D] that are no outliers."""
        if self.limit == math.inf:
            return x
        keep = (x - self.centre).norm(dim=-1) <= self.limit
        return x if bool(keep.all()) else x[keep]

    def step(self, x: Tensor) -> None:
        """One step on raw activations x [N, D] float32."""
        x, w = self.typical(x), self.weights
        dead = (self.idle > self.plan.dead_after_tokens).nonzero()[:, 0]
        self.adam.param_groups[0]["lr"] = self.plan.lr_at(self.steps_done)
        one_step = fused.step if fused.serves(x) else autograd_step
        loss = one_step(
            x * self.scale,
            w,
            self.adam,
            self.k,
            kind=self.loss,
            dead=dead,
            k_aux=self.plan.k_aux,
            aux_coefficient=self.aux_coefficient,
        )
        self._count(loss, len(x))
        self.steps_done += 1

    @torch.no_grad()
    def _count(self, loss: Loss, tokens: int) -> None:
        active = loss.values != 0
        # Padding goes to one slot past the end; a scatter needs no synchronisation on a GPU.
        target = torch.where(active, loss.indices, self.plan.d_sae).flatten().long()
        fired = torch.zeros(self.plan.d_sae + 1, dtype=torch.bool, device=target.device)
        fired.scatter_(0, target, True)
        self.idle += tokens
        self.idle.masked_fill_(fired[:-1], 0)
        count = torch.tensor(float(tokens), device=target.device)
        self._sums += torch.stack([loss.error, loss.variance, active.sum().float(), count])

    def metrics(self) -> dict[str, float]:
        """fvu and l0 since the last call, and the share of dead features now."""
        error, variance, active, tokens = self._sums.tolist()
        self._sums.zero_()
        dead = float((self.idle > self.plan.dead_after_tokens).double().mean())
        self._check_finite(error)
        tokens = max(tokens, 1.0)
        return {"fvu": error / max(variance, 1e-300), "l0": active / tokens, "dead": dead}

    def _check_finite(self, error: float) -> None:
        if not math.isfinite(error):
            raise FastsaeError(
                f"lr: the loss became {error} by step {self.steps_done}; use a lower rate than "
                f"{self.plan.lr:.3g}, or a longer warmup_steps than {self.plan.warmup_steps}"
            )

    def export(self, config: SAEConfig, device: torch.device | str | None = None) -> SAE:
        """The SAE for raw activations: W as they are, b_enc / s and b_dec / s (exact: s = 2ⁿ)."""
        sae = SAE(config)
        with torch.no_grad():
            for name, tensor in self.weights.items():
                folded = tensor / self.scale if name.startswith("b_") else tensor
                getattr(sae, name).copy_(folded)
        for name, parameter in sae.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise FastsaeError(
                    f"dtype: {name} does not fit in {config.dtype}; run the same command with "
                    "dtype='bfloat16' or 'float32' (the last checkpoint is intact)"
                )
        return sae.to(device) if device is not None else sae

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on; a run that diverged has no state worth keeping."""
        self._check_finite(float(self._sums[0]))
        state = self.adam.state_dict()["state"]
        return {
            "steps_done": self.steps_done,
            "scale": self.scale,
            "limit": self.limit,
            "centre": self.centre,
            "weights": {name: t.detach() for name, t in self.weights.items()},
            "adam": {str(i): dict(moments) for i, moments in state.items()},
            "idle": self.idle,
            "sums": self._sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done, self.scale = int(state["steps_done"]), float(state["scale"])
        self.limit, self.centre = float(state["limit"]), state["centre"].to(self.idle.device)
        with torch.no_grad():
            for name, tensor in self.weights.items():
                tensor.copy_(state["weights"][name])
        groups = self.adam.state_dict()["param_groups"]
        moments = {int(i): m for i, m in state["adam"].items()}
        self.adam.load_state_dict({"state": moments, "param_groups": groups})
        self.idle.copy_(state["idle"])
        self._sums.copy_(state["sums"])
