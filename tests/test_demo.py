"""The demo's measurements on a tiny model, its fixed topics, and the shipped SAE."""

import json
import math

import pytest
import torch

import fastsae
from fastsae.demo import effect, report
from fastsae.demo.run import SHIPPED_SAE, histograms, load_topics, passes
from fastsae.steering.compare import compare


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "▁I", "▁went", "▁to", "▁the", "▁sea", "▁Sea", "▁sky", "▁"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


PROMPTS = ["I went to the", "the sea"]


def draw(model, tokenizer, ids, seed=3, prompts=PROMPTS):
    noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed))
    return effect.sample(model, tokenizer, prompts, [ids], noise.repeat(len(prompts) // 2, 1))


def test_first_tokens_take_both_cases(tokenizer):
    assert effect.first_tokens(tokenizer, ["sea"]).tolist() == [7, 8]


def test_mass_and_perplexity_against_a_plain_loop(model, tokenizer):
    """Each row alone, without padding or cache, gives the recorded mass and perplexity."""
    ids = effect.first_tokens(tokenizer, ["sea", "sky"])
    noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    drawn = draw(model, tokenizer, ids)
    loss, count = 0.0, 0
    for i, (tokens, mask) in enumerate(zip(drawn.tokens, drawn.mask, strict=True)):
        row = tokens[mask.bool()]
        prompt = int(mask[: drawn.prompt_width].sum())
        with torch.inference_mode():
            log_p = model(row[None]).logits[0].double().log_softmax(-1)
        mass = 0.0
        for step, position in enumerate(range(prompt, len(row))):
            p = log_p[position - 1].exp()
            mass += float(p[ids].sum())
            loss -= float(log_p[position - 1, row[position]])
            assert int((p.cumsum(-1) <= noise[i, step]).sum()) == int(row[position])
        assert float(drawn.mass[i, 0]) == pytest.approx(mass / (len(row) - prompt), rel=1e-4)
        count += len(row) - prompt
    assert count < 12, "choose a seed where a row ends early, to see that it counts no further"
    reading = effect.read(model, drawn, [ids])
    assert effect.perplexity(reading) == pytest.approx(math.exp(loss / count), rel=1e-4)
    # Unsteered, reading the text gives what was recorded while it was written.
    assert torch.allclose(reading.mass, drawn.mass, rtol=1e-4)


def test_draws_follow_the_models_distribution(model, tokenizer):
    """With 4000 rows the share of each first token is its probability, within 4 standard errors."""
    n = 4000
    noise = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    drawn = effect.sample(model, tokenizer, ["I went"] * n, [torch.tensor([7])], noise)
    share = torch.bincount(drawn.tokens[:, -1], minlength=len(tokenizer)).double() / n
    ids = tokenizer("I went", return_tensors="pt").input_ids
    with torch.inference_mode():
        p = model(ids).logits[0, -1].double().softmax(-1)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_sampling_is_repeatable_and_does_not_depend_on_the_batch(model, tokenizer):
    ids = effect.first_tokens(tokenizer, ["sea"])
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = draw(model, tokenizer, ids)
    assert torch.equal(before, torch.get_rng_state())
    assert draw(model, tokenizer, ids).texts == one.texts
    assert draw(model, tokenizer, ids, prompts=PROMPTS * 3).texts == one.texts * 3
    assert draw(model, tokenizer, ids, seed=4).texts != one.texts


def test_steering_towards_a_word_raises_its_mass(model, tokenizer):
    ids = effect.first_tokens(tokenizer, ["sea"])
    sae = fastsae.SAE(fastsae.SAEConfig(d_in=32, d_sae=16, k=2, hook_name="layers.1.output"))
    direction = model.lm_head.weight.detach()[ids].mean(0)
    with torch.no_grad():
        sae.W_dec[5] = direction / direction.norm()
    policy = fastsae.Policy([fastsae.add([5], 40.0)])
    base = draw(model, tokenizer, ids)
    with fastsae.attach(model, {"layers.1.output": sae}) as handle:
        handle.set([None, None, policy, policy])
        mixed = draw(model, tokenizer, ids, prompts=PROMPTS * 2)
    alike = draw(model, tokenizer, ids, prompts=PROMPTS * 2)
    assert torch.equal(mixed.mass[:2], alike.mass[:2]), "a row without a policy changed"
    assert mixed.mass[2:].mean() > 2 * base.mass.mean()
    assert draw(model, tokenizer, ids).texts == base.texts, "the hook was left behind"


def test_compare_is_fair_and_refuses_nothing_to_write(model, tokenizer):
    sae = fastsae.SAE(fastsae.SAEConfig(d_in=32, d_sae=16, k=2, hook_name="layers.1.output"))
    nothing, strong = (
        fastsae.Policy([fastsae.add([5], 0.0)]),
        fastsae.Policy([fastsae.add([5], 90.0)]),
    )
    base, steered = compare(model, tokenizer, sae, nothing, "I went", max_new_tokens=8, seed=1)
    assert base == steered, "the same random numbers"
    assert compare(model, tokenizer, sae, strong, "I went", max_new_tokens=8, seed=1)[0] == base
    assert compare(model, tokenizer, sae, strong, "I went", max_new_tokens=8, seed=1)[1] != base
    with pytest.raises(fastsae.FastsaeError, match="max_new_tokens: got 0"):
        compare(model, tokenizer, sae, strong, "I went", max_new_tokens=0)
    with pytest.raises(fastsae.FastsaeError, match="prompt: '' has no token"):
        compare(model, tokenizer, sae, strong, "")


def test_topics_are_fixed_and_held_out_words_are_not_searched():
    setup = load_topics()
    topics = setup["topics"]
    assert len(topics) == 10
    assert len({t["name"] for t in topics}) == 10
    for topic in topics:
        assert len(topic["held_out"]) >= 5
        assert not set(topic["held_out"]) & set(topic["search"])
        assert topic["name"] not in topic["held_out"]
        assert len(set(topic["held_out"])) == len(topic["held_out"])
    assert len(setup["prompts"]) >= 16
    words = {w for t in topics for w in (*t["search"], *t["held_out"])}
    for prompt in setup["prompts"]:
        assert not words & set(prompt.lower().split()), f"{prompt!r} names a topic word"


def test_shipped_sae_is_small_and_says_where_it_belongs():
    size = sum(f.stat().st_size for f in SHIPPED_SAE.iterdir())
    assert size <= 25e6
    sae = fastsae.SAE.from_pretrained(SHIPPED_SAE)
    assert sae.config.activation == "topk"
    assert sae.config.d_in == 640
    assert sae.config.model_name == "gemma3-270m"
    assert sae.stats is not None
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.config.d_sae), atol=4e-3)
    assert float((sae.stats.frequency > 0).float().mean()) > 0.5
    # On average k latents are active per token: the statistics belong to these weights.
    assert float(sae.stats.frequency.sum()) == pytest.approx(sae.config.k, rel=0.05)


