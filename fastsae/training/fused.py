"""A training step with the gradients of `sae_loss` written out.

Autograd sorts the sparse entries twice, gathers encoder rows for db_dec, and on the CPU would write
two [F, D] gradients and read them again for the projection and for Adam. Here, on the CPU, one pass
over the features forms a gradient row from the batch's sparse entries, moves the weights with it
and forgets it; the same bits for any number of threads. On a GPU one sort serves both gradients,
which torch's fused Adam then applies. The same numbers up to rounding.
"""

import torch
from torch import Tensor

from fastsae import ops
from fastsae.ops.backend import choose
from fastsae.ops.reference import full_precision
from fastsae.training.loss import Loss, aux_weight, row_weights, variance_of


def serves(x: Tensor) -> bool:
    """Whether `step` can train on activations like x."""
    return choose("sparse_outer", x).name == {"cpu": "native", "cuda": "triton"}.get(x.device.type)


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
    extra: list[Tensor] = []
    if aux_coefficient and dead.numel():
        factor = aux_weight(aux_coefficient, dead.numel(), k_aux)
        aux, extra = _auxiliary(
            x, error_ND, centred, weights, dead, min(k_aux, dead.numel()), weight_N1 * factor
        )
        total = total + aux
    error = squares_N1.sum()
    g = error_ND.mul_(2 * weight_N1)
    loss = Loss(total, error, variance, values, indices)
    if not _by_rows(x):
        _dense_step(adam, weights, loss, g, centred, dead, extra)
        return loss
    slot = None
    if extra:
        slot = torch.full(b_enc.shape, -1, dtype=torch.int32)
        slot[dead] = torch.arange(dead.numel(), dtype=torch.int32)
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
    return loss


def _by_rows(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _dense_step(
    adam: torch.optim.Adam,
    weights: dict[str, Tensor],
    loss: Loss,
    g: Tensor,
    centred: Tensor,
    dead: Tensor,
    extra: list[Tensor],
) -> None:
    """Adam on dense gradients: those of the loss's code, and `extra` for the rows `dead`."""
    W_enc, _b_enc, W_dec, _b_dec = weights.values()
    gradients = torch.ops.fastsae._code_gradients(loss.values, loss.indices, g, centred, W_dec)
    dW_dec, dW_enc, db_enc = gradients
    for gradient, more in zip(gradients if extra else (), extra, strict=True):
        gradient[dead] += more
    # Adam must not spend its moments on a radial component that the unit norm removes.
    dW_dec.addcmul_(W_dec, torch.linalg.vecdot(dW_dec, W_dec).unsqueeze(1), value=-1)
    with full_precision(g.device):
        db_dec = g.sum(0) - db_enc @ W_enc  # Σ dx over the rows, without a gather
    for weight, gradient in zip(weights.values(), (dW_enc, db_enc, dW_dec, db_dec), strict=True):
        weight.grad = gradient
    adam.step()
    torch.autograd.graph.increment_version(list(weights.values()))  # fused Adam does not
    adam.zero_grad()
    W_dec.div_(W_dec.norm(dim=-1, keepdim=True))


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
