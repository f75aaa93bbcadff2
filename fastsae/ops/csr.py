"""Compressed sparse rows to the padded form of Latents."""

import torch
from torch import Tensor


def csr_to_padded(
    values: Tensor, indices: Tensor, row_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """values [nnz], indices [nnz], row_offsets [N+1] -> values [N, K], indices [N, K], counts [N].

    K is the largest count of a row (at least 1). Padding: value 0, index 0; the order inside a row
    is kept. Costs one host synchronisation, because K is a shape. Differentiable in values.
    """
    padded, columns = torch.ops.fastsae.csr_to_padded(values, indices, row_offsets)
    return padded, columns, row_offsets.diff().to(torch.int32)


def entries(row_offsets: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """Row and slot of every entry, [nnz] each."""
    row = torch.repeat_interleave(row_offsets.diff(), output_size=nnz)
    return row, torch.arange(nnz, device=row_offsets.device) - row_offsets[row]


def pad(values: Tensor, indices: Tensor, row_offsets: Tensor) -> tuple[Tensor, Tensor]:
    counts = row_offsets.diff()
    n = counts.numel()
    width = max(1, int(counts.max()) if n else 0)
    padded, columns = values.new_zeros(n, width), indices.new_zeros(n, width)
    row, slot = entries(row_offsets, values.numel())
    padded[row, slot] = values
    columns[row, slot] = indices
    return padded, columns


def fit(values, indices, row_offsets, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, capacity], indices [N, capacity] and the true counts [N]: rows are cut to
    `capacity`; the rest is value 0 at the lowest indices that the row does not use, ascending."""
    counts = row_offsets.diff().to(torch.int32)
    row, slot = entries(row_offsets, values.numel())
    inside = slot < capacity
    row, slot, values, indices = row[inside], slot[inside], values[inside], indices[inside]
    used = torch.zeros(counts.numel(), capacity + 1, dtype=torch.uint8, device=values.device)
    used[row, indices.long().clamp(max=capacity)] = 1
    unused = torch.argsort(used[:, :capacity], dim=1, stable=True)
    place = torch.arange(capacity, device=values.device) - counts[:, None]
    columns = unused.gather(1, place.clamp(min=0)).to(torch.int32)
    padded = values.new_zeros(counts.numel(), capacity)
    padded[row, slot] = values
    columns[row, slot] = indices
    return padded, columns, counts
