"""dictionary_learning: every class by its formula, its threshold, its decoder, its mistakes."""

import json

import pytest
import torch

from fastsae import SAE

D, F, K = 6, 12, 3
CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)


def tensors(kind, w, theta=0.4):
    linear = {"encoder.weight": w.W_enc, "encoder.bias": w.b_enc, "decoder.weight": w.W_dec.T}
    k = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(theta)}
    if kind == "AutoEncoder":
        return linear | {"bias": w.b_dec}
    if kind == "AutoEncoderNew":
        return linear | {"decoder.bias": w.b_dec}
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        return linear | {"b_dec": w.b_dec} | k
    if kind == "GatedAutoEncoder":
        gates = {"r_mag": w.b_enc / 2, "gate_bias": w.b_enc, "mag_bias": w.theta - 0.5}
        rest = {"encoder.weight": w.W_enc, "decoder.weight": w.W_dec.T, "decoder_bias": w.b_dec}
        return gates | rest
    plain = {"W_enc": w.W_enc.T, "b_enc": w.b_enc, "W_dec": w.W_dec, "b_dec": w.b_dec}
    if kind == "JumpReluAutoEncoder":
        return plain | {"threshold": w.theta}
    return plain | k | {"group_sizes": torch.tensor([4, 8])}


def write(folder, kind, w, theta=0.4, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({n: t.contiguous() for n, t in tensors(kind, w, theta).items()}, folder / "ae.pt")
    trainer = {"dict_class": kind, "dict_size": F, "activation_dim": D, "layer": 5} | trainer
    trainer |= {"lm_name": "EleutherAI/pythia-70m"}
    cfg = {"trainer": trainer, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def code_of(kind, w, topk, theta=0.4):
    centred = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    h = (w.x - w.b_dec if centred else w.x) @ w.W_enc.T
    if kind == "GatedAutoEncoder":
        mag = (w.b_enc / 2).exp() * h + w.theta - 0.5
        return torch.where(h + w.b_enc > 0, mag.relu(), 0)
    h = h + w.b_enc
    if kind == "AutoEncoderTopK":
        return topk(h, K)
    floor = {"JumpReluAutoEncoder": w.theta}.get(kind, 0.0 if "AutoEncoder" in kind else theta)
    return torch.where(h > floor, h, 0).relu()


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class(tmp_path, draw, topk, agrees, kind):
    w = draw(f=F)
    sae = SAE.from_pretrained(write(tmp_path, kind, w))
    code = code_of(kind, w, topk)
    agrees(sae, w.x, code, w.decode(code))
    assert sae.config.hook_name == "blocks.5.hook_resid_post"
    assert sae.config.model_name == "EleutherAI/pythia-70m"


@pytest.mark.parametrize("kind", ["AutoEncoder", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_classes_that_need_no_config(tmp_path, draw, topk, agrees, kind):
    w = draw(f=F)
    write(tmp_path, kind, w)
    (tmp_path / "config.json").unlink()
    code = code_of(kind, w, topk)
    agrees(SAE.from_pretrained(tmp_path), w.x, code, w.decode(code))


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"])
def test_classes_that_need_one(tmp_path, draw, fails, kind):
    write(tmp_path, kind, draw(f=F))
    (tmp_path / "config.json").unlink()
    fails(tmp_path, "ae.pt", "no known family")


def test_a_threshold_that_was_never_set(tmp_path, draw, topk, agrees):
    """−1: every positive latent is active, and the user is told."""
    w = draw(f=F)
    with pytest.warns(UserWarning, match="threshold was never set"):
        sae = SAE.from_pretrained(write(tmp_path, "BatchTopKSAE", w, theta=-1.0))
    code = ((w.x - w.b_dec) @ w.W_enc.T + w.b_enc).relu()
    agrees(sae, w.x, code, w.decode(code))


def test_unit_decoder_rows_on_request(tmp_path, draw, agrees):
    """The library's from_pretrained multiplies activations by ‖W_dec[f]‖ unless told not to."""
    w = draw(f=F)
    folder = write(tmp_path, "AutoEncoder", w)
    sae = SAE.from_pretrained(folder, overrides={"normalize_decoder": True})
    code = ((w.x - w.b_dec) @ w.W_enc.T + w.b_enc).relu()
    agrees(sae, w.x, code * w.W_dec.norm(dim=1), w.decode(code))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


def test_a_submodule_is_the_hook_point(tmp_path, draw):
    folder = write(tmp_path, "AutoEncoder", draw(f=F), submodule_name="gpt_neox.layers.3.mlp")
    assert SAE.from_pretrained(folder).config.hook_name == "gpt_neox.layers.3.mlp"


@pytest.mark.parametrize(
    "trainer,words",
    [
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict' cannot be represented"),
        ({"dict_size": 13}, "dict_size = 13, the biases say 12"),
        ({"activation_dim": 5}, "activation_dim = 5, the biases say 6"),
        ({"k": 4}, "k = 4, the weights 3"),
        ({"dict_class": "AutoEncoder"}, "missing ['bias'], unknown ['b_dec', 'k', 'threshold']"),
    ],
)
def test_configs_that_disagree(tmp_path, draw, fails, trainer, words):
    fails(write(tmp_path, "BatchTopKSAE", draw(f=F), **trainer), "ae.pt", words)
