"""SAELens checkpoints: what is written, and what is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import SAE, FastsaeError, FeatureStats

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


def flat(tmp_path, **cfg):
    (tmp_path / "fastsae.json").unlink(missing_ok=True)
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F} | cfg))


def test_the_scale_that_saelens_keeps_in_its_list(tmp_path, make, fails):
    """expected_average_only_in: s·x is encoded and x̂/s is the reconstruction; s is not stored."""
    sae = make("relu")
    sae.save_pretrained(tmp_path)
    flat(tmp_path, normalize_activations=True)
    fails(tmp_path, "normalize_activations = 'expected_average_only_in'", "norm_scaling_factor")
    fails(tmp_path, "norm_scaling_factor is 0", overrides={"norm_scaling_factor": 0})
    folded = SAE.from_pretrained(tmp_path, overrides={"norm_scaling_factor": 2.5})
    x = torch.randn(20, D)
    torch.testing.assert_close(folded.encode(x).to_dense(), sae.encode(x * 2.5).to_dense())
    torch.testing.assert_close(folded(x), sae(x * 2.5) / 2.5)
    as_it_is = SAE.from_pretrained(tmp_path, overrides={"normalize_activations": "none"})
    assert torch.equal(as_it_is.W_enc, sae.W_enc)


def test_heads_are_flattened_and_given_back(tmp_path, make):
    make("relu").save_pretrained(tmp_path)
    flat(tmp_path, hook_name="blocks.3.attn.hook_z")
    sae = SAE.from_pretrained(tmp_path)
    assert sae.config.reshape == "hook_z"
    x = torch.randn(4, 5, 2, D // 2)
    assert torch.equal(sae(x), sae(x.flatten(-2)).view(x.shape))
    assert sae.encode(x).values.shape[:2] == (4, 5)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_stateless_normalization(tmp_path, make, kind):
    sae = make("relu")
    sae.save_pretrained(tmp_path)
    flat(tmp_path, normalize_activations=kind)
    normed = SAE.from_pretrained(tmp_path)
    x, other = torch.randn(9, D) * 3 + 1, torch.randn(4, D)
    if kind == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = (x - shift).std(-1, keepdim=True)
        inside = (x - shift) / (scale + 1e-5)
    else:
        shift, scale = 0, x.norm(dim=-1, keepdim=True) / D**0.5
        inside = x / scale
    z = normed.encode(x)
    normed.encode(other)  # SAELens would now undo the norm of this one
    torch.testing.assert_close(z.to_dense(), sae.encode(inside).to_dense())
    torch.testing.assert_close(normed.decode(z), sae(inside) * scale + shift)
    with pytest.raises(FastsaeError, match="a dense code does not know"):
        normed.decode(z.to_dense())
    normed.save_pretrained(tmp_path / "again")
    again = SAE.from_pretrained(tmp_path / "again")
    assert torch.equal(again(x), normed(x)) and again.config == normed.config
    zero = torch.zeros(2, D)
    assert normed(zero).isfinite().all()


def test_a_model_with_centred_writing_weights(tmp_path, make):
    """SAELens' cfg says the SAE saw x − mean(x); a plain model's activations are not centred."""
    sae = make("relu")
    sae.save_pretrained(tmp_path)
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert SAE.from_pretrained(tmp_path, overrides=kwargs).config.normalization == "center"
    flat(tmp_path, **kwargs)
    centred = SAE.from_pretrained(tmp_path)
    x = torch.randn(9, D) + 2
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(centred(x), sae(x - mean) + mean)
    torch.testing.assert_close(centred(x - mean), sae(x - mean))  # what SAELens computes
    assert torch.equal(centred.W_enc, sae.W_enc)
    centred.save_pretrained(tmp_path / "again")
    assert SAE.from_pretrained(tmp_path / "again").config == centred.config


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_transcoders_round_trip(tmp_path, make, same_state, skip, activation):
    places = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    fields = {"d_out": 4, "apply_b_dec_to_input": False, "skip": skip}
    sae = make(activation, **fields, **places)
    sae.save_pretrained(tmp_path)
    (tmp_path / "fastsae.json").unlink()
    again = SAE.from_pretrained(tmp_path)
    assert same_state(again, sae) and again.config.d_out == 4 and again.config.skip is skip
    assert (again.config.hook_name, again.config.hook_name_out) == tuple(places.values())
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    prefix = "jumprelu_" if activation == "jumprelu" else ""
    assert cfg["architecture"] == prefix + ("skip_transcoder" if skip else "transcoder")
    x = torch.randn(7, D)
    wanted = sae.encode(x).to_dense() @ sae.W_dec + sae.b_dec
    wanted = wanted + x @ sae.W_skip.T if skip else wanted
    torch.testing.assert_close(again(x), wanted)
    assert again(x).shape == (7, 4)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"activation": "topk", "d_out": 4, "apply_b_dec_to_input": False}, "of a transcoder"),
        ({"activation": "groupmax", "d_sae": 9}, "activation='groupmax'"),
        ({"skip": True}, "the skip connection of an autoencoder"),
        ({"activation_scale": True}, "an activation_scale"),
    ],
)
def test_what_saelens_cannot_say_is_not_written(tmp_path, make, fields, words):
    with pytest.raises(FastsaeError, match="SAELens has no form for") as error:
        make(**fields).save_pretrained(tmp_path / "sae")
    assert words in str(error.value) and not (tmp_path / "sae").exists()


def test_a_batchtopk_training_checkpoint(tmp_path, make):
    """`architecture` batchtopk: the threshold is one double, topk_threshold."""
    make("relu").save_pretrained(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    save_file(load_file(path) | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}, path)
    cfg = {"architecture": "batchtopk", "k": 3, "metadata": {}}
    flat(tmp_path, **cfg)
    sae = SAE.from_pretrained(tmp_path)
    assert sae.config.activation == "batchtopk" and (sae.threshold == 0.7).all()


def test_old_scaling_factors(tmp_path, make, fails):
    sae = make("relu")
    sae.save_pretrained(tmp_path)
    flat(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"scaling_factor": torch.ones(F)}, path)
    assert torch.equal(SAE.from_pretrained(tmp_path).W_dec, sae.W_dec)
    save_file(tensors | {"scaling_factor": torch.full((F,), 1.5)}, path)
    fails(tmp_path, "a scaling_factor other than 1 cannot be represented")


@pytest.mark.parametrize("architecture", ["gated", "topk"])
def test_folds_are_the_formula(tmp_path, architecture):
    """gated: 1[Wh₀ + b_gate > 0]·ReLU(e^r·Wh₀ + b_mag). topk: h·n is ranked, x̂ = Σ a W_dec / n."""
    t = {"W_enc": torch.randn(D, F), "W_dec": torch.randn(F, D) * 3, "b_dec": torch.randn(D)}
    extra = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    t |= {name: torch.randn(F) * 0.5 for name in extra}
    t["W_dec"][2] = 0
    cfg = {"architecture": architecture, "metadata": {}}
    cfg |= {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    save_file(t, tmp_path / "sae_weights.safetensors")
    flat(tmp_path, **cfg)
    sae = SAE.from_pretrained(tmp_path)
    x = torch.randn(200, D)
    h = (x - t["b_dec"]) @ t["W_enc"]
    n = torch.ones(F)
    if architecture == "gated":
        code = (h * t["r_mag"].exp() + t["b_mag"]).relu()
        code = torch.where(h + t["b_gate"] > 0, code, 0)
    else:
        n = t["W_dec"].norm(dim=1)
        h = (h + t["b_enc"]) * n
        code = torch.zeros(200, F).scatter(1, h.topk(K).indices, h.topk(K).values.relu())
    assert (code > 0).any()
    torch.testing.assert_close(sae.encode(x).to_dense(), code, rtol=1e-5, atol=1e-5)
    wanted = (code / n.clamp(min=1e-9)) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae(x), wanted, rtol=1e-5, atol=1e-4)


def test_a_gated_sae_at_its_boundaries(tmp_path):
    """Both gates at zero, on integers, where every sum is exact: closed, like the peer's `> 0`."""
    t = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    t |= {"r_mag": torch.zeros(2), "b_mag": torch.tensor([1.0, -3.0]), "b_gate": -torch.ones(2)}
    save_file(t, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "gated", "d_in": 2, "d_sae": 2, "metadata": {}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    sae = SAE.from_pretrained(tmp_path)
    x = torch.tensor([[1.0, 3.0], [2.0, 2.0], [-1.0, 4.0]])
    # π = x − 1 must be > 0, magnitudes are x + 1 and x − 3.
    wanted = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    assert torch.equal(sae.encode(x).to_dense(), wanted)
