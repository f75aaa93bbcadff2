"""What a policy buys and costs at several strengths: topic words against perplexity."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.steering.dose import Dose
from fastsae.steering.hf import attach
from fastsae.steering.policy import Policy


class SweepPoint(NamedTuple):
    """One strength."""

    strength: float
    topic: float  # mean over positions of Σ p(word): probability that a topic word comes next
    perplexity: float  # exp of minus the mean log p of the text's own tokens
    dose: float  # largest ‖change‖ / ‖residual‖ of a token (fastsae.steering.Dose)


@torch.inference_mode()
def sweep(
    model,
    tokenizer,
    sae,
    policy: Policy,
    strengths: Sequence[float],
    *,
    words: Sequence[str],
    texts: Sequence[str],
    layer: int | str | None = None,
) -> list[SweepPoint]:
    """A `SweepPoint` per strength, in the order given; strength 0 is the unsteered model.

    One forward over `texts` (left-padded, one batch) per strength, nothing is generated: p is the
    model's next-token distribution at every token of the texts but the last. words count by the
    first token of " word" and " Word". Choose words that the policy's features were not found by.
    """
    if not strengths or not all(math.isfinite(s) for s in strengths):
        raise FastsaeError(f"strengths: expected finite numbers, got {strengths!r}")
    ids = topic_tokens(tokenizer, words)
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    batch = batch.to(next(model.parameters()).device)
    mask = batch.attention_mask
    if batch.input_ids.shape[1] < 2 or not (mask.sum(1) > 1).all():
        raise FastsaeError("texts: expected texts of two tokens or more")
    points = []
    saes = sae if layer is None else {layer: sae}
    with attach(model, saes, dose=Dose(1e30)) as handle:
        for strength in strengths:
            handle.set(policy, strengths=float(strength))
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
            topic, perplexity = _read(logits, batch.input_ids, mask, ids.to(logits.device))
            dose = max(site.largest_dose for site in handle.sites.values())
            points.append(SweepPoint(float(strength), topic, perplexity, dose))
    return points


def topic_tokens(tokenizer, words: Sequence[str]) -> Tensor:
    """Ids of the tokens that " word" and " Word" begin with: predicting one predicts the word."""
    forms = [" " + form for word in words for form in (word, word.capitalize())]
    firsts = {tokenizer(form, add_special_tokens=False).input_ids[0] for form in forms}
    if not firsts or firsts & set(tokenizer(" ", add_special_tokens=False).input_ids):
        raise FastsaeError(
            f"words: expected words that begin with a token of their own, got {list(words)}"
        )
    return torch.tensor(sorted(firsts))


def _read(logits: Tensor, tokens: Tensor, mask: Tensor, words: Tensor) -> tuple[float, float]:
    """Topic mass and perplexity over the real tokens that follow a real token."""
    mass, likelihood, count = 0.0, 0.0, 0
    for row, ids, real in zip(logits, tokens, mask, strict=True):
        start = int((real != 0).nonzero()[0])
        log_p = row[start:-1].float().log_softmax(-1)
        mass += float(log_p[:, words].exp().sum())
        likelihood += float(log_p.gather(-1, ids[start + 1 :, None]).sum())
        count += log_p.shape[0]
    return mass / count, math.exp(min(-likelihood / count, 700.0))


# --- the trade-off as a picture ------------------------------------------------------------------

_WIDTH, _HEIGHT, _EDGE = 640, 420, 64


def to_svg(points: Sequence[SweepPoint], *, title: str = "") -> str:
    """The curve as an SVG: perplexity (log scale) to the right, topic mass (log scale) upwards."""
    across = [math.log(point.perplexity) for point in points]
    up = [math.log(max(point.topic, 1e-12)) for point in points]

    def place(value: float, values: list[float], start: float, end: float) -> float:
        low, high = min(values), max(values)
        share = 0.5 if high == low else (value - low) / (high - low)
        return start + share * (end - start)

    xs = [place(v, across, _EDGE, _WIDTH - 24) for v in across]
    ys = [place(v, up, _HEIGHT - _EDGE, 40) for v in up]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_EDGE}" y="22" font-size="15">{html.escape(title)}</text>',
        f'<path d="M{_EDGE} 32 V{_HEIGHT - 48} H{_WIDTH - 16}" fill="none" stroke="#888"/>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">perplexity, '
        f"{min(p.perplexity for p in points):.4g} to {max(p.perplexity for p in points):.4g} "
        "(log scale)</text>",
        f'<text transform="translate(18 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">topic '
        f"words, {min(p.topic for p in points):.3g} to {max(p.topic for p in points):.3g} "
        "(log scale)</text>",
        '<polyline fill="none" stroke="#c33" stroke-width="1.5" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        + '"/>',
    ]
    for x, y, point in zip(xs, ys, points, strict=True):
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#c33"><title>strength '
            f"{point.strength:g}: topic {point.topic:.4g}, perplexity {point.perplexity:.4g}, "
            f"dose {point.dose:.3g}</title></circle>"
            f'<text x="{x + 7:.1f}" y="{y - 6:.1f}">{point.strength:g}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
