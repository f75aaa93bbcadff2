"""SAELens SAEs on our kernels: the same methods, hooks, shapes, dtypes and gradients.

What SAELens computes densely and then zeroes is computed sparsely; every `hook_sae_*` point fires
as before. Someone who listens to `hook_sae_acts_pre` wants all pre-activations, so SAELens' own
encoder runs for that call. W_enc keeps its shape [D, F] and is stored transposed.
"""

import threading
import weakref

import torch
from torch import Tensor

from fastsae.compat import codes, swap
from fastsae.errors import FastsaeError

RUNTIME_NORMS = ("layer_norm", "constant_norm_rescale")
_LN_EPS = 1e-5

_local = threading.local()


def _states() -> "weakref.WeakKeyDictionary":
    """What this thread's last encode of each SAE left for its decode."""
    if not hasattr(_local, "states"):
        _local.states = weakref.WeakKeyDictionary()
    return _local.states


def listening(hook) -> bool:
    """Whether a module forwards what passes through it to anybody."""
    return bool(
        hook._forward_hooks
        or hook._forward_pre_hooks
        or hook._backward_hooks
        or hook._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


class _SAE(swap.Accelerated):
    """The methods of an accelerated SAE; `_codes` says which latents are active."""

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """SAELens' method with its state (norms, heads) kept per thread and not on the SAE."""
        x = sae_in.to(self.dtype)
        heads = getattr(self, "hook_z_reshaping_mode", False)
        if heads:
            self.d_head = x.shape[-1]
            x = x.flatten(-2)
        x = self.hook_sae_input(x)
        norm = None
        if self.cfg.normalize_activations == "layer_norm":
            mu = x.mean(dim=-1, keepdim=True)
            x = x - mu
            std = x.std(dim=-1, keepdim=True)
            x = x / (std + _LN_EPS)
            norm = (mu, std)
        elif self.cfg.normalize_activations == "constant_norm_rescale":
            scale = (self.cfg.d_in**0.5) / x.norm(dim=-1, keepdim=True)
            x = x * scale
            norm = (scale,)
        _states()[self] = (norm, self.d_head if heads else None)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def encode(self, x: Tensor) -> Tensor:
        if listening(self.hook_sae_acts_pre) or not codes.plain(x, *self.parameters()):
            return self._with_state(self._base.encode(self, x))
        sae_in = self.process_sae_in(x)
        shape = sae_in.shape[:-1]
        found = self._codes(sae_in.reshape(-1, sae_in.shape[-1]))
        found.state, found.owner = _states().get(self, ()), id(self)
        inside = getattr(_local, "inside", None) is self
        few = found.values.shape[1] * codes.DENSE_SHARE <= found.features
        if inside and few and not listening(self.hook_sae_acts_post):
            return codes.placeholder(found, shape, self.W_enc.dtype)
        return self.hook_sae_acts_post(codes.dense(found, shape, self.W_enc.dtype))

    def _with_state(self, acts: Tensor) -> Tensor:
        """Remembers how to undo the norms for a tensor that SAELens' own encoder made."""
        state = _states().get(self, ())
        if any(state):
            codes.remember(acts, codes.Codes(None, None, self.cfg.d_sae, state, id(self)))
        return acts

    def decode(self, feature_acts: Tensor) -> Tensor:
        if not codes.plain(feature_acts, *self.parameters()) or (
            feature_acts.dtype != self.W_dec.dtype
        ):
            out = self._dense_decode(feature_acts)
        else:
            out = codes.decode(feature_acts, self._decoder(), self.b_dec)
        return self._undo(self.hook_sae_recons(out), feature_acts)

    def _dense_decode(self, acts: Tensor) -> Tensor:
        return acts @ self._decoder() + self.b_dec

    def _decoder(self) -> Tensor:
        return self.W_dec

    def _undo(self, out: Tensor, acts: Tensor) -> Tensor:
        found = codes.recall(acts)
        known = found is not None and found.owner == id(self)
        norm, d_head = (found.state if known else _states().get(self)) or (None, None)
        kind = self.cfg.normalize_activations
        if kind in RUNTIME_NORMS and norm is None:
            raise FastsaeError(
                f"decode: normalize_activations={kind!r} needs the norms of an encode, and this "
                "thread has encoded nothing with this SAE; call encode first"
            )
        if kind == "layer_norm":
            mu, std = norm
            out = out * std + mu
        elif kind == "constant_norm_rescale":
            out = out / norm[0]
        if not getattr(self, "hook_z_reshaping_mode", False):
            return out
        d_head = d_head or self.d_head
        return out.unflatten(-1, (-1, d_head))

    def forward(self, *args, **kwargs):
        before, _local.inside = getattr(_local, "inside", None), self
        try:
            return self._base.forward(self, *args, **kwargs)
        finally:
            _local.inside = before

    def process_state_dict_for_saving(self, state_dict) -> None:
        self._base.process_state_dict_for_saving(self, state_dict)
        state_dict.update({name: t.contiguous() for name, t in state_dict.items()})


class _Relu(_SAE):
    def _codes(self, x):
        return codes.threshold(x, self.W_enc.T, self.b_enc, 0.0)


class _JumpRelu(_SAE):
    def _codes(self, x):
        return codes.threshold(x, self.W_enc.T, self.b_enc, self.threshold.detach())


class _TopK(_SAE):
    def _codes(self, x):
        if not self.cfg.rescale_acts_by_decoder_norm:
            return codes.topk(x, self.W_enc.T, self.b_enc, self.activation_fn.k)
        norms = self.W_dec.norm(dim=-1)
        W = self.W_enc.T * norms[:, None]
        return codes.topk(x, W, self.b_enc * norms, self.activation_fn.k)

    def _decoder(self):
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec
        return self.W_dec * (1 / self.W_dec.norm(dim=-1))[:, None]


class _Gated(_SAE):
    """1[u + b_gate > 0]·relu(e^r·u + b_mag) with u = x·W_enc: the gate chooses, u is read back."""

    def _codes(self, x):
        gate = self.b_gate.detach()
        found = codes.threshold(x, self.W_enc.T, gate, 0.0)
        rows = found.indices.long()
        magnitude = self.r_mag.exp()[rows] * (found.values - gate[rows]) + self.b_mag[rows]
        found.values = torch.where(found.values.detach() != 0, magnitude, 0).relu()
        return found


class _Transcoder(_SAE):
    """No b_dec on the input, no heads, and the output is not un-normalised."""

    def process_sae_in(self, sae_in):
        return self.hook_sae_input(sae_in.to(self.dtype))

    def _undo(self, out, acts):
        return out


class _ReluTranscoder(_Transcoder, _Relu):
    pass


class _JumpReluTranscoder(_Transcoder, _JumpRelu):
    pass


MIXINS = {
    "StandardSAE": _Relu,
    "TopKSAE": _TopK,
    "JumpReLUSAE": _JumpRelu,
    "GatedSAE": _Gated,
    "Transcoder": _ReluTranscoder,
    "SkipTranscoder": _ReluTranscoder,
    "JumpReLUTranscoder": _JumpReluTranscoder,
    "JumpReLUSkipTranscoder": _JumpReluTranscoder,
}


def accelerate(sae) -> None:
    from fastsae.compat.saelens_training import TRAINING

    mixin = (MIXINS | TRAINING).get(type(sae).__name__)
    if mixin is None:
        accepted = ", ".join((*MIXINS, *TRAINING))
        raise FastsaeError(
            f"obj: SAELens' {type(sae).__name__} is not one we accelerate; accepted are {accepted}"
        )
    if getattr(sae.activation_fn, "use_sparse_activations", False):
        raise FastsaeError(
            "obj: use_sparse_activations=True returns COO tensors; make the SAE with "
            "use_sparse_activations=False, which is the faster one once accelerated"
        )
    norm = sae.cfg.normalize_activations
    if issubclass(mixin, _Transcoder) and norm in RUNTIME_NORMS:
        raise FastsaeError(
            f"obj: a transcoder with normalize_activations={norm!r} is not accelerated, because "
            "SAELens normalises its input and leaves its output; use it as it is"
        )
    swap.rows_first(sae.W_enc)
    swap.exchange(sae, mixin)


def restore(sae) -> None:
    swap.give_back(sae)
    swap.as_declared(sae.W_enc)
