"""Explanations for other programs: JSON lines, Parquet, and Neuronpedia's feature JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastsae.errors import FastsaeError
from fastsae.explain.annotate import Annotations
from fastsae.explain.examples import Examples
from fastsae.explain.explanations import Explanations
from fastsae.explain.labels import Labels
from fastsae.explain.storage import replacing

_BATCH = 256  # features in a file of Neuronpedia's


def records(
    explanations: Explanations,
    *,
    examples: Examples | None = None,
    labels: Labels | None = None,
    annotations: Annotations | None = None,
    features: Sequence[int] | None = None,
) -> Iterator[dict]:
    """A flat record per feature: feature, words, scores; frequency, mean and max where the SAE has
    statistics; label and verdict; categories; active, texts and activations of the texts.

    Every record has the same fields: those that the given parts know.
    """
    for name, part in (("examples", examples), ("labels", labels), ("annotations", annotations)):
        if part is not None and part.digest != explanations.sae.digest:
            raise FastsaeError(f"{name}: belong to another SAE; make them again")
    codes: dict[int, list[str]] = {}
    for entry in annotations.entries if annotations is not None else ():
        codes.setdefault(entry.feature, []).append(entry.category)
    stats = explanations.stats
    for f in range(len(explanations)) if features is None else map(explanations._row, features):
        record = {"feature": f, "words": explanations.words(f), "scores": explanations.scores_of(f)}
        if stats is not None:
            for name in ("frequency", "mean", "max"):
                record[name] = float(getattr(stats, name)[f])
        if labels is not None:
            label = labels.get(f)
            record["label"], record["verdict"] = label[:2] if label else (None, None)
        if annotations is not None:
            record["categories"] = codes.get(f, [])
        if examples is not None:
            known = examples[f] if f in examples else None
            record["active"] = known and known.active
            record["texts"] = [e.text for e in known.examples] if known else []
            record["activations"] = [e.value for e in known.examples] if known else []
        yield record


def write_jsonl(explanations: Explanations, path: str | Path, **parts) -> Path:
    """`records` as JSON lines. parts: the other arguments of `records`."""
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for record in records(explanations, **parts):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def write_parquet(explanations: Explanations, path: str | Path, **parts) -> Path:
    """`records` as a Parquet table; needs pyarrow. parts: the other arguments of `records`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FastsaeError(
            "parquet: pyarrow is not installed; run: pip install pyarrow (or write .jsonl)"
        ) from None
    rows = list(records(explanations, **parts))
    strings, numbers = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float32())
    types = {
        "feature": pyarrow.int32(),
        "words": strings,
        "scores": numbers,
        "frequency": pyarrow.float32(),
        "mean": pyarrow.float32(),
        "max": pyarrow.float32(),
        "label": pyarrow.string(),
        "verdict": pyarrow.string(),
        "categories": strings,
        "active": pyarrow.int64(),
        "texts": strings,
        "activations": numbers,
    }
    present = rows[0] if rows else ("feature", "words", "scores")
    schema = pyarrow.schema([(name, types[name]) for name in present])
    facts = {
        "objective": explanations.objective,
        "temperature": repr(explanations.temperature),
        "model": explanations.model_name,
        "sae": explanations.sae.digest,
    }
    table = pyarrow.Table.from_pylist(rows, schema=schema.with_metadata(facts))
    path = Path(path)
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return path


def write_neuronpedia(
    explanations: Explanations,
    folder: str | Path,
    examples: Examples,
    *,
    features: Sequence[int] | None = None,
    dataset: str = "",
) -> list[Path]:
    """batch-N.json files of 256 features, with the fields of SAEDashboard's Neuronpedia output.

    pos_str and pos_values are the explanation's words and scores, where a dashboard has logits:
    with objective "logit" they are logits. Lists of what is not computed (negative logits, aligned
    neurons, correlated features, the logits' histogram) are empty. An activation's bin is its
    quantile range: all texts here are top activations, so bin_min and bin_max are both the value
    and bin_contains is 0. Every feature needs an entry in `examples`.
    """
    if examples.digest != explanations.sae.digest:
        raise FastsaeError("examples: belong to another SAE; make them again")
    chosen = examples.features if features is None else [explanations._row(f) for f in features]
    if missing := [f for f in chosen if f not in examples]:
        raise FastsaeError(f"features: {missing[0]} has no examples; collect them for it first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(-(-len(chosen) // _BATCH)):
        part = chosen[number * _BATCH : (number + 1) * _BATCH]
        batch = {
            "model_id": explanations.model_name,
            "layer": _layer(explanations.sae.hook_name),
            "sae_set": explanations.sae.hook_name or "",
            "features": [_neuronpedia(explanations, f, examples, dataset) for f in part],
        }
        path = folder / f"batch-{number}.json"
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(batch, ensure_ascii=False), encoding="utf-8")
        written.append(path)
    return written


_NOT_COMPUTED = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_str",
    "neg_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)


def _neuronpedia(ex: Explanations, feature: int, examples: Examples, dataset: str) -> dict:
    known = examples[feature]
    middles = [(a * b) ** 0.5 for a, b in zip(known.edges, known.edges[1:], strict=False)]
    return {
        "feature_index": feature,
        **{name: [] for name in _NOT_COMPUTED},
        "pos_str": ex.words(feature),
        "pos_values": ex.scores_of(feature),
        "frac_nonzero": known.active / examples.tokens if examples.tokens else 0.0,
        "freq_hist_data_bar_values": middles,
        "freq_hist_data_bar_heights": [float(n) for n in known.counts],
        "n_prompts_total": len(known.examples),
        "n_tokens_in_prompt": max((len(e.tokens) for e in known.examples), default=0),
        "dataset": dataset,
        "activations": [
            {
                "bin_min": e.value,
                "bin_max": e.value,
                "bin_contains": 0.0,
                "tokens": list(e.tokens),
                "values": list(e.values),
            }
            for e in known.examples
        ],
    }


def _layer(hook: str | None) -> int:
    digits = [part for part in (hook or "").split(".") if part.isdigit()]
    return int(digits[0]) if digits else 0
