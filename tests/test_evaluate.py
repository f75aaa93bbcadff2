"""The measures against their definitions, the evaluation of planted features, and its command."""

import itertools
import json
import xml.etree.ElementTree as ET

import pytest
import torch

import fastsae
from fastsae.cli import main
from fastsae.errors import FastsaeError
from fastsae.explain import Explanations, TunedLens, Vocabulary, evaluate, explain
from fastsae.explain.effect import output_effect
from fastsae.explain.evaluate import Truth, logit_scores
from fastsae.explain.mi import feature_vectors
from fastsae.explain.plots import as_markdown, as_svg, as_text
from fastsae.explain.rank import auroc, interval, precision, top_words, trivial_words, word_use
from fastsae.explain.vocabulary import word_vectors
from fastsae.models import resolve_hook

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

D = 32
WORDS = [f"w{chr(97 + i)}" for i in range(20)]
INF = float("inf")


def _texts(start, count):
    return [
        " ".join(["", *(WORDS[(i * 7 + j * (1 + i % 3)) % 20] for j in range(30))])
        for i in range(start, start + count)
    ]


FIT, HELD = _texts(0, 20), _texts(100, 20)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"▁{word}": i for i, word in enumerate(WORDS, 2)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", bos_token="<s>", pad_token="<s>"
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=22, hidden_size=D, intermediate_size=D, num_hidden_layers=2,
            num_attention_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(D)[:22])
        model.lm_head.weight.copy_(torch.eye(D)[:22])
    return model.eval()


@pytest.fixture(scope="module")
def sae():
    """Feature f reads and writes the dimension of word f: what it is about is known."""
    sae = fastsae.SAE(fastsae.SAEConfig(D, 20, k=1, hook_name="layers.0.input"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D)[2:22])
        sae.W_dec.copy_(torch.eye(D)[2:22])
        sae.b_dec.zero_()
    return sae


@pytest.fixture(scope="module")
def result(sae, model, tokenizer):
    lens = TunedLens(
        torch.zeros(D, D), torch.zeros(D), "layers.0.input", "m", _fingerprint(model), {"lr": 1}
    )
    vocab = Vocabulary(WORDS)
    wrong = explain(sae, model, tokenizer, vocab, "paper", top=2)
    return evaluate(
        sae, model, tokenizer, vocab, FIT, HELD, top=1, lens=lens, explanations={"mine": wrong},
        window=8,
    )  # fmt: skip


def _fingerprint(model):
    from fastsae.data import model_fingerprint

    return model_fingerprint(model)


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (6, 12), generator=generator).float()  # many ties
    scores[0, 3] = -INF
    right = torch.rand(6, 12, generator=generator) < 0.4
    right[5] = False
    among = torch.tensor([True] * 10 + [False] * 2)
    found = auroc(scores, right, among)
    for i in range(5):
        good = scores[i, :10][right[i, :10]].tolist()
        bad = scores[i, :10][~right[i, :10]].tolist()
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(good, bad)]
        assert float(found[i]) == pytest.approx(sum(pairs) / len(pairs))
    assert found[5].isnan()


def test_precision_counts_unnamed_places_as_wrong():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [-INF, 1.0, -INF, -INF]])
    words = top_words(scores, 3)
    assert words.tolist() == [[0, 2, 3], [1, -1, -1]]
    right = torch.tensor([[True, False, False, True], [True, True, True, True]])
    assert precision(words, right).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_interval_is_a_bootstrap_over_features():
    values = torch.tensor([0.0, 1.0] * 200 + [float("nan")])
    found = interval(values)
    assert found.mean == 0.5 and found.n == 400
    # The standard error is 0.5 / 20; 1.96 of it on either side.
    assert found.low == pytest.approx(0.451, abs=0.01) and found.high == pytest.approx(
        0.549, abs=0.01
    )
    assert interval(values) == found and interval(torch.full((3,), float("nan"))).mean is None


