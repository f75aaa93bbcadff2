"""The CPU's training step with its gradients written out, against autograd of the loss."""

import copy
import math

import pytest
import torch

from fastsae.ops import native
from fastsae.ops.backend import supported
from fastsae.training import fused
from fastsae.training.config import Plan
from fastsae.training.loss import sae_loss
from fastsae.training.trainer import Trainer, autograd_step

if "native" not in supported("sparse_outer"):
    pytest.skip("the extension is not built", allow_module_level=True)

D, F, K = 200, 300, 8
ISAS = ["scalar", *(name for name in ("avx2", "avx512") if native.cpu_features()[name])]


@pytest.fixture(params=ISAS)
def isa(request):
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


def made(*, loss="fvu", dead=0, n=90, k_aux=30, seed=0):
    """(trainer before its first step, activations): one hot feature, the last `dead` ones dead."""
    generator = torch.Generator().manual_seed(seed)
    plan = Plan(D, F, 100, k_aux, 1000, 1e-3, 0, 0)
    trainer = Trainer(plan, K, loss=loss, seed=seed)
    x = torch.randn(n, D, generator=generator) + 2
    trainer.start(x)
    with torch.no_grad():
        w = trainer.weights
        w["W_enc"].add_(torch.randn(F, D, generator=generator) / 50)
        w["b_enc"].normal_(generator=generator).sub_(1)
        w["b_enc"][5] = 30.0
        w["b_enc"][F - dead :] = -0.5
    trainer.idle[F - dead :] = 10**6
    return trainer, x


def run(trainer, x, steps=1):
    for _ in range(steps):
        trainer.step(x)
    adam = trainer.adam.state
    return [t.clone() for w in trainer.weights.values() for t in (w.detach(), *adam[w].values())]


