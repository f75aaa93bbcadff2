"""Where the time of an op goes: the share of every torch and fastsae operator that it calls.

torch's own profiler times each operator on the calling thread, which waits for the worker threads,
so an operator's self time is its share of the wall-clock time; what no operator accounts for is
Python and the profiler itself (a few µs an operator: calls that take less than 1 ms look longer
than they are). Any operator that an implementation calls appears by itself, none is listed here.
Only encoding is split further: csrc/encode.h says what its passes are.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable

import torch
from common import BUSY_CORES, Case
from machine import busy, machine
from rows import REST, Stage, write_csv
from targets import OURS, shape_of

from fastsae.ops import native

SMALLEST_SHARE = 0.005  # stages below are added up


def stages(function: Callable, calls: int) -> tuple[float, dict[str, float]]:
    """Mean ms of a profiled call, and {operator: its own ms per call}, longest first."""
    for call in range(3):
        function(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for call in range(calls):
            function(call)
        passed = time.perf_counter() - started
    events = {e.key: e.self_cpu_time_total / 1e3 / calls for e in profiler.key_averages()}
    for leaf in ("fastsae::_encode_topk", "fastsae::_encode_threshold"):
        if leaf in events:  # the encoder times its own passes
            parts = [(function(call), native.encode_stages())[1] for call in range(calls)]
            for stage in parts[0]:
                events[f"{leaf}: {stage}"] = ms = sum(p[stage] for p in parts) * 1e3 / calls
                events[leaf] = max(0.0, events[leaf] - ms)
    return passed * 1e3 / calls, dict(sorted(events.items(), key=lambda e: -e[1]))


def of_case(case: Case, calls: int, common: dict) -> list[Stage]:
    """The stages of fastsae's compiled backend, then what is left: short ones and Python."""
    total, found = stages(case.providers[OURS], calls)
    shown = {name: ms for name, ms in found.items() if ms >= SMALLEST_SHARE * total}
    shown[REST] = max(0.0, total - sum(shown.values()))
    columns = {field.name for field in dataclasses.fields(Stage)}
    same = {letter: case.shape.get(letter) for letter in "NDFkV"}
    same |= {"op": case.op, "dtype": case.dtype, "state": case.state}
    same |= {name: value for name, value in common.items() if name in columns}
    return [Stage(stage=name, ms=ms, share=ms / total, **same) for name, ms in shown.items()]


def profile_all(cases: list[tuple[str, Callable[[], Case]]], options: argparse.Namespace) -> int:
    """Profiles what the compiled backend serves; writes `options.out` if the machine is idle."""
    common, load, found = machine("cpu"), busy(), []
    for op, make in cases:
        if op.startswith("roofline") or (options.only and op not in options.only):
            continue
        case = make()
        with torch.inference_mode():
            if OURS not in case.providers:
                print(f"{op}: the compiled backend does not serve it here (make build)")
                continue
            rows = of_case(case, options.rounds or 10, common)
        found += rows
        print(f"{op} {shape_of(rows[0])} {rows[0].dtype}: {sum(r.ms for r in rows):.4f} ms")
        for row in rows:
            print(f"    {row.stage:45} {row.ms:9.4f} ms {row.share:5.0%}", flush=True)
    if options.out and (load <= BUSY_CORES or options.anyway):
        write_csv(options.out, found)
        print(f"wrote {options.out}")
    elif options.out:
        print("not recorded: the machine is busy (--anyway records)", file=sys.stderr)
    return 0
