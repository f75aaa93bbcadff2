"""dictionary_learning's dictionaries on our kernels: encode, decode, forward at inference.

Arguments that ask for more than the code (`return_active`, `return_topk`, ghost masks, batch top-k
at training) run the library's own method.
"""

import torch
from torch import Tensor

from fastsae.compat import codes, swap
from fastsae.errors import FastsaeError


class _Dictionary(swap.Accelerated):
    """W_enc, W_dec [F, D] and biases by the names of each class; the methods they share."""

    def encode(self, x: Tensor, *args, **kwargs):
        if args or kwargs or not codes.plain(x, *self.parameters()) or not self._serves(x):
            return self._base.encode(self, x, *args, **kwargs)
        return codes.dense(self._codes(x.reshape(-1, x.shape[-1])), x.shape[:-1], x.dtype)

    def decode(self, f: Tensor, *args, **kwargs):
        W, b = self._decoder()
        if args or kwargs or not codes.plain(f, *self.parameters()) or f.dtype != W.dtype:
            return self._base.decode(self, f, *args, **kwargs)
        return codes.decode(f, W, b)

    def _serves(self, x: Tensor) -> bool:
        return x.dtype == self._decoder()[0].dtype

    def _decoder(self):
        return self.decoder.weight.T, self.decoder_bias

    def _relayout(self, change_in, change_out) -> None:
        """In what order the weights lie; [F, D] of both must be contiguous for the kernels."""
        change_out(self.encoder.weight)
        change_in(self.decoder.weight)


class _AutoEncoder(_Dictionary):
    def _codes(self, x):
        return codes.threshold(x, self.encoder.weight, self.encoder.bias, 0.0, b_dec=self.bias)

    def _decoder(self):
        return self.decoder.weight.T, self.bias


class _AutoEncoderNew(_Dictionary):
    def _codes(self, x):
        return codes.threshold(x, self.encoder.weight, self.encoder.bias, 0.0)

    def _decoder(self):
        return self.decoder.weight.T, self.decoder.bias


class _Gated(_Dictionary):
    """1[u + gate_bias > 0]·relu(e^r·u + mag_bias), u = W_enc (x − decoder_bias)."""

    def _codes(self, x):
        gate = self.gate_bias.detach()
        found = codes.threshold(x, self.encoder.weight, gate, 0.0, b_dec=self.decoder_bias)
        rows = found.indices.long()
        magnitude = self.r_mag.exp()[rows] * (found.values - gate[rows]) + self.mag_bias[rows]
        found.values = torch.where(found.values.detach() != 0, magnitude, 0).relu()
        return found


class _JumpRelu(_Dictionary):
    def _codes(self, x):
        b_dec = self.b_dec if self.apply_b_dec_to_input else None
        return codes.threshold(x, self.W_enc.T, self.b_enc, self.threshold.detach(), b_dec=b_dec)

    def _decoder(self):
        return self.W_dec, self.b_dec

    def _relayout(self, change_in, change_out):
        change_in(self.W_enc)
        change_out(self.W_dec)


class _TopK(_Dictionary):
    def _codes(self, x):
        W, b = self.encoder.weight, self.encoder.bias
        return codes.topk(x, W, b, int(self.k), b_dec=self.b_dec)

    def _decoder(self):
        return self.decoder.weight.T, self.b_dec


class _BatchTopK(_Dictionary):
    """By its threshold, as trained; a threshold that was never set is −1, which is a plain ReLU."""

    def _codes(self, x):
        W, b = self.encoder.weight, self.encoder.bias
        return codes.threshold(x, W, b, float(self.threshold), b_dec=self.b_dec)

    def _decoder(self):
        return self.decoder.weight.T, self.b_dec


class _Matryoshka(_JumpRelu):
    def _serves(self, x):
        return _JumpRelu._serves(self, x) and self.active_groups == len(self.group_sizes)

    def _codes(self, x):
        theta = float(self.threshold)
        return codes.threshold(x, self.W_enc.T, self.b_enc, theta, b_dec=self.b_dec)


MIXINS = {
    "AutoEncoder": _AutoEncoder,
    "AutoEncoderNew": _AutoEncoderNew,
    "GatedAutoEncoder": _Gated,
    "JumpReluAutoEncoder": _JumpRelu,
    "AutoEncoderTopK": _TopK,
    "BatchTopKSAE": _BatchTopK,
    "MatryoshkaBatchTopKSAE": _Matryoshka,
}


def accelerate(dictionary) -> None:
    mixin = MIXINS.get(type(dictionary).__name__)
    if mixin is None:
        raise FastsaeError(
            f"obj: dictionary_learning's {type(dictionary).__name__} is not one we accelerate; "
            f"accepted are {', '.join(MIXINS)}"
        )
    swap.exchange(dictionary, mixin)
    dictionary._relayout(swap.rows_first, swap.as_declared)


def restore(dictionary) -> None:
    dictionary._relayout(swap.as_declared, swap.as_declared)
    swap.give_back(dictionary)
