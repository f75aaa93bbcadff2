"""Read and write SAE checkpoints; a family per file, each two pure functions on dictionaries.

A family module has NAME, `detect(keys, cfg) -> bool`, `to_fastsae(cfg, tensors, source) ->
(SAEConfig, state)`, `from_fastsae(config, state) -> (cfg, tensors)` and `cfg_of(config) -> cfg`.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats import saelens
from fastsae.ops.check import FLOATS
from fastsae.sae import FeatureStats, SAEConfig

FAMILIES = {saelens.NAME: saelens}
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# What no other library reads: the exact SAEConfig, and what the features did on text.
OURS, STATS = "fastsae.json", "fastsae_stats.safetensors"
_STATISTICS = ("frequency", "mean", "max")


def load(
    path_or_repo: str | Path, sae_id: str | None, *, format: str | None, revision: str | None
) -> tuple[SAEConfig, dict[str, Tensor], FeatureStats | None]:
    """(config, state, statistics) of a checkpoint folder or hub repository."""
    if format is not None:
        _known(format)
    folder = _folder(path_or_repo, sae_id, revision)
    cfg = read_json(folder / CONFIG)
    weights = folder / WEIGHTS
    tensors = read_safetensors(weights)
    names = [format] if format else [n for n, m in FAMILIES.items() if m.detect(set(tensors), cfg)]
    if not names:
        raise FastsaeError(
            f"{weights}: keys {sorted(tensors)} belong to no known family ({', '.join(FAMILIES)})"
        )
    family = FAMILIES[names[0]]
    config, state = family.to_fastsae(cfg, tensors, str(weights))
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise FastsaeError(f"{weights}: {name} holds NaN or infinite values")
    ours = read_json(folder / OURS) if (folder / OURS).exists() else {}
    saved = _saved_config(folder / OURS, ours.get("config"))
    # cfg.json wins: ours is taken only where it says the same, plus what cfg.json cannot say.
    if saved is not None and family.cfg_of(saved) == cfg:
        config = saved
    return config, state, _stats(folder, ours.get("stats"), config.d_sae)


def save(
    folder: Path,
    config: SAEConfig,
    state: dict[str, Tensor],
    stats: FeatureStats | None,
    *,
    format: str = "saelens",
) -> None:
    """Write a checkpoint folder: every file is complete on disk before one is replaced."""
    cfg, tensors = _known(format).from_fastsae(config, state)
    ours: dict[str, Any] = {"config": dataclasses.asdict(config)}
    files = {folder / WEIGHTS: _tensor_writer(tensors)}
    if stats is not None:
        ours["stats"] = {"tokens": stats.tokens, "file": STATS}
        named = {name: getattr(stats, name).detach().float().cpu() for name in _STATISTICS}
        files[folder / STATS] = _tensor_writer(named)
    files[folder / OURS] = _text_writer(_json_text("metadata", ours))
    files[folder / CONFIG] = _text_writer(_json_text("metadata", cfg))
    _write_all(files)
    if stats is None:
        (folder / STATS).unlink(missing_ok=True)


def _known(format: str):
    if format not in FAMILIES:
        raise FastsaeError(f"format: got {format!r}, accepted are {', '.join(FAMILIES)}")
    return FAMILIES[format]


def _saved_config(path: Path, fields: Any) -> SAEConfig | None:
    if fields is None:
        return None
    try:
        return SAEConfig(**fields)
    except (TypeError, FastsaeError) as error:
        raise FastsaeError(f"{path}: config: {error}") from error


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


# --- where a checkpoint is ----------------------------------------------------------------------


def _folder(path_or_repo: str | Path, sae_id: str | None, revision: str | None) -> Path:
    local = Path(path_or_repo).expanduser()
    if local.exists():
        if revision is not None:
            raise FastsaeError(f"revision: {local} is a local folder, it has no revisions")
        folder = local / sae_id if sae_id else local
        if not folder.is_dir():
            raise FastsaeError(f"{folder}: no such folder; it should hold {CONFIG} and {WEIGHTS}")
        return folder
    name = str(path_or_repo)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise FastsaeError(f"{name}: no such folder, and not a hub repository (org/name)")
    return _download(name, sae_id, revision)


def _download(repository: str, sae_id: str | None, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise FastsaeError(
            f"{repository}: no such folder; to download it run: pip install huggingface_hub"
        ) from error
    # Whole names: the hub's * crosses folders, and a repository may hold hundreds of SAEs.
    wanted = [f"{sae_id}/{name}" if sae_id else name for name in (CONFIG, WEIGHTS, OURS, STATS)]
    try:
        root = snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FastsaeError(
            f"{repository}: no such folder, and the hub did not give it: {_first_line(error)}"
        ) from error
    folder = Path(root) / (sae_id or "")
    if not (folder / CONFIG).exists():
        raise FastsaeError(
            f"{repository}: has no {wanted[0]}; sae_id is the folder of one SAE in the repository"
        )
    return folder


# --- files --------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint") from error
    except (ValueError, OSError) as error:
        raise FastsaeError(f"{path}: cannot read it as JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise FastsaeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The floating tensors of a file, mapped from it; anything else in it is an error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise FastsaeError(
            f"{path}: truncated or not a safetensors file: {_first_line(error)}"
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise FastsaeError(
                f"{path}: {name} has dtype {tensor.dtype}, expected floats of 16 to 64 bits"
            )
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _write_all({path: _tensor_writer(tensors)})


def write_text(path: Path, text: str) -> None:
    _write_all({path: _text_writer(text)})


def _json_text(argument: str, content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FastsaeError(f"{argument}: cannot be written as JSON: {error}") from error


def _text_writer(text: str) -> Callable[[str], None]:
    return lambda path: Path(path).write_text(text, encoding="utf-8") and None


def _tensor_writer(tensors: dict[str, Tensor]) -> Callable[[str], None]:
    def write(path: str) -> None:
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in tensors.items()}, path)

    return write


def _write_all(files: dict[Path, Callable[[str], None]]) -> None:
    """Write every file next to its place, then rename all: a crash never leaves half a file."""
    from safetensors import SafetensorError

    staged: dict[Path, str] = {}
    path = next(iter(files))
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged[path] = tempfile.mkstemp(
                dir=path.parent, prefix=path.name, suffix=".part"
            )
            os.close(handle)
            write(staged[path])
            with open(staged[path], "rb") as file:
                os.fsync(file.fileno())
            os.chmod(staged[path], 0o644)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise FastsaeError(f"{path}: cannot write: {_first_line(error)}") from error
    finally:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)
