"""Compiles every GPU kernel ahead of time, on any machine; fails on local memory or wrong code.

    python -P benchmarks/gpu_compile.py [--arch 80 90 100] [--only decode topk] [--csv FILE]

Triton kernels: the cases of every `AOT` list in kernels/, for sm_80, sm_90 and sm_100, with the
divisibility attributes that a launch would infer; registers and local memory are read from the
machine code with the cuobjdump and nvdisasm that the triton package ships. Where less shared memory
fits a block (sm_89, sm_120), only the cases that name them, as they are launched there; `--arch`
compiles the others for them too. More shared memory than a block may have fails. CUDA C++: every
csrc/*.cu with nvcc for sm_80 and sm_90a. No GPU and no CUDA torch is needed.

A case may say what its code must hold: {"sm_90": ("wgmma", "LDG.E.128|LDG.E.EF.128", "!atom")}
lists texts of which each must occur in the PTX or the SASS ("|" separates alternatives; "!": must
not occur). In a .cu file the same is a comment, `// expect sm_90a kernel: text, text`. After
that a case may name the architectures that it is launched on, where its sizes depend on them.
"""

import argparse
import concurrent.futures
import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
SMALL = (89, 120)
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # per block, at most
NVCC_ARCHITECTURES = ("80", "90a")
TORCH_TARGET = "0x020b000000000000"  # torch 2.11, the oldest that the stable-ABI library loads in
NVCC_MISSING = (
    "nvcc: not on PATH and not in site-packages/nvidia, but csrc/ holds CUDA sources. Fix:\n"
    "  pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' "
    "'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'"
)


def stems() -> list[str]:
    """Files of kernels/ with compile cases."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [path.stem for path in files if "\nAOT = " in path.read_text()]


def cases(stem: str) -> list[tuple]:
    return importlib.import_module(f"fastsae.kernels.{stem}").AOT


def spills(disassembly: str) -> int:
    """Loads from and stores to local memory in SASS: spilled registers or indexed arrays."""
    return len(re.findall(r"\b(?:STL|LDL)\b", disassembly))


def unmet(expected: tuple[str, ...], code: str) -> list[str]:
    """The texts of `expected` that `code` does not bear out."""
    if isinstance(expected, str):
        raise TypeError(f"expectations: got the text {expected!r}, expected a tuple of texts")
    found = {}
    for text in expected:
        present = any(choice in code for choice in text.removeprefix("!").split("|"))
        found[text] = present != text.startswith("!")
    return [text for text, holds in found.items() if not holds]


def resources(usage: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one kernel in `cuobjdump --dump-resource-usage` output."""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: no resource usage in its output:\n{usage}")
    return dict(
        zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True)
    )


