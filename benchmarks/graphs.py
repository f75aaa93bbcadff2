"""Replays of a captured CUDA graph of every op equal eager calls, bit for bit.

    python -P benchmarks/graphs.py [--device cuda] [--replays 10000] [--budget 100]
    python -P benchmarks/graphs.py --device cpu --replays 20

Every op whose shapes do not depend on data, in every backend that can be captured. New random
inputs are copied into the captured tensors before every replay; eager runs on the same inputs, and
the number of differing elements is summed on the device and read at the end. Encoders read a copy
of their weights that is kept; in another run the weights change too, and replays must follow. On
the CPU, where there are no graphs, the same calls are compared with repeated calls, which tests
this program.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import capture
from problems import Codes, randn, steer_table

from fastsae import ops
from fastsae.ops.backend import supported

N, D, F, K, V = 16, 256, 2048, 16, 500
MANY = 128  # rows that other kernels take: cuBLAS screens, and rows share the weights they read
STREAMED = (600, 9000)  # rows and features of products that stream by in tiles


def calls(device: str, dtype: torch.dtype) -> dict[str, tuple[list[torch.Tensor], Callable]]:
    """{op: (tensors that change from call to call, call(backend))}."""
    c, table = Codes(device, N, D, F, K, dtype), steer_table(device, D, 16)
    x, h = (randn(N, n, device=device, dtype=dtype) for n in (D, F))
    features, words = randn(64, D, device=device), randn(V, D, device=device)
    b, strengths = randn(F, device=device), torch.rand(N, device=device)
    slots = (torch.arange(N, device=device) % 2).int()
    theta, full, W = torch.ones(F, device=device), x.float(), c.W.float()
    rows, more = randn(MANY, D, device=device), torch.rand(MANY, device=device)
    places = (torch.arange(MANY, device=device) % 2).int()
    wide, large = (randn(n, D, device=device, dtype=dtype) for n in STREAMED)
    bias = randn(STREAMED[1], device=device)

    def encode(name):
        return ops.encode_topk(x, c.W, b, K, backend=name)

    def encode_full(name):
        return ops.encode_topk(full, W, b, K, backend=name)

    def encode_padded(name):  # room for all: an eager call raises where a row has more
        return ops.encode_threshold_padded(x, c.W, b, theta, F, backend=name)

    return {
        "topk": ([h], lambda name: ops.topk(h, K, backend=name)),
        "encode_topk": ([x, b], encode),
        "encode_topk, float32": ([full, b], encode_full),
        "encode_topk, new weights": ([full, W], encode_full),
        "encode_topk, many rows": (
            [rows, b],
            lambda name: ops.encode_topk(rows, W, b, K, backend=name),
        ),
        "encode_topk, streamed": (
            [wide, bias],
            lambda name: ops.encode_topk(wide, large, bias, K, backend=name),
        ),
        "encode_threshold_padded": ([x, b], encode_padded),
        "decode": ([c.values], lambda name: ops.decode(c.values, c.indices, c.W, backend=name)),
        "gather_dot": ([c.g], lambda name: ops.gather_dot(c.g, c.W, c.indices, backend=name)),
        "sparse_outer": (
            [c.values, c.g],
            lambda name: ops.sparse_outer(c.values, c.indices, c.g, F, backend=name),
        ),
        "mi_topk": ([features], lambda name: ops.mi_topk(features, words, 10, backend=name)),
        "steer": (
            [x, strengths],
            lambda name: ops.steer(x, slots, strengths, table, backend=name),
        ),
        "steer, many rows": (
            [rows, more],
            lambda name: ops.steer(rows, places, more, table, backend=name),
        ),
    }


def differing(got, wanted) -> torch.Tensor:
    """Number of elements whose bits differ; NaN equals NaN of the same bits."""
    pairs = ((got, wanted),) if isinstance(got, torch.Tensor) else zip(got, wanted, strict=True)
    counts = []
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype, "a replay changed its shape or type"
        counts.append((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
    return torch.stack(counts).sum()


@torch.no_grad()
def check(
    inputs: list[torch.Tensor], call: Callable, replays: int, seconds: float, graph: bool
) -> tuple[int, int]:
    """(replays made, differing elements) of one op; stops after `seconds`."""
    started, held = time.perf_counter(), {}
    call()  # compiles

    def function(_number):
        held["out"] = call()

    replay = capture(function) if graph else function
    captured, wrong = held.get("out"), torch.zeros((), dtype=torch.int64, device=inputs[0].device)
    for number in range(replays):
        for tensor in inputs:
            tensor.normal_().mul_(1 + number % 7)
        replay(number)
        replayed = captured if graph else held["out"]
        wrong += differing(replayed, call())
        if number % 100 == 99:
            if wrong.is_cuda:
                torch.cuda.synchronize()  # or the queue, not the clock, would tell the time
            if time.perf_counter() - started > seconds:
                return number + 1, int(wrong)
    return replays, int(wrong)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="repeat calls, capture nothing")
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds for all ops together")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: got cuda, but torch sees no GPU; use --device cpu")
    graph = options.device == "cuda" and not options.eager
    if not graph:
        print("nothing is captured: repeated calls are compared instead")
    if graph:
        from fastsae.kernels import copies

        copies.SMALLEST = 0  # these weights are small, and copies are a part of what is tested
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    jobs = [
        (op, name, inputs, call)
        for op, (inputs, call) in calls(options.device, dtype).items()
        for name in supported(op.split(",")[0], options.device, dtype)
        if name != "reference"
    ]
    failed, ends = 0 if jobs else 1, time.perf_counter() + options.budget
    for number, (op, name, inputs, call) in enumerate(jobs):
        try:
            once = functools.partial(call, name)
            # Of what is left: compiling takes its time, and more of it for the first encoder.
            seconds = max(1.0, (ends - time.perf_counter()) / (len(jobs) - number))
            made, wrong = check(inputs, once, options.replays, seconds, graph)
            verdict = "equal eager" if wrong == 0 else f"WRONG: {wrong} elements differ"
            short = "" if made == options.replays else f" (of {options.replays}: out of time)"
            print(f"{op:24} {name:8} {made:6} replays{short}  {verdict}", flush=True)
            failed += wrong != 0
        except Exception as error:  # the other ops still count
            print(f"{op:24} {name:8} FAILED {type(error).__name__}: {error}", flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
