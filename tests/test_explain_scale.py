"""benchmarks/explain_scale.py: every feature is explained and checked, and the row it records."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(
    not (BENCHMARKS / "explain_scale.py").exists(), reason="not a checkout: no benchmarks/"
)
SMALL = ["--features", "100", "--words", "130", "--width", "64", "--shard", "32", "--threads", "1"]


@pytest.fixture
def scale(monkeypatch):
    # Its neighbours are imported by bare names, as `python -P benchmarks/explain_scale.py` does.
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("explain_scale", BENCHMARKS / "explain_scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "busy", lambda: 0.0)
    # Earlier tests of this process may hold anything.
    monkeypatch.setattr(module, "LIMIT_GB", 1e6)
    yield module
    for name in ("machine", "rows"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_a_row_of_all_features(scale, weights, tmp_path, capsys):
    from rows import read_csv

    out = tmp_path / "scale.csv"
    assert scale.main([*SMALL, "--dtype", weights, "--out", str(out), "--anyway"]) == 0
    (row,) = read_csv(out)
    assert (row.op, row.F, row.V, row.D, row.dtype) == ("explain_sharded", 100, 130, 64, weights)
    assert row.output_mb == pytest.approx(100 * 20 * 8 / 2**20, abs=1e-4)
    assert row.flops == 4 * 100 * 130 * 64 + 2 * 130 * 64**2 and row.p50_ms > 0
    # Anonymous memory holds Python and torch, not only this process's tensors.
    assert row.peak_mb > 50
    said = capsys.readouterr()
    assert "scores against float64" in said.out and "of 220 steps" in said.err


def test_a_wrong_score_is_found(scale, monkeypatch):
    real = scale.explain_sharded

    def wrong(*arguments, **options):
        found = real(*arguments, **options)
        found.scores[50, 3] += 0.01
        return found

    monkeypatch.setattr(scale, "explain_sharded", wrong)
    with pytest.raises(AssertionError, match=r"scores: error 0\.01"):
        scale.main(SMALL)


def test_what_is_not_recorded(scale, tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.csv"
    with pytest.raises(SystemExit, match="all features"):
        scale.main([*SMALL, "--run", "1", "--out", str(out)])
    assert scale.main([*SMALL, "--run", "1"]) == 0
    assert "extrapolated to 100 features" in capsys.readouterr().out
    monkeypatch.setattr(scale, "busy", lambda: 1.5)
    assert scale.main([*SMALL, "--out", str(out)]) == 0
    assert "not recorded: the machine is busy" in capsys.readouterr().err and not out.exists()
    monkeypatch.setattr(scale, "LIMIT_GB", 0.001)
    assert scale.main(SMALL) == 1
