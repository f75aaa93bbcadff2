"""SAELens: cfg.json + sae_weights.safetensors, W_enc [d_in, d_sae] and W_dec [d_sae, d_out].

Read: version 6 and the flat cfg.json before it. Written: version 6. batchtopk is stored as
jumprelu with one threshold in every entry, and a gated SAE, which is a jumprelu SAE in other words,
becomes one on load. The scale of expected_average_only_in is not in the checkpoint: SAELens keeps
it in its own list; without it (`overrides`) the checkpoint is refused. Source: SAELens 6.54.
"""

from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "saelens"
WEIGHTS = "sae_weights.safetensors"
_ACTIVATION = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_ARCHITECTURE = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
_ARCHITECTURE["batchtopk"] = "jumprelu"
_NORMALIZATION = {
    None: "none",
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",  # folded into the weights
}
_SHARED = {"W_enc", "W_dec", "b_dec"}
# SAELens loads a model with centred writing weights for these; a plain model's are not.
_CENTRED = "center_writing_weights"


def detect(c: Checkpoint) -> bool:
    return c.keys >= _SHARED and bool(c.keys & {"b_enc", "b_gate"}) and "d_sae" in c.cfg


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    cfg = _version_6(c.cfg) if "metadata" not in c.cfg else c.cfg
    architecture, metadata = cfg.get("architecture"), cfg.get("metadata") or {}
    if not isinstance(architecture, str) or architecture not in _ACTIVATION:
        raise FastsaeError(
            f"{c.source}: architecture {architecture!r} cannot be represented; "
            f"accepted are {', '.join(_ACTIVATION)}"
        )
    if not isinstance(metadata, dict):
        raise FastsaeError(f"{c.source}: metadata is {metadata!r}, expected a JSON object")
    c = _without_unit_scale(c)
    gated, transcoder = architecture == "gated", "transcoder" in architecture
    wanted = _SHARED | ({"b_gate", "b_mag", "r_mag"} if gated else {"b_enc"})
    if _ACTIVATION[architecture] == "batchtopk":
        wanted |= {"topk_threshold"}
    elif _ACTIVATION[architecture] == "jumprelu" and not gated:
        wanted |= {"log_threshold" if "log_threshold" in c.keys else "threshold"}
    wanted |= {"W_skip"} if "skip" in architecture else set()
    parts.require_keys(c, architecture, wanted)
    d_sae = parts.vector(c, "b_mag" if gated else "b_enc").numel()
    d_out = parts.vector(c, "b_dec").numel()
    d_in = parts.tensor(c, "W_enc").shape[0] if transcoder else d_out
    parts.agree(c, d_in=d_in, d_sae=d_sae, **({"d_out": d_out} if transcoder else {}))
    state = _state(c, architecture, d_in, d_out, d_sae)
    kwargs = cfg.get("model_from_pretrained_kwargs", metadata.get("model_from_pretrained_kwargs"))
    centre = (kwargs or {}).get(_CENTRED, False)
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation=_ACTIVATION[architecture],
        k=cfg.get("k") if architecture == "topk" else None,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)) and not transcoder,
        hook_name=metadata.get("hf_hook_name") or metadata.get("hook_name"),
        model_name=metadata.get("model_name"),
        metadata=dict(metadata),
        d_out=d_out if transcoder else None,
        hook_name_out=_hook_out(metadata) if transcoder else None,
        skip="W_skip" in state,
        normalization=_normalization(c, cfg, centred=bool(centre)),
        reshape="hook_z" if cfg.get("reshape_activations") == "hook_z" else "none",
    )
    if cfg.get("reshape_activations") not in (None, "none", "hook_z"):
        raise parts.refuse(c, f"reshape_activations = {cfg['reshape_activations']!r}")
    if cfg.get("normalize_activations") == "expected_average_only_in":
        scale = parts.positive(c, "norm_scaling_factor", cfg["norm_scaling_factor"])
        state = parts.scaled(state, W_enc=scale, W_dec=1 / scale, b_dec=1 / scale)
    if cfg.get("rescale_acts_by_decoder_norm"):
        state = parts.unit_decoder(state)
    return config, state


def _without_unit_scale(c: Checkpoint) -> Checkpoint:
    """Old files carry a scaling_factor; SAELens drops one that is all ones, and so do we."""
    scale = c.tensors.get("scaling_factor")
    if scale is None:
        return c
    if not torch.allclose(scale.float(), torch.ones(())):
        raise parts.refuse(c, "a scaling_factor other than 1")
    rest = {name: t for name, t in c.tensors.items() if name != "scaling_factor"}
    return c.replace(tensors=rest)


def _normalization(c: Checkpoint, cfg: dict[str, Any], centred: bool) -> str:
    name = cfg.get("normalize_activations")
    if not (name is None or isinstance(name, str)) or name not in _NORMALIZATION:
        raise parts.refuse(c, f"normalize_activations = {name!r}")
    if name == "expected_average_only_in" and "norm_scaling_factor" not in cfg:
        raise parts.refuse(
            c,
            "normalize_activations = 'expected_average_only_in' without its scale",
            'pass overrides={"norm_scaling_factor": s}, from SAELens\' list of releases, or '
            '{"normalize_activations": "none"} if it is folded already',
        )
    if centred and _NORMALIZATION[name] == "constant_norm":
        raise parts.refuse(c, f"{_CENTRED} with normalize_activations = {name!r}")
    # A layer norm centres by itself.
    return "center" if centred and _NORMALIZATION[name] == "none" else _NORMALIZATION[name]


