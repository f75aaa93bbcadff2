"""SAELens: cfg.json + sae_weights.safetensors, W_enc [d_in, d_sae] and W_dec [d_sae, d_in].

Read: standard (ReLU), topk, jumprelu and gated of version 6, and the flat cfg.json before it.
Written: version 6. batchtopk is stored as jumprelu with one threshold in every entry, and a gated
SAE, which is a jumprelu SAE in other words, becomes one on load. What cannot be represented
exactly is refused by name.
"""

from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.sae import SAEConfig

NAME = "saelens"
_ACTIVATION = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "jumprelu"}
_ARCHITECTURE = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
}
_SHARED = {"W_enc", "W_dec", "b_dec"}
_KEYS = {
    "standard": _SHARED | {"b_enc"},
    "topk": _SHARED | {"b_enc"},
    "jumprelu": _SHARED | {"b_enc", "threshold"},
    "gated": _SHARED | {"b_gate", "b_mag", "r_mag"},
}


def detect(keys: set[str], cfg: dict[str, Any]) -> bool:
    return keys >= _SHARED and ("b_enc" in keys or "b_gate" in keys) and "d_sae" in cfg


def to_fastsae(
    cfg: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> tuple[SAEConfig, dict[str, Tensor]]:
    cfg = _version_6(cfg) if "metadata" not in cfg else cfg
    architecture, metadata = cfg.get("architecture"), cfg.get("metadata") or {}
    if not isinstance(architecture, str) or architecture not in _ACTIVATION:
        raise FastsaeError(
            f"{source}: architecture {architecture!r} cannot be represented; "
            f"accepted are {', '.join(_ACTIVATION)}"
        )
    if not isinstance(metadata, dict):
        raise FastsaeError(f"{source}: metadata is {metadata!r}, expected a JSON object")
    _refuse_unfolded(cfg, source)
    wanted = _KEYS[architecture]
    if set(tensors) != wanted:
        raise FastsaeError(
            f"{source}: a {architecture} SAE has the keys {sorted(wanted)}; "
            f"missing {sorted(wanted - set(tensors))}, unknown {sorted(set(tensors) - wanted)}"
        )
    encoder_bias = "b_mag" if architecture == "gated" else "b_enc"
    d_in, d_sae = tensors["b_dec"].numel(), tensors[encoder_bias].numel()
    for name, value in (("d_in", d_in), ("d_sae", d_sae)):
        if cfg.get(name, value) != value:
            raise FastsaeError(
                f"{source}: cfg.json says {name} = {cfg[name]!r}, the biases say {value}"
            )
    for name, tensor in tensors.items():
        shape = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
        expected = shape.get(name, [d_sae])
        if list(tensor.shape) != expected:
            raise FastsaeError(
                f"{source}: {name} has shape {list(tensor.shape)}, expected {expected}"
            )
    try:
        config = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            activation=_ACTIVATION[architecture],
            k=cfg.get("k") if architecture == "topk" else None,
            apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
            hook_name=metadata.get("hf_hook_name") or metadata.get("hook_name"),
            model_name=metadata.get("model_name"),
            metadata=dict(metadata),
        )
    except FastsaeError as error:
        raise FastsaeError(f"{source}: cfg.json: {error}") from error
    return config, _state(architecture, cfg, tensors)


def _state(architecture: str, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {**tensors, "W_enc": tensors["W_enc"].T}
    if architecture == "jumprelu":
        state["threshold"] = _exact(tensors["threshold"])
    if architecture == "gated":
        # 1[π > 0]·ReLU(e^r·Wh + b_mag) with π = Wh + b_gate: π > 0 is e^r·Wh + b_mag > θ.
        scale = state.pop("r_mag").double().exp()
        gate, b_mag = state.pop("b_gate").double(), state.pop("b_mag")
        dtype = tensors["W_enc"].dtype
        state["W_enc"] = (state["W_enc"].double() * scale[:, None]).to(_at_least_float32(dtype))
        state["b_enc"] = b_mag
        state["threshold"] = (b_mag.double() - scale * gate).to(_at_least_float32(dtype))
    if cfg.get("rescale_acts_by_decoder_norm"):
        # h·n is ranked and its code divided by n again: n moves from the decoder to the encoder.
        dtype = _at_least_float32(tensors["W_dec"].dtype)
        norm = tensors["W_dec"].double().norm(dim=1)
        state["W_enc"] = (state["W_enc"].double() * norm[:, None]).to(dtype)
        state["b_enc"] = (state["b_enc"].double() * norm).to(dtype)
        # A zero row stays zero; its latent is never active, as n = 0 silences it.
        divisor = norm.clamp(min=torch.finfo(dtype).tiny)
        state["W_dec"] = (state["W_dec"].double() / divisor[:, None]).to(dtype)
    return state


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _exact(threshold: Tensor) -> Tensor:
    return threshold.to(_at_least_float32(threshold.dtype))


def _version_6(old: dict[str, Any]) -> dict[str, Any]:
    """The flat cfg.json that SAELens wrote before version 6, in the form of version 6."""
    cfg = dict(old)
    cfg.setdefault("architecture", "standard")
    options = cfg.get("activation_fn_kwargs")
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":
        cfg["architecture"] = "topk"
        cfg["k"] = options.get("k") if isinstance(options, dict) else cfg.get("k")
    if isinstance(cfg.get("normalize_activations"), bool):
        scaled = cfg["normalize_activations"]
        cfg["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    hook = cfg.get("hook_name") or cfg.get("hook_point")
    if isinstance(hook, str) and "hook_z" in hook:
        cfg.setdefault("reshape_activations", "hook_z")
    found = {"hook_name": hook, "model_name": cfg.get("model_name")}
    cfg["metadata"] = {name: value for name, value in found.items() if value is not None}
    return cfg


def _refuse_unfolded(cfg: dict[str, Any], source: str) -> None:
    """Settings that change the numbers and are not represented: refuse, never approximate."""
    for name in ("normalize_activations", "reshape_activations"):
        if cfg.get(name) not in ("none", None):
            raise FastsaeError(f"{source}: {name} = {cfg[name]!r} cannot be represented exactly")


def cfg_of(config: SAEConfig) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "architecture": _ARCHITECTURE[config.activation],
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**config.metadata, **_hooks(config)},
    }
    if config.activation == "topk":
        cfg["k"] = config.k
        cfg["rescale_acts_by_decoder_norm"] = False
    return cfg


def from_fastsae(
    config: SAEConfig, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {**state, "W_enc": state["W_enc"].T}
    if config.has_threshold:
        tensors["threshold"] = _exact(state["threshold"])
    return cfg_of(config), tensors


def _hooks(config: SAEConfig) -> dict[str, Any]:
    """The hook point in TransformerLens' name (peers read it) and in the HF one (it wins)."""
    from fastsae.models import resolve_hook

    found: dict[str, Any] = {}
    if config.model_name is not None:
        found["model_name"] = config.model_name
    if config.hook_name is None:
        return found
    try:
        place = resolve_hook(config.hook_name)
    except FastsaeError:
        # Not the residual stream (an MLP output, say): it keeps the one name it came with.
        return {**found, "hook_name": config.hook_name}
    kind = "post" if place.side == "output" else "pre"
    found["hook_name"] = f"blocks.{place.layer}.hook_resid_{kind}"
    found["hf_hook_name"] = f"layers.{place.layer}.{place.side}"
    return found