def topic(**more):
    base = {
        "name": "sea <b>", "search": ["a"], "held_out": ["b"], "features": [1, 2], "fold": 8.0,
        "writing_fold": 9.0, "random_fold": 1.1, "random_folds": [1.0, 1.2],
        "perplexity_ratio": 1.4, "passed": True,
        "pair": {"prompt": "I <i>", "base": "x", "steered": "y & z"},
    }  # fmt: skip
    return base | more


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"fold": 4.99}, False),
        ({"random_fold": 1.5}, False),
        ({"perplexity_ratio": 2.01}, False),
        ({"fold": 5.0, "perplexity_ratio": 2.0}, True),
    ],
)
def test_the_criterion(change, good):
    assert passes(topic(**change)) is good


def test_report_is_self_contained_and_escapes_text(tmp_path):
    stats = fastsae.FeatureStats(torch.rand(50), torch.rand(50), torch.rand(50), 100)
    result = {
        "seed": 0, "command": "fastsae demo", "timings_s": {"steer": 1.25},
        "model": {"name": "m", "class": "M"},
        "sae": {"d_sae": 50, "d_in": 4, "k": 2, "hook_name": "layers.1.output"},
        "machine": {"cpu": "c", "threads": 2, "fastsae": "0", "torch": "2"},
        "topics": [topic(), topic(name="sky", fold=0.2, passed=False)],
        "features": [{"feature": 3, "words": ["<w>"], "texts": [
            {"before": "<s>", "token": "t", "after": "&", "value": 1.0}]}],
        "histogram": histograms(stats),
        "summary": {"topics_passed": 1, "median_fold": 4.1, "random_fold_mean": 1.1,
                    "perplexity_ratio_max": 1.4, "seconds": 3.0},
    }  # fmt: skip
    json.dumps(result)
    report.write(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "sea &lt;b&gt;" in page
    assert "<s>" not in page.replace("<style>", "")
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<svg") == 3
    assert "×8.0" in page
    assert "the mean of 2 draws" in page
