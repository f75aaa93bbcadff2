"""Sparse decoding and the two products its gradients are made of."""

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops import check


def decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x̂ = Σ_k values_k · W_dec[indices_k] + b_dec, reading only the K rows that are used.

    values [..., K], indices [..., K] int32 or int64 in [0, F), W_dec [F, D], b_dec [D] or None.
    Returns [..., D] of the promoted dtype of values and W_dec; sums are fp32 (fp64 for fp64).
    Entries with value 0 are skipped, so padding never meets the weights; an index outside [0, F)
    raises. Indices may repeat: their terms add up.

    Gradients: values, W_dec (dense [F, D], deterministic) and b_dec; [N, K, D] is never stored.
    Cost: N·K·D·itemsize bytes of gathered rows.
    """
    W_dec = check.matrix("W_dec", W_dec)
    b_dec = check.vector("b_dec", b_dec, W_dec.shape[1])
    flat, index = _entries(values, indices, W_dec.shape[0])
    check.same_device(values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    out = torch.ops.fastsae.decode(flat, index, W_dec, b_dec, backend or "")
    return out.view(*values.shape[:-1], W_dec.shape[1])


def gather_dot(g: Tensor, W: Tensor, indices: Tensor, *, backend: str | None = None) -> Tensor:
    """⟨g_n, W[i_nk]⟩ for every listed row: g [N, D], W [F, D], indices [N, K] → [N, K] float32."""
    W = check.matrix("W", W)
    g = check.matrix("g", g, W.shape[1])
    _in_range(indices, W.shape[0])
    return torch.ops.fastsae.gather_dot(g, W, indices.to(torch.int32).contiguous(), backend or "")


def sparse_outer(
    values: Tensor, indices: Tensor, g: Tensor, d_sae: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """dW[f] = Σ_{(n,k): i_nk = f} v_nk g_n and db[f] = Σ v_nk, in a fixed order (bit-reproducible).

    values [N, K], indices [N, K], g [N, D] → dW [d_sae, D] and db [d_sae], float32.
    """
    g = check.matrix("g", g)
    flat, index = _entries(values, indices, d_sae)
    return torch.ops.fastsae.sparse_outer(flat, index, g, d_sae, backend or "")


def _entries(values: Tensor, indices: Tensor, features: int) -> tuple[Tensor, Tensor]:
    check.floating("values", values)
    if values.shape != indices.shape or values.dim() == 0:
        raise FastsaeError(
            f"indices: got shape {list(indices.shape)}, expected the shape of values, "
            f"{list(values.shape)}, with at least one dimension"
        )
    _in_range(indices, features)
    width = values.shape[-1]
    index = indices.to(torch.int32).reshape(-1, width).contiguous()
    return values.reshape(-1, width).contiguous(), index


def _in_range(indices: Tensor, features: int) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise FastsaeError(f"indices: got dtype {indices.dtype}, expected int32 or int64")
    # Reading the extremes of a GPU tensor would synchronise, and under compile there is no data:
    # there the kernels do the checking.
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= features:
        raise FastsaeError(
            f"indices: got values from {low} to {high}, expected 0 to {features - 1}"
        )
