"""Measures a training step of a TopK SAE against the same step in plain torch, after verifying it.

    python -P benchmarks/train_step.py [--quick] [--only train_step_0] [--out FILE.csv]

A step is forward, backward, AuxK on 0, 300 or 2000 dead features (each an op of its own for
--only), Adam, the projection of W_dec's gradient and its unit rows. Providers, all with torch's
fused Adam, all starting from the same weights:

- native: `fastsae.training.trainer.Trainer.step`, as training runs it
- torch: dense pre-activations, torch.topk, a dense product with the scattered code, autograd
- torch bag: the same with embedding_bag as the decoder
- torch sparse: embedding_bag, and an encoder whose backward forms the [N·k, D] products of the
  active entries and adds them up by index, as sparsify's does

Verified are the gradients that Adam saw in the first step, taken from its first moments, against
float64 autograd of the dense formula. At the end: where the time of our step goes.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Case, parser, run_all

from fastsae.training import fused
from fastsae.training.config import Plan
from fastsae.training.trainer import Trainer

SHAPE = (2048, 1024, 16384, 32)  # N, D, F, k
QUICK = (256, 128, 2048, 16)
DEAD = (0, 300, 2000)
COEFFICIENT, LR = 1 / 32, 1e-5
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
PARTS = {  # in the profile: label -> events of the profiler
    "encode": ("fastsae::encode_topk",),
    "decode": ("fastsae::_decode_rows",),
    "AuxK gradients": ("fastsae::_code_gradients",),
    "both weight gradients and Adam": ("fastsae::_train_rows", "Optimizer.step#Adam.step"),
    "of these AuxK": ("auxk",),
}


class SparseEncoder(torch.autograd.Function):
    """TopK encoder whose backward touches active entries only, and materialises [N·k, D]."""

    @staticmethod
    def forward(ctx, x, W, b, k):
        h = torch.addmm(b, x, W.T)
        values, indices = torch.topk(h, k, sorted=False)
        values = values.relu_()
        ctx.save_for_backward(x, W, values, indices)
        ctx.mark_non_differentiable(indices, h)
        return values, indices, h

    @staticmethod
    def backward(ctx, dvalues, _dindices, _dh):
        x, W, values, indices = ctx.saved_tensors
        dvalues = dvalues * (values > 0)
        flat = indices.flatten()
        products = (dvalues.unsqueeze(-1) * x.unsqueeze(1)).flatten(0, 1)
        dW = torch.zeros_like(W).index_add_(0, flat, products)
        db = torch.zeros_like(W[:, 0]).index_add_(0, flat, dvalues.flatten())
        dx = nn.embedding_bag(indices, W, per_sample_weights=dvalues, mode="sum")
        return dx, dW, db, None


def dense_code(values: Tensor, indices: Tensor, features: int) -> Tensor:
    return values.new_zeros(values.shape[0], features).scatter(1, indices, values)


def torch_loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, options, way: str
) -> Tensor:
    """The loss of fastsae.training.loss (kind "fvu") in plain torch; options: k, dead, k_aux."""
    k, dead, k_aux = options
    centred = x - b_dec
    if way == "sparse":
        values, indices, h = SparseEncoder.apply(centred, W_enc, b_enc, k)
    else:
        h = torch.addmm(b_enc, centred, W_enc.T)
        values, indices = torch.topk(h, k, sorted=False)
        values = values.relu()
    if way == "dense":
        x_hat = torch.addmm(b_dec, dense_code(values, indices, len(W_dec)), W_dec)
    else:
        x_hat = nn.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
    error = x_hat - x
    variance = (x - x.mean(0)).square().sum()
    loss = error.square().sum() / variance
    if len(dead):
        # The sparse encoder's h carries no gradient.
        h = torch.addmm(b_enc[dead], centred, W_enc[dead].T) if way == "sparse" else h[:, dead]
        z, places = torch.topk(h, min(k_aux, len(dead)), sorted=False)
        e_hat = dense_code(z.relu(), places, len(dead)) @ W_dec[dead]
        aux = (e_hat + error.detach()).square().sum() / variance
        loss = loss + COEFFICIENT * min(1.0, len(dead) / k_aux) * aux
    return loss


def without_radial(grad: Tensor, rows: Tensor) -> Tensor:
    return grad - rows * torch.linalg.vecdot(grad, rows).unsqueeze(1)


def torch_step(x: Tensor, weights: dict[str, Tensor], options: tuple, way: str) -> Callable:
    """A provider: steps on its own copy of the weights; returns Adam's first moments."""
    own = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    adam = torch.optim.Adam(own.values(), lr=LR, eps=6.25e-10, fused=True)

    def step(_round):
        with torch.inference_mode(False), torch.enable_grad():
            adam.zero_grad()
            torch_loss(x, **own, options=options, way=way).backward()
        with torch.inference_mode(False), torch.no_grad():
            rows = own["W_dec"]
            radial = torch.linalg.vecdot(rows.grad, rows).unsqueeze(1)
            rows.grad.addcmul_(rows, radial, value=-1)
            adam.step()
            rows.div_(rows.norm(dim=-1, keepdim=True))
        return [adam.state[w]["exp_avg"] for w in own.values()]

    return step


