"""SAEConfig, Latents and SAE: a sparse autoencoder over the sparse ops."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.errors import FastsaeError
from fastsae.ops import check
from fastsae.ops.csr import csr_to_padded
from fastsae.ops.decode import decode_dense
from fastsae.ops.reference import relu_with_padding

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["float64"] = torch.float64


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What a sparse autoencoder is. h = W_enc (x − s·b_dec) + b_enc, s = apply_b_dec_to_input.

    `topk` needs k. `batchtopk` is inference with one scalar θ and `jumprelu` with θ per feature,
    both in the parameter `threshold`. hook_name is the place in the model the SAE was trained on,
    e.g. "blocks.12.hook_resid_post" or "layers.12.output".
    """

    d_in: int
    d_sae: int
    activation: str = "topk"
    k: int | None = None
    apply_b_dec_to_input: bool = True
    dtype: str = "float32"
    hook_name: str | None = None
    model_name: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("d_in", "d_sae"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FastsaeError(f"{name}: got {value!r}, expected a positive integer")
        if self.activation not in ACTIVATIONS:
            raise FastsaeError(
                f"activation: got {self.activation!r}, accepted are {', '.join(ACTIVATIONS)}"
            )
        if self.activation == "topk":
            k = self.k
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.d_sae:
                raise FastsaeError(
                    f"k: got {k!r}, a topk SAE needs an integer from 1 to d_sae = {self.d_sae}"
                )
        elif self.k is not None and self.activation != "batchtopk":
            raise FastsaeError(f"k: got {self.k}, but activation={self.activation!r} has no k")
        if self.dtype not in DTYPES:
            raise FastsaeError(f"dtype: got {self.dtype!r}, accepted are {', '.join(DTYPES)}")

    @property
    def has_threshold(self) -> bool:
        return self.activation in ("jumprelu", "batchtopk")


class Latents(NamedTuple):
    """The active latents of every token.

    A row's active latents come first in descending order of value (NaN before everything, ties:
    lower index), then padding with value 0 and indices the row does not use otherwise.
    """

    values: Tensor  # [..., K] float32 (float64 for float64)
    indices: Tensor  # [..., K] int32, distinct inside a row
    counts: Tensor  # [...] int32, number of active latents of the row; a NaN is active
    d_sae: int

    def to_dense(self) -> Tensor:
        """The [..., d_sae] activations; differentiable in `values`."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter(-1, self.indices.long(), self.values)


class FeatureStats(NamedTuple):
    """What each feature did over `tokens` tokens of text."""

    frequency: Tensor  # [F] float32, share of tokens on which it is active
    mean: Tensor  # [F] float32, mean activation when active (0 for a dead feature)
    max: Tensor  # [F] float32, largest activation seen
    tokens: int


class SAE(nn.Module):
    """A sparse autoencoder: `encode` to Latents, `decode` back, `sae(x)` for both.

    Parameters W_enc and W_dec are [d_sae, d_in], row-contiguous; b_enc [d_sae], b_dec [d_in], and
    threshold [d_sae] for jumprelu and batchtopk, which stays float32 when the rest is halved.
    `stats` holds FeatureStats when the checkpoint has them. A new SAE has unit-norm random decoder
    rows, W_enc = W_dec, zero biases and thresholds.
    """

    def __init__(self, config: SAEConfig, *, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        dtype, f, d = DTYPES[config.dtype], config.d_sae, config.d_in
        rows = nn.functional.normalize(torch.randn(f, d, device=device), dim=-1).to(dtype)
        self.W_enc = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(f, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, device=device, dtype=dtype))
        if config.has_threshold:
            # θ is compared with fp32 pre-activations: a half-precision θ moves the gate.
            exact = torch.promote_types(dtype, torch.float32)
            self.threshold = nn.Parameter(torch.zeros(f, device=device, dtype=exact))
        self.stats: FeatureStats | None = None

    def _apply(self, fn, recurse=True):
        exact = self.threshold.data if self.config.has_threshold else None
        super()._apply(fn, recurse)
        if exact is not None and self.threshold.dtype in (torch.bfloat16, torch.float16):
            # A cast of the module moves θ but must not round it: that would move the gates.
            self.threshold.data = exact.to(self.threshold.device, torch.float32)
        name = str(self.W_enc.dtype).removeprefix("torch.")
        if name != self.config.dtype:
            self.config = dataclasses.replace(self.config, dtype=name)
        return self

    def extra_repr(self) -> str:
        c = self.config
        k = f", k={c.k}" if c.k else ""
        return f"{c.activation}{k}, d_in={c.d_in}, d_sae={c.d_sae}, hook={c.hook_name}, {c.dtype}"

    def encode(self, x: Tensor) -> Latents:
        """The active latents of x [..., d_in].

        topk gives K = k; the others K = the largest number of active latents in the batch. Values
        are float32 (float64 for float64) whatever the type of x and of the weights. Differentiable
        in x and the weights through `values`.
        """
        c = self.config
        b_dec = self.b_dec if c.apply_b_dec_to_input else None
        if c.activation == "topk":
            values, indices = ops.encode_topk(x, self.W_enc, self.b_enc, c.k, b_dec=b_dec)
        else:
            threshold = self.threshold if c.has_threshold else self.b_enc.new_zeros(c.d_sae)
            values, indices, offsets = ops.encode_threshold(
                x, self.W_enc, self.b_enc, threshold, b_dec=b_dec
            )
            values, indices, _ = csr_to_padded(values, indices, offsets)
            values, order = values.sort(dim=-1, descending=True, stable=True)
            values, indices = relu_with_padding(values, indices.gather(1, order))
            shape = (*x.shape[:-1], values.shape[-1])
            values, indices = values.view(shape), indices.view(shape)
        counts = (values.detach() != 0).sum(-1, dtype=torch.int32)
        return Latents(values, indices, counts, c.d_sae)

    def decode(self, z: "Latents | Tensor") -> Tensor:
        """x̂ = Σ_k values_k W_dec[indices_k] + b_dec.

        z is Latents or a dense [..., d_sae] tensor. Returns [..., d_in] of the promoted dtype of
        the values and W_dec: float32 for the Latents of a half-precision SAE.
        """
        if isinstance(z, Latents):
            if z.d_sae != self.config.d_sae:
                raise FastsaeError(f"z: has d_sae = {z.d_sae}, this SAE has {self.config.d_sae}")
            return ops.decode(z.values, z.indices, self.W_dec, self.b_dec)
        return decode_dense(z, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        sae_id: str | None = None,
        *,
        format: str | None = None,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "SAE":
        """Load an SAE from a folder or a Hugging Face repository; `sae_id` is a folder inside it.

        The family is detected by content unless `format` names it. dtype defaults to float32;
        thresholds stay float32 whatever it is. Errors name the file, what was found, and the fix.
        """
        from fastsae.formats import load

        name = str(dtype or torch.float32).removeprefix("torch.")
        check.one_of("dtype", name, tuple(DTYPES))
        config, state, stats = load(path_or_repo, sae_id, format=format, revision=revision)
        # On "meta" nothing is drawn or allocated that the checkpoint would replace at once.
        sae = cls(dataclasses.replace(config, dtype=name), device="meta")
        wanted = {key: parameter.dtype for key, parameter in sae.state_dict().items()}
        # A copy, because a file is mapped at any alignment and may be overwritten while we run.
        state = {
            key: t.to(device, wanted[key], copy=True, memory_format=torch.contiguous_format)
            for key, t in state.items()
        }
        sae.load_state_dict(state, assign=True)
        sae.stats = stats
        return sae

    def save_pretrained(self, directory: str | Path, format: str = "saelens") -> None:
        """Write cfg.json, the weights as safetensors, and fastsae.json with our statistics."""
        from fastsae.formats import save

        state = {name: p.detach().contiguous().cpu() for name, p in self.state_dict().items()}
        save(Path(directory), self.config, state, self.stats, format=format)
