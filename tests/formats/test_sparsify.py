"""sparsify: topk, groupmax, transcode, skip; hook-point and seed folders; writing it back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import SAE, FastsaeError

D, F, K = 6, 12, 3


def write(folder, w, f=F, **cfg):
    tensors = {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc}
    tensors |= {"W_dec": w.W_dec, "b_dec": w.b_dec}
    if cfg.get("skip_connection"):
        tensors["W_skip"] = w.skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae.safetensors")
    base = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True}
    base |= {"num_latents": 0, "k": K, "multi_topk": False, "skip_connection": False}
    base |= {"transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(base | cfg))
    return folder


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_the_formula(tmp_path, draw, topk, agrees, transcode, skip, activation):
    w = draw(f=F)
    options = {"transcode": transcode, "skip_connection": skip, "activation": activation}
    sae = SAE.from_pretrained(write(tmp_path / "layers.3.mlp", w, **options))
    h = (w.x if transcode else w.x - w.b_dec) @ w.W_enc.T + w.b_enc
    if activation == "groupmax":
        best = h.unflatten(-1, (K, F // K))
        code = torch.where(best == best.amax(-1, keepdim=True), best, 0).relu().flatten(-2)
    else:
        code = topk(h, K)
    agrees(sae, w.x, code, w.decode(code) + (w.x @ w.skip.T if skip else 0))
    c = sae.config
    assert (c.activation, c.k, c.skip, c.d_out) == (activation, K, skip, D if transcode else None)
    places = ("layers.3.mlp.input", "layers.3.mlp.output") if transcode else ("layers.3.mlp", None)
    assert (c.hook_name, c.hook_name_out) == places
    sae.save_pretrained(tmp_path / "again", format="sparsify")
    stored = load_file(tmp_path / "layers.3.mlp" / "sae.safetensors")
    written = load_file(tmp_path / "again" / "sae.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    again = SAE.from_pretrained(tmp_path / "again")
    assert again.config == c and torch.equal(again(w.x), sae(w.x))


def test_groups_and_ties(tmp_path, draw, agrees):
    """A group without a positive value is silent; a tie goes to the lower index; shapes."""
    w = draw(f=F)
    w.b_enc[:4] = -100
    w.W_enc[5], w.b_enc[5] = w.W_enc[6], w.b_enc[6]
    sae = SAE.from_pretrained(write(tmp_path, w, activation="groupmax"))
    z = sae.encode(w.x)
    dense = z.to_dense()
    assert (dense[:, :4] == 0).all() and (dense[:, 6] == 0).all() and (dense[:, 5] > 0).any()
    assert (z.values.diff(dim=-1) <= 0).all() and z.values.shape[-1] == K
    assert sae.encode(w.x[0]).values.shape == (K,) and sae(w.x.view(6, 10, D)).shape == (6, 10, D)
    assert sae.encode(w.x[:0]).values.shape == (0, K)
    x = w.x.clone().requires_grad_()
    sae(x).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


@pytest.mark.parametrize("name", ["layers.10", "h.3.attn", "model.layers.2.mlp", "embed_tokens"])
def test_hook_point_and_seed_folders(tmp_path, draw, fails, name):
    write(tmp_path / "seed1" / name, draw(f=F))
    write(tmp_path / "seed2" / name, draw(f=F, seed=8))
    assert SAE.from_pretrained(tmp_path, f"seed1/{name}").config.hook_name == name
    fails(tmp_path, "holds several SAEs", f"seed1/{name}, seed2/{name}")


def test_num_latents(tmp_path, draw, fails):
    """0 means expansion_factor · d_in; SAELens takes it as no features at all."""
    w = draw(f=F)
    assert SAE.from_pretrained(write(tmp_path, w, num_latents=0)).config.d_sae == F
    assert SAE.from_pretrained(write(tmp_path, w, num_latents=F)).config.d_sae == F
    fails(write(tmp_path, w, num_latents=11), "the config says 11 latents, the biases 12")


def test_as_many_latents_as_dimensions(tmp_path, draw, topk, agrees):
    """F = D: no shape tells W_dec from its transpose, and it is stored by rows."""
    w = draw(f=D)
    sae = SAE.from_pretrained(write(tmp_path, w, expansion_factor=1))
    code = topk((w.x - w.b_dec) @ w.W_enc.T + w.b_enc, K)
    agrees(sae, w.x, code, w.decode(code))


def test_an_uncentred_autoencoder_is_written_with_its_bias_folded(tmp_path, make):
    sae = make(apply_b_dec_to_input=False)
    sae.save_pretrained(tmp_path, format="sparsify")
    again = SAE.from_pretrained(tmp_path)
    assert again.config.apply_b_dec_to_input and again.config.d_out is None
    x = torch.randn(50, D)
    torch.testing.assert_close(again.encode(x).to_dense(), sae.encode(x).to_dense())
    torch.testing.assert_close(again(x), sae(x))


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"activation": "jumprelu"}, "activation='jumprelu'"),
        ({"normalization": "layer_norm"}, "normalization='layer_norm'"),
        ({"activation_scale": True}, "an activation_scale"),
        ({"reshape": "hook_z"}, "heads"),
        ({"d_out": 4, "apply_b_dec_to_input": False}, "d_out = 4 beside d_in = 6"),
    ],
)
def test_what_sparsify_cannot_say_is_not_written(tmp_path, make, fields, words):
    with pytest.raises(FastsaeError, match="sparsify has no form for") as error:
        make(**fields).save_pretrained(tmp_path / "sae", format="sparsify")
    assert words in str(error.value) and not (tmp_path / "sae").exists()


@pytest.mark.parametrize(
    "cfg,words",
    [
        ({"activation": "relu"}, "activation = 'relu' cannot be represented"),
        ({"signed": True}, "signed = true"),
        ({"transcode": "yes"}, "transcode is 'yes', expected true or false"),
        ({"d_in": 7}, "the config says d_in = 7, the biases say 6"),
        ({"k": 0}, "k: got 0"),
        ({"activation": "groupmax", "k": 5}, "12 features make no 5 equal groups"),
    ],
)
def test_bad_configs(tmp_path, draw, fails, cfg, words):
    fails(write(tmp_path, draw(f=F), **cfg), "sae.safetensors", words)
