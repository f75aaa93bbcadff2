"""Sparse decoding and the two products its gradients are made of."""

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops import check
from fastsae.ops.backend import direct
from fastsae.ops.csr import csr_to_padded
from fastsae.ops.reference import compute_dtype, full_precision


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
    raises. Indices may repeat: their terms add up. Compiled for the CPU, terms add up by ascending
    index, so a row's bits do not depend on its batch.

    Gradients: values, W_dec (dense [F, D], deterministic) and b_dec; [N, K, D] is never stored.
    Cost: N·K·D·itemsize bytes of gathered rows.

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> decode(torch.tensor([2.0, 1.0]), torch.tensor([0, 2]), W).tolist()
    [3.0, 1.0]
    """
    # For one row, checks and dispatch take several times as long as the sum. Where no gradient is
    # wanted the compiled op is called as it is: it checks shapes, types, layout and range itself.
    compiled = None if torch.is_grad_enabled() else direct("decode", backend, values)
    if compiled is not None and values.dim() == 2:
        try:
            return compiled(values, indices, W_dec, b_dec)
        except (RuntimeError, TypeError):
            pass  # not what the leaf takes: served below; or a mistake: named below
    W_dec = check.matrix("W_dec", W_dec)
    b_dec = check.vector("b_dec", b_dec, W_dec.shape[1])
    flat, index = _entries(values, indices, W_dec.shape[0])
    check.same_device(values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    out = torch.ops.fastsae.decode(flat, index, W_dec, b_dec, backend or "")
    return out.view(*values.shape[:-1], W_dec.shape[1])


def decode_dense(
    code: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x̂ = code · W_dec + b_dec for a code stored densely, reading the rows of its non-zero entries.

    code [..., F] with few non-zeros, W_dec [F, D], b_dec [D] or None. Returns [..., D] as `decode`.
    Gradients: W_dec, b_dec, and code at every entry, zero ones included (one dense product).
    """
    W_dec = check.matrix("W_dec", W_dec)
    dense = check.rows("z", code, W_dec.shape[0])
    check.same_device(z=code, W_dec=W_dec, b_dec=b_dec)
    used = dense.detach() != 0
    offsets = torch.nn.functional.pad(used.sum(-1).cumsum(0), (1, 0))
    columns = used.nonzero()[:, 1].to(torch.int32)
    values, indices, _ = csr_to_padded(dense.detach()[used], columns, offsets)
    out = decode(values, indices, W_dec, b_dec, backend=backend)
    if dense.requires_grad and torch.is_grad_enabled():
        out = _CodeGradient.apply(out, dense, W_dec)
    return out.view(*code.shape[:-1], W_dec.shape[1])


def holds_codes(dense: Tensor, values: Tensor, indices: Tensor) -> bool:
    """Whether `dense` [N, F] holds exactly these codes: their bits, and zero bits elsewhere.

    values [N, K] of dense's floating dtype, indices [N, K] int32; entries with value 0 are
    padding. Reads dense once.
    """
    if dense.dtype != torch.float64 and direct("decode", None, dense) is not None:
        return torch.ops.fastsae._holds_codes(dense, values, indices)
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dense.element_size()]
    bits, active = dense.view(kind), values != 0
    same = bits.gather(1, indices.long()) == values.view(kind)  # as integers: NaN keeps its bits
    if not bool((same | ~active).all()):
        return False
    return int(torch.count_nonzero(bits)) == int(active.sum())


class _CodeGradient(torch.autograd.Function):
    """Passes x̂ on and gives the dense code its gradient g · W_decᵀ, which the sparse sum skips."""

    @staticmethod
    def forward(ctx, out, code, W_dec):
        ctx.save_for_backward(W_dec)
        ctx.dtype = code.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, g):
        (W_dec,) = ctx.saved_tensors
        dtype = compute_dtype(g, W_dec)
        with full_precision(g.device):
            return g, (g.to(dtype) @ W_dec.to(dtype).T).to(ctx.dtype), None


def gather_dot(g: Tensor, W: Tensor, indices: Tensor, *, backend: str | None = None) -> Tensor:
    """⟨g_n, W[i_nk]⟩ for every listed row: the gradient of `decode` with respect to its values.

    g [N, D], W [F, D], indices [N, K] int32 or int64 in [0, F). Returns [N, K] float32 (float64 for
    float64).
    """
    W = check.matrix("W", W)
    g = check.matrix("g", g, W.shape[1])
    index = check.indices("indices", indices, W.shape[0])
    if index.dim() != 2 or index.shape[0] != g.shape[0]:
        raise FastsaeError(
            f"indices: got shape {list(indices.shape)}, expected [{g.shape[0]}, K], the rows of g"
        )
    check.same_device(g=g, W=W, indices=indices)
    return torch.ops.fastsae.gather_dot(g, W, index, backend or "")


def sparse_outer(
    values: Tensor, indices: Tensor, g: Tensor, d_sae: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """dW[f] = Σ_{(n,k): i_nk = f} v_nk g_n and db[f] = Σ v_nk: the gradient of `decode` for W_dec.

    values [N, K], indices [N, K] int32 or int64 in [0, d_sae), g [N, D] → dW [d_sae, D] and db
    [d_sae], float32 (float64 for float64). The order of the sums is fixed: bit-reproducible.
    """
    g = check.matrix("g", g)
    check.count("d_sae", d_sae, torch.iinfo(torch.int32).max, "the int32 range")
    flat, index = _entries(values, indices, d_sae)
    if values.dim() != 2 or values.shape[0] != g.shape[0]:
        raise FastsaeError(
            f"values: got shape {list(values.shape)}, expected [{g.shape[0]}, K], the rows of g"
        )
    check.same_device(values=values, indices=indices, g=g)
    return torch.ops.fastsae.sparse_outer(flat, index, g, d_sae, backend or "")


def _entries(values: Tensor, indices: Tensor, features: int) -> tuple[Tensor, Tensor]:
    check.floating("values", values)
    index = check.indices("indices", indices, features)
    if values.shape != indices.shape or values.dim() == 0:
        raise FastsaeError(
            f"indices: got shape {list(indices.shape)}, expected the shape of values, "
            f"{list(values.shape)}, with at least one dimension"
        )
    return check.flat(values), check.flat(index)