@pytest.mark.parametrize("loss", ["fvu", "mse"])
@pytest.mark.parametrize("dead", [0, 20, 150])
@pytest.mark.parametrize("n", [1, 90, 700])
def test_every_gradient_against_float64_autograd(loss, dead, n, isa):
    trainer, x = made(loss=loss, dead=dead, n=90)
    x = x.repeat(8, 1)[:n] + torch.randn(n, D) / 2
    wide = {name: w.detach().double().requires_grad_() for name, w in trainer.weights.items()}
    rows = torch.arange(F - dead, F)
    options = {"dead": rows, "k_aux": 30, "aux_coefficient": trainer.aux_coefficient}
    total = sae_loss((x * trainer.scale).double(), **wide, k=K, kind=loss, **options).total
    wanted = dict(zip(wide, torch.autograd.grad(total, wide.values()), strict=True))
    unit = wide["W_dec"].detach()
    wanted["W_dec"] -= unit * (wanted["W_dec"] * unit).sum(1, keepdim=True)
    trainer.step(x)
    for name, weight in trainer.weights.items():
        found = trainer.adam.state[weight]["exp_avg"].double() * 10
        if n == 1 and loss == "fvu":  # one row has no variance: every gradient is infinite
            assert found.isfinite().all() == wanted[name].float().isfinite().all()
            continue
        # Single precision throughout; the largest sums have 700 terms.
        error = (found - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("dead", [0, 20, 150])
def test_dense_gradients_take_the_same_steps(dead, monkeypatch):
    """The step of a GPU, whose gradients are dense: weights and moments of the CPU's step."""
    (rows, x), (dense, _) = made(dead=dead), made(dead=dead)
    wanted = run(rows, x, 3)
    monkeypatch.setattr(fused, "_by_rows", lambda x: False)
    versions = [w._version for w in dense.weights.values()]
    for found, expected in zip(run(dense, x, 3), wanted, strict=True):
        assert (found - expected).norm() <= 2e-5 * expected.norm()
    assert all(w.grad is None for w in dense.weights.values())
    # Copies of weights go by it.
    assert all(w._version > v for w, v in zip(dense.weights.values(), versions, strict=True))


def test_steps_are_those_of_torch(isa):
    """Weights and moments after each step; the state of one way of stepping serves the other."""
    ours, x = made(dead=40)
    theirs, _ = made(dead=40)
    options = {"kind": "fvu", "dead": torch.arange(260, 300), "k_aux": 30}
    for number in range(4):
        for trainer, one_step in ((ours, fused.step), (theirs, autograd_step)):
            versions = [w._version for w in trainer.weights.values()]
            trainer.adam.param_groups[0]["lr"] = 1e-3
            arguments = x * trainer.scale, trainer.weights, trainer.adam, K
            one_step(*arguments, **options, aux_coefficient=0.1)
            new = [w._version for w in trainer.weights.values()]
            assert all(a > b for a, b in zip(new, versions, strict=True))
        for name in ours.weights:
            a, b = ours.weights[name].detach(), theirs.weights[name].detach()
            # Where a gradient is all rounding, Adam still moves a weight by up to lr.
            close = (a - b).abs() < 2e-6
            assert close.double().mean() > 0.999, (number, name)
            state = ours.adam.state[ours.weights[name]], theirs.adam.state[theirs.weights[name]]
            assert state[0].keys() == state[1].keys() and state[0]["step"] == number + 1
            for key in ("exp_avg", "exp_avg_sq"):
                error = (state[0][key] - state[1][key]).norm() / state[1][key].norm()
                assert error < 1e-4, (number, name, key)
        source, target = (ours, theirs) if number % 2 else (theirs, ours)
        target.load_state_dict(copy.deepcopy(source.state_dict()))


@pytest.mark.parametrize("dead", [0, 20, 150])
def test_the_same_bits_for_any_number_of_threads(dead, threads, isa):
    results = []
    for count in (1, 2, 7, 2):
        threads(count)
        trainer, x = made(dead=dead, n=700)
        results.append(run(trainer, x, steps=3))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_padding_never_meets_a_weight(isa):
    """Rows with fewer than k active latents point at unused features, which may hold NaN."""
    trainer, x = made()
    with torch.no_grad():
        trainer.weights["b_enc"].fill_(-1e4)[5] = 30.0
        trainer.weights["W_dec"][:4] = float("nan")
    trainer.step(x)
    assert int(trainer._sums[2]) == len(x)  # one active latent per row
    for name, weight in trainer.weights.items():
        weight = weight[4:] if name == "W_dec" else weight
        assert weight.isfinite().all(), name


def test_versions_change_and_nothing_of_size_f_d_is_allocated(largest_allocation):
    trainer, x = made(dead=20)
    trainer.step(x)
    versions = [w._version for w in trainer.weights.values()]
    size = largest_allocation(lambda: trainer.step(x), "cpu")
    assert all(w._version > v for w, v in zip(trainer.weights.values(), versions, strict=True))
    assert size < F * D * 4


def test_another_backend_steps_through_autograd(monkeypatch):
    assert fused.serves(torch.zeros(1))
    monkeypatch.setenv("FASTSAE_BACKEND", "reference")
    assert not fused.serves(torch.zeros(1))
    trainer, x = made()
    before = trainer.weights["W_enc"].detach().clone()
    trainer.step(x)
    assert trainer.weights["W_enc"].grad is not None
    assert not torch.equal(trainer.weights["W_enc"], before)


@pytest.mark.parametrize("d", [5, 128, 300])
def test_gradients_of_a_code(threads, d, isa):
    """Both weight gradients of one sparse layer, slice by slice; long sums have segments."""
    n, k, f = 600, 6, 11
    values, indices = torch.rand(n, k), torch.randint(0, f, (n, k), dtype=torch.int32)
    values[::4, 2:] = 0
    values[7], indices[:, 0] = 0, 3
    g, x, W = torch.randn(n, d), torch.randn(n, d), torch.randn(f, d)
    code = torch.zeros(f, n, dtype=torch.float64)
    rows = torch.arange(n).unsqueeze(1).expand(n, k)
    code.index_put_((indices.long(), rows), values.double(), accumulate=True)
    slopes = torch.zeros(f, n, dtype=torch.float64)
    dots = (g.double() @ W.double().T).gather(1, indices.long()) * (values != 0)
    slopes.index_put_((indices.long(), rows), dots, accumulate=True)
    wanted = code @ g.double(), slopes @ x.double(), slopes.sum(1)
    g[7] = x[7] = math.nan  # a row without entries
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(torch.ops.fastsae._code_gradients(values, indices, g, x, W))
    for got, exact in zip(results[0], wanted, strict=True):
        assert (got.double() - exact).norm() < 1e-5 * exact.norm()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
