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


@pytest.fixture(scope="session")
def fails():
    def fails(folder, *words, **arguments):
        """Loading is one FastsaeError of one line that holds all the words."""
        with pytest.raises(FastsaeError) as error:
            SAE.from_pretrained(folder, **arguments)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message

    return fails
