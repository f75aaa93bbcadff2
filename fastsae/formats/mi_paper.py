"""The SAEs of Wu et al., arXiv 2502.15576: {class}_l{layer}_h{width}_epoch{n}.pth.

Tied: one matrix encodes and decodes, and its rows are not of unit norm. The input is centred by
b_dec. TopK classes rank signed pre-activations; others are ReLU. Layers are counted from 1 in the
file's name: l8 is layers.7. `mask` is not part of the formula; one that tells features apart is
refused. Source: the released checkpoints' own keys and shapes, and the paper.
"""

import torch

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "mi_paper"
_KEYS = {"W_enc", "b_enc", "b_dec"}


def detect(c: Checkpoint) -> bool:
    return c.keys >= {"weight", "config"} and isinstance(c.tensors["weight"], dict)


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    parts.require_keys(c, NAME, {"weight", "config"})
    weight, cfg = c.tensors["weight"], c.tensors["config"]
    if not isinstance(cfg, dict):
        raise FastsaeError(f"{c.source}: config is {type(cfg).__name__}, expected a dictionary")
    c = c.replace(cfg={**cfg, **c.cfg}, tensors=weight)
    parts.require_keys(c, NAME, _KEYS, {"mask"})
    d_sae, d_in = parts.vector(c, "b_enc").numel(), parts.vector(c, "b_dec").numel()
    parts.agree(c, d_inp=d_in, d_hide=d_sae)
    mask = c.tensors.get("mask")
    if isinstance(mask, torch.Tensor) and mask.numel() and bool((mask != mask.flatten()[0]).any()):
        raise parts.refuse(c, "a mask that switches features off")
    W = parts.matrix(c, "W_enc", d_sae, d_in, stored="columns")
    file = c.name.rpartition("/")[2].lower()
    layer = parts.number_in(file, r"_l(\d+)_")
    k = c.cfg.get("topK")
    topk = k is not None and (file.startswith("topk") or not file.startswith(("sae", "ae")))
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation="topk" if topk else "relu",
        k=k if topk else None,
        hook_name=f"blocks.{layer - 1}.hook_resid_post" if layer else None,
    )
    state = {"W_enc": W, "W_dec": W}
    return config, state | {name: parts.vector(c, name) for name in ("b_enc", "b_dec")}
