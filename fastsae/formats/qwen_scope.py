"""Qwen Scope: layer{n}.sae.pt in a repository SAE-Res-{model}-W{width}K-L0_{k}; top-k, nothing
subtracted from the input. k is in the repository's name only: for a file elsewhere pass
overrides={"k": ...}. Source: the released repositories and SAELens 6.54."""

import re

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "qwen_scope"
_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}


def detect(c: Checkpoint) -> bool:
    return c.suffix == ".pt" and c.keys >= _KEYS and bool(re.search(r"layer\d+\.sae\.pt$", c.name))


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    parts.require_keys(c, NAME, _KEYS)
    d_sae, d_in = parts.vector(c, "b_enc").numel(), parts.vector(c, "b_dec").numel()
    release = re.search(r"SAE-Res-([^/]+)-W(\d+)K-L0_(\d+)", c.name)
    k = c.cfg.get("k", int(release.group(3)) if release else None)
    if k is None:
        raise FastsaeError(
            f"{c.source}: k is in the repository's name (…-L0_50), which this path lacks; pass "
            'overrides={"k": ...}'
        )
    if release and 1024 * int(release.group(2)) != d_sae:
        raise FastsaeError(
            f"{c.source}: its repository says {release.group(2)}K features, the biases {d_sae}"
        )
    layer = parts.number_in(c.name, r"layer(\d+)\.sae\.pt$")
    state = {
        "W_enc": parts.matrix(c, "W_enc", d_sae, d_in, stored="rows"),
        "W_dec": parts.matrix(c, "W_dec", d_sae, d_in, stored="columns"),
        "b_enc": parts.vector(c, "b_enc", d_sae),
        "b_dec": parts.vector(c, "b_dec", d_in),
    }
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation="topk",
        k=k,
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{layer}.hook_resid_post" if layer is not None else None,
        model_name=f"Qwen/{release.group(1)}" if release else None,
    )
    return config, state
