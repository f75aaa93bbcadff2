"""Explanations: which vocabulary words each feature stands for, where it fires, and the proof."""

import importlib

from fastsae.explain.activations import Activation, activation_values, top_activations
from fastsae.explain.corpus import corpus_counts
from fastsae.explain.counts import CorpusCounts
from fastsae.explain.evaluate import evaluate
from fastsae.explain.explanations import Explanations, SAEIdentity
from fastsae.explain.lens import TunedLens, train_lens
from fastsae.explain.mi import explain, feature_vectors
from fastsae.explain.vocabulary import Vocabulary, word_vectors

# What is done with explanations: its modules are imported when a name is asked for.
_LATER = {
    "annotate": ("Annotation", "Annotations", "Category", "annotate_by_lexicon",
                 "annotate_by_model", "categories"),
    "baselines": ("NGram", "ngrams"),
    "chat": ("Cached", "Chat", "Endpoint", "LocalModel", "Reply"),
    "examples": ("Example", "Examples", "FeatureExamples", "collect_examples",
                 "counts_and_examples"),
    "export": ("records", "write_jsonl", "write_neuronpedia", "write_parquet"),
    "finder": ("Finder", "Hit"),
    "labels": ("Label", "Labels", "label_features"),
    "report": ("write_html",),
    "sharded": ("Decoder", "explain_sharded"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}

__all__ = [
    "Activation",
    "CorpusCounts",
    "Explanations",
    "SAEIdentity",
    "TunedLens",
    "Vocabulary",
    "activation_values",
    "corpus_counts",
    "evaluate",
    "explain",
    "feature_vectors",
    "top_activations",
    "train_lens",
    "word_vectors",
    *_MODULE_OF,
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
