"""Checkpoints against the library they come from; collected where it is installed: make
test-compat."""

import importlib.util
import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastsae import SAE

PEERS = {
    "sae_lens": "test_*saelens*.py",
    "sparsify": "test_sparsify.py",
    "dictionary_learning": "test_dictionary_learning.py",
}
collect_ignore_glob = [
    pattern for peer, pattern in PEERS.items() if importlib.util.find_spec(peer) is None
]


class Drawn:
    """Random weights of one SAE, W_* as [F, D], and inputs."""

    def __init__(self, d: int = 16, f: int = 64, d_out: int | None = None):
        draw, out = torch.Generator().manual_seed(3), d_out or d

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        self.W_enc, self.W_dec = randn(f, d), randn(f, out) * (1 + torch.rand(f, 1, generator=draw))
        self.b_enc, self.b_dec, self.skip = randn(f) * 0.3, randn(out) * 0.3, randn(out, d)
        self.theta, self.x = randn(f).abs(), randn(200, d)


@pytest.fixture(scope="session")
def draw():
    return Drawn


@pytest.fixture(scope="session")
def randomise():
    """Every floating parameter and named buffer of a peer's module drawn; thresholds positive."""

    @torch.no_grad()
    def randomise(module: torch.nn.Module) -> None:
        torch.manual_seed(4)
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape).to(p) * (0.3 if p.dim() == 1 else 1))
            if "threshold" in name:
                p.abs_()

    return randomise


@pytest.fixture(scope="session")
def agrees():
    @torch.no_grad()
    def agrees(sae: SAE, x: torch.Tensor, code: torch.Tensor, x_hat: torch.Tensor) -> None:
        """The peer's dense code and its reconstruction, on the same activations."""
        assert (code != 0).any() and (code == 0).any()
        torch.testing.assert_close(sae.encode(x).to_dense(), code.detach(), rtol=3e-5, atol=3e-5)
        torch.testing.assert_close(sae(x), x_hat.detach(), rtol=1e-4, atol=2e-4)

    return agrees


@pytest.fixture(scope="session")
def put():
    """A file of tensors: safetensors, npz or torch.save, by its name."""

    def put(path, tensors, **json_files):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.contiguous() for n, t in tensors.items()}
        if path.suffix == ".npz":
            numpy.savez(path, **{n: t.numpy() for n, t in tensors.items()})
        elif path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)
        for name, content in json_files.items():
            (path.parent / f"{name}.json").write_text(json.dumps(content))
        return path

    return put
