"""The peers' own classes around given weights, and one training step of each.

A library is imported when its model is made. Weights are W_enc [F, D], b_enc [F], W_dec [F, D] and
b_dec [D] in float32; every model holds them contiguous in the layout in which its library loads
them.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsae.training.config import Plan
from fastsae.training.trainer import Trainer, sae_loss

DEAD_SHARE = 8  # one latent in eight is dead: more than four times k_aux at the reference shape
AUX_COEFFICIENT = 1 / 32


def _load(module: nn.Module, **tensors: Tensor) -> nn.Module:
    """Puts tensors in place of parameters of the same shape, without a copy."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.replace("__", ".").rpartition(".")
        parameter = getattr(module.get_submodule(owner), leaf)
        assert parameter.shape == tensor.shape, f"{name}: {parameter.shape}, {tensor.shape}"
        parameter.data = tensor
    return module


def topk(name: str, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int):
    """A TopK SAE of one library; raises KeyError for a library that is not known."""
    make = {
        "SAELens": _saelens_topk,
        "SAELens sparse": _saelens_sparse,
        "sparsify": _sparsify,
        "dictionary_learning": _dictionary_learning,
    }[name]
    return make(W_enc, b_enc, W_dec, b_dec, k)


def _saelens_topk(W_enc, b_enc, W_dec, b_dec, k):
    from sae_lens import TopKSAE, TopKSAEConfig

    F, D = W_enc.shape
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=k))
    return _load(sae, W_enc=W_enc.T.contiguous(), b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)


def _saelens_sparse(W_enc, b_enc, W_dec, b_dec, k):
    from sae_lens.saes.topk_sae import TopK

    sae = _saelens_topk(W_enc, b_enc, W_dec, b_dec, k)
    sae.activation_fn = TopK(k, use_sparse_activations=True)
    return sae


def _sparsify(W_enc, b_enc, W_dec, b_dec, k):
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # with Triton installed it has no CPU decoder
    from sparsify import SparseCoder, SparseCoderConfig

    F, D = W_enc.shape
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=k))
    return _load(sae, encoder__weight=W_enc, encoder__bias=b_enc, W_dec=W_dec, b_dec=b_dec)


def _dictionary_learning(W_enc, b_enc, W_dec, b_dec, k):
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    F, D = W_enc.shape
    sae = AutoEncoderTopK(D, F, k)
    columns = W_dec.T.contiguous()
    return _load(
        sae, encoder__weight=W_enc, encoder__bias=b_enc, decoder__weight=columns, b_dec=b_dec
    )


def jumprelu(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor):
    """SAELens' JumpReLUSAE."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    F, D = W_enc.shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F))
    columns = W_enc.T.contiguous()
    return _load(sae, W_enc=columns, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold)


class _Trainer(Trainer):
    """fastsae's trainer, which also keeps the last step's loss."""

    def _count(self, loss, tokens: int) -> None:
        self.total = loss.total.detach()
        super()._count(loss, tokens)


class TrainingStart:
    """The same first weights, dead latents and learning rate for every library's step.

    A step is a function of x [N, D] that returns the total loss before its update. Adam is torch's
    fused one everywhere: the fastest it offers.
    """

    def __init__(self, D: int, F: int, k: int):
        self.k = k
        self.plan = Plan(
            d_in=D,
            d_sae=F,
            steps=1_000_000,
            k_aux=D // 2,  # what sparsify and SAELens have built in
            dead_after_tokens=1,
            lr=1e-4,
            warmup_steps=0,
            decay_steps=0,
        )
        self.dead = torch.zeros(F, dtype=torch.bool)
        self.dead[::DEAD_SHARE] = True
        self.weights = {n: w.detach().clone() for n, w in self._trainer().weights.items()}

    def _trainer(self) -> _Trainer:
        trainer = _Trainer(self.plan, self.k, aux_coefficient=AUX_COEFFICIENT)
        trainer.scale = 1.0
        return trainer

    def copies(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self.weights.items()}

    def loss(self, x: Tensor) -> Tensor:
        """Of the first step on x, in float64."""
        weights = {name: weight.double() for name, weight in self.weights.items()}
        options = {"k_aux": self.plan.k_aux, "aux_coefficient": AUX_COEFFICIENT}
        dead = self.dead.nonzero()[:, 0]
        return sae_loss(x.double(), **weights, k=self.k, dead=dead, **options).total.detach()

    def ours(self) -> Callable[[Tensor], Tensor]:
        trainer = self._trainer()
        idle = torch.where(self.dead, self.plan.dead_after_tokens + 1, 0)

        def step(x: Tensor) -> Tensor:
            trainer.idle.copy_(idle)
            trainer.step(x)
            return trainer.total

        return step

    def sparsify(self, change: Callable | None = None) -> Callable[[Tensor], Tensor]:
        """`change` is applied to the SparseCoder before its first step."""
        w = self.copies()
        sae = _sparsify(w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], self.k)
        sae = change(sae) if change else sae
        adam = torch.optim.Adam(sae.parameters(), lr=self.plan.lr, fused=True)

        def step(x: Tensor) -> Tensor:  # the order of sparsify's Trainer
            sae.set_decoder_norm_to_unit_norm()
            out = sae(x, dead_mask=self.dead)
            loss = out.fvu + AUX_COEFFICIENT * out.auxk_loss
            loss.backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            adam.step()
            adam.zero_grad()
            return loss.detach()

        return step

    def saelens(self, change: Callable | None = None) -> Callable[[Tensor], Tensor]:
        """`change` is applied to the SAE, which then has dense codes, before its first step."""
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        F, D = self.weights["W_enc"].shape
        config = TopKTrainingSAEConfig(
            d_in=D,
            d_sae=F,
            k=self.k,
            aux_loss_coefficient=AUX_COEFFICIENT,
            rescale_acts_by_decoder_norm=False,
            # COO codes are what it recommends for float32 and small k.
            use_sparse_activations=change is None,
        )
        w = self.copies()
        sae = _load(TopKTrainingSAE(config), **w | {"W_enc": w["W_enc"].T.contiguous()})
        sae = change(sae) if change else sae
        adam = torch.optim.Adam(sae.parameters(), lr=self.plan.lr, fused=True)

        def step(x: Tensor) -> Tensor:
            given = TrainStepInput(x, {}, self.dead, 0, False)
            # Its loss is the mean over tokens; ours is divided by the batch's variance.
            share = len(x) / (x - x.mean(0)).square().sum()
            loss = sae.training_forward_pass(given).loss * share
            loss.backward()
            adam.step()
            adam.zero_grad()
            return loss.detach()

        return step
