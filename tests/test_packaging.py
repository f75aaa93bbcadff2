"""The package as it is installed: names, places, versions, and life without the extension."""

import ast
import doctest
import importlib.metadata
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import fastsae

ROOT = Path(fastsae.__file__).resolve().parent.parent
CHECKOUT = (ROOT / "pyproject.toml").exists()
BESIDE = Path(__file__).resolve().parent.parent  # sources lie beside the tests, wherever ROOT is


def run(code: str, directory: Path, *flags: str, **environment: str):
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("FASTSAE_", "PYTHONPATH"))
    }
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=directory,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_kernels_is_not_ours_at_the_top_level():
    """`kernels` is Hugging Face's package: ours on sys.path would switch its kernels off."""
    spec = importlib.util.find_spec("kernels")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    assert spec is None or any(str(spec.origin).startswith(place) for place in places), (
        "the repository root is on sys.path: run `pytest`, not `python -m pytest`"
    )


def test_kernels_refuses_its_bare_name():
    if not CHECKOUT:
        pytest.skip("not a checkout")
    done = run("import kernels", ROOT)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: import fastsae.kernels")


def test_fastsae_kernels_is_importable_where_triton_is():
    assert importlib.util.find_spec("fastsae.kernels") is not None
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    from fastsae.ops import backend

    stems = {stem for stem, _leaves in backend.OPS.values()}
    code = f"import importlib; [importlib.import_module('fastsae.kernels.' + s) for s in {stems}]"
    done = run(code, Path.home(), "-P")
    assert done.returncode == 0, done.stderr
    for op in backend.OPS:
        assert callable(backend.implementation(op, "triton"))


def test_another_directory_and_no_extension(tmp_path):
    """With FASTSAE_BACKEND=reference nothing compiled is loaded, and everything works."""
    code = (
        "import torch, fastsae; from fastsae.ops import extension;"
        "extension.torch.ops.load_library = None;"  # loading anything would be a TypeError
        "sae = fastsae.SAE(fastsae.SAEConfig(8, 16, 'jumprelu'));"
        "assert sae(torch.randn(3, 8)).shape == (3, 8); print(fastsae.__file__)"
    )
    done = run(code, tmp_path, "-P", FASTSAE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(fastsae.__file__)


def test_one_version():
    assert importlib.metadata.version("fastsae-engine") == fastsae.__version__
    if CHECKOUT:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        assert project["project"]["version"] == fastsae.__version__
        assert not [r for r in project["build-system"]["requires"] if r.startswith("torch")]


def test_the_sources_ask_no_more_of_torch_than_its_oldest_version_has():
    """Headers of torch 2.11 lack a macro of later ones, and do not include stable/macros.h."""
    sources = {path: path.read_text() for path in (BESIDE / "csrc").iterdir()}
    assert not [p.name for p, text in sources.items() if "STABLE_TORCH_ERROR_CODE_CHECK" in text]
    checked = {p: text for p, text in sources.items() if "STD_CUDA_" in text}
    assert checked and all("<torch/csrc/stable/macros.h>" in text for text in checked.values())


@pytest.mark.parametrize(
    "said,folders",
    [
        ('#$ TOP=/a b/bin/..\n#$ LIBRARIES=  "-L/a b/lib/stubs" "-L/a b/lib"\n#$ PTXAS_FLAGS=', 2),
        ("nvcc fatal: something else", 0),
    ],
)
def test_the_cuda_runtime_is_linked_from_where_nvcc_has_it(tmp_path, said, folders):
    """nvcc on PATH may be a wrapper: the folder above it holds no libraries then."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(said)} >&2\n")
    nvcc.chmod(0o755)
    tree = ast.parse((BESIDE / "setup.py").read_text())  # importing it would build
    tree.body = [n for n in tree.body if getattr(n, "name", "") == "toolkit_libraries"]
    names = {"os": os, "shlex": shlex, "subprocess": subprocess}
    exec(compile(tree, "setup.py", "exec"), names)
    assert names["toolkit_libraries"](str(nvcc)) == ["/a b/lib/stubs", "/a b/lib"][:folders]


@pytest.mark.parametrize("stem", ["topk", "encode", "decode", "mi"])
def test_the_examples_of_the_docstrings(stem):
    module = importlib.import_module(f"fastsae.ops.{stem}")
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0


def test_everything_public_is_there():
    for name in fastsae.__all__:
        assert getattr(fastsae, name) is not None
    for name in fastsae.ops.__all__:
        assert callable(getattr(fastsae.ops, name))
    assert callable(fastsae.explain) and callable(fastsae.train)
