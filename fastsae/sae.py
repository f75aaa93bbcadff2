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
from fastsae.ops.reference import full_precision, relu_with_padding

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "groupmax")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm", "center")
RESHAPES = ("none", "hook_z")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES["float64"] = torch.float64
LAYER_NORM_EPS = 1e-5  # of SAELens and OpenAI: added to σ, not to σ²
_EXACT = ("threshold", "activation_scale")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What a sparse autoencoder is. h = W_enc (n(x) − s·b_dec) + b_enc, s = apply_b_dec_to_input.

    `topk` needs k. `batchtopk` is inference with one scalar θ and `jumprelu` with θ per feature,
    both in the parameter `threshold`. `groupmax` keeps the largest h of each of k contiguous groups
    of d_sae / k features. hook_name is the place in the model the SAE was trained on, e.g.
    "blocks.12.hook_resid_post" or "layers.12.output".

    d_out makes it a transcoder: it writes d_out dimensions, at hook_name_out, and never subtracts
    b_dec. `skip` adds W_skip x, x before any normalization. `activation_scale` multiplies the
    selected latents by a factor per feature. `reshape="hook_z"` also takes x [..., heads, d_head].

    `normalization` n of a row x, undone in the reconstruction x̂ (but not of a transcoder):
    layer_norm (x − μ)/(σ + 1e-5), σ unbiased, back ·σ + μ; constant_norm x·√d_in/‖x‖ and back;
    center x − μ, back + μ.
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
    d_out: int | None = None
    hook_name_out: str | None = None
    skip: bool = False
    normalization: str = "none"
    activation_scale: bool = False
    reshape: str = "none"

    def __post_init__(self):
        for name in ("d_in", "d_sae", "d_out"):
            value = getattr(self, name)
            if name == "d_out" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FastsaeError(f"{name}: got {value!r}, expected a positive integer")
        check.one_of("activation", self.activation, ACTIVATIONS)
        check.one_of("normalization", self.normalization, NORMALIZATIONS)
        check.one_of("reshape", self.reshape, RESHAPES)
        k = self.k
        if self.activation in ("topk", "groupmax"):
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.d_sae:
                raise FastsaeError(
                    f"k: got {k!r}, a {self.activation} SAE needs an integer from 1 to "
                    f"d_sae = {self.d_sae}"
                )
            if self.activation == "groupmax" and self.d_sae % k:
                raise FastsaeError(f"k: got {k}, {self.d_sae} features make no {k} equal groups")
        elif k is not None and self.activation != "batchtopk":
            raise FastsaeError(f"k: got {k}, but activation={self.activation!r} has no k")
        if self.d_out is not None and self.apply_b_dec_to_input:
            raise FastsaeError(
                "apply_b_dec_to_input: got True, but a transcoder's b_dec belongs to its output; "
                "pass apply_b_dec_to_input=False"
            )
        if self.hook_name_out is not None and self.d_out is None:
            raise FastsaeError("hook_name_out: only a transcoder has one; pass d_out too")
        check.one_of("dtype", self.dtype, tuple(DTYPES))

    def require_plain(self, what: str, *, normalization: tuple[str, ...] = ()) -> None:
        """Raise FastsaeError if h and x̂ need more than W_enc, W_dec, b_enc, b_dec and θ, and the
        normalizations that the caller handles."""
        extras = {
            "a transcoder": self.d_out is not None,
            "a skip connection": self.skip,
            f"normalization={self.normalization!r}": self.normalization
            not in ("none", *normalization),
            "an activation_scale": self.activation_scale,
        }
        if any(extras.values()):
            found = ", ".join(name for name, present in extras.items() if present)
            raise FastsaeError(
                f"sae: {what} needs a plain autoencoder, and this one has or is: {found}"
            )

    @property
    def width_out(self) -> int:
        """Dimensions of a reconstruction."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def has_threshold(self) -> bool:
        return self.activation in ("jumprelu", "batchtopk")


class InputNorm(NamedTuple):
    """How to undo the normalization of a row: x̂ = x̂ₙ·scale + shift."""

    scale: Tensor  # [..., 1]
    shift: Tensor  # [..., 1]


class Latents(NamedTuple):
    """The active latents of every token.

    A row's active latents come first in descending order of value (NaN before everything, ties:
    lower index), then padding with value 0 and indices the row does not use otherwise.
    """

    values: Tensor  # [..., K] float32 (float64 for float64)
    indices: Tensor  # [..., K] int32, distinct inside a row
    counts: Tensor  # [...] int32, number of active latents of the row; a NaN is active
    d_sae: int
    norm: InputNorm | None = None  # of an SAE that normalises its input

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


def _descending(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] in the order of Latents: active first, descending, then unused indices."""
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return relu_with_padding(values, indices.gather(1, order))


