"""README's performance section is what the committed csv files generate, and says what they say."""

import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "table.py").exists(), reason="not a checkout: no benchmarks/"
)


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, importable for as long as this file's tests run."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("rows", "table", "targets")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.fixture
def row(bench):
    """A measurement; keyword arguments change it."""

    def make(**changes):
        values = {"op": "encode_topk", "provider": "native", "version": "0.1.0", "dtype": "float32"}
        values |= {"N": 1024, "D": 1024, "F": 16384, "k": 100, "V": None, "state": "warm"}
        values |= {"p20_ms": 29.5, "p50_ms": 30.0, "p80_ms": 31.25, "base": "", "ratio": None}
        values |= {"traffic_bytes": 0, "flops": 0, "gbps": None, "tflops": None}
        values |= {"peak_mb": 21.0, "output_mb": 1.0, "kept_mb": 32.0, "threads": 2}
        values |= {"device": "Some CPU", "clocks": "", "torch": "2.13.0", "triton": ""}
        values |= {"fastsae": "0.1.0", "commit": "abc1234", "date": "2026-01-02"}
        return bench.rows.Row(**values | {"command": "python -P benchmarks/ops.py"} | changes)

    return make


@pytest.fixture
def case(row):
    def make(ours: float, **others: float):
        names = {"mm": "torch.mm bfloat16", "mm_out": "torch.mm bfloat16 out="}
        rows = [row(p50_ms=ours)]
        nothing = {"peak_mb": None, "output_mb": None, "kept_mb": None}
        return rows + [
            row(provider=names.get(n, n), p50_ms=ms, **nothing) for n, ms in others.items()
        ]

    return make


def test_rows_come_back_from_their_file(bench, case, tmp_path):
    rows = case(30.0, mm=25.0, SAELens=204.0)
    bench.rows.write_csv(tmp_path / "cpu.csv", rows)
    assert bench.rows.read_csv(tmp_path / "cpu.csv") == rows


def test_stages_come_back_from_their_file(bench, tmp_path):
    values = {"op": "decode", "N": 1, "D": 2, "F": 3, "k": 4, "V": None, "dtype": "float32"}
    values |= {"state": "warm", "stage": "aten::mm", "ms": 0.25, "share": 0.5, "device": "CPU"}
    values |= {"threads": 2, "torch": "2.13.0", "fastsae": "0.1.0", "commit": "abc1234"}
    stage = bench.rows.Stage(**values, date="2026-01-02", command="python")
    bench.rows.write_csv(tmp_path / "cpu-profile.csv", [stage])
    assert bench.rows.read_csv(tmp_path / "cpu-profile.csv") == [stage]
    assert "| decode | N=1 D=2 F=3 k=4 fp32 | `aten::mm` 50%, rest 50% |" in bench.table.section(
        tmp_path
    )


def test_a_section_names_the_machine_and_shows_every_comparison(bench, case, tmp_path):
    rows = case(30.0, mm=25.0, mm_out=15.0, SAELens=204.0, torch=20.0)
    bench.rows.write_csv(tmp_path / "cpu.csv", rows)
    text = bench.table.section(tmp_path)
    for part in ("Some CPU, 2 threads", "torch 2.13.0", "commit abc1234", "2026-01-02"):
        assert part in text
    assert "`python -P benchmarks/ops.py`" in text
    line = next(li for li in text.splitlines() if li.startswith("| encode topk"))
    assert "| 30.0 ms |" in line and "| 20.0 MB |" in line
    assert "SAELens 204 ms (6.8 x)" in line
    assert "torch 20.0 ms (0.667 x)" in line  # a lost comparison is shown too
    assert "✓ 1.20 x (≤ 1.35 x the bf16 product alone)" in line
    assert "**✗** 2.00 x (≤ 1.35 x the bf16 product into a given output)" in line
    assert "✓ 6.8 x faster (≥ 4 x faster than SAELens)" in line
    assert "3 of 4 targets met." in text


