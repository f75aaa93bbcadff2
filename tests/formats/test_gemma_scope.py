"""Gemma Scope 1 and 2, by their formulas: jumprelu, nothing subtracted, affine transcoders."""

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastsae import SAE

D, F = 6, 12


def write_1(folder, w, lower=False):
    keys = {"W_enc": w.W_enc.T, "W_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    keys["threshold"] = w.theta
    folder.mkdir(parents=True)
    arrays = {n.lower() if lower else n: t.contiguous().numpy() for n, t in keys.items()}
    numpy.savez(folder / "params.npz", **arrays)
    return folder


def write_2(folder, w, affine=False, **cfg):
    keys = {"w_enc": w.W_enc.T, "w_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    keys["threshold"] = w.theta
    if affine:
        keys["affine_skip_connection"] = w.skip.T
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in keys.items()}, folder / "params.safetensors")
    if cfg:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | cfg))
    return folder


def jumprelu(w):
    h = w.x @ w.W_enc.T + w.b_enc
    return torch.where(h > w.theta, h, 0).relu()


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(
    "release,hook",
    [
        ("gemma-scope-2b-pt-res", "blocks.20.hook_resid_post"),
        ("gemma-scope-9b-pt-mlp", "blocks.20.hook_mlp_out"),
        ("gemma-scope-9b-it-att", "blocks.20.attn.hook_z"),
    ],
)
def test_gemma_scope_1(tmp_path, draw, agrees, release, hook, lower):
    w = draw(f=F)
    sae_id = "layer_20/width_16k/average_l0_71"
    write_1(tmp_path / release / sae_id, w, lower)
    sae = SAE.from_pretrained(tmp_path / release, sae_id)
    agrees(sae, w.x, jumprelu(w), w.decode(jumprelu(w)))
    c = sae.config
    assert (c.hook_name, c.d_out, c.apply_b_dec_to_input) == (hook, None, False)
    assert c.model_name == "google/gemma-2-" + release[12:].rpartition("-")[0].replace("-pt", "")
    assert c.reshape == ("hook_z" if "att" in release else "none")


def test_gemma_scope_1_transcoders(tmp_path, draw, agrees):
    w = draw(f=F)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_8"
    sae = SAE.from_pretrained(write_1(folder, w))
    agrees(sae, w.x, jumprelu(w), w.decode(jumprelu(w)))
    assert sae.config.hook_name == "blocks.3.ln2.hook_normalized"
    assert sae.config.hook_name_out == "blocks.3.hook_mlp_out" and sae.config.d_out == D


def test_gemma_scope_1_embeddings(tmp_path, draw, agrees):
    """Trained on embeddings without their √d; the model's embedding module gives them with it."""
    w = draw(f=F)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    sae = SAE.from_pretrained(write_1(folder, w))
    h = (w.x / D**0.5) @ w.W_enc.T + w.b_enc
    code = torch.where(h > w.theta, h, 0).relu()
    agrees(sae, w.x, code, code @ w.W_dec * D**0.5 + w.b_dec)
    assert sae.config.hook_name == "hook_embed"


