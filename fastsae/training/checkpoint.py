"""Checkpoints of a training run: written whole or not at all, the last two kept, no pickle.

`directory/step-00001000/` holds state.safetensors (weights, Adam moments, dead-feature clock,
shuffle buffer, random state) and state.json (step, settings, scalars).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.training.config import FREE_FIELDS
from fastsae.training.files import disk_errors, replace_directory

KEEP = 2


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], settings: dict) -> Path:
    """Write one checkpoint and drop all but the last two; returns its directory.

    state: nested dicts with string keys whose leaves are tensors or JSON values. On a full disk the
    draft is removed, the earlier checkpoints stay, and a FastsaeError says so in one line.
    """
    tensors: dict[str, Tensor] = {}
    scalars = _split(state, tensors)
    final = directory / f"step-{step:08d}"
    draft = directory / f"step-{step:08d}.partial"
    before = steps(directory)
    kept = f"; the checkpoint of step {before[-1]} is intact" if before else ""
    try:
        with disk_errors("a checkpoint", directory, kept):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            save_file(
                {k: v.detach().contiguous().cpu() for k, v in tensors.items()},
                draft / "state.safetensors",
            )
            record = {"version": 1, "step": step, "settings": settings, "scalars": scalars}
            (draft / "state.json").write_text(json.dumps(record))
            replace_directory(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in steps(directory)[:-KEEP]:
        shutil.rmtree(directory / f"step-{old:08d}")
    return final


def load_checkpoint(directory: Path, step: int) -> tuple[dict[str, Any], dict]:
    """(state, settings) of a checkpoint; a damaged one is a FastsaeError."""
    place = directory / f"step-{step:08d}"
    try:
        record = json.loads((place / "state.json").read_text())
        tensors = load_file(place / "state.safetensors")
        return _join(record["scalars"], tensors), record["settings"]
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise FastsaeError(
            f"resume: cannot read the checkpoint {place} ({error}); delete that directory to "
            "continue from the one before"
        ) from error


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    names = (path.name for path in directory.glob("step-*") if path.is_dir())
    return sorted(int(n[5:]) for n in names if n[5:].isdigit())


def check_settings(
    found: dict, wanted: dict, place: Path, free: tuple[str, ...] = FREE_FIELDS
) -> None:
    """Refuse to continue a run whose settings differ, naming the first field that does."""
    for name in wanted:
        if name not in free and found.get(name) != wanted[name]:
            raise FastsaeError(
                f"resume: {name} is {wanted[name]!r}, but {place} was trained with "
                f"{found.get(name)!r}; use the same value, another output, or resume='never' to "
                "start over"
            )


def _split(state: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The state with its tensors moved to `tensors` and replaced by {"tensor": name}."""
    if isinstance(state, Tensor):
        tensors[path] = state
        return {"tensor": path}
    if isinstance(state, dict):
        return {k: _split(v, tensors, f"{path}.{k}" if path else k) for k, v in state.items()}
    return state


def _join(state: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, dict):
        if state.keys() == {"tensor"}:
            return tensors[state["tensor"]]
        return {k: _join(v, tensors) for k, v in state.items()}
    return state
