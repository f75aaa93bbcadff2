"""SAELens checkpoints: what is written, and what is read."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastsae import SAE, FeatureStats
from fastsae.formats import saelens

D, F, K = 6, 10, 3
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("centre", [True, False])
def test_round_trip_bit_for_bit(tmp_path, activation, kind, centre, make, same_state):
    sae = make(
        activation,
        kind,
        apply_b_dec_to_input=centre,
        hook_name="layers.7.input",
        model_name="org/model",
        metadata={"context_size": 128, "note": "naïve"},
    )
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path, dtype=kind)
    assert again.config == sae.config and same_state(again, sae) and again.stats is None
    assert again.W_enc.is_contiguous() and again.W_dec.is_contiguous()
    x = torch.randn(5, D).to(DTYPES[kind])
    assert torch.equal(again(x), sae(x))
    assert all(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path / "twice")
    for name in ("cfg.json", "sae_weights.safetensors", "fastsae.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_the_default_is_fp32_and_thresholds_stay_exact(tmp_path, make):
    sae = make("jumprelu", "bfloat16")
    sae.save_pretrained(tmp_path)
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].dtype == torch.float32
    for kind in (None, "float32", torch.float32):
        wide = SAE.from_pretrained(tmp_path, dtype=kind)
        assert wide.W_enc.dtype == torch.float32 and wide.config.dtype == "float32"
        assert torch.equal(wide.W_enc, sae.W_enc.float())
    half = SAE.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert half.threshold.dtype == torch.float32 and torch.equal(half.threshold, sae.threshold)


def test_statistics_travel(tmp_path, make):
    sae = make()
    sae.stats = FeatureStats(torch.rand(F), torch.rand(F), torch.rand(F), 12345)
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.stats.tokens == 12345
    for name in ("frequency", "mean", "max"):
        assert torch.equal(getattr(again.stats, name), getattr(sae.stats, name))
    sae.stats = None
    sae.save_pretrained(tmp_path)
    assert SAE.from_pretrained(tmp_path).stats is None
    assert not (tmp_path / "fastsae_stats.safetensors").exists()


def test_a_folder_inside_a_folder(tmp_path, make, same_state, fails):
    sae = make()
    sae.save_pretrained(tmp_path / "layer_3" / "width_10")
    assert same_state(SAE.from_pretrained(tmp_path, "layer_3/width_10"), sae)
    assert same_state(SAE.from_pretrained(str(tmp_path), "layer_3/width_10", format="saelens"), sae)
    fails(tmp_path, "layer_4", "no such folder", sae_id="layer_4")


# --- what SAELens reads --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation,architecture",
    [("topk", "topk"), ("batchtopk", "jumprelu"), ("jumprelu", "jumprelu"), ("relu", "standard")],
)
def test_the_files_are_those_of_saelens_6(tmp_path, activation, architecture, make):
    make(activation, hook_name="layers.7.output", model_name="org/m").save_pretrained(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    expected = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": "blocks.7.hook_resid_post",
            "hf_hook_name": "layers.7.output",
            "model_name": "org/m",
        },
    }
    if activation == "topk":
        expected |= {"k": K, "rescale_acts_by_decoder_norm": False}
    assert cfg == expected
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (F,)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes


def test_without_our_file_a_batchtopk_sae_is_a_jumprelu_sae(tmp_path, make, same_state):
    sae = make("batchtopk", hook_name="blocks.7.hook_resid_pre")
    sae.save_pretrained(tmp_path)
    (tmp_path / "fastsae.json").unlink()
    again = SAE.from_pretrained(tmp_path)
    assert (again.config.activation, again.config.k) == ("jumprelu", None)
    assert again.config.hook_name == "layers.7.input"
    assert same_state(again, sae)


def test_cfg_json_wins_over_our_file(folder, rewrite):
    rewrite(folder, metadata={"hook_name": "blocks.5.hook_resid_post"})
    assert SAE.from_pretrained(folder).config.hook_name == "blocks.5.hook_resid_post"
    rewrite(folder, metadata={"hook_name": "a", "hf_hook_name": "layers.4.output"})
    assert SAE.from_pretrained(folder).config.hook_name == "layers.4.output"


def test_a_hook_point_off_the_residual_stream_keeps_its_name(tmp_path, make):
    make(hook_name="blocks.7.hook_mlp_out").save_pretrained(tmp_path)
    assert SAE.from_pretrained(tmp_path).config.hook_name == "blocks.7.hook_mlp_out"
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata == {"hook_name": "blocks.7.hook_mlp_out"}


def test_as_many_features_as_dimensions(tmp_path, make, same_state):
    """d_sae = d_in: no shape tells W_enc from its transpose; the family does."""
    sae = make(d_sae=D)
    sae.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")["W_enc"]
    assert torch.equal(stored, sae.W_enc.T) and not torch.equal(stored, sae.W_enc)
    assert same_state(SAE.from_pretrained(tmp_path), sae)


@pytest.mark.parametrize(
    "old,activation,k",
    [
        ({}, "relu", None),
        ({"architecture": "standard", "activation_fn_str": "relu"}, "relu", None),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, "topk", 4),
        ({"architecture": "standard", "normalize_activations": False}, "relu", None),
        ({"dtype": "torch.float32", "hook_layer": 3}, "relu", None),
    ],
)
def test_the_flat_config_before_version_6(tmp_path, old, activation, k, make):
    sae = make("relu")
    sae.save_pretrained(tmp_path)
    (tmp_path / "fastsae.json").unlink()
    flat = {"d_in": D, "d_sae": F, "hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2"}
    (tmp_path / "cfg.json").write_text(json.dumps(flat | old))
    again = SAE.from_pretrained(tmp_path)
    assert (again.config.activation, again.config.k) == (activation, k)
    assert again.config.hook_name == "blocks.3.hook_resid_pre"
    assert again.config.model_name == "gpt2" and again.config.apply_b_dec_to_input
    assert torch.equal(again.W_enc, sae.W_enc)


def test_flat_configs_that_cannot_be_represented(tmp_path, make, fails):
    make("relu").save_pretrained(tmp_path)
    flat = {"d_in": D, "d_sae": F, "hook_name": "blocks.3.attn.hook_z"}
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    fails(tmp_path, "reshape_activations = 'hook_z'")
    flat = {"d_in": D, "d_sae": F, "normalize_activations": True}
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    fails(tmp_path, "normalize_activations = 'expected_average_only_in'")


def test_a_gated_sae_is_a_jumprelu_sae():
    """1[W h₀ + b_gate > 0]·ReLU(e^r·W h₀ + b_mag), both ways of writing it."""
    torch.manual_seed(3)
    names = ("b_gate", "b_mag", "r_mag")
    tensors = {name: torch.randn(F) * 0.5 for name in names}
    tensors |= {"W_enc": torch.randn(D, F), "W_dec": torch.randn(F, D), "b_dec": torch.randn(D)}
    cfg = {"architecture": "gated", "d_in": D, "d_sae": F, "metadata": {}}
    assert saelens.detect(set(tensors), cfg)
    config, state = saelens.to_fastsae(cfg, dict(tensors), "here")
    assert config.activation == "jumprelu"
    sae = SAE(config)
    sae.load_state_dict(state)
    x = torch.randn(200, D)
    product = (x - tensors["b_dec"]) @ tensors["W_enc"]
    wanted = (product * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
    wanted = torch.where(product + tensors["b_gate"] > 0, wanted, 0)
    assert (wanted > 0).any()
    torch.testing.assert_close(sae.encode(x).to_dense(), wanted, rtol=1e-5, atol=1e-5)


def test_decoder_norms_fold_into_the_weights():
    """rescale_acts_by_decoder_norm: h·n is ranked, x̂ = Σ a W_dec / n."""
    torch.manual_seed(4)
    tensors = {"W_enc": torch.randn(D, F), "W_dec": torch.randn(F, D) * 3}
    tensors |= {"b_enc": torch.randn(F), "b_dec": torch.randn(D)}
    tensors["W_dec"][2] = 0
    cfg = {"architecture": "topk", "k": K, "d_in": D, "d_sae": F, "metadata": {}}
    cfg["rescale_acts_by_decoder_norm"] = True
    config, state = saelens.to_fastsae(cfg, dict(tensors), "here")
    sae = SAE(config)
    sae.load_state_dict(state)
    n = tensors["W_dec"].norm(dim=1)
    x = torch.randn(50, D)
    h = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * n
    code = torch.zeros(50, F).scatter(1, h.topk(K).indices, h.topk(K).values.relu())
    torch.testing.assert_close(sae.encode(x).to_dense(), code, rtol=1e-5, atol=1e-5)
    wanted = (code / n.clamp(min=1e-9)) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(sae(x), wanted, rtol=1e-5, atol=1e-5)
