"""EleutherAI sparsify: cfg.json + sae.safetensors, a folder per hook point (and seed).

Read and written: topk and groupmax, transcode, skip_connection. ReLU then top-k there is top-k then
ReLU here: the same dense code. The folder's name is the hook point, a module under the base model;
its output, and a transcoder's input is the same module's input. Source: sparsify 1.3.3.
"""

import dataclasses
import re
from typing import Any

from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "sparsify"
WEIGHTS = "sae.safetensors"
_KEYS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}


def detect(c: Checkpoint) -> bool:
    return c.keys >= {"encoder.weight", "W_dec"} and "k" in c.cfg


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    skip = parts.option(c, "skip_connection", False)
    transcode = parts.option(c, "transcode", False)
    if parts.option(c, "signed", False):
        raise parts.refuse(c, "signed = true (negative activations)")
    parts.require_keys(c, NAME, _KEYS | ({"W_skip"} if skip else set()))
    d_sae, d_in = parts.vector(c, "encoder.bias").numel(), parts.vector(c, "b_dec").numel()
    latents = c.cfg.get("num_latents") or d_in * c.cfg.get("expansion_factor", d_sae / d_in)
    parts.agree(c, d_in=d_in)
    if latents != d_sae:
        raise FastsaeError(f"{c.source}: the config says {latents} latents, the biases {d_sae}")
    state = {
        "W_enc": parts.matrix(c, "encoder.weight", d_sae, d_in, stored="rows", strict=True),
        "W_dec": parts.matrix(c, "W_dec", d_sae, d_in, stored="rows", strict=True),
        "b_enc": parts.vector(c, "encoder.bias", d_sae),
        "b_dec": parts.vector(c, "b_dec", d_in),
    }
    if skip:
        state["W_skip"] = parts.matrix(c, "W_skip", d_in, d_in, stored="rows", strict=True)
    hook = _hook(c)
    activation = c.cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise parts.refuse(c, f"activation = {activation!r}")
    both_sides = transcode and hook is not None
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation=activation,
        k=c.cfg.get("k"),
        apply_b_dec_to_input=not transcode,
        hook_name=f"{hook}.input" if both_sides else hook,
        d_out=d_in if transcode else None,
        hook_name_out=f"{hook}.output" if both_sides else None,
        skip=skip,
    )
    return config, state


def _hook(c: Checkpoint) -> str | None:
    """The folder's name where it is a module path: layers.10, h.3.attn, embed_tokens."""
    name = c.folder.name
    known = re.match(r"^(\w+\.)*(layers|h|blocks)\.\d+(\.\w+)*$", name) or name == "embed_tokens"
    return name if known else None


def from_fastsae(
    config: SAEConfig, state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], SAEConfig]:
    c = config
    wrong = {
        f"activation={c.activation!r}": c.activation not in ("topk", "groupmax"),
        f"normalization={c.normalization!r}": c.normalization != "none",
        "an activation_scale": c.activation_scale,
        "heads (reshape='hook_z')": c.reshape != "none",
        f"d_out = {c.d_out} beside d_in = {c.d_in}": c.width_out != c.d_in,
    }
    if any(wrong.values()):
        what = ", ".join(each for each, present in wrong.items() if present)
        raise FastsaeError(f"format: sparsify has no form for {what}; save in another format")
    tensors = dict(state)
    if c.d_out is None and not c.apply_b_dec_to_input:
        # sparsify always subtracts b_dec from an autoencoder's input: give it back to the bias.
        shift = state["W_enc"].double() @ state["b_dec"].double()
        tensors["b_enc"] = (state["b_enc"].double() + shift).to(state["b_enc"].dtype)
        config = dataclasses.replace(config, apply_b_dec_to_input=True)
    tensors["encoder.weight"] = tensors.pop("W_enc")
    tensors["encoder.bias"] = tensors.pop("b_enc")
    cfg = {
        "activation": c.activation,
        "expansion_factor": max(1, c.d_sae // c.d_in),
        "normalize_decoder": False,  # for training on: the rows are used as they are
        "num_latents": c.d_sae,
        "k": c.k,
        "multi_topk": False,
        "skip_connection": c.skip,
        "transcode": c.d_out is not None,
        "d_in": c.d_in,
    }
    return cfg, tensors, config
