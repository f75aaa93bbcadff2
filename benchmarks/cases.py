"""One case per op of fastsae: its providers, their check, and what the op must move and compute.

Providers: every compiled backend of fastsae that serves the op here (native, triton; reference
where there is none); `torch` is what a user would write without fastsae.
"""

import functools
import importlib.util
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as nn
from common import Case
from machine import last_level_cache_bytes
from problems import (
    CHECKED_ROWS,
    F32,
    Codes,
    Encoder,
    close,
    floors,
    limit_of,
    name_of,
    product,
    randn,
    steer_table,
)
from targets import NO_TILES, PYTHON_SORT

from fastsae import ops
from fastsae.ops import extension, reference
from fastsae.ops.backend import supported

GRAPHS = ("triton", "native", "torch")
SORTED_FEATURES = 256  # features that the Python sort is measured on


def served(op: str, device: str, dtype, call: Callable) -> dict[str, Callable]:
    """{backend: call(backend, number)}; reference is torch code, timed only where it must serve."""
    names = supported(op, device, dtype)
    names = [name for name in names if name != "reference"] or names
    return {name: functools.partial(call, name) for name in names}


def without_tiles(e: Encoder, dtype, call: Callable) -> dict[str, Callable]:
    """The same call as a processor with AVX-512 and without AMX serves it."""
    if extension.problem() or not e.x.is_cpu or e.x.shape[0] <= 64 or dtype != F32:
        return {}
    from fastsae.ops import native

    if native.isa() != "amx":
        return {}

    def run(i):
        native.set_isa("avx512")
        try:
            return call("native", i)
        finally:
            native.set_isa("auto")

    return {NO_TILES: run}


def topk_case(device: str, N: int, F: int, k: int, dtype, state: str = "cold") -> Case:
    """state "cold": every call meets rows that left the last-level cache; "cold L2": that left the
    caches of the cores, four times 16 MB in turn; "hot": the same rows."""
    row_bytes = F * dtype.itemsize
    copies = 4 if state == "cold L2" and device == "cpu" else 1
    if state == "cold" and device == "cpu":
        copies = math.ceil(1.25 * last_level_cache_bytes() / (N * row_bytes))
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
    traffic = N * row_bytes + N * k * (dtype.itemsize + 4)
    shape = {"N": N, "F": F, "k": k}
    return Case("topk", shape, name_of(dtype), providers, check, traffic, 0, state, GRAPHS)


def encode_topk_case(
    device: str, N: int, D: int, F: int, k: int, dtype, massive: bool = False
) -> Case:
    e = Encoder(device, N, D, F, k, dtype, massive)
    state = "massive activations" if massive else "warm"
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
    providers |= without_tiles(e, dtype, call)
    graphs = GRAPHS if N <= 64 else ()
    work = (e.traffic if N <= 64 else 0, e.flops, state, graphs, e.floors, e.base)
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
    providers |= without_tiles(e, dtype, call)
    work = (e.traffic if N <= 64 else 0, e.flops, "warm", (), e.floors, e.base)
    return Case("encode_threshold", e.shape, name_of(dtype), providers, check, *work)


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
    if device == "cuda" and importlib.util.find_spec("sparsify"):
        from sparsify.utils import decoder_impl  # its Triton kernel; it takes W as [D, F]

        indices = c.indices.long()
        providers["sparsify"] = lambda i: decoder_impl(indices, typed, c.W.mT)
    work = (c.traffic, 0, "warm", (*GRAPHS, "sparsify"))
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


def mi_topk_case(device: str, F: int, V: int, D: int, top: int = 20, dtype=F32) -> Case:
    features = randn(F, D, device=device, dtype=dtype)
    words = randn(V, D, device=device, dtype=dtype, seed=1)
    temperature, few = D**0.5, min(F, SORTED_FEATURES)
    wanted, _ = reference.mi_topk(features[:few].double(), words.double(), top, "mi", temperature)

    def call(name, i, features=features):
        options = {"objective": "mi", "temperature": temperature, "backend": name}
        return ops.mi_topk(features, words, top, **options)

    def scored(features):  # needs [F, V] several times over
        L = features @ words.T / temperature
        return L.softmax(1) * (L.log_softmax(0) + math.log(features.shape[0]))

    def by_torch(i, features=features):
        return torch.topk(scored(features), top)

    def by_python(i, features=features[:few]):
        second = operator.itemgetter(1)
        best = [
            sorted(enumerate(row.tolist()), key=second, reverse=True)[:top]
            for row in scored(features)
        ]
        return torch.tensor([[score for _, score in row] for row in best]), best

    def check(name, result):
        # Column sums run over all features, so the oracle judges the same call on a few of them.
        calls = {"torch": by_torch, sort: by_python}
        few_of = calls.get(name, functools.partial(call, name))(0, features[:few])
        # torch in bf16 rounds the logits themselves.
        close(name, few_of[0], wanted, 1e-4 if dtype == F32 or name not in calls else 0.1)
        assert result[0].isfinite().all(), f"{name}: a score is not finite"

    providers = served("mi_topk", device, dtype, call) | {"torch": by_torch}
    # All of its parts grow with the number of features, so a few of them tell the time of all.
    sort = f"{PYTHON_SORT} (scaled from {few} features)"
    scaled = {}
    if device == "cpu":
        providers[sort], scaled[sort] = by_python, F / few
    shape = {"N": F, "D": D, "F": F, "k": top, "V": V}
    work = (0, 2 * F * V * D, "warm", (), floors(features, words), "torch", scaled)
    return Case("mi_topk", shape, name_of(dtype), providers, check, *work)


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
    """What this machine does at best: a read, a copy (bytes read and written), or a product.

    Buffers are larger than any cache. On the CPU several ways and shapes of the same size compete
    and the fastest is the roofline; on CUDA it is one bf16 product of 8192³.
    """
    if what in ("read", "copy"):
        source = torch.empty(1 << 28, dtype=F32, device=device).normal_()
        if what == "copy":
            target = torch.empty_like(source)
            providers, work = {"torch": lambda i: target.copy_(source)}, (2 << 30, 0)
        else:
            matrix, vector = source.view(-1, 4096), randn(4096, device=device)
            providers = {"torch sum": lambda i: source.sum(), "torch max": lambda i: source.max()}
            providers["torch mv"] = lambda i: matrix @ vector
            work = (1 << 30, 0)
        dtype = "float32"
    else:
        dtype = what.removeprefix("mm ")
        sizes = [(2048, 2048, 2048), (1024, 1024, 8192), (256, 2048, 16384), (4096, 4096, 512)]
        if device == "cuda":
            sizes = [(8192, 8192, 8192)]
        providers = {}
        for m, n, k in sizes:
            a, b = randn(m, k, device=device), randn(n, k, device=device, seed=1)
            a, b = (t.to(getattr(torch, dtype)) for t in (a, b))
            out = a.new_empty(m, n)
            providers[f"torch {m}x{n}x{k}"] = functools.partial(product, a, b, out)
        work = (0, 2 * math.prod(sizes[0]))
    return Case(f"roofline {what}", {}, dtype, providers, _unchecked, *work)


def _unchecked(name: str, result) -> None:
    """A roofline has no right or wrong result."""
