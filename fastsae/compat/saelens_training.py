"""SAELens' TopK training on our kernels: forward, AuxK and backward without an [N, F] product.

The loss, its parts and the gradients are SAELens'. `hidden_pre` of a step's output is computed when
it is read, which SAELens' own trainer never does.
"""

import functools

import torch
from torch import Tensor

from fastsae.compat import codes
from fastsae.compat.saelens import RUNTIME_NORMS, _TopK, listening
from fastsae.errors import FastsaeError


class _TopKTraining(_TopK):
    def training_forward_pass(self, step_input):
        x = step_input.sae_in
        if listening(self.hook_sae_acts_pre) or not codes.plain(x, *self.parameters()):
            return self._base.training_forward_pass(self, step_input)
        acts = self.encode(x)
        out = self.decode(acts)
        mse = self.mse_loss_fn(out, x).sum(dim=-1).mean()
        aux = self._auxiliary(x, out, step_input.dead_neuron_mask)
        return _output_class()(
            sae_in=x,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=_HiddenPre(self, x),
            loss=mse + aux,
            losses={"mse_loss": mse, "auxiliary_reconstruction_loss": aux},
        )

    def _auxiliary(self, x: Tensor, out: Tensor, dead: Tensor | None) -> Tensor:
        """c·min(1, m / k_aux)·‖ê − e‖²: the k_aux largest pre-activations of the m dead latents
        reconstruct the residual e. Products over the dead latents alone."""
        count = 0 if dead is None else int(dead.sum())
        if count == 0:
            return out.new_tensor(0.0)
        if self.cfg.normalize_activations in RUNTIME_NORMS:
            return self.calculate_topk_aux_loss(x, out, x, dead)  # SAELens refuses: its own words
        residual = (x - out).detach()
        wanted = x.shape[-1] // 2
        rows = dead.nonzero()[:, 0]
        W_enc, W_dec = self.W_enc.T.index_select(0, rows), self.W_dec.index_select(0, rows)
        h = (x - self.b_dec * self.cfg.apply_b_dec_to_input) @ W_enc.T + self.b_enc[rows]
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = W_dec.norm(dim=-1)
            h, W_dec = h * norms, W_dec * (1 / norms)[:, None]
        top = h.topk(min(wanted, count), sorted=False)
        acts = torch.zeros_like(h).scatter(-1, top.indices, top.values)
        loss = (acts @ W_dec - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(count / wanted, 1.0) * loss


class _HiddenPre:
    """The pre-activations of one step, computed by SAELens' own code when they are asked for."""

    def __init__(self, sae, x: Tensor):
        self.sae, self.x, self.versions = sae, x, self._versions(sae)

    @staticmethod
    def _versions(sae) -> list[int]:
        return [p._version for p in sae.parameters()]

    def value(self) -> Tensor:
        if self._versions(self.sae) != self.versions:
            raise FastsaeError(
                "hidden_pre: the weights have changed since this step; read it before "
                "optimizer.step(), or train with the SAE restored (fastsae.compat.restore)"
            )
        return self.sae.encode_with_hidden_pre(self.x)[1]


@functools.cache
def _output_class():
    from sae_lens.saes.sae import TrainStepOutput

    class Output(TrainStepOutput):
        @property
        def hidden_pre(self):
            if isinstance(self._hidden_pre, _HiddenPre):
                self._hidden_pre = self._hidden_pre.value()
            return self._hidden_pre

        @hidden_pre.setter
        def hidden_pre(self, value):
            self._hidden_pre = value

    Output.__name__ = Output.__qualname__ = TrainStepOutput.__name__
    return Output


TRAINING = {"TopKTrainingSAE": _TopKTraining}
