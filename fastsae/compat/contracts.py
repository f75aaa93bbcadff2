"""Small contracts of other tools, kept by a fastsae.SAE: SAEBench, delphi, repsteer and saklas.

None of these packages is imported: each class has the attributes and methods that its tool reads.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.compat import codes
from fastsae.errors import FastsaeError
from fastsae.models import Hook, resolve_hook
from fastsae.ops.decode import decode_dense
from fastsae.sae import SAE


def _sae(sae: Any) -> SAE:
    if not isinstance(sae, SAE):
        raise FastsaeError(f"sae: got {type(sae).__name__}, expected a fastsae.SAE")
    return sae


def _dense_encode(sae: SAE, x: Tensor) -> Tensor:
    z = sae.encode(x)
    shape, width = z.values.shape[:-1], z.values.shape[-1]
    found = codes.Codes(z.values.reshape(-1, width), z.indices.reshape(-1, width), z.d_sae)
    return codes.dense(found, shape, sae.W_dec.dtype)


def _layer(sae: SAE) -> int:
    """The 0-based decoder layer of the SAE's hook point."""
    return resolve_hook(sae.config.hook_name).layer


@dataclasses.dataclass
class SAEBenchConfig:
    """What SAEBench reads of an SAE; `dtype` is a string."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    dtype: str
    context_size: int | None = None


class SAEBenchSAE(nn.Module):
    """SAEBench's BaseSAE: dense encode and decode of [B, D] or [B, L, D].

    Parameters W_enc [D, F], W_dec [F, D], b_enc, b_dec (and threshold) share memory with `sae`
    until one of them is moved or cast. SAEBench wants decoder rows of norm 1 within 1e-5 (1e-2 for
    half types); others raise.
    """

    def __init__(self, sae: SAE, model_name: str, *, hook_layer: int | None = None):
        super().__init__()
        c = _sae(sae).config
        tolerance = 1e-2 if sae.W_dec.dtype in (torch.bfloat16, torch.float16) else 1e-5
        worst = float((sae.W_dec.detach().float().norm(dim=1) - 1).abs().max())
        if not worst <= tolerance:
            raise FastsaeError(
                f"sae: a decoder row's norm is {worst:.1e} from 1, SAEBench accepts "
                f"{tolerance:.0e}; normalise the decoder first"
            )
        layer = _layer(sae) if hook_layer is None else hook_layer
        self.cfg = SAEBenchConfig(
            *(model_name, c.d_in, c.d_sae, layer, c.hook_name, c.activation, c.dtype)
        )
        self._k, self._shift = c.k, c.apply_b_dec_to_input
        for name, p in sae.named_parameters():
            shared = p.detach().T if name == "W_enc" else p.detach()
            self.register_parameter(name, nn.Parameter(shared, requires_grad=p.requires_grad))

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def _apply(self, fn, recurse=True):
        exact = self._parameters.get("threshold")
        exact = None if exact is None else exact.data
        super()._apply(fn, recurse)
        if exact is not None:  # a threshold is moved, never rounded
            self.threshold.data = exact.to(self.W_dec.device)
        self.cfg.dtype = str(self.W_dec.dtype).removeprefix("torch.")
        return self

    def encode(self, x: Tensor) -> Tensor:
        flat, b_dec = x.reshape(-1, x.shape[-1]), self.b_dec if self._shift else None
        if self.cfg.architecture == "topk":
            found = codes.topk(flat, self.W_enc.T, self.b_enc, self._k, b_dec)
        else:
            theta = getattr(self, "threshold", torch.zeros(()))
            found = codes.threshold(flat, self.W_enc.T, self.b_enc, theta.to(x.device), b_dec)
        return codes.dense(found, x.shape[:-1], self.W_dec.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return codes.decode(feature_acts, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class EncoderOutput(NamedTuple):
    """What delphi's cache reads of a coder."""

    top_acts: Tensor  # [N, K]
    top_indices: Tensor  # [N, K] int64
    pre_acts: None = None


