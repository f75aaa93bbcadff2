"""The model's own samples: what generate gives, seeded, and continued where they stopped."""

import json

import pytest
import torch

from fastsae.data import texts
from fastsae.errors import FastsaeError
from fastsae.training.sampling import sample, sample_batch, sample_texts, write_samples

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(32, 48, layers=3, heads=4)


def test_greedy_samples_are_what_generate_gives(model, tokenizer):
    prompts = ["w1", "w2 w3 w4", "w5 w6"]
    # Temperature 1e-6 leaves one token: prompts of different lengths must not disturb each other.
    found = sample_batch(
        model, tokenizer, 0, prompts=prompts, length=12, batch_size=8, temperature=1e-6
    )
    wanted = set()
    for prompt in prompts:
        ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_length=12, do_sample=False
        )
        wanted.add(tokenizer.decode(out[0], skip_special_tokens=True))
    assert set(found) <= wanted and len(found) == 8 and len(set(found)) > 1


def test_samples_are_seeded_and_bounded(model, tokenizer):
    options = {"length": 16, "batch_size": 4, "prompts": ["w1", "w2"], "top_p": 0.9}
    found = list(sample_texts(model, tokenizer, 200, seed=5, **options))
    assert found == list(sample_texts(model, tokenizer, 200, seed=5, **options))
    assert found != list(sample_texts(model, tokenizer, 200, seed=6, **options))
    assert len(found) <= 16 and all(t.startswith(("w1", "w2")) for t in found)
    assert max(len(t.split()) for t in found) <= 15
    with pytest.raises(FastsaeError, match="top_p"):
        sample_batch(model, tokenizer, 0, top_p=0.0)


def test_sampling_is_the_nucleus_distribution():
    p = torch.tensor([0.05, 0.4, 0.25, 0.0, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    rows = p.log().expand(20_000, -1)
    full = sample(rows, 1.0, 1.0, generator).bincount(minlength=6) / 20_000
    assert torch.allclose(full, p, atol=0.02) and full[3] == 0
    # The smallest set with at least 0.6 of the mass is {1, 2}.
    nucleus = sample(rows, 1.0, 0.6, generator).bincount(minlength=6) / 20_000
    assert torch.allclose(nucleus, torch.tensor([0, 0.4, 0.25, 0, 0, 0]) / 0.65, atol=0.02)
    sharp = sample(rows, 0.5, 1.0, generator).bincount(minlength=6) / 20_000
    assert torch.allclose(sharp, p.square() / p.square().sum(), atol=0.02)


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_interrupted_sampling_goes_on(model, tokenizer, tmp_path, name):
    options = {"length": 8, "batch_size": 4, "seed": 1}
    whole = write_samples(tmp_path / "whole" / name, model, tokenizer, 150, **options)

    def interrupt(tokens):
        if tokens == 64:
            raise KeyboardInterrupt

    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        write_samples(path, model, tokenizer, 150, report=interrupt, **options)
    assert not path.exists()
    with open(tmp_path / (name + ".partial"), "ab") as file:
        file.write(b"half a batch")
    reported = []
    write_samples(path, model, tokenizer, 150, report=reported.append, **options)
    assert reported == [96, 128, 160] and path.read_bytes() == whole.read_bytes()
    assert list(texts(path)) == list(sample_texts(model, tokenizer, 150, **options))
    assert write_samples(path, model, tokenizer, 150, **options) == path
    with pytest.raises(FastsaeError, match="other settings"):
        write_samples(path, model, tokenizer, 151, **options)
    assert json.loads((tmp_path / (name + ".json")).read_text())["batches"] == 5
