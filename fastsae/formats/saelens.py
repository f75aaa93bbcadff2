"""SAELens v6: cfg.json + sae_weights.safetensors, W_enc [d_in, d_sae] and W_dec [d_sae, d_in].

Architectures read and written here: standard (ReLU), topk, jumprelu, and batchtopk, which SAELens
stores as jumprelu with one threshold in every entry. The other architectures are refused by name.
"""

from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.sae import SAEConfig

NAME = "saelens"
_ACTIVATION = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_ARCHITECTURE = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
}
_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}


def detect(keys: set[str], cfg: dict[str, Any]) -> bool:
    return keys >= _KEYS and "architecture" in cfg


def to_fastsae(
    cfg: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> tuple[SAEConfig, dict[str, Tensor]]:
    architecture = cfg.get("architecture")
    if architecture not in _ACTIVATION:
        raise FastsaeError(
            f"{source}: architecture {architecture!r} cannot be represented; "
            f"accepted are {', '.join(_ACTIVATION)}"
        )
    _refuse_unfolded(cfg, source)
    wanted = _KEYS | ({"threshold"} if architecture == "jumprelu" else set())
    if set(tensors) != wanted:
        raise FastsaeError(
            f"{source}: a {architecture} SAE has the keys {sorted(wanted)}; "
            f"missing {sorted(wanted - set(tensors))}, unknown {sorted(set(tensors) - wanted)}"
        )
    metadata = cfg.get("metadata") or {}
    hook = metadata.get("hf_hook_name") or metadata.get("hook_name") or cfg.get("hook_name")
    d_in, d_sae = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    for name, value in (("d_in", d_in), ("d_sae", d_sae)):
        if cfg.get(name, value) != value:
            raise FastsaeError(
                f"{source}: cfg.json says {name} = {cfg[name]}, the biases say {value}"
            )
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=_ACTIVATION[architecture],
        k=cfg.get("k") if architecture == "topk" else None,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        hook_name=hook,
        model_name=metadata.get("model_name"),
        metadata=dict(metadata),
    )
    state = {
        "W_enc": _oriented("W_enc", tensors["W_enc"], (d_in, d_sae), source).T.contiguous(),
        "W_dec": _oriented("W_dec", tensors["W_dec"], (d_sae, d_in), source),
        "b_enc": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
    }
    if architecture == "jumprelu":
        state["threshold"] = _oriented("threshold", tensors["threshold"], (d_sae,), source).float()
    return config, state


def _refuse_unfolded(cfg: dict[str, Any], source: str) -> None:
    """Settings that change the numbers and are not represented: refuse, never approximate."""
    for name, neutral in (
        ("normalize_activations", ("none", None)),
        ("reshape_activations", ("none", None)),
        ("rescale_acts_by_decoder_norm", (False, None)),
    ):
        if cfg.get(name) not in neutral:
            raise FastsaeError(f"{source}: {name} = {cfg[name]!r} cannot be represented exactly")


def _oriented(name: str, tensor: Tensor, shape: tuple[int, ...], source: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise FastsaeError(
            f"{source}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
        )
    return tensor.contiguous()


def from_fastsae(
    config: SAEConfig, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    tensors = {name: t.contiguous() for name, t in state.items()}
    tensors["W_enc"] = state["W_enc"].T.contiguous()
    if config.has_threshold:
        tensors["threshold"] = state["threshold"].to(torch.float32)
    return cfg, tensors


def _hooks(config: SAEConfig) -> dict[str, Any]:
    """The hook point in TransformerLens' name (peers read it) and in the Hugging Face one (it wins)."""
    found: dict[str, Any] = {}
    if config.model_name is not None:
        found["model_name"] = config.model_name
    if config.hook_name is None:
        return found
    from fastsae.models import resolve_hook

    place = resolve_hook(config.hook_name)
    kind = "post" if place.side == "output" else "pre"
    found["hook_name"] = f"blocks.{place.layer}.hook_resid_{kind}"
    found["hf_hook_name"] = f"layers.{place.layer}.{place.side}"
    return found
