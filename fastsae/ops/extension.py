"""Find and load the compiled ops (`fastsae/_ops*.so`), and say in words when they are not there."""

import functools
from pathlib import Path

import torch

_REBUILD = "build it with: pip install --no-build-isolation -e ."


@functools.cache
def problem() -> str | None:
    """None when the extension is loaded, else one line: not built, or built for another torch."""
    found = sorted(Path(__file__).resolve().parent.parent.glob("_ops*.so"))
    if not found:
        return f"the extension is not built ({_REBUILD})"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        version = torch.__version__
        return f"the extension does not load into torch {version}: {first} ({_REBUILD})"
    return None


def build_info() -> dict[str, object]:
    """What `fastsae._C` knows of the build (compiler, torch, architectures); {} when not built."""
    if problem() is not None:
        return {}
    from fastsae import _C

    return {**_C.build_info(), "cpu": _C.cpu_features()}
