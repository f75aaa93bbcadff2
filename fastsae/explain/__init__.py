"""Explanations: which vocabulary words each feature stands for, where it fires, and the proof."""

from fastsae.explain.activations import Activation, activation_values, top_activations
from fastsae.explain.corpus import corpus_counts
from fastsae.explain.counts import CorpusCounts
from fastsae.explain.evaluate import evaluate
from fastsae.explain.explanations import Explanations, SAEIdentity
from fastsae.explain.lens import TunedLens, train_lens
from fastsae.explain.mi import explain, feature_vectors
from fastsae.explain.vocabulary import Vocabulary, word_vectors

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
]
