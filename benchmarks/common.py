"""Measuring: interleaved providers, medians with p20/p80, and csv rows that name their machine.

Protocol: every provider is verified first; then every round runs every provider once, in turn,
after warm-up rounds that are thrown away. On CUDA a buffer larger than L2 is cleared before every
timed call (weights much larger than L2 make this a formality) and events surround the call alone; a
provider may also be measured as the replay of a CUDA graph of it. On the CPU a call follows an
untimed one of the same provider, a short call three: otherwise one would pay for, and another
profit from, what its neighbour left in the caches (0.02 or 0.3 ms for the same decoded token). In a
"cold" case it does not, and each call gets a number by which the case rotates its inputs through
more than the last-level cache.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import targets
from machine import Load, busy, kept_bytes, machine, output_bytes, resident_growth, version
from rows import Row, write_csv

from fastsae.ops import extension, native

FLUSH_BYTES = 256 << 20  # above every L2
BUSY_CORES = 0.5  # load of others above which nothing is recorded
SHORT_SECONDS, MOST_ROUNDS = 1.0, 2000  # cases of microseconds run for a second
SHORT_MS, LONG_MS = 10, 100
PACKAGES = {  # first word of a provider's name -> the package whose version its row carries
    "native": "fastsae-engine",
    "triton": "fastsae-engine",
    "reference": "fastsae-engine",
    "SAELens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
}


@dataclasses.dataclass
class Case:
    """One op at one shape. A provider takes the call's number and returns what `check` judges.

    `traffic_bytes` and `flops` are the least an implementation must move and do; the formula stands
    where the case is built. `graphs`: which providers can be captured (no host synchronisation).
    `floors` are timed beside the providers and not checked: they do only a part of the work.
    `base` names the provider or floor that the rows' ratios refer to. `scaled` multiplies the times
    of providers that do only a share of the problem; their names must say so. `rounds` bounds the
    number of rounds of a case that takes long.
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
    base: str = "torch"
    scaled: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: int | None = None


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
    return lambda _call: graph.replay()


def measure(
    providers: dict[str, Callable], device: str, *, rounds: int, warmup: int, cold: bool = False
) -> dict[str, list[float]]:
    """{name: [ms]} of all providers, interleaved round by round.

    On the CPU more than `rounds` are made when together they took less than a second. Calls of more
    than 100 ms are not preceded by an untimed one: the caches are the smallest part of them. Below
    10 ms one is not enough: after another provider's dense product, gathering the same 67 MB of
    rows takes 3.0, 3.0, 1.8 and 1.5 ms, whoever gathers.
    """
    if device == "cuda":
        return _measure_cuda(providers, rounds, warmup)
    times: dict[str, list[float]] = {name: [] for name in providers}
    begun, number = time.perf_counter(), 0
    for round_ in range(warmup + MOST_ROUNDS):
        if round_ == warmup:
            begun = time.perf_counter()
        if round_ >= warmup + rounds and time.perf_counter() - begun > SHORT_SECONDS:
            break
        for name, function in providers.items():
            if not cold and times[name] and times[name][-1] < LONG_MS:
                for _ in range(3 if times[name][-1] < SHORT_MS else 1):
                    function(number)
                    number += 1
            started = time.perf_counter()
            function(number)
            times[name].append((time.perf_counter() - started) * 1e3)
            number += 1
    return {name: found[warmup:] for name, found in times.items()}


