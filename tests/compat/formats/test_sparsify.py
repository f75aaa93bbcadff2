"""sparsify writes, we read, and back: the same codes and reconstructions as sparsify's own."""

import pytest
import torch
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

from fastsae import SAE, SAEConfig

D, K = 16, 8


@pytest.fixture
def make(randomise):
    def make(**fields):
        coder = SparseCoder(D, SparseCoderConfig(expansion_factor=4, k=K, **fields))
        randomise(coder)
        return coder

    return make


def dense(coder, x):
    """sparsify's top activations and indices as a dense code."""
    found = coder.encode(x)
    code = torch.zeros(len(x), coder.num_latents)
    return code.scatter(1, found.top_indices, found.top_acts)


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_there_and_back(tmp_path, make, agrees, activation, skip, transcode):
    options = {"activation": activation, "skip_connection": skip, "transcode": transcode}
    theirs = make(**options)
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    ours = SAE.from_pretrained(tmp_path, "layers.3.mlp")
    x = torch.randn(150, D)
    agrees(ours, x, dense(theirs, x), theirs(x).sae_out)
    ours.save_pretrained(tmp_path / "back", format="sparsify")
    again = SparseCoder.load_from_disk(tmp_path / "back")
    assert torch.equal(again(x).sae_out, theirs(x).sae_out)
    stored = [load_file(tmp_path / each / "sae.safetensors") for each in ("layers.3.mlp", "back")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path, make, agrees, half):
    """The reference is sparsify on the same weights in fp32: what the file's numbers mean."""
    theirs = make().to(half)
    theirs.save_to_disk(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    x = torch.randn(150, D)
    theirs = theirs.float()
    agrees(ours, x, dense(theirs, x), theirs(x).sae_out)


def test_fewer_positive_latents_than_k(tmp_path, make, agrees):
    """ReLU then top-k there, top-k then ReLU here: other indices, the same dense code."""
    theirs = make()
    theirs.encoder.bias.data.sub_(8)
    theirs.save_to_disk(tmp_path)
    x = torch.randn(150, D)
    code = dense(theirs, x)
    assert ((code > 0).sum(1) < K).any()
    agrees(SAE.from_pretrained(tmp_path), x, code, theirs(x).sae_out)


def test_an_uncentred_autoencoder(tmp_path, agrees):
    ours = SAE(SAEConfig(D, 64, k=K, apply_b_dec_to_input=False))
    torch.nn.init.normal_(ours.b_dec)
    ours.save_pretrained(tmp_path, format="sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path)
    x = torch.randn(150, D)
    assert not theirs.cfg.transcode
    agrees(ours, x, dense(theirs, x), theirs(x).sae_out)


def test_many_hook_points(tmp_path, make):
    for name in ("layers.1", "layers.2"):
        make().save_to_disk(tmp_path / "seed1" / name)
    loaded = SparseCoder.load_many(str(tmp_path / "seed1"), local=True)
    for name, theirs in loaded.items():
        ours = SAE.from_pretrained(tmp_path, f"seed1/{name}")
        assert torch.equal(ours.W_dec, theirs.W_dec) and ours.config.hook_name == name
