"""Contracts of other tools, duck-typed: shapes, types and numbers. Needs no peer."""

import pytest
import torch

import fastsae
from fastsae import FastsaeError
from fastsae.compat import DelphiCoder, RepsteerAdapter, SAEBenchSAE, SaklasBackend

D, F, K = 16, 512, 8


@pytest.fixture(params=["topk", "jumprelu", "relu"])
def sae(request):
    config = fastsae.SAEConfig(
        D, F, request.param, k=K if request.param == "topk" else None, hook_name="layers.3.output"
    )
    sae = fastsae.SAE(config)
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.b_enc.normal_().sub_(7)
        sae.b_dec.normal_()
        if config.has_threshold:
            sae.threshold.fill_(0.5)
    return sae.requires_grad_(False)


def reference(sae, x):
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    code = h.relu()
    if sae.config.activation == "topk":
        top = h.topk(K)
        code = torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
    elif sae.config.activation == "jumprelu":
        code = code * (h > sae.threshold)
    return code, code @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("shape", [(5, D), (2, 3, D)])
def test_saebench(sae, shape, close):
    bench, x = SAEBenchSAE(sae, "gpt2"), torch.randn(*shape)
    code, out = reference(sae, x)
    close(bench.encode(x), code)
    close(bench.decode(bench.encode(x)), out)
    close(bench(x), out)
    assert bench.W_enc.shape == (D, F) and bench.W_dec.shape == (F, D)
    assert all(isinstance(bench.get_parameter(n), torch.nn.Parameter) for n in ("W_enc", "b_dec"))
    assert (bench.cfg.hook_layer, bench.cfg.d_sae, bench.cfg.dtype) == (3, F, "float32")
    assert bench.W_dec.data_ptr() == sae.W_dec.data_ptr()
    bench.to(dtype=torch.bfloat16)
    assert bench.dtype == torch.bfloat16 and bench.cfg.dtype == "bfloat16"
    assert bench.encode(x.bfloat16()).dtype == torch.bfloat16
    if sae.config.has_threshold:
        assert bench.threshold.dtype == torch.float32
    assert sae.W_dec.dtype == torch.float32


def test_saebench_wants_unit_decoder_rows(sae):
    sae.W_dec.mul_(2)
    with pytest.raises(FastsaeError, match="norm"):
        SAEBenchSAE(sae, "gpt2")


def test_delphi(sae, close):
    coder, x = DelphiCoder(sae), torch.randn(5, D)
    out = coder.encode(x)
    assert out.top_indices.dtype == torch.int64 and out.pre_acts is None
    assert coder.num_latents == F
    close(torch.zeros(5, F).scatter_add(1, out.top_indices, out.top_acts), reference(sae, x)[0])
    batch = torch.randn(2, 3, D)
    close(coder.dense(batch), reference(sae, batch)[0])
    assert coder.to(dtype=torch.bfloat16).encode(x.bfloat16()).top_acts.dtype == torch.bfloat16


def test_repsteer(sae, close):
    adapter, x = RepsteerAdapter(sae), torch.randn(5, D)
    code, out = reference(sae, x)
    close(adapter.encode(x), code)
    close(adapter.decode(code), out)
    assert (adapter.input_dim, adapter.num_features) == (D, F)
    feature = int(code.sum(0).argmax())
    clamped = code.clone()
    clamped[:, feature] = 4.0
    wanted = (clamped - code) @ sae.W_dec
    close(adapter.clamp_delta(x, feature, 4.0), wanted)
    close(adapter.decoder_direction(feature), sae.W_dec[feature])
    with pytest.raises(FastsaeError, match=f"0 to {F - 1}"):
        adapter.decoder_direction(F)


def test_saklas(sae, close):
    backend, x = SaklasBackend({3: sae}, release="mine", revision="r1"), torch.randn(5, D)
    code, out = reference(sae, x)
    assert backend.layers == frozenset({3}) and backend.feature_count(3) == F
    close(backend.encode_layer(3, x), code)
    close(backend.decode_layer(3, code[0]), out[0])
    close(backend.feature_direction(3, 7), sae.W_dec[7])
    before = backend.fingerprint
    assert len(before) == 64 and before == SaklasBackend({3: sae}, release="x").fingerprint
    sae.W_dec[7, 0] += 1
    assert backend.fingerprint != before
    with pytest.raises(FastsaeError, match=r"this backend has \[3\]"):
        backend.encode_layer(2, x)
    with pytest.raises(FastsaeError, match="belongs at"):
        SaklasBackend({2: sae}, release="mine")


def test_only_a_fastsae_sae():
    for wrapper in (DelphiCoder, RepsteerAdapter, lambda s: SAEBenchSAE(s, "gpt2")):
        with pytest.raises(FastsaeError, match=r"expected a fastsae\.SAE"):
            wrapper(torch.nn.Linear(2, 2))
