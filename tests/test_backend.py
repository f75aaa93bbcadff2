"""Which backend serves an op, and what is said when one cannot."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops import BackendError, backend, extension, schema
from fastsae.ops.reference import full_precision


@pytest.fixture
def fresh(monkeypatch):
    """No forced backend, and no cached answers before or after."""
    caches = (
        backend._choose,
        backend._native_missing,
        backend._triton_missing,
        extension.problem,
        backend.implementation,
        backend._compiled,
    )
    monkeypatch.delenv("FASTSAE_BACKEND", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSAE_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("op", backend.OPS)
def test_every_op_has_a_reference_and_a_name_in_every_backend(op, fresh, device):
    assert backend.supported(op, device)[-1] == "reference"
    for name in backend.supported(op, device):
        assert callable(backend.implementation(op, name))
    assert backend.supported(op, device, torch.float64) == ("reference",)
    assert backend.supported(op, "meta") == ("reference",)


@pytest.mark.parametrize("op", backend.OPS)
def test_the_choice_is_the_first_supported_and_has_a_reason(op, fresh, device):
    x = torch.zeros(1, device=device)
    choice = backend.choose(op, x)
    assert choice.name == backend.supported(op, device)[0]
    assert choice.reason
    for name in backend.supported(op, device):
        assert backend.choose(op, x, backend=name) == (name, "forced by argument")


def test_the_environment_forces_a_backend(fresh, device):
    x = torch.zeros(1, device=device)
    fresh.setenv("FASTSAE_BACKEND", "reference")
    assert backend.choose("topk", x) == ("reference", "forced by FASTSAE_BACKEND")
    fresh.setenv("FASTSAE_BACKEND", "")
    assert backend.choose("topk", x).name == backend.supported("topk", device)[0]


def test_the_argument_beats_the_environment(fresh):
    fresh.setenv("FASTSAE_BACKEND", "nonsense")
    assert backend.choose("topk", torch.zeros(1), backend="reference").name == "reference"


def test_float64_goes_to_the_oracle_unless_asked_otherwise(fresh):
    x = torch.zeros(1, dtype=torch.float64)
    assert backend.choose("topk", x).name == "reference"
    assert backend.choose("decode", torch.zeros(1), x).name == "reference"
    for name in ("native", "triton"):
        fresh.setenv("FASTSAE_BACKEND", name)
        assert backend.choose("topk", x).name == "reference"
        with pytest.raises(BackendError, match="float64 is served by reference"):
            backend.choose("topk", x, backend=name)


def test_an_unknown_backend_is_an_error(fresh):
    x = torch.zeros(2, 3)
    with pytest.raises(BackendError, match="'cuda', accepted are reference, native, triton"):
        ops.topk(x, 1, backend="cuda")
    fresh.setenv("FASTSAE_BACKEND", "fast")
    with pytest.raises(BackendError, match=r"'fast', accepted are .* FASTSAE_BACKEND"):
        ops.topk(x, 1)
    assert issubclass(BackendError, RuntimeError) and issubclass(BackendError, FastsaeError)


def test_triton_on_the_cpu_needs_its_interpreter(fresh):
    fresh.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2, 3)
    with pytest.raises(BackendError, match=r"argument\) cannot serve topk on cpu: .*INTERPRET=1"):
        ops.topk(x, 1, backend="triton")
    assert "triton" not in backend.supported("topk", "cpu")
    fresh.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.unavailable("topk", "triton", "cuda")


def test_a_missing_extension_says_how_to_build_it(fresh, tmp_path):
    fresh.setattr(extension, "__file__", str(tmp_path / "ops" / "extension.py"))
    assert "not built" in extension.problem() and "pip install" in extension.problem()
    assert extension.build_info() == {}
    with pytest.raises(BackendError, match=r"native.*not built.*--no-build-isolation -e \."):
        ops.topk(torch.zeros(2, 3), 1, backend="native")
    assert backend.choose("topk", torch.zeros(1)).name == "reference"
    assert "not built" in backend.choose("topk", torch.zeros(1)).reason


def test_an_extension_for_another_torch_is_told_from_a_missing_one(fresh, tmp_path):
    (tmp_path / "_ops.abi3.so").write_bytes(b"not a library")
    fresh.setattr(extension, "__file__", str(tmp_path / "ops" / "extension.py"))
    problem = extension.problem()
    assert torch.__version__ in problem and "not built" not in problem
    assert problem.endswith("pip install --no-build-isolation -e .)")
    assert "\n" not in problem


def test_an_extension_without_a_leaf_names_it(fresh):
    if extension.problem() is not None:
        pytest.skip(extension.problem())
    fragment = torch.library.Library("fastsae", "FRAGMENT")
    fragment.define("_a_leaf_of_tomorrow(Tensor x) -> Tensor")
    fresh.setitem(backend.OPS, "topk", ("topk", ("_topk_rows", "_a_leaf_of_tomorrow")))
    assert "lacks _a_leaf_of_tomorrow" in backend.unavailable("topk", "native", "cpu")
    assert "FASTSAE_BUILD=cuda" in backend.unavailable("topk", "native", "cuda")


def test_full_precision_is_shared_by_threads(process_mode):
    """The flag belongs to the process: it comes back when the last user leaves, not the first."""
    cpu, setting = torch.device("cpu"), torch.backends.mkldnn.matmul
    with process_mode("medium"):
        first, second = full_precision(cpu), full_precision(cpu)
        with first:
            second.__enter__()
            assert setting.fp32_precision == "ieee"
        assert setting.fp32_precision == "ieee", "the first to leave took the flag away"
        second.__exit__(None, None, None)
        assert setting.fp32_precision == "bf16"
        with pytest.raises(KeyError), full_precision(cpu):
            raise KeyError
        assert setting.fp32_precision == "bf16"


def test_an_unknown_op_is_an_error(fresh):
    with pytest.raises(ValueError, match="op: got 'sort', accepted are topk"):
        backend.unavailable("sort", "reference", "cpu")


def test_a_leaf_in_triton_runs_on_the_device_of_its_tensors(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(which):
        current.append(which)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend, "kernel", lambda stem, name: lambda *tensors: list(current))
    values = torch.zeros(1)
    assert schema._code_gradients(values, *[values] * 4) == [values.device]


def test_a_forced_backend_serves_every_call_of_a_new_process():
    code = (
        "import torch, fastsae; from fastsae.ops import backend; sae ="
        " fastsae.SAE(fastsae.SAEConfig(8, 16, k=2));"
        " assert sae(torch.randn(3, 8)).shape == (3, 8);"
        " print({backend.choose(op, torch.zeros(1)).name for op in backend.OPS})"
    )
    done = run(code, FASTSAE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'reference'}"


def test_an_impossible_backend_of_a_new_process_says_the_fix():
    done = run(
        "import torch, fastsae; fastsae.ops.topk(torch.zeros(2, 3), 1)", FASTSAE_BACKEND="triton"
    )
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert "BackendError: backend 'triton' (FASTSAE_BACKEND) cannot serve topk on cpu" in message
    assert "TRITON_INTERPRET=1" in message
