"""Places inside a decoder layer: which module and which side of it carries an activation.

`site` finds them by the names that transformers gives the parts of a layer.
"""

import inspect
import re
from typing import NamedTuple

from torch import nn

from fastsae import models
from fastsae.errors import FastsaeError
from fastsae.models import Hook

POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")

_SIDES = {"input": "resid_pre", "output": "resid_post"}
_NOTATIONS = (
    re.compile(r"^blocks\.(?P<layer>\d+)\.hook_(?P<point>resid_mid|attn_out|mlp_out)$"),
    re.compile(r"^(?P<point>resid_mid|attn_out|mlp_in|mlp_out)\.(?P<layer>\d+)$"),
    re.compile(
        r"^(?:.*\.)?(?:layers|h|blocks|block)\.(?P<layer>\d+)\."
        r"(?!.*hook_)(?P<point>[A-Za-z_][\w.]*?)(?P<side>\.input|\.output)?$"
    ),
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "feedforward")
# The norm whose input is the residual between attention and MLP.
_MID = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_attention_layernorm",
    "post_attention_norm",
    "ln_2",
    "ffn_norm",
    "pre_ff_layernorm",
    "final_layer_norm",
    "norm_2",
    "ln2",
    "mlp_norm",
    "feedforward_layernorm",
)
# Layers that norm a branch's sum with the residual, or that carry on the normed residual.
_NO_MID = ("minimax", "openai-gpt", "inkling2_text", "deepseek_v4", "hy_v4", "lfm3")
# Models that norm a branch before they add it: (norm of attention, norm of the MLP).
_SANDWICH = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
)


class Place(NamedTuple):
    """A point of decoder layer `layer` (0-based): one of POINTS, or a path such as "mlp.input".

    resid_pre, resid_post: the layer's input and output. resid_mid: the residual between attention
    and MLP. attn_out, mlp_out: what the branch adds to the residual, after the norm some models put
    there. mlp_in: what the MLP reads, after its norm. A path with a side is that module of the
    layer as it is.
    """

    layer: int
    point: str

    def __str__(self) -> str:
        """As `resolve_place` reads it."""
        sides = {point: side for side, point in _SIDES.items()}
        if self.point in sides:
            return f"layers.{self.layer}.{sides[self.point]}"
        dotted = self.point in POINTS
        return f"{self.point}.{self.layer}" if dotted else f"layers.{self.layer}.{self.point}"


def resolve_place(hook: "str | int | Hook | Place") -> Place:
    """Layer and point of a notation: what `models.resolve_hook` reads, and places in a layer.

    blocks.9.hook_resid_mid, blocks.9.hook_attn_out, blocks.9.hook_mlp_out; resid_mid.9,
    attn_out.9, mlp_in.9, mlp_out.9; layers.9.mlp (its output), layers.9.self_attn.input.
    blocks.9.hook_mlp_in and ln2.hook_normalized are errors: TransformerLens means the residual, or
    a norm without its weight, which no module of a transformers model carries.

    >>> resolve_place("blocks.9.hook_mlp_out")
    Place(layer=9, point='mlp_out')
    """
    if isinstance(hook, Place):
        return hook
    try:
        found = models.resolve_hook(hook)
        return Place(found.layer, _SIDES[found.side])
    except FastsaeError as error:
        for pattern in _NOTATIONS if isinstance(hook, str) else ():
            if match := pattern.match(hook):
                point = match["point"]
                if point not in POINTS:
                    point += match["side"] or ".output"
                return Place(int(match["layer"]), point)
        if isinstance(hook, str) and hook:
            raise FastsaeError(
                f"{error}; inside a layer: resid_mid.N, attn_out.N, mlp_in.N, mlp_out.N and "
                "layers.N.MODULE[.input|.output]"
            ) from error
        raise


def site(model: nn.Module, layer: int, point: str) -> tuple[nn.Module, str]:
    """(module, "input" or "output"): where `point` of decoder layer `layer` passes.

    At resid_mid the module is the norm that reads it: replace the tensor *in place* there, for the
    residual goes past the norm too. FastsaeError when the layer has no such place.
    """
    layers = models.decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise FastsaeError(
            f"layer: got {layer}, {type(model).__name__} has layers 0 to {len(layers) - 1}"
        )
    block = layers[layer]
    if point in ("resid_pre", "resid_post"):
        return block, "input" if point == "resid_pre" else "output"
    if point not in POINTS:
        return _by_path(block, layer, point)
    if hasattr(block, "intermediate"):  # BERT and its kin: every branch ends in a norm of the sum
        raise FastsaeError(
            f"layer: {type(block).__name__} norms each branch together with the residual, so it "
            f"has no {point}; take resid_pre or resid_post"
        )
    branch_norms = next((p for p in _SANDWICH if all(hasattr(block, n) for n in p)), None)
    if point == "resid_mid":
        return _mid(model, block, branch_norms), "input"
    if branch_norms and point != "mlp_in":
        return getattr(block, branch_norms[point == "mlp_out"]), "output"
    if point == "attn_out":
        return _child(block, point, _ATTENTION), "output"
    if isinstance(getattr(block, "fc1", None), nn.Module):  # OPT and its kin: no MLP module
        return (block.fc1, "input") if point == "mlp_in" else (block.fc2, "output")
    return _child(block, point, _MLP), "input" if point == "mlp_in" else "output"


def _by_path(block: nn.Module, layer: int, point: str) -> tuple[nn.Module, str]:
    path, _, side = point.rpartition(".")
    try:
        return block.get_submodule(path), side
    except AttributeError as error:
        raise FastsaeError(
            f"layer: layers.{layer} has no module {path!r}; its parts are {_parts(block)}"
        ) from error


def _child(block: nn.Module, point: str, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        found = getattr(block, name, None)
        if isinstance(found, nn.Module):
            if point.endswith("_out") and "residual" in inspect.signature(found.forward).parameters:
                raise FastsaeError(
                    f"layer: {type(found).__name__} adds its own output to the residual, so there "
                    f"is no {point} to read; take resid_mid or resid_post"
                )
            return found
    raise FastsaeError(
        f"layer: {type(block).__name__} has no {point}: none of its parts ({_parts(block)}) is "
        f"called {', '.join(names)}; name the module, for instance layers.0.{_parts(block, 1)}"
    )


def _mid(model: nn.Module, block: nn.Module, branch_norms: tuple[str, str] | None) -> nn.Module:
    """The module that reads the residual between attention and MLP."""
    parallel = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
    config = getattr(model, "config", None)
    normed_sum = (
        getattr(config, "model_type", None) in _NO_MID
        or hasattr(block, "encoder_attn")
        or getattr(block, "do_layer_norm_before", True) is False
        or getattr(block, "apply_residual_connection_post_layernorm", False)
    )
    side_by_side = any(getattr(part, n, False) for part in (block, config) for n in parallel)
    if not normed_sum and not side_by_side:
        for name in _MID:
            used = branch_norms and name in branch_norms
            if not used and isinstance(getattr(block, name, None), nn.Module):
                return getattr(block, name)
        if branch_norms:
            return _child(block, "resid_mid", _MLP)  # norms only after the branches (OLMo 2)
    raise FastsaeError(
        f"layer: {type(block).__name__} has no resid_mid: its attention and MLP read the same "
        "residual, or its norms stand elsewhere than fastsae knows; take resid_pre or resid_post"
    )


def _parts(block: nn.Module, most: int | None = None) -> str:
    return ", ".join([name for name, _ in block.named_children()][:most])
