"""SAELens checkpoints: what is written, what is read, and one clear error for what is broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import SAE, FastsaeError, FeatureStats, SAEConfig, formats
from fastsae.formats import saelens

D, F, K = 6, 10, 3
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def make(activation="topk", dtype="float32", d_sae=F, **fields) -> SAE:
    k = K if activation in ("topk", "batchtopk") else None
    sae = SAE(SAEConfig(D, d_sae, activation, k, dtype=dtype, **fields))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
            if name == "threshold":
                parameter.abs_()
    return sae


def same_state(a: SAE, b: SAE) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@pytest.fixture
def folder(tmp_path):
    """A good jumprelu checkpoint, and functions to spoil it."""
    make("jumprelu", hook_name="blocks.3.hook_resid_post", model_name="org/m").save_pretrained(
        tmp_path
    )
    return tmp_path


def rewrite(folder, **changes):
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in cfg.items() if v != "<absent>"}))


def retensor(folder, **changes):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)


def fails(folder, *words, **arguments):
    with pytest.raises(FastsaeError) as error:
        SAE.from_pretrained(folder, **arguments)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("centre", [True, False])
def test_round_trip_bit_for_bit(tmp_path, activation, kind, centre):
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


def test_the_default_is_fp32_and_thresholds_stay_exact(tmp_path):
    sae = make("jumprelu", "bfloat16")
    sae.save_pretrained(tmp_path)
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].dtype == torch.float32
    for kind in (None, "float32", torch.float32):
        wide = SAE.from_pretrained(tmp_path, dtype=kind)
        assert wide.W_enc.dtype == torch.float32 and wide.config.dtype == "float32"
        assert torch.equal(wide.W_enc, sae.W_enc.float())
    half = SAE.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert half.threshold.dtype == torch.float32 and torch.equal(half.threshold, sae.threshold)


def test_statistics_travel(tmp_path):
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


def test_a_folder_inside_a_folder(tmp_path):
    sae = make()
    sae.save_pretrained(tmp_path / "layer_3" / "width_10")
    assert same_state(SAE.from_pretrained(tmp_path, "layer_3/width_10"), sae)
    assert same_state(SAE.from_pretrained(str(tmp_path), "layer_3/width_10", format="saelens"), sae)
    fails(tmp_path, "layer_4", "no such folder", sae_id="layer_4")


# --- what SAELens reads -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation,architecture",
    [("topk", "topk"), ("batchtopk", "jumprelu"), ("jumprelu", "jumprelu"), ("relu", "standard")],
)
def test_the_files_are_those_of_saelens_6(tmp_path, activation, architecture):
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


def test_without_our_file_a_batchtopk_sae_is_a_jumprelu_sae(tmp_path):
    sae = make("batchtopk", hook_name="blocks.7.hook_resid_pre")
    sae.save_pretrained(tmp_path)
    (tmp_path / "fastsae.json").unlink()
    again = SAE.from_pretrained(tmp_path)
    assert (again.config.activation, again.config.k) == ("jumprelu", None)
    assert again.config.hook_name == "layers.7.input"
    assert same_state(again, sae)


def test_cfg_json_wins_over_our_file(folder):
    rewrite(folder, metadata={"hook_name": "blocks.5.hook_resid_post"})
    assert SAE.from_pretrained(folder).config.hook_name == "blocks.5.hook_resid_post"
    rewrite(folder, metadata={"hook_name": "a", "hf_hook_name": "layers.4.output"})
    assert SAE.from_pretrained(folder).config.hook_name == "layers.4.output"


def test_a_hook_point_off_the_residual_stream_keeps_its_name(tmp_path):
    make(hook_name="blocks.7.hook_mlp_out").save_pretrained(tmp_path)
    assert SAE.from_pretrained(tmp_path).config.hook_name == "blocks.7.hook_mlp_out"
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata == {"hook_name": "blocks.7.hook_mlp_out"}


def test_as_many_features_as_dimensions(tmp_path):
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
def test_the_flat_config_before_version_6(tmp_path, old, activation, k):
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


def test_flat_configs_that_cannot_be_represented(tmp_path):
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


# --- errors -------------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path):
    fails(tmp_path / "no", "no such folder")
    fails("./no/such/place", "no such folder")
    fails("a/b/c", "no such folder", "org/name")
    fails(tmp_path, "cfg.json", "not an SAE checkpoint")
    (tmp_path / "cfg.json").write_text("{}")
    fails(tmp_path, "sae_weights.safetensors", "no such file")
    fails(tmp_path / "cfg.json", "no such folder")
    fails(tmp_path, "revision", "local folder", revision="main")
    fails(tmp_path, "format: got 'npz'", "saelens", format="npz")
    fails(tmp_path, "dtype: got 'int8'", "bfloat16", dtype="int8")


def test_a_broken_config(folder):
    for content, words in (
        ("{", ["cfg.json", "JSON"]),
        ("[1]", ["JSON object", "list"]),
        ("\xff", ["cfg.json"]),
        ("", ["cfg.json", "JSON"]),
    ):
        (folder / "cfg.json").write_bytes(content.encode("latin-1"))
        fails(folder, *words)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"architecture": "transcoder"}, ["architecture 'transcoder'", "jumprelu"]),
        ({"architecture": ["topk"]}, ["architecture ['topk']"]),
        ({"architecture": "<absent>"}, ["architecture None"]),
        ({"architecture": "topk", "k": 3}, ["a topk SAE has the keys", "unknown ['threshold']"]),
        ({"d_in": 7}, ["d_in = 7", "the biases say 6"]),
        ({"d_sae": 11}, ["d_sae = 11", "the biases say 10"]),
        ({"normalize_activations": "layer_norm"}, ["normalize_activations = 'layer_norm'"]),
        ({"reshape_activations": "hook_z"}, ["reshape_activations = 'hook_z'"]),
        ({"metadata": "text"}, ["metadata is 'text'", "JSON object"]),
    ],
)
def test_a_config_that_cannot_be_represented(folder, changes, words):
    rewrite(folder, **changes)
    fails(folder, "sae_weights.safetensors", *words)


@pytest.mark.parametrize("k", ["<absent>", 0, 11, 2.5, "3"])
def test_a_topk_sae_without_a_good_k(tmp_path, k):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, k=k)
    fails(tmp_path, "cfg.json: k: got", "1 to d_sae = 10")


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"threshold": None}, ["missing ['threshold']"]),
        ({"W_skip": torch.zeros(D, D)}, ["unknown ['W_skip']"]),
        ({"W_enc": None}, ["no known family"]),
        ({"W_enc": torch.zeros(D + 1, F)}, ["W_enc has shape [7, 10], expected [6, 10]"]),
        ({"W_enc": torch.zeros(F, D)}, ["W_enc has shape [10, 6], expected [6, 10]"]),
        ({"W_dec": torch.zeros(F, D + 1)}, ["W_dec has shape [10, 7], expected [10, 6]"]),
        ({"b_enc": torch.zeros(F, 1)}, ["b_enc has shape [10, 1], expected [10]"]),
        ({"threshold": torch.zeros(1)}, ["threshold has shape [1], expected [10]"]),
        ({"b_dec": torch.full((D,), torch.nan)}, ["b_dec holds NaN"]),
        ({"W_dec": torch.full((F, D), torch.inf)}, ["W_dec holds NaN or infinite"]),
        ({"b_enc": torch.zeros(F, dtype=torch.int8)}, ["b_enc has dtype torch.int8"]),
    ],
)
def test_broken_weights(folder, changes, words):
    retensor(folder, **changes)
    fails(folder, "sae_weights.safetensors", *words)


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "sae_weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    fails(folder, "sae_weights.safetensors", "truncated or not a safetensors file")


def test_broken_statistics(folder):
    sae = SAE.from_pretrained(folder)
    sae.stats = FeatureStats(torch.rand(F), torch.rand(F), torch.rand(F), 5)
    sae.save_pretrained(folder)
    ours = json.loads((folder / "fastsae.json").read_text())
    stats = folder / "fastsae_stats.safetensors"
    save_file({"frequency": torch.zeros(F), "mean": torch.zeros(3)}, stats)
    fails(folder, "fastsae_stats.safetensors", "mean is missing or not [10]")
    stats.unlink()
    fails(folder, "fastsae_stats.safetensors", "no such file")
    for broken, words in (
        ({"stats": {"file": "x"}}, ["stats: got", "tokens"]),
        ({"stats": 5}, ["stats: got 5"]),
        ({"config": {"d_in": 6, "colour": 1}}, ["fastsae.json: config:", "colour"]),
        ({"config": {"d_in": -1, "d_sae": 2}}, ["fastsae.json: config: d_in: got -1"]),
        ({"config": 5}, ["fastsae.json: config:"]),
    ):
        (folder / "fastsae.json").write_text(json.dumps(ours | broken))
        fails(folder, *words)


# --- writing ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    sae = SAE.from_pretrained(folder)
    left, real = 0, formats.os.fsync

    def fsync(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    for succeed in range(3):
        left = succeed
        with monkeypatch.context() as patch, pytest.raises(FastsaeError) as error:
            patch.setattr(formats.os, "fsync", fsync)
            with torch.no_grad():
                sae.W_dec.add_(1)
            sae.save_pretrained(folder)
        assert "No space left on device" in str(error.value) and "cannot write" in str(error.value)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    sae.save_pretrained(folder)
    assert torch.equal(SAE.from_pretrained(folder).W_dec, sae.W_dec)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastsaeError, match="cannot write"):
        make().save_pretrained(tmp_path / "file")
    with pytest.raises(FastsaeError, match="format: got 'onnx', accepted are"):
        make().save_pretrained(tmp_path, format="onnx")
    with pytest.raises(FastsaeError, match="metadata: cannot be written as JSON"):
        make(metadata={"x": object()}).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_not_tied_to_its_file(tmp_path):
    """Weights are copied out of the mapped file: overwriting it cannot change a loaded SAE."""
    make(dtype="bfloat16").save_pretrained(tmp_path)
    sae = SAE.from_pretrained(tmp_path, dtype="bfloat16")
    before = sae.W_dec.detach().clone()
    path = tmp_path / "sae_weights.safetensors"
    with open(path, "r+b") as file:
        file.seek(400)
        file.write(b"\xff" * (path.stat().st_size - 400))
    assert torch.equal(sae.W_dec, before)


# --- the hub ------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_these_files_only(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    sae, asked = make(), []
    sae.save_pretrained(tmp_path / "layer_1")

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert same_state(SAE.from_pretrained("org/name", "layer_1", revision="v2"), sae)
    repository, revision, names = asked[0]
    assert (repository, revision) == ("org/name", "v2")
    assert names[:2] == ["layer_1/cfg.json", "layer_1/sae_weights.safetensors"]
    assert not any("*" in name for name in names)
    fails("org/name", "org/name: has no cfg.json", "sae_id")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("offline\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    fails("org/name", "org/name: no such folder, and the hub did not give it: offline")
