"""benchmarks/gpu_check.sh and what it runs, as far as a machine without a GPU can tell."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("gpu_targets", "graphs", "ops", "rows", "cases")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def row(bench):
    def make(**changes):
        fields = dict.fromkeys(bench.rows.Row.__dataclass_fields__)
        zero = {"traffic_bytes": 0, "flops": 0, "state": "warm", "device": "NVIDIA H100 80GB"}
        return bench.rows.Row(**{**fields, **zero, **changes})

    return make


def test_the_script_parses_and_every_phase_is_a_function_of_it():
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu_check.sh"]).returncode == 0
    phases = re.findall(r"^(?:.* && )?phase (\w+) .* bash -c (\w+)$", script, re.M)
    assert [name for name, _ in phases] == [name for _, name in phases]
    exported = re.search(r"^export -f (.+)$", script, re.M).group(1).split()
    assert {name for name, _ in phases} == set(exported) and len(phases) == 7
    limits = [int(n) for n in re.findall(r"^phase \w+ (\d+) ", script, re.M)]
    assert sum(limits) < 530


def test_files_that_the_script_runs_exist():
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    files = re.findall(r"benchmarks/\w+\.py", script)
    assert len(set(files)) == 4 and all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("builds", ["cpu", "none"])
def test_what_does_not_build_leaves_the_rest_to_run(builds, tmp_path):
    """Without CUDA C++ the Triton kernels are still tested and measured; the phase has failed."""
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    build = re.search(r"^build\(\).*?^}", script, re.M | re.S).group()
    pip = tmp_path / "python"
    pip.write_text(
        "#!/bin/sh\necho $FASTSAE_BUILD >>tried\n"
        f"[ $FASTSAE_BUILD = {builds} ] && exit 0\necho 'x.cu(3): error: no such macro'\nexit 1\n"
    )
    pip.chmod(0o755)
    setting = {"site": str(tmp_path), "python": str(pip), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", f"{build}\nbuild"], env=setting, cwd=tmp_path, capture_output=True, text=True
    )
    tried = ["auto", "cpu", "none"][: 2 if builds == "cpu" else 3]
    assert done.returncode == 1 and (tmp_path / "tried").read_text().split() == tried
    assert "FASTSAE_BUILD=auto: FAILED" in done.stdout and "error: no such macro" in done.stdout


def test_graphs_compares_every_backend(bench, capsys):
    assert bench.graphs.main(["--device", "cpu", "--replays", "3"]) == 0
    assert "equal eager" in capsys.readouterr().out


def test_a_wrong_replay_is_seen(bench):
    x, results = torch.zeros(4), iter(torch.eye(8).split(1))
    made, wrong = bench.graphs.check([x], lambda: next(results), 2, 10.0, False)
    assert made == 2 and wrong > 0
    nan = torch.tensor([torch.nan])
    assert bench.graphs.differing(nan, nan.clone()) == 0
    assert bench.graphs.differing(torch.tensor([0.0]), torch.tensor([-0.0])) == 1


def test_targets_are_judged(bench, row):
    shape = {"op": "decode", "N": 1, "D": 4096, "F": 65536, "k": 32, "dtype": "bfloat16"}
    slow, fast = row(**shape, provider="triton", p50_ms=0.02), 0.003
    graph = row(**shape, provider="triton graph", p50_ms=fast)
    peer = row(**shape, provider="sparsify graph", p50_ms=0.004)
    lines = {a: (b, c) for a, b, c in bench.gpu_targets.judged([slow, graph, peer], True)}
    absolute, ratio = (v for k, v in lines.items() if k.startswith("decode N=1 "))
    assert absolute == ("0.0030 ms (triton graph)", "holds")
    assert ratio == ("1.33 x faster", "MISSED")
    assert lines[next(k for k in lines if k.startswith("steer"))] == ("not measured", "")
    others = bench.gpu_targets.judged([slow], False)
    assert ("another GPU" in [c for _, _, c in others]) and "MISSED" not in [c for *_, c in others]


def test_every_target_has_a_case(bench, monkeypatch):
    """A target whose shape no case of the GPU run has would never be judged."""
    measured = {
        (maker.__name__.removesuffix("_case"), a) for maker, a in bench.ops.cuda_cases(False)
    }
    for target in bench.gpu_targets.TARGETS:
        for op in target.op.split("+"):
            wanted = {v for k, v in target.shape.items() if k not in ("dtype", "state")}
            found = [a for name, a in measured if name == op and wanted <= set(a)]
            assert found, f"{target.op} {target.shape}: no case measures it"