def _measure_cuda(providers: dict[str, Callable], rounds: int, warmup: int) -> dict:
    times: dict[str, list[float]] = {name: [] for name in providers}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pending = []
    for round_ in range(warmup + rounds):
        for name, function in providers.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(round_)
            end.record()
            pending.append((name, round_, start, end))
    torch.cuda.synchronize()
    for name, round_, start, end in pending:
        if round_ >= warmup:
            times[name].append(start.elapsed_time(end))
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def verify(name: str, function: Callable, check: Callable, device: str) -> dict[str, float | None]:
    """Checks a first result, then measures the memory of a call that keeps nothing for the next.

    A copy of weights is made by a first or second call, and counted as kept.
    """
    release = native.release_workspaces if extension.problem() is None else gc.collect
    if device == "cuda":
        check(name, function(0))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, kept = torch.cuda.memory_allocated(), None
        result = function(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        result, kept = kept_bytes(lambda: (function(0), release())[0])
        check(name, result)
        del result
        _, later = kept_bytes(lambda: (function(0), release())[0])
        kept = None if kept is None else kept + later
        result, peak = resident_growth(lambda: function(0))
    found = {"peak_mb": peak, "output_mb": output_bytes(result), "kept_mb": kept}
    return {key: None if value is None else value / 2**20 for key, value in found.items()}


def run(case: Case, device: str, common: dict, *, rounds: int, warmup: int) -> list[Row]:
    """Verifies every provider of a case, then times them; AssertionError on a wrong result."""
    nothing = dict.fromkeys(("peak_mb", "output_mb", "kept_mb"))
    memory = {n: verify(n, f, case.check, device) for n, f in case.providers.items()}
    memory |= dict.fromkeys((*case.floors, *case.scaled), nothing)
    providers = case.providers | case.floors
    if device == "cuda":
        for name in (n for n in case.graphs if n in case.providers):
            try:
                providers[f"{name} graph"] = capture(case.providers[name])
            except RuntimeError as error:
                if PACKAGES.get(name) == "fastsae-engine":
                    raise
                print(
                    f"{case.op}: {name} is not captured: {next(iter(str(error).splitlines()), '')}"
                )
                continue
            memory[f"{name} graph"] = nothing
    rounds = min(rounds, case.rounds or rounds)
    protocol = {
        "rounds": rounds,
        "warmup": min(warmup, rounds),
        "cold": case.state.startswith("cold"),
    }
    times = measure(providers, device, **protocol)
    found = {
        name: [ms * case.scaled.get(name, 1) for ms in percentiles(times[name])] for name in times
    }
    base = found[case.base][1] if case.base in found else None
    shape = {letter: case.shape.get(letter) for letter in "NDFkV"}
    return [
        Row(
            op=case.op,
            provider=name,
            version=version(PACKAGES.get(name.split()[0], "torch")),
            **shape,
            dtype=case.dtype,
            p20_ms=p20,
            p50_ms=p50,
            p80_ms=p80,
            base=case.base if base else "",
            ratio=p50 / base if base else None,
            traffic_bytes=case.traffic_bytes,
            flops=case.flops,
            gbps=case.traffic_bytes / p50 / 1e6 if case.traffic_bytes else None,
            tflops=case.flops / p50 / 1e9 if case.flops else None,
            **memory[name],
            state=case.state,
            **common,
        )
        for name, (p20, p50, p80) in found.items()
    ]


def table(rows: list[Row], roofs: list[Row] = ()) -> str:
    """Rows of one case for a person, with the share of the roofline where `roofs` hold one."""
    lines = [f"{rows[0].op} {targets.shape_of(rows[0])} {rows[0].dtype}, {rows[0].state}"]
    for row in rows:
        ratio = f"{row.ratio:8.3f} x {row.base}" if row.ratio else ""
        rate = f"{row.tflops:6.2f} TF/s" if row.tflops else ""
        rate = f"{row.gbps:6.1f} GB/s" if row.gbps else rate
        bound = targets.roofline_ms(row, roofs)
        share = f"{bound / row.p50_ms:4.0%} of roofline" if bound else ""
        extra = f"{row.peak_mb:7.1f} MB" if row.peak_mb is not None else ""
        lines.append(
            f"    {row.provider:50} {row.p50_ms:9.4f} ms [{row.p20_ms:.4f}, {row.p80_ms:.4f}] "
            f"{rate:11} {share:17} {extra:10} {ratio}"
        )
    return "\n".join(lines)


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

    A maker builds its tensors when its turn comes, so that only one case is in memory. Nothing is
    recorded if others used the machine, before the run or during any case.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: got cuda, but torch sees no GPU; use --device cpu")
    started = time.perf_counter()
    common, on_cpu = machine(options.device), options.device == "cpu"
    load = Load()
    disturbed = (
        [f"before the run ({cores:.1f} cores)"] if on_cpu and (cores := busy()) > BUSY_CORES else []
    )
    rounds = options.rounds or (5 if options.quick else 15 if on_cpu else 30)
    rows, wrong, skipped = [], [], []
    print(f"{common['device']}, {common['threads']} threads, torch {common['torch']}")
    for op, make in cases:
        if options.only and op not in options.only:
            continue
        if options.budget and time.perf_counter() - started > options.budget:
            skipped.append(op)
            continue
        load.start()
        try:
            case = make()  # not in inference mode: weights of a model have a version counter
            with torch.inference_mode():
                found = run(case, options.device, common, rounds=rounds, warmup=5)
        except Exception as error:  # the other cases still count
            wrong.append(f"{op}: {type(error).__name__}: {error}")
            continue
        if on_cpu and (cores := load.others()) > BUSY_CORES:
            disturbed.append(f"{op} {targets.shape_of(found[0])} ({cores:.1f} cores)")
        rows += found
        print(table(found, rows), flush=True)
        if options.out and not on_cpu:  # a crash or a time limit must not take what is measured
            write_csv(options.out, rows)
    print(targets.summary(rows))
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    if skipped:
        print(f"skipped, out of time: {', '.join(skipped)}")
    if disturbed:
        print(f"busy machine, these times are no measurement: {'; '.join(disturbed)}")
    if options.out and (not disturbed or options.anyway):
        write_csv(options.out, rows)
        print(f"wrote {options.out}")
    elif options.out:
        print("not recorded: the machine is busy (--anyway records)", file=sys.stderr)
    return 1 if wrong else 0
