"""explain() against a dense float64 oracle, and its errors."""

import math
import subprocess
import sys

import pytest
import torch

import fastsae
from fastsae.errors import FastsaeError
from fastsae.explain import Vocabulary, word_vectors
from fastsae.explain.mi import explain, feature_vectors

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

V, F, D = 40, 64, 16
WORDS = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(V)]
OBJECTIVES = ("mi", "pmi", "paper", "logit")


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<unk>": 0} | {f"▁{word}": i for i, word in enumerate(WORDS, 1)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V + 1,
            hidden_size=D,
            intermediate_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V + 1, n_embd=D, n_layer=2, n_head=2, n_positions=64)
    )


def _gemma():
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=V + 1,
            hidden_size=D,
            intermediate_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


BUILDERS = {"llama": _llama, "gpt2": _gpt2, "gemma": _gemma}


def _randomised(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim == 1 else 1.0))
    return model.eval()


@pytest.fixture(params=BUILDERS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(1)
    return _randomised(BUILDERS[family]())


@pytest.fixture
def sae():
    torch.manual_seed(2)
    return fastsae.SAE(fastsae.SAEConfig(D, F, k=4, hook_name="blocks.1.hook_resid_post"))


def _normed(family, model, rows):
    """The final norms written out in float64."""
    x = rows.detach().double()
    if family == "gpt2":
        norm = model.transformer.ln_f
        x = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + norm.eps
        ).sqrt()
        return x * norm.weight.detach().double() + norm.bias.detach().double()
    norm = model.model.norm
    eps = norm.eps if family == "gemma" else norm.variance_epsilon
    gain = norm.weight.detach().double() + (1 if family == "gemma" else 0)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def _dense(features, words, objective, temperature):
    logits = features @ words.T
    if objective == "logit":
        return logits
    p_v = (logits / temperature).softmax(1)
    log_p_f = (logits / temperature).log_softmax(0)
    return {
        "mi": p_v * (log_p_f + math.log(len(features))),
        "pmi": log_p_f,
        "paper": p_v * log_p_f,
    }[objective]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_explain_matches_the_dense_oracle(
    family, model, sae, tokenizer, objective, stored_as, device
):
    model, sae = model.to(device, stored_as), sae.to(device, stored_as)
    ex = explain(sae, model, tokenizer, Vocabulary(WORDS), objective=objective, top=7)
    assert ex.scores.shape == ex.indices.shape == (F, 7)
    assert ex.scores.dtype == torch.float32 and ex.indices.dtype == torch.int32
    assert ex.scores.device.type == ex.indices.device.type == "cpu"

    model, sae = model.cpu(), sae.cpu()
    features = _normed(family, model, sae.W_dec)
    words = model.get_output_embeddings().weight.detach().double()[1:]
    auto = (features @ words.T).std(correction=0)
    if objective == "logit":
        assert ex.temperature == 1.0
    else:
        assert ex.temperature == pytest.approx(float(auto), rel=1e-4)
    oracle = _dense(features, words, objective, auto)
    chosen = oracle.gather(1, ex.indices.long())
    bound = 1e-5 * oracle.abs().max()
    assert (chosen - ex.scores).abs().max() <= bound
    assert (ex.scores.diff(dim=1) <= 0).all()
    assert (chosen.amin(1) >= oracle.topk(7).values[:, -1] - bound).all(), "a better word was left"
    assert all(len(set(row.tolist())) == 7 for row in ex.indices)
    assert ex.words(3) == [WORDS[i] for i in ex.indices[3].tolist()]
    assert ex.scores_of(3) == ex.scores[3].tolist()


@pytest.mark.parametrize("family", ["llama"])
def test_given_temperature_translator_and_fewer_words_than_top(model, sae, tokenizer):
    matrix = torch.randn(D, D)
    ex = explain(
        sae,
        model,
        tokenizer,
        WORDS[:5],
        objective="mi",
        temperature=2.5,
        translator=lambda x: x + x @ matrix.T,
    )
    assert ex.scores.shape == (F, 5) and ex.temperature == 2.5
    rows = sae.W_dec.detach()
    features = _normed("llama", model, rows + rows @ matrix.T)
    words = model.lm_head.weight.detach().double()[1:6]
    oracle = _dense(features, words, "mi", 2.5).sort(1, descending=True).values
    torch.testing.assert_close(ex.scores.double(), oracle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma"])
def test_feature_vectors_ignore_the_models_dtype_and_leave_it_alone(model, sae):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    vectors = feature_vectors(sae, model)
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vectors, feature_vectors(sae, model))


