"""What a checkpoint is: the content of `fastsae inspect`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats import convert, open_checkpoint
from fastsae.ops import screens


def describe(
    path_or_repo: str | Path,
    sae_id: str | None = None,
    *,
    format: str | None = None,
    revision: str | None = None,
    compat: str = "authors",
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Family, shapes, activation, hook point, norms, size and statistics of an SAE checkpoint.

    Sizes are in bytes. `screen_copies_on_a_cpu` is what encoding on a CPU may add to the weights.
    """
    source, family = open_checkpoint(
        path_or_repo, sae_id, format, revision, compat=compat, overrides=overrides
    )
    c, state, stats = convert(source, family)
    stored = sorted({_dtype(t) for t in source.tensors.values() if isinstance(t, Tensor)})
    found: dict[str, Any] = {
        "source": source.source,
        "family": family.NAME,
        "activation": c.activation,
        "k": c.k,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "d_out": c.width_out,
        "kind": "autoencoder" if c.d_out is None else "transcoder",
        "hook_name": c.hook_name,
        "hook": _hook(c.hook_name),
        "hook_name_out": c.hook_name_out,
        "hook_out": _hook(c.hook_name_out),
        "model_name": c.model_name,
        "apply_b_dec_to_input": c.apply_b_dec_to_input,
        "normalization": c.normalization,
        "skip": c.skip,
        "reshape": c.reshape,
        "dtype_in_file": ", ".join(stored),
        "bytes_in_file": Path(source.source).stat().st_size,
        "parameters": sum(t.numel() for t in state.values()),
        "bytes_in_memory": sum(t.numel() * 4 for t in state.values()),
        "screen_copies_on_a_cpu": _screen_copies(state["W_enc"].float().contiguous()),
        "norms": {
            "W_enc rows": _spread(state["W_enc"].float().norm(dim=1)),
            "W_dec rows": _spread(state["W_dec"].float().norm(dim=1)),
            "b_enc": float(state["b_enc"].float().norm()),
            "b_dec": float(state["b_dec"].float().norm()),
        },
        "statistics": None,
        "metadata": c.metadata,
    }
    for name in ("threshold", "activation_scale"):
        if name in state:
            found[name] = _spread(state[name])
    if stats is not None:
        alive = stats.frequency > 0
        found["statistics"] = {
            "tokens": stats.tokens,
            "dead_share": float((~alive).float().mean()),
            "mean_l0": float(stats.frequency.sum()),
            "mean activation of alive features": _spread(stats.mean[alive]),
            "max activation of alive features": _spread(stats.max[alive]),
        }
    return found


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hook(name: str | None) -> dict[str, Any] | None:
    """A hook point in other notations; None where the name is in none that we know."""
    from fastsae.hookpoints import HookPoint

    try:
        point = HookPoint.parse(name)
    except FastsaeError:
        return None
    return {"layer": point.layer, "huggingface": point.hf, "transformer_lens": point.tl}


def _screen_copies(W_enc: torch.Tensor) -> dict[str, Any]:
    """Bytes that encoding may add to the weights, made lazily: see fastsae.ops.screens."""
    if W_enc.nbytes < screens.SMALLEST:
        return {"bf16": 0, "int8": 0, "why": "weights this small are read as they are"}
    tiled = W_enc.dtype == torch.float32
    return {
        "bf16": screens.size(W_enc, "bf16") if tiled else 0,
        "int8": screens.size(W_enc, "int8"),
        "why": "bf16 for more than 8 rows at a time (AMX only), int8 for fewer; "
        "FASTSAE_SCREENS=0 does without",
    }


def _spread(values: torch.Tensor) -> dict[str, float]:
    if values.numel() == 0:
        return {}
    low, middle, high = torch.quantile(values.float(), torch.tensor([0.0, 0.5, 1.0])).tolist()
    return {"min": low, "median": middle, "max": high}


def as_text(found: dict[str, Any]) -> str:
    """`describe()` for a person."""
    lines = []

    def put(name: str, value: Any, indent: str = "") -> None:
        if isinstance(value, dict) and set(value) == {"min", "median", "max"}:
            value = (
                f"{value['min']:.4g} / {value['median']:.4g} / {value['max']:.4g} (min/median/max)"
            )
        if isinstance(value, dict):
            lines.append(f"{indent}{name}")
            for key, entry in value.items():
                put(key, entry, indent + "  ")
            return
        shown = f"{value:.6g}" if isinstance(value, float) else value
        lines.append(f"{indent}{name + ' ':{max(28 - len(indent), 2)}}{shown}")

    for name, value in found.items():
        put(name, value)
    return "\n".join(lines)
