"""Measuring: interleaved providers, medians with p20/p80, and csv rows that name their machine.

Protocol: the caller verifies first; then every round runs every provider once, in turn, on inputs
that rotate, after warm-up rounds that are thrown away. On CUDA a buffer larger than L2 is cleared
before every timed call (weights much larger than L2 make this a formality) and events surround the
call alone; a provider may also be measured as the replay of a CUDA graph of it. On the CPU nothing
is flushed: rotation over more than the last-level cache is what makes a case "cold".
"""

import argparse
import csv
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 256 << 20  # above every L2


@dataclasses.dataclass
class Case:
    """One op at one shape. A provider takes the round number and returns what `check` judges.

    `traffic_bytes` and `flops` are the least an implementation must move and do; the formula stands
    where the case is built. `graphs`: which providers can be captured (no host synchronisation).
    `floors` are timed beside the providers and not checked: they do only a part of the work.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    providers: dict[str, Callable]
    check: Callable[[str, object], None]
    traffic_bytes: int = 0
    flops: int = 0
    state: str = "warm"
    graphs: tuple[str, ...] = ()
    floors: dict[str, Callable] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """One line of the csv: STYLE is one row per (op, provider, shape)."""

    op: str
    provider: str
    version: str
    N: int | None
    D: int | None
    F: int | None
    k: int | None
    V: int | None
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    traffic_bytes: int
    gbps: float | None
    tflops: float | None
    peak_mb: float | None
    state: str
    device: str
    clocks: str
    threads: int
    torch: str
    triton: str
    fastsae: str
    commit: str
    date: str


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def machine(device: str) -> dict[str, object]:
    """Columns of `Row` that are the same for a whole run."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        clocks = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader")
    else:
        model = [li for li in _output("cat", "/proc/cpuinfo").splitlines() if "model name" in li]
        name = model[0].split(":")[1].strip() if model else platform.processor()
        clocks = ""
    return {
        "device": name,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fastsae": version("fastsae-engine"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def busy(seconds: float = 1.0) -> float:
    """Cores that other processes use, averaged over the last second: a busy machine lies."""

    def jiffies() -> tuple[int, int]:
        fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
        return sum(fields), fields[3] + fields[4]

    if not Path("/proc/stat").exists():
        return 0.0
    before = jiffies()
    time.sleep(seconds)
    after = jiffies()
    idle = (after[1] - before[1]) / max(1, after[0] - before[0])
    return (1 - idle) * (os.cpu_count() or 1)


def capture(function: Callable) -> Callable:
    """A function that replays one captured call of `function`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and allocates outside the capture
            function(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(0)
    return lambda _round: graph.replay()


def measure(providers: dict[str, Callable], device: str, *, rounds: int, warmup: int) -> dict:
    """{name: [ms]} of all providers, interleaved round by round."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if device == "cuda" else None
    pending = []
    for number in range(warmup + rounds):
        for name, function in providers.items():
            if flush is not None:
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function(number)
                end.record()
                pending.append((name, number, start, end))
            else:
                started = time.perf_counter()
                function(number)
                if number >= warmup:
                    times[name].append((time.perf_counter() - started) * 1e3)
    if flush is not None:
        torch.cuda.synchronize()
        for name, number, start, end in pending:
            if number >= warmup:
                times[name].append(start.elapsed_time(end))
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def peak_mb(function: Callable, device: str) -> tuple[object, float | None]:
    """The result of one call and the device memory it took beyond what was there."""
    if device != "cuda":
        return function(0), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(0)
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**20


def run(case: Case, device: str, common: dict, *, rounds: int, warmup: int) -> list[Row]:
    """Verifies every provider of a case, then times them; AssertionError on a wrong result."""
    memory = {}
    for name, function in case.providers.items():
        result, memory[name] = peak_mb(function, device)
        case.check(name, result)
        del result
    providers = case.providers | case.floors
    memory |= dict.fromkeys(case.floors)
    if device == "cuda":
        for name in (n for n in case.graphs if n in case.providers):
            providers[f"{name} graph"] = capture(case.providers[name])
            memory[f"{name} graph"] = None
    rows = []
    for name, times in measure(providers, device, rounds=rounds, warmup=warmup).items():
        p20, p50, p80 = percentiles(times)
        gbps = case.traffic_bytes / p50 / 1e6 if case.traffic_bytes else None
        tflops = case.flops / p50 / 1e9 if case.flops else None
        shape = {letter: case.shape.get(letter) for letter in "NDFkV"}
        package = "fastsae-engine" if name.split()[0] in ("native", "triton") else "torch"
        rows.append(
            Row(
                op=case.op,
                provider=name,
                version=version(package),
                **shape,
                dtype=case.dtype,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                traffic_bytes=case.traffic_bytes,
                gbps=gbps,
                tflops=tflops,
                peak_mb=memory[name],
                state=case.state,
                **common,
            )
        )
    return rows


def table(rows: list[Row], base: str = "torch") -> str:
    """Rows of one case for a person; the ratio is base / provider, above 1 is faster than base."""
    reference = next((row.p50_ms for row in rows if row.provider == base), None)
    lines = []
    for row in rows:
        shape = " ".join(f"{n}={v}" for n in "NDFkV" if (v := getattr(row, n)) is not None)
        ratio = f"{reference / row.p50_ms:6.2f}x" if reference else "      -"
        rate = f"{row.gbps:7.0f} GB/s" if row.gbps else f"{row.tflops or 0:7.1f} TF/s"
        lines.append(
            f"{row.op:16} {row.provider:18} {shape:38} {row.dtype:10} {row.p50_ms:9.4f} ms "
            f"[{row.p20_ms:.4f}, {row.p80_ms:.4f}] {rate} {ratio}"
        )
    return "\n".join(lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        for row in rows:
            line = dataclasses.asdict(row)
            rounded = {k: round(v, 5) for k, v in line.items() if isinstance(v, float)}
            writer.writerow({**line, **rounded})


def parser(description: str) -> argparse.ArgumentParser:
    """The options that `run_all` reads."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    options.add_argument("--only", nargs="+", help="ops to measure")
    options.add_argument("--out", type=Path, help="write the rows to this csv")
    options.add_argument("--rounds", type=int, help="timed rounds per case")
    options.add_argument("--budget", type=float, help="seconds after which cases are skipped")
    options.add_argument("--anyway", action="store_true", help="record on a busy CPU too")
    return options


def run_all(cases: list[tuple[str, Callable[[], Case]]], options: argparse.Namespace) -> int:
    """Runs (op, maker of the case) pairs, prints tables, writes the csv; 1 if a result was wrong.

    A maker builds its tensors when its turn comes, so that only one case is in memory.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: got cuda, but torch sees no GPU; use --device cpu")
    started = time.perf_counter()
    common = machine(options.device)
    load = busy() if options.device == "cpu" else 0.0
    rounds = options.rounds or (5 if options.quick else 15 if options.device == "cpu" else 30)
    rows, wrong, skipped = [], [], []
    print(f"{common['device']}, {common['threads']} threads, torch {common['torch']}")
    if load > 0.5:
        print(f"other processes use {load:.1f} cores: these times are no measurement")
    for op, make in cases:
        if options.only and op not in options.only:
            continue
        if options.budget and time.perf_counter() - started > options.budget:
            skipped.append(op)
            continue
        with torch.inference_mode():
            try:
                found = run(make(), options.device, common, rounds=rounds, warmup=5)
            except (AssertionError, RuntimeError) as error:  # the other cases still count
                wrong.append(f"{op}: {type(error).__name__}: {error}")
                continue
        rows += found
        print(table(found), flush=True)
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    if skipped:
        print(f"skipped, out of time: {', '.join(skipped)}")
    if options.out and (load <= 0.5 or options.anyway):
        write_csv(options.out, rows)
        print(f"wrote {options.out}")
    elif options.out:
        print("not recorded: the machine is busy (--anyway records)", file=sys.stderr)
    return 1 if wrong else 0
