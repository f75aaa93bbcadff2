"""Steering a transcoder, which encodes what an MLP reads and writes what the MLP adds.

With x the input, y the MLP's output and a_s the activations of x, a policy adds its change of the
features' activations to y: amplify y + σ Σ α_s a_s d_s, and so on with the other operations of
MATH.md §4. The steer op does this on rows [x, y]: its encoder rows are [w_s, 0], its decoder rows
[0, d_s], so every activation is of x and every change goes to y. Gates are of x too.
"""

import dataclasses
from collections import Counter

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.places import Place, resolve_place
from fastsae.sae import SAEConfig
from fastsae.steering.policy import Enforce, Policy


def is_transcoder(config: SAEConfig) -> bool:
    return config.d_out is not None


def plain(config: SAEConfig) -> SAEConfig:
    """What is left to check of a transcoder: a skip connection adds the same with any features."""
    return dataclasses.replace(config, d_out=None, hook_name_out=None, skip=False)


def places_of(layer: "int | str | Place | None", config: SAEConfig) -> tuple[Place, Place]:
    """(where it writes, where it reads), both told by the transcoder itself."""
    if config.hook_name is None or config.hook_name_out is None:
        raise FastsaeError(
            "layer: this transcoder does not say where it reads and writes; give its config both, "
            'for instance sae.config = dataclasses.replace(sae.config, hook_name="mlp_in.9", '
            'hook_name_out="mlp_out.9")'
        )
    reads, writes = resolve_place(config.hook_name), resolve_place(config.hook_name_out)
    given = None if layer is None else resolve_place(layer)
    number = isinstance(layer, int) and writes.layer == given.layer
    if given not in (None, writes) and not number:
        raise FastsaeError(
            f"layer: got {layer!r}, but this transcoder writes at {writes} by its "
            "config.hook_name_out; leave layer out, or change its config"
        )
    return writes, reads


def check_policy(policy: Policy) -> None:
    """Refuse what has no meaning, or more than one, on the output of an MLP."""
    features: Counter = Counter()
    for i, operation in enumerate(policy.operations):
        at = f"policy {policy.label}: operations[{i}]"
        if isinstance(operation, Enforce):
            raise FastsaeError(
                f"{at}.op: enforce keeps the length of the residual that it reads, and a "
                "transcoder writes elsewhere; use calibrate"
            )
        features.update(operation.features)
        twice = [feature for feature in operation.features if features[feature] > 1]
        if twice:
            raise FastsaeError(
                f"{at}.features: {twice[0]} is in an earlier operation too; a transcoder's "
                "features are read once, before all operations, so name each in one of them"
            )
    if policy.norm is not None:
        raise FastsaeError(
            f"policy {policy.label}: norm: {policy.norm!r} keeps the length of the residual that a "
            "policy reads, and a transcoder writes elsewhere; leave it out"
        )


def joined(x: Tensor, y: Tensor) -> Tensor:
    """[..., d_in + d_out], in the wider of both types."""
    return torch.cat([x, y], dim=-1)
