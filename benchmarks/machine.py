"""What a measurement ran on and with: hardware, versions, commit, other load, resident memory."""

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# Written by what is recorded here, so changes to them do not change what was measured.
GENERATED = ("benchmarks/results", "README.md")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _cpuinfo(field: str) -> str:
    for line in _output("cat", "/proc/cpuinfo").splitlines():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def commit() -> str:
    """The short hash, with "-dirty" when a file that is not generated differs from it."""
    others = [f":!{path}" for path in GENERATED]
    changed = _output("git", "status", "--porcelain", "--", ".", *others)
    return _output("git", "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def command() -> str:
    """The command line that repeats this run from the repository's root."""
    script = os.path.relpath(os.path.abspath(sys.argv[0]), ROOT)
    return shlex.join(["python", "-P", script, *sys.argv[1:]])


def machine(device: str) -> dict[str, object]:
    """Columns of `Row` that are the same for a whole run."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        clocks = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader")
    else:
        has = set(_cpuinfo("flags").split())
        flags = " ".join(flag for flag in FLAGS if flag in has)
        name = (_cpuinfo("model name") or platform.processor()) + (f" ({flags})" if flags else "")
        clocks = ""
    return {
        "device": name,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fastsae": version("fastsae-engine"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
    }


class Load:
    """Cores that others use while this process works: a busy machine lies.

    Others are other processes and, on a virtual machine, the neighbours that the host served
    instead (steal). 0 where /proc/stat does not exist.
    """

    def __init__(self) -> None:
        self.cores = os.cpu_count() or 1
        self.start()

    def start(self) -> None:
        self.before = self._seconds()

    def others(self) -> float:
        """Mean number of cores since `start`."""
        (total, idle, own), then = self._seconds(), self.before
        passed = (total - then[0]) / self.cores
        if passed <= 0:
            return 0.0
        return max(0.0, (total - then[0] - (idle - then[1]) - (own - then[2])) / passed)

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        own = os.times()
        mine = own.user + own.system
        if not Path("/proc/stat").exists():
            return 0.0, 0.0, mine
        fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
        tick = os.sysconf("SC_CLK_TCK")
        return sum(fields) / tick, (fields[3] + fields[4]) / tick, mine


def busy(seconds: float = 1.0) -> float:
    """Cores that others use during the next `seconds`."""
    load = Load()
    time.sleep(seconds)
    return load.others()


def last_level_cache_bytes() -> int:
    """Of the first CPU; 32 MB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=32 << 20)


# --- resident memory -----------------------------------------------------------------------------


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def _forget_peak() -> bool:
    """Sets the process's peak resident size to its present one; False where that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _freed_at_once() -> Iterator[Callable]:
    """Freed blocks go back to the system, so that resident memory is memory in use.

    Yields a function that gives back what was freed before. glibc keeps freed blocks below a
    threshold that grows with what a process frees, up to 32 MB; by default the peak of a call would
    depend on the calls before it. Afterwards the threshold is those 32 MB, where a process that
    frees large tensors arrives by itself. Without glibc the peak is an upper bound.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield gc.collect
        return
    mallopt(mmap_threshold, 1 << 20)
    mallopt(trim_threshold, 1 << 20)
    try:
        yield lambda: (gc.collect(), trim(0))
    finally:
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def _tensors(result) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield from (result._indices(), result._values()) if result.is_sparse else (result,)
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def output_bytes(result) -> int:
    """Memory that a call's result holds: every storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(result)}
    return sum(storage.nbytes() for storage in storages.values())


def resident_growth(function: Callable) -> tuple[object, int | None]:
    """The result of `function()` and how far its call raised the peak resident size, in bytes.

    All allocations count, whoever made them: torch, C++, BLAS scratch. Exact to about 0.3 MB (the
    system counts pages in batches). None where the system offers no way to reset the peak.
    """
    with _freed_at_once() as trim:
        trim()
        if not (Path("/proc/self/status").exists() and _forget_peak()):
            return function(), None
        before = _status("VmRSS")
        result = function()
        return result, max(0, _status("VmHWM") - before)


def kept_bytes(function: Callable) -> tuple[object, int | None]:
    """The result of `function()` and the memory, beside it, that the call left allocated."""
    if not Path("/proc/self/status").exists():
        return function(), None
    with _freed_at_once() as trim:
        trim()
        before = _status("RssAnon")
        result = function()
        trim()
        return result, max(0, _status("RssAnon") - before - output_bytes(result))
