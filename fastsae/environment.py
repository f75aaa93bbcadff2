"""What this installation is and which backend serves each op: the content of `fastsae env`."""

import ctypes
import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

from fastsae.ops import backend, extension, screens

_PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "gguf", "wordfreq")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for reuse instead of returning them to the system.

    A generated token allocates logits of 100 MB and more several times over; fresh pages cost more
    time than the arithmetic on them (measured: a third of a sampling step). No effect elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_max, 0)


def describe() -> dict[str, object]:
    """Versions, hardware, the compiled extension, and per device and op the backend and why."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    ops = {}
    for device in devices:
        for op in backend.OPS:
            try:
                choice = backend.choose(op, torch.empty(0, device=device))
            except backend.BackendError as error:  # forced by FASTSAE_BACKEND, and impossible
                choice = backend.Choice("none", str(error))
            others = {
                name: backend.unavailable(op, name, device) or "available"
                for name in backend.BACKENDS
                if name != choice.name
            }
            ops.setdefault(device, {})[op] = {**choice._asdict(), "others": others}
    return {
        "fastsae": version_of("fastsae-engine"),
        "python": sys.version.split()[0],
        "packages": {name: version_of(name) for name in _PACKAGES},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extension": extension.problem() or "loaded",
        "build": extension.build_info(),
        "screen_copies": "made when needed" if screens.enabled() else "off (FASTSAE_SCREENS=0)",
        "ops": ops,
    }


def as_text(found: dict) -> str:
    """`describe()` for a person."""
    packages = ", ".join(f"{n} {v or 'not installed'}" for n, v in found["packages"].items())
    lines = [
        f"fastsae {found['fastsae']}, Python {found['python']}",
        f"packages   {packages}",
        f"cpu        {found['cpu']}, {found['threads']} threads",
        f"gpu        {found['gpu'] or 'none'}",
        f"extension  {found['extension']}",
    ]
    for name, value in found["build"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        lines.append(f"           {name}: {value}")
    lines.append(f"copies of weights for screens: {found['screen_copies']}")
    for device, ops in found["ops"].items():
        lines += ["", f"{'op on ' + device:24}{'backend':12}reason"]
        lines += [f"{op:24}{row['name']:12}{row['reason']}" for op, row in ops.items()]
        why: dict[tuple[str, str], list[str]] = {}
        for op, row in ops.items():
            for other, reason in row["others"].items():
                why.setdefault((other, reason), []).append(op)
        for (other, reason), names in why.items():
            scope = "all ops" if len(names) == len(ops) else ", ".join(names)
            lines.append(f"  {other}: {reason} ({scope})")
    return "\n".join(lines)