def test_kinds_of_words():
    words = ("the", "and", "of", *(f"word{i:03d}" for i in range(300)), "ox")
    vocab = Vocabulary(words)
    trivial = trivial_words(vocab)
    assert trivial[:250].all() and not trivial[250:303].any() and trivial[303]
    lists = torch.tensor([[0, 260], [0, 261], [303, 262], [263, -1]])
    use = word_use(lists, vocab)
    assert use["diversity"] == pytest.approx(4 / 53)
    assert use["lexical"] == pytest.approx(3 / 7)
    assert use["dominance"] == pytest.approx(1.0)  # 1 of 4 lists is over 10 %
    assert use["discourse"] == pytest.approx(4 / 7)  # "the" twice and "ox" are not
    assert word_use(lists, Vocabulary([f"x{w}" for w in words]))["discourse"] is None
    many = torch.tensor([[i] for i in range(19)] + [[0]])
    assert word_use(many, vocab)["dominance"] == pytest.approx(0)
    assert word_use(torch.tensor([[0], [0], [0], *[[i] for i in range(1, 18)]]), vocab)[
        "dominance"
    ] == pytest.approx(1 / 18)


def test_truth_asks_for_lift_and_two_occurrences(sae, model, tokenizer):
    from fastsae.explain import corpus_counts

    vocab = Vocabulary(WORDS)
    counts = corpus_counts(sae, model, tokenizer, HELD, vocab)["word"]
    truth = Truth.of(counts, torch.arange(20), 5.0)
    assert torch.equal(truth.right, torch.eye(20, dtype=torch.bool)) and truth.tested.all()
    assert truth.chance.tolist() == pytest.approx([1 / 20] * 20)
    none = Truth.of(counts, torch.arange(20), 1000.0)
    assert not none.right.any()
    once = corpus_counts(sae, model, tokenizer, [" wa wb wc wc"], vocab)["word"]
    assert (
        Truth.of(once, torch.arange(20), 1.5).tested.tolist() == [False, False, True] + [False] * 17
    )


@pytest.mark.parametrize("objective", ["logit", "pmi", "mi", "paper"])
def test_scores_are_those_of_explain(model, tokenizer, objective):
    torch.manual_seed(3)
    sae = fastsae.SAE(fastsae.SAEConfig(D, 40, k=2, hook_name="layers.0.output"))
    vocab = Vocabulary(WORDS)
    ex = explain(sae, model, tokenizer, vocab, objective, top=20)
    rows = torch.tensor([3, 17, 39])
    found = logit_scores(feature_vectors(sae, model), word_vectors(model, tokenizer, vocab), rows)
    expected = torch.empty(3, 20).scatter_(1, ex.indices[rows].long(), ex.scores[rows])
    torch.testing.assert_close(found[objective], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hook", ["layers.0.input", "layers.0.output"])
def test_output_effect_is_that_of_editing_the_residual(sae, model, tokenizer, hook):
    place = resolve_hook(hook)
    prompts = [tokenizer(text)["input_ids"][:9] for text in HELD[:3]]
    features = torch.tensor([4, 11])
    found, norm = output_effect(
        sae, model, tokenizer, Vocabulary(WORDS), features, prompts, place, strength=2.0
    )
    ids = torch.tensor(prompts)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True)
    residual = states.hidden_states[0 if place.side == "input" else 1][:, 1:].flatten(0, 1)
    sigma = (residual - residual.mean(0)).square().mean().sqrt()
    assert norm == pytest.approx(2 * float(sigma), rel=1e-5)
    for i, feature in enumerate(features.tolist()):
        delta = torch.zeros(1, 9, D)
        delta[:, 1:] = norm * sae.W_dec[feature].detach()
        layer = model.model.layers[0]
        if place.side == "input":
            handle = layer.register_forward_pre_hook(lambda m, a, d=delta: (a[0] + d, *a[1:]))
        else:
            handle = layer.register_forward_hook(lambda m, a, o, d=delta: o + d)
        with torch.no_grad():
            steered = model(ids).logits[:, -1].log_softmax(-1)
        handle.remove()
        rise = (steered - states.logits[:, -1].log_softmax(-1)).mean(0)[2:22]
        torch.testing.assert_close(found[i], rise, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, states.logits), "a hook was left behind"
    with pytest.raises(FastsaeError, match="all of one length"):
        output_effect(sae, model, tokenizer, Vocabulary(WORDS), features, [[1, 2], [1]], place)


