"""The CUDA C++ ops of csrc/, compiled for the CPU: fixtures of the tests that run them there.

The sources are used as they are, but for a few lines that C++ cannot say; emulation.h says what
those become and what is checked. Tensors stay on the CPU: the bindings, and their checks, are
csrc/ops_cuda.cu's own.
"""

import ctypes
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastsae.ops import backend, schema

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent.parent / "csrc"
ARCHITECTURES = {"sm_80": 800, "sm_90": 900}  # without and with clusters of blocks
LEAVES = ("_decode_rows", "_steer_rows")

# What C++ cannot say. Each stands once in its file: a source that changes is not passed over.
SITE = "emulation::Site at = emulation::Site::current()"
LAUNCHED = "decode_rows_kernel<Value, Weight, Out, C>"
SUBSTITUTIONS = {
    "ops_cuda.cu": {"(fastsae, CUDA, m)": "(fastsae_{arch}, CPU, m)"},
    "decode.cuh": {
        f"{LAUNCHED}<<<grid, 32 * kDecodeWarps, 0, stream>>>(p);": f"emulated_launch("
        f"grid, 32 * kDecodeWarps, 0, stream, {LAUNCHED}, p);"
    },
    "cluster.cuh": {  # barriers are known by the line that calls cluster_sync
        "void cluster_sync() {": f"void cluster_sync({SITE}) {{",
        "this_cluster().sync();": "this_cluster().sync(at);",
        "__syncthreads();": "__syncthreads(at);",
    },
    "steer.cuh": {
        "#pragma once": '#include "emulation.h"',
        "extern __shared__ float4 memory[];": "auto memory = emulation::dynamic_shared();",
        "__shared__ SteerShared<R> shared;": "auto& shared = "
        "*(SteerShared<R>*)emulation::static_shared(sizeof(SteerShared<R>));",
    },
}
HEADERS = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "cooperative_groups.h")


def translate(folder: Path, arch: str) -> None:
    for name, pairs in SUBSTITUTIONS.items():
        text = (SOURCES / name).read_text()
        for cuda, plain in pairs.items():
            assert text.count(cuda) == 1, f"{name}: {cuda!r} stands there {text.count(cuda)} times"
            text = text.replace(cuda, plain.replace("{arch}", arch))
        (folder / name).write_text(text)
    for name in HEADERS:
        (folder / name).write_text('#include "emulation.h"\n')


def build(folder: Path, arch: str) -> Path:
    """A library of the ops, for an architecture."""
    translate(folder, arch)
    torch_folder = Path(torch.__file__).parent
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-fPIC"]
    compiler += ["-ffp-contract=off", "-U_FORTIFY_SOURCE", "-DUSE_CUDA"]
    compiler += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{torch_folder}/include"]
    compiler += [f"-DEMULATED_ARCH={ARCHITECTURES[arch]}", f"-I{HERE}", f"-I{folder}"]
    library = folder / "emulated.so"

    def run(*arguments):
        done = subprocess.run([*compiler, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    # Not linked with -fsanitize: the functions that it calls are in memory.cpp.
    objects = []
    for source in (folder / "ops_cuda.cu", HERE / "mistakes.cpp"):
        objects.append(folder / f"{source.stem}.o")
        run("-O1", "-fsanitize=thread,alignment", "-x", "c++", "-c", source, "-o", objects[-1])
    sources = HERE / "emulation.cpp", HERE / "memory.cpp"
    torch_libraries = f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"
    own_symbols = "-Wl,-Bsymbolic,--no-undefined"  # memory.cpp's, not torch's
    run("-O2", "-shared", own_symbols, *sources, *objects, *torch_libraries, "-o", library)
    return library


class Cuda:
    """The ops of csrc/ops_cuda.cu for one architecture, for tensors on the CPU."""

    def __init__(self, path: Path, arch: str):
        self.name = arch
        self.definitions = torch.library.Library(f"fastsae_{arch}", "DEF")
        for leaf in schema.LEAVES:
            if leaf.startswith(LEAVES):
                self.definitions.define(leaf)
        self.library = ctypes.CDLL(path)
        self.library.mistake.restype = ctypes.c_char_p
        self.ops = getattr(torch.ops, f"fastsae_{arch}")

    def decode(self, values, indices, W, b=None):
        return self.ops._decode_rows(values, indices, W, b)

    def steer(self, x, slots, strengths, table):
        return self.ops._steer_rows(x, slots, strengths, list(table))

    def steer_sample(self, s, rows=slice(None), **changes):
        """`steer` on some rows of what the fixture of this name makes."""
        given = {"x": s.x[rows], "slots": s.slots[rows], "strengths": s.strengths[rows]}
        return self.steer(**{**given, "table": s.table, **changes})

    def schedule(self, order: int = 0, without_barrier_at: int = 0) -> None:
        """How threads run from now on: 0 forward, 1 backward, others in a random order; and as if
        there were no barrier at this line."""
        self.library.emulate(order, without_barrier_at)

    def mistake(self, name: str) -> str:
        """What the emulation says of a kernel of mistakes.cpp."""
        return self.library.mistake(name.encode()).decode()


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(arch) for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(build, folders, ARCHITECTURES))
    return {
        arch: Cuda(library, arch) for arch, library in zip(ARCHITECTURES, libraries, strict=True)
    }


@pytest.fixture(params=ARCHITECTURES)
def cuda(request, builds):
    yield builds[request.param]
    builds[request.param].schedule()


@pytest.fixture
def cuda_is_native(cuda, monkeypatch):
    """backend="native" runs the CUDA kernels."""
    mine, real = {"decode": cuda.decode, "steer": cuda.steer}, backend.implementation
    monkeypatch.setattr(backend, "implementation", lambda op, name: mine.get(op) or real(op, name))
    monkeypatch.setattr(backend, "_compiled", lambda op: None)


@pytest.fixture
def demanding(steer_sample):
    """Operations and gates of more items than are found together, empty ones, thresholds below 0,
    and rows of all policies side by side."""

    def sample(n, d, **options):
        rows = 140
        some = [(i, 0.05 * torch.randn(()).item()) for i in range(rows)]
        policies = [
            ([], None, False),
            ([(1, some[:130], 0.0), (2, some[9:12], 0.0)], None, True),
            ([(3, some[-9:], 0.0), (4, some[3:6], 0.0)], (list(range(66)), -1.0), False),
            ([(5, some[:66], 0.5), (2, [], 0.0), (5, [], 1.0), (4, some[:70], 0.0)], None, False),
            ([(4, some[:9], 0.0)], ([4, 5], 1e9), True),
            ([], None, True),
        ]
        s = steer_sample(n, d, rows, policies=policies, **options)
        s.slots = torch.randint(0, len(policies), (n,), dtype=torch.int32)
        s.table.theta[1::4] -= 1.0
        return s

    return sample