def clear_rows(x: Tensor, weights: dict[str, Tensor], ranks: list[tuple[Tensor, int]]) -> Tensor:
    """Rows whose selections rounding cannot change: `ranks` lists (features, k) of each TopK."""
    w = {name: t.detach().double() for name, t in weights.items()}
    clear = torch.ones(len(x), dtype=torch.bool)
    for rows in torch.arange(len(x)).split(512):
        h = (x[rows].double() - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
        for features, k in ranks:
            if k < len(features):
                best = torch.topk(h[:, features], k + 1).values
                clear[rows] &= best[:, -2] - best[:, -1] > 1e-5
    return x[clear]


class Problem:
    """A trainer at its first step, `dead_features` of its features counted as dead."""

    def __init__(self, dead_features: int, N: int, D: int, F: int, k: int):
        self.k_aux, self.long_ago = D // 2, 10**9
        plan = Plan(D, F, 10**6, self.k_aux, self.long_ago - 1, LR, 0, 0)
        self.trainer = Trainer(plan, k, aux_coefficient=COEFFICIENT)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(N + N // 4, D, generator=generator)
        self.trainer.start(rows)
        self.weights = self.trainer.weights
        self.dead = torch.randperm(F, generator=generator)[:dead_features].sort().values
        with torch.no_grad():
            # Seldom among the k, positive for a sixth of the rows.
            self.weights["b_enc"][self.dead] = -1.0
        ranks = [(torch.arange(F), k), (self.dead, self.k_aux)]
        self.x = clear_rows(rows * self.trainer.scale, self.weights, ranks)[:N]
        assert len(self.x) == N, f"only {len(self.x)} rows without near-ties"
        self.raw = self.x / self.trainer.scale

    def step(self, _round: int) -> list[Tensor]:
        """A provider: one step of the trainer; returns Adam's first moments."""
        with torch.inference_mode(False), torch.enable_grad():
            self.trainer.idle.zero_()
            self.trainer.idle[self.dead] = self.long_ago
            self.trainer.step(self.raw)
        return [self.trainer.adam.state[w]["exp_avg"] for w in self.weights.values()]


def train_step_case(dead_features: int, N: int, D: int, F: int, k: int) -> Case:
    with torch.inference_mode(False), torch.enable_grad():
        problem = Problem(dead_features, N, D, F, k)
        x, weights, options = problem.x, problem.weights, (k, problem.dead, problem.k_aux)
        wide = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
        loss = torch_loss(x.double(), **wide, options=options, way="dense")
        oracle = list(torch.autograd.grad(loss, wide.values()))
        oracle[2] = without_radial(oracle[2], wide["W_dec"].detach())
        ways = {"torch": "dense", "torch bag": "bag", "torch sparse": "sparse"}
        providers = {name: torch_step(x, weights, options, way) for name, way in ways.items()}

    def check(name, result):
        for part, moment, wanted in zip(NAMES, result, oracle, strict=True):
            error = ((moment.double() / 0.1 - wanted).norm() / wanted.norm()).item()
            assert error <= 1e-4, f"{name}: gradient of {part}: relative error {error:.3g}"

    # What a step cannot do without: the pre-activations, and per active entry a decoded row, a dot
    # and two gradient rows.
    flops = 2 * N * D * F + 8 * N * k * D
    shape, work = {"N": N, "D": D, "F": F, "k": k}, (0, flops)
    providers = {"native": problem.step} | providers
    return Case(f"train_step_{dead_features}", shape, "float32", providers, check, *work)


def print_profile(dead_features: int, shape: tuple, steps: int = 5) -> None:
    """Milliseconds of a step of ours in each part, averaged."""
    problem, inner = Problem(dead_features, *shape), fused._auxiliary
    for number in range(3):
        problem.step(number)

    def marked(*arguments):
        with torch.profiler.record_function("auxk"):
            return inner(*arguments)

    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        mock.patch.object(fused, "_auxiliary", marked),
        torch.profiler.profile(activities=activities) as profile,
    ):
        for number in range(steps):
            with torch.profiler.record_function("step"):
                problem.step(number)
    total = {event.key: event.cpu_time_total / steps / 1e3 for event in profile.key_averages()}
    parts = {label: sum(total.get(e, 0.0) for e in events) for label, events in PARTS.items()}
    listed = ", ".join(f"{label} {ms:.1f}" for label, ms in parts.items())
    print(f"train_step_{dead_features} native, ms of {total['step']:.1f}: {listed}")


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.split("\n")[0]).parse_args(arguments)
    if options.device != "cpu":
        raise SystemExit("--device: got cuda, this benchmark measures the CPU")
    shape = QUICK if options.quick else SHAPE
    makers = [
        (f"train_step_{dead}", functools.partial(train_step_case, dead, *shape)) for dead in DEAD
    ]
    failed = run_all(makers, options)
    for dead in DEAD:
        if not options.only or f"train_step_{dead}" in options.only:
            print_profile(dead, shape)
    return failed


if __name__ == "__main__":
    sys.exit(main())