@pytest.mark.parametrize("family", ["llama"])
def test_a_model_without_final_norm_uses_the_rows_as_they_are(model, sae):
    del model.model.norm
    assert torch.equal(feature_vectors(sae, model), sae.W_dec)


def test_published_ranking_lists_the_least_related_words(tokenizer):
    """One feature per word: every objective finds it, "paper" puts it last.

    Its score p(v|f)·log p(f|v) is never positive and vanishes with p(v|f), so its largest values
    belong to the words that have nothing to do with the feature.
    """
    torch.manual_seed(3)
    model = _randomised(_llama())
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[1 : D + 1] = 4 * torch.eye(D)
    sae = fastsae.SAE(fastsae.SAEConfig(D, D, k=2))
    sae.W_dec.data = torch.eye(D) + 0.01 * torch.rand(D, D)
    vocab = Vocabulary(WORDS[:D])
    ranked = {o: explain(sae, model, tokenizer, vocab, objective=o, top=D) for o in OBJECTIVES}
    for feature in range(D):
        for objective in ("mi", "pmi", "logit"):
            assert ranked[objective].words(feature)[0] == WORDS[feature], objective
        assert ranked["paper"].words(feature)[-1] == WORDS[feature]
    assert (ranked["paper"].scores <= 0).all()
    p = (feature_vectors(sae, model) @ word_vectors(model, tokenizer, vocab).T).softmax(1)
    best = p.gather(1, ranked["mi"].indices[:, :1].long())
    worst = p.gather(1, ranked["paper"].indices[:, :1].long())
    assert (worst < 1e-2 * best).all()


@pytest.mark.parametrize("family", ["llama"])
def test_explain_is_deterministic_and_belongs_to_its_sae(model, sae, tokenizer):
    ex, again = (explain(sae, model, tokenizer, Vocabulary(WORDS)) for _ in range(2))
    assert torch.equal(ex.scores, again.scores) and torch.equal(ex.indices, again.indices)
    assert ex.objective == "pmi" and ex.scores.shape[1] == 20
    assert ex.sae.hook_name == "blocks.1.hook_resid_post" and ex.model_name == "LlamaForCausalLM"
    ex.check(sae)
    ex.check(sae.bfloat16())
    other = fastsae.SAE(sae.config)
    with pytest.raises(FastsaeError, match=r"another SAE.*digest"):
        ex.check(other)
    with pytest.raises(FastsaeError, match=f"another SAE.*{F} x {D}, the SAE is 8 x {D}"):
        ex.check(fastsae.SAE(fastsae.SAEConfig(D, 8, k=2)))


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "corpus"}, "objective: got 'corpus', accepted are mi, pmi, paper, logit"),
        ({"top": 0}, "top: got 0"),
        ({"top": 2.0}, "top: got 2.0"),
        ({"temperature": 0}, "temperature: got 0"),
        ({"temperature": "std"}, "temperature: got 'std'"),
        ({"vocab": ["wzz"]}, "knows no token of 1 words"),
    ],
)
def test_explain_errors(model, sae, tokenizer, arguments, message):
    with pytest.raises(FastsaeError, match=message):
        explain(sae, model, tokenizer, **({"vocab": WORDS} | arguments))


@pytest.mark.parametrize("family", ["llama"])
def test_explain_refuses_decoders_outside_the_residual_stream(model, tokenizer):
    transcoder = fastsae.SAE(fastsae.SAEConfig(D, 8, k=2))
    transcoder.W_dec = torch.nn.Parameter(torch.randn(8, D + 4))
    with pytest.raises(FastsaeError, match=f"width {D + 4}, the model's residual stream has {D}"):
        explain(transcoder, model, tokenizer, WORDS)
    config = fastsae.SAEConfig(D, 8, k=2, hook_name="blocks.1.attn.hook_z")
    with pytest.raises(FastsaeError, match="inside an attention head"):
        explain(fastsae.SAE(config), model, tokenizer, WORDS)


def test_public_names_are_there_and_the_rest_is_imported_when_asked_for():
    code = """
import sys, fastsae
import fastsae.explain
later = {"annotate", "chat", "export", "finder", "labels", "report", "sharded"}
assert not [m for m in later if f"fastsae.explain.{m}" in sys.modules]
package = sys.modules["fastsae.explain"]
names = package.__all__
assert len(set(names)) == len(names) and set(names) <= set(dir(package))
from fastsae.explain import *
from fastsae.explain import Finder, explain_sharded, label_features, write_html
assert Finder.__module__ == "fastsae.explain.finder"
assert callable(fastsae.explain) and callable(explain)
try:
    package.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise SystemExit("a name that does not exist was found")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
