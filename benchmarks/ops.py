"""Measures every op against torch at the reference shapes, after verifying it on the same tensors.

    python -P benchmarks/ops.py [--device cpu|cuda] [--quick] [--only topk decode] [--out FILE.csv]

Providers: every backend of fastsae that serves the op here (native, triton, reference); `torch` is
what a user would write without fastsae; `torch.mm ...` is the matrix product alone, the floor that
an encoder is judged against. On CUDA a provider is also measured as the replay of a CUDA graph.
"""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Case, parser, run_all

from fastsae import ops
from fastsae.ops import reference
from fastsae.ops.backend import supported

BF16, F32 = torch.bfloat16, torch.float32
CPU_SHAPES = {  # N, D, F, k
    "A": (1024, 1024, 16384, 100),
    "B": (256, 2048, 32768, 32),
    "C": (1, 2048, 65536, 32),
    "E": (1, 4096, 65536, 32),
}
GPU_D, GPU_F, GPU_K = 4096, 65536, 32
CHECKED_ROWS = 8  # rows compared with float64; the oracle of a whole GPU shape would not fit
GRAPHS = ("triton", "native", "torch")


def randn(*shape: int, device: str, dtype=F32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def served(op: str, device: str, dtype, call: Callable) -> dict[str, Callable]:
    """{backend: call(backend, round)}; on CUDA the reference is torch code, as `torch` is."""
    names = [n for n in supported(op, device, dtype) if n != "reference" or device == "cpu"]
    return {name: functools.partial(call, name) for name in names}


def close(name: str, got: torch.Tensor, oracle: torch.Tensor, limit: float) -> None:
    """‖got - oracle‖ <= limit ‖oracle‖: fp32 sums are far below 1e-5, bf16 results near 2e-3."""
    error = ((got.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)).item()
    assert error <= limit, f"{name}: relative error {error:.3g}, accepted {limit:.0e}"


def limit_of(result: torch.Tensor) -> float:
    return 1e-5 if result.dtype == F32 else 1e-2


def topk_case(device: str, N: int, F: int, k: int, dtype) -> Case:
    copies = 1 if device == "cuda" else 4  # four times 16 MB leave the last-level cache
    xs = [randn(N, F, device=device, dtype=dtype, seed=i) for i in range(copies)]
    wanted = reference.topk(xs[0][-CHECKED_ROWS:], k)

    def check(name, result):
        values, indices = (part[-CHECKED_ROWS:] for part in result)
        assert torch.equal(values.sort(descending=True).values, wanted[0]), f"{name}: values"
        if not name.startswith("torch"):  # torch breaks ties as it likes
            assert torch.equal(indices, wanted[1]), f"{name}: wrong indices"

    def call(name, i):
        return ops.topk(xs[i % copies], k, backend=name)

    providers = served("topk", device, dtype, call)
    providers["torch"] = lambda i: torch.topk(xs[i % copies], k)
    providers["torch unsorted"] = lambda i: torch.topk(xs[i % copies], k, sorted=False)
    # The row is read once; values and int32 indices are written.
    traffic = N * F * xs[0].element_size() + N * k * (xs[0].element_size() + 4)
    shape = {"N": N, "F": F, "k": k}
    return Case("topk", shape, name_of(dtype), providers, check, traffic, 0, "cold", GRAPHS)


class Encoder:
    """x, W_enc of unit rows and a b_enc around -1, as a trained encoder has, with its floors."""

    def __init__(self, device: str, N: int, D: int, F: int, kept: int, dtype):
        self.x = x = randn(N, D, device=device, dtype=dtype, seed=3)
        self.W = W = randn(F, D, device=device, dtype=dtype, seed=1).div_(D**0.5)
        self.b = randn(F, device=device, seed=2) * 0.1 - 1
        self.typed_b = self.b.to(dtype)
        self.rows = slice(0, min(N, CHECKED_ROWS))
        self.h = torch.cat([x[self.rows].double() @ w.double().T for w in W.split(4096)], 1)
        self.h += self.b.double()
        self.floors = {f"torch.mm {name_of(dtype)}": lambda i: torch.mm(x, W.T)}
        if dtype == F32:
            x16, W16 = x.bfloat16(), W.bfloat16()
            self.floors["torch.mm bfloat16"] = lambda i: torch.mm(x16, W16.T)
        # x and W are read once, `kept` pairs (value, index) a row are written.
        self.traffic = (N * D + F * D) * x.element_size() + N * kept * 8
        self.flops = 2 * N * D * F
        self.shape = {"N": N, "D": D, "F": F, "k": kept}

    def dense(self) -> torch.Tensor:
        return torch.addmm(self.typed_b, self.x, self.W.T)


def encode_topk_case(device: str, N: int, D: int, F: int, k: int, dtype) -> Case:
    e = Encoder(device, N, D, F, k, dtype)
    best = torch.topk(e.h, k).values.clamp(min=0)

    def check(name, result):
        values, indices = result[0][e.rows], result[1][e.rows].long()
        limit = limit_of(values)  # torch in bf16 rounds h itself
        close(name, values, torch.where(values > 0, e.h.gather(1, indices), 0), limit)
        close(f"{name}, omitted", values, best, limit)
        assert all(len(set(row)) == k for row in indices.tolist()), f"{name}: repeated index"

    def by_torch(i):
        values, indices = torch.topk(e.dense(), k)
        return values.relu(), indices

    def call(name, i):
        return ops.encode_topk(e.x, e.W, e.b, k, backend=name)

    providers = served("encode_topk", device, dtype, call) | {"torch": by_torch}
    graphs = GRAPHS if N <= 64 else ()
    work = (e.traffic if N <= 64 else 0, e.flops, "warm", graphs, e.floors)
    return Case("encode_topk", e.shape, name_of(dtype), providers, check, *work)


def encode_threshold_case(device: str, N: int, D: int, F: int, active: int, dtype) -> Case:
    """JumpReLU with one threshold, set so that `active` latents survive on average."""
    e = Encoder(device, N, D, F, active, dtype)
    level = torch.topk(e.h.flatten(), active * e.h.shape[0]).values[-1].item()
    threshold = torch.full((F,), max(level, 0.0), device=device)
    wanted = torch.where(e.h > threshold, e.h, 0)
    doubtful = (e.h - threshold).abs() < (1e-4 if dtype == F32 else 0.03)

    def check(name, result):
        values, indices, ends = result
        got = torch.zeros_like(e.h)
        for n in range(e.h.shape[0]):
            part = slice(int(ends[n]), int(ends[n + 1]))
            got[n, indices[part].long()] = values[part].double()
        close(
            name, torch.where(doubtful, 0, got), torch.where(doubtful, 0, wanted), limit_of(values)
        )

    def by_torch(i):
        h = e.dense()
        keep = h > threshold
        ends = nn.pad(keep.sum(1).cumsum(0), (1, 0))
        return h[keep], keep.nonzero()[:, 1], ends

    def call(name, i):
        return ops.encode_threshold(e.x, e.W, e.b, threshold, backend=name)

    providers = served("encode_threshold", device, dtype, call) | {"torch": by_torch}
    work = (e.traffic if N <= 64 else 0, e.flops, "warm", (), e.floors)
    return Case("encode_threshold", e.shape, name_of(dtype), providers, check, *work)


class Codes:
    """Sparse codes with distinct indices in a row, weights W [F, D] and a gradient g [N, D]."""

    def __init__(self, device: str, N: int, D: int, F: int, k: int, dtype):
        generator = torch.Generator(device).manual_seed(5)
        self.values = randn(N, k, device=device, seed=5).abs()
        start = torch.randint(0, F, (N, 1), generator=generator, device=device)
        step = torch.randint(1, F // k, (N, k), generator=generator, device=device).cumsum(1)
        self.indices = ((start + step) % F).int()
        self.W = randn(F, D, device=device, dtype=dtype, seed=1)
        self.g = randn(N, D, device=device, dtype=dtype, seed=6)
        self.rows = slice(0, min(N, CHECKED_ROWS))
        self.shape = {"N": N, "D": D, "F": F, "k": k}
        # K weight rows, values and indices are read per token, one row is read or written.
        self.traffic = N * (k * D * self.W.element_size() + 8 * k + D * 4)


def decode_case(device: str, N: int, D: int, F: int, k: int, dtype) -> Case:
    c = Codes(device, N, D, F, k, dtype)
    oracle = reference.decode(c.values[c.rows].double(), c.indices[c.rows], c.W)
    typed = c.values.to(dtype)

    def check(name, result):
        close(name, result[c.rows], oracle, limit_of(result))

    def by_torch(i):
        return nn.embedding_bag(c.indices, c.W, per_sample_weights=typed, mode="sum")

    def call(name, i):
        return ops.decode(c.values, c.indices, c.W, backend=name)

    providers = served("decode", device, dtype, call) | {"torch": by_torch}
    work = (c.traffic, 0, "warm", GRAPHS)
    return Case("decode", c.shape, name_of(dtype), providers, check, *work)


def gather_dot_case(device: str, N: int, D: int, F: int, k: int, dtype) -> Case:
    c = Codes(device, N, D, F, k, dtype)
    oracle = reference.gather_dot(c.g[c.rows].double(), c.W, c.indices[c.rows])

    def check(name, result):
        close(name, result[c.rows], oracle, limit_of(result))

    def by_torch(i):  # in slices: N·K·D would not fit at the large shapes
        parts = zip(c.g.split(512), c.indices.split(512), strict=True)
        return torch.cat([torch.einsum("nd,nkd->nk", g, c.W[rows]) for g, rows in parts])

    def call(name, i):
        return ops.gather_dot(c.g, c.W, c.indices, backend=name)

    providers = served("gather_dot", device, dtype, call) | {"torch": by_torch}
    return Case("gather_dot", c.shape, name_of(dtype), providers, check, c.traffic)


def sparse_outer_case(device: str, N: int, D: int, F: int, k: int, dtype) -> Case:
    c = Codes(device, N, D, F, k, dtype)
    features = c.indices[0, :CHECKED_ROWS].long()
    masked = [torch.where(c.indices == f, c.values.double(), 0).sum(1) for f in features]
    oracle = torch.stack([weights @ c.g.double() for weights in masked])

    def check(name, result):
        close(name, result[0][features], oracle, 1e-5)

    def by_torch(i):  # atomics: on CUDA every run adds in another order
        dW = torch.zeros(F, D, device=device)
        for v, rows, g in zip(*(t.split(512) for t in (c.values, c.indices, c.g)), strict=True):
            dW.index_add_(
                0, rows.flatten(), (v.unsqueeze(-1) * g.float().unsqueeze(1)).flatten(0, 1)
            )
        return (dW,)

    def call(name, i):
        return ops.sparse_outer(c.values, c.indices, c.g, F, backend=name)

    providers = served("sparse_outer", device, dtype, call) | {"torch": by_torch}
    # Beside the entries' rows of g, the dense float32 dW is written.
    return Case("sparse_outer", c.shape, name_of(dtype), providers, check, c.traffic + F * D * 4)


def mi_topk_case(device: str, F: int, V: int, D: int, top: int = 20) -> Case:
    features, words = randn(F, D, device=device), randn(V, D, device=device, seed=1)
    temperature, few = D**0.5, min(F, 512)
    wanted, _ = reference.mi_topk(features[:few].double(), words.double(), top, "mi", temperature)

    def call(name, i, features=features):
        options = {"objective": "mi", "temperature": temperature, "backend": name}
        return ops.mi_topk(features, words, top, **options)

    def by_torch(i, features=features):  # needs [F, V] several times over
        L = features @ words.T / temperature
        scores = L.softmax(1) * (L.log_softmax(0) + math.log(features.shape[0]))
        return torch.topk(scores, top)

    def check(name, result):
        # Column sums run over all features, so the oracle judges the same call on a few of them.
        few_of = by_torch(0, features[:few]) if name == "torch" else call(name, 0, features[:few])
        close(name, few_of[0], wanted, 1e-4)
        assert result[0].isfinite().all(), f"{name}: a score is not finite"

    providers = served("mi_topk", device, F32, call) | {"torch": by_torch}
    floors = {"torch.mm float32": lambda i: torch.mm(features, words.T)}
    shape = {"N": F, "D": D, "F": F, "k": top, "V": V}
    work = (0, 2 * F * V * D, "warm", (), floors)
    return Case("mi_topk", shape, "float32", providers, check, *work)


def steer_table(device: str, D: int, items: int) -> ops.SteerTable:
    """Slot 0 is empty; slot 1 amplifies `items` features in one operation."""
    ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    zeros, scale = functools.partial(torch.zeros, device=device), D**-0.5
    return ops.SteerTable(
        enc=randn(items, D, device=device, seed=7) * scale,
        bias=zeros(items),
        theta=zeros(items),
        dec=randn(items, D, device=device, seed=8) * scale,
        op_kind=ints([[0], [1]]),
        op_begin=ints([[0], [0]]),
        op_end=ints([[0], [items]]),
        op_scalar=zeros(2, 1),
        item_row=torch.arange(items, dtype=torch.int32, device=device),
        item_value=torch.ones(items, device=device),
        gate_begin=ints([0, 0]),
        gate_end=ints([0, 0]),
        gate_above=zeros(2),
        norm_preserve=ints([0, 0]),
    )


def steer_case(device: str, N: int, D: int, items: int, dtype, idle: bool = False) -> Case:
    t = steer_table(device, D, items)
    x = randn(N, D, device=device, dtype=dtype, seed=9)
    slots = torch.full((N,), 0 if idle else 1, dtype=torch.int32, device=device)
    strengths = torch.ones(N, device=device)
    oracle = reference.steer(x.double(), slots, strengths, t)

    def check(name, result):
        close(name, result, oracle, limit_of(result))
        assert not idle or torch.equal(result, x), f"{name}: an idle row changed"

    def by_torch(i):
        residual = x.float()
        return (residual + torch.relu(residual @ t.enc.T) @ t.dec).to(dtype)

    def call(name, i):
        return ops.steer(x, slots, strengths, t, backend=name)

    providers = served("steer", device, dtype, call)
    providers["torch"] = (lambda i: x.clone()) if idle else by_torch
    # The residual is read and written, the packed rows are read once.
    traffic = 2 * N * D * x.element_size() + (0 if idle else 2 * items * D * 4)
    shape = {"N": N, "D": D, "k": 0 if idle else items}
    return Case("steer", shape, name_of(dtype), providers, check, traffic, 0, "warm", GRAPHS)


def roofline_case(device: str, what: str) -> Case:
    """What this card does at best: a copy (bytes read and written) or a bf16 product of 8192³."""
    if what == "copy":
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_(0, 256)
        target = torch.empty_like(source)
        providers, work = {"torch": lambda i: target.copy_(source)}, (2 << 30, 0)
    else:
        a, b = (randn(8192, 8192, device=device, dtype=BF16, seed=i) for i in (1, 2))
        providers, work = {"torch": lambda i: torch.mm(a, b)}, (0, 2 * 8192**3)
    return Case(f"roofline {what}", {}, what, providers, lambda name, result: None, *work)


def cpu_cases(quick: bool) -> list[tuple]:
    """(maker, arguments) in the order of the table."""
    if quick:
        shape = (64, 512, 8192, 32, F32)
        sparse = [encode_topk_case, encode_threshold_case, decode_case, gather_dot_case]
        cases = [(topk_case, (64, 16384, 32, F32))]
        cases += [(maker, shape) for maker in (*sparse, sparse_outer_case)]
        return [*cases, (mi_topk_case, (1024, 1000, 256)), (steer_case, (1, 512, 16, F32))]
    cases = [(topk_case, (64, 65536, 32, F32))]
    cases += [(encode_topk_case, (*CPU_SHAPES[name], F32)) for name in "ABCE"]
    cases += [(encode_threshold_case, (*CPU_SHAPES[name][:3], 64, F32)) for name in "ABC"]
    cases += [(decode_case, (*CPU_SHAPES[name], F32)) for name in "ABC"]
    cases += [(maker, (*CPU_SHAPES["A"], F32)) for maker in (gather_dot_case, sparse_outer_case)]
    cases += [(mi_topk_case, (4096, 5000, 640)), (mi_topk_case, (16384, 5000, 1024))]
    return cases + [(steer_case, (1, 2048, 64, F32, idle)) for idle in (False, True)]


def cuda_cases(quick: bool) -> list[tuple]:
    sizes = (1, 64, 1024) if quick else (1, 16, 64, 4096, 16384)
    many, sae = sizes[-1], (GPU_D, GPU_F, GPU_K)
    cases = [(roofline_case, (what,)) for what in ("copy", "mm")]
    cases += [(topk_case, (n, GPU_F, GPU_K, BF16)) for n in (1, 64, many)]
    cases += [(topk_case, (many, GPU_F, 256, BF16)), (topk_case, (1024, GPU_F, 1024, F32))]
    cases += [(encode_topk_case, (n, *sae, BF16)) for n in sizes]
    cases += [(encode_topk_case, (n, *sae, F32)) for n in (1, 1024)]
    cases += [(encode_threshold_case, (n, GPU_D, GPU_F, 64, BF16)) for n in (64, min(many, 4096))]
    cases += [(decode_case, (n, *sae, BF16)) for n in sizes if n != 16]
    cases += [(decode_case, (min(many, 4096), *sae, F32))]
    cases += [(maker, (many, *sae, BF16)) for maker in (gather_dot_case, sparse_outer_case)]
    cases += [(mi_topk_case, (8192 if quick else 65536, 5000, GPU_D))]
    cases += [(steer_case, (n, GPU_D, items, BF16)) for n in (1, 64) for items in (4, 64)]
    return [*cases, (steer_case, (64, GPU_D, 64, BF16, True))]


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.split("\n")[0]).parse_args(arguments)
    cases = (cpu_cases if options.device == "cpu" else cuda_cases)(options.quick)
    makers = [
        (maker.__name__.removesuffix("_case"), functools.partial(maker, options.device, *shape))
        for maker, shape in cases
    ]
    return run_all(makers, options)


if __name__ == "__main__":
    sys.exit(main())
