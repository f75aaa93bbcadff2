"""SAELens' TopK training with an accelerated SAE: the same steps, parts and loss curve."""

import copy
import itertools

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from fastsae import FastsaeError, compat

D, F, K, N = 24, 1024, 8, 64
STEPS = 200


def pair(**options):
    config = TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, **options)
    theirs = TopKTrainingSAE(config)
    return compat.accelerate(copy.deepcopy(theirs)), theirs


def given(x, dead):
    mask = torch.zeros(F, dtype=torch.bool)
    mask[:dead] = True
    return TrainStepInput(x, {}, mask, 0, False)


@pytest.mark.parametrize("dead", [0, 5, 300])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("leading", [(N,), (8, 8)])
def test_one_step(dead, rescale, leading, close, same_gradients):
    ours, theirs = pair(rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(*leading, D)
    outs = []
    for sae in (ours, theirs):
        sae.b_dec.data.copy_(x.flatten()[:D])
        out = sae.training_forward_pass(given(x, dead))
        out.loss.backward()
        outs.append(out)
    found, wanted = outs
    for name in ("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss"):
        close(getattr(found, name), getattr(wanted, name), name)
    assert found.losses.keys() == wanted.losses.keys()
    for name in found.losses:
        close(found.losses[name], wanted.losses[name], name)
    assert (float(found.losses["auxiliary_reconstruction_loss"]) > 0) == (dead > 0)
    same_gradients(ours, theirs)


def test_hidden_pre_is_never_of_later_weights():
    ours, _ = pair()
    out = ours.training_forward_pass(given(torch.randn(N, D), 0))
    torch.optim.SGD(ours.parameters(), lr=0.1)
    with torch.no_grad():
        ours.W_enc.add_(1)
    with pytest.raises(FastsaeError, match="weights have changed"):
        _ = out.hidden_pre


def test_sparse_codes_are_refused_with_the_fix():
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, use_sparse_activations=True))
    with pytest.raises(FastsaeError, match="use_sparse_activations=False"):
        compat.accelerate(sae)


def test_saelens_trainer_has_the_same_loss_curve(tmp_path, close):
    """200 steps of SAELens' own SAETrainer, AuxK at work: every step's loss within 1e-4.

    From SAELens' own initialisation. From a random b_dec a top-k tie flips near step 190, and
    moving W_enc by one ulp then changes SAELens' own curve by 1.5e-3.
    """
    curves, finals = [], []
    truth = torch.randn(64, D)
    generator = torch.Generator().manual_seed(3)
    data = []
    for _ in range(STEPS):
        weights = torch.rand(N, 64, generator=generator)
        data.append((weights * (weights > 0.9)) @ truth)
    for sae in pair():
        config = SAETrainerConfig(
            total_training_samples=N * STEPS,
            train_batch_size_samples=N,
            lr=1e-3,
            lr_end=1e-4,
            dead_feature_window=30,
            logger=LoggingConfig(log_to_wandb=False),
        )
        trainer = SAETrainer(config, sae, itertools.cycle(data), None)
        losses, auxiliary, parts = [], [], []
        for batch in data:
            out = trainer._train_step(sae=sae, sae_in=batch)
            losses.append(out.loss.detach())
            auxiliary.append(out.losses["auxiliary_reconstruction_loss"].detach())
            parts.append(out.losses["mse_loss"].detach())
            trainer.n_training_steps += 1
        curves.append(torch.stack(losses))
        mse = torch.stack(parts)
        assert torch.stack(auxiliary).max() > 0
        sae.save_inference_model(tmp_path / str(len(curves)))
        finals.append(SAE.load_from_disk(tmp_path / str(len(curves))))
    ours, theirs = curves
    assert ((ours - theirs).abs() / theirs).max() <= 1e-4
    assert mse[-20:].mean() < 0.7 * mse[:20].mean()
    close(finals[0].W_dec, finals[1].W_dec, tolerance=1e-2)  # what is trained is what is saved
