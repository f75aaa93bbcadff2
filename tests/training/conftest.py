"""A tokenizer of words w0, w1, …, tiny Llamas, made-up text, and short runs of the trainer."""

import os
import random

import pytest
import torch

from fastsae.sae import SAE
from fastsae.train import TrainConfig, train

WORDS = 50


@pytest.fixture(autouse=True)
def quick(monkeypatch, threads):
    """One thread, because the tensors are tiny; no fsync, because no test can see its effect."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=level, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def make_model():
    def make_model(width, inner, layers, heads):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=WORDS + 3,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        return transformers.LlamaForCausalLM(config).eval()

    return make_model


@pytest.fixture(scope="session")
def documents():
    def documents(count=40, seed=0):
        """Each begins with a word of its own, so that no two activations are equal."""
        rng = random.Random(seed)
        return [
            " ".join([f"w{i}"] + [f"w{rng.randrange(WORDS)}" for _ in range(rng.randrange(30))])
            for i in range(count)
        ]

    return documents


# --- runs of the trainer ------------------------------------------------------------------------


@pytest.fixture
def model(make_model):
    """Each test's own: some change its weights."""
    return make_model(16, 32, layers=2, heads=2)


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)
    text = [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(20)) for _ in range(60)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(text))
    return tmp_path / "corpus.txt"


@pytest.fixture
def config(corpus, tmp_path):
    """24 steps over about three epochs of 1100 tokens; dead features from the ninth step on."""
    return TrainConfig(
        layer=0,
        output=tmp_path / "sae",
        text=corpus,
        ctx_len=16,
        d_sae=48,
        k=4,
        batch_tokens=128,
        tokens=24 * 128,
        buffer_tokens=512,
        dead_after_tokens=150,
        lr=1e-3,
        checkpoint_every=7,
        log_every=1,
        eval_tokens=100,
    )


@pytest.fixture
def run(model, tokenizer):
    def call(config, **options):
        return train(config, model=model, tokenizer=tokenizer, progress=False, **options)

    return call


@pytest.fixture(scope="session")
def equal():
    def equal(a: SAE, b: SAE) -> bool:
        tensors = ([*sae.state_dict().values(), *sae.stats[:3]] for sae in (a, b))
        return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))

    return equal


@pytest.fixture(scope="session")
def one_line():
    def one_line(error) -> bool:
        return "\n" not in str(error.value)

    return one_line