def test_planted_features_are_found_and_the_published_ranking_fails(result):
    methods = result["methods"]
    assert list(methods) == [
        "logit", "pmi", "mi", "paper", "logit + lens", "pmi + lens", "mi + lens", "paper + lens",
        "top texts", "corpus-mi, 8 tokens", "corpus-mi, word", "mine",
    ]  # fmt: skip
    for name in ("logit", "pmi", "mi", "pmi + lens", "corpus-mi, word"):
        assert methods[name]["precision"]["mean"] == 1, name
        assert methods[name]["auroc"]["mean"] == 1
    for name in ("paper", "mine"):
        assert methods[name]["precision"]["mean"] == 0, name
    assert result["chance"]["precision"]["mean"] == pytest.approx(1 / 20)
    assert result["features"]["measured"] == result["features"]["usable"] == 20
    # Writing a word's dimension makes the word likelier than the others, and likelier than under
    # other features.
    assert methods["logit"]["output"]["low"] > 0.1 > methods["logit"]["output_other"]["mean"]
    assert result["best"] == "logit" and result["best_without_texts"] == "logit"
    assert result["methods"]["logit"]["discourse_precision"]["n"] == 0


def test_ngrams_are_a_baseline(sae, model, tokenizer):
    found = evaluate(sae, model, tokenizer, Vocabulary(WORDS), FIT, HELD, top=1, window=8, ngrams=2)
    # Feature f fires on word f whatever stands before it.
    assert found["methods"]["n-grams"]["precision"]["mean"] == 1
    assert found["settings"]["ngrams"] == 2
    with pytest.raises(FastsaeError, match="ngrams: got 21, accepted is an integer"):
        evaluate(sae, model, tokenizer, Vocabulary(WORDS), FIT, HELD, top=1, ngrams=21)


def test_the_result_is_plain_json_and_repeats(result, sae, model, tokenizer):
    text = json.dumps(result, allow_nan=False)
    again = evaluate(sae, model, tokenizer, Vocabulary(WORDS), FIT, HELD, top=1, window=8)
    kept = json.loads(text)["methods"]
    assert json.loads(json.dumps(again["methods"])) == {n: kept[n] for n in again["methods"]}


def test_table_and_plot(result):
    shown = {"sae": {"hook": "layers.0 <input>"}, **result}
    text = as_text(shown).splitlines()
    assert len({len(line) for line in text}) == 1 and len(text) == len(result["methods"]) + 2
    assert "precision@1" in text[0] and text[-1].startswith("chance")
    root = ET.fromstring(as_svg([shown, shown]))
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}rect")) == 1 + 2 * len(result["methods"])
    table = as_markdown([shown], ("precision", "auroc")).splitlines()
    assert len(table) == len(result["methods"]) + 3 and "| pmi | **1.000** |" in table[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top": 0}, "top: got 0"),
        ({"top": 21}, "the vocabulary has 20 words"),
        ({"features": 0}, "features: got 0"),
        ({"held_out_texts": [" wa wb"]}, "no feature is active on 20 words of both texts"),
    ],
)
def test_errors(sae, model, tokenizer, arguments, message):
    given = {"fit_texts": FIT, "held_out_texts": HELD, "top": 1} | arguments
    with pytest.raises(FastsaeError, match=message):
        evaluate(sae, model, tokenizer, Vocabulary(WORDS), **given)


def test_explanations_of_other_words_or_saes_are_refused(sae, model, tokenizer):
    ex = explain(sae, model, tokenizer, [*WORDS[:5]], "pmi", top=5)
    few = Vocabulary(WORDS[1:])
    with pytest.raises(FastsaeError, match=r"1 of their words are not.*\(wa\)"):
        evaluate(sae, model, tokenizer, few, FIT, HELD, top=1, explanations={"x": ex})
    other = fastsae.SAE(sae.config)
    with pytest.raises(FastsaeError, match="belong to another SAE"):
        evaluate(other, model, tokenizer, Vocabulary(WORDS), FIT, HELD, top=1,
                 explanations={"x": ex})  # fmt: skip


