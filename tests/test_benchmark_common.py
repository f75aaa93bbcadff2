"""benchmarks/: measuring is interleaved, verified, honest about memory, and refuses when busy."""

import functools
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "common.py").exists(), reason="not a checkout: no benchmarks/"
)
LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system reports no peak memory"
)
MB = 1 << 20


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, importable for as long as this file's tests run."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("common", "machine", "problems", "rows", "stages", "targets")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def idle(bench, monkeypatch):
    """The machine as if nothing else ran on it."""
    monkeypatch.setattr(bench.common, "busy", lambda: 0.0)
    monkeypatch.setattr(bench.common.Load, "others", lambda self: 0.0)


@pytest.fixture
def case(bench):
    """A case whose right answer is 1."""

    def make(**changes):
        values = {"op": "decode", "shape": {"N": 1}, "dtype": "float32"}
        values |= {"providers": {"native": lambda i: torch.ones(4), "torch": torch.ones}}

        def check(name, result):
            assert bool((result == 1).all()), f"{name}: not 1"

        return bench.common.Case(**values | {"check": check} | changes)

    return make


@pytest.fixture
def run(bench, capsys):
    def run(cases, *arguments):
        options = bench.common.parser("test").parse_args(["--rounds", "2", *arguments])
        status = bench.common.run_all(
            [(c.op, functools.partial(lambda c: c, c)) for c in cases], options
        )
        return status, capsys.readouterr()

    return run


