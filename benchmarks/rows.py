"""The lines of results/*.csv: one measurement, or one stage of a profile, with its machine."""

import csv
import dataclasses
import typing
from pathlib import Path

REST = "Python, the profiler, what is shorter"  # the stage that no operator accounts for


@dataclasses.dataclass
class Row:
    """One line of the csv: STYLE is one row per (op, provider, shape).

    `ratio` is p50 over the p50 of `base` in the same run: 0.5 takes half its time. `peak_mb` is
    what a warm call takes beyond what was there before it, its result (`output_mb`) included;
    `kept_mb` is what the first calls left allocated beside their result, such as a screening copy
    of the weights. `provider` "native" and "triton" are fastsae's backends.
    """

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
    base: str
    ratio: float | None
    traffic_bytes: int
    flops: int
    gbps: float | None
    tflops: float | None
    peak_mb: float | None
    output_mb: float | None
    kept_mb: float | None
    state: str
    device: str
    clocks: str
    threads: int
    torch: str
    triton: str
    fastsae: str
    commit: str
    date: str
    command: str


@dataclasses.dataclass
class Stage:
    """One line of the profile's csv. `ms` is per profiled call, `share` of that call's time."""

    op: str
    N: int | None
    D: int | None
    F: int | None
    k: int | None
    V: int | None
    dtype: str
    state: str
    stage: str
    ms: float
    share: float
    device: str
    threads: int
    torch: str
    fastsae: str
    commit: str
    date: str
    command: str


# Of a load, each with a ratio.
MEASURES = ("throughput_tok_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99")


@dataclasses.dataclass
class Load:
    """One line of a server's load table: times in ms, every ratio to the engine without plugin."""

    load: str
    concurrency: int
    throughput_tok_s: float
    throughput_tok_s_ratio: float
    ttft_ms_p50: float
    ttft_ms_p50_ratio: float
    ttft_ms_p99: float
    ttft_ms_p99_ratio: float
    tpot_ms_p50: float
    tpot_ms_p50_ratio: float
    tpot_ms_p99: float
    tpot_ms_p99_ratio: float
    model: str
    features: int | None
    dtype: str
    requests: int
    prompt: int
    tokens: int
    rounds: int
    compiled: str
    vllm: str
    device: str
    clocks: str
    threads: int
    torch: str
    triton: str
    fastsae: str
    commit: str
    date: str
    command: str


def write_csv(path: Path, rows: list) -> None:
    """Rows of one kind, `Row`, `Stage` or `Load`, with floats to five decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(rows[0])] if rows else []
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            line = dataclasses.asdict(row)
            rounded = {k: round(v, 5) for k, v in line.items() if isinstance(v, float)}
            writer.writerow({**line, **rounded})


def read_csv(path: Path) -> list:
    """The rows that `write_csv` wrote."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        kind = Stage if "stage" in names else Load if "load" in names else Row
        fields = dataclasses.fields(kind)
        return [kind(**{f.name: _typed(f, line[f.name]) for f in fields}) for line in reader]


def _typed(field: dataclasses.Field, text: str):
    kinds = typing.get_args(field.type) or (field.type,)
    return None if text == "" and str not in kinds else kinds[0](text)
