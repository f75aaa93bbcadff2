"""What fastsae promises on a CPU with two threads, and whether measured rows keep the promise.

A target is a ratio of two medians of one case, taken in one run in one process, or a bound on a
time or a memory. Everything is computed from rows alone, so a csv file gives the same verdicts as
the run that wrote it. An encoder is judged against the product alone as users call it, which
allocates its output as the encoder does, and besides against the product into an output that exists
already; bf16 weights against the product in bf16.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

SHAPES = {  # N, D, F, k
    "A": (1024, 1024, 16384, 100),
    "B": (256, 2048, 32768, 32),
    "C": (1, 2048, 65536, 32),
    "C4": (4, 2048, 65536, 32),
    "E": (1, 4096, 65536, 32),
}
TRAIN = (2048, 1024, 16384, 32)
MI_SHAPES = ((4096, 5000, 640), (16384, 5000, 1024))  # F, V, D
STEER = (1, 2048, 64)  # N, D, features
STEERED = (  # condition, share of a decoded token
    ("idle", 0.005, "0.5 %"),
    ("rows", 0.005, "0.5 %"),
    ("features", 0.01, "1 %"),
    ("membership", 0.02, "the encoder's bytes + 2 %"),
)
OURS = "native"
NO_TILES = "native avx512"  # on a processor with AMX: told not to use it
MM_FP32, MM_BF16, OUT = "torch.mm float32", "torch.mm bfloat16", " out="
PYTHON_SORT = "python sort per feature"


class Target(NamedTuple):
    """`value(row, base row)` of every row of ours that `applies` must be at most `limit`.

    `op` also names its variants: "train_step" has "train_step_300". `bases`: providers, of which
    the fastest one found counts; none: the bound is absolute.
    """

    op: str
    text: str
    limit: float
    applies: Callable
    bases: tuple[str, ...] = ()
    # or "ms"; "mb": peak memory beside the result; "added": the row's own ratio (a median of paired
    # ratios, which two medians do not tell) less that of the bytes to move
    unit: str = "ratio"
    ours: str = OURS


class Verdict(NamedTuple):
    target: Target
    row: object
    measured: float

    @property
    def met(self) -> bool:
        return self.measured <= self.target.limit

    @property
    def shown(self) -> str:
        if self.target.unit == "ms":
            return f"{self.measured * 1e3:.1f} µs"
        if self.target.unit == "mb":
            return f"{self.measured:.1f} MB"
        if self.target.unit == "added":
            return f"{self.measured:+.2%}"
        if self.target.text.startswith("≥"):
            return f"{1 / self.measured:.1f} x faster"
        return f"{self.measured:.2f} x"


def _at(*names: str) -> Callable:
    wanted = [SHAPES[name][:3] for name in names]
    return lambda row: row.dtype == "float32" and (row.N, row.D, row.F) in wanted


def _any(row) -> bool:
    return True


def _half(row) -> bool:
    return row.dtype == "bfloat16" and (row.N, row.D, row.F) in (
        SHAPES["C"][:3],
        SHAPES["C4"][:3],
        SHAPES["E"][:3],
    )


def _mi(number: int) -> Callable:
    return lambda row: (row.F, row.V, row.D) == MI_SHAPES[number]


def _steer(items: int) -> Callable:
    return lambda row: (row.N, row.D, row.k) == (*STEER[:2], items)


def _topk(state: str) -> Callable:
    return lambda row: (row.N, row.F, row.state) == (64, 65536, state)


def _train(row) -> bool:
    return (row.N, row.D, row.F, row.k) == TRAIN


def _targets() -> Iterable[Target]:
    for op in ("encode_topk", "encode_threshold"):
        few = _at("C", "C4", "E")
        for out, how in (("", "alone"), (OUT, "into a given output")):
            bf16, fp32 = (MM_BF16 + out,), (MM_FP32 + out,)
            yield Target(op, f"≤ 1.35 x the bf16 product {how}", 1.35, _at("A", "B"), bf16)
            yield Target(op, f"≤ 0.6 x the fp32 product {how}", 0.6, few, fp32)
            yield Target(op, f"≤ 0.8 x the bf16 product {how}", 0.8, _half, bf16)
        yield Target(op, "≥ 4 x faster than SAELens", 1 / 4, _at("A", "B"), ("SAELens",))
        text = "without AMX: not slower than torch"
        yield Target(op, text, 1, _at("A", "B"), ("torch",), ours=NO_TILES)
        yield Target(op, "≤ 64 MB beside the result", 64, _any, (), "mb")
    unsorted = ("torch", "torch unsorted")
    for state in ("cold", "cold L2"):
        text = f"≥ 8 x faster than torch.topk, {state}"
        yield Target("topk", text, 1 / 8, _topk(state), unsorted)
    for name, times in (("A", 11), ("B", 40), ("C", 500)):
        text = f"≥ {times} x faster than SAELens"
        yield Target("decode", text, 1 / times, _at(name), ("SAELens",))
    yield Target("decode", "not slower than sparsify", 1, _at("A", "B", "C"), ("sparsify",))
    yield Target("decode", "not slower than embedding_bag", 1, _at("A", "B", "C"), ("torch",))
    torch_steps = ("torch", "torch bag", "torch sparse")
    yield Target("train_step", "≥ 3 x faster than torch", 1 / 3, _train, torch_steps)
    yield Target("train_step", "≥ 3 x faster than sparsify", 1 / 3, _train, ("sparsify",))
    for number, times in ((0, 25), (1, 15)):
        text = f"≥ {times} x faster than a Python sort per feature"
        yield Target("mi_topk", text, 1 / times, _mi(number), (PYTHON_SORT,))
        yield Target("mi_topk", "≥ 2 x faster than torch", 1 / 2, _mi(number), ("torch",))
        yield Target("mi_topk", "≤ 256 MB beside the result", 256, _mi(number), (), "mb")
    yield Target("steer", "≤ 40 µs a call", 0.040, _steer(STEER[2]), (), "ms")
    yield Target("steer", "≤ 8 µs a call, idle", 0.008, _steer(0), (), "ms")
    for op in ("saelens_encode", "saelens_encode_jumprelu"):
        yield Target(op, "≥ 4 x faster than SAELens", 1 / 4, _at("A", "B"), ("SAELens",))
    text = "≥ 30 x faster than SAELens"
    yield Target("saelens_decode", text, 1 / 30, _at("A", "B", "C"), ("SAELens",))
    yield Target("hooked_forward", "≥ 2 x faster than SAELens", 1 / 2, _any, ("SAELens",))
    yield Target("sparsify_train_step", "≥ 2 x faster than sparsify", 1 / 2, _train, ("sparsify",))
    bases = ("SAELens", "SAELens sparse")
    yield Target("saelens_train_step", "faster than SAELens", 1, _train, bases)
    for name, limit, text in STEERED:
        for op, where in (("token", ""), ("hooks", ", in the hooks")):
            told = f"adds ≤ {text} to a token{where}"
            yield Target(f"{op}_{name}", told, limit, _any, ("unsteered",), "added")
    text = "256 policies ≤ 1.1 x one policy"
    yield Target("token_policies", text, 0.1, _any, ("one policy",), "added")


TARGETS = tuple(_targets())


def shape_of(row) -> str:
    return " ".join(f"{n}={v}" for n in "NDFkV" if (v := getattr(row, n)) is not None)


def case_of(row) -> tuple:
    """Rows with the same key were measured against each other."""
    return row.op, row.N, row.D, row.F, row.k, row.V, row.dtype, row.state


def cases(rows: Iterable) -> list[list]:
    """The rows of every case, in the order in which they were measured."""
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault(case_of(row), []).append(row)
    return list(found.values())


def _serves(op: str, measured: str) -> bool:
    return measured == op or (op == "train_step" and measured.startswith("train_step_"))


def _is(provider: str, base: str) -> bool:
    return provider == base or (base == PYTHON_SORT and provider.startswith(base))


def verdicts(rows: Iterable) -> list[Verdict]:
    """Of every target on every case that holds both sides of it."""
    found = []
    for case in cases(rows):
        for row in case:
            for target in (t for t in TARGETS if _serves(t.op, row.op) and t.applies(row)):
                if row.provider != target.ours:
                    continue
                measured = _measured(target, row, case)
                if measured is not None:
                    found.append(Verdict(target, row, measured))
    return found


def _measured(target: Target, row, case: list) -> float | None:
    if target.unit == "mb":
        return None if row.peak_mb is None else max(0.0, row.peak_mb - row.output_mb)
    if target.unit == "ms":
        return row.p50_ms
    if target.unit == "added":
        base = next((r for r in case if r.provider in target.bases), None)
        return None if base is None else row.ratio - row.traffic_bytes / base.traffic_bytes
    bases = [r.p50_ms for r in case if any(_is(r.provider, base) for base in target.bases)]
    return row.p50_ms / min(bases) if bases else None


def summary(rows: Iterable) -> str:
    """target | measured | met?, a line for every target that these rows can judge."""
    lines = [
        f"{v.row.op:17} {shape_of(v.row):34} {v.row.dtype:9} {v.row.state:20} {v.target.text:45} "
        f"{v.shown:>15}  {'met' if v.met else 'MISSED'}"
        for v in verdicts(rows)
    ]
    return "\n".join([f"targets: {len(lines)} judged", *lines])


def roofline_ms(row, roofs: Iterable) -> float | None:
    """The least time this machine needs for a row's bytes or operations; None if not measured.

    Bytes at the measured stream-read rate, operations at the measured bf16 product's rate: what a
    perfect implementation with these weights would take. Reading fewer bytes (an int8 copy)
    can be faster than this.
    """
    best = {r.op: 0.0 for r in roofs}
    for roof in roofs:
        best[roof.op] = max(best[roof.op], roof.gbps or roof.tflops or 0.0)
    bounds = []
    if row.traffic_bytes and best.get("roofline read"):
        bounds.append(row.traffic_bytes / best["roofline read"] / 1e6)
    if row.flops and best.get("roofline mm bfloat16"):
        bounds.append(row.flops / best["roofline mm bfloat16"] / 1e9)
    return max(bounds, default=None)
