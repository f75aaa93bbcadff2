"""Tests of fastsae.compat. Those that need the peers run where they are: make test-compat."""

import importlib.util

import pytest
import torch

PEERS = {
    "sae_lens": ["test_saelens*.py"],
    "sparsify": ["test_sparsify.py", "test_upstream.py"],
    "dictionary_learning": ["test_dictionary_learning.py"],
}
collect_ignore_glob = [
    pattern
    for package, patterns in PEERS.items()
    if importlib.util.find_spec(package) is None
    for pattern in patterns
]


@pytest.fixture
def close():
    """Asserts equality within fp32 rounding, relative to the largest entry."""

    def check(found, wanted, name="", tolerance=2e-5):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype, name
        if wanted.numel() == 0:
            return
        finite = wanted[wanted.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 1.0
        off = torch.where(found == wanted, 0, found - wanted)  # infinities agree or differ
        assert float(off.abs().max()) <= tolerance * (scale or 1.0), name

    return check


@pytest.fixture
def same_gradients(close):
    """Asserts that two modules have the same gradients, and the same parameters without one."""

    def check(found, wanted):
        pairs = list(zip(found.named_parameters(), wanted.named_parameters(), strict=True))
        assert any(q.grad is not None for _, (_, q) in pairs)
        for (name, p), (_, q) in pairs:
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                close(p.grad, q.grad, name)

    return check