def _tool(name: str) -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(shipped) if shipped.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(
            f"{name}: neither in the triton package nor on PATH (pip install triton)"
        )
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_triton(stem: str, number: int, arch: int) -> dict:
    """One case of one AOT list for one architecture: a row of the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constexprs, options, *rest = cases(stem)[number]
    types = dict.fromkeys(constexprs, "constexpr")
    attributes = {}
    for name, declared in signature.items():
        types[name], _, divisor = declared.partition(":")
        if divisor:
            attributes[(kernel.arg_names.index(name),)] = [["tt.divisibility", int(divisor)]]
    started = time.perf_counter()
    source = ASTSource(kernel, signature=types, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"enable_fp_fusion": True, **options},
    )
    seconds = time.perf_counter() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = resources(_run(_tool("cuobjdump"), "--dump-resource-usage", file.name))
        sass = _run(_tool("nvdisasm"), file.name)
    # A stack frame is legal without spills (an alignment slot), so the instructions decide.
    local = max(spills(sass), used["local"])
    wanted = rest[0].get(f"sm_{arch}", ()) if rest else ()
    pointers = sorted({t[1:] for t in types.values() if t.startswith("*")})
    shape = " ".join(f"{k}={v}" for k, v in constexprs.items())
    return {
        "kernel": kernel.__name__,
        "case": f"{'/'.join(pointers)} {shape} warps={options['num_warps']}",
        "arch": f"sm_{arch}",
        "registers": used["registers"],
        "shared_bytes": compiled.metadata.shared,
        "spills": local,
        "seconds": round(seconds, 1),
        "unmet": unmet(wanted, compiled.asm["ptx"] + sass),
    }


def find_nvcc() -> str | None:
    """nvcc on PATH, else the one of the nvidia-cuda-nvcc wheel in this environment."""
    on_path = shutil.which("nvcc")
    if on_path:
        return on_path
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    shipped = (site / folder / "bin" / "nvcc" for folder in ("cu13", "cuda_nvcc"))
    return next((str(path) for path in shipped if path.exists()), None)


def compile_cuda(source: Path, arch: str, nvcc: str) -> list[dict]:
    """One csrc/*.cu for one architecture: a row per kernel, from ptxas -v."""
    from torch.utils.cpp_extension import include_paths

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/out.cubin"
        command = [nvcc, "-cubin", str(source), "-o", cubin, "-O3", "-std=c++20"]
        command += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-Xptxas", "-v"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"]
        command += [f"-I{path}" for path in (*include_paths(), *_wheel_includes(nvcc))]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        code = functions(_run(_tool("nvdisasm"), cubin))
    seconds = round(time.perf_counter() - started, 1)
    rows = parse_ptxas(result.stdout + result.stderr)
    names = _demangle([row["kernel"] for row in rows])
    wanted = expectations(source.read_text(), f"sm_{arch}")
    for row, name in zip(rows, names, strict=True):
        sass = code[row["kernel"]]
        mine = [texts for kernel, texts in wanted.items() if kernel in row["kernel"]]
        row["spills"] = max(row["spills"], spills(sass))
        row |= {"kernel": name, "case": source.name, "arch": f"sm_{arch}", "seconds": seconds}
        row["unmet"] = unmet(sum(mine, ()), sass)
    missing = [kernel for kernel in wanted if not any(kernel in row for row in code)]
    if missing:
        raise RuntimeError(f"{source.name} expects something of {missing}, which it does not hold")
    return rows


def functions(disassembly: str) -> dict[str, str]:
    """{mangled name: SASS} of the kernels in nvdisasm's output for a cubin."""
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+)", disassembly, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def expectations(source: str, arch: str) -> dict[str, tuple[str, ...]]:
    """{part of a kernel's name: texts} from the comments `// expect ARCH NAME: text, text`."""
    lines = re.findall(rf"^// expect {arch} (\w+): (.+)$", source, re.M)
    return {name: tuple(text.strip() for text in texts.split(",")) for name, texts in lines}


def parse_ptxas(log: str) -> list[dict]:
    """Kernels, registers, static shared memory and spills from a `ptxas -v` log."""
    rows = []
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = re.search(r"Compiling entry function '([^']+)'", block).group(1)
        shared = re.search(r"(\d+) bytes smem", block)
        rows.append(
            {
                "kernel": name,
                "registers": int(re.search(r"Used (\d+) registers", block).group(1)),
                "shared_bytes": int(shared.group(1)) if shared else 0,
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill", block))),
            }
        )
    return rows


def _wheel_includes(nvcc: str) -> list[Path]:
    """Headers beside a pip-installed nvcc (runtime, crt, cccl); a toolkit finds its own."""
    include = Path(nvcc).resolve().parent.parent / "include"
    return [path for path in (include, include / "cccl") if path.exists()]


def _demangle(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    lines = _run("c++filt", *names).splitlines()
    return [re.sub(r"\(.*", "", line).removeprefix("void ").split("::")[-1] for line in lines]


def _jobs(options, nvcc: str | None) -> list[tuple]:
    triton_jobs = [
        (compile_triton, (stem, number, arch))
        for stem in stems()
        if not options.only or stem in options.only
        for number in range(len(cases(stem)))
        for arch in options.arch or (*ARCHITECTURES, *SMALL)
        if meant(cases(stem)[number], arch, options.arch)
    ]
    sources = [
        source
        for source in sorted((ROOT / "csrc").glob("*.cu"))
        if not options.only or source.stem in options.only
    ]
    if sources and nvcc is None:
        raise SystemExit(NVCC_MISSING)
    cuda_jobs = [(compile_cuda, (s, arch, nvcc)) for s in sources for arch in NVCC_ARCHITECTURES]
    return cuda_jobs + triton_jobs  # the long ones first


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KB, help="for Triton")
    parser.add_argument("--only", nargs="+", help="stems of kernels/ and csrc/*.cu to compile")
    parser.add_argument("--csv", type=Path, help="write the report there too")
    options = parser.parse_args(arguments)
    # An interpreted kernel cannot be compiled; the variable is read when triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    rows, failures = [], []
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            (function, args, pool.submit(function, *args))
            for function, args in _jobs(options, find_nvcc())
        ]
        for function, args, future in jobs:
            try:
                result = future.result()
            except Exception as error:  # report every kernel that fails, not the first one only
                failures.append(f"{function.__name__}{args}: {type(error).__name__}: {error}")
                continue
            rows += result if isinstance(result, list) else [result]
    report(rows, options.csv)
    for r in rows:
        where = f"{r['kernel']} ({r['case']}, {r['arch']})"
        if r["spills"]:
            failures.append(f"{where}: {r['spills']} accesses to local memory")
        failures += too_large(r)
        failures += [f"{where}: {_said(text)} in its code" for text in r["unmet"]]
    if not rows:
        failures.append("nothing was compiled: no case matches the options")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{len(rows)} kernels in {time.perf_counter() - started:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


def meant(case: tuple, arch: int, asked: list[int] | None) -> bool:
    """Whether a case is compiled for an architecture: one that it is launched on, if it says so."""
    if len(case) > 5:
        return f"sm_{arch}" in case[5]
    return arch not in SMALL or asked is not None


def too_large(row: dict) -> list[str]:
    """What fails where a kernel's shared memory is more than a block may have."""
    most = SHARED_KB[int(row["arch"].removeprefix("sm_").rstrip("a"))] << 10
    if row["shared_bytes"] <= most:
        return []
    where = f"{row['kernel']} ({row['case']}, {row['arch']})"
    return [f"{where}: {row['shared_bytes']} bytes of shared memory, a block has {most}"]


def _said(text: str) -> str:
    return f"{text[1:]!r} occurs" if text.startswith("!") else f"no {text!r}"


def report(rows: list[dict], path: Path | None) -> None:
    print(f"{'kernel':28} {'arch':7} {'reg':>4} {'shared':>7} {'spill':>5} {'s':>5}  case")
    for r in rows:
        print(
            f"{r['kernel'][:28]:28} {r['arch']:7} {r['registers']:4} {r['shared_bytes']:7} "
            f"{r['spills']:5} {r['seconds']:5}  {r['case']}"
        )
    if path is not None:
        with path.open("w", newline="") as file:
            names = [name for name in rows[0] if name != "unmet"] if rows else ["kernel"]
            writer = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
