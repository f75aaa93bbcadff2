"""Shared fixtures: instruction sets, and equality bit for bit."""

import pytest
import torch

from fastsae.ops import extension

if extension.problem() is None:
    from fastsae.ops import native


def _instruction_sets() -> list[str]:
    """What the compiled ops can be told to use on this processor, the best one last."""
    if extension.problem() is not None:
        return []
    features = native.cpu_features()
    return ["scalar", *(n for n in ("avx2", "avx512", "amx") if features[n])]


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _instruction_sets(), indirect=True)


@pytest.fixture(scope="session")
def instruction_sets():
    return _instruction_sets()


@pytest.fixture
def isa(request):
    """The instruction set that the compiled ops are told to use."""
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


@pytest.fixture(scope="session")
def same():
    """Bit for bit, NaN equal to NaN."""

    def same(got, wanted):
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.is_floating_point():
                assert torch.equal(a.isnan(), b.isnan())
                a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
            assert torch.equal(a, b)

    return same


@pytest.fixture
def sae(encode_sample):
    """x, W_enc, b_enc, b_dec, threshold of an SAE whose width is a multiple of nothing."""
    return encode_sample(n=9, d=83, f=2011, kind="massive")


@pytest.fixture(autouse=True)
def screens_are_tested(monkeypatch):
    """Small batches skip screens, and so does a large k; here few rows and any k are enough."""
    if extension.problem() is not None:
        pytest.skip(f"native: {extension.problem()}")
    monkeypatch.setattr(native, "TILE_ROWS", 4)
    monkeypatch.setattr(native, "BYTE_ROWS", 5)
    monkeypatch.setattr(native, "DENSE_SHARE", 1)