def test_two_runs_in_one_file_are_both_named(bench, case, row, tmp_path):
    rows = [*case(30.0, mm=25.0), row(N=256, D=2048, F=32768, k=32, commit="fff0000")]
    bench.rows.write_csv(tmp_path / "cpu.csv", rows)
    text = bench.table.section(tmp_path)
    assert "commit abc1234" in text and "commit fff0000" in text


@pytest.mark.parametrize(("ours", "met"), [(33.75, True), (33.8, False)])
def test_a_target_is_met_up_to_its_limit(bench, case, ours, met, tmp_path):
    rows = case(ours, mm=25.0)
    found = {v.target.text: v.met for v in bench.targets.verdicts(rows)}
    assert found == {"≤ 1.35 x the bf16 product alone": met, "≤ 64 MB beside the result": True}
    bench.rows.write_csv(tmp_path / "cpu.csv", rows)
    assert ("**✗** 1.35 x" in bench.table.section(tmp_path)) is not met
    assert ("MISSED" in bench.targets.summary(rows)) is not met


def test_the_fastest_rival_counts(bench, row):
    shape = {"op": "topk", "N": 64, "D": None, "F": 65536, "k": 32, "state": "cold"}
    times = {"native": 1.0, "torch": 9.0, "torch unsorted": 7.0}
    rows = [row(provider=name, p50_ms=ms, **shape) for name, ms in times.items()]
    (verdict,) = bench.targets.verdicts(rows)
    assert verdict.measured == pytest.approx(1 / 7) and not verdict.met


def test_sides_of_different_cases_are_not_compared(bench, case, row):
    rows = [*case(30.0), row(provider="torch.mm bfloat16", N=256, D=2048, F=32768, k=32)]
    assert [v.target.unit for v in bench.targets.verdicts(rows)] == ["mb"]


def test_memory_is_judged_without_the_result(bench, row):
    over, under = row(peak_mb=66.0, output_mb=1.0), row(peak_mb=66.0, output_mb=2.0)
    for measured, met in ((over, False), (under, True)):
        (verdict,) = bench.targets.verdicts([measured])
        assert verdict.met is met
    assert bench.targets.verdicts([row(peak_mb=None, output_mb=None)]) == []


def test_the_roofline_is_the_best_rate_of_either_kind(bench, row):
    roofs = [row(op="roofline read", provider=p, gbps=g) for p, g in (("a", 20.0), ("b", 25.0))]
    roofs += [row(op="roofline mm bfloat16", tflops=2.0)]
    assert bench.targets.roofline_ms(row(traffic_bytes=25_000_000), roofs) == pytest.approx(1.0)
    assert bench.targets.roofline_ms(row(flops=4 * 10**9), roofs) == pytest.approx(2.0)
    assert bench.targets.roofline_ms(row(flops=4 * 10**9), []) is None
    assert "Roofline: read 25 GB/s, mm bf16 2 TFLOP/s." in bench.table.roofline(roofs)


