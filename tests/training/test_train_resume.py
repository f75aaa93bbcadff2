"""Interrupted runs: exact resume, checkpoints, full disks, and what a resume refuses."""

import dataclasses
import errno
import json
import os
import signal

import pytest
import torch
from safetensors import SafetensorError

from fastsae.errors import FastsaeError
from fastsae.train import Interrupted
from fastsae.training import checkpoint

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def stop_at(step, how):
    """An on_log that interrupts after `step` steps."""

    def on_log(record):
        if record["step"] == step:
            how()

    return on_log


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def logged(config):
    lines = [json.loads(s) for s in open(f"{config.output}/train_log.jsonl")]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


@pytest.mark.parametrize("cache", [None, "auto"])
def test_interrupted_and_resumed_is_bit_identical(run, config, tmp_path, cache, one_line, equal):
    config = dataclasses.replace(config, activation_cache=cache)
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    before = signal.getsignal(signal.SIGINT)  # a shell may start its background jobs deaf to it
    for step in (3, 12):
        with pytest.raises(Interrupted) as error:
            run(config, on_log=stop_at(step, interrupt))
        assert one_line(error) and f"at step {step} of 24" in str(error.value)
        assert signal.getsignal(signal.SIGINT) is before

    def crash():
        raise RuntimeError("the power went out")

    # Without a signal there is no farewell checkpoint: the one of step 14 (every 7) is used.
    with pytest.raises(RuntimeError):
        run(config, on_log=stop_at(19, crash))
    assert checkpoint.steps(tmp_path / "sae" / "checkpoints") == [12, 14]
    resumed = run(dataclasses.replace(config, resume="must", checkpoint_every=100))
    assert equal(whole, resumed)
    assert logged(config) == logged(dataclasses.replace(config, output=tmp_path / "whole"))


def test_interrupting_while_the_buffer_fills(run, config, tmp_path, model, equal):
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    runs = []

    def count(*_):
        runs.append(1)
        if len(runs) == 2:
            interrupt()

    config = dataclasses.replace(config, model_batch_size=4)
    handle = model.register_forward_pre_hook(count)
    with pytest.raises(Interrupted, match="at step 0 of 24"):
        run(config)
    handle.remove()
    reference = run(dataclasses.replace(config, output=tmp_path / "four"))
    assert equal(run(config), reference) and whole.stats.tokens == reference.stats.tokens


def test_only_two_checkpoints_are_kept_and_damage_is_reported(run, config, tmp_path, one_line):
    with pytest.raises(Interrupted):
        run(dataclasses.replace(config, checkpoint_every=2), on_log=stop_at(9, interrupt))
    place = tmp_path / "sae" / "checkpoints"
    assert sorted(os.listdir(place)) == ["step-00000008", "step-00000009"]
    weights = place / "step-00000009" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FastsaeError, match=r"step-00000009.*delete that directory") as error:
        run(config)
    assert one_line(error)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_full_disk_is_one_line_and_costs_one_interval(
    run, config, tmp_path, monkeypatch, failure, one_line, equal
):
    whole = run(dataclasses.replace(config, output=tmp_path / "whole"))
    real, place = checkpoint.save_file, tmp_path / "sae" / "checkpoints"

    def full(tensors, path):
        if "step-00000014" in str(path):
            path.write_bytes(b"half")
            raise failure
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FastsaeError, match=r"disk is full.*step 7 is intact") as error:
        run(config)
    assert one_line(error) and os.listdir(place) == ["step-00000007"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert equal(run(config), whole)


def test_resume_refuses_other_settings_by_name(run, config, corpus, one_line):
    with pytest.raises(Interrupted):
        run(config, on_log=stop_at(2, interrupt))
    for field, value in (("k", 5), ("lr", 2e-3), ("seed", 9), ("ctx_len", 8)):
        with pytest.raises(FastsaeError, match=f"resume: {field} is") as error:
            run(dataclasses.replace(config, **{field: value}))
        assert one_line(error)
    run(dataclasses.replace(config, dtype="bfloat16", checkpoint_every=3))
    with pytest.raises(FastsaeError, match="dtype is 'float32'"):
        run(config)


def test_changed_text_and_changed_model_are_noticed(run, config, corpus, model):
    with pytest.raises(Interrupted):
        run(config, on_log=stop_at(2, interrupt))
    text = corpus.read_text()
    corpus.write_text(text + "\n\nw1 w2 w3")
    with pytest.raises(FastsaeError, match="the text changed"):
        run(config)
    corpus.write_text(text)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    with pytest.raises(FastsaeError, match="model_weights"):
        run(config)


def test_resume_modes_and_finished_runs(run, config, equal):
    with pytest.raises(FastsaeError, match="no checkpoint"):
        run(dataclasses.replace(config, resume="must"))
    first = run(config)

    def never(_record):
        raise AssertionError("a finished run must not train")

    assert equal(run(config, on_log=never), first)
    with pytest.raises(FastsaeError, match="resume: k is 3"):
        run(dataclasses.replace(config, k=3))
    other = run(dataclasses.replace(config, k=3, resume="never"))
    assert other.config.k == 3


def test_training_on_its_own_samples(run, config, tmp_path, equal):
    config = dataclasses.replace(config, text=(), samples=600, prompts=("w1", "w2 w3"))
    with pytest.raises(Interrupted):
        run(config, on_log=stop_at(5, interrupt))
    sae = run(config)
    again = dataclasses.replace(config, output=tmp_path / "again")
    assert equal(sae, run(again))
    assert (tmp_path / "sae" / "samples.jsonl.gz").read_bytes() == (
        tmp_path / "again" / "samples.jsonl.gz"
    ).read_bytes()