class SAE(nn.Module):
    """A sparse autoencoder: `encode` to Latents, `decode` back, `sae(x)` for both.

    Parameters W_enc [d_sae, d_in] and W_dec [d_sae, d_out] are row-contiguous (d_out = d_in but for
    transcoders); b_enc [d_sae], b_dec [d_out]; threshold [d_sae] for jumprelu and batchtopk and
    activation_scale [d_sae] stay float32 when the rest is halved; W_skip [d_out, d_in].
    `stats` holds FeatureStats when the checkpoint has them. A new SAE has unit-norm random decoder
    rows, W_enc = W_dec (random rows for a transcoder), and zeros elsewhere.
    """

    def __init__(self, config: SAEConfig, *, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        dtype, f, d = DTYPES[config.dtype], config.d_sae, config.d_in

        def unit_rows(width: int) -> Tensor:
            return nn.functional.normalize(torch.randn(f, width, device=device), dim=-1).to(dtype)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        decoder = unit_rows(config.width_out)
        self.W_enc = nn.Parameter(decoder.clone() if config.d_out is None else unit_rows(d))
        self.W_dec = nn.Parameter(decoder)
        self.b_enc, self.b_dec = zeros(f), zeros(config.width_out)
        # θ is compared with fp32 pre-activations: a half-precision θ moves the gate.
        exact = torch.promote_types(dtype, torch.float32)
        if config.has_threshold:
            self.threshold = zeros(f, dtype=exact)
        if config.activation_scale:
            self.activation_scale = nn.Parameter(torch.ones(f, device=device, dtype=exact))
        if config.skip:
            self.W_skip = zeros(config.width_out, d)
        self.stats: FeatureStats | None = None

    def _apply(self, fn, recurse=True):
        names = [name for name in _EXACT if name in self._parameters]
        exact = {name: self._parameters[name].data for name in names}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            parameter = self._parameters[name]
            if parameter.dtype in (torch.bfloat16, torch.float16):
                # A cast of the module moves θ but must not round it: that would move the gates.
                parameter.data = before.to(parameter.device, torch.float32)
        name = str(self.W_enc.dtype).removeprefix("torch.")
        if name != self.config.dtype:
            self.config = dataclasses.replace(self.config, dtype=name)
        return self

    def extra_repr(self) -> str:
        c = self.config
        k = f", k={c.k}" if c.k else ""
        extra = "" if c.d_out is None else f", d_out={c.d_out}"
        extra += ", skip" if c.skip else ""
        extra += "" if c.normalization == "none" else f", {c.normalization}"
        where = f"d_in={c.d_in}, d_sae={c.d_sae}, hook={c.hook_name}"
        return f"{c.activation}{k}, {where}, {c.dtype}{extra}"

    def encode(self, x: Tensor) -> Latents:
        """The active latents of x [..., d_in].

        topk and groupmax give K = k; the others K = the largest number of active latents in the
        batch. Values are float32 (float64 for float64) whatever the type of x and of the weights.
        Differentiable in x and the weights through `values`.
        """
        c = self.config
        x, norm = self._normalised(self._flattened(x))
        b_dec = self.b_dec if c.apply_b_dec_to_input else None
        if c.activation == "topk":
            values, indices = ops.encode_topk(x, self.W_enc, self.b_enc, c.k, b_dec=b_dec)
        elif c.activation == "groupmax":
            values, indices = self._groupmax(x, b_dec)
        else:
            threshold = self.threshold if c.has_threshold else self.b_enc.new_zeros(c.d_sae)
            values, indices, offsets = ops.encode_threshold(
                x, self.W_enc, self.b_enc, threshold, b_dec=b_dec
            )
            values, indices, _ = csr_to_padded(values, indices, offsets)
            values, indices = _descending(values, indices)
            shape = (*x.shape[:-1], values.shape[-1])
            values, indices = values.view(shape), indices.view(shape)
        if c.activation_scale:
            shape, width = values.shape, values.shape[-1]
            scaled = values * self.activation_scale.to(values.dtype)[indices.long()]
            values, indices = _descending(scaled.view(-1, width), indices.view(-1, width))
            values, indices = values.view(shape), indices.view(shape)
        counts = (values.detach() != 0).sum(-1, dtype=torch.int32)
        return Latents(values, indices, counts, c.d_sae, norm)

    def decode(self, z: "Latents | Tensor") -> Tensor:
        """x̂ = Σ_k values_k W_dec[indices_k] + b_dec, its input's normalization undone.

        z is Latents or a dense [..., d_sae] tensor; of an SAE that normalises its input only the
        Latents of `encode`, which remember how. The skip connection of one that has it needs x and
        is added by `sae(x)` alone. Returns [..., d_out] of the promoted dtype of the values and
        W_dec: float32 for the Latents of a half-precision SAE.
        """
        c = self.config
        undone = c.normalization != "none" and c.d_out is None
        if isinstance(z, Latents):
            if z.d_sae != c.d_sae:
                raise FastsaeError(f"z: has d_sae = {z.d_sae}, this SAE has {c.d_sae}")
            if undone != (z.norm is not None):
                raise FastsaeError(
                    f"z: the Latents of an SAE with another normalization than {c.normalization!r}"
                )
            out = ops.decode(z.values, z.indices, self.W_dec, self.b_dec)
            return out if z.norm is None else out * z.norm.scale + z.norm.shift
        if undone:
            raise FastsaeError(
                f"z: a dense code does not know the {c.normalization} of its input; pass the "
                "Latents of encode (z._replace(values=...) edits them)"
            )
        return decode_dense(z, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, `decode(encode(x))`, plus W_skip x with a skip connection."""
        flat = self._flattened(x)
        out = self.decode(self.encode(flat))
        if self.config.skip:
            with full_precision(flat.device):
                out = out + flat.to(out.dtype) @ self.W_skip.to(out.dtype).T
        return out if flat is x else out.view(x.shape)

    def _flattened(self, x: Tensor) -> Tensor:
        """x with heads [..., heads, d_head] merged, where the SAE reads hook_z."""
        width = self.config.d_in
        if self.config.reshape != "hook_z" or not isinstance(x, Tensor) or x.dim() < 2:
            return x
        if x.shape[-1] == width or x.shape[-2] * x.shape[-1] != width:
            return x
        return x.flatten(-2)

    def _normalised(self, x: Tensor) -> tuple[Tensor, InputNorm | None]:
        kind = self.config.normalization
        if kind == "none":
            return x, None
        check.rows("x", x, self.config.d_in)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if kind == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            shift = torch.zeros_like(scale)
            x = x / torch.where(scale == 0, 1, scale)  # a zero row has no direction to rescale
        else:
            shift = x.mean(dim=-1, keepdim=True)
            x = x - shift
            scale = torch.ones_like(shift)
            if kind == "layer_norm":
                scale = x.std(dim=-1, keepdim=True)
                x = x / (scale + LAYER_NORM_EPS)
        return x, InputNorm(scale, shift) if self.config.d_out is None else None

    def _groupmax(self, x: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor]:
        """The largest pre-activation of each group: k encodes of one, never [N, d_sae]."""
        size = self.config.d_sae // self.config.k
        found = [
            ops.encode_topk(x, W, b, 1, b_dec=b_dec)
            for W, b in zip(self.W_enc.split(size), self.b_enc.split(size), strict=True)
        ]
        values = torch.cat([each.view(-1, 1) for each, _ in found], -1)
        starts = torch.arange(0, self.config.d_sae, size, dtype=torch.int32, device=x.device)
        indices = torch.cat([each.view(-1, 1) for _, each in found], -1) + starts
        values, order = values.sort(dim=-1, descending=True, stable=True)
        shape = (*x.shape[:-1], self.config.k)
        return values.view(shape), indices.gather(1, order).view(shape)

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
        compat: str = "authors",
        overrides: dict[str, Any] | None = None,
    ) -> "SAE":
        """Load an SAE of any family from a folder, a file or a Hugging Face repository.

        sae_id is a folder or file inside it; `revision` a branch, tag or commit of the repository.
        The family is found by content unless `format` names it (docs/formats.md lists them).
        `overrides` are entries of the checkpoint's config that it lacks or has wrong, such as
        {"k": 50} or SAELens' {"norm_scaling_factor": s}. Where SAELens reads a family differently
        from its authors, `compat="saelens"` gives SAELens' numbers. dtype defaults to float32;
        thresholds stay float32 whatever it is. Errors name the file, what was found, and the fix.
        """
        from fastsae.formats import load

        name = str(dtype or torch.float32).removeprefix("torch.")
        check.one_of("dtype", name, tuple(DTYPES))
        config, state, stats = load(
            path_or_repo,
            sae_id,
            format=format,
            revision=revision,
            compat=compat,
            overrides=overrides,
        )
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
        """Write cfg.json, the weights as safetensors, and fastsae.json with our statistics.

        format: "saelens" (version 6) or "sparsify". What a format cannot express is refused.
        """
        from fastsae.formats import save

        state = {name: p.detach().contiguous().cpu() for name, p in self.state_dict().items()}
        save(Path(directory), self.config, state, self.stats, format=format)
