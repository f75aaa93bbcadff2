"""mwhanna's transcoders: layer_N.safetensors, config.yaml and wandb-config.yaml beside it.

ReLU (jumprelu where a threshold is stored), from the input of the MLP to its output, both after the
norm's weight; optional skip connection. One release stores W_dec transposed: shapes decide.
Source: the released repositories, circuit-tracer and SAELens 6.54.
"""

import re

from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "mwhanna"
_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_THRESHOLD = "activation_function.threshold"


def detect(c: Checkpoint) -> bool:
    named = re.search(r"layer_\d+\.safetensors$", c.name)
    return bool(named) and c.keys >= _KEYS and "d_sae" not in c.cfg


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    parts.require_keys(c, NAME, _KEYS, {"W_skip", _THRESHOLD})
    d_sae, d_out = parts.vector(c, "b_enc").numel(), parts.vector(c, "b_dec").numel()
    parts.agree(c, d_model=d_out, d_feature=d_sae)
    state = {
        "W_enc": parts.matrix(c, "W_enc", d_sae, d_out, stored="rows"),
        "W_dec": parts.matrix(c, "W_dec", d_sae, d_out, stored="rows"),
        "b_enc": parts.vector(c, "b_enc", d_sae),
        "b_dec": parts.vector(c, "b_dec", d_out),
    }
    if _THRESHOLD in c.keys:
        state["threshold"] = parts.exact(parts.per_feature(c, _THRESHOLD, d_sae))
    if "W_skip" in c.keys:
        state["W_skip"] = parts.matrix(c, "W_skip", d_out, d_out, stored="rows")
    layer = parts.number_in(c.name, r"layer_(\d+)\.safetensors$")
    places = [parts.text(c, name) for name in ("feature_input_hook", "feature_output_hook")]
    hook, hook_out = (
        f"blocks.{layer}.{place or default}" if layer is not None else None
        for place, default in zip(places, ("mlp.hook_in", "hook_mlp_out"), strict=True)
    )
    config = parts.config(
        c,
        d_in=d_out,
        d_sae=d_sae,
        activation="jumprelu" if "threshold" in state else "relu",
        apply_b_dec_to_input=False,
        hook_name=hook,
        model_name=parts.text(c, "model_name"),
        d_out=d_out,
        hook_name_out=hook_out,
        skip="W_skip" in state,
    )
    return config, state
