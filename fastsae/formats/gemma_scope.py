"""Gemma Scope 1: params.npz in a folder per layer, width and L0.

JumpReLU, nothing subtracted from the input. Residual, MLP and attention SAEs, and transcoders,
which read the pre-MLP norm before its weight. `embedding` SAEs were trained on embeddings without
their √d: folded, for models whose embedding module gives them with it, as transformers' does.
Source: arXiv 2408.05147 and its tutorial.
"""

from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "gemma_scope"
_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_SITES = {"-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"}


def detect(c: Checkpoint) -> bool:
    return c.suffix == ".npz" and {_upper(key) for key in c.keys} >= _KEYS


def _upper(key: str) -> str:
    return "W_" + key[2:] if key.startswith("w_") else key


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    renamed = {_upper(key): values for key, values in c.tensors.items()}
    c = c.replace(tensors=renamed)
    parts.require_keys(c, NAME, _KEYS)
    d_sae, d_out = parts.vector(c, "b_enc").numel(), parts.vector(c, "b_dec").numel()
    state = {
        "W_enc": parts.matrix(c, "W_enc", d_sae, d_out, stored="columns"),
        "W_dec": parts.matrix(c, "W_dec", d_sae, d_out, stored="rows"),
        "b_enc": parts.vector(c, "b_enc", d_sae),
        "b_dec": parts.vector(c, "b_dec", d_out),
        "threshold": parts.exact(parts.vector(c, "threshold", d_sae)),
    }
    folders = c.name.split("/")
    release = next((part for part in folders if part.startswith("gemma-scope-")), "")
    # Folders above the release, or above layer/width/l0/file, are the user's own.
    folders = folders[folders.index(release) if release else -5 :]
    layer = parts.number_in("/".join(folders), r"layer_(\d+)")
    transcoder = any("transcoder" in part for part in folders)
    embedding = "embedding" in folders
    hook = None
    if embedding:
        hook = "hook_embed"
        state = parts.scaled(state, W_enc=d_out**-0.5, W_dec=d_out**0.5)
    elif transcoder and layer is not None:
        hook = f"blocks.{layer}.ln2.hook_normalized"
    elif layer is not None:
        site = next((site for kind, site in _SITES.items() if kind in release), None)
        hook = f"blocks.{layer}.{site}" if site else None
    size = "-".join(release.split("-")[2:4])
    config = parts.config(
        c,
        d_in=d_out,
        d_sae=d_sae,
        activation="jumprelu",
        apply_b_dec_to_input=False,
        hook_name=hook,
        model_name=f"google/gemma-2-{size.removesuffix('-pt')}" if release else None,
        d_out=d_out if transcoder else None,
        hook_name_out=f"blocks.{layer}.hook_mlp_out" if transcoder and hook else None,
        reshape="hook_z" if hook and hook.endswith("hook_z") else "none",
    )
    return config, state
