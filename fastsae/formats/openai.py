"""OpenAI's sparse_autoencoder: one .pt per layer of GPT-2 small.

The activation is a name beside the tensors. TopK models, and only those, normalise every row to
(x − μ)/(σ + 1e-5) and undo it. Tied decoders are written out. Source: openai/sparse_autoencoder,
sparse_autoencoder/model.py @4965b94.
"""

import re

from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "openai"
_KEYS = {"pre_bias", "encoder.weight", "latent_bias"}
_STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
_LOCATIONS = {  # in the file's path, behind which _v4 and its like may follow
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
    "mlp_post_act": "mlp.hook_post",
}


def detect(c: Checkpoint) -> bool:
    return c.keys >= _KEYS


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    tied = "decoder.linear.weight" in c.keys
    decoder = "decoder.linear.weight" if tied else "decoder.weight"
    extra = {"activation", "activation_state_dict"} | _STATISTICS
    parts.require_keys(c, NAME, _KEYS | {decoder}, extra)
    d_sae, d_in = parts.vector(c, "latent_bias").numel(), parts.vector(c, "pre_bias").numel()
    state = {
        "W_enc": parts.matrix(c, "encoder.weight", d_sae, d_in, stored="rows"),
        "W_dec": parts.matrix(c, decoder, d_sae, d_in, stored="rows" if tied else "columns"),
        "b_enc": parts.vector(c, "latent_bias", d_sae),
        "b_dec": parts.vector(c, "pre_bias", d_in),
    }
    activation = c.tensors.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise parts.refuse(c, f"activation {activation!r}")
    options = c.tensors.get("activation_state_dict") or {}
    k = int(options["k"]) if activation == "TopK" and "k" in options else None
    if activation == "TopK" and options.get("postact_fn", "ReLU") != "ReLU":
        raise parts.refuse(c, f"TopK with postact_fn {options['postact_fn']!r}")
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation=activation.lower(),
        k=k,
        hook_name=_hook(c.name),
        model_name="gpt2" if "gpt2-small" in c.name else None,
        normalization="layer_norm" if activation == "TopK" else "none",
    )
    return config, state


def _hook(name: str) -> str | None:
    """gpt2-small/{location}[_v5_32k]/autoencoders/{layer}.pt"""
    found = re.search(rf"({'|'.join(_LOCATIONS)})\w*/autoencoders/(\d+)\.pt$", name)
    return f"blocks.{found.group(2)}.{_LOCATIONS[found.group(1)]}" if found else None
