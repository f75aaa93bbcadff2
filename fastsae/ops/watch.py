"""Add up what steering did, on the device: fixed shapes, no look at a value, buffers in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.ops import backend


class WatchTable(NamedTuple):
    """What `watch_` reads and writes, S slots (0: not watched) of up to J features on one device.

    A slot that watches fewer features has zeros in the rest of its rows.
    """

    enc: Tensor  # [S, J, D] float32, encoder rows
    bias: Tensor  # [S, J] float32, as in SteerTable
    floor: Tensor  # [S, J] float32, max(θ, 0): a = h where h is above it, else 0
    gate: Tensor  # [S, J] float32, 1/n for the n features of the gate, else 0
    above: Tensor  # [S] float32, the gate's threshold; −inf: no gate
    count: Tensor  # [S] int32, features of the slot: the first ones, the rest is zeros
    sums: Tensor  # [S, 4 + J] float64: tokens, tokens not finite, gates open, dose, activations
    maxima: Tensor  # [S, 1 + J] float32: dose, activations


def watch_(x: Tensor, r: Tensor, slots: Tensor, table: WatchTable) -> None:
    """Adds the rows of x [..., D] that have a slot [...] and their new residuals r to the table.

    Per row: h = ⟨w, x⟩ + b and a = h·1[h > floor] for the slot's features; the gate is open when
    the mean of ReLU(h) over its features is ≥ above, or r ≠ x; dose = ‖r − x‖ / ‖x‖ (0 where r = x,
    the largest float32 where only x is 0), norms in float32. A row whose norms are not finite adds
    1 to its slot's "not finite" and to nothing else. x and r of any float type, slots of any
    integer type in [0, S). Slot 0 gathers what nobody reads. The order of the sums is fixed.
    """
    x, r = x.detach(), r.detach()
    if not x.is_cpu:
        return watch(x, r, slots, table)
    *read, sums, maxima = table
    torch.ops.fastsae.watch_(x, r, slots, read, sums, maxima)
    return None


def watch_on_cpu(x, r, slots, read, sums, maxima) -> None:
    """The implementation behind the op's schema: one that compiled models keep whole."""
    if x.dtype is r.dtype and backend.leaf("_watch_rows", x):
        x, r = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, r))
        slots = slots.reshape(-1).to(torch.int32)
        torch.ops.fastsae._watch_rows(x, r, slots, read, sums, maxima)
    else:
        watch(x, r, slots, WatchTable(*read, sums, maxima))


def watch(x: Tensor, r: Tensor, slots: Tensor, table: WatchTable) -> None:
    """watch_ in plain torch: for GPUs, and the oracle of the compiled one."""
    features, slots = table.enc.shape[1], slots.reshape(-1).long()
    x, r = (t.reshape(-1, t.shape[-1]).float() for t in (x, r))
    length, change = x.norm(dim=-1), (r - x).norm(dim=-1)
    finite = (length + change).isfinite()
    dose = torch.where(change > 0, change / length, 0.0).clamp(max=torch.finfo(torch.float32).max)
    rows = slots.unsqueeze(-1) * features + torch.arange(features, device=x.device)
    weights = table.enc.flatten(0, 1)
    h = torch.ops.fastsae.gather_dot(x, weights, rows.to(torch.int32), "") + table.bias[slots]
    acts = torch.where(h > table.floor[slots], h, 0.0)
    opened = (h.relu() * table.gate[slots]).sum(-1) >= table.above[slots]
    each = [finite, ~finite, opened | (change > 0), dose]
    values = torch.cat([torch.stack([v.double() for v in each], 1), acts.double()], 1)
    kept = finite.unsqueeze(-1)
    counted = torch.where(kept, values, 0.0)
    counted[:, 1] = values[:, 1]
    # A product with 0 and 1, because adding by index has no fixed order on a GPU.
    mine = slots == torch.arange(table.sums.shape[0], device=x.device).unsqueeze(1)
    table.sums.add_(mine.double() @ counted)
    highest = torch.where(kept, torch.cat([dose.unsqueeze(1), acts], 1), 0.0)
    table.maxima.scatter_reduce_(0, slots.unsqueeze(1).expand_as(highest), highest, "amax")
