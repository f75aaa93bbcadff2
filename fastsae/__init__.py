"""fastsae explains and steers large language models through sparse autoencoders.

Encode activations into a few active features, explain each feature by the words that share the most
mutual information with it, and change the model's behaviour while it generates by editing features.
"""

from fastsae import ops
from fastsae.errors import FastsaeError

# `explain` and `train` are functions here and names of submodules: importing them now binds the
# functions last, and modules are always imported as `from fastsae.explain.mi import ...`.
from fastsae.explain import Explanations, Vocabulary, explain
from fastsae.ops import BackendError
from fastsae.sae import SAE, FeatureStats, Latents, SAEConfig
from fastsae.steering import (
    Policy,
    ablate,
    add,
    amplify,
    attach,
    calibrate,
    enforce,
    gate,
    steer,
)
from fastsae.train import TrainConfig, train

__version__ = "0.1.0"
__all__ = [
    "SAE",
    "BackendError",
    "Explanations",
    "FastsaeError",
    "FeatureStats",
    "Latents",
    "Policy",
    "SAEConfig",
    "TrainConfig",
    "Vocabulary",
    "ablate",
    "add",
    "amplify",
    "attach",
    "calibrate",
    "enforce",
    "explain",
    "gate",
    "ops",
    "steer",
    "train",
]
