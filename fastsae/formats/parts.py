"""What every family does: check keys and shapes, orient matrices, fold in float64."""

import re
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats.source import Checkpoint
from fastsae.ops.check import FLOATS
from fastsae.sae import SAEConfig

State = dict[str, Tensor]


def require_keys(c: Checkpoint, family: str, wanted: set[str], optional: set[str] = frozenset()):
    """Exactly these keys, or an error that lists what is missing and what is unknown."""
    missing, unknown = wanted - c.keys, c.keys - wanted - optional
    if missing or unknown:
        raise FastsaeError(
            f"{c.source}: a {family} SAE has the keys {sorted(wanted)}; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )


def tensor(c: Checkpoint, name: str) -> Tensor:
    """A floating tensor of the file."""
    found = c.tensors[name]
    if not isinstance(found, Tensor) or found.dtype not in FLOATS:
        kind = f"dtype {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise FastsaeError(f"{c.source}: {name} has {kind}, expected floats of 16 to 64 bits")
    return found


def vector(c: Checkpoint, name: str, length: int | None = None) -> Tensor:
    found = tensor(c, name)
    if found.dim() != 1 or (length is not None and found.shape != (length,)):
        expected = f"[{length}]" if length is not None else "one dimension"
        raise FastsaeError(f"{c.source}: {name} has shape {list(found.shape)}, expected {expected}")
    return found


def per_feature(c: Checkpoint, name: str, d_sae: int) -> Tensor:
    """One number for all features or one each, as [d_sae]."""
    found = tensor(c, name)
    return found.reshape(1).expand(d_sae) if found.numel() == 1 else vector(c, name, d_sae)


def matrix(
    c: Checkpoint, name: str, rows: int, columns: int, *, stored: str, strict: bool = False
) -> Tensor:
    """[rows, columns], whichever way round the file has it.

    stored: "rows" when the family keeps [rows, columns], "columns" when it keeps the transpose;
    that decides when rows = columns. Fewer features than dimensions in the other layout are biases
    that changed places, so an error. strict: the family's own library loads no other layout.
    """
    found, right, turned = tensor(c, name), [rows, columns], [columns, rows]
    expected = right if stored == "rows" else turned
    shape = list(found.shape)
    if shape == expected:
        return found if stored == "rows" else found.T
    if shape in (right, turned) and rows >= columns and not strict:
        return found if shape == right else found.T
    raise FastsaeError(f"{c.source}: {name} has shape {shape}, expected {expected}")


def agree(c: Checkpoint, **sizes: int) -> None:
    """The config must say what the biases say, where it says anything."""
    for name, value in sizes.items():
        if c.cfg.get(name) not in (None, value):
            raise FastsaeError(
                f"{c.source}: the config says {name} = {c.cfg[name]!r}, the biases say {value}"
            )


def config(c: Checkpoint, **fields: Any) -> SAEConfig:
    """An SAEConfig whose errors name the checkpoint."""
    if c.origin:
        fields["metadata"] = {**fields.get("metadata", {}), "origin": c.origin}
    try:
        return SAEConfig(**fields)
    except FastsaeError as error:
        raise FastsaeError(f"{c.source}: {error}") from error


def refuse(c: Checkpoint, what: str, fix: str = "") -> FastsaeError:
    """The error for what cannot be represented exactly."""
    return FastsaeError(f"{c.source}: {what} cannot be represented exactly{'; ' * bool(fix)}{fix}")


def positive(c: Checkpoint, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise FastsaeError(f"{c.source}: {what} is {value!r}, expected a positive number")
    return float(value)


def option(c: Checkpoint, name: str, default: bool) -> bool:
    """A true or false of the config."""
    value = c.cfg.get(name, default)
    if not isinstance(value, bool):
        raise FastsaeError(f"{c.source}: {name} is {value!r}, expected true or false")
    return value


def text(c: Checkpoint, name: str) -> str | None:
    """A name in the config, or None."""
    value = c.cfg.get(name)
    if value is not None and not isinstance(value, str):
        raise FastsaeError(f"{c.source}: {name} is {value!r}, expected text")
    return value


def number_in(name: str, pattern: str) -> int | None:
    """The last number that a pattern finds in a path."""
    found = re.findall(pattern, name)
    return int(found[-1]) if found else None


# --- folds, in float64, kept in float32 or better -------------------------------------------------


def exact(values: Tensor) -> Tensor:
    """At least float32: a threshold in half precision moves the gate."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rounded(values: Tensor, like: Tensor) -> Tensor:
    return values.to(torch.promote_types(like.dtype, torch.float32))


def scaled(state: State, **factors: "float | Tensor") -> State:
    """state with the named tensors multiplied: a number, or a factor per row."""
    new = dict(state)
    for name, factor in factors.items():
        if isinstance(factor, Tensor) and state[name].dim() == 2:
            factor = factor[:, None]
        new[name] = rounded(state[name].double() * factor, state[name])
    return new


def decoder_norms(state: State) -> tuple[Tensor, Tensor]:
    """‖W_dec[f]‖ in float64 and its inverse, finite where a row is zero."""
    norms = state["W_dec"].double().norm(dim=1)
    return norms, 1 / norms.clamp(min=torch.finfo(torch.float32).tiny)


def unit_decoder(state: State) -> State:
    """h·n and W_dec/n in place of h and W_dec: the same reconstruction.

    A zero row stays zero and its latent is never active, because n = 0 silences it.
    """
    norms, inverse = decoder_norms(state)
    return scaled(state, W_enc=norms, b_enc=norms, W_dec=inverse)


def jumprelu_of_gated(W: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> State:
    """A gated encoder as a jumprelu one; W [F, D] and the rest [F].

    1[π > 0]·ReLU(e^r·Wh + b_mag) with π = Wh + b_gate: π > 0 is e^r·Wh + b_mag > θ for
    θ = b_mag − e^r·b_gate.
    """
    scale = r_mag.double().exp()
    return {
        "W_enc": rounded(W.double() * scale[:, None], W),
        "b_enc": b_mag,
        "threshold": rounded(b_mag.double() - scale * b_gate.double(), b_mag),
    }
