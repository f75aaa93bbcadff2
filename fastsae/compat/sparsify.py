"""sparsify's SparseCoder on our kernels: encode, decode, forward with its losses, and gradients."""

import functools

import torch
from torch import Tensor

from fastsae import ops
from fastsae.compat import codes, swap
from fastsae.errors import FastsaeError

GRADIENTS = ("sparsify", "exact")


class _Coder(swap.Accelerated):
    """`_pre_acts` and `_exact` are the options of `accelerate`."""

    _pre_acts = False
    _exact = False

    def _serves(self, x: Tensor) -> bool:
        return x.dim() == 2 and x.dtype == self.dtype and codes.plain(x, *self.parameters())

    def encode(self, x: Tensor):
        if not self._serves(x):
            return self._base.encode(self, x)
        values, indices = self._topk(x, self.cfg.k)
        return _encoder_output()(values, indices, self._dense(x) if self._pre_acts else None)

    def _topk(self, x: Tensor, k: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k largest of the latents, or of the latents `rows`, after ReLU; indices int64."""
        W, b = self.encoder.weight, self.encoder.bias
        if rows is not None:
            W, b = W.index_select(0, rows), b.index_select(0, rows)
        b_dec = None if self.cfg.transcode else self.b_dec
        values, indices = ops.encode_topk(x, W, b, k, b_dec=b_dec)
        return values.to(x.dtype), indices.long()

    @torch.no_grad()
    def _dense(self, x: Tensor) -> Tensor:
        shifted = x if self.cfg.transcode else x - self.b_dec
        return torch.relu(self.encoder(shifted))

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        if self.W_dec is None or not codes.plain(top_acts, *self.parameters()):
            return self._base.decode(self, top_acts, top_indices)
        return ops.decode(top_acts.to(self.dtype), top_indices, self.W_dec, self.b_dec)

    def forward(self, x, y=None, *, dead_mask=None, total_variance=None):
        given = [t for t in (x, y) if t is not None]
        if self.W_dec is None or not all(self._serves(t) for t in given):
            return self._base.forward(
                self, x, y, dead_mask=dead_mask, total_variance=total_variance
            )
        values, indices = self._topk(x, self.cfg.k)
        y = x if y is None else y
        out = self.decode(values, indices)
        if self.W_skip is not None:
            out = out + x @ self.W_skip.mT
        error = y - out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        auxk = multi = out.new_tensor(0.0)
        if dead_mask is not None and int(dead_mask.sum()):
            auxk = self._auxk(x, error.detach(), dead_mask) / total_variance
        fvu = error.pow(2).sum() / total_variance
        if self.cfg.multi_topk:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._exact):
                values, indices = self._topk(x, 4 * self.cfg.k)
            out = self.decode(values, indices)
            multi = (out - y).pow(2).sum() / total_variance
        return _forward_output()(out, values, indices, fvu, auxk, multi)

    def _auxk(self, x: Tensor, residual: Tensor, dead_mask: Tensor) -> Tensor:
        """min(1, m / k_aux)·‖ê − e‖² with the k_aux largest of the m dead latents."""
        rows = dead_mask.nonzero()[:, 0]
        wanted = residual.shape[-1] // 2
        k, scale = min(wanted, len(rows)), min(len(rows) / wanted, 1.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._exact):
            values, indices = self._topk(x, k, rows)
        W = self.W_dec.index_select(0, rows)
        if k * codes.DENSE_SHARE > len(rows):
            estimate = values.new_zeros(len(x), len(rows)).scatter(1, indices, values) @ W
        else:
            estimate = ops.decode(values, indices, W)
        return scale * (estimate - residual).pow(2).sum()

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self):
        if self.W_dec is None or self.W_dec.grad is None:
            return self._base.remove_gradient_parallel_to_decoder_directions(self)
        parallel = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
        self.W_dec.grad.addcmul_(parallel[:, None], self.W_dec, value=-1)


@functools.cache
def _encoder_output():
    from sparsify.fused_encoder import EncoderOutput

    return EncoderOutput


@functools.cache
def _forward_output():
    from sparsify.sparse_coder import ForwardOutput

    return ForwardOutput


def accelerate(coder, *, pre_acts: bool = False, gradients: str = "sparsify") -> None:
    if type(coder).__name__ != "SparseCoder":
        raise FastsaeError(
            f"obj: sparsify's {type(coder).__name__} is not one we accelerate; accepted is "
            "SparseCoder"
        )
    if coder.cfg.activation != "topk":
        raise FastsaeError(
            f"obj: activation={coder.cfg.activation!r} is not accelerated, only 'topk' is; use the "
            "SparseCoder as it is"
        )
    if gradients not in GRADIENTS:
        raise FastsaeError(
            f"gradients: got {gradients!r}, accepted are {', '.join(map(repr, GRADIENTS))}"
        )
    swap.exchange(coder, _Coder)
    coder._pre_acts, coder._exact = bool(pre_acts), gradients == "exact"


def restore(coder) -> None:
    del coder._pre_acts, coder._exact
    swap.give_back(coder)
