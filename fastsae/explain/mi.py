"""Explain every feature by the vocabulary words that share the most information with it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.explanations import Explanations, identity_of
from fastsae.explain.vocabulary import Vocabulary, word_vectors
from fastsae.models import final_norm, hidden_size
from fastsae.ops.mi import OBJECTIVES, logit_std, mi_topk
from fastsae.sae import SAE

if TYPE_CHECKING:
    from fastsae.explain.counts import CorpusCounts
    from fastsae.explain.lens import TunedLens

NORM_ROWS = 8192
# What won in benchmarks/results/explanations.json with texts, and without.
WITH_TEXTS, WITHOUT_TEXTS = "corpus-mi", "pmi"


@torch.no_grad()
def feature_vectors(
    sae: SAE,
    model,
    *,
    translator: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """feature_f = norm(translator(W_dec[f])): what the model's output layer sees of a feature.

    norm is the model's own final norm, run in float32 with its weights cast to float32 (a Gemma
    norm multiplies by 1 + w, so the module is applied, not rewritten); no final norm: identity.
    translator: a tuned lens of the SAE's layer, [n, D] -> [n, D] in float32, applied first.
    Returns [F, D] float32 on `device` (default: the SAE's). Raises FastsaeError when the decoder
    rows are not vectors of the model's residual stream.
    """
    width, hook = hidden_size(model), sae.config.hook_name or ""
    rows = sae.W_dec.detach()
    if rows.shape[1] != width:
        raise FastsaeError(
            f"sae: its decoder rows have width {rows.shape[1]}, the model's residual stream has "
            f"{width}; words explain only what is written into the residual stream"
        )
    if hook.endswith(("hook_z", "hook_q", "hook_k", "hook_v")):
        raise FastsaeError(
            f"sae: its hook {hook} lies inside an attention head, not in the residual stream; "
            "explain an SAE of resid, attn_out or mlp_out"
        )
    device = torch.device(rows.device if device is None else device)
    norm = _norm_in_fp32(final_norm(model), device)
    out = torch.empty(rows.shape, dtype=torch.float32, device=device)
    for part, target in zip(rows.split(NORM_ROWS), out.split(NORM_ROWS), strict=True):
        part = part.to(device, torch.float32)
        target.copy_(norm(part if translator is None else translator(part)))
    return out


def _norm_in_fp32(norm: torch.nn.Module | None, device: torch.device):
    if norm is None:
        return lambda x: x
    state = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    state = {
        name: t.to(device, torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in state.items()
    }

    def apply(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.func.functional_call(norm, state, (x,))

    return apply


@torch.no_grad()
def explain(
    sae: SAE,
    model,
    tokenizer,
    vocab: Vocabulary | Sequence[str] | None = None,
    objective: str | None = None,
    top: int = 20,
    *,
    texts: Iterable[str] | None = None,
    window: int | str = "word",
    counts: "CorpusCounts | None" = None,
    temperature: float | str = "auto",
    lens: "TunedLens | None" = None,
    translator: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Explanations:
    """The `top` words v of the largest score(f, v) for every feature f.

    L[f, v] = ⟨feature_f, word_v⟩ (`feature_vectors`, `word_vectors`), p(v|f) = softmax_v(L/T),
    p(f|v) = softmax_f(L/T), with a uniform prior over the F features.

    | objective | score(f, v) |
    |---|---|
    | "corpus-mi" | ± I(v occurs; f is active) over passages of texts, in nats, minus where they
    avoid each other (`corpus_counts`, `signed_information`). Needs `texts` or `counts` |
    | "mi"    | p(v|f) · (log p(f|v) + log F): the word's contribution to I(V; F), times F (nats) |
    | "pmi"   | log p(f|v): how strongly the word points to this feature among all features |
    | "logit" | L, the logit lens |
    | "paper" | p(v|f) · log p(f|v), the ranking as published. It lost the constant log F, so it is
    never positive and its largest values belong to the words with p(v|f) ≈ 0: it lists the words
    *least* related to the feature. For comparison only |

    objective: default "corpus-mi" when texts or counts are given, else "pmi": what names the words
    that activate a feature in held-out text best (docs/explain.md).
    sae: an SAE on the residual stream of `model`, a Hugging Face causal LM; "corpus-mi" runs it on
    the texts, the others read its final norm and output embedding only. vocab: a Vocabulary or
    words; default `Vocabulary.default(5000)`. top: words per feature, at most the vocabulary's.
    texts, window: as in `corpus_counts`; counts: made before, of the same SAE and vocabulary.
    temperature: T, or "auto" for the standard deviation of L over all pairs; "logit" and
    "corpus-mi" do not use it. lens: a TunedLens of the SAE's layer, or translator: any map as in
    `feature_vectors`; of the objectives that read L. device: where to compute (default: the SAE's).
    Deterministic; ties go to the lower word index.
    Raises FastsaeError for a mistake in any argument.

    >>> ex = explain(sae, model, tokenizer, Vocabulary.default(5000))  # doctest: +SKIP
    >>> ex.words(7)[:3], ex.search("music guitar", top=5)  # doctest: +SKIP
    """
    from_texts = texts is not None or counts is not None
    objective = objective or (WITH_TEXTS if from_texts else WITHOUT_TEXTS)
    if vocab is None and counts is not None:
        vocab = counts.vocab
    vocab = _checked(objective, top, vocab)
    made_with: dict[str, object] = {}
    if objective == WITH_TEXTS:
        if lens is not None or translator is not None:
            raise FastsaeError('lens: "corpus-mi" reads texts, not logits; leave the lens out')
        counts = _counts(sae, model, tokenizer, vocab, texts, window, counts)
        scores, indices = counts.top(min(top, len(vocab)))
        temperature = 1.0
        made_with = {
            "window": counts.window, "passages": counts.passages, "tokens": counts.tokens,
        }  # fmt: skip
    else:
        if from_texts:
            raise FastsaeError(
                f'texts, counts: objective "{objective}" reads none; leave them out, or use '
                '"corpus-mi"'
            )
        if lens is not None:
            if translator is not None:
                raise FastsaeError("lens, translator: give one of the two")
            lens.check(model, sae.config.hook_name)
            translator = lens.directions
            made_with = {"lens": {"hook": lens.hook, "digest": lens.digest}}
        features = feature_vectors(sae, model, translator=translator, device=device)
        words = word_vectors(model, tokenizer, vocab).to(features.device)
        if objective == "logit":
            temperature = 1.0
        elif temperature == "auto":
            temperature = logit_std(features, words)
        scores, indices = mi_topk(
            features,
            words,
            min(top, len(vocab)),
            objective=objective,
            temperature=temperature,
            backend=backend,
        )
    stats = sae.stats
    return Explanations(
        scores.float().cpu(),
        indices.cpu(),
        vocab,
        objective,
        float(temperature),
        _name_of(model),
        identity_of(sae),
        None if stats is None else stats._replace(**_on_cpu(stats)),
        made_with,
    )


def _counts(sae, model, tokenizer, vocab, texts, window, counts) -> "CorpusCounts":
    """The counts given, checked, or those of the texts."""
    if counts is None:
        if texts is None:
            raise FastsaeError(
                'texts: objective "corpus-mi" counts words and features in texts; give texts= or '
                "counts=, or use an objective that needs none (pmi)"
            )
        from fastsae.explain.corpus import corpus_counts

        return corpus_counts(sae, model, tokenizer, texts, vocab, (window,))[window]
    if texts is not None:
        raise FastsaeError("texts, counts: give one of the two")
    if counts.sae.digest != identity_of(sae).digest:
        raise FastsaeError("counts: made with another SAE; count again with this one")
    if counts.vocab.words != vocab.words:
        raise FastsaeError("counts: made with another vocabulary; leave vocab out, or count again")
    return counts


def _checked(objective: str, top: int, vocab: Vocabulary | Sequence[str] | None) -> Vocabulary:
    known = (*OBJECTIVES, WITH_TEXTS)
    if objective not in known:
        raise FastsaeError(f"objective: got {objective!r}, accepted are {', '.join(known)}")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise FastsaeError(f"top: got {top!r}, accepted is an integer of 1 or more")
    if vocab is None:
        return Vocabulary.default()
    return vocab if isinstance(vocab, Vocabulary) else Vocabulary(vocab)


def _on_cpu(stats) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in stats._asdict().items() if isinstance(t, Tensor)}


def _name_of(model) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name
