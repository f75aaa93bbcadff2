"""Apply steering policies to residual activations, a policy per row."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops import check
from fastsae.ops.backend import direct

KINDS = {"none": 0, "amplify": 1, "calibrate": 2, "floor": 3, "add": 4, "enforce": 5}


class SteerTable(NamedTuple):
    """Everything the steer kernel reads, in buffers of fixed capacity on one device.

    R packed feature rows, S slots (slot 0 does nothing), P operations per slot, I items in all.
    """

    enc: Tensor  # [R, D] float32, encoder rows w_s
    bias: Tensor  # [R] float32, b_enc − s·⟨w_s, b_dec⟩: the SAE's own centring is folded in
    theta: Tensor  # [R] float32, a = h where h > max(θ, 0), else 0
    dec: Tensor  # [R, D] float32, decoder rows d_s
    op_kind: Tensor  # [S, P] int32, values of KINDS; 0 ends nothing, it is skipped
    op_begin: Tensor  # [S, P] int32, first item of the operation
    op_end: Tensor  # [S, P] int32, one past its last item
    op_scalar: Tensor  # [S, P] float32, enforce: the magnitude m
    item_row: Tensor  # [I] int32, row of enc/bias/theta/dec
    item_value: Tensor  # [I] float32, α (amplify), β (calibrate, floor) or c (add)
    gate_begin: Tensor  # [S] int32, items of the gate; an empty range means no gate
    gate_end: Tensor  # [S] int32
    gate_above: Tensor  # [S] float32
    norm_preserve: Tensor  # [S] int32, 1: rescale the result to ‖x‖


def steer(
    x: Tensor,
    slots: Tensor,
    strengths: Tensor,
    table: SteerTable,
    *,
    backend: str | None = None,
) -> Tensor:
    """Every row's operations in order on the running fp32 residual r (r starts as x).

    With a_s = h_s·1[h_s > max(θ_s, 0)], h_s = ⟨w_s, r⟩ + bias_s, and σ the row's strength:
    | kind | new r |
    |---|---|
    | amplify   | r + σ Σ α_s a_s d_s (α = −1 ablates) |
    | calibrate | r + σ Σ (β_s − a_s) d_s; floor: only where a_s < β_s |
    | add       | r + σ Σ c_s d_s |
    | enforce   | v_s = ReLU(m − a_s); r + σ m Σ (v_s/Σv) d_s rescaled to ‖r‖; Σv = 0: r unchanged |
    norm_preserve rescales the final r to ‖x‖. A gate leaves the row alone unless the mean of its
    a_s on x is ≥ gate_above.

    x [..., D] (float32, bfloat16, float16), slots [...] int32 in [0, S) (only the compiled CPU op
    checks them: elsewhere that would cost more than an idle call), strengths [...] float32.
    Returns a new tensor of x's shape and dtype, cast once at the end; rows in slot 0 and rows whose
    gate is closed are copied bit for bit. No gradient.
    Source: Wu et al. 2025 (arXiv 2502.15576) for amplify and calibrate; MATH.md §4.
    """
    compiled = direct("steer", backend, x)
    if compiled is not None:
        try:
            return compiled(x.detach() if x.requires_grad else x, slots, strengths, table)
        except (RuntimeError, TypeError):
            pass  # not what the leaf takes: served below; or a mistake: named below
    flat = check.rows("x", x, table.enc.shape[1])
    if slots.shape != x.shape[:-1] or strengths.shape != x.shape[:-1]:
        raise FastsaeError(
            f"slots, strengths: got shapes {list(slots.shape)} and {list(strengths.shape)}, "
            f"expected one entry per row of x, {list(x.shape[:-1])}"
        )
    check.same_device(x=x, slots=slots, strengths=strengths, table=table.enc)
    out = torch.ops.fastsae.steer(
        flat.detach(),
        slots.reshape(-1).to(torch.int32).contiguous(),
        strengths.reshape(-1).to(torch.float32).contiguous(),
        list(table),
        backend or "",
    )
    return out.view(x.shape)