@pytest.mark.parametrize("cold", [True, False])
def test_providers_take_turns_and_no_two_calls_share_a_number(bench, cold):
    calls = []
    providers = {name: functools.partial(lambda n, i: calls.append((n, i)), name) for name in "ab"}
    times = bench.common.measure(providers, "cpu", rounds=3, warmup=2, cold=cold)
    # A warm call follows untimed ones of its own; the first round cannot know that it is short.
    turn = ["a", "b"] if cold else ["a"] * 4 + ["b"] * 4
    assert [name for name, _ in calls[:2]] == ["a", "b"]
    assert [name for name, _ in calls[2:]] == turn * ((len(calls) - 2) // len(turn))
    assert [number for _, number in calls] == list(range(len(calls)))
    assert len(times["a"]) == len(times["b"]) == (len(calls) - 2) // len(turn) - 1 >= 3


def test_long_calls_are_not_repeated(bench, monkeypatch):
    monkeypatch.setattr(bench.common, "LONG_MS", 0.0)
    monkeypatch.setattr(bench.common, "SHORT_SECONDS", 0.0)
    calls = []
    bench.common.measure({"a": calls.append}, "cpu", rounds=3, warmup=2)
    assert calls == [0, 1, 2, 3, 4]


def test_percentiles(bench):
    assert bench.common.percentiles([1.0]) == (1.0, 1.0, 1.0)
    assert bench.common.percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_a_run_is_recorded_with_its_machine(bench, case, run, idle, tmp_path):
    status, printed = run([case(traffic_bytes=10**6, base="native")], "--out", str(tmp_path / "a"))
    assert status == 0 and "decode N=1" in printed.out
    ours, theirs = bench.rows.read_csv(tmp_path / "a")
    assert (ours.provider, theirs.provider, ours.ratio) == ("native", "torch", 1.0)
    assert theirs.ratio == pytest.approx(theirs.p50_ms / ours.p50_ms, abs=0.01, rel=0.01)
    assert ours.gbps == pytest.approx(10**6 / ours.p50_ms / 1e6, rel=0.01)
    assert ours.threads == torch.get_num_threads() and ours.torch == torch.__version__
    assert ours.date and ours.command.startswith("python -P ")


def test_scaled_times_and_their_ratio(bench, case, idle):
    slow = {"torch": 1000.0}
    plain, scaled = (
        bench.common.run(case(scaled=s), "cpu", bench.machine.machine("cpu"), rounds=3, warmup=1)
        for s in ({}, slow)
    )
    assert scaled[1].p50_ms > 30 * plain[1].p50_ms
    assert scaled[1].peak_mb is None  # the memory of a share is not the memory of the whole


def test_a_wrong_result_is_reported_and_not_recorded(bench, case, run, idle, tmp_path):
    wrong = case(op="topk", providers={"native": lambda i: torch.zeros(4)})
    status, printed = run([wrong, case()], "--out", str(tmp_path / "a"))
    assert status == 1 and "FAILED topk: AssertionError: native: not 1" in printed.err
    assert {row.op for row in bench.rows.read_csv(tmp_path / "a")} == {"decode"}


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_busy_machine_is_not_recorded(bench, case, run, idle, monkeypatch, when, tmp_path):
    if when == "before":
        monkeypatch.setattr(bench.common, "busy", lambda: 0.7)
    else:
        monkeypatch.setattr(bench.common.Load, "others", lambda self: 0.7)
    out = tmp_path / "a"
    _, printed = run([case()], "--out", str(out))
    assert not out.exists() and "not recorded" in printed.err and "0.7 cores" in printed.out
    run([case()], "--out", str(out), "--anyway")
    assert out.exists()


def test_on_a_gpu_what_is_measured_survives_the_time_limit(bench, case, monkeypatch, tmp_path):
    """A time limit or a kernel that hangs does not take the cases measured before."""
    out = tmp_path / "gpu.csv"
    options = bench.common.parser("").parse_args(["--device", "cuda", "--out", str(out)])
    common = bench.machine.machine("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.common, "machine", lambda device: common)
    real = bench.common.run

    def on_cpu(case, device, *rest, **more):
        return real(case, "cpu", *rest, **more)

    monkeypatch.setattr(bench.common, "run", on_cpu)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.common.run_all([("decode", case), ("topk", interrupted)], options)
    assert {row.op for row in bench.rows.read_csv(out)} == {"decode"}


def test_a_peer_that_is_not_captured_keeps_its_case(bench, case, monkeypatch, capsys):
    """Its eager time and the others' stand; of ours, not to be captured is a failure."""

    def capture(function):
        if function is broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        return function

    monkeypatch.setattr(bench.common, "capture", capture)
    memory = dict.fromkeys(("peak_mb", "output_mb", "kept_mb"))
    monkeypatch.setattr(bench.common, "verify", lambda *_: memory)
    monkeypatch.setattr(
        bench.common, "measure", lambda providers, *_, **__: {n: [1.0] for n in providers}
    )
    common = bench.machine.machine("cpu")
    sound = case(graphs=("native", "torch"))
    broken = sound.providers["torch"]
    rows = bench.common.run(sound, "cuda", common, rounds=1, warmup=0)
    assert [row.provider for row in rows] == ["native", "torch", "native graph"]
    assert "decode: torch is not captured: operation not permitted" in capsys.readouterr().out
    broken = sound.providers["native"]
    with pytest.raises(RuntimeError, match="not permitted"):
        bench.common.run(sound, "cuda", common, rounds=1, warmup=0)


def test_only_and_floors(bench, case, run, idle, tmp_path):
    floor = case(floors={"torch.mm": lambda i: None})
    run([floor, case(op="topk")], "--only", "decode", "--out", str(tmp_path / "a"))
    names = [(row.op, row.provider) for row in bench.rows.read_csv(tmp_path / "a")]
    assert names == [("decode", "native"), ("decode", "torch"), ("decode", "torch.mm")]


def in_a_process_of_its_own(script):
    """The integers that `script` prints, with `machine`, `torch` and `MB` in its scope.

    Other tests leave holes in the heap, and glibc fills such a hole before it maps memory, without
    giving it back when it is free again: what a call adds would depend on the tests before it.
    """
    prelude = f"""
import sys

sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import machine
import torch

MB = {MB}
"""
    command = [sys.executable, "-P", "-c", prelude + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


UNKNOWN_TO_TORCH = """
import ctypes

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def work():
    pointer = libc.malloc(64 * MB)
    libc.memset(pointer, 1, 64 * MB)
    libc.free(pointer)
    return torch.ones(2 * MB)  # 8 MB

machine.resident_growth(work)
result, growth = machine.resident_growth(work)
_, nothing = machine.resident_growth(lambda: None)
print(machine.output_bytes(result), growth, nothing)
"""


@LINUX
def test_the_peak_counts_memory_that_torch_does_not_know():
    result, growth, nothing = in_a_process_of_its_own(UNKNOWN_TO_TORCH)
    assert result == 8 * MB
    # Not 72: the result is made after the scratch was freed.
    assert 63 * MB <= growth <= 68 * MB
    assert nothing <= MB


FREED_EARLIER = """
def work():
    return sum(torch.ones(1 << 20).sum() for _ in range(4))  # 4 MB at a time

work()  # a process's first call also loads code and starts threads
pieces = [torch.ones(1 << 18) for _ in range(64)]  # 64 times 1 MB
del pieces
print(machine.resident_growth(work)[1])
"""


@LINUX
def test_memory_freed_earlier_does_not_hide_a_peak():
    (growth,) = in_a_process_of_its_own(FREED_EARLIER)
    # At most two of its pieces: the system may count one that has just been given back.
    assert 3 * MB <= growth <= 9 * MB


KEPT = """
kept = []

def first_call():
    kept.append(torch.ones(4 * MB))  # 16 MB
    return torch.ones(2 * MB)

torch.ones(MB).sum()
print(machine.kept_bytes(first_call)[1])
"""


@LINUX
def test_kept_memory_is_what_stays_beside_the_result():
    (left,) = in_a_process_of_its_own(KEPT)
    assert 15 * MB <= left <= 18 * MB


def test_output_bytes_counts_a_storage_once(bench):
    x = torch.ones(256)
    assert bench.machine.output_bytes((x, [x[:2], x.view(16, 16)])) == 1024
    assert bench.machine.output_bytes(torch.eye(2).to_sparse()) == 2 * 4 + 4 * 8
    assert bench.machine.output_bytes(None) == 0


def test_massive_activations_hold_half_of_the_norm(bench):
    e = bench.problems.Encoder("cpu", 64, 256, 512, 8, torch.float32, massive=True)
    share = e.x[:, : bench.problems.MASSIVE].square().sum() / e.x.square().sum()
    assert 0.45 < share < 0.55


def test_stages_find_the_operators_and_the_rest(bench, case, idle):
    def work(i):
        return torch.mm(torch.ones(256, 256), torch.ones(256, 256))

    common = bench.machine.machine("cpu")
    found = bench.stages.of_case(case(providers={"native": work}), 5, common)
    assert {"aten::mm", bench.rows.REST} <= {stage.stage for stage in found}
    assert sum(stage.share for stage in found) == pytest.approx(1.0, abs=0.02)
