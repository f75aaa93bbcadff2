"""Hook points: the names five projects give to a place in a model, and the module they mean.

| notation | example |
|---|---|
| TransformerLens, SAELens | blocks.12.hook_resid_post, blocks.3.attn.hook_z, hook_embed |
| Hugging Face, Gemma Scope 2 | model.layers.3.post_feedforward_layernorm.output |
| sparsify | layers.10, h.3.attn, layers.10.mlp: the output of a module |
| interp-engine | resid_post.16 |

`hidden_states` of transformers is not one of them: its last entry comes after the final norm, and
`blocks.L.hook_resid_post` of the last layer before it. Modules are hooked here, so it does not
matter.
"""

import dataclasses
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae import places
from fastsae.errors import FastsaeError
from fastsae.models import residual_of

# site -> (name inside a TransformerLens block, module path in a Llama layer, side)
SITES = {
    "resid_pre": ("hook_resid_pre", "", "input"),
    "resid_mid": ("hook_resid_mid", "post_attention_layernorm", "input"),
    "resid_post": ("hook_resid_post", "", "output"),
    "attn_z": ("attn.hook_z", "self_attn.o_proj", "input"),
    "attn_out": ("hook_attn_out", "self_attn", "output"),
    "mlp_residual": ("hook_mlp_in", "post_attention_layernorm", "input"),
    "mlp_normalized": ("ln2.hook_normalized", "post_attention_layernorm", "normalized"),
    "mlp_in": ("mlp.hook_in", "mlp", "input"),
    "mlp_post": ("mlp.hook_post", "mlp.down_proj", "input"),
    "mlp_out": ("hook_mlp_out", "mlp", "output"),
}
_TL = {name: site for site, (name, _, _) in SITES.items()}
_EMBED = {"hook_embed", "embed", "embed_tokens", "wte", "embed_in"}
# Module names of the families, in the order they are looked for.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION_END = ("o_proj", "c_proj", "dense", "out_proj", "wo")
_MLP_END = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2")
_LIST = r"(?:layers|h|blocks|block)"
_PATH = re.compile(rf"^(?:[A-Za-z_]\w*\.)*?{_LIST}\.(\d+)((?:\.\w+)*?)(?:\.(input|output))?$")


@dataclasses.dataclass(frozen=True)
class HookPoint:
    """A place in a model: a site of a layer (0-based), or the side of a module in it.

    `site` is a key of SITES, "embed" (layer None), or "module" with a `path` inside the layer.
    """

    layer: int | None
    site: str
    path: str = ""
    side: str = ""

    @classmethod
    def parse(cls, text: "str | HookPoint") -> "HookPoint":
        """Any of the notations above; what is none of them is an error that lists them."""
        if isinstance(text, HookPoint):
            return text
        name = text.strip() if isinstance(text, str) else ""
        bare = name.removesuffix(".output").rpartition(".")[2]
        if bare in _EMBED:
            return cls(None, "embed")
        if found := re.match(r"^blocks\.(\d+)\.(.+)$", name):
            if found.group(2) in _TL:
                return cls(int(found.group(1)), _TL[found.group(2)])
            if "hook_" in found.group(2):
                raise _unknown(text, f"; in TransformerLens' notation {', '.join(_TL)} are known")
        if found := re.match(r"^(\w+)\.(\d+)$", name):
            if found.group(1) in SITES:
                return cls(int(found.group(2)), found.group(1))
        if found := _PATH.match(name):
            layer, path, side = int(found.group(1)), found.group(2)[1:], found.group(3) or "output"
            if not path:
                return cls(layer, "resid_pre" if side == "input" else "resid_post")
            return cls(layer, "module", path, side)
        raise _unknown(text)

    @property
    def tl(self) -> str | None:
        """TransformerLens' name, or None: a module path means different sites in different models,
        but for the projections that every family has."""
        if self.site == "embed":
            return "hook_embed"
        if self.site in SITES:
            return f"blocks.{self.layer}.{SITES[self.site][0]}"
        parent, _, leaf = self.path.rpartition(".")
        if self.side == "input" and parent in _ATTENTION and leaf in _ATTENTION_END:
            return f"blocks.{self.layer}.attn.hook_z"
        if self.side == "input" and parent in _MLP and leaf in _MLP_END:
            return f"blocks.{self.layer}.mlp.hook_post"
        if self.side == "input" and self.path in _MLP:
            return f"blocks.{self.layer}.mlp.hook_in"
        if self.side == "output" and self.path == "post_feedforward_layernorm":
            return f"blocks.{self.layer}.hook_mlp_out"
        return None

    @property
    def hf(self) -> str:
        """The module and side in a Llama's names; `locate` finds them in any model."""
        if self.site == "embed":
            return "embed_tokens.output"
        path, side = (self.path, self.side) if self.site == "module" else SITES[self.site][1:]
        return ".".join(part for part in (f"layers.{self.layer}", path, side) if part)


