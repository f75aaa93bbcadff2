"""Shared fixtures: devices and backends, one sample generator per op, and the tolerance rule.

Under --import-mode=importlib tests cannot import each other, so what they share is a fixture. A
test that names its op (`pytest.mark.op("topk")`) gets `device` and `backend` for every backend
that `fastsae.ops.backend.supported` offers there: the same tests run on a GPU machine, and under
TRITON_INTERPRET=1. FASTSAE_BACKEND narrows them to one backend.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing

from fastsae.ops import SteerTable
from fastsae.ops.backend import supported

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
HALF_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)
MIXED = (  # types of the activations and of the weights
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
)
MODES = ("inference", "autocast", "medium", "fp32_precision", "deterministic")
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def _type_names(types) -> str:
    types = types if isinstance(types, tuple) else (types,)
    return "-".join(str(t).removeprefix("torch.") for t in types)


def pytest_configure(config):
    config.addinivalue_line("markers", "op(name, but=()): all its backends and devices but these")


def pytest_generate_tests(metafunc):
    names = set(metafunc.fixturenames)
    if "backend" in names:
        marker = metafunc.definition.get_closest_marker("op")
        forced = os.environ.get("FASTSAE_BACKEND")
        pairs = [
            (device, name)
            for device in DEVICES
            for name in supported(marker.args[0], device)
            if forced in (None, "", name) and not {device, name} & {*marker.kwargs.get("but", ())}
        ]
        metafunc.parametrize("device,backend", pairs, ids=["-".join(p) for p in pairs])
    elif "device" in names:
        metafunc.parametrize("device", DEVICES)
    if "dtype" in names:
        metafunc.parametrize("dtype", HALF_AND_FULL, ids=_type_names)
    if "mixed" in names:
        metafunc.parametrize("mixed", MIXED, ids=_type_names)
    if "mode" in names:
        metafunc.parametrize("mode", MODES)
    if "layout" in names:
        metafunc.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of torch threads; put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def relayout():
    """The same numbers in another memory layout (expanded repeats the first row)."""

    def relayout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
        if layout == "contiguous":
            return tensor.contiguous()
        if layout == "transposed":
            return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        if layout == "strided":
            wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        if layout == "offset":
            buffer = tensor.new_full((tensor.numel() + 7,), torch.nan)
            buffer[3 : 3 + tensor.numel()] = tensor.flatten()
            return buffer[3 : 3 + tensor.numel()].view(tensor.shape)
        return tensor[:1].expand_as(tensor)

    return relayout


@pytest.fixture(scope="session")
def activations():
    """x [*lead, D] of unit RMS row norm; "massive" puts half of ‖x‖² into 8 dimensions, "heavy"
    has the tails of a cubed normal."""

    def activations(*shape: int, dtype=torch.float32, device="cpu", kind="normal", seed=0):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5
        if kind == "massive":
            big = x[..., : min(8, shape[-1])]
            rest = x[..., big.shape[-1] :].norm(dim=-1, keepdim=True)
            big.mul_(rest / big.norm(dim=-1, keepdim=True).clamp(min=1e-9))
        if kind == "heavy":
            x = torch.nn.functional.normalize(x**3, dim=-1)
        if kind == "integers":
            x = torch.randint(-3, 4, shape, generator=draw)
        return x.to(dtype=dtype, device=device)

    return activations


@pytest.fixture(scope="session")
def topk_sample(activations):
    """x [N, F] with ties: one value in three is rounded to a coarse grid."""

    def sample(n=7, f=131, *, dtype=torch.float32, device="cpu", seed=0):
        x = activations(n, f, dtype=torch.float64, seed=seed) * f**0.5
        coarse = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 1)) < 1 / 3
        x = torch.where(coarse, (x * 2).round() / 2, x)
        return x.to(dtype=dtype, device=device)

    return sample


class EncodeSample(SimpleNamespace):
    """Arguments of an encoder, and the dense formula for them."""

    def pre_activations(self, centre=True, dtype=torch.float64):
        x = self.x.to(dtype)
        x = x - self.b_dec.to(dtype) if centre else x
        return x @ self.W_enc.to(dtype).T + self.b_enc.to(dtype)

    def rounding(self, centre=True):
        """What an fp32 pre-activation may differ from the exact one: (D + 3)·2⁻²⁴·Σ|terms|."""
        x, W = self.x.double(), self.W_enc.double()
        size = (x.abs() + self.b_dec.double().abs() if centre else x.abs()) @ W.abs().T
        return (x.shape[1] + 3) * 2.0**-24 * (size + self.b_enc.double().abs())

    def leaves(self, dtype=None):
        """x, W_enc, b_enc and b_dec as differentiable leaves."""
        tensors = (self.x, self.W_enc, self.b_enc, self.b_dec)
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


@pytest.fixture(scope="session")
def encode_sample(activations):
    """x [N, D], W_enc [F, D], b_enc [F], b_dec [D], threshold [F] of an SAE."""

    def sample(
        n=7, d=48, f=131, *, dtype=torch.float32, weights=None, device="cpu", kind="normal", seed=0
    ):
        def draw(*shape, kind="normal", dtype=weights or dtype, offset=0):
            return activations(*shape, dtype=dtype, device=device, kind=kind, seed=seed + offset)

        scale = 1.0 if kind == "integers" else d**0.5
        other = "integers" if kind == "integers" else "normal"
        return EncodeSample(
            x=draw(n, d, kind=kind, dtype=dtype, offset=1),
            W_enc=draw(f, d, kind=other, offset=2) * scale,
            b_enc=draw(f, kind=other, offset=3),
            b_dec=draw(d, kind=other, offset=4),
            threshold=draw(f, kind=other, dtype=torch.float32, offset=5).abs(),
        )

    return sample


@pytest.fixture(scope="session")
def decode_sample(activations):
    """values [N, K] with zeros, distinct indices [N, K] int32, W [F, D], b_dec [D], g [N, D]."""

    def sample(n=7, k=5, d=48, f=131, *, dtype=torch.float32, weights=None, device="cpu", seed=0):
        draw = torch.Generator().manual_seed(seed)
        values = activations(n, k, dtype=torch.float64, seed=seed) * k**0.5
        values[:, -1:] *= (torch.rand(n, 1, generator=draw) < 0.5).double()
        rows = [torch.randperm(f, generator=draw)[:k] for _ in range(n)]
        indices = torch.stack(rows) if n else torch.empty(0, k)
        weights = weights or dtype
        return SimpleNamespace(
            values=values.to(dtype=dtype, device=device),
            indices=indices.to(dtype=torch.int32, device=device),
            W=activations(f, d, dtype=weights, device=device, seed=seed + 1),
            b_dec=activations(d, dtype=weights, device=device, seed=seed + 2),
            g=activations(n, d, dtype=dtype, device=device, seed=seed + 3),
        )

    return sample


@pytest.fixture(scope="session")
def mi_sample(activations):
    """features [F, D] and words [V, D] whose logits have the spread of a real model (std ≈ 4)."""

    def sample(f=23, v=61, d=32, *, dtype=torch.float32, device="cpu", kind="normal", seed=0):
        return SimpleNamespace(
            features=activations(f, d, dtype=dtype, device=device, kind=kind, seed=seed) * 4,
            words=activations(v, d, dtype=dtype, device=device, kind=kind, seed=seed + 1) * d**0.5,
        )

    return sample


@pytest.fixture(scope="session")
def steer_sample(activations):
    """x [N, D], slots, strengths and a table with every kind of operation, a gate and a norm rule.

    `policies` says in plain Python what each slot does, for the oracle: a list of
    (kind, [(row, value)], scalar), a gate ([rows], above) or None, and whether the norm is kept.
    """

    def sample(
        n=13, d=48, rows=9, *, policies=(), dtype=torch.float32, device="cpu", kind="normal", seed=0
    ):
        policies = policies or [
            ([], None, False),
            ([(1, [(0, 2.0), (1, -1.0)], 0.0)], None, False),
            ([(2, [(2, 0.7), (3, 0.0), (4, 1.5)], 0.0), (1, [(2, 0.5)], 0.0)], None, True),
            ([(3, [(r, 0.4) for r in range(rows)], 0.0)], ([0, 1, 2], 0.05), False),
            ([(4, [(5, 0.8), (6, -0.3)], 0.0), (5, [(7, 0.0), (8, 0.0)], 1.5)], None, False),
            ([(5, [(1, 0.0)], 0.3), (0, [], 0.0), (4, [(0, 1.0)], 0.0)], ([3], -1.0), True),
        ]
        draw = torch.Generator().manual_seed(seed)
        return SimpleNamespace(
            x=activations(n, d, dtype=dtype, device=device, kind=kind, seed=seed + 9),
            slots=(torch.arange(n) % len(policies)).to(dtype=torch.int32, device=device),
            strengths=(torch.rand(n, generator=draw) * 1.5).to(device),
            table=_table(policies, d, rows, activations, device, seed),
            policies=policies,
        )

    return sample


def _table(policies, d, rows, activations, device, seed) -> SteerTable:
    items, values, width = [], [], max(len(p[0]) for p in policies)
    kinds, begins, ends, scalars = ([[0] * width for _ in policies] for _ in range(4))
    gates = []
    for slot, (operations, gate, _norm) in enumerate(policies):
        for p, (kind, entries, scalar) in enumerate(operations):
            kinds[slot][p], begins[slot][p], scalars[slot][p] = kind, len(items), scalar
            items += [row for row, _ in entries]
            values += [value for _, value in entries]
            ends[slot][p] = len(items)
        begin = len(items)
        items += gate[0] if gate else []
        values += [0.0] * (len(items) - len(values))
        gates.append((begin, len(items), gate[1] if gate else 0.0))

    def integers(content):
        return torch.tensor(content, dtype=torch.int32, device=device)

    def floats(content):
        return torch.tensor(content, dtype=torch.float32, device=device)

    theta = activations(rows, device=device, seed=seed + 3).abs() * 0.2
    theta[::2] = 0
    return SteerTable(
        enc=activations(rows, d, device=device, seed=seed + 1) * d**0.5,
        bias=activations(rows, device=device, seed=seed + 2) * 0.3,
        theta=theta,
        dec=activations(rows, d, device=device, seed=seed + 4),
        op_kind=integers(kinds),
        op_begin=integers(begins),
        op_end=integers(ends),
        op_scalar=floats(scalars),
        item_row=integers(items),
        item_value=floats(values),
        gate_begin=integers([g[0] for g in gates]),
        gate_end=integers([g[1] for g in gates]),
        gate_above=floats([g[2] for g in gates]),
        norm_preserve=integers([int(p[2]) for p in policies]),
    )


@pytest.fixture(scope="session")
def as_good_as_torch():
    """err(got) ≤ 2·err(torch at the same dtype) + 4 ulp of the largest entry of the oracle."""

    def check(got, oracle, by_torch, what="result"):
        got, oracle, by_torch = got.detach(), oracle.detach(), by_torch.detach()
        assert got.shape == oracle.shape, what
        if oracle.numel() == 0:
            return
        oracle = oracle.double()
        finite = torch.isfinite(oracle)
        assert torch.equal(torch.isfinite(got), finite), f"{what}: finite where the oracle is not"
        oracle = oracle[finite]
        error = (got.double()[finite] - oracle).abs().max() if finite.any() else torch.zeros(())
        ours = float(error)
        theirs = float((by_torch.double()[finite] - oracle).abs().max()) if finite.any() else 0.0
        dtype = got.dtype if got.dtype.itemsize >= by_torch.dtype.itemsize else by_torch.dtype
        tiny = 4 * torch.finfo(dtype).eps * float(oracle.abs().max()) if finite.any() else 0.0
        assert ours <= 2 * theirs + tiny, f"{what}: error {ours:.3g}, torch has {theirs:.3g}"

    return check


@pytest.fixture
def largest_allocation():
    """Bytes of the largest single CPU allocation, or of all CUDA ones, while `function` runs."""

    def measure(function, device: str = "cpu") -> int:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return torch.cuda.max_memory_allocated() - before
        activity = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            function()
        events = profile.profiler.kineto_results.events()
        return max((e.nbytes() for e in events if e.name() == "[memory]"), default=0)

    return measure


@pytest.fixture
def process_mode():
    """A context in which a process-wide torch setting is not what an exact engine wants."""

    @contextlib.contextmanager
    def mode(name: str, device: str = "cpu"):
        backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        if name == "inference":
            with torch.inference_mode():
                yield
        elif name == "autocast":
            with torch.autocast(device, dtype=torch.bfloat16):
                yield
        elif name == "medium":
            torch.set_float32_matmul_precision("medium")
            try:
                yield
                assert torch.get_float32_matmul_precision() == "medium", "the flag was not restored"
            finally:
                torch.set_float32_matmul_precision("highest")
        elif name == "fp32_precision":
            before = backend.matmul.fp32_precision
            backend.matmul.fp32_precision = "tf32" if device == "cuda" else "bf16"
            try:
                yield
                assert backend.matmul.fp32_precision != "ieee", "the flag was not restored"
            finally:
                backend.matmul.fp32_precision = before
        else:
            # On CUDA cuBLAS would insist on an environment variable: warn there.
            torch.use_deterministic_algorithms(True, warn_only=device == "cuda")
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)

    return mode


@pytest.fixture
def count_compiles():
    """(compiled function, counter of graphs): fullgraph, traced by dynamo and run eagerly."""
    torch._dynamo.reset()

    def compiles(function):
        counter = torch._dynamo.testing.CompileCounter()
        return torch.compile(function, fullgraph=True, backend=counter), counter

    yield compiles
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def run_again():
    """run_again(__file__): all tests of a file in a process whose Triton interprets."""

    def run(file: str, timeout: float = 600) -> None:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return  # the other tests of the file are running in this very process
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        environment = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        told = {"capture_output": True, "text": True, "timeout": timeout}
        root = Path(__file__).parent.parent
        result = subprocess.run(command, env=environment, cwd=root, **told)
        if "only 0-dimensional arrays can be converted" in result.stdout:
            pytest.skip("the interpreter of this Triton does not work with this numpy: < 2.4")
        assert result.returncode == 0, result.stdout + result.stderr

    return run