class DelphiCoder:
    """delphi's coder: encode(x [N, D]) to the K largest latents; `num_latents`, `cfg.k`, `to`.

    delphi drops |a| ≤ 1e-5. `dense(x)` is the other form it takes: [B, L, D] -> [B, L, F].
    """

    def __init__(self, sae: SAE):
        self.sae = _sae(sae)
        self.cfg, self.num_latents, self.d_in = sae.config, sae.config.d_sae, sae.config.d_in

    def to(self, device=None, dtype=None) -> "DelphiCoder":
        self.sae.to(device=device, dtype=dtype)
        self.cfg = self.sae.config
        return self

    def encode(self, x: Tensor) -> EncoderOutput:
        z = self.sae.encode(x)
        return EncoderOutput(z.values.to(x.dtype), z.indices.long())

    def dense(self, x: Tensor) -> Tensor:
        return _dense_encode(self.sae, x)


class RepsteerAdapter:
    """repsteer's SAEAdapter; register it with repsteer.sae.register_provider(name, loader)."""

    def __init__(self, sae: SAE):
        self.sae = _sae(sae)
        self.input_dim, self.num_features = sae.config.d_in, sae.config.d_sae

    def encode(self, x: Tensor) -> Tensor:
        return _dense_encode(self.sae, x)

    def decode(self, features: Tensor) -> Tensor:
        return codes.decode(features, self.sae.W_dec, self.sae.b_dec)

    def decoder_direction(self, feature: int) -> Tensor:
        return self.sae.W_dec[_feature(feature, self.num_features)].detach()

    def clamp_delta(self, x: Tensor, feature: int, value: float) -> Tensor:
        """(value − a_f)·W_dec[f]: what clamping feature f to `value` adds to x [..., D].

        The same as decoding the code with and without the clamp, at the cost of one row.
        """
        row = self.decoder_direction(feature)
        z = self.sae.encode(x)
        active = torch.where(z.indices == feature, z.values, 0).sum(-1, keepdim=True)
        return (value - active).to(row.dtype) * row


class SaklasBackend:
    """saklas' SaeBackend: SAEs of residual streams after 0-based layers."""

    def __init__(self, saes: Mapping[int, SAE], *, release: str, revision: str | None = None):
        if not saes:
            raise FastsaeError("saes: got none, expected {layer: fastsae.SAE}")
        self._saes = {int(layer): _sae(sae) for layer, sae in saes.items()}
        for layer, sae in self._saes.items():
            name = sae.config.hook_name
            if name is not None and resolve_hook(name) != Hook(layer, "output"):
                raise FastsaeError(
                    f"saes[{layer}]: the SAE belongs at {name}, not at the output of layer {layer}"
                )
        self.release, self.revision = release, revision
        self.layers = frozenset(self._saes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights of every layer."""
        digest = hashlib.sha256()
        for layer in sorted(self._saes):
            for name, tensor in sorted(self._saes[layer].state_dict().items()):
                digest.update(f"{layer}.{name}.{tensor.dtype}.{list(tensor.shape)}".encode())
                raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    def encode_layer(self, idx: int, h: Tensor) -> Tensor:
        """[N, D] -> [N, F]."""
        return _dense_encode(self._at(idx), h)

    def decode_layer(self, idx: int, f: Tensor) -> Tensor:
        """[F] -> [D]."""
        sae = self._at(idx)
        return decode_dense(f.to(sae.W_dec.dtype), sae.W_dec, sae.b_dec)

    def feature_count(self, idx: int) -> int:
        return self._at(idx).config.d_sae

    def feature_direction(self, idx: int, i: int) -> Tensor:
        sae = self._at(idx)
        return sae.W_dec[_feature(i, sae.config.d_sae)].detach()

    def _at(self, idx: int) -> SAE:
        if idx not in self._saes:
            raise FastsaeError(f"idx: got layer {idx}, this backend has {sorted(self._saes)}")
        return self._saes[idx]


def _feature(i: int, count: int) -> int:
    if not 0 <= i < count:
        raise FastsaeError(f"feature: got {i}, expected 0 to {count - 1}")
    return i