@pytest.fixture
def folder(sae, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sae.save_pretrained(tmp_path / "sae")
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    for name, texts in (("fit", FIT), ("held", HELD)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def test_the_commands_from_lens_to_evaluation(folder, capsys):
    common = ["--model", str(folder / "model"), "--dtype", "float32"]
    words, sae = ["--vocabulary", str(folder / "words.txt")], str(folder / "sae")
    fit, lens = str(folder / "fit.jsonl"), str(folder / "lens.st")
    argv = ["train-lens", "--layer", "layers.0.input", "--text", fit, "--output", lens]
    assert main([*argv, "--tokens", "200", "--json", *common]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] >= 200

    out = str(folder / "ex.safetensors")
    assert main(["explain", sae, "--lens", lens, "--objective", "logit", "--output", out, *words,
                 *common]) == 0  # fmt: skip
    assert Explanations.load(out).made_with["lens"]["hook"] == "layers.0.input"
    capsys.readouterr()

    argv = ["explain", sae, "--text", fit, "--features", "3", "--ngrams", "2", *words, *common]
    assert main(argv) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("      3  wd, ") and second == "         n-grams: ▁wd"
    assert main([*argv, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["ngrams"][0]["text"] == "▁wd" and row["ngrams"][0]["found"] == 2

    counts = str(folder / "counts.st")
    argv = ["explain", sae, "--text", fit, "--window", "8", "--save-counts", counts, "--json"]
    assert main([*argv, *words, *common]) == 0
    once = json.loads(capsys.readouterr().out)
    assert main(["explain", sae, "--counts", counts, counts, "--json", *common]) == 0
    twice = json.loads(capsys.readouterr().out)
    assert [row["words"] for row in twice] == [row["words"] for row in once]

    results = [str(folder / f"eval.{kind}") for kind in ("json", "svg", "md")]
    argv = ["eval", "explanations", sae, "--text", fit, "--held-out-text",
            str(folder / "held.jsonl"), "--lens", lens, "--explanations", f"mine={out}",
            "--top", "1", "--window", "8", "--ngrams", "1", "--output", results[0],
            "--plot", results[1], "--markdown", results[2], *words, *common]  # fmt: skip
    assert main(argv) == 0
    assert "best: logit" in capsys.readouterr().out
    record = json.loads((folder / "eval.json").read_text())
    assert record["command"].startswith("fastsae eval explanations ")
    measured = record["results"][0]
    assert measured["methods"]["mine"]["precision"]["mean"] == 1
    assert measured["methods"]["n-grams"]["precision"]["mean"] == 1
    assert measured["sae"]["hook"] == "layers.0.input" and "logit + lens" in measured["methods"]
    ET.parse(folder / "eval.svg")
    assert "| chance |" in (folder / "eval.md").read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["explain", "s", "--ngrams", "2"], "ngrams: --ngrams finds them in texts; give --text"),
        (["eval", "explanations", "s", "--text", "/nowhere.txt"], "/nowhere.txt does not exist"),
        (["eval", "explanations", "s", "--text", "{fit}", "--held-out-text", "{fit}"],
         "20 of its texts are in --text too"),
        (["eval", "explanations", "s", "--text", "{fit}", "--plot", "/nowhere/x.svg"],
         "folder does not exist"),
        (["eval", "explanations", "s", "--text", "{fit}", "--explanations", "x.st"],
         "expected NAME=FILE"),
        (["explain", "s", "--window", "8"], "--window and --save-counts need --text"),
        (["explain", "s", "--counts", "a", "--text", "b"], "leave them out"),
        (["explain", "s", "--vocabulary", "w.txt", "--language", "de"], "of the default list"),
        (["train-lens", "--layer", "1", "--text", "t", "--output", "/nowhere/x"], "output"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(folder, capsys, argv, says):
    assert main([arg.format(fit=folder / "fit.jsonl") for arg in argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
