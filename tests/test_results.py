"""What a person looks at: search over words, labels and texts; the page; exported files."""

import json
import re
import shutil
import subprocess

import pytest
import torch

import fastsae
from fastsae.cli import main
from fastsae.errors import FastsaeError
from fastsae.explain import Explanations, SAEIdentity, Vocabulary
from fastsae.explain.annotate import annotate_by_lexicon
from fastsae.explain.examples import FORMAT, VERSION, Examples
from fastsae.explain.export import records, write_jsonl, write_neuronpedia, write_parquet
from fastsae.explain.finder import Finder, companion
from fastsae.explain.labels import Label, Labels
from fastsae.explain.report import write_html

WORDS = Vocabulary(("music", "song", "guitar", "bank", "money", "murder", "killed"))
EVIL = "</script><script>document.title='broken'</script>&<b>"


@pytest.fixture
def ex():
    rows = [[0, 1, 2], [1, 0, 2], [3, 4, 0], [5, 6, 3]]
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.7, 0.1], [0.7, 0.6, 0.2], [1.0, 0.9, 0.0]])
    identity = SAEIdentity("blocks.3.hook_resid_post", "org/m", "topk", 4, 4, "abc")
    stats = fastsae.FeatureStats(*torch.rand(3, 4), 100)
    indices = torch.tensor(rows, dtype=torch.int32)
    return Explanations(scores, indices, WORDS, "logit", 1.0, "org/m", identity, stats)


def _line(feature, text, ends, values, peak, document=0):
    example = {
        "value": values[peak],
        "document": document,
        "position": peak + 1,
        "peak": peak,
        "text": text,
        "ends": ends,
        "values": values,
    }
    found = [example] if text else []
    entry = {"feature": feature, "active": len(found), "histogram": [2, [1] * len(found)]}
    return json.dumps(entry | {"examples": found}, ensure_ascii=False) + "\n"


@pytest.fixture
def examples():
    header = {"format": FORMAT, "version": VERSION, "sae": "abc", "tokens": 50}
    lines = [
        _line(0, "play the song loudly", [4, 8, 13, 20], [0.0, 0.5, 2.5, 0.0], 2),
        _line(1, f"an opera{EVIL}", [2, 8, 8 + len(EVIL)], [0.0, 2.1, 0.0], 1),
        _line(2, "", [], [0.0], 0),
        _line(3, "Opera ghosts", [5, 12], [2.2, 0.1], 0),
    ]
    return Examples(header | {"features": [0, 1, 2, 3]}, "".join(lines))


@pytest.fixture
def labels():
    return Labels("abc", {2: Label("loans and credit", "yes", "m"), 1: Label(EVIL, None, "m")})


@pytest.fixture
def saved(ex, examples, labels, tmp_path):
    path = ex.save(tmp_path / "words.safetensors")
    examples.save(companion(path, "examples.jsonl"))
    labels.save(companion(path, "labels.jsonl"))
    annotate_by_lexicon(ex).save(companion(path, "annotations.json"))
    return path


def test_search_ranks_words_then_labels_then_texts(saved, ex):
    finder = Finder.load(saved)
    hits = finder.search("music")
    assert [(h.feature, h.score) for h in hits] == ex.search("music")
    assert {h.matched for h in hits} == {"words"} and hits[0].words == ["music", "song", "guitar"]
    assert hits[0].text == "play the [song] loudly"
    assert [(h.feature, h.matched, h.score) for h in finder.search("Credit, loans")] == [
        (2, "label", None)
    ]
    assert [(h.feature, h.matched) for h in finder.search("opera")] == [(1, "text"), (3, "text")]
    assert [h.feature for h in finder.search("opera", 1)] == [1]
    assert [(h.feature, h.matched) for h in finder.search("song", 3)] == [
        (0, "words"),
        (1, "words"),
    ][::-1]
    assert finder.search("opera ghosts")[0].feature == 3
    with pytest.raises(FastsaeError, match="'oper' is not among"):
        finder.search("oper")
    with pytest.raises(FastsaeError, match="got no word"):
        finder.search(" ,. ")
    with pytest.raises(FastsaeError, match="'opera' is not among"):
        finder.search("opera", alive_only=True)


