"""Measures fastsae against the libraries one would use instead, each running its own code.

    make bench-peers                                       # makes .venv-peers, then runs
    python -P benchmarks/peers.py [--quick] [--only decode] [--out FILE.csv]

All providers share one process, one set of tensors and one clock, in inference mode; every result
is compared with float64 first. SAELens: TopKSAE and JumpReLUSAE; "SAELens sparse" is its option to
hand sparse COO codes to the decoder. sparsify: SparseCoder, whose CPU decoder is embedding_bag.
dictionary_learning: AutoEncoderTopK. A library that is not installed is named in one line.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peer_models as models
from common import Case, parser, run_all
from problems import F32, Codes, Encoder, close, randn
from targets import OURS, SHAPES, TRAIN

from fastsae import ops
from fastsae.ops import reference

INSTALLED = {
    "SAELens": "sae_lens",
    "SAELens sparse": "sae_lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
MEAN_L0 = 64
TRAIN_ROUNDS = 5
BATCHES = 4


def installed(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(INSTALLED[name]) is not None]


class Problem:
    """An SAE with all four parameters and x [N, D] whose pre-activations are known in float64."""

    def __init__(self, N: int, D: int, F: int, k: int):
        e = Encoder("cpu", N, D, F, k, F32)
        self.b_dec = randn(D, device="cpu", seed=11) * 0.1
        self.x = e.x + self.b_dec
        self.W_enc, self.b_enc, self.k = e.W, e.b, k
        self.W_dec = randn(F, D, device="cpu", seed=12).div_(D**0.5)
        centred = self.x[e.rows].double() - self.b_dec.double()
        self.h = torch.cat([centred @ w.double().T for w in e.W.split(4096)], 1) + e.b.double()
        self.rows, self.shape, self.flops, self.traffic = e.rows, e.shape, e.flops, e.traffic

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and indices of the float64 top k after ReLU, for the checked rows."""
        values, indices = torch.topk(self.h, self.k)
        return values.clamp(min=0), indices

    def encode(self, call: int):
        return ops.encode_topk(
            self.x, self.W_enc, self.b_enc, self.k, b_dec=self.b_dec, backend=OURS
        )


def dense_rows(result, rows: slice, F: int) -> torch.Tensor:
    """The first rows of any library's codes as [rows, F] float64."""
    if isinstance(result, torch.Tensor):
        return (result.to_dense() if result.is_sparse else result)[rows].double()
    values, indices = result[0][rows], result[1][rows].long()
    out = torch.zeros(values.shape[0], F, dtype=torch.float64)
    return out.scatter_add_(1, indices, values.double())


def dense_csr(result, rows: slice, F: int) -> torch.Tensor:
    values, indices, ends = result
    out = torch.zeros(rows.stop, F, dtype=torch.float64)
    for n in range(rows.stop):
        part = slice(int(ends[n]), int(ends[n + 1]))
        out[n, indices[part].long()] = values[part].double()
    return out


def encode_topk_case(N: int, D: int, F: int, k: int) -> Case:
    p = Problem(N, D, F, k)
    wanted = torch.zeros_like(p.h).scatter_(1, *reversed(p.codes()))

    def check(name, result):
        close(name, dense_rows(result, p.rows, F), wanted, 1e-5)

    providers = {OURS: p.encode}
    for name in installed("SAELens", "sparsify", "dictionary_learning"):
        sae = models.topk(name, *p.weights, k)
        providers[name] = functools.partial(lambda sae, call: sae.encode(p.x), sae)
    work = (p.traffic if N <= 64 else 0, p.flops)
    return Case("encode_topk", p.shape, "float32", providers, check, *work, base=OURS)


def encode_threshold_case(N: int, D: int, F: int, active: int) -> Case:
    p = Problem(N, D, F, active)
    level = torch.topk(p.h.flatten(), active * p.h.shape[0]).values[-1].item()
    threshold = torch.full((F,), max(level, 0.0))
    doubtful = (p.h - threshold).abs() < 1e-4
    wanted = torch.where((p.h > threshold) & ~doubtful, p.h, 0)

    def check(name, result):
        dense = dense_csr if name == OURS else dense_rows
        close(name, torch.where(doubtful, 0, dense(result, p.rows, F)), wanted, 1e-5)

    def ours(call):
        return ops.encode_threshold(p.x, p.W_enc, p.b_enc, threshold, b_dec=p.b_dec, backend=OURS)

    providers = {OURS: ours}
    for name in installed("SAELens"):
        sae = models.jumprelu(*p.weights, threshold)
        providers[name] = functools.partial(lambda sae, call: sae.encode(p.x), sae)
    work = (p.traffic if N <= 64 else 0, p.flops)
    return Case("encode_threshold", p.shape, "float32", providers, check, *work, base=OURS)


