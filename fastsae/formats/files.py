"""Files of checkpoints: read each kind safely, write all or nothing."""

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.errors import FastsaeError

PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", ".npz", *PICKLES)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint") from error
    except (ValueError, OSError) as error:
        raise FastsaeError(f"{path}: cannot read it as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise FastsaeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise FastsaeError(f"{path}: to read it run: pip install pyyaml") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise FastsaeError(f"{path}: cannot read it as YAML: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise FastsaeError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def read_weights(path: Path) -> dict[str, Any]:
    """Everything in a weights file: tensors by name, and what else a pickle holds.

    Pickles are read with `weights_only=True`: one that would run code is refused.
    """
    if not path.is_file():
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint")
    if path.suffix == ".npz":
        return _read_npz(path)
    return _read_pickle(path) if path.suffix in PICKLES else read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped from it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FastsaeError(f"{path}: no such file; the folder is not an SAE checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise FastsaeError(
            f"{path}: truncated or not a safetensors file: {first_line(error)}"
        ) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise FastsaeError(
            f"{path}: truncated or not an npz archive of numbers: {first_line(error)}"
        ) from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise FastsaeError(
                f"{path}: refused, it holds more than tensors and plain values, and loading it "
                "could run code; save it as safetensors where you trust it"
            ) from error
        raise FastsaeError(f"{path}: not a file of torch.save: {first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise FastsaeError(
            f"{path}: truncated or not a file of torch.save: {first_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise FastsaeError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    return {str(name): value for name, value in content.items()}


# --- writing ------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_all({path: tensor_writer(tensors)})


def write_text(path: Path, text: str) -> None:
    write_all({path: text_writer(text)})


def json_text(argument: str, content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FastsaeError(f"{argument}: cannot be written as JSON: {error}") from error


def text_writer(text: str) -> Callable[[str], None]:
    return lambda path: Path(path).write_text(text, encoding="utf-8") and None


def tensor_writer(tensors: dict[str, Tensor]) -> Callable[[str], None]:
    def write(path: str) -> None:
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in tensors.items()}, path)

    return write


def write_all(files: dict[Path, Callable[[str], None]]) -> None:
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
        raise FastsaeError(f"{path}: cannot write: {first_line(error)}") from error
    finally:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)
