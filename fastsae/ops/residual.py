"""Steer the residual stream in place, where an engine keeps it as the sum of two tensors.

For engines that compile or capture their model: fixed shapes, one op, and buffers whose contents
alone change. On a CPU the op looks at its flags and leaves at once when no row has a policy; on a
GPU it must not look (a captured graph runs no Python), and slot 0 of the steer kernel does nothing.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops import backend
from fastsae.ops.dose import clamp
from fastsae.ops.encode import encode_topk
from fastsae.ops.steer import SteerTable, steer
from fastsae.ops.watch import WatchTable, watch_


class MemberTable(NamedTuple):
    """Operations that ask a top-k SAE for its own activation, and the gates of their policies.

    S slots (slot 0 does nothing), J features in each, G features in a gate.
    """

    feature: Tensor  # [S, J] int32, −1: none
    alpha: Tensor  # [S, J] float32
    dec: Tensor  # [S, J, D] float32
    gate_enc: Tensor  # [S, G, D] float32
    gate_bias: Tensor  # [S, G] float32, padded with zeros like gate_enc
    gate_size: Tensor  # [S] float32, features of the gate; 1 where there is none
    gate_above: Tensor  # [S] float32, −inf: no gate
    norm_preserve: Tensor  # [S] int32
    W_enc: Tensor  # [F, D]
    b_enc: Tensor  # [F]
    b_dec: Tensor  # [D]


def steer_residual(
    hidden: Tensor,
    residual: Tensor | None,
    active: Tensor,
    slots: Tensor,
    strengths: Tensor,
    table: Sequence[Tensor],
    stages: Tensor | None,
    members: Sequence[Tensor],
    k: int,
    dose: float,
    watched: Tensor | None,
    watch: Sequence[Tensor],
    sums: Tensor | None,
    maxima: Tensor | None,
    seconds: Tensor | None,
) -> None:
    """hidden + residual becomes `steer(hidden + residual)`, row by row and in place.

    What is behind the op `fastsae::steer_residual_`, which graphs keep whole; where Python runs in
    every step it may be called as it is.

    hidden, residual [..., D] of T rows in all (residual may be None); active [2] int32: is any slot
    set, is any stage; slots [≥ T] int32; strengths [≥ T] float32; table: the fields of a
    SteerTable. A row that steering changes has its new residual in `residual` and zeros in `hidden`
    (in `hidden` when there is only that); all other rows keep their bits. Rows are numbered over
    the leading dimensions.

    stages [2M + 2, ≥ T] int32 serves policies whose operations ask for membership in the k largest
    of the whole dictionary: table slot, member slot, table slot, …, table slot, and the slot of the
    policy's gate and norm, in fp32 throughout. A row of stages has slot 0 in `slots`. members: the
    fields of a MemberTable. On a CPU the dictionary is encoded for the rows that ask for it; a
    captured graph encodes all.

    dose: the largest ‖r − x‖ / ‖x‖ of a row, moved back to it (ops/dose.py); 0 is no limit.
    watched [≥ T] int32 and watch, sums, maxima: slots of a WatchTable and its fields, which the
    rows with a policy are added to, after the dose. seconds [S] float64: on a CPU, this op's wall
    time, to the watched slots by their rows.
    """
    began, on_cpu = time.perf_counter(), hidden.is_cpu
    steered, staged = active.tolist() if on_cpu else (1, stages is not None)
    if not (steered or staged):
        return
    rows = hidden.numel() // hidden.shape[-1]
    if rows > slots.shape[0]:
        raise FastsaeError(f"hidden: got {rows} rows, the buffers hold {slots.shape[0]}")
    compiled = on_cpu and _alike(hidden, residual) and backend.leaf("_residual_rows", hidden)
    take = torch.ops.fastsae._residual_rows if compiled else _take_some if on_cpu else _take_all
    finish = stages[-1] if staged else None
    x, index, slots, strengths, seen = take(hidden, residual, slots, strengths, finish, watched)
    y = steer(x, slots, strengths, SteerTable(*table))
    if staged:
        stage = stages[:, :rows] if index is None else stages[:, index]
        y = _staged(x, y, stage, strengths, SteerTable(*table), MemberTable(*members), k)
    if dose:
        y = clamp(x, y, dose)
    if watched is not None and compiled:
        torch.ops.fastsae._watch_rows(x, y, seen, watch, sums, maxima)
    elif watched is not None:
        watch_(x, y, seen, WatchTable(*watch, sums, maxima))
    put = torch.ops.fastsae._residual_put if compiled else _put_some if on_cpu else _put_all
    put(hidden, residual, x, y, index, seen, seconds, time.perf_counter() - began)


def _alike(hidden: Tensor, residual: Tensor | None) -> bool:
    """Whether both are as the compiled ops read and write them: contiguous, of one type."""
    if residual is not None and not (residual.is_contiguous() and residual.dtype is hidden.dtype):
        return False
    return hidden.is_contiguous()


# What a captured graph does: every row, whatever its slot.


def _take_all(hidden, residual, slots, strengths, finish, watched):
    x = hidden.view(-1, hidden.shape[-1])
    x = x if residual is None else x + residual.view(x.shape)
    rows = x.shape[0]
    return x, None, slots[:rows], strengths[:rows], None if watched is None else watched[:rows]


def _put_all(hidden, residual, x, y, index, watched, seconds, took) -> None:
    # A row nobody changed keeps both its parts: their rounded sum is not what the next layer adds.
    changed = (y != x).any(-1, keepdim=True)
    target = (hidden if residual is None else residual).view(x.shape)
    target.copy_(torch.where(changed, y.to(target.dtype), target))
    if residual is not None:
        hidden.view(x.shape).masked_fill_(changed, 0)


# On a CPU: only the rows that have something to do. csrc/ops_residual.cpp does the same.


def _take_some(hidden, residual, slots, strengths, finish, watched):
    x, _, slots, strengths, watched = _take_all(hidden, None, slots, strengths, None, watched)
    chosen = slots != 0
    if finish is not None:
        chosen |= finish[: len(slots)] != 0
    index = chosen.nonzero()[:, 0]
    watched = torch.zeros_like(slots) if watched is None else watched
    other = 0 if residual is None else residual.view(x.shape)[index]
    return x[index] + other, index, slots[index], strengths[index], watched[index]


def _put_some(hidden, residual, x, y, index, watched, seconds, took) -> None:
    changed = (y != x).any(-1)
    moved, flat = index[changed], hidden.view(-1, hidden.shape[-1])
    target = flat if residual is None else residual.view(flat.shape)
    target[moved] = y[changed].to(target.dtype)
    if residual is not None:
        flat[moved] = 0
    if seconds is not None:
        seconds += torch.bincount(watched, minlength=len(seconds)) * (took / max(1, len(watched)))


def _staged(x, y, stage, strengths, table, members, k) -> Tensor:
    """y with the rows of staged policies replaced."""
    finish = stage[-1].long()
    start = x.to(torch.float32)
    r = start
    for i, slot in enumerate(stage[:-1].unbind(0)):
        slot = slot.contiguous()
        if i % 2 == 0:
            r = steer(r, slot, strengths, table)
        else:
            r = _amplify_members(r, slot.long(), strengths, members, k)
    before, after = start.norm(dim=-1, keepdim=True), r.norm(dim=-1, keepdim=True)
    rescale = (members.norm_preserve[finish] != 0).unsqueeze(-1) & (after > 0)
    r = torch.where(rescale, r * (before / after), r)
    h = _gather(start, members.gate_enc, finish) + members.gate_bias[finish]
    opened = h.relu().sum(-1) / members.gate_size[finish] >= members.gate_above[finish]
    return torch.where(((finish != 0) & opened).unsqueeze(-1), r.to(x.dtype), y)


def _rows_of(slot: Tensor, width: int) -> Tensor:
    """[N, width] int32: rows of a [S · width, D] matrix, those of each row's slot."""
    return (slot.unsqueeze(-1) * width + torch.arange(width, device=slot.device)).to(torch.int32)


