"""The loss of a TopK SAE: reconstruction and AuxK, in the form that autograd differentiates."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae import ops


class Loss(NamedTuple):
    """One batch's loss and what it is made of."""

    total: Tensor  # [] differentiable where sae_loss made it
    error: Tensor  # [] Σ ‖x̂ − x‖²
    variance: Tensor  # [] Σ ‖x − x̄‖², x̄ the mean of the batch
    values: Tensor  # [N, k]
    indices: Tensor  # [N, k] int32


def sae_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    *,
    kind: str = "fvu",
    dead: Tensor | None = None,
    k_aux: int = 1,
    aux_coefficient: float = 0.0,
) -> Loss:
    """‖x̂ − x‖² + c·min(1, |dead| / k_aux)·‖ê − e‖², each normalised as `kind` says.

    x̂ is the TopK reconstruction of x [N, D], e = x − x̂ its residual (a constant in the second
    term), and ê = Σ a_i W_dec[i] the reconstruction of e from the k_aux largest pre-activations of
    x among the features dead [m] int64. kind "fvu": sums over the batch divided by Σ ‖x − x̄‖²;
    "mse": the mean over tokens of the squared error divided by ‖x‖². Both terms train encoder and
    decoder.
    """
    values, indices = ops.encode_topk(x, W_enc, b_enc, k, b_dec=b_dec)
    error_ND = ops.decode(values, indices, W_dec, b_dec) - x
    squares_N1 = error_ND.square().sum(-1, keepdim=True)
    variance = variance_of(x)
    weight_N1 = row_weights(x, variance, kind)
    total = (squares_N1 * weight_N1).sum()
    if aux_coefficient and dead is not None and dead.numel():
        used = min(k_aux, dead.numel())
        # Only the dead rows take part, so the others need no mask and cost nothing.
        z, z_indices = ops.encode_topk(x, W_enc[dead], b_enc[dead], used, b_dec=b_dec)
        aux_ND = ops.decode(z, z_indices, W_dec[dead]) + error_ND.detach()
        aux = (aux_ND.square().sum(-1, keepdim=True) * weight_N1).sum()
        total = total + aux_weight(aux_coefficient, dead.numel(), k_aux) * aux
    return Loss(total, squares_N1.detach().sum(), variance, values.detach(), indices)


def variance_of(x: Tensor) -> Tensor:
    """Σ ‖x − x̄‖² of x [N, D]. Row by row first: the bits do not depend on the threads."""
    return (x - x.mean(0)).square_().sum(-1).sum()


def row_weights(x: Tensor, variance: Tensor, kind: str) -> Tensor:
    """The factor of each row's squared error: [N, 1], or [1, 1] where all are equal."""
    tiny = torch.finfo(x.dtype).tiny
    if kind == "fvu":
        return (1 / variance.clamp(min=tiny)).view(1, 1)
    return 1 / (x.square().sum(-1, keepdim=True).clamp(min=tiny) * x.shape[0])


def aux_weight(coefficient: float, dead: int, k_aux: int) -> float:
    """AuxK's weight: in proportion to the dead features while they are fewer than k_aux."""
    return coefficient * min(1.0, dead / k_aux)
