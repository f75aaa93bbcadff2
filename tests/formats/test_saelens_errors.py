"""SAELens checkpoints: one clear error for what is broken, full disks, and the hub."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsae import SAE, FastsaeError, FeatureStats
from fastsae.formats import files

D, F = 6, 10


# --- errors --------------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path, fails):
    fails(tmp_path / "no", "no such folder")
    fails("./no/such/place", "no such folder")
    fails("a/b/c", "no such folder", "org/name")
    fails(tmp_path, "no weights, such as sae_weights.safetensors", "not an SAE checkpoint")
    (tmp_path / "cfg.json").write_text("{}")
    fails(tmp_path, "no weights, such as sae_weights.safetensors")
    fails(tmp_path / "cfg.json", "not a weights file", ".safetensors, .npz, .pt")
    fails(tmp_path, "compat: got 'mine'", "authors, saelens", compat="mine")
    fails(tmp_path, "overrides: got 3", overrides=3)
    fails(tmp_path, "revision", "local folder", revision="main")
    fails(tmp_path, "format: got 'npz'", "saelens", format="npz")
    fails(tmp_path, "dtype: got 'int8'", "bfloat16", dtype="int8")


def test_a_broken_config(folder, fails):
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
        ({"architecture": "temporal"}, ["architecture 'temporal'", "jumprelu"]),
        ({"architecture": "transcoder"}, ["a transcoder SAE has", "unknown ['threshold']"]),
        ({"architecture": ["topk"]}, ["architecture ['topk']"]),
        ({"architecture": "<absent>"}, ["architecture None"]),
        ({"architecture": "topk", "k": 3}, ["a topk SAE has the keys", "unknown ['threshold']"]),
        ({"d_in": 7}, ["d_in = 7", "the biases say 6"]),
        ({"d_sae": 11}, ["d_sae = 11", "the biases say 10"]),
        ({"normalize_activations": "covariance_whitening"}, ["= 'covariance_whitening' cannot"]),
        ({"reshape_activations": "hook_q"}, ["reshape_activations = 'hook_q' cannot"]),
        ({"metadata": "text"}, ["metadata is 'text'", "JSON object"]),
    ],
)
def test_a_config_that_cannot_be_represented(folder, changes, words, rewrite, fails):
    rewrite(folder, **changes)
    fails(folder, "sae_weights.safetensors", *words)


@pytest.mark.parametrize("k", ["<absent>", 0, 11, 2.5, "3"])
def test_a_topk_sae_without_a_good_k(tmp_path, k, make, rewrite, fails):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, k=k)
    fails(tmp_path, "sae_weights.safetensors: k: got", "1 to d_sae = 10")


def retensor(folder, **changes):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path) | changes
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"threshold": None}, ["missing ['threshold']"]),
        ({"W_skip": torch.zeros(D, D)}, ["unknown ['W_skip']"]),
        ({"W_enc": None}, ["no known family"]),
        ({"W_enc": torch.zeros(D + 1, F)}, ["W_enc has shape [7, 10], expected [6, 10]"]),
        ({"W_enc": torch.zeros(F, D)}, ["W_enc has shape [10, 6], expected [6, 10]"]),
        ({"W_dec": torch.zeros(F, D + 1)}, ["W_dec has shape [10, 7], expected [10, 6]"]),
        ({"b_enc": torch.zeros(F, 1)}, ["b_enc has shape [10, 1], expected one dimension"]),
        ({"threshold": torch.zeros(1)}, ["threshold has shape [1], expected [10]"]),
        ({"b_dec": torch.full((D,), torch.nan)}, ["b_dec holds NaN"]),
        ({"W_dec": torch.full((F, D), torch.inf)}, ["W_dec holds NaN or infinite"]),
        ({"b_enc": torch.zeros(F, dtype=torch.int8)}, ["b_enc has dtype torch.int8"]),
    ],
)
def test_broken_weights(folder, changes, words, fails):
    retensor(folder, **changes)
    fails(folder, "sae_weights.safetensors", *words)


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, -1])
def test_a_truncated_file(folder, keep, fails):
    path = folder / "sae_weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    fails(folder, "sae_weights.safetensors", "truncated or not a safetensors file")


def test_broken_statistics(folder, fails):
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


# --- writing -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    sae = SAE.from_pretrained(folder)
    left, real = 0, files.os.fsync

    def fsync(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    for succeed in range(3):
        left = succeed
        with monkeypatch.context() as patch, pytest.raises(FastsaeError) as error:
            patch.setattr(files.os, "fsync", fsync)
            with torch.no_grad():
                sae.W_dec.add_(1)
            sae.save_pretrained(folder)
        assert "No space left on device" in str(error.value) and "cannot write" in str(error.value)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    sae.save_pretrained(folder)
    assert torch.equal(SAE.from_pretrained(folder).W_dec, sae.W_dec)


def test_a_place_that_cannot_be_written(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastsaeError, match="cannot write"):
        make().save_pretrained(tmp_path / "file")
    with pytest.raises(FastsaeError, match="format: got 'onnx', accepted are"):
        make().save_pretrained(tmp_path, format="onnx")
    with pytest.raises(FastsaeError, match="metadata: cannot be written as JSON"):
        make(metadata={"x": object()}).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_not_tied_to_its_file(tmp_path, make):
    """Weights are copied out of the mapped file: overwriting it cannot change a loaded SAE."""
    make(dtype="bfloat16").save_pretrained(tmp_path)
    sae = SAE.from_pretrained(tmp_path, dtype="bfloat16")
    before = sae.W_dec.detach().clone()
    path = tmp_path / "sae_weights.safetensors"
    with open(path, "r+b") as file:
        file.seek(400)
        file.write(b"\xff" * (path.stat().st_size - 400))
    assert torch.equal(sae.W_dec, before)


# --- the hub -------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_these_files_only(tmp_path, monkeypatch, make, same_state, fails):
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
    fails("org/name", "holds several SAEs; pass one as sae_id: layer_1")
    fails("org/name", "org/name: has no SAE at layer_9", "sae_id", sae_id="layer_9")


def test_one_file_of_a_repository_and_where_it_came_from(tmp_path, monkeypatch, make):
    """A file is asked for with the configs beside it; commit and digest are those of the cache."""
    hub = pytest.importorskip("huggingface_hub")
    root, digest, asked = tmp_path / "snapshots" / "c0ffee", "ab" * 32, []
    sae = make("relu", apply_b_dec_to_input=False)
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    values = (sae.W_enc, sae.b_enc, sae.W_dec.T, sae.b_dec)
    root.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    keys = {n: v.detach().contiguous() for n, v in zip(names, values, strict=True)}
    torch.save(keys, tmp_path / "blobs" / digest)
    (root / "sae-l19.pt").symlink_to(tmp_path / "blobs" / digest)

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(root)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = SAE.from_pretrained("org/name", "sae-l19.pt")
    assert torch.equal(loaded.W_dec, sae.W_dec)
    assert asked[:2] == ["sae-l19.pt", "cfg.json"] and "config.yaml" in asked
    assert loaded.config.hook_name == "blocks.19.hook_resid_post"
    origin = {"repository": "org/name", "file": "sae-l19.pt", "commit": "c0ffee", "sha256": digest}
    assert loaded.config.metadata == {"origin": origin}


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, fails):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("offline\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    fails("org/name", "org/name: no such folder, and the hub did not give it: offline")
