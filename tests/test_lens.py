"""The tuned lens: its gradient against autograd, what training gains, files, what it refuses."""

import pytest
import torch

import fastsae
from fastsae.errors import FastsaeError
from fastsae.explain import TunedLens, Vocabulary, explain, feature_vectors, train_lens
from fastsae.explain.lens import _Head

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

D, F = 16, 24
WORDS = [f"w{chr(97 + i)}" for i in range(24)]
TEXTS = [" ".join([""] + [WORDS[(i * j + j // 3) % 24] for j in range(40)]) for i in range(1, 24)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"▁{word}": i for i, word in enumerate(WORDS, 2)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", bos_token="<s>"
    )


def _llama(seed=1):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=26, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=3,
            num_attention_heads=2, initializer_range=0.4,
        )
    )  # fmt: skip
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return _llama()


@pytest.fixture(scope="module")
def lens(model, tokenizer):
    return train_lens(
        model, tokenizer, TEXTS, 0, tokens=20_000, batch_tokens=128, lr=2e-2, ctx_len=32
    )


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_divergence_and_its_gradient_are_those_of_autograd(model, cap):
    model.config.final_logit_softcapping = cap
    try:
        head = _Head(model)
    finally:
        model.config.final_logit_softcapping = None
    x, target = torch.randn(5, D, requires_grad=True), torch.randn(5, D)
    found = head.divergence(x, target, gradient=True)
    gradient, x.grad = x.grad, None

    def log_p(hidden):
        z = (hidden @ model.lm_head.weight.T).double()
        z = z if cap is None else cap * (z / cap).tanh()
        return z.log_softmax(-1)

    p, q = log_p(target), log_p(model.model.norm(x))
    expected = (p.exp() * (p - q)).sum()
    (expected / len(x)).backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-6)


def test_training_brings_the_layer_closer_to_the_output(lens):
    about = lens.about
    assert about["divergence"] < 0.5 * about["divergence_logit_lens"]
    assert lens.hook == "layers.0.output" and about["held_out_tokens"] > 0
    assert lens.A.shape == (D, D) and lens.b.shape == (D,) and lens.A.dtype == torch.float32


def test_the_recorded_divergence_is_what_the_lens_achieves(model, tokenizer, lens):
    """On other texts, computed from the model's own logits and the translated residual."""
    ids = tokenizer([t + "" for t in TEXTS[:8]], return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([torch.ones(8, 1, dtype=torch.long), ids.input_ids], 1)[:, :32]
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        p = out.logits[:, 1:].log_softmax(-1)
        x = out.hidden_states[1][:, 1:]
        q = model.lm_head(model.model.norm(lens.translate(x))).log_softmax(-1)
        plain = model.lm_head(model.model.norm(x)).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert float(kl) < 0.5 * float((p.exp() * (p - plain)).sum(-1).mean())


def test_the_last_layer_needs_no_lens(model, tokenizer):
    last = train_lens(model, tokenizer, TEXTS, 2, tokens=64, lr=1e-9, ctx_len=32)
    assert last.about["divergence_logit_lens"] == pytest.approx(0, abs=1e-5)
    before = train_lens(model, tokenizer, TEXTS, "layers.2.input", tokens=64, ctx_len=32)
    assert before.hook == "layers.2.input" and before.about["divergence_logit_lens"] > 1e-3


def test_a_direction_goes_through_the_lens_without_its_constant(lens):
    x, d = torch.randn(3, D), torch.randn(3, D)
    torch.testing.assert_close(
        lens.directions(d), lens.translate(x + d) - lens.translate(x), rtol=1e-4, atol=1e-4
    )
    assert lens.b.abs().max() > 0


def test_low_rank_is_of_that_rank_and_runs_repeat(model, tokenizer):
    settings = {"tokens": 600, "batch_tokens": 64, "ctx_len": 32}
    low, again = (train_lens(model, tokenizer, TEXTS, 0, rank=2, **settings) for _ in range(2))
    assert torch.linalg.matrix_rank(low.A, rtol=1e-4) == 2 and low.about["rank"] == 2
    assert torch.equal(low.A, again.A) and low.digest == again.digest
    other = train_lens(model, tokenizer, TEXTS, 0, rank=2, seed=1, **settings)
    assert other.digest != low.digest


def test_explain_through_a_lens(model, tokenizer, lens, tmp_path):
    torch.manual_seed(2)
    sae = fastsae.SAE(fastsae.SAEConfig(D, F, k=2, hook_name="blocks.0.hook_resid_post"))
    loaded = TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    assert torch.equal(loaded.A, lens.A) and torch.equal(loaded.b, lens.b)
    assert loaded.about == lens.about and loaded.digest == lens.digest
    vocab = Vocabulary(WORDS)
    ex = explain(sae, model, tokenizer, vocab, objective="logit", lens=loaded, top=24)
    rows = sae.W_dec.detach()
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(rows + rows @ lens.A.T))[:, 2:]
    torch.testing.assert_close(
        ex.scores, expected.gather(1, ex.indices.long()), rtol=1e-4, atol=1e-4
    )
    assert ex.made_with == {"lens": {"hook": "layers.0.output", "digest": lens.digest}}
    assert not torch.equal(
        feature_vectors(sae, model), feature_vectors(sae, model, translator=lens.directions)
    )
    with pytest.raises(FastsaeError, match="give one of the two"):
        explain(sae, model, tokenizer, vocab, "pmi", lens=lens, translator=lens.directions)


def test_a_lens_of_another_model_or_place_is_refused(lens, tokenizer, tmp_path):
    sae = fastsae.SAE(fastsae.SAEConfig(D, F, k=2, hook_name="blocks.1.hook_resid_post"))
    with pytest.raises(FastsaeError, match=r"lens: fitted at layers.0.output.*--layer layers.1"):
        explain(sae, _llama(), tokenizer, WORDS, "pmi", lens=lens)
    with pytest.raises(FastsaeError, match="the model is another one"):
        lens.check(_llama(seed=5))
    with pytest.raises(FastsaeError, match="cannot read a lens"):
        TunedLens.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 7}, "layer: got 7"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"batch_tokens": 1}, "batch_tokens: got 1"),
        ({"rank": 0}, "rank: got 0"),
        ({"rank": D + 1}, f"accepted is 1 to {D}"),
        ({"texts": []}, "the corpus is empty"),
        ({"texts": [" wa wb"]}, "too few for a lens"),
    ],
)
def test_errors(model, tokenizer, arguments, message):
    given = {"texts": TEXTS, "layer": 0} | arguments
    with pytest.raises(FastsaeError, match=message):
        train_lens(model, tokenizer, given.pop("texts"), given.pop("layer"), **given)
