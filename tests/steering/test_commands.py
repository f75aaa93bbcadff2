"""policy, sweep and generate on the command line, the read-outs behind them, and their mistakes."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch

from fastsae import FeatureStats
from fastsae.cli import main
from fastsae.cli.generate import _Columns
from fastsae.errors import FastsaeError
from fastsae.explain.explanations import Explanations
from fastsae.steering import Policy, ablate, add, attach, steer
from fastsae.steering.build import annotated, build_policy, read_annotations
from fastsae.steering.compare import compare
from fastsae.steering.sweep import SweepPoint, sweep, to_svg, topic_tokens

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(60)]
TEXT = "w1 w2 w3 w4 w5 w6"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<pad>", "<s>", "</s>", *WORDS, *(w.capitalize() for w in WORDS[:30])]
    level = tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>")
    made = tokenizers.Tokenizer(level)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


@pytest.fixture
def model(build):
    return build("llama")


@pytest.fixture
def folders(tmp_path, model, tokenizer, make_sae):
    sae = make_sae()
    sae.stats = FeatureStats(torch.rand(64), torch.rand(64) + 0.5, torch.rand(64) + 1, 100)
    sae.save_pretrained(tmp_path / "sae")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return [str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--dtype", "float32"]


class Found:
    """Explanations, as far as a search goes."""

    def search(self, query, top, alive_only):
        return [(7, 2.0), (9, 1.5), (4, 1.0)][:top] if query == "security" else []


# --- policies from words -------------------------------------------------------------------------


def test_a_policy_is_built_from_words_and_annotations():
    policy = build_policy(
        Found(), search="security", top=2, strength=0.5, ablated=[3, 5], name="calm", version="1"
    )
    assert policy == Policy(
        [ablate([3, 5]), add([7, 9], 0.5, unit="max")], name="calm", version="1"
    )
    assert build_policy(ablated=[3]) == Policy(ablate(3))
    for way, op in (("amplify", "amplify"), ("calibrate", "calibrate")):
        assert build_policy(Found(), search="security", way=way).operations[0].op == op


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"search": "nothing"}, "search: no feature is explained by 'nothing'"),
        ({"search": "security", "ablated": [9, 1]}, r"search: features \[9\] are found by"),
        ({}, "operations: none"),
        ({"search": "security", "way": "push"}, "way: expected one of add, amplify, calibrate"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(FastsaeError, match=f"^{message}"):
        build_policy(Found(), **arguments)


def test_what_annotate_wrote_names_features(tmp_path, capsys):
    from fastsae.explain.annotate import Annotation, Annotations, categories

    known = {c.code: c for c in categories()}
    entries = tuple(
        Annotation(feature=f, category=c, score=s, because=())
        for f, c, s in ((3, "S1", 0.9), (5, "D1", 0.8), (8, "S2", 0.4))
    )
    kinds = tuple(known[c] for c in ("S1", "S2", "D1"))
    file = Annotations(entries, "digest", "lexicon", kinds).save(tmp_path / "a.json")
    for options, features in ((["--ablate-harm"], [3, 8]), (["--ablate", "D1"], [5])):
        assert main(["policy", "build", "--annotations", str(file), *options]) == 0
        assert json.loads(capsys.readouterr().out)["operations"][0]["features"] == features


def test_annotations_are_checked(tmp_path):
    file = tmp_path / "harm.json"
    file.write_text(json.dumps({"S1": [4, 2], "S2": [4, 9]}))
    found = read_annotations(file)
    assert annotated(found, None) == [2, 4, 9] and annotated(found, ["S1"]) == [2, 4]
    with pytest.raises(FastsaeError, match=r"^category: 'S3' is not annotated; there are S1, S2"):
        annotated(found, ["S3"])
    for text in ("[]", "{}", '{"S1": 3}', '{"S1": [-1]}', '{"S1": [true]}', "not json"):
        file.write_text(text)
        with pytest.raises(FastsaeError, match=r"^annotations: "):
            read_annotations(file)


def test_the_command_writes_a_file_that_from_file_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Explanations, "load", lambda path: Found())
    harm, out = tmp_path / "harm.json", tmp_path / "calm.json"
    harm.write_text(json.dumps({"S1": [3, 5]}))
    given = ["policy", "build", "words", "--search", "security", "--strength", "0.5"]
    harmful = ["--annotations", str(harm), "--ablate-harm", "--name", "calm", "--version", "2"]
    assert main([*given, *harmful, "--required", "-o", str(out)]) == 0
    policy = Policy.from_file(out)
    assert policy.label == "calm@2" and policy.required and len(policy.digest) == 64
    assert policy.digest in capsys.readouterr().out
    assert main(["policy", "show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["digest"] == policy.digest
    assert main(["policy", "show", str(out)]) == 0
    assert "calm@2" in capsys.readouterr().out
    for wrong, message in (
        (["policy", "build", "--search", "x"], "explanations: --search needs"),
        (["policy", "build", "words"], "search: give --search"),
        (["policy", "build", "--ablate-harm"], "annotations: --ablate and --ablate-harm go with"),
        (["policy", "build", "--annotations", str(harm)], "annotations: --ablate"),
        ([*given, *harmful, "-o", str(tmp_path / "no" / "x.json")], "output: cannot write"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fastsae policy: {message}") and error.count("\n") == 1


# --- both texts ----------------------------------------------------------------------------------


def test_both_texts_come_from_the_same_random_numbers(model, tokenizer, sae):
    nothing, strong = Policy(add(1, 1e-30)), Policy(add([1, 2], 30.0))
    base, same = compare(model, tokenizer, sae, nothing, TEXT, max_new_tokens=8, seed=1)
    assert base == same and len(base.split()) == 8
    told = []
    again, steered = compare(
        model,
        tokenizer,
        sae,
        strong,
        TEXT,
        max_new_tokens=8,
        seed=1,
        stream=lambda *texts: told.append(texts),
    )
    assert again == base and steered != base and told[-1] == (base, steered)
    assert len(told) == 8 and all(base.startswith(text) for text, _ in told)
    greedy = compare(model, tokenizer, sae, strong, TEXT, max_new_tokens=8, sample=False)
    batch = tokenizer(TEXT, return_tensors="pt")
    with steer(model, sae, strong):
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert greedy[1] == tokenizer.decode(tokens[0, 6:], skip_special_tokens=True)


def test_columns_are_drawn_in_place(capsys, monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: SimpleNamespace(columns=50))
    columns = _Columns("a prompt")
    columns(" one", " two")
    first = capsys.readouterr().out
    columns(" one word " * 9, " two")
    second = capsys.readouterr().out
    assert "a prompt one" in first and "│ a prompt two" in first and "\x1b[" not in first[:5]
    assert second.startswith(f"\x1b[{first.count(chr(10))}F")


def test_generate_on_the_command_line(folders, tmp_path, capsys):
    page = tmp_path / "trace.html"
    given = ["generate", *folders, "--prompt", TEXT, "--add", "3", "7", "--strength", "4"]
    assert main([*given, "--max-new-tokens", "5", "--json", "--trace", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] != found["steered"] and found["prompt"] == TEXT
    text = page.read_text(encoding="utf-8")
    assert text.count("<h2>feature ") == 2 and ">w3</span>" in text
    assert main([*given, "--trace", str(tmp_path / "no" / "x.html")]) == 2
    assert "trace: cannot write" in capsys.readouterr().err


# --- traces --------------------------------------------------------------------------------------


def test_a_trace_reads_what_the_definition_reads(model, sae, batch):
    policies = [Policy(add(3, 4.0)), None, Policy(ablate([3, 8]), phase="generated")]
    features, seen = [3, 8], []

    def keep(module, args, output):
        seen.append(output.clone())

    with model.model.layers[0].register_forward_hook(keep), attach(model, {0: sae}) as handle:
        handle.set(policies)
        with handle.trace(features) as trace:
            tokens = model.generate(
                batch.ids, attention_mask=batch.mask, max_new_tokens=3, do_sample=False
            )
    after = torch.cat(seen, dim=1)
    rows = trace.rows()
    for row, length in enumerate(batch.lengths):
        traced = rows[row]
        assert traced.positions.tolist() == list(range(length + 2))
        assert traced.ids.tolist() == tokens[row, -(length + 3) : -1].tolist()
        x = after[row, -(length + 2) :].detach()
        want = (x - sae.b_dec.detach()) @ sae.W_enc.detach()[features].T
        want = (want + sae.b_enc.detach()[features]).relu()
        torch.testing.assert_close(traced.after, want, rtol=1e-4, atol=1e-4)
        untouched = slice(0, 1) if row == 0 else slice(None) if row == 1 else slice(0, length)
        assert torch.equal(traced.before[untouched], traced.after[untouched])
    assert not torch.allclose(rows[0].before[1:], rows[0].after[1:])


def test_a_trace_leaves_no_mark_and_needs_no_policy(model, sae, tokenizer):
    batch = tokenizer("w1 w2 <pad> w3", return_tensors="pt")
    with torch.no_grad(), attach(model, {0: sae}) as handle:
        base = model(**batch).logits
        with handle.trace(range(64)) as trace:
            assert torch.equal(model(**batch).logits, base)
            with pytest.raises(FastsaeError, match="is being traced already"):
                with handle.trace(1):
                    pass
        model(**batch)
        (row,) = trace.rows()
        assert len(row.positions) == 4 and torch.equal(row.before, row.after)
    page = trace.to_html(tokenizer, names={0: "a <name>"})
    assert "feature 0 a &lt;name&gt;" in page and "&lt;pad&gt;</span>" in page
    alphas = [float(a) for a in re.findall(r"rgba\(220,50,30,([\d.]+)\)", page)]
    assert len(alphas) == 64 * 4 and max(alphas) == 1.0 and min(alphas) == 0.0


@pytest.mark.parametrize(
    ("features", "message"), [(99, "features: 99 is out of"), ([], "features: "), (-1, "features")]
)
def test_what_cannot_be_traced(model, sae, features, message):
    with attach(model, {0: sae}) as handle, pytest.raises(FastsaeError, match=f"^{message}"):
        with handle.trace(features):
            pass


def test_beams_and_several_places_are_refused(model, sae, make_sae, batch):
    with attach(model, {0: sae, 1: make_sae(hook=None)}) as handle:
        with pytest.raises(FastsaeError, match=r"^layer: 2 places are attached"):
            with handle.trace(1):
                pass
        with handle.trace(1, layer=1) as trace, torch.no_grad():
            model(batch.ids, attention_mask=batch.mask)
            with pytest.raises(FastsaeError, match=r"^trace: the batch went from 3 to 2 rows"):
                model(batch.ids[:2], attention_mask=batch.mask[:2])
        assert len(trace.rows()) == 3


# --- sweeps --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_sweep_is_what_one_reads_by_hand(model, sae, tokenizer):
    policy, texts = Policy(add([3, 7], 4.0)), [TEXT, "w9 w8 w7"]
    points = sweep(model, tokenizer, sae, policy, [0, 0.5, 2], words=["w4", "w5"], texts=texts)
    words = [tokenizer.convert_tokens_to_ids(w) for w in ("w4", "W4", "w5", "W5")]
    assert sorted(words) == topic_tokens(tokenizer, ["w4", "w5"]).tolist()
    for point, strength in zip(points, (0, 0.5, 2), strict=True):
        mass, likelihood = [], []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            with steer(model, sae, policy, strength=strength):
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            mass += log_p[:, words].exp().sum(-1).tolist()
            likelihood += log_p.gather(-1, ids[0, 1:, None])[:, 0].tolist()
        assert point.strength == strength
        assert point.topic == pytest.approx(sum(mass) / len(mass), rel=1e-4)
        want = math.exp(-sum(likelihood) / len(likelihood))
        assert point.perplexity == pytest.approx(want, rel=1e-4)
    assert points[0].dose == 0 and points[2].dose == pytest.approx(4 * points[1].dose, rel=1e-3)


def test_the_curve_is_an_svg_with_a_mark_per_strength():
    points = [SweepPoint(s, 0.01 * (1 + s), 20 * (1 + s * s), s / 3) for s in (0.0, 1.0, 2.0)]
    root = ElementTree.fromstring(to_svg(points, title="calm & <quiet>"))
    marks = root.findall("{http://www.w3.org/2000/svg}circle")
    xs, ys = ([float(mark.get(axis)) for mark in marks] for axis in ("cx", "cy"))
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True) and len(marks) == 3
    assert ElementTree.fromstring(to_svg(points[:1])) is not None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strengths": []}, "strengths: expected"),
        ({"strengths": [float("inf")]}, "strengths: expected"),
        ({"texts": ["w1"]}, "texts: expected texts of two tokens"),
        ({"words": []}, "words: expected"),
    ],
)
def test_what_cannot_be_swept(model, sae, tokenizer, more, message):
    given = {"strengths": [1.0], "words": ["w4"], "texts": [TEXT]} | more
    strengths = given.pop("strengths")
    with pytest.raises(FastsaeError, match=f"^{message}"):
        sweep(model, tokenizer, sae, Policy(add(3, 1.0)), strengths, **given)


def test_sweep_on_the_command_line(folders, tmp_path, capsys):
    text, plot = tmp_path / "text.txt", tmp_path / "sweep.svg"
    text.write_text(f"{TEXT}\n\nw9 w8 w7\n")
    given = ["sweep", *folders, "--add", "3", "7", "--words", "w4, w5", "--text", str(text)]
    assert main([*given, "--strengths", "0", "1", "--plot", str(plot), "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert [p["strength"] for p in points] == [0, 1] and points[0]["topic"] != points[1]["topic"]
    assert plot.read_text(encoding="utf-8").count("<circle") == 2
    assert main([*given, "--strengths", "0", "1"]) == 0
    assert capsys.readouterr().out.startswith("strength  topic words  perplexity")
    assert main([*given[:-1], "/nowhere.txt"]) == 2
    assert "text: cannot read /nowhere.txt" in capsys.readouterr().err
