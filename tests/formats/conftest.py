"""SAEs with random weights, a good checkpoint, and how loading a spoiled one fails."""

import json

import pytest
import torch

from fastsae import SAE, FastsaeError, SAEConfig

D, F, K = 6, 10, 3


@pytest.fixture(scope="session")
def make():
    def make(activation="topk", dtype="float32", d_sae=F, **fields) -> SAE:
        k = K if activation in ("topk", "batchtopk", "groupmax") else None
        sae = SAE(SAEConfig(D, d_sae, activation, k, dtype=dtype, **fields))
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
                if name == "threshold":
                    parameter.abs_()
        return sae

    return make


@pytest.fixture(scope="session")
def same_state():
    def same_state(a: SAE, b: SAE) -> bool:
        left, right = a.state_dict(), b.state_dict()
        return left.keys() == right.keys() and all(
            left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
        )

    return same_state


@pytest.fixture
def folder(tmp_path, make):
    """A good jumprelu checkpoint, to be spoiled."""
    make("jumprelu", hook_name="blocks.3.hook_resid_post", model_name="org/m").save_pretrained(
        tmp_path
    )
    return tmp_path


@pytest.fixture(scope="session")
def rewrite():
    def rewrite(folder, **changes):
        path = folder / "cfg.json"
        cfg = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in cfg.items() if v != "<absent>"}))

    return rewrite


class Drawn:
    """Random weights of one SAE in the letters of the formulas; W_* are [F, D]."""

    def __init__(self, d: int = D, f: int = F, d_out: int | None = None, seed: int = 7):
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        out = d_out or d
        self.W_enc, self.W_dec = randn(f, d), randn(f, out) * (1 + torch.rand(f, 1, generator=draw))
        self.b_enc, self.b_dec, self.skip = randn(f) * 0.3, randn(out) * 0.3, randn(out, d)
        self.theta = randn(f).abs()
        self.x = randn(60, d)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        return code @ self.W_dec + self.b_dec


@pytest.fixture(scope="session")
def draw():
    return Drawn


@pytest.fixture(scope="session")
def topk():
    """The k largest of signed pre-activations, then ReLU, densely."""

    def topk(h: torch.Tensor, k: int) -> torch.Tensor:
        found = h.topk(k, dim=-1)
        return torch.zeros_like(h).scatter(-1, found.indices, found.values.relu())

    return topk


@pytest.fixture(scope="session")
def agrees():
    def agrees(sae: SAE, x: torch.Tensor, code: torch.Tensor, x_hat: torch.Tensor) -> None:
        """The SAE's dense code and reconstruction are these, and some of each kind is there."""
        z = sae.encode(x).to_dense()
        assert (code > 0).any() and (code == 0).any()
        torch.testing.assert_close(z, code, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)

    return agrees


@pytest.fixture(scope="session")
def fails():
    def fails(folder, *words, **arguments):
        """Loading is one FastsaeError of one line that holds all the words."""
        with pytest.raises(FastsaeError) as error:
            SAE.from_pretrained(folder, **arguments)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message

    return fails
