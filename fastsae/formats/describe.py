"""What a checkpoint is: the content of `fastsae inspect`."""

from pathlib import Path
from typing import Any

import torch

from fastsae.ops import screens
from fastsae.sae import SAE


def describe(
    path_or_repo: str | Path, sae_id: str | None = None, *, revision: str | None = None
) -> dict[str, Any]:
    """Shapes, activation, hook point, norms, size and feature statistics of an SAE checkpoint.

    Sizes are in bytes. `screen_copies_on_a_cpu` is what encoding on a CPU may add to the weights.
    """
    sae = SAE.from_pretrained(path_or_repo, sae_id, revision=revision)
    c = sae.config
    state = {name: t.detach() for name, t in sae.state_dict().items()}
    found: dict[str, Any] = {
        "source": str(path_or_repo) + (f"/{sae_id}" if sae_id else ""),
        "activation": c.activation,
        "k": c.k,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "hook_name": c.hook_name,
        "model_name": c.model_name,
        "apply_b_dec_to_input": c.apply_b_dec_to_input,
        "parameters": sum(t.numel() for t in state.values()),
        "bytes_in_memory": sum(t.numel() * t.element_size() for t in state.values()),
        "screen_copies_on_a_cpu": _screen_copies(state["W_enc"]),
        "norms": {
            "W_enc rows": _spread(state["W_enc"].norm(dim=1)),
            "W_dec rows": _spread(state["W_dec"].norm(dim=1)),
            "b_enc": float(state["b_enc"].norm()),
            "b_dec": float(state["b_dec"].norm()),
        },
        "statistics": None,
        "metadata": c.metadata,
    }
    if c.has_threshold:
        found["threshold"] = _spread(state["threshold"])
    if sae.stats is not None:
        alive = sae.stats.frequency > 0
        found["statistics"] = {
            "tokens": sae.stats.tokens,
            "dead_share": float((~alive).float().mean()),
            "mean_l0": float(sae.stats.frequency.sum()),
            "mean activation of alive features": _spread(sae.stats.mean[alive]),
            "max activation of alive features": _spread(sae.stats.max[alive]),
        }
    return found


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