def test_every_target_has_a_case_that_it_judges(bench):
    """A target that no shape of the benchmarks meets would silently never be judged."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        names = ("ops", "peers", "compat")
        ops, peers, compat = (importlib.import_module(name) for name in names)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    measured = [SimpleNamespace(N=None, D=None, F=None, k=None, V=None, op="", state="", dtype="")]
    columns = {
        "topk": ("N", "F", "k", "dtype", "state"),
        "encode_topk": ("N", "D", "F", "k", "dtype"),
        "encode_threshold": ("N", "D", "F", "k", "dtype"),
        "decode": ("N", "D", "F", "k", "dtype"),
        "mi_topk": ("F", "V", "D"),
        "steer": ("N", "D", "k", "dtype", "idle"),
        "train_step": ("N", "D", "F", "k"),
    }
    for maker, shape in [*ops.cpu_cases(quick=False), *peers.cases(quick=False)]:
        op = maker.__name__.removesuffix("_case")
        given = dict(zip(columns.get(op, ()), shape, strict=False))
        given["dtype"] = str(given.get("dtype", "float32")).removeprefix("torch.")
        if given.get("idle"):
            given["k"] = 0
        measured.append(SimpleNamespace(**vars(measured[0]) | given | {"op": op}))
    for op, _, shape in compat.cases(quick=False):
        given = dict(zip(("N", "D", "F", "k"), shape, strict=True)) | {"dtype": "float32"}
        measured.append(SimpleNamespace(**vars(measured[0]) | given | {"op": op}))
    for target in bench.targets.TARGETS:
        if target.op.startswith(("token_", "hooks_")):
            continue  # of any shape: benchmarks/steering.py, in tests/steering/test_benchmark.py
        rows = [row for row in measured if row.op == target.op]
        assert any(target.applies(row) for row in rows), target.text


def test_writing_replaces_the_section_and_nothing_else(bench, case, tmp_path):
    table, readme = bench.table, tmp_path / "README.md"
    old = f"# a\n\n{table.BEGIN}\nold figures\n{table.END}\n\n## b\n"
    readme.write_text(old)
    results = tmp_path / "results"
    bench.rows.write_csv(results / "cpu.csv", case(30.0, mm=25.0))
    for _ in range(2):  # the second time changes nothing
        assert table.main(["--results", str(results), "--write", str(readme)]) == 0
        expected = f"# a\n\n{table.BEGIN}\n{table.section(results)}\n{table.END}\n\n## b\n"
        assert readme.read_text() == expected
    assert "old figures" not in readme.read_text()
    assert table.replaced(old, "") == f"# a\n\n{table.BEGIN}\n{table.END}\n\n## b\n"


def test_a_file_without_markers_is_refused(bench):
    with pytest.raises(SystemExit, match="lacks one of the lines"):
        bench.table.replaced(f"# a\n{'x'}\n", "figures")


def test_readme_holds_what_the_committed_files_generate(bench):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = bench.table.EXPLAINED
    told = bench.table.explained(ROOT / "benchmarks" / "results" / "explanations.json")
    assert text.partition(begin)[2].partition(end)[0].strip() == told
    generated = bench.table.section(bench.table.RESULTS)
    assert text == bench.table.replaced(text, generated), (
        "README.md's performance section differs from benchmarks/results/*.csv: "
        "python -P benchmarks/table.py --write README.md"
    )


def test_committed_rows_name_what_they_measured(bench):
    """A commit that anyone can check out, a command, a date and a machine."""
    rows = [row for p in bench.table.RESULTS.glob("*.csv") for row in bench.rows.read_csv(p)]
    for found in rows:
        told = dataclasses.asdict(found)
        for column in ("device", "torch", "fastsae", "commit", "date", "command"):
            assert told[column], f"{found.op}: {column} is empty"
        assert not found.commit.endswith("-dirty"), f"{found.op}: measured on uncommitted files"
        assert "--anyway" not in found.command and "--quick" not in found.command


def test_a_load_table_says_what_it_compares(bench, row, tmp_path):
    about = {n: v for n, v in vars(row()).items() if n in ("device", "clocks", "torch", "triton")}
    about |= {"threads": 2, "fastsae": "0.1.0", "commit": "abc1234", "date": "2026-01-02"}
    shape = {"model": "1024x8", "features": 16384, "dtype": "bfloat16", "requests": 32}
    shape |= {"prompt": 64, "tokens": 32, "rounds": 3, "compiled": "eager", "vllm": "0.32"}
    lines = []
    for name, ratio in (("vanilla", 1.0), ("idle", 1.0123)):
        measured = dict.fromkeys(bench.rows.MEASURES, 40.0 * ratio)
        measured |= {f"{m}_ratio": ratio for m in bench.rows.MEASURES}
        given = {"load": name, "concurrency": 8} | measured | shape | about
        lines.append(bench.rows.Load(**given, command="python -P benchmarks/vllm_load.py"))
    bench.rows.write_csv(tmp_path / "vllm-load.csv", lines)
    assert bench.rows.read_csv(tmp_path / "vllm-load.csv") == lines
    text = bench.table.section(tmp_path)
    assert "| idle | 8 | 40.49 (1.012) |" in text and "SAE of 16384 features, eager" in text
