"""explain_sharded: against explain, the same bits for any number of processes, and resuming."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.explain import progress as progress_module
from fastsae.explain import sharded
from fastsae.explain.mi import explain, feature_vectors
from fastsae.explain.sharded import Decoder, explain_sharded
from fastsae.explain.vocabulary import word_vectors
from fastsae.ops import mi_parts
from fastsae.ops.backend import supported

PROCESS = Path(__file__).with_name("sharded_process.py")
OBJECTIVES = ("mi", "pmi", "paper", "logit")


@pytest.fixture(scope="module")
def parts():
    spec = importlib.util.spec_from_file_location("sharded_process", PROCESS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sample(parts):
    return parts.build()


def dense(sae, model, tokenizer, vocab, objective, temperature):
    """score(f, v) as MATH.md §3 writes it, from float64 products; [F, V]."""
    raw = feature_vectors(sae, model).double() @ word_vectors(model, tokenizer, vocab).double().T
    if objective == "logit":
        return raw
    log_p_f, p_v = (raw / temperature).log_softmax(0), (raw / temperature).softmax(1)
    scores = {"mi": p_v * (log_p_f + math.log(len(raw))), "pmi": log_p_f, "paper": p_v * log_p_f}
    return scores[objective]


@pytest.mark.parametrize("served_by", supported("mi_topk"))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_like_explain(sample, objective, served_by, monkeypatch):
    monkeypatch.setenv("FASTSAE_BACKEND", served_by)
    monkeypatch.setattr(mi_parts, "ROWS", 24)
    monkeypatch.setattr(mi_parts, "WORD_BLOCK", 128)
    sae, model, tokenizer, vocab = sample
    whole = explain(sae, model, tokenizer, vocab, objective, 7)
    found = explain_sharded(sae, model, tokenizer, vocab, objective, 7, shard=32, progress=False)
    assert found.temperature == pytest.approx(whole.temperature, rel=1e-12)
    for name in ("vocab", "objective", "model_name", "sae"):
        assert getattr(found, name) == getattr(whole, name)
    assert torch.equal(found.stats.frequency, sae.stats.frequency)
    exact = dense(*sample, objective, whole.temperature)
    kept = exact.gather(1, found.indices.long())
    error = (found.scores - kept).abs().max()
    theirs = (whole.scores - exact.gather(1, whole.indices.long())).abs().max()
    tiny = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert error <= 2 * theirs + tiny
    assert (found.scores.diff(dim=1) <= 0).all()
    omitted = exact.scatter(1, found.indices.long(), -math.inf).max(1).values
    assert (omitted <= kept.min(1).values + 2 * error + tiny).all()


def test_the_same_bits_for_1_2_and_4_processes(tmp_path):
    def run(rank, world, threads):
        folder = tmp_path / str(world)
        folder.mkdir(exist_ok=True)
        arguments = [sys.executable, "-P", str(PROCESS), rank, world, threads, folder]
        return subprocess.Popen([str(a) for a in arguments], stderr=subprocess.PIPE, text=True)

    for world, threads in ((1, 2), (2, 1), (4, 1)):
        for process in [run(rank, world, threads) for rank in range(world)]:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    one = torch.load(tmp_path / "1" / "1-0.pt")
    assert len(one) >= 3
    for world in (2, 4):
        for rank in range(world):
            other = torch.load(tmp_path / str(world) / f"{world}-{rank}.pt")
            for key, tensors in one.items():
                for ours, theirs in zip(tensors, other[key], strict=True):
                    bits = torch.int64 if ours.dtype == torch.float64 else torch.int32
                    assert torch.equal(ours.view(bits), theirs.view(bits)), (world, rank, key)


def _run(sample, directory, **options):
    sae, model, tokenizer, vocab = sample
    options = {"top": 7, "shard": 32, "progress": False} | options
    return explain_sharded(sae, model, tokenizer, vocab, directory=directory, **options)


def test_a_stopped_run_continues_from_its_files(sample, tmp_path, monkeypatch):
    whole = _run(sample, None)
    done, original = [], mi_parts.MIParts.topk

    def stop_at_the_fourth(self, *arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(mi_parts.MIParts, "topk", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        _run(sample, tmp_path / "run")
    monkeypatch.setattr(mi_parts.MIParts, "topk", original)
    calls = {"topk": 0, "columns": 0, "spread": 0}
    for name in calls:
        real = getattr(mi_parts.MIParts, name)

        def counted(self, *arguments, name=name, real=real):
            calls[name] += 1
            return real(self, *arguments)

        monkeypatch.setattr(mi_parts.MIParts, name, counted)
    again = _run(sample, tmp_path / "run")
    assert calls == {"topk": 4, "columns": 0, "spread": 0}  # 7 shards, three were done
    assert torch.equal(again.scores, whole.scores) and torch.equal(again.indices, whole.indices)
    assert again.temperature == whole.temperature
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_files_of_another_run_are_refused(sample, tmp_path):
    _run(sample, tmp_path)
    for options, says in (
        ({"top": 6}, "top 7, now 6"),
        ({"shard": 64}, "shard 32, now 64"),
        ({"objective": "mi"}, "objective 'pmi', now 'mi'"),
        ({"temperature": 3.0}, "temperature 'auto', now 3.0"),
        ({"translator": lambda x: x * 2 + x.flip(1)}, "features differs"),
    ):
        with pytest.raises(FastsaeError, match=says):
            _run(sample, tmp_path, **options)
    with torch.no_grad():
        sample[0].W_dec[100] *= 2
    with pytest.raises(FastsaeError, match="sae differs"):
        _run(sample, tmp_path)


def test_a_damaged_file_is_named(sample, tmp_path):
    _run(sample, tmp_path)
    path = tmp_path / "columns-00002.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FastsaeError, match=r"columns-00002\.safetensors: damaged"):
        _run(sample, tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(FastsaeError, match=r"plan\.json: cannot be read"):
        _run(sample, tmp_path)


def test_bfloat16_rows_and_bad_arguments(sample):
    sae, model, tokenizer, vocab = sample
    rows = sae.W_dec.detach().bfloat16()
    half = explain_sharded(
        Decoder(sae.config, rows, None), model, tokenizer, vocab, top=3, shard=50, progress=False
    )
    sae.W_dec.data = rows.float()
    full = explain_sharded(sae, model, tokenizer, vocab, top=3, shard=50, progress=False)
    assert torch.equal(half.scores, full.scores) and half.stats is None
    assert half.sae.digest == full.sae.digest
    bad = (({"shard": 0}, "shard: got 0"), ({"temperature": -1}, "temperature: got -1"))
    for options, says in bad:
        with pytest.raises(FastsaeError, match=says):
            explain_sharded(sae, model, tokenizer, vocab, **options)


def test_progress_estimates_from_new_work_only(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with progress_module.Progress("explain", 100, "steps") as bar:
        bar.skip(50)
        assert bar.left() == "? left"
        clock[0] = 20.0
        bar.add(10)
    assert bar.left() == "0:01:20 left"
    assert capsys.readouterr().err == "explain: 60 of 100 steps, 0:01:20 left\n"


def test_progress_of_an_unknown_size_and_of_fractions(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    with progress_module.Progress("examples", math.inf, "texts") as bar:
        clock[0] = 20.0
        bar.add(10)
    with progress_module.Progress("explain", 0.3, "steps") as bar:
        for _ in range(3):
            bar.add(0.1 - 1e-17)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "examples: 10 of ? texts, ? left" and "0 of 0 steps" in lines[1]


def test_the_plan_is_json(sample, tmp_path):
    _run(sample, tmp_path)
    plan = json.loads((tmp_path / sharded.PLAN).read_text())
    assert plan["shard"] == 32 and plan["sae"]["d_sae"] == len(sample[0].W_dec)
