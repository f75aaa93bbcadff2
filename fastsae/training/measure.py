"""What a finished SAE does on real activations: feature statistics, FVU, L0."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops.reference import add_rows
from fastsae.sae import SAE, FeatureStats

_ROWS = 4096


@torch.no_grad()
def feature_stats(sae: SAE, batches: Iterable[Tensor]) -> FeatureStats:
    """Frequency, mean when active and maximum of every feature over batches [N, D]."""
    f, device = sae.config.d_sae, sae.W_enc.device
    counts = torch.zeros(f, dtype=torch.float64, device=device)
    sums = torch.zeros(f, dtype=torch.float64, device=device)
    peaks = torch.zeros(f, device=device)
    tokens = 0
    for batch in batches:
        for x in batch.split(_ROWS):
            z = sae.encode(x.to(device).float())
            index, values = z.indices.flatten().long(), z.values.flatten()
            add_rows(counts, index, (values > 0).double())
            add_rows(sums, index, values.double())
            peaks.scatter_reduce_(0, index, values, "amax")
            tokens += len(x)
    if not tokens:
        raise FastsaeError("batches: no activations to measure the features on")
    mean = sums / counts.clamp(min=1)
    return FeatureStats((counts / tokens).float(), mean.float(), peaks, tokens)


@torch.no_grad()
def reconstruction(sae: SAE, batches: Iterable[Tensor]) -> dict[str, float]:
    """fvu = Σ ‖x̂ − x‖² / Σ ‖x − x̄‖², l0 = active features per token, over all batches [N, D].

    rms = √(Σ ‖x − x̄‖² / (N·D)), the centred per-dimension size of x: a unit for strengths.
    """
    sae.config.require_plain("measuring a reconstruction of its own input")
    device = sae.W_enc.device
    error = square = active = 0.0
    total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
    tokens = 0
    for batch in batches:
        for rows in batch.split(_ROWS):
            x = rows.to(device).float()
            z = sae.encode(x)
            error += float((sae.decode(z).double() - x).square().sum())
            square += float(x.double().square().sum())
            active += float(z.counts.sum())
            total += x.double().sum(0)
            tokens += len(x)
    if not tokens:
        raise FastsaeError("batches: no activations to measure the SAE on")
    variance = square - float(total.square().sum()) / tokens
    rms = math.sqrt(max(variance, 0.0) / (tokens * sae.config.d_in))
    fvu = error / max(variance, 1e-300)
    return {"fvu": fvu, "l0": active / tokens, "rms": rms, "tokens": tokens}
