"""Mutual-information scores between features and vocabulary words."""

from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops import check
from fastsae.ops.reference import TILE_BYTES, compute_dtype

OBJECTIVES = ("mi", "pmi", "paper", "logit")


def mi_topk(
    features: Tensor,
    words: Tensor,
    top: int,
    *,
    objective: str = "mi",
    temperature: float | str = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top` words with the largest score(f, v), for every feature, never storing [F, V].

    features [F, D], words [V, D]; L = ⟨f, w⟩ / T, p(v|f) = softmax_v L, p(f|v) = softmax_f L.
    | objective | score(f, v) |
    |---|---|
    | "mi"    | p(v|f) · (log p(f|v) + log F): the word's share of MI(V; F) times F (nats) |
    | "pmi"   | log p(f|v): the pointwise mutual information up to the constant log F (nats) |
    | "paper" | p(v|f) · log p(f|v), as published; never positive, so its largest values pick the
                words with p ≈ 0, the *least* related ones. For comparison only |
    | "logit" | ⟨f, w⟩, the logit lens; T is not applied |
    `temperature="auto"` is the standard deviation of ⟨f, w⟩ over all F·V pairs.

    Returns scores [F, top] float32, descending, and word indices [F, top] int32; ties go to the
    lower index. No gradient. Cost: two passes of 2·F·V·D operations, the second only for logits
    that could not be kept.
    Source: Wu et al. 2025 (arXiv 2502.15576), eq. for MI(V; F) with the dropped H(F) restored.

    >>> mi_topk(torch.eye(2), torch.tensor([[0.0, 4.0], [4.0, 0.0], [1.0, 1.0]]), 2)[1].tolist()
    [[1, 2], [0, 2]]
    """
    features = check.matrix("features", features)
    words = check.matrix("words", words, features.shape[1])
    check.same_device(features=features, words=words)
    check.count("top", top, words.shape[0], "the number of words")
    check.one_of("objective", objective, OBJECTIVES)
    if temperature == "auto":
        temperature = logit_std(features, words)
    if not isinstance(temperature, Real) or not 0 < temperature < float("inf"):
        raise FastsaeError(
            f'temperature: got {temperature!r}, expected a positive number or "auto"'
        )
    return torch.ops.fastsae.mi_topk(
        features.detach(), words.detach(), top, objective, float(temperature), backend or ""
    )


def logit_std(features: Tensor, words: Tensor) -> float:
    """Standard deviation of ⟨f, w⟩ over all pairs, from two [D, D] Gram matrices, never [F, V].

    With f = f' + mean(f) and w = w' + mean(w): L − mean(L) = ⟨f', w'⟩ + ⟨f', mean(w)⟩ +
    ⟨mean(f), w'⟩, whose cross terms sum to zero over all pairs. float64, because massive dimensions
    cancel badly in float32.
    """
    count = features.shape[0] * words.shape[0]
    if count == 0:
        raise FastsaeError('temperature="auto": features or words has no rows')
    mean_f, gram_f = _moments(features.detach())
    mean_w, gram_w = _moments(words.detach())
    square = (gram_f * gram_w).sum()
    square = square + words.shape[0] * (mean_w @ gram_f @ mean_w)
    square = square + features.shape[0] * (mean_f @ gram_w @ mean_f)
    std = float((square / count).sqrt())
    if not 0 < std < float("inf"):
        raise FastsaeError(
            f'temperature="auto": the logits have standard deviation {std}; '
            "check features and words for NaN or constant rows"
        )
    return std


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and centred Gram matrix [D, D] in float64, by tiles: no float64 copy of all rows."""
    count, width = rows.shape
    parts = rows.split(max(1, TILE_BYTES // (16 * max(1, width))))
    # Any centre near the mean will do: what it misses is taken back below.
    centre = sum(part.sum(0, dtype=compute_dtype(rows)).double() for part in parts) / count
    missed = torch.zeros_like(centre)
    gram = centre.new_zeros(width, width)
    edges = [width * i // 4 for i in range(5)]
    # Autocast would round float64 products to bfloat16.
    with torch.autocast(rows.device.type, enabled=False):
        for part in parts:
            centred = part.double() - centre
            missed += centred.sum(0)
            for i, j in pairwise(edges):  # the lower triangle, in four steps
                gram[i:j, :j].addmm_(centred[:, i:j].T, centred[:, :j])
    missed /= count
    gram = gram.tril() + gram.tril(-1).T
    return centre + missed, gram - count * torch.outer(missed, missed)
