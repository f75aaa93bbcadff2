"""The loss and the statistics against dense formulas, and training steps on made-up activations."""

import math

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.sae import SAE, SAEConfig
from fastsae.training.config import Plan
from fastsae.training.loss import sae_loss
from fastsae.training.measure import feature_stats, reconstruction
from fastsae.training.trainer import Trainer

D, F, K = 16, 48, 4


# --- the loss ------------------------------------------------------------------------------------


def dense_topk(h, k):
    """ReLU of the k largest entries of each row, dense; ties do not occur."""
    kept = torch.zeros_like(h).scatter(-1, h.topk(k, -1).indices, 1.0)
    return (h * kept).relu()


@pytest.mark.parametrize("kind", ["fvu", "mse"])
@pytest.mark.parametrize("dead", [0, 3, 20])
def test_loss_and_every_gradient_against_a_dense_formula(kind, dead):
    torch.manual_seed(1)

    def make(*shape):
        return (torch.randn(*shape, dtype=torch.float64) / 4).requires_grad_()

    x = torch.randn(33, D, dtype=torch.float64) + 2
    parameters = W_enc, b_enc, W_dec, b_dec = make(F, D), make(F), make(F, D), make(D)
    rows = torch.randperm(F)[:dead].sort().values
    k_aux, coefficient = 7, 0.3

    latents = dense_topk((x - b_dec) @ W_enc.T + b_enc, K)
    x_hat = latents @ W_dec + b_dec
    variance = (x - x.mean(0)).square().sum()

    def normalised(difference):
        if kind == "fvu":
            return difference.square().sum() / variance
        return (difference.square().sum(1) / x.square().sum(1)).mean()

    wanted = normalised(x_hat - x)
    if dead:
        z = dense_topk((x - b_dec) @ W_enc[rows].T + b_enc[rows], min(k_aux, dead))
        aux = normalised(z @ W_dec[rows] - (x - x_hat).detach())
        wanted = wanted + coefficient * min(1, dead / k_aux) * aux
    gradients = torch.autograd.grad(wanted, parameters)
    loss = sae_loss(
        x, *parameters, K, kind=kind, dead=rows, k_aux=k_aux, aux_coefficient=coefficient
    )
    torch.testing.assert_close(loss.total, wanted)
    torch.testing.assert_close(loss.error / loss.variance, (x_hat - x).square().sum() / variance)
    for found, gradient in zip(torch.autograd.grad(loss.total, parameters), gradients, strict=True):
        torch.testing.assert_close(found, gradient)


def test_auxk_alone_reaches_the_encoder():
    torch.manual_seed(2)
    x, rows = torch.randn(20, D), torch.tensor([5, 9, 30])
    W_dec = torch.nn.functional.normalize(torch.randn(F, D), dim=-1).requires_grad_()
    W_enc, b_dec = W_dec.detach().clone().requires_grad_(), torch.zeros(D, requires_grad=True)
    # The dead features cannot win: the reconstruction term does not touch them.
    b_enc = torch.zeros(F).index_fill(0, rows, -1.0).requires_grad_()
    options = {"dead": rows, "k_aux": 3}
    for coefficient, reached in ((0.0, False), (1.0, True)):
        with torch.no_grad():
            b_enc[rows] = -1.0 if coefficient else -100.0
        loss = sae_loss(x, W_enc, b_enc, W_dec, b_dec, 2, aux_coefficient=coefficient, **options)
        for gradient in torch.autograd.grad(loss.total, (W_enc, b_enc, W_dec)):
            assert bool(gradient[rows].abs().sum() > 0) == reached


def plan(**options):
    defaults = {"d_in": D, "d_sae": F, "warmup_steps": 5, "decay_steps": 20, "steps": 100}
    return Plan(**{**defaults, "k_aux": 8, "dead_after_tokens": 400, "lr": 3e-3, **options})


def trainer_on(x, **options):
    made = Trainer(plan(), K, **options)
    made.start(x)
    return made


