"""fastsae explains and steers large language models through sparse autoencoders.

Encode activations into a few active features, explain each feature by the words that share the most
mutual information with it, and change the model's behaviour while it generates by editing features.
"""

from fastsae import ops
from fastsae.errors import FastsaeError
from fastsae.sae import SAE, FeatureStats, Latents, SAEConfig

__version__ = "0.1.0"
__all__ = ["SAE", "FastsaeError", "FeatureStats", "Latents", "SAEConfig", "ops"]
