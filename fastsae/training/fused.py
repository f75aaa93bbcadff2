"""A training step on the CPU: the gradients of `sae_loss` written out, Adam applied row by row.

Autograd would write two [F, D] gradients and read them again for the projection and for Adam. Here
one pass over the features forms a gradient row from the batch's sparse entries, moves the weights
with it and forgets it. The same numbers up to rounding; the same bits for any number of threads.
"""

import torch
from torch import Tensor

from fastsae import ops
from fastsae.ops.backend import choose
from fastsae.training.loss import Loss, aux_weight, row_weights, variance_of


def serves(x: Tensor) -> bool:
    """Whether `step` can train on activations like x."""
    return x.device.type == "cpu" and choose("sparse_outer", x).name == "native"


@torch.no_grad()
def step(
    x: Tensor,
    weights: dict[str, Tensor],
    adam: torch.optim.Adam,
    k: int,
    *,
    kind: str,
    dead: Tensor,
    k_aux: int,
    aux_coefficient: float,
) -> Loss:
    """One Adam step on the loss `sae_loss(x, **weights, ...)`, whose arguments these are.

    The gradient of W_dec loses its radial part and the rows of W_dec end with norm 1. x [N, D] and
    the weights are float32; weights are in the order W_enc, b_enc, W_dec, b_dec.
    """
    W_enc, b_enc, W_dec, b_dec = weights.values()
    values, indices = ops.encode_topk(x, W_enc, b_enc, k, b_dec=b_dec)
    error_ND = ops.decode(values, indices, W_dec, b_dec).sub_(x)
    variance, centred = variance_of(x), x - b_dec
    weight_N1 = row_weights(x, variance, kind)
    squares_N1 = torch.linalg.vecdot(error_ND, error_ND).unsqueeze(1)
    total = (squares_N1 * weight_N1).sum()
    slot, extra = None, []
    if aux_coefficient and dead.numel():
        factor = aux_weight(aux_coefficient, dead.numel(), k_aux)
        aux, extra = _auxiliary(
            x, error_ND, centred, weights, dead, min(k_aux, dead.numel()), weight_N1 * factor
        )
        total = total + aux
        slot = torch.full(b_enc.shape, -1, dtype=torch.int32)
        slot[dead] = torch.arange(dead.numel(), dtype=torch.int32)
    error = squares_N1.sum()
    g = error_ND.mul_(2 * weight_N1)
    group = adam.param_groups[0]
    state = [tensor for w in weights.values() for tensor in (w, *_moments(adam, w))]
    (beta1, beta2), t = group["betas"], int(adam.state[W_dec]["step"]) + 1
    torch.ops.fastsae._train_rows(
        *(values, indices, g, centred, g.sum(0), slot, extra, state),
        *(float(group["lr"]), beta1, beta2, group["eps"], t),
    )
    torch.autograd.graph.increment_version(state)
    for w in weights.values():
        adam.state[w]["step"] += 1
    return Loss(total, error, variance, values, indices)


def _auxiliary(
    x: Tensor,
    error_ND: Tensor,
    centred: Tensor,
    weights: dict[str, Tensor],
    dead: Tensor,
    k: int,
    weight_N1: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """AuxK and its gradients [m, D] of W_dec[dead], [m, D] of W_enc[dead], [m] of b_enc[dead]."""
    W_enc, b_enc, W_dec, b_dec = weights.values()
    rows = W_dec[dead]
    z, indices = ops.encode_topk(x, W_enc[dead], b_enc[dead], k, b_dec=b_dec)
    g = ops.decode(z, indices, rows).add_(error_ND)
    loss = (torch.linalg.vecdot(g, g).unsqueeze(1) * weight_N1).sum()
    g.mul_(2 * weight_N1)
    return loss, list(torch.ops.fastsae._code_gradients(z, indices, g, centred, rows))


def _moments(adam: torch.optim.Adam, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments of a parameter, made as torch makes them at its first step."""
    state = adam.state[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    return state["exp_avg"], state["exp_avg_sq"]
