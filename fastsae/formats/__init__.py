"""Read and write SAE checkpoints; a family per file, each two pure functions on dictionaries.

A family module has NAME, `detect(keys, cfg) -> bool`, `to_fastsae(cfg, tensors) -> (SAEConfig, state)`
and `from_fastsae(config, state) -> (cfg, tensors)`.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats import saelens
from fastsae.sae import FeatureStats, SAEConfig

FAMILIES = {saelens.NAME: saelens}


def load(
    path_or_repo: str | Path, sae_id: str | None, *, format: str | None, revision: str | None
) -> tuple[SAEConfig, dict[str, Tensor], FeatureStats | None]:
    """(config, state, statistics) of a checkpoint folder or hub repository."""
    folder = _folder(path_or_repo, sae_id, revision)
    cfg = _json(folder / "cfg.json")
    weights = folder / "sae_weights.safetensors"
    tensors = read_safetensors(weights)
    if format is not None and format not in FAMILIES:
        raise FastsaeError(f"format: got {format!r}, accepted are {', '.join(FAMILIES)}")
    names = [format] if format else [n for n, m in FAMILIES.items() if m.detect(set(tensors), cfg)]
    if not names:
        raise FastsaeError(
            f"{weights}: keys {sorted(tensors)} belong to no known family ({', '.join(FAMILIES)})"
        )
    config, state = FAMILIES[names[0]].to_fastsae(cfg, tensors, str(weights))
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise FastsaeError(f"{weights}: {name} holds NaN or infinite values")
    return config, state, _load_stats(folder, config.d_sae)


def save(
    folder: Path,
    config: SAEConfig,
    state: dict[str, Tensor],
    stats: FeatureStats | None,
    *,
    format: str = "saelens",
) -> None:
    if format not in FAMILIES:
        raise FastsaeError(f"format: got {format!r}, accepted are {', '.join(FAMILIES)}")
    cfg, tensors = FAMILIES[format].from_fastsae(config, state)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "sae_weights.safetensors", tensors)
    extra: dict[str, Any] = {"metadata": config.metadata}
    if stats is not None:
        extra["stats"] = {"tokens": stats.tokens, "file": "fastsae_stats.safetensors"}
        named = {name: getattr(stats, name) for name in ("frequency", "mean", "max")}
        write_safetensors(
            folder / "fastsae_stats.safetensors",
            {name: t.detach().float().cpu().contiguous() for name, t in named.items()},
        )
    write_text(folder / "fastsae.json", json.dumps(extra, indent=1, sort_keys=True) + "\n")
    write_text(folder / "cfg.json", json.dumps(cfg, indent=1, sort_keys=True) + "\n")


def _load_stats(folder: Path, d_sae: int) -> FeatureStats | None:
    if not (folder / "fastsae.json").exists():
        return None
    entry = _json(folder / "fastsae.json").get("stats")
    if entry is None:
        return None
    path = folder / "fastsae_stats.safetensors"
    tensors = read_safetensors(path)
    for name in ("frequency", "mean", "max"):
        if name not in tensors or tensors[name].shape != (d_sae,):
            raise FastsaeError(f"{path}: {name} is missing or not [{d_sae}]")
    return FeatureStats(tensors["frequency"], tensors["mean"], tensors["max"], entry["tokens"])


def _folder(path_or_repo: str | Path, sae_id: str | None, revision: str | None) -> Path:
    local = Path(path_or_repo)
    if local.exists():
        if revision is not None:
            raise FastsaeError(f"revision: {local} is a local folder, it has no revisions")
        folder = local / sae_id if sae_id else local
        if not folder.is_dir():
            raise FastsaeError(f"{folder}: no such folder; it should hold cfg.json and the weights")
        return folder
    looks_local = str(path_or_repo).startswith(("/", ".", "~")) or str(path_or_repo).count("/") != 1
    if looks_local:
        raise FastsaeError(f"{path_or_repo}: no such folder, and not a hub repository (org/name)")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise FastsaeError(
            f"{path_or_repo}: no such folder; to download it run: pip install huggingface_hub"
        ) from error
    prefix = f"{sae_id}/" if sae_id else ""
    patterns = [prefix + name for name in ("*.json", "*.safetensors")]
    try:
        root = snapshot_download(str(path_or_repo), revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FastsaeError(
            f"{path_or_repo}: no such folder, and the hub did not give it: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Path(root) / (sae_id or "")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint") from error
    except (ValueError, OSError) as error:
        raise FastsaeError(f"{path}: cannot read it as JSON: {error}") from error
    if not isinstance(content, dict):
        raise FastsaeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise FastsaeError(f"{path}: truncated or not a safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    _replace(path, save(tensors))


def write_text(path: Path, text: str) -> None:
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    """Write next to `path`, then rename: a reader or a crash never meets half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise FastsaeError(f"{path}: cannot write: {error}") from error
