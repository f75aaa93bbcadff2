"""Explanations: which vocabulary words each feature stands for, and where it fires."""

from fastsae.explain.activations import Activation, activation_values, top_activations
from fastsae.explain.explanations import Explanations, SAEIdentity
from fastsae.explain.mi import explain, feature_vectors
from fastsae.explain.vocabulary import Vocabulary, word_vectors

__all__ = [
    "Activation",
    "Explanations",
    "SAEIdentity",
    "Vocabulary",
    "activation_values",
    "explain",
    "feature_vectors",
    "top_activations",
    "word_vectors",
]
