"""Exact top-k in torch for a k beyond the Triton kernel: torch.topk on packed, distinct keys.

torch.topk alone breaks ties as it likes; the keys hold the column in their low bits and have none.
"""

import torch
from torch import Tensor


def packed_keys(h: Tensor, bias: Tensor | None, active: bool) -> Tensor:
    """[N, F] int64 keys of h + bias, as ordered.py's `_pack(_keys(..))`; -1: no value."""
    x = h.float() if bias is None else h.float() + bias.float()
    bits = x.view(torch.int32).long()
    key = torch.where(bits < 0, -1 - bits, bits + (1 << 31))  # bits are sign-extended here
    key = torch.where(x == 0, 1 << 31, key)
    if active:
        key = torch.where(x <= 0, 0, key)
    key = torch.where(torch.isnan(x), (1 << 32) - 1, key)
    columns = torch.arange(h.shape[1], device=h.device)
    packed = (key << 31) | (0x7FFFFFFF - columns)
    return torch.where(key == 0, -1, packed)


def write_best(h, bias, columns, packed, values, indices, active: bool) -> None:
    """Orders packed survivors (-1: none) and writes values and indices, padding included."""
    k = values.shape[1]
    best = torch.topk(packed, k, dim=1).values
    index = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    member = best >= 0
    index = torch.where(member, index, 0)
    value = h.gather(1, index)
    if bias is not None:
        value = value.float() + bias.float()[index]
    if columns is not None:
        index = columns.gather(1, index)
    if active:
        used = torch.zeros(h.shape[0], k + 1, dtype=torch.uint8, device=h.device)
        used.scatter_(1, torch.where(member, index, k).clamp(max=k), 1)
        unused = torch.argsort(used[:, :k], dim=1, stable=True)
        slot = torch.arange(k, device=h.device) - member.sum(1, keepdim=True)
        index = torch.where(member, index, unused.gather(1, slot.clamp(min=0)))
        value = torch.where(member, value, 0)
    values.copy_(value)
    indices.copy_(index)
