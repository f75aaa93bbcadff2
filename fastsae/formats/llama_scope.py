"""Llama Scope: checkpoints/final.safetensors and hyperparams.json (v1), or
sae_weights.safetensors and config.json with a log threshold (R1-distill).

compat="authors" (default) folds the dataset's average norms as the authors' library does:
s = √d/norm; b_enc/s_in, b_dec/s_out, W_dec·s_in/s_out, and gates h·n > θ with n = ‖W_dec[f]‖. v1
has unit decoder rows after that, and activations h·n; R1-distill keeps activations h. compat=
"saelens" is what SAELens computes from v1: s_in·W_enc x + b_enc > θ·s_in without n, other gates
and magnitudes. Source: lm-saes, SAELens 6.54, Llamascopium#128.
"""

import math

from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "llama_scope"
_KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_LOG = "log_jumprelu_threshold"


def detect(c: Checkpoint) -> bool:
    return c.keys >= _KEYS and (_LOG in c.keys or "jump_relu_threshold" in c.cfg)


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    distilled = _LOG in c.keys
    parts.require_keys(c, NAME, _KEYS | ({_LOG} if distilled else set()))
    if c.cfg.get("act_fn", "jumprelu").lower() != "jumprelu":
        raise parts.refuse(c, f"act_fn = {c.cfg['act_fn']!r}")
    for name in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if c.cfg.get(name):
            raise parts.refuse(c, f"{name} = {c.cfg[name]!r}")
    d_sae, d = parts.vector(c, "encoder.bias").numel(), parts.vector(c, "decoder.bias").numel()
    parts.agree(c, d_model=d, d_sae=d_sae)
    state = {
        "W_enc": parts.exact(parts.matrix(c, "encoder.weight", d_sae, d, stored="rows")),
        "W_dec": parts.exact(parts.matrix(c, "decoder.weight", d_sae, d, stored="columns")),
        "b_enc": parts.exact(parts.vector(c, "encoder.bias", d_sae)),
        "b_dec": parts.exact(parts.vector(c, "decoder.bias", d)),
    }
    if distilled:
        state["threshold"] = parts.per_feature(c, _LOG, d_sae).double().exp().float()
    else:
        theta = parts.positive(c, "jump_relu_threshold", c.cfg["jump_relu_threshold"])
        state["threshold"] = state["b_enc"].new_full((d_sae,), theta)
    s_in, s_out = _norm_scales(c, d)
    if c.compat == "saelens":
        theta = 1.0 if distilled else s_in
        state = parts.scaled(state, W_enc=s_in, W_dec=1 / s_in, b_dec=1 / s_in, threshold=theta)
    else:
        state = parts.scaled(state, b_enc=1 / s_in, b_dec=1 / s_out, W_dec=s_in / s_out)
        if parts.option(c, "sparsity_include_decoder_norm", True):
            inverse = parts.decoder_norms(state)[1]
            state = (
                parts.scaled(state, threshold=inverse.clamp(max=1e30))
                if distilled
                else parts.unit_decoder(state)
            )
    hook, hook_out = parts.text(c, "hook_point_in"), parts.text(c, "hook_point_out")
    transcoder = hook_out is not None and hook_out != hook
    config = parts.config(
        c,
        d_in=d,
        d_sae=d_sae,
        activation="jumprelu",
        apply_b_dec_to_input=False,
        hook_name=hook,
        model_name="meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in c.name else None,
        d_out=d if transcoder else None,
        hook_name_out=hook_out if transcoder else None,
    )
    return config, state


def _norm_scales(c: Checkpoint, d: int) -> tuple[float, float]:
    """√d / average norm, of the input and the output; 1 when the weights are folded already."""
    kind = c.cfg.get("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise parts.refuse(c, f"norm_activation = {kind!r}")
    norms = c.cfg.get("dataset_average_activation_norm")
    if not isinstance(norms, dict) or not {"in", "out"} <= set(norms):
        raise parts.refuse(
            c,
            "norm_activation = 'dataset-wise' without dataset_average_activation_norm",
            'pass overrides={"dataset_average_activation_norm": {"in": ..., "out": ...}}',
        )
    found = (parts.positive(c, f"the norm {side!r}", norms[side]) for side in ("in", "out"))
    s_in, s_out = (math.sqrt(d) / norm for norm in found)
    return s_in, s_out
