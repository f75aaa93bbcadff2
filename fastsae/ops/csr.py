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
    counts = row_offsets.diff()
    n = counts.numel()
    width = max(1, int(counts.max()) if n else 0)
    padded = values.new_zeros(n, width)
    columns = indices.new_zeros(n, width)
    row = torch.repeat_interleave(counts)
    slot = torch.arange(values.numel(), device=values.device) - row_offsets[:-1][row]
    padded[row, slot] = values
    columns[row, slot] = indices
    return padded, columns, counts.to(torch.int32)
