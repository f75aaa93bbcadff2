"""What pyproject.toml cannot compute: whether and how to build the C++ and CUDA extensions.

FASTSAE_BUILD=auto (default): the CPU extension when torch and a C++ compiler exist, CUDA on top
when torch has CUDA and nvcc exists. none | cpu | cuda ask for exactly that; what was asked for and
cannot be built is an error. CUDA architectures come from TORCH_CUDA_ARCH_LIST, never from a GPU.
"""

import os
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

from setuptools import Extension, find_packages, setup

CHOICES = ("auto", "none", "cpu", "cuda")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
SOURCES = (
    "kernels_scalar kernels_avx2 kernels_avx512 kernels_amx cpu workspace"
    " ops_copy ops_decode ops_encode ops_mi ops_residual ops_select ops_sparse ops_steer ops_watch"
).split()


def extensions(wanted: str) -> tuple[list, dict]:
    """Extensions to build and setup()'s cmdclass; ([], {}) where there is nothing to build."""
    if wanted not in CHOICES:
        raise SystemExit(f"FASTSAE_BUILD: got {wanted!r}, accepted are {', '.join(CHOICES)}")
    if wanted == "none":
        return [], {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return impossible(wanted, f"torch is not importable ({error}); use --no-build-isolation")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return impossible(wanted, f"no C++ compiler {compiler!r} on PATH; install one or set CXX")
    nvcc = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    if wanted == "cuda" and not nvcc:
        impossible(wanted, "it needs nvcc (set CUDA_HOME) and a CUDA build of torch")
    cuda = nvcc and wanted != "cpu"
    return [ops(cpp_extension, cuda), module(torch, cuda)], {
        "build_ext": cpp_extension.BuildExtension
    }


def impossible(wanted: str, reason: str) -> tuple[list, dict]:
    if wanted != "auto":
        raise SystemExit(f"FASTSAE_BUILD={wanted} is impossible: {reason}")
    print(f"fastsae: building without C++ ops: {reason}")
    return [], {}


def ops(cpp_extension, cuda: bool) -> Extension:
    """The tensor ops: no Python, no ATen, torch's stable ABI; loaded by torch.ops.load_library."""
    # No contraction: which product of a sum is fused must not be the compiler's choice.
    flags = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", STABLE_ABI]
    flags += ["-fno-trapping-math"]  # nobody reads exception flags: comparisons may vectorise
    # GCC 12's own AVX-512 headers set these warnings off.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    sources = [f"csrc/{name}.cpp" for name in SOURCES]
    args = {"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", STABLE_ABI]}
    kind, folders = cpp_extension.CppExtension, []
    if cuda:
        sources, kind = [*sources, "csrc/ops_cuda.cu"], cpp_extension.CUDAExtension
        folders = toolkit_libraries(f"{cpp_extension.CUDA_HOME}/bin/nvcc")
    return kind(
        "fastsae._ops",
        sources,
        extra_compile_args=args,
        library_dirs=folders,
        py_limited_api=True,
    )


def toolkit_libraries(nvcc: str) -> list[str]:
    """The folders that nvcc links from; torch's guess is wrong where nvcc on PATH is a wrapper."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    said = [line for line in dry.stderr.splitlines() if line.startswith("#$ LIBRARIES=")]
    flags = shlex.split(said[0].split("=", 1)[1]) if said else []
    return [flag.removeprefix("-L") for flag in flags if flag.startswith("-L")]


def module(torch, cuda: bool) -> Extension:
    """fastsae._C: build information and processor features."""
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if cuda else ""
    facts = {"VERSION": version, "TORCH": torch.__version__, "ARCHS": archs}
    macros = [(f"FASTSAE_{name}", f'"{value}"') for name, value in facts.items()]
    macros.append(("FASTSAE_CUDA", str(int(cuda))))
    include = [f"{Path(torch.__file__).parent}/include"]  # torch ships pybind11's headers
    flags = ["-O2", "-g0", "-std=c++20", "-fvisibility=hidden"]
    source = ["csrc/module.cpp"]
    return Extension("fastsae._C", source, include, macros, extra_compile_args=flags)


ext_modules, cmdclass = extensions(os.environ.get("FASTSAE_BUILD", "auto"))
packages = find_packages(include=["fastsae*"]) + ["fastsae.kernels"]
package_dir = {"fastsae.kernels": "kernels"}
setup(packages=packages, package_dir=package_dir, ext_modules=ext_modules, cmdclass=cmdclass)
