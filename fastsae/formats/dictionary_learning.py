"""dictionary_learning: ae.pt and config.json, whose trainer names the class.

Read: AutoEncoder, AutoEncoderNew, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE,
JumpReluAutoEncoder, GatedAutoEncoder. The numbers are those of the class on the file's weights;
the library's own `AutoEncoder.from_pretrained` also normalises the decoder by default, which
multiplies activations by ‖W_dec[f]‖ and leaves reconstructions alone
(`overrides={"normalize_decoder": true}` does the same). Source: dictionary_learning 0.1.0.
"""

import warnings

import torch

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "dictionary_learning"
_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
_CLASSES = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "AutoEncoderTopK": _LINEAR | {"b_dec", "k"},
    "BatchTopKSAE": _LINEAR | {"b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"k", "group_sizes"},
    "JumpReluAutoEncoder": _MATRICES,
    "GatedAutoEncoder": {
        "encoder.weight",
        "decoder.weight",
        "decoder_bias",
        "r_mag",
        "gate_bias",
        "mag_bias",
    },
}
# Without a config these say what they are; the others share their keys.
_ALONE = ("AutoEncoder", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE")
_OPTIONAL = {"AutoEncoderTopK": {"threshold"}}


def detect(c: Checkpoint) -> bool:
    trainer = c.cfg.get("trainer")
    if isinstance(trainer, dict) and "dict_class" in trainer:
        return True
    return not c.cfg and any(c.keys == _CLASSES[name] for name in _ALONE)


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    trainer = c.cfg.get("trainer") or {}
    kind = trainer.get("dict_class") or next(
        (name for name in _ALONE if c.keys == _CLASSES[name]), None
    )
    if kind not in _CLASSES:
        raise FastsaeError(
            f"{c.source}: dict_class {kind!r} cannot be represented; accepted are "
            f"{', '.join(_CLASSES)}"
        )
    parts.require_keys(c, kind, _CLASSES[kind], _OPTIONAL.get(kind, set()))
    state = _matrices(c) if "W_enc" in c.keys else _linear(c, kind)
    d_sae, d_in = state["W_enc"].shape
    for name, value in (("dict_size", d_sae), ("activation_dim", d_in)):
        if trainer.get(name) not in (None, value):
            raise FastsaeError(
                f"{c.source}: the config says {name} = {trainer[name]!r}, the biases say {value}"
            )
    activation, k = "relu", None
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        activation, k = "batchtopk", _k(c, trainer)
        state["threshold"] = _trained(c, d_sae)
    elif kind == "AutoEncoderTopK":
        activation, k = "topk", _k(c, trainer)
    elif kind in ("JumpReluAutoEncoder", "GatedAutoEncoder"):
        activation = "jumprelu"
    if c.cfg.get("normalize_decoder") and kind == "AutoEncoder":
        state = parts.unit_decoder(state)
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation=activation,
        k=k,
        apply_b_dec_to_input=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        hook_name=_hook(trainer),
        model_name=trainer.get("lm_name"),
    )
    return config, state


def _linear(c: Checkpoint, kind: str) -> parts.State:
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
    bias = "decoder_bias" if kind == "GatedAutoEncoder" else bias
    gated = kind == "GatedAutoEncoder"
    d_sae = parts.vector(c, "r_mag" if gated else "encoder.bias").numel()
    b_dec = parts.vector(c, bias)
    d_in = b_dec.numel()
    W = parts.matrix(c, "encoder.weight", d_sae, d_in, stored="rows", strict=True)
    state = {
        "W_dec": parts.matrix(c, "decoder.weight", d_sae, d_in, stored="columns", strict=True),
        "b_dec": b_dec,
    }
    if gated:
        rest = (parts.vector(c, name, d_sae) for name in ("r_mag", "gate_bias", "mag_bias"))
        return {**state, **parts.jumprelu_of_gated(W, *rest)}
    return {**state, "W_enc": W, "b_enc": parts.vector(c, "encoder.bias", d_sae)}


def _matrices(c: Checkpoint) -> parts.State:
    d_sae, d_in = parts.vector(c, "b_enc").numel(), parts.vector(c, "b_dec").numel()
    return {
        "W_enc": parts.matrix(c, "W_enc", d_sae, d_in, stored="columns", strict=True),
        "W_dec": parts.matrix(c, "W_dec", d_sae, d_in, stored="rows", strict=True),
        "b_enc": parts.vector(c, "b_enc", d_sae),
        "b_dec": parts.vector(c, "b_dec", d_in),
        "threshold": parts.exact(parts.per_feature(c, "threshold", d_sae)),
    }


def _k(c: Checkpoint, trainer: dict) -> int:
    k = c.tensors["k"]
    k = int(k) if isinstance(k, torch.Tensor) and k.numel() == 1 else k
    if trainer.get("k") not in (None, k):
        raise FastsaeError(f"{c.source}: the config says k = {trainer['k']!r}, the weights {k!r}")
    return k


def _trained(c: Checkpoint, d_sae: int) -> torch.Tensor:
    theta = parts.exact(parts.per_feature(c, "threshold", d_sae))
    if (theta < 0).all():
        warnings.warn(
            f"{c.source}: its threshold was never set (training stopped before it was measured): "
            "as in dictionary_learning, every positive latent is active",
            stacklevel=2,
        )
        return torch.zeros_like(theta)  # relu(h)·1[relu(h) > −1] = relu(h)·1[h > 0]
    return theta


def _hook(trainer: dict) -> str | None:
    """The residual after `layer`, unless the trainer names a submodule."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    if submodule is not None and not str(submodule).startswith("resid_post"):
        return str(submodule)
    return f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else None
