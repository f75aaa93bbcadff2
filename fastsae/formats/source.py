"""Where a checkpoint is: a folder, a file in one, or a repository of the Hugging Face hub."""

import dataclasses
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError
from fastsae.formats.files import SUFFIXES, first_line, read_json, read_weights, read_yaml

# In the order they are looked for; a folder of a published SAE holds one of each.
CONFIGS = ("cfg.json", "config.json", "hyperparams.json")
WEIGHTS = (
    "sae_weights.safetensors",  # SAELens, Llama Scope R1-distill, Llamascopium
    "sae.safetensors",  # sparsify
    "ae.pt",  # dictionary_learning
    "params.npz",  # Gemma Scope 1
    "params.safetensors",  # Gemma Scope 2
    "checkpoints/final.safetensors",  # Llama Scope
    "sae_weights.pt",  # Llamascopium
)
YAMLS = ("wandb-config.yaml", "wanb-config.yaml", "config.yaml")  # mwhanna, one misspelt
# What no other library reads: the exact SAEConfig, and what the features did on text.
OURS, STATS = "fastsae.json", "fastsae_stats.safetensors"
_NOT_WEIGHTS = {STATS, "sparsity.safetensors"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was read from disk, before a family looks at it.

    `tensors` holds what the weights file holds, `cfg` the JSON or YAML beside it ({} when there is
    none). Layers, widths and k that no file states are read from `name`, the path as it was given.
    """

    source: str  # the weights file, for messages
    name: str  # posix path: repository or folder, and the file in it
    cfg: dict[str, Any]
    tensors: dict[str, Any]
    folder: Path
    compat: str = "authors"
    origin: dict[str, str] = dataclasses.field(default_factory=dict)  # repository, commit, sha256

    @property
    def keys(self) -> set[str]:
        return set(self.tensors)

    def replace(self, **changes: Any) -> "Checkpoint":
        return dataclasses.replace(self, **changes)

    @property
    def suffix(self) -> str:
        return Path(self.source).suffix


def read(
    path_or_repo: str | Path, sae_id: str | None, revision: str | None, compat: str = "authors"
) -> Checkpoint:
    """Find and read one checkpoint; every error names the place and the fix."""
    local = Path(path_or_repo).expanduser()
    name = str(path_or_repo)
    root, origin = local, {}
    if local.exists():
        if revision is not None:
            raise FastsaeError(f"revision: {local} is a local folder, it has no revisions")
    else:
        if name.startswith(("/", ".", "~")) or name.count("/") != 1:
            raise FastsaeError(f"{name}: no such folder, and not a hub repository (org/name)")
        root, origin = _download(name, sae_id, revision), {"repository": name}
    weights = _weights(root / sae_id if sae_id else root, name if origin else None)
    inside = weights.relative_to(root) if weights != root else Path(weights.name)
    if origin:
        origin |= _provenance(root, weights)
        name = f"{name}/{inside.as_posix()}"
    else:
        name = weights.absolute().as_posix()
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    return Checkpoint(
        str(weights), name, _cfg(folder), read_weights(weights), folder, compat, origin
    )


def _cfg(folder: Path) -> dict[str, Any]:
    for name in CONFIGS:
        if (folder / name).is_file():
            return read_json(folder / name)
    cfg: dict[str, Any] = {}
    for name in YAMLS:
        if (folder / name).is_file():
            # wandb writes every entry as {"desc", "value"}.
            found = read_yaml(folder / name).items()
            cfg |= {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in found}
    return cfg


def _weights(target: Path, repository: str | None) -> Path:
    if target.is_file():
        if target.suffix not in SUFFIXES:
            raise FastsaeError(f"{target}: not a weights file ({', '.join(SUFFIXES)})")
        return target
    where = f"{repository}: has no SAE at {target.name}, " if repository else f"{target}: "
    if not target.is_dir():
        raise FastsaeError(
            f"{where}no such folder or file; sae_id is the folder or file of one SAE"
        )
    for name in WEIGHTS:
        if (target / name).is_file():
            return target / name
    others = sorted(p for p in target.iterdir() if p.suffix in SUFFIXES)
    others = [p for p in others if p.name not in _NOT_WEIGHTS]
    if len(others) == 1:
        return others[0]
    inside = others or sorted(
        {p.parent for name in WEIGHTS for p in target.glob(f"**/{Path(name).name}")}
    )
    if inside:
        listed = ", ".join(str(p.relative_to(target)) for p in inside[:6])
        more = f" and {len(inside) - 6} more" if len(inside) > 6 else ""
        raise FastsaeError(f"{where}holds several SAEs; pass one as sae_id: {listed}{more}")
    raise FastsaeError(
        f"{where}no weights, such as {WEIGHTS[0]}; the folder is not an SAE checkpoint; sae_id is "
        "the folder or file of one SAE"
    )


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
    try:
        root = snapshot_download(repository, revision=revision, allow_patterns=wanted(sae_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FastsaeError(
            f"{repository}: no such folder, and the hub did not give it: {first_line(error)}"
        ) from error
    return Path(root)


def wanted(sae_id: str | None) -> list[str]:
    """The files of a repository that one SAE may need, by whole names: the hub's * crosses
    folders, and a repository may hold hundreds of SAEs."""
    if sae_id and sae_id.endswith(SUFFIXES):
        prefix = sae_id.rpartition("/")[0]
        names = [*CONFIGS, *YAMLS]
        return [sae_id] + [f"{prefix}/{name}" if prefix else name for name in names]
    names = [CONFIGS[0], WEIGHTS[0], OURS, STATS, *CONFIGS[1:], *WEIGHTS[1:]]
    return [f"{sae_id}/{name}" if sae_id else name for name in names]


def _provenance(root: Path, weights: Path) -> dict[str, str]:
    """Commit and digest, as the hub's cache records them: snapshots/<commit>, blobs/<sha256>."""
    found = {"file": weights.relative_to(root).as_posix()}
    if root.parent.name == "snapshots":
        found["commit"] = root.name
    blob = weights.resolve().name
    if len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        found["sha256"] = blob
    return found
