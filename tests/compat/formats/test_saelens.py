"""SAELens writes, we read, and back: the same codes and reconstructions as SAELens' own."""

import json

import pytest
import torch
from sae_lens import SAE as Theirs
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from safetensors.torch import load_file

from fastsae import SAE

D, F, K, OUT = 16, 64, 8, 12
ARCHITECTURES = {
    "standard": {},
    "standard uncentred": {"apply_b_dec_to_input": False},
    "topk": {"k": K},
    "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": OUT, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": OUT, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": OUT, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": OUT, "apply_b_dec_to_input": False},
    "standard layer_norm": {"normalize_activations": "layer_norm"},
    "topk layer_norm": {"k": K, "normalize_activations": "layer_norm"},
    "jumprelu constant": {"normalize_activations": "constant_norm_rescale"},
    "jumprelu_transcoder layer_norm": {
        "d_out": OUT,
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
    },
}


@pytest.fixture
def make(randomise):
    def make(name, **fields):
        architecture = name.split(" ")[0]
        cfg = {"d_in": D, "d_sae": F, "architecture": architecture, "dtype": "float32"}
        cfg |= {"device": "cpu"} | ARCHITECTURES.get(name, {}) | fields
        cfg.setdefault("metadata", {"hook_name": "blocks.3.hook_resid_post"})
        sae = Theirs.from_dict(cfg)
        randomise(sae)
        return sae

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_written_by_saelens(tmp_path, make, agrees, name):
    theirs = make(name)
    theirs.save_model(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    x = torch.randn(150, D) * 2 + 0.5
    agrees(ours, x, theirs.encode(x), theirs(x))
    assert ours.config.hook_name == "blocks.3.hook_resid_post"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_read_by_saelens(tmp_path, make, agrees, name):
    """We read SAELens' file and write our own; SAELens reads ours to the same numbers, and where
    nothing was folded the tensors are the ones it wrote, bit for bit."""
    theirs = make(name)
    theirs.save_model(tmp_path / "theirs")
    ours = SAE.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = Theirs.load_from_disk(tmp_path / "ours")
    x = torch.randn(150, D) * 2 + 0.5
    agrees(ours, x, again.encode(x), again(x))
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=2e-4)
    if name not in ("gated", "topk rescaled"):
        file = "sae_weights.safetensors"
        left, right = load_file(tmp_path / "ours" / file), load_file(tmp_path / "theirs" / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_hook_z(tmp_path, make, agrees):
    metadata = {"hook_name": "blocks.3.attn.hook_z"}
    theirs = make("jumprelu", reshape_activations="hook_z", metadata=metadata)
    theirs.save_model(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    heads = torch.randn(5, 7, 4, D // 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(heads), theirs(heads))
        torch.testing.assert_close(ours.encode(heads).to_dense(), theirs.encode(heads))
    ours.save_pretrained(tmp_path / "ours")
    again = Theirs.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(again(heads), theirs(heads))


def test_expected_average_only_in(tmp_path, make, agrees):
    """SAELens folds the scale of its own list; without it, it warns and computes without."""
    theirs = make("jumprelu", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    theirs.fold_activation_norm_scaling_factor(2.5)
    ours = SAE.from_pretrained(tmp_path, overrides={"norm_scaling_factor": 2.5})
    x = torch.randn(150, D)
    agrees(ours, x, theirs.encode(x), theirs(x))


@pytest.mark.parametrize("rescale", [False, True])
def test_batchtopk(tmp_path, randomise, agrees, rescale):
    """A training checkpoint and the inference model that SAELens makes of it: the same numbers."""
    cfg = BatchTopKTrainingSAEConfig(D, F, k=K, rescale_acts_by_decoder_norm=rescale)
    training = BatchTopKTrainingSAE(cfg)
    randomise(training)
    training.topk_threshold = torch.tensor(1.7, dtype=torch.float64)
    training.save_inference_model(tmp_path / "inference")
    theirs = Theirs.load_from_disk(tmp_path / "inference")
    x = torch.randn(150, D)
    agrees(SAE.from_pretrained(tmp_path / "inference"), x, theirs.encode(x), theirs(x))
    training.save_model(tmp_path / "training")
    ours = SAE.from_pretrained(tmp_path / "training")
    assert ours.config.activation == "batchtopk"
    agrees(ours, x, theirs.encode(x), theirs(x))


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_flat_configs(tmp_path, make, agrees, activation):
    """Before version 6: SAELens converts them on loading, and so do we."""
    make("standard").save_model(tmp_path)
    flat = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "hook_point": "blocks.1.hook_mlp_out"}
    flat |= {"activation_fn_str": activation, "activation_fn_kwargs": {"k": K}}
    flat |= {"normalize_activations": False, "model_name": "gpt2-small"}
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    theirs, ours = Theirs.load_from_disk(tmp_path), SAE.from_pretrained(tmp_path)
    x = torch.randn(150, D)
    agrees(ours, x, theirs.encode(x), theirs(x))
    assert ours.config.activation == activation
    assert ours.config.hook_name == theirs.cfg.metadata.hook_name == "blocks.1.hook_mlp_out"


def test_half_precision_weights(tmp_path, make):
    """bf16 weights: SAELens compares bf16 thresholds with bf16 products; ours gate in fp32, as the
    file's numbers say in exact arithmetic."""
    theirs = make("jumprelu", dtype="bfloat16")
    theirs.save_model(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    x = torch.randn(3000, D)
    exact = {n: p.detach().double() for n, p in theirs.named_parameters()}
    h = (x.double() - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]
    wanted = torch.where(h > exact["threshold"], h, 0).relu()
    torch.testing.assert_close(ours.encode(x).to_dense().double(), wanted, rtol=1e-5, atol=1e-5)
    assert ((theirs.encode(x) > 0) != (wanted > 0)).any(), "SAELens#494: gates move in bf16"
