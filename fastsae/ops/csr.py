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
