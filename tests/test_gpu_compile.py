"""benchmarks/gpu_compile.py: no kernel is forgotten, spills are seen, a kernel does compile."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu_compile():
    path = ROOT / "benchmarks" / "gpu_compile.py"
    spec = importlib.util.spec_from_file_location("gpu_compile", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jit_functions(path):
    return [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def test_every_kernel_has_a_compile_case(gpu_compile):
    checked = 0
    for path in (ROOT / "kernels").glob("*.py"):
        functions = jit_functions(path)
        launched = set(re.findall(r"^\s*(\w+)\[\w*\(?", path.read_text(), re.M))
        for function in functions:
            # `_x_kernel` is what a launcher starts; other jit functions are inlined into those.
            entry = function.name.endswith("_kernel")
            assert entry or function.name not in launched, f"{function.name}: name it _..._kernel"
        entries = {f.name for f in functions if f.name.endswith("_kernel")}
        if entries:
            covered = {case[0].__name__ for case in gpu_compile.cases(path.stem)}
            assert covered == entries, f"kernels/{path.name}: AOT covers {covered}"
            checked += len(entries)
    assert checked >= 10


def test_cases_name_every_argument(gpu_compile):
    """A misspelt or missing argument would compile another kernel than the one launched."""
    for stem in gpu_compile.stems():
        functions = jit_functions(ROOT / "kernels" / f"{stem}.py")
        arguments = {f.name: [a.arg for a in f.args.args] for f in functions}
        for kernel, signature, constexprs, options, *_ in gpu_compile.cases(stem):
            given = [*signature, *constexprs]
            assert sorted(given) == sorted(arguments[kernel.__name__]), kernel.__name__
            assert options["num_warps"] in (1, 2, 4, 8, 16, 32)


def test_spills_are_seen(gpu_compile):
    assert gpu_compile.spills("  /*0010*/  STL [R1], R6 ;\n  /*0020*/ LDL.LU R7, [R1] ;\n") == 2
    assert gpu_compile.spills("  /*0010*/  LDG.E R6, [R2] ;\n  /*0020*/ STS [R1], R6 ;\n") == 0
    log = """ptxas info    : Compiling entry function '_Z3addPf' for 'sm_80'
ptxas info    : Function properties for _Z3addPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem
"""
    wanted = {"kernel": "_Z3addPf", "registers": 32, "shared_bytes": 1024, "spills": 16}
    assert gpu_compile.parse_ptxas(log) == [wanted]
    with pytest.raises(RuntimeError, match="cuobjdump"):
        gpu_compile.resources("nothing")


def test_expectations_are_texts_of_the_code(gpu_compile):
    code = "LDG.E.EF.128 R4, [R2] ;\n wgmma.mma_async"
    assert gpu_compile.unmet(("wgmma", "LDG.E.128|LDG.E.EF.128", "!ATOM"), code) == []
    assert gpu_compile.unmet(("LDG.E.128", "!wgmma"), code) == ["LDG.E.128", "!wgmma"]
    with pytest.raises(TypeError, match="tuple"):
        gpu_compile.unmet("wgmma", code)
    source = "// expect sm_80 add_kernel: LDG.E.128, !ATOM\n// expect sm_90a add_kernel: UTMALDG\n"
    assert gpu_compile.expectations(source, "sm_80") == {"add_kernel": ("LDG.E.128", "!ATOM")}
    listing = 'header\n\t.section\t.text._Z3addPf,"ax"\n STG\n.section .text._Z3subPf,x\n LDG\n'
    found = gpu_compile.functions(listing)
    assert list(found) == ["_Z3addPf", "_Z3subPf"] and "LDG" in found["_Z3subPf"]


def test_what_a_block_may_not_have_fails(gpu_compile):
    row = {"kernel": "k", "case": "c", "arch": "sm_89", "shared_bytes": 99 << 10}
    assert gpu_compile.too_large(row) == []
    (line,) = gpu_compile.too_large({**row, "shared_bytes": (99 << 10) + 1})
    assert "101377 bytes" in line and "101376" in line
    assert gpu_compile.too_large({**row, "arch": "sm_90a", "shared_bytes": 227 << 10}) == []


def test_cases_that_depend_on_shared_memory_are_compiled_where_they_are_launched(gpu_compile):
    """Of every kernel of tiles in flight a configuration for each size of shared memory."""
    from fastsae.kernels import fused

    every = (*gpu_compile.ARCHITECTURES, *gpu_compile.SMALL)
    for BN in (16, 64):
        step = [
            case
            for case in gpu_compile.cases("fused")
            if case[0] is fused._step_kernel and case[2]["BN"] == BN
        ]
        for arch in every:
            (case,) = [c for c in step if gpu_compile.meant(c, arch, None)]
            most = gpu_compile.SHARED_KB[arch] << 10
            assert case[2]["STAGES"] == fused._step_config(BN, most)["STAGES"] >= 3
    plain = gpu_compile.cases("topk")[0]
    assert [a for a in every if gpu_compile.meant(plain, a, None)] == [80, 90, 100]
    assert gpu_compile.meant(plain, 120, [120])


def test_every_kernel_of_the_sparse_ops_says_what_its_code_holds(gpu_compile):
    for stem in ("decode", "sparse_outer"):
        for case in gpu_compile.cases(stem):
            assert len(case) == 5 and set(case[4]) >= {"sm_80", "sm_90"}, case[0].__name__


def test_an_unmet_expectation_fails(gpu_compile, monkeypatch, capsys):
    *case, _ = gpu_compile.cases("decode")[-1]
    impossible = [(*case, {"sm_90": ("no such text", "!ld.global")})]
    monkeypatch.setattr(gpu_compile, "cases", lambda stem: impossible)
    row = gpu_compile.compile_triton("decode", 0, 90)
    assert row["unmet"] == ["no such text", "!ld.global"] and row["spills"] == 0
    assert gpu_compile.compile_triton("decode", 0, 80)["unmet"] == []


def test_one_kernel_compiles(tmp_path):
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu_compile.py")]
    command += ["--only", "decode", "--arch", "90", "--csv", str(tmp_path / "report.csv")]
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "_gather_dot_kernel" in result.stdout and "0 failures" in result.stdout
    header = (tmp_path / "report.csv").read_text().splitlines()[0]
    assert header.startswith("kernel,case,arch,registers,shared_bytes,spills")