@pytest.mark.parametrize("parent", ["embedding", "transcoders", "layer_9"])
def test_folders_of_the_users_own_mean_nothing(tmp_path, draw, agrees, parent):
    w, release = draw(f=F), tmp_path / parent / "gemma-scope-2b-pt-res"
    sae = SAE.from_pretrained(write_1(release / "layer_20/width_16k/average_l0_71", w))
    agrees(sae, w.x, jumprelu(w), w.decode(jumprelu(w)))
    assert sae.config.hook_name == "blocks.20.hook_resid_post" and sae.config.d_out is None
    sae = SAE.from_pretrained(write_2(tmp_path / parent / "2" / "resid_post" / "layer_3_w", w))
    assert sae.config.hook_name == "model.layers.3.output" and sae.config.d_out is None


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    "site,place",
    [
        ("resid_post", "model.layers.3.output"),
        ("attn_out_all", "model.layers.3.self_attn.o_proj.input"),
        ("mlp_out", "model.layers.3.post_feedforward_layernorm.output"),
    ],
)
def test_gemma_scope_2(tmp_path, draw, agrees, site, place, with_config):
    w = draw(f=F)
    given = {"hf_hook_point_in": place, "model_name": "gemma-v3-1b"} if with_config else {}
    sae = SAE.from_pretrained(write_2(tmp_path / site / "layer_3_width_16k_l0_small", w, **given))
    agrees(sae, w.x, jumprelu(w), w.decode(jumprelu(w)))
    assert sae.config.hook_name == place and sae.config.d_out is None


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("d_out", [D, 4])
@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoders(tmp_path, draw, agrees, affine, d_out, with_config):
    w = draw(f=F, d_out=d_out)
    norms = "model.layers.3.{}_feedforward_layernorm.output"
    given = {"hf_hook_point_in": norms.format("pre"), "hf_hook_point_out": norms.format("post")}
    given = given | {"affine_connection": affine} if with_config else {}
    site = "transcoder_affine" if affine else "transcoder"
    sae = SAE.from_pretrained(write_2(tmp_path / site / "layer_3_width_16k", w, affine, **given))
    skip = w.x @ w.skip.T if affine else 0
    agrees(sae, w.x, jumprelu(w), w.decode(jumprelu(w)) + skip)
    c = sae.config
    assert (c.d_out, c.skip) == (d_out, affine)
    assert (c.hook_name, c.hook_name_out) == (norms.format("pre"), norms.format("post"))
    sae.save_pretrained(tmp_path / "again")
    metadata = json.loads((tmp_path / "again" / "cfg.json").read_text())["metadata"]
    assert metadata["hf_hook_name"] == c.hook_name  # TransformerLens has no name for it
    assert metadata["hook_name_out"] == "blocks.3.hook_mlp_out"
    (tmp_path / "again" / "fastsae.json").unlink()
    again = SAE.from_pretrained(tmp_path / "again")
    assert torch.equal(again(w.x), sae(w.x)) and again.config.hook_name == c.hook_name


def test_the_affine_flag_must_be_true(tmp_path, draw, fails):
    folder = write_2(tmp_path / "transcoder" / "layer_3", draw(f=F), affine_connection=True)
    fails(folder, "affine_connection is True, but the weights lack affine_skip_connection")


def test_cross_layer_transcoders_are_refused(tmp_path, draw, fails):
    """SAELens sums the output layers: right activations, wrong reconstruction."""
    w = draw(f=F)
    keys = {"w_enc": w.W_enc.T.contiguous(), "w_dec": w.W_dec.expand(3, F, D).contiguous()}
    keys |= {"b_enc": w.b_enc, "b_dec": w.b_dec, "threshold": w.theta}
    save_file(keys, tmp_path / "clt_layer_3.safetensors")
    fails(tmp_path / "clt_layer_3.safetensors", "a cross-layer transcoder (CLT)", "per-layer")
    names = {"W_enc_0": w.W_enc, "b_enc_0": w.b_enc, "b_dec_0": w.b_dec}
    save_file({n: t.contiguous() for n, t in names.items()}, tmp_path / "W_enc_0.safetensors")
    fails(tmp_path, "a cross-layer transcoder (CLT)", sae_id="W_enc_0.safetensors")


@pytest.mark.parametrize("turned", [False, True])
def test_orientation_is_read_from_the_shapes(tmp_path, draw, agrees, turned):
    w = draw(f=F)
    folder = write_2(tmp_path / "resid_post" / "layer_3", w)
    keys = {"w_enc": w.W_enc, "w_dec": w.W_dec.T} if turned else {"w_enc": w.W_enc.T}
    keys = {"w_dec": w.W_dec} | keys | {"b_enc": w.b_enc, "b_dec": w.b_dec, "threshold": w.theta}
    save_file({n: t.contiguous() for n, t in keys.items()}, folder / "params.safetensors")
    agrees(SAE.from_pretrained(folder), w.x, jumprelu(w), w.decode(jumprelu(w)))


def test_a_half_precision_file_keeps_its_threshold(tmp_path, draw):
    w = draw(f=F)
    keys = {"w_enc": w.W_enc.T, "w_dec": w.W_dec, "b_enc": w.b_enc, "b_dec": w.b_dec}
    keys = {n: t.bfloat16().contiguous() for n, t in keys.items()} | {"threshold": w.theta}
    (tmp_path / "resid_post").mkdir()
    save_file(keys, tmp_path / "resid_post" / "params.safetensors")
    sae = SAE.from_pretrained(tmp_path / "resid_post", dtype=torch.bfloat16)
    assert torch.equal(sae.threshold, w.theta) and sae.W_enc.dtype == torch.bfloat16
