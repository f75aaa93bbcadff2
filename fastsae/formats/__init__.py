"""Read and write SAE checkpoints; a family per file, each a few pure functions.

A family module has NAME, `detect(checkpoint) -> bool` and `to_fastsae(checkpoint) -> (SAEConfig,
state)`; one that is also written has `WEIGHTS` and `from_fastsae(config, state) -> (cfg, tensors,
config)`, the last being what the written tensors mean. docs/formats.md lists what each does.
"""

import dataclasses
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    linear,
    llama_scope,
    llamascopium,
    mi_paper,
    mwhanna,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from fastsae.formats.files import (
    json_text,
    read_json,
    read_safetensors,
    tensor_writer,
    text_writer,
    write_all,
    write_safetensors,
    write_text,
)
from fastsae.formats.source import OURS, STATS, Checkpoint, read
from fastsae.ops.check import FLOATS, one_of
from fastsae.sae import FeatureStats, SAEConfig

__all__ = ["FAMILIES", "load", "save", "write_safetensors", "write_text"]
_MODULES = (
    dictionary_learning,
    saelens,
    sparsify,
    openai,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    qwen_scope,
    linear,
    mwhanna,
    mi_paper,
)
FAMILIES: dict[str, ModuleType] = {module.NAME: module for module in _MODULES}
WRITTEN = {name: module for name, module in FAMILIES.items() if hasattr(module, "from_fastsae")}
CONFIG = "cfg.json"  # of every family that is written
_STATISTICS = ("frequency", "mean", "max")


def load(
    path_or_repo: str | Path,
    sae_id: str | None = None,
    *,
    format: str | None = None,
    revision: str | None = None,
    compat: str = "authors",
    overrides: dict[str, Any] | None = None,
) -> tuple[SAEConfig, dict[str, Tensor], FeatureStats | None]:
    """(config, state, statistics) of a checkpoint; see SAE.from_pretrained for the arguments."""
    checkpoint, family = open_checkpoint(
        path_or_repo, sae_id, format, revision, compat=compat, overrides=overrides
    )
    return convert(checkpoint, family)


def open_checkpoint(
    path_or_repo: str | Path,
    sae_id: str | None = None,
    format: str | None = None,
    revision: str | None = None,
    *,
    compat: str = "authors",
    overrides: dict[str, Any] | None = None,
) -> tuple[Checkpoint, ModuleType]:
    """What is on disk, and the family it belongs to."""
    if format is not None:
        one_of("format", format, tuple(FAMILIES))
    one_of("compat", compat, ("authors", "saelens"))
    if overrides is not None and not isinstance(overrides, dict):
        raise FastsaeError(f"overrides: got {overrides!r}, expected a dictionary of config entries")
    found = read(path_or_repo, sae_id, revision, compat)
    found = dataclasses.replace(found, cfg={**found.cfg, **(overrides or {})})
    _refuse_by_name(found)
    names = [format] if format else [n for n, m in FAMILIES.items() if m.detect(found)]
    if not names:
        raise FastsaeError(
            f"{found.source}: keys {sorted(found.tensors)[:12]} with config entries "
            f"{sorted(found.cfg)[:12]} belong to no known family ({', '.join(FAMILIES)}); "
            "pass format= if you know it"
        )
    return found, FAMILIES[names[0]]


def convert(c: Checkpoint, family: ModuleType):
    """(config, state, statistics): the family's reading, checked."""
    config, state = family.to_fastsae(c)
    for name, values in state.items():
        if values.dtype not in FLOATS:
            raise FastsaeError(f"{c.source}: {name} has dtype {values.dtype}, expected floats")
        if not torch.isfinite(values).all():
            raise FastsaeError(f"{c.source}: {name} holds NaN or infinite values")
    path = c.folder / OURS
    ours = read_json(path) if family.NAME in WRITTEN and path.exists() else {}
    saved = _saved_config(path, ours.get("config"))
    # cfg.json wins: ours is taken only where it says the same, plus what cfg.json cannot say.
    if saved is not None and _written(family, saved, state) == c.cfg:
        config = saved
    return config, state, _stats(c.folder, ours.get("stats"), config.d_sae)


def save(
    folder: Path,
    config: SAEConfig,
    state: dict[str, Tensor],
    stats: FeatureStats | None,
    *,
    format: str = "saelens",
) -> None:
    """Write a checkpoint folder: every file is complete on disk before one is replaced."""
    family = WRITTEN[one_of("format", format, tuple(WRITTEN))]
    cfg, tensors, config = family.from_fastsae(config, state)
    ours: dict[str, Any] = {"config": dataclasses.asdict(config)}
    files = {folder / family.WEIGHTS: tensor_writer(tensors)}
    if stats is not None:
        ours["stats"] = {"tokens": stats.tokens, "file": STATS}
        named = {name: getattr(stats, name).detach().float().cpu() for name in _STATISTICS}
        files[folder / STATS] = tensor_writer(named)
    files[folder / OURS] = text_writer(json_text("metadata", ours))
    files[folder / CONFIG] = text_writer(json_text("metadata", cfg))
    write_all(files)
    if stats is None:
        (folder / STATS).unlink(missing_ok=True)


def _refuse_by_name(c: Checkpoint) -> None:
    """Families that are known and cannot be an SAE: one encoder with many decoders, or the
    reverse."""
    cross_layer = any(re.match(r"W_(enc|dec)_\d+$", key) for key in c.keys)
    if cross_layer or any(isinstance(t, Tensor) and t.dim() > 2 for t in c.tensors.values()):
        raise FastsaeError(
            f"{c.source}: a cross-layer transcoder (CLT) or crosscoder reads or writes several "
            "layers and cannot be represented; use per-layer SAEs or transcoders of the release"
        )


def _saved_config(path: Path, fields: Any) -> SAEConfig | None:
    if fields is None:
        return None
    try:
        return SAEConfig(**fields)
    except (TypeError, FastsaeError) as error:
        raise FastsaeError(f"{path}: config: {error}") from error


def _written(family: ModuleType, config: SAEConfig, state: dict[str, Tensor]) -> Any:
    try:
        return family.from_fastsae(config, state)[0]
    except (FastsaeError, KeyError, RuntimeError):
        return None  # the saved config belongs to other weights


def _stats(folder: Path, entry: Any, d_sae: int) -> FeatureStats | None:
    if entry is None:
        return None
    tokens = entry.get("tokens") if isinstance(entry, dict) else None
    if not isinstance(tokens, int):
        raise FastsaeError(f"{folder / OURS}: stats: got {entry!r}, expected an object with tokens")
    path = folder / STATS
    tensors = read_safetensors(path)
    for name in _STATISTICS:
        if name not in tensors or tensors[name].shape != (d_sae,):
            raise FastsaeError(f"{path}: {name} is missing or not [{d_sae}]")
    return FeatureStats(*(tensors[name].clone() for name in _STATISTICS), tokens)
