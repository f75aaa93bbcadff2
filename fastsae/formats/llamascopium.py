"""Llamascopium v2 (lm-saes): config.json and sae_weights.safetensors or .pt.

With sparsity_include_decoder_norm the selection looks at h·n, n = ‖W_D[f]‖, and the result is h:
relu is unchanged, jumprelu has θ_f = θ/n_f, topk folds n into the encoder and keeps 1/n_f as the
activation_scale. Dataset norms fold as s = √d/norm: b_E/s_in, b_D/s_out, W_D·s_in/s_out, with the
log threshold as stored, like the authors' fold. topk is ReLU'd, as before their version 2.0 (which
keeps negative latents in rows with fewer than k positive ones). Gated linear encoders, batch-wise
norms and crosscoders are refused.
Source: OpenMOSS Language-Model-SAEs, models/sae.py.
"""

import math

import torch

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "llamascopium"
_KEYS = {"W_E", "b_E", "W_D"}
_LOG = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."


def detect(c: Checkpoint) -> bool:
    inner = c.tensors.get("sae")
    return c.keys >= _KEYS or (isinstance(inner, dict) and set(inner) >= _KEYS)


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    if isinstance(c.tensors.get("sae"), dict):
        c = c.replace(tensors=c.tensors["sae"])
    if c.compat == "saelens":
        raise FastsaeError(f'{c.source}: compat="saelens": SAELens does not read {NAME}')
    if c.cfg.get("sae_type", "sae") not in ("sae", "transcoder"):
        raise parts.refuse(c, f"sae_type {c.cfg['sae_type']!r}")
    if parts.option(c, "use_glu_encoder", False) or "W_E_glu" in c.keys:
        raise parts.refuse(c, "a gated linear encoder (use_glu_encoder)")
    activation = str(c.cfg.get("act_fn", "relu")).lower()
    if activation not in ("relu", "jumprelu", "topk"):
        raise parts.refuse(c, f"act_fn = {activation!r}")
    biased = parts.option(c, "use_decoder_bias", True)
    wanted = (
        _KEYS | ({"b_D"} if biased else set()) | ({_LOG} if activation == "jumprelu" else set())
    )
    parts.require_keys(c, NAME, wanted, {key for key in c.keys if key.startswith(_NORM)})
    d_sae = parts.vector(c, "b_E").numel()
    sizes = set(parts.tensor(c, "W_D").shape) - {d_sae}
    d = sizes.pop() if len(sizes) == 1 else d_sae
    parts.agree(c, d_model=d)
    W_E = parts.exact(parts.matrix(c, "W_E", d_sae, d, stored="columns"))
    state = {
        "W_enc": W_E,
        "W_dec": parts.exact(parts.matrix(c, "W_D", d_sae, d, stored="rows")),
        "b_enc": parts.exact(parts.vector(c, "b_E", d_sae)),
        "b_dec": parts.exact(parts.vector(c, "b_D", d)) if biased else W_E.new_zeros(d),
    }
    if activation == "jumprelu":
        state["threshold"] = parts.per_feature(c, _LOG, d_sae).double().exp().float()
    hook, hook_out = parts.text(c, "hook_point_in"), parts.text(c, "hook_point_out")
    normalization = c.cfg.get("norm_activation", "dataset-wise")
    if normalization == "dataset-wise":
        s_in, s_out = (_norm_scale(c, name, d) for name in (hook, hook_out or hook))
        state = parts.scaled(state, b_enc=1 / s_in, b_dec=1 / s_out, W_dec=s_in / s_out)
    elif normalization != "inference":
        raise parts.refuse(c, f"norm_activation = {normalization!r}")
    rescaled = parts.option(c, "sparsity_include_decoder_norm", True)
    if rescaled:
        state = _by_decoder_norm(state, activation)
    transcoder = hook_out is not None and hook_out != hook
    config = parts.config(
        c,
        d_in=d,
        d_sae=d_sae,
        activation=activation,
        k=c.cfg.get("top_k") if activation == "topk" else None,
        apply_b_dec_to_input=False,
        hook_name=hook,
        model_name=parts.text(c, "model_name"),
        d_out=d if transcoder else None,
        hook_name_out=hook_out if transcoder else None,
        activation_scale="activation_scale" in state,
    )
    return config, state


def _by_decoder_norm(state: parts.State, activation: str) -> parts.State:
    norms, inverse = parts.decoder_norms(state)
    if activation == "jumprelu":
        return parts.scaled(state, threshold=inverse.clamp(max=1e30))
    if activation == "topk":
        scale = torch.where(norms > 0, inverse, 0).float()
        return parts.scaled(state, W_enc=norms, b_enc=norms) | {"activation_scale": scale}
    return state


def _norm_scale(c: Checkpoint, hook: str | None, d: int) -> float:
    norm = c.tensors.get(f"{_NORM}{hook}")
    if not isinstance(norm, torch.Tensor) or norm.numel() != 1:
        raise parts.refuse(
            c,
            f"norm_activation = 'dataset-wise' without {_NORM}{hook}",
            'pass overrides={"norm_activation": "inference"} if it is folded already',
        )
    return math.sqrt(d) / parts.positive(c, f"{_NORM}{hook}", float(norm))
