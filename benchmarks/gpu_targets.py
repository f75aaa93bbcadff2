"""What fastsae promises on an H100, against rows measured on a GPU: target | measured | holds.

    python -P benchmarks/gpu_targets.py benchmarks/results/gpu-NAME.csv

Times are medians of the fastest backend, of a graph replay where one was measured. A ratio is taken
between medians of one case of one run. Absolute times are promised for an H100 only; ratios
everywhere. "share" is the part of that card's own measured roofline.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from rows import read_csv
from targets import MM_BF16, cases, roofline_ms

D, F, K = 4096, 65536, 32


class GpuTarget(NamedTuple):
    """The fastest of ours takes at most `limit` ms, or `limit` times the fastest of `bases`."""

    op: str
    shape: dict
    limit: float
    bases: tuple[str, ...] = ()
    text: str = ""


def _targets() -> Iterable[GpuTarget]:
    half = {"D": D, "F": F, "k": K, "dtype": "bfloat16"}
    mm_topk = ("torch", "torch graph")
    yield GpuTarget("topk", {"N": 16384, "F": F, "k": K}, 0.85)
    yield GpuTarget("topk", {"N": 16384, "F": F, "k": 256}, 1.0)
    bases = ("torch", "torch unsorted", "torch graph")
    yield GpuTarget("topk", {"N": 16384, "F": F, "k": K}, 1 / 6, bases, "torch.topk")
    for n in (4096, 16384):
        yield GpuTarget("encode_topk", {"N": n, **half}, 1.08, (MM_BF16,), "torch.mm alone")
        yield GpuTarget("encode_topk", {"N": n, **half}, 1 / 1.45, mm_topk, "mm + topk")
    for n, limit in ((1, 0.195), (16, 0.195), (64, 0.205)):
        yield GpuTarget("encode_topk", {"N": n, **half}, limit)
        yield GpuTarget("encode_topk", {"N": n, **half}, 1 / 1.4, mm_topk, "mm + topk")
    narrow = {"N": 16384, **half, "D": 768}
    yield GpuTarget("encode_topk", narrow, 1 / 2.8, mm_topk, "mm + topk")
    yield GpuTarget("encode_topk", narrow, 1.25, (MM_BF16,), "torch.mm alone")
    full = {**half, "dtype": "float32"}  # certified: int8 up to 16 rows, then bf16
    for n, limit in ((1, 0.110), (8, 0.120), (16, 0.130)):
        yield GpuTarget("encode_topk", {"N": n, **full}, limit)
    yield GpuTarget("encode_topk", {"N": 1024, **full}, 1 / 4, mm_topk, "fp32 mm + topk")
    yield GpuTarget("encode_topk", {"N": 1024, **full}, 1.35, (MM_BF16,), "bf16 torch.mm alone")
    for n, limit in ((1, 0.004), (64, 0.010), (4096, 0.36), (16384, 1.1)):
        yield GpuTarget("decode", {"N": n, **half}, limit)
        yield GpuTarget("decode", {"N": n, **half}, 1 / 1.4, ("sparsify", "sparsify graph"))
    yield GpuTarget("gather_dot+sparse_outer", {"N": 16384, **half}, 2.6)
    yield GpuTarget("mi_topk", {"F": F, "V": 5000, "D": D, "dtype": "bfloat16"}, 8.5)
    for n, limit in ((1, 0.004), (64, 0.005)):
        yield GpuTarget("steer", {"N": n, "D": D, "k": 64, "state": "warm"}, limit)


TARGETS = tuple(_targets())
OURS = ("triton graph", "native graph", "triton", "native")


def fastest(case: list, providers: tuple[str, ...]):
    """The row of the smallest median; a replayed graph goes before eager calls."""
    found = [row for row in case if row.provider in providers]
    graphs = [row for row in found if row.provider.endswith(" graph")]
    return min(graphs or found, key=lambda row: row.p50_ms, default=None)


def _matches(target: GpuTarget, row) -> bool:
    return all(getattr(row, name) == value for name, value in target.shape.items())


def judged(rows: Iterable, on_h100: bool) -> list[tuple[str, str, str]]:
    """(target, measured, verdict) of every target; "not measured" where the rows lack a side."""
    rows = list(rows)
    every = cases(rows)
    return [_judge(target, every, rows, on_h100) for target in TARGETS]


def _judge(target: GpuTarget, every: list, rows: list, on_h100: bool) -> tuple[str, str, str]:
    shape = " ".join(f"{name}={value}" for name, value in target.shape.items())
    bound = f"≤ {target.limit:.4g} ms"
    if target.bases:
        base = target.text or target.bases[0]
        above = target.limit > 1
        bound = f"≤ {target.limit:.2f} x {base}" if above else f"≥ {1 / target.limit:.3g} x {base}"
    name = f"{target.op} {shape}: {bound}"
    found = [
        next((c for c in every if c[0].op == op and _matches(target, c[0])), [])
        for op in target.op.split("+")
    ]
    ours = [fastest(case, OURS) for case in found]
    base = fastest(found[0], target.bases) if target.bases else None
    if None in ours or (target.bases and base is None):
        return name, "not measured", ""
    total = sum(row.p50_ms for row in ours)
    roof = roofline_ms(ours[0], [row for row in rows if row.op.startswith("roofline")])
    share = f", {roof / total:.0%} of roofline" if roof and len(ours) == 1 else ""
    if base is not None:
        ratio = total / base.p50_ms
        shown = f"{ratio:.2f} x" if target.limit > 1 else f"{1 / ratio:.2f} x faster"
        return name, shown + share, "holds" if ratio <= target.limit else "MISSED"
    verdict = "holds" if total <= target.limit else "MISSED" if on_h100 else "another GPU"
    return name, f"{total:.4f} ms ({ours[0].provider}){share}", verdict


def table(rows: Iterable) -> str:
    rows = list(rows)
    lines = judged(rows, any("H100" in row.device for row in rows))
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{a:{width}}  {b:44}  {c}".rstrip() for a, b, c in lines)


def main(arguments: list[str] | None = None) -> int:
    (path,) = sys.argv[1:] if arguments is None else arguments
    print(table(read_csv(Path(path))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