class Place(NamedTuple):
    """Where to hook: `read` takes what a forward hook of `module` receives."""

    module: nn.Module
    side: str  # "input", "output", or "normalized": a norm's output before its weight
    path: str  # of the module in the model

    def read(self, inputs: tuple, output: "Tensor | tuple") -> Tensor:
        """The activation [..., d], from the arguments and the result of a forward hook."""
        if self.side == "output":
            return residual_of(output)
        value = residual_of(inputs)
        return value if self.side == "input" else _normalized(self.module, value)


def locate(model: nn.Module, hook: "str | HookPoint") -> Place:
    """The module of a Hugging Face model and its side, by duck typing: no family is named.

    Raises FastsaeError when the model has no such layer, module or stream: models that run
    attention and MLP in parallel have no residual between them.
    """
    point = HookPoint.parse(hook)
    if point.site == "embed":
        module = model.get_input_embeddings()
        return Place(module, "output", _path_of(model, module))
    module, side = _in_layer(model, point)
    return Place(module, side, _path_of(model, module))


def _in_layer(model: nn.Module, point: HookPoint) -> tuple[nn.Module, str]:
    layer, _ = places.site(model, point.layer, "resid_post")
    if point.site == "module":
        return _by_path(layer, point.path), point.side
    if point.site in places.POINTS:
        return places.site(model, point.layer, point.site)
    if point.site == "attn_z":
        return _child(_child(layer, _ATTENTION), _ATTENTION_END), "input"
    if point.site == "mlp_post":
        return _child(_child(layer, _MLP), _MLP_END), "input"
    module, side = places.site(model, point.layer, "resid_mid")
    if point.site == "mlp_residual":
        return module, side
    if any(getattr(layer, name, None) is module for name in _MLP):
        raise FastsaeError(f"hook: {type(layer).__name__} has no norm before its MLP")
    return module, "normalized"


def _by_path(layer: nn.Module, path: str) -> nn.Module:
    module = layer
    for part in path.split("."):
        alike = next((group for group in (_ATTENTION, _MLP) if part in group), (part,))
        module = _child(module, (part, *alike))
    return module


def _child(parent: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        if isinstance(getattr(parent, name, None), nn.Module):
            return getattr(parent, name)
    found = ", ".join(name for name, _ in parent.named_children()) or "no modules"
    raise FastsaeError(f"hook: {type(parent).__name__} has no {names[0]}; it has {found}")


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm's output before its weight and bias, in float32 as the models compute it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = next((getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n)), None)
    if eps is None:
        raise FastsaeError(f"hook: cannot find the epsilon of {type(norm).__name__}")
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _unknown(text: object, more: str = "") -> FastsaeError:
    return FastsaeError(
        f"hook: cannot place {text!r}; accepted are blocks.N.hook_resid_post and its like, "
        f"resid_post.N, and a module path such as layers.N.mlp.output{more}"
    )
