"""Runs of the trainer: what they learn and leave behind, and one line for every mistake."""

import dataclasses
import json
import os

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.sae import SAE
from fastsae.train import TrainConfig, train
from fastsae.training.config import Plan, default_lr

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def test_a_run_learns_saves_and_cleans_up(run, config, tmp_path, equal):
    config = dataclasses.replace(config, tokens=200 * 128, lr=1e-2, checkpoint_every=50)
    seen = []
    sae = run(config, on_log=seen.append)
    assert set(os.listdir(config.output)) == {
        "cfg.json",
        "sae_weights.safetensors",
        "fastsae.json",
        "fastsae_stats.safetensors",
        "train.json",
        "train_log.jsonl",
    }
    assert [r["step"] for r in seen] == list(range(1, 201))
    assert set(seen[0]) == {"step", "tokens", "fvu", "l0", "dead", "lr", "tokens_per_s"}
    assert seen[-1]["fvu"] < 0.3 < seen[0]["fvu"] and seen[-1]["l0"] <= config.k
    loaded = SAE.from_pretrained(config.output)
    assert equal(sae, loaded)
    assert loaded.config.hook_name.startswith(("blocks.0", "layers.0"))
    metrics = json.loads(open(f"{config.output}/train.json").read())["metrics"]
    assert metrics["held_out"] and metrics["tokens"] >= 90 and metrics["fvu"] < 0.4
    assert metrics["training_tokens"] == 200 * 128


def test_the_same_seed_gives_the_same_weights(run, config, tmp_path, equal):
    first = run(config)
    assert equal(first, run(dataclasses.replace(config, output=tmp_path / "again")))
    other = run(dataclasses.replace(config, output=tmp_path / "other", seed=1))
    assert not torch.equal(first.W_dec, other.W_dec)


def test_a_named_cache_is_kept_and_used_again(run, config, tmp_path, model):
    path = tmp_path / "acts.bin"
    config = dataclasses.replace(config, activation_cache=str(path))
    run(config)
    assert path.exists()
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    sae = run(dataclasses.replace(config, output=tmp_path / "other", k=2, lr=5e-4))
    handle.remove()
    assert sae.config.k == 2
    with pytest.raises(FastsaeError, match="cache_gb"):
        run(dataclasses.replace(config, output=tmp_path / "third", cache_gb=1e-9))


def test_user_mistakes_are_one_line(run, config, tmp_path, model, tokenizer, one_line):
    replace = dataclasses.replace
    (tmp_path / "empty.txt").write_text("\n \n")
    for changed, told in (
        ({"layer": 2}, r"layer: got 2, .* has layers 0 to 1"),
        ({"text": (str(tmp_path / "nothing.txt"),)}, "does not exist"),
        ({"text": (str(tmp_path / "empty.txt"),)}, "corpus is empty"),
        ({"d_sae": None, "expansion": 1, "k": 17}, "k: got 17, expected at most d_sae = 16"),
        ({"output": str(tmp_path / "empty.txt")}, "cannot write the run"),
    ):
        with pytest.raises(FastsaeError, match=told) as error:
            run(replace(config, **changed))
        assert one_line(error)
    with pytest.raises(FastsaeError, match="give both"):
        train(config, model=model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(FastsaeError, match=r"layer 0: NaN or infinite.*model batch 1") as error:
        run(config)
    assert one_line(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", "mlp.3"),
        ("k", 0),
        ("k", True),
        ("k", 99),
        ("epochs", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("loss", "l2"),
        ("dtype", "int8"),
        ("resume", "yes"),
        ("text", ()),
        ("samples", 10),
        ("buffer_tokens", 200),
        ("ctx_len", 1),
        ("top_p", 1.5),
        ("decay_fraction", 2),
        ("tokens", 0),
    ],
)
def test_config_names_the_bad_field(config, field, value, one_line):
    with pytest.raises(FastsaeError, match=field if field != "layer" else "hook") as error:
        dataclasses.replace(config, **{field: value})
    assert one_line(error)


def test_config_round_trip_and_defaults():
    config = TrainConfig(layer=3, output="x", text="a.txt")
    assert config.text == ("a.txt",)
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config
    p = Plan.of(config, 1024, corpus_tokens=10**9)
    assert (p.d_sae, p.k_aux, p.dead_after_tokens) == (8192, 512, 10_000_000)
    assert p.lr == pytest.approx(2e-4 * 2**0.5) and p.warmup_steps == 1000
    assert p.steps == -(-(10**9) // 4096)
    short = Plan.of(config, 1024, corpus_tokens=4096 * 1250)
    assert short.lr == pytest.approx(4 * p.lr) and default_lr(2048, 10) == 3e-3