def _gather(x: Tensor, weights: Tensor, slot: Tensor) -> Tensor:
    rows = _rows_of(slot, weights.shape[1])
    return torch.ops.fastsae.gather_dot(x, weights.flatten(0, 1), rows, "")


def _amplify_members(r, slot, strengths, members, k) -> Tensor:
    if r.is_cpu:  # where we may look: an encode of the dictionary for the rows that need it
        index = slot.nonzero()[:, 0]
        if not len(index):
            return r
        some = _members_of(r[index], slot[index], strengths[index], members, k)
        return r.index_copy(0, index, some)
    return _members_of(r, slot, strengths, members, k)


def _members_of(r, slot, strengths, members, k) -> Tensor:
    values, indices = encode_topk(r, members.W_enc, members.b_enc, k, b_dec=members.b_dec)
    member = indices.unsqueeze(-1) == members.feature[slot].unsqueeze(1)  # [N, k, J]
    acts = torch.where(member, values.unsqueeze(-1), 0).sum(-2)
    rows = _rows_of(slot, members.feature.shape[1])
    coefficient = members.alpha[slot] * acts
    delta = torch.ops.fastsae.decode(coefficient, rows, members.dec.flatten(0, 1), None, "")
    # Slot 0 keeps its bits even where another row's residual is not finite.
    return torch.where((slot != 0).unsqueeze(-1), r + strengths.unsqueeze(-1) * delta, r)
