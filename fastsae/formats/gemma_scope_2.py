"""Gemma Scope 2: params.safetensors and config.json in {site}[_all]/layer_N_width_W_l0_S.

JumpReLU SAEs and transcoders, these with an affine skip connection where the file has one. The
config gives hook points as module.input or module.output of the Hugging Face model; where it is
missing they follow from the folder. A CLT is refused: its decoder writes to several layers.
Source: the released configs and SAELens 6.54.
"""

from fastsae.errors import FastsaeError
from fastsae.formats import parts
from fastsae.formats.source import Checkpoint
from fastsae.sae import SAEConfig

NAME = "gemma_scope_2"
_KEYS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
_SITES = {  # in a Gemma 3 layer: input, output of a transcoder
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
}


def detect(c: Checkpoint) -> bool:
    return c.suffix == ".safetensors" and c.keys >= _KEYS


def to_fastsae(c: Checkpoint) -> tuple[SAEConfig, parts.State]:
    architecture = c.cfg.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise parts.refuse(c, f"architecture {architecture!r}")
    affine = "affine_skip_connection"
    parts.require_keys(c, NAME, _KEYS, {affine})
    if parts.option(c, "affine_connection", affine in c.keys) != (affine in c.keys):
        raise FastsaeError(
            f"{c.source}: affine_connection is {c.cfg['affine_connection']}, but the weights "
            f"{'have' if affine in c.keys else 'lack'} {affine}"
        )
    hook, hook_out = _hooks(c)
    transcoder = hook_out is not None or affine in c.keys
    d_sae, d_out = parts.vector(c, "b_enc").numel(), parts.vector(c, "b_dec").numel()
    sizes = set(parts.tensor(c, "w_enc").shape) - {d_sae}
    d_in = sizes.pop() if transcoder and len(sizes) == 1 else d_out
    state = {
        "W_enc": parts.matrix(c, "w_enc", d_sae, d_in, stored="columns"),
        "W_dec": parts.matrix(c, "w_dec", d_sae, d_out, stored="rows"),
        "b_enc": parts.vector(c, "b_enc", d_sae),
        "b_dec": parts.vector(c, "b_dec", d_out),
        "threshold": parts.exact(parts.vector(c, "threshold", d_sae)),
    }
    if affine in c.keys:
        state["W_skip"] = parts.matrix(c, affine, d_out, d_in, stored="columns")
    config = parts.config(
        c,
        d_in=d_in,
        d_sae=d_sae,
        activation="jumprelu",
        apply_b_dec_to_input=False,
        hook_name=hook,
        model_name=parts.text(c, "model_name"),
        d_out=d_out if transcoder else None,
        hook_name_out=hook_out,
        skip=affine in c.keys,
        reshape="hook_z" if hook and hook.endswith("o_proj.input") else "none",
    )
    return config, state


def _hooks(c: Checkpoint) -> tuple[str | None, str | None]:
    given = parts.text(c, "hf_hook_point_in"), parts.text(c, "hf_hook_point_out")
    own = c.name.split("/")[-3:]  # site/layer_N…/file: folders above are the user's own
    layer = parts.number_in("/".join(own), r"layer_(\d+)")
    site = next((site for site in _SITES if any(part.startswith(site) for part in own)), None)
    if given[0] is not None or layer is None or site is None:
        # An autoencoder may name its one hook point twice.
        return given[0], given[1] if given[1] != given[0] else None
    return tuple(f"model.layers.{layer}.{each}" if each else None for each in _SITES[site])
