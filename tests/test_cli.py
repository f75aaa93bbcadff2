"""The command line: one clear line and exit code 2 for mistakes, JSON where a script reads it."""

import json
import subprocess
import sys

import pytest
import torch

import fastsae
from fastsae.cli import main

COMMANDS = (
    "demo",
    "train",
    "train-lens",
    "explain",
    "search",
    "eval",
    "label",
    "annotate",
    "export",
    "policy",
    "sweep",
    "generate",
    "serve",
    "inspect",
    "convert",
    "env",
)


@pytest.fixture
def sae_folder(tmp_path):
    torch.manual_seed(0)
    sae = fastsae.SAE(fastsae.SAEConfig(d_in=8, d_sae=32, k=4, hook_name="layers.1.output"))
    frequency = torch.linspace(0, 1, 32)
    sae.stats = fastsae.FeatureStats(frequency, frequency * 2, frequency * 3, 1000)
    sae.save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  fastsae {command}" in capsys.readouterr().out


def test_help_of_train_documents_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    from fastsae.training.config import TrainConfig

    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out
    assert "optimiser steps" in out or "steps" in out
    assert "default 32" in out  # k, read from the dataclass


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["inspect", "/nowhere/sae"], "no such folder"),
        (["search", "/nowhere/words.safetensors", "music"], "/nowhere/words.safetensors"),
        (["train", "--layer", "1", "--output", "x"], "text, samples"),
        (["train", "--layer", "1", "--output", "x", "--samples", "10", "--k", "0"], "k: got 0"),
        (["generate", "s", "--prompt", "a", "--ablate", "1", "--strength", "2"], "strength"),
        (["generate", "s", "--prompt", "a", "--policy", "/nowhere.json"], "/nowhere.json"),
        (["explain", "s", "--temperature", "warm"], "temperature: got 'warm'"),
        (["explain", "s", "--top", "0"], "top: got 0"),
        (["demo", "--topics", "/nowhere.json", "--output", "/tmp"], "/nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"fastsae {argv[0]}: ")


@pytest.mark.parametrize("argv", [["explode"], ["generate", "s", "--prompt", "a"], ["train"]])
def test_wrong_arguments_are_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize(
    "broken",
    [{"topics": []}, {"selection": {}}, {"prompts": []}, {"topics": [{"name": "a"}]}],
)
def test_a_broken_topics_file_is_refused_before_the_model_loads(broken, tmp_path, capsys):
    from fastsae.demo.run import load_topics

    path = tmp_path / "topics.json"
    path.write_text(json.dumps(load_topics() | broken))
    assert main(["demo", "--topics", str(path), "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fastsae demo: topics: {path}") or str(path) in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_no_traceback_from_the_installed_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fastsae.cli", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "not an SAE checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect_text_and_json(sae_folder, capsys):
    assert main(["inspect", str(sae_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["d_sae"] == 32
    assert found["k"] == 4
    assert found["hook_name"] == "layers.1.output"
    assert found["statistics"]["tokens"] == 1000
    assert found["statistics"]["dead_share"] == pytest.approx(1 / 32)
    assert found["norms"]["W_dec rows"]["median"] == pytest.approx(1.0, abs=1e-5)
    assert main(["inspect", str(sae_folder)]) == 0
    assert "layers.1.output" in capsys.readouterr().out


def test_convert_there_and_back(sae_folder, tmp_path, capsys):
    """SAELens → sparsify → SAELens, bit for bit; a folder that holds something is not written."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(sae_folder), str(there), "--format", "sparsify"]) == 0
    assert "as sparsify" in capsys.readouterr().out
    assert main(["convert", str(there), str(back), "--from-format", "sparsify"]) == 0
    name = "sae_weights.safetensors"
    assert (back / name).read_bytes() == (sae_folder / name).read_bytes()
    assert json.loads((back / "cfg.json").read_text()) == json.loads(
        (sae_folder / "cfg.json").read_text()
    )
    assert fastsae.SAE.from_pretrained(back).stats.tokens == 1000
    capsys.readouterr()
    assert main(["convert", str(sae_folder), str(back)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    odd = ["convert", str(sae_folder), str(tmp_path / "x"), "--set", "k"]
    assert main(odd) == 2 and "NAME=JSON" in capsys.readouterr().err


def test_convert_says_what_a_format_cannot_express(tmp_path, capsys):
    sae = fastsae.SAE(fastsae.SAEConfig(d_in=8, d_sae=32, activation="jumprelu"))
    sae.save_pretrained(tmp_path / "sae")
    argv = ["convert", str(tmp_path / "sae"), str(tmp_path / "out"), "--format", "sparsify"]
    assert main(argv) == 2
    assert "sparsify has no form for activation='jumprelu'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_names_the_family_the_hook_and_what_was_set(sae_folder, tmp_path, capsys):
    assert main(["inspect", str(sae_folder), "--json", "--set", "k=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["k"], found["kind"]) == ("saelens", 5, "autoencoder")
    assert found["hook"] == {
        "layer": 1,
        "huggingface": "layers.1.output",
        "transformer_lens": "blocks.1.hook_resid_post",
    }
    assert found["dtype_in_file"] == "float32" and found["bytes_in_file"] > 0
    assert main(["inspect", str(sae_folder), "--from-format", "sparsify"]) == 2
    assert "a sparsify SAE has the keys" in capsys.readouterr().err


def test_env_names_a_backend_and_a_reason_for_every_op(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    from fastsae.ops import backend

    assert set(found["ops"]["cpu"]) == set(backend.OPS)
    for row in found["ops"]["cpu"].values():
        assert row["name"] in backend.BACKENDS
        assert row["reason"]
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in backend.OPS)


def test_env_says_why_a_forced_backend_is_impossible(capsys, monkeypatch):
    monkeypatch.setenv("FASTSAE_BACKEND", "warp")
    assert main(["env", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["ops"]["cpu"]["topk"]
    assert row["name"] == "none"
    assert "warp" in row["reason"]