def decode_case(N: int, D: int, F: int, k: int) -> Case:
    """Every library gets the codes in the form that its own encoder returns."""
    c = Codes("cpu", N, D, F, k, F32)
    b_dec = randn(D, device="cpu", seed=11) * 0.1
    few = (c.values[c.rows].double(), c.indices[c.rows], c.W)
    wanted = reference.decode(*few, b_dec)
    long = c.indices.long()
    dense = torch.zeros(N, F).scatter_(1, long, c.values)

    def check(name, result):
        close(name, result[c.rows], wanted, 1e-5)

    providers = {OURS: lambda call: ops.decode(c.values, c.indices, c.W, b_dec, backend=OURS)}
    for name in installed(*INSTALLED):
        sae = models.topk(name, c.W, torch.zeros(F), c.W, b_dec, k)
        codes = (dense,)
        if name == "sparsify":
            codes = (c.values, long)
        elif name == "SAELens sparse":
            codes = (dense.to_sparse(),)
        providers[name] = functools.partial(lambda sae, codes, call: sae.decode(*codes), sae, codes)
    return Case("decode", c.shape, "float32", providers, check, c.traffic, base=OURS)


def encode_decode_case(N: int, D: int, F: int, k: int) -> Case:
    p = Problem(N, D, F, k)
    values, indices = p.codes()
    wanted = reference.decode(values, indices, p.W_dec, p.b_dec)

    def check(name, result):
        close(name, result[p.rows], wanted, 1e-5)

    def ours(call):
        return ops.decode(*p.encode(call), p.W_dec, p.b_dec, backend=OURS)

    def theirs(sae, call):
        codes = sae.encode(p.x)
        return sae.decode(*codes[:2]) if isinstance(codes, tuple) else sae.decode(codes)

    providers = {OURS: ours}
    for name in installed(*INSTALLED):
        providers[name] = functools.partial(theirs, models.topk(name, *p.weights, k))
    flops = p.flops + 2 * N * k * D
    traffic = p.traffic + N * k * D * 4 if N <= 64 else 0
    return Case("encode_decode", p.shape, "float32", providers, check, traffic, flops, base=OURS)


def train_step_case(N: int, D: int, F: int, k: int) -> Case:
    """One optimiser step: forward, AuxK over dead latents, backward, Adam, decoder norm.

    The loss is Σ‖x̂ - x‖² / Σ‖x - x̄‖² + AuxK / 32 for all, and every library starts from the same
    weights; each keeps its own treatment of the decoder's norm. The first step's loss is compared.
    """
    with torch.inference_mode(False), torch.enable_grad():
        xs = [randn(N, D, device="cpu", seed=20 + i) for i in range(BATCHES)]
        start = models.TrainingStart(D, F, k)
        steps = {OURS: start.ours()}
        for name in installed("SAELens", "sparsify"):
            steps[name] = start.sparsify() if name == "sparsify" else start.saelens()
        wanted = start.loss(xs[0])

    def check(name, result):
        close(name, result, wanted, 1e-4)

    def step(name, call):
        with torch.inference_mode(False), torch.enable_grad():
            return steps[name](xs[call % BATCHES])

    providers = {name: functools.partial(step, name) for name in steps}
    shape = {"N": N, "D": D, "F": F, "k": k}
    # The encoder's product; the rest of a step is sparse.
    work = (0, 2 * N * D * F)
    return Case(
        "train_step", shape, "float32", providers, check, *work, base=OURS, rounds=TRAIN_ROUNDS
    )


def cases(quick: bool) -> list[tuple]:
    """(maker, shape) in the order of the table."""
    by_k = (encode_topk_case, decode_case, encode_decode_case)
    if quick:
        few = (64, 256, 4096, 16)
        makers = (*by_k, encode_threshold_case, train_step_case)
        return [(maker, few) for maker in makers]
    found = [(maker, SHAPES[name]) for maker in by_k for name in "ABC"]
    found += [(encode_threshold_case, (*SHAPES[name][:3], MEAN_L0)) for name in "ABC"]
    return [*found, (train_step_case, TRAIN)]


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.split("\n")[0]).parse_args(arguments)
    if options.device != "cpu":
        raise SystemExit("--device: peers are measured on the CPU; use --device cpu")
    for name in sorted({*INSTALLED} - {*installed(*INSTALLED)} - {"SAELens sparse"}):
        print(f"{name}: not installed, not measured (make bench-peers)")
    makers = [
        (maker.__name__.removesuffix("_case"), functools.partial(maker, *shape))
        for maker, shape in cases(options.quick)
    ]
    return run_all(makers, options)


if __name__ == "__main__":
    sys.exit(main())