def test_auxk_revives_dead_features():
    torch.manual_seed(3)
    x = torch.randn(256, F, D).mul(torch.rand(256, F, 1) < 0.05).sum(1) * 30 + 100
    dead = {}
    for coefficient in (0.0, 1 / 4):
        trainer = trainer_on(x, aux_coefficient=coefficient)
        with torch.no_grad():
            trainer.weights["b_enc"][: F // 2] = -4.0
        for _ in range(80):
            trainer.step(x)
        dead[coefficient] = trainer.metrics()["dead"]
    assert dead[0.0] > 0.4 and dead[1 / 4] < dead[0.0] / 2


def test_decoder_rows_stay_unit_and_adam_sees_no_radial_gradient():
    torch.manual_seed(4)
    x = torch.randn(200, D)
    trainer = trainer_on(x)
    before = trainer.weights["W_dec"].detach().clone()
    trainer.step(x)
    rows = trainer.weights["W_dec"]
    moment = trainer.adam.state[rows]["exp_avg"]
    assert float(moment.abs().max()) > 0
    cosine = torch.nn.functional.cosine_similarity(moment, before, dim=-1)
    assert float(cosine.abs().max()) < 1e-5
    for _ in range(5):
        trainer.step(x)
    torch.testing.assert_close(rows.detach().norm(dim=-1), torch.ones(F))


def test_scale_is_a_power_of_two_and_folds_exactly():
    torch.manual_seed(5)
    x = torch.randn(300, D) * 700 + 5000
    trainer = trainer_on(x)
    norm = (x - x.mean(0)).norm(dim=-1).mean() * trainer.scale / D**0.5
    assert 0.7 < float(norm) < 1.42 and math.frexp(trainer.scale)[0] == 0.5
    for _ in range(10):
        trainer.step(x)
    w = {name: t.detach() for name, t in trainer.weights.items()}
    scaled = SAE(SAEConfig(d_in=D, d_sae=F, k=K))
    scaled.load_state_dict(w)
    exported = trainer.export(SAEConfig(d_in=D, d_sae=F, k=K))
    z, z_scaled = exported.encode(x), scaled.encode(x * trainer.scale)
    assert torch.equal(z.indices, z_scaled.indices)
    assert torch.equal(z.values * trainer.scale, z_scaled.values)
    assert torch.equal(exported(x) * trainer.scale, scaled(x * trainer.scale))


def test_scale_does_not_change_what_is_learned():
    torch.manual_seed(6)
    x = torch.randn(300, D) + 1
    made = []
    for factor in (1.0, 2.0**20):
        trainer = trainer_on(x * factor)
        for _ in range(10):
            trainer.step(x * factor)
        made.append(trainer.weights)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_attention_sinks_are_left_out():
    torch.manual_seed(8)
    x = torch.randn(400, D) + 3
    sunk = torch.cat([x, torch.full((2, D), 900.0)])
    plain, robust = trainer_on(x), trainer_on(sunk, outlier_norm=5.0)
    assert torch.equal(robust.typical(sunk), x) and robust.scale == plain.scale
    torch.testing.assert_close(robust.weights["b_dec"], plain.weights["b_dec"])
    robust.load_state_dict(plain.state_dict() | {"limit": robust.limit, "centre": robust.centre})
    plain.step(x)
    robust.step(sunk)
    for name, weight in plain.weights.items():
        assert torch.equal(weight, robust.weights[name])
    assert trainer_on(sunk).limit == math.inf and torch.equal(trainer_on(sunk).typical(sunk), sunk)


def test_export_refuses_what_does_not_fit():
    x = torch.randn(100, D) * 100 + 1e6
    with pytest.raises(FastsaeError, match="b_dec does not fit in float16"):
        trainer_on(x).export(SAEConfig(d_in=D, d_sae=F, k=K, dtype="float16"))
    trainer_on(x).export(SAEConfig(d_in=D, d_sae=F, k=K, dtype="bfloat16"))


def test_equal_activations_and_divergence_are_one_line():
    with pytest.raises(FastsaeError, match="all activations are equal"):
        trainer_on(torch.ones(10, D))
    x = torch.randn(100, D)
    trainer = trainer_on(x)
    with torch.no_grad():
        trainer.weights["W_dec"][0, 0] = float("inf")
        trainer.weights["b_enc"][0] = 100.0
    trainer.step(x)
    with pytest.raises(FastsaeError, match=r"lr: the loss became (nan|inf) by step 1"):
        trainer.state_dict()
    with pytest.raises(FastsaeError, match=r"lr: the loss became (nan|inf) by step 1"):
        trainer.metrics()


def test_learning_rate_rises_stays_and_falls():
    p = plan()
    rates = [p.lr_at(s) / p.lr for s in range(100)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert set(rates[5:80]) == {1.0}
    assert rates[80:] == pytest.approx([i / 21 for i in range(20, 0, -1)])


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_and_reconstruction_against_dense():
    torch.manual_seed(7)
    sae = SAE(SAEConfig(d_in=D, d_sae=F, k=K))
    x = torch.randn(500, D)
    dense = sae.encode(x).to_dense().detach()
    stats = feature_stats(sae, x.split(77))
    active = dense > 0
    torch.testing.assert_close(stats.frequency, active.float().mean(0))
    torch.testing.assert_close(stats.mean, dense.sum(0) / active.sum(0).clamp(min=1))
    assert torch.equal(stats.max, dense.max(0).values) and stats.tokens == 500
    found = reconstruction(sae, x.split(77))
    error = (dense @ sae.W_dec + sae.b_dec - x).square().sum().detach()
    assert found["fvu"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-5)
    assert found["rms"] == pytest.approx(float((x - x.mean(0)).square().mean().sqrt()), rel=1e-5)
    assert found["l0"] == pytest.approx(float(active.sum(1).float().mean()))
    with pytest.raises(FastsaeError):
        feature_stats(sae, [])
