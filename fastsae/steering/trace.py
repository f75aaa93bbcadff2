"""What chosen features read while a model runs: per-token activations, as arrays and as HTML."""

import html
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops.decode import gather_dot
from fastsae.sae import SAE
from fastsae.steering.lower import check_features, fetch_rows


class TracedRow(NamedTuple):
    """One batch row, its T real tokens in order of position."""

    positions: Tensor  # [T] int64
    ids: Tensor | None  # [T] int64, token ids; None when the model was given embeddings
    before: Tensor  # [T, F] float32, activations of the residual the layer left
    after: Tensor  # [T, F] float32, activations of the residual the policies left


class Trace:
    """Activations a_f = h_f·1[h_f > max(θ_f, 0)] of some features for every token that runs.

    h_f = ⟨w_f, x⟩ + b_f, θ the SAE's own threshold; a top-k SAE's membership is not asked, so there
    it is ReLU(h_f). A position that runs again (assisted decoding, a second prompt) keeps its
    latest reading. Rows must stay rows: beams, which swap them, and packed batches are errors.
    """

    def __init__(self, sae: SAE, features):
        listed = tuple(features) if not isinstance(features, int) else (features,)
        check_features(sae, listed)
        if not listed or min(listed) < 0:
            raise FastsaeError(f"features: expected indices ≥ 0, got {features!r}")
        self.features = listed
        self._weights = fetch_rows(sae, [(f, sae.config.has_threshold) for f in listed])
        self._forwards: list[tuple[Tensor, ...]] = []

    def record(self, before: Tensor, after: Tensor, where) -> None:
        """Called by the hook: residuals [B, T, D] around the policies."""
        if torch.compiler.is_compiling():
            raise FastsaeError("trace: a compiled model runs no Python to record; trace it eagerly")
        if where.packed:
            raise FastsaeError("trace: generate_batch packs its rows; trace with generate")
        positions, real = where.positions(before)
        shape = before.shape[:2]
        if self._forwards and self._forwards[-1][0].shape[0] != shape[0]:
            raise FastsaeError(
                f"trace: the batch went from {self._forwards[-1][0].shape[0]} to {shape[0]} rows; "
                "trace one batch at a time, without beams"
            )
        real = torch.ones(shape, dtype=torch.bool) if real is None else real
        ids = where.input_ids
        parts = (
            positions.expand(shape),
            real.expand(shape),
            torch.full(shape, -1) if ids is None else ids,
            self._read(before),
            self._read(after),
        )
        self._forwards.append(tuple(part.detach().cpu().clone() for part in parts))

    def _read(self, residual: Tensor) -> Tensor:
        enc, bias, theta, _ = (w.to(residual.device) for w in self._weights)
        x = residual.detach().reshape(-1, residual.shape[-1]).float()
        every = torch.arange(len(self.features), dtype=torch.int32, device=x.device)
        h = gather_dot(x, enc, every.expand(x.shape[0], -1)) + bias
        acts = torch.where(h > theta.clamp(min=0), h, 0.0)
        return acts.view(*residual.shape[:2], -1)

    def rows(self) -> list[TracedRow]:
        """What was read so far, a `TracedRow` for each row of the batch."""
        if not self._forwards:
            return []
        parts = [torch.cat(each, dim=1) for each in zip(*self._forwards, strict=True)]
        traced = []
        for positions, real, ids, before, after in zip(*parts, strict=True):
            latest = {int(p): i for i, p in enumerate(positions) if real[i]}
            order = torch.tensor([latest[p] for p in sorted(latest)], dtype=torch.long)
            known = None if (ids < 0).any() else ids[order]
            traced.append(TracedRow(positions[order], known, before[order], after[order]))
        return traced

    def to_html(self, tokenizer, *, names: dict[int, str] | None = None) -> str:
        """A page: the text of each row once per feature, tokens coloured by activation.

        The colour is linear from white at 0 to red at the feature's largest reading on the page;
        hovering shows the numbers. names: {feature: what to call it}.
        """
        rows, parts = self.rows(), [_HEAD]
        for column, feature in enumerate(self.features):
            peak = max((float(row.after[:, column].max()) for row in rows), default=0.0)
            title = (names or {}).get(feature, "")
            parts.append(
                f"<h2>feature {feature} {html.escape(title)}</h2>"
                f"<p class=scale>largest activation {peak:.4g}</p>"
            )
            for row in rows:
                parts.append("<p>" + _spans(row, column, peak, tokenizer) + "</p>")
        return "\n".join([*parts, "</body></html>\n"])


_HEAD = """<!doctype html><html lang=en><head><meta charset=utf-8><title>Feature activations</title>
<style>body{font:16px/1.7 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
span{white-space:pre-wrap;border-radius:.2em}.scale{color:#666}</style></head><body>"""


def _spans(row: TracedRow, column: int, peak: float, tokenizer) -> str:
    spans = []
    for i, position in enumerate(row.positions.tolist()):
        text = f"[{position}]" if row.ids is None else tokenizer.decode([int(row.ids[i])])
        before, after = float(row.before[i, column]), float(row.after[i, column])
        share = after / peak if peak > 0 else 0.0
        spans.append(
            f'<span style="background:rgba(220,50,30,{share:.3f})" '
            f'title="position {position}: {after:.4g} (before steering {before:.4g})">'
            f"{html.escape(text)}</span>"
        )
    return "".join(spans)