def _state(c: Checkpoint, architecture: str, d_in: int, d_out: int, d_sae: int) -> parts.State:
    W_enc = parts.matrix(c, "W_enc", d_sae, d_in, stored="columns", strict=True)
    W_dec = parts.matrix(c, "W_dec", d_sae, d_out, stored="rows", strict=True)
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": parts.vector(c, "b_dec", d_out)}
    if architecture == "gated":
        rest = (parts.vector(c, name, d_sae) for name in ("r_mag", "b_gate", "b_mag"))
        return {**state, **parts.jumprelu_of_gated(W_enc, *rest)}
    state["b_enc"] = parts.vector(c, "b_enc", d_sae)
    if "threshold" in c.keys:
        state["threshold"] = parts.exact(parts.vector(c, "threshold", d_sae))
    elif "log_threshold" in c.keys:
        state["threshold"] = parts.exact(parts.vector(c, "log_threshold", d_sae)).exp()
    elif "topk_threshold" in c.keys:
        state["threshold"] = parts.per_feature(c, "topk_threshold", d_sae).float()
    if "W_skip" in c.keys:
        state["W_skip"] = parts.matrix(c, "W_skip", d_out, d_in, stored="rows", strict=True)
    return state


def _version_6(old: dict[str, Any]) -> dict[str, Any]:
    """The flat cfg.json that SAELens wrote before version 6, in the form of version 6."""
    cfg = dict(old)
    cfg.setdefault("architecture", "standard")
    options = cfg.get("activation_fn_kwargs")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn"))
    if function == "topk":
        cfg["architecture"] = "topk"
        cfg["k"] = options.get("k") if isinstance(options, dict) else cfg.get("k")
    elif function not in (None, "relu"):
        cfg["architecture"] = f"{cfg['architecture']} with {function}"
    if isinstance(cfg.get("normalize_activations"), bool):
        scaled = cfg["normalize_activations"]
        cfg["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    hook = cfg.get("hook_name") or cfg.get("hook_point")
    if isinstance(hook, str) and "hook_z" in hook:
        cfg.setdefault("reshape_activations", "hook_z")
    names = ("model_name", "hf_hook_name", "hook_name_out", "model_from_pretrained_kwargs")
    found = {"hook_name": hook} | {name: cfg.get(name) for name in names}
    cfg["metadata"] = {name: value for name, value in found.items() if value is not None}
    return cfg


def _hook_out(metadata: dict[str, Any]) -> str | None:
    return metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")


# --- writing --------------------------------------------------------------------------------------


def from_fastsae(
    config: SAEConfig, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], SAEConfig]:
    cfg: dict[str, Any] = {
        "architecture": _architecture(config),
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": config.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": config.reshape,
        "metadata": {**config.metadata, **_hooks(config)},
    }
    if config.normalization == "center":
        kwargs = config.metadata.get("model_from_pretrained_kwargs") or {}
        cfg["metadata"]["model_from_pretrained_kwargs"] = {**kwargs, _CENTRED: True}
    elif config.normalization != "none":
        back = {ours: theirs for theirs, ours in _NORMALIZATION.items()}
        cfg["normalize_activations"] = back[config.normalization]
    if config.d_out is not None:
        cfg["d_out"] = config.d_out
    if config.activation == "topk":
        cfg["k"] = config.k
        cfg["rescale_acts_by_decoder_norm"] = False
    tensors = {**state, "W_enc": state["W_enc"].T}
    if config.has_threshold:
        tensors["threshold"] = parts.exact(state["threshold"])
    return cfg, tensors, config


def _architecture(config: SAEConfig) -> str:
    name = _ARCHITECTURE.get(config.activation)
    if config.d_out is not None and name is not None:
        name = None if name == "topk" else "transcoder" if name == "standard" else f"{name}_"
        if name is not None:
            stem = name.removesuffix("transcoder")
            name = f"{stem}skip_transcoder" if config.skip else f"{stem}transcoder"
    wrong = {
        f"activation={config.activation!r}" + " of a transcoder" * bool(config.d_out): name is None,
        "the skip connection of an autoencoder": config.skip and config.d_out is None,
        "an activation_scale": config.activation_scale,
    }
    if any(wrong.values()):
        what = ", ".join(each for each, present in wrong.items() if present)
        raise FastsaeError(f"format: SAELens has no form for {what}; save in another format")
    return name


def _hooks(config: SAEConfig) -> dict[str, Any]:
    """Hook points in TransformerLens' names (peers read them) and in the HF ones (they win)."""
    found: dict[str, Any] = {}
    if config.model_name is not None:
        found["model_name"] = config.model_name
    for suffix, hook in (("", config.hook_name), ("_out", config.hook_name_out)):
        if hook is None:
            continue
        tl, hf = _both_names(hook)
        found[f"hook_name{suffix}"] = tl
        if hf is not None:
            found[f"hf_hook_name{suffix}"] = hf
    return found


def _both_names(hook: str) -> tuple[str, str | None]:
    from fastsae.hookpoints import HookPoint

    try:
        point = HookPoint.parse(hook)
    except FastsaeError:
        return hook, None  # a name of its own: it keeps it
    if point.site in ("resid_pre", "resid_post"):
        return point.tl, point.hf
    # Elsewhere the module differs between families: only a module path is written as one.
    if point.site == "module":
        return point.tl or hook, hook
    return point.tl, None