def test_parts_of_another_sae_are_refused(ex, examples, labels, tmp_path):
    examples.digest = labels.digest = "other"
    for part in ({"examples": examples}, {"labels": labels}):
        with pytest.raises(FastsaeError, match="belong to another SAE"):
            Finder(ex, **part)
        with pytest.raises(FastsaeError, match="belong to another SAE"):
            list(records(ex, **part))
        with pytest.raises(FastsaeError, match="belong to another SAE"):
            write_html(ex, tmp_path / "x.html", **part)


def test_search_and_export_commands(saved, capsys, tmp_path):
    assert main(["search", str(saved), "opera", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[1]["feature"] == 3 and found[1]["text"] == "[Opera] ghosts"
    assert main(["search", str(saved), "money"]) == 0
    assert "loans and credit:" in capsys.readouterr().out
    for name in ("page.html", "out.jsonl"):
        assert main(["export", str(saved), str(tmp_path / name), "--features", "0", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["feature"] for row in rows] == [0, 3] and rows[1]["categories"] == ["S1"]
    assert main(["export", str(saved), str(tmp_path / "np"), "--neuronpedia"]) == 0
    assert (tmp_path / "np" / "batch-0.json").exists()
    assert main(["export", str(saved), "x.doc"]) == 2
    assert "accepted are *.html" in capsys.readouterr().err
    assert main(["annotate", str(saved)]) == 0
    assert re.search(r"S1 +Violent Crimes +1 +3 murder killed bank", capsys.readouterr().out)
    assert main(["label", str(saved)]) == 2
    assert main(["label", str(saved), "--url", "http://x/v1"]) == 2
    assert "--llm" in capsys.readouterr().err


def test_jsonl_has_every_field(ex, examples, labels, tmp_path):
    parts = {"examples": examples, "labels": labels, "annotations": annotate_by_lexicon(ex)}
    path = write_jsonl(ex, tmp_path / "all.jsonl", **parts)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({tuple(row) for row in rows}) == 1 and len(rows) == 4
    assert rows[2]["label"] == "loans and credit" and rows[0]["verdict"] is None
    assert rows[0]["texts"] == ["play the song loudly"] and rows[0]["activations"] == [2.5]
    assert rows[3]["scores"] == pytest.approx([1.0, 0.9, 0.0])
    assert set(next(records(ex))) == {"feature", "words", "scores", "frequency", "mean", "max"}


def test_parquet_reads_back_what_the_records_say(ex, examples, labels, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parts = {"examples": examples, "labels": labels, "annotations": annotate_by_lexicon(ex)}
    path = write_parquet(ex, tmp_path / "all.parquet", **parts)
    table = parquet.read_table(path)
    expected = list(records(ex, **parts))
    got = table.to_pylist()
    for row, wanted in zip(got, expected, strict=True):
        for name, value in wanted.items():
            ok = value if isinstance(value, str | None) or not value else pytest.approx(value)
            if isinstance(value, list) and value and isinstance(value[0], str):
                ok = value
            assert row[name] == ok, name
    assert table.schema.metadata[b"sae"] == b"abc"


def test_parquet_without_pyarrow_says_so(ex, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(FastsaeError, match="pip install pyarrow"):
        write_parquet(ex, tmp_path / "x.parquet")


def test_neuronpedia_fields(ex, examples, tmp_path):
    (path,) = write_neuronpedia(ex, tmp_path / "np", examples, dataset="corpus")
    batch = json.loads(path.read_text())
    assert (batch["model_id"], batch["layer"]) == ("org/m", 3)
    first = batch["features"][0]
    assert first["feature_index"] == 0 and first["pos_str"] == ["music", "song", "guitar"]
    assert first["pos_values"] == pytest.approx([0.9, 0.5, 0.1])
    assert first["frac_nonzero"] == 1 / 50 and first["dataset"] == "corpus"
    (activation,) = first["activations"]
    assert activation["tokens"] == ["play", " the", " song", " loudly"]
    assert activation["values"] == [0.0, 0.5, 2.5, 0.0]
    # half-octave bins: 2^1 to 2^1.5
    assert first["freq_hist_data_bar_values"] == pytest.approx([2**1.25])
    assert first["freq_hist_data_bar_heights"] == [1.0]
    fields = (
        "neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 neg_str neg_values "
        "correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson "
        "correlated_features_indices correlated_features_l1 correlated_features_pearson "
        "logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist "
        "n_prompts_total n_tokens_in_prompt"
    )
    assert set(fields.split()) <= set(first)
    fewer = Examples(examples.header | {"features": [0]}, examples._text.split("\n")[0] + "\n")
    with pytest.raises(FastsaeError, match="features: 1 has no examples"):
        write_neuronpedia(ex, tmp_path, fewer, features=[0, 1])


def test_the_page_is_self_contained_and_its_data_cannot_break_it(ex, examples, labels, tmp_path):
    page = write_html(ex, tmp_path / "p.html", examples=examples, labels=labels)
    text = page.read_text()
    assert text.count("</script>") == 2 and "{{" not in text
    outside = set(re.findall(r"(?:https?:)?//[a-z][\w./]*", text)) - {"http://www.w3.org/2000/svg"}
    assert not [url for url in outside if "." in url.split("//")[1].split("/")[0]]
    data = json.loads(re.search(r'type="application/json">(.*)</script>\n<script>', text)[1])
    assert [e["f"] for e in data["features"]] == [0, 1, 3]  # feature 2 never fires
    assert data["features"][1]["x"][0][1][2] == EVIL
    assert len(json.loads(re.search(r"json\">(.*)</script>\n", write_html(
        ex, tmp_path / "q.html").read_text())[1])["features"]) == 4  # fmt: skip


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no headless browser: apt-get install chromium")
def test_the_page_in_a_browser(ex, examples, labels, tmp_path):
    parts = {"examples": examples, "labels": labels, "annotations": annotate_by_lexicon(ex)}
    page = write_html(ex, tmp_path / "p.html", **parts)

    def dom(query, page=page):
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", "--dump-dom",
             f"file://{page}#{query}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0 and ":CONSOLE" not in done.stderr, done.stderr
        assert "<title>fastsae explanations</title>" in done.stdout
        return done.stdout.split('<main id="list">')[1].split("</main>")[0], done.stdout

    cards, whole = dom("")
    assert cards.count("<article>") == 3 and ">3 features</div>" in whole
    assert cards.count("<svg") == 3 and cards.count("<rect") == 3
    mark = re.search(r'<i (?=[^>]*rgba?\(255, 190, 40)[^>]*title="2.5"[^>]*>([^<]*)</i>', cards)
    assert mark[1] == " song"
    assert "S1 Violent Crimes" in cards and "active on 2.0 % of tokens" in cards
    cards, whole = dom("song")
    assert re.findall(r"<h2>(\d)", cards) == ["1", "0"]  # rank 1 before rank 2
    assert cards.count('class="hit"') == 2
    assert re.findall(r"<h2>(\d)", dom("opera")[0]) == ["1", "3"]
    assert re.findall(r"<h2>(\d)", dom("s1")[0]) == ["3"]
    assert ">0 features</div>" in dom("nothing")[1]

    # A person types, and asks for more.
    typed = tmp_path / "typed.html"
    acts = """<script>
const box = document.getElementById("query"); box.value = "guitar";
box.dispatchEvent(new Event("input", {bubbles: true}));</script></body>"""
    typed.write_text(page.read_text().replace("</body>", acts))
    cards, whole = dom("", typed)
    assert re.findall(r"<h2>(\d)", cards) == ["0", "1"] and ">2 features</div>" in whole
    ex = _of_size(ex, 60)
    write_html(ex, typed)
    assert dom("", typed)[0].count("<article>") == 25
    acts = '<script>document.getElementById("more").click()</script></body>'
    typed.write_text(typed.read_text().replace("</body>", acts))
    assert dom("", typed)[0].count("<article>") == 50
    broken = page.read_text().replace("search();\n</script>", "search(); nothing();\n</script>")
    typed.write_text(broken)
    with pytest.raises(AssertionError, match="nothing is not defined"):
        dom("", typed)


def _of_size(ex, count):
    rows = torch.arange(count) % len(ex)
    identity = ex.sae._replace(d_sae=count)
    return Explanations(ex.scores[rows], ex.indices[rows], ex.vocab, "mi", 1.0, "m", identity)
