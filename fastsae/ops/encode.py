"""Sparse encoding: from residual activations to the few active latents."""

import contextlib
import numbers

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops import check, screens


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    precision: str = "exact",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ReLU of the k largest pre-activations h = W_enc (x − b_dec) + b_enc, never storing [N, F].

    x [..., D], W_enc [F, D], b_enc [F], b_dec [D] or None (nothing is subtracted), 1 ≤ k ≤ F.
    Returns values [..., k] float32 (float64 if x or W_enc is) and indices [..., k] int32.

    The *signed* h are ranked in fp32, ties go to the lower index, then ReLU: active latents (h > 0)
    come first in descending order; the rest of a row is padding with value 0 and the lowest indices
    the row does not use. A NaN pre-activation is active. `precision="exact"`: low precision may
    screen, with a proof per row, and survivors are rescored in fp32. `"fast"` ranks and returns
    what the screen computed: bf16 operands, so values err by about 2⁻⁸ relative and near-ties may
    swap.

    Gradients: values → x, W_enc, b_enc, b_dec; without [N, k, D]; indices have none.
    Source: Gao et al. 2024 (arXiv 2406.04093) for TopK; MATH.md §2 for the certificate.

    >>> W, x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([2.0, -1.0])
    >>> [t.tolist() for t in encode_topk(x, W, torch.zeros(3), 3)]
    [[2.0, 1.0, 0.0], [0, 2, 1]]
    """
    flat, W_enc, b_enc, b_dec = _arguments(x, W_enc, b_enc, b_dec)
    check.count("k", k, W_enc.shape[0], "d_sae")
    check.one_of("precision", precision, ("exact", "fast"))
    op = torch.ops.fastsae.encode_topk
    with _training(W_enc):
        values, indices = op(flat, W_enc, b_enc, k, b_dec, precision, backend or "")
    shape = (*x.shape[:-1], k)
    return values.view(shape), indices.view(shape)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    *,
    b_dec: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h·1[h > θ_f]·1[h > 0] with h = W_enc (x − b_dec) + b_enc, as compressed sparse rows.

    x [..., D], W_enc [F, D], b_enc [F], threshold θ [F] or one number, b_dec [D] or None. The
    comparison is strict and in fp32 whatever the weights' type; NaN is kept.
    Returns values [nnz] float32, indices [nnz] int32 (ascending inside a row) and row_offsets
    [N + 1] int64 over the flattened leading dimensions of x. With θ = 0 this is a ReLU SAE.

    Gradients: values → x, W_enc, b_enc, b_dec on the active set; threshold has none (its gradient
    is zero almost everywhere; train thresholds with a straight-through estimator elsewhere).
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435).

    >>> W, x = torch.eye(3), torch.tensor([[2.0, -1.0, 0.5], [0.5, 0.0, 3.0]])
    >>> [t.tolist() for t in encode_threshold(x, W, torch.zeros(3), torch.tensor(0.5))]
    [[2.0, 3.0], [0, 2], [0, 1, 2]]
    """
    flat, W_enc, b_enc, b_dec = _arguments(x, W_enc, b_enc, b_dec)
    threshold = _thresholds(threshold, x, W_enc)
    op = torch.ops.fastsae.encode_threshold
    with _training(W_enc):
        return op(flat, W_enc, b_enc, threshold, b_dec, backend or "")


def encode_threshold_padded(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    capacity: int,
    *,
    b_dec: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`encode_threshold` in a fixed shape: at most `capacity` active latents per row.

    Arguments as there; 1 ≤ capacity ≤ F. Returns values [..., capacity] float32, indices
    [..., capacity] int32 (ascending) and counts [...] int32. The rest of a row is padding: value 0
    at the lowest indices that the row does not use. `counts` holds the *true* number of active
    latents; where it exceeds `capacity` the row has its first ones only, and the call raises
    FastsaeError, except under CUDA-graph capture and torch.compile, which cannot: there a caller
    looks at `counts`. Under capture nothing synchronises, and no shape depends on data.

    Gradients: as for `encode_threshold`.

    >>> W, x = torch.eye(3), torch.tensor([[2.0, -1.0, 0.5], [0.5, 0.0, 3.0]])
    >>> [t.tolist() for t in encode_threshold_padded(x, W, torch.zeros(3), 0.5, 2)]
    [[[2.0, 0.0], [3.0, 0.0]], [[0, 1], [2, 0]], [1, 1]]
    """
    flat, W_enc, b_enc, b_dec = _arguments(x, W_enc, b_enc, b_dec)
    threshold = _thresholds(threshold, x, W_enc)
    capacity = check.count("capacity", capacity, W_enc.shape[0], "d_sae")
    op = torch.ops.fastsae.encode_threshold_padded
    with _training(W_enc):
        values, indices, counts = op(flat, W_enc, b_enc, threshold, capacity, b_dec, backend or "")
    # Asked in this order: torch.compile cannot trace the question about the capture.
    if not torch.compiler.is_compiling() and not _capturing(x) and counts.numel():
        most = int(counts.max())
        if most > capacity:
            raise FastsaeError(
                f"capacity: got {capacity}, but a row has {most} active latents; pass at least "
                "that, or call encode_threshold"
            )
    shape = (*x.shape[:-1], capacity)
    return values.view(shape), indices.view(shape), counts.view(x.shape[:-1])


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _thresholds(threshold: Tensor | float, x: Tensor, W_enc: Tensor) -> Tensor:
    """threshold [F], contiguous."""
    if isinstance(threshold, numbers.Real):
        threshold = torch.full((), float(threshold), device=x.device)
    check.floating("threshold", threshold)
    if threshold.dim() == 0:
        threshold = threshold.expand(W_enc.shape[0])
    threshold = check.vector("threshold", threshold, W_enc.shape[0])
    check.same_device(x=x, threshold=threshold)
    return threshold


def _training(W_enc: Tensor):
    """Weights whose gradient is recorded are about to change: no copies of them."""
    recorded = W_enc.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not recorded:
        return contextlib.nullcontext()
    return screens.paused()


def _arguments(x, W_enc, b_enc, b_dec):
    W_enc = check.matrix("W_enc", W_enc)
    features, width = W_enc.shape
    if features == 0 or width == 0:
        raise FastsaeError(
            f"W_enc: got shape {list(W_enc.shape)}, expected a non-empty [d_sae, d_in]"
        )
    check.floating("b_enc", b_enc)
    check.same_device(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    return (
        check.rows("x", x, width),
        W_enc,
        check.vector("b_enc", b_enc, features),
        check.vector("b_dec", b_dec, width),
    )
