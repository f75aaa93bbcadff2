"""Two linear layers and a ReLU in one pickle: Goodfire's Llama SAEs (`encoder_linear`) and
qresearch's DeepSeek-R1 SAE (`encoder`). Nothing is subtracted from the input; the layer is in the
file's name (…-l19.pth). Source: the released repositories and SAELens 6.54."""

import re

from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "linear"
_MODELS = {
    "Llama-3.1-8B-Instruct-SAE-l19": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama-3.3-70B-Instruct-SAE-l50": "meta-llama/Llama-3.3-70B-Instruct",
    "DeepSeek-R1-Distill-Llama-8B": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}


def _keys(prefix: str) -> set[str]:
    return {
        f"{layer}{prefix}.{what}" for layer in ("encoder", "decoder") for what in ("weight", "bias")
    }


def detect(c: Checkpoint) -> bool:
    goodfire = c.keys >= _keys("_linear")
    return goodfire or (c.suffix in (".pt", ".pth") and c.keys >= _keys("") and not c.cfg)


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    suffix = "_linear" if "encoder_linear.weight" in c.keys else ""
    encoder, decoder = f"encoder{suffix}", f"decoder{suffix}"
    parts.require_keys(c, NAME, _keys(suffix))
    d_sae = parts.vector(c, f"{encoder}.bias").numel()
    d_in = parts.vector(c, f"{decoder}.bias").numel()
    state = {
        "W_enc": parts.matrix(c, f"{encoder}.weight", d_sae, d_in, stored="rows"),
        "W_dec": parts.matrix(c, f"{decoder}.weight", d_sae, d_in, stored="columns"),
        "b_enc": parts.vector(c, f"{encoder}.bias", d_sae),
        "b_dec": parts.vector(c, f"{decoder}.bias", d_in),
    }
    file = c.name.rpartition("/")[2]
    layer = re.search(r"(?:^|[^a-zA-Z])l(\d+)", file)
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation="relu",
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{layer.group(1)}.hook_resid_post" if layer else None,
        model_name=next((model for part, model in _MODELS.items() if part in c.name), None),
    )
    return config, state
