"""Harm and defence categories: the data files, the lexicon, a model, and files."""

import json
import math

import pytest
import torch

import fastsae
from fastsae.errors import FastsaeError
from fastsae.explain import Explanations, SAEIdentity, Vocabulary
from fastsae.explain.annotate import (
    DEFAULT_FILES,
    Annotations,
    annotate_by_lexicon,
    annotate_by_model,
    categories,
)
from fastsae.explain.chat import Reply

WORDS = Vocabulary(("murder", "Killed", "music", "song", "refuse", "sorry", "bomb", "guitar"))


@pytest.fixture
def ex():
    rows = [[0, 1, 2], [2, 3, 7], [4, 5, 0], [6, 2, 3], [2, 0, 1], [0, 6, 1]]
    identity = SAEIdentity("blocks.1.hook_resid_post", "m", "topk", 4, 6, "abc")
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 6)
    indices = torch.tensor(rows, dtype=torch.int32)
    return Explanations(scores, indices, WORDS, "mi", 1.0, "m", identity)


def test_the_data_files():
    known = categories()
    assert [c.code for c in known] == [f"S{i}" for i in range(1, 15)] + [
        f"D{i}" for i in range(1, 8)
    ]
    assert {c.kind for c in known} == {"harm", "defence"}
    names = {c.code: c.name for c in known}
    assert names["S1"] == "Violent Crimes" and names["S9"] == "Indiscriminate Weapons"
    assert names["S14"] == "Code Interpreter Abuse"
    for c in known:
        assert len(c.terms) >= 10 and c.description and len(set(c.terms)) == len(c.terms), c.code
        assert all(t == t.lower().strip() and " " not in t for t in c.terms), c.code


def test_lexicon_scores(ex):
    found = annotate_by_lexicon(ex)
    w = [1, 1 / math.log2(3), 1 / 2]
    violent = {a.feature: a for a in found.entries if a.category == "S1"}
    assert violent[0].score == pytest.approx((w[0] + w[1]) / sum(w), abs=1e-4)
    assert violent[0].because == ("murder", "killed")
    assert violent[4].score == pytest.approx((w[1] + w[2]) / sum(w), abs=1e-4)
    assert violent[5].score == pytest.approx((w[0] + w[2]) / sum(w), abs=1e-4)
    assert set(violent) == {0, 4, 5}  # features 2 and 3 have one word only
    assert found.features("S1") == [0, 5, 4] == found.features("harm")
    assert found.features("D1") == [2] == found.features("defence")
    assert found.features() == [0, 2, 5, 4] and found.features("S1", "D1", limit=2) == [0, 2]
    assert found.features("S1", min_score=0.7) == [0, 5]
    assert annotate_by_lexicon(ex, min_words=1).features("S9") == [3, 5]
    assert annotate_by_lexicon(ex, min_score=0.7).features("S1") == [0, 5]
    assert annotate_by_lexicon(ex, features=[4]).features() == [4]
    assert annotate_by_lexicon(ex, words=2).features("S1") == [0]
    with pytest.raises(FastsaeError, match="category: got 'S15', accepted are defence, harm, S1"):
        found.features("S15")
    fastsae.Policy([fastsae.ablate(found.features("harm"))])


def test_own_categories(ex, tmp_path):
    path = tmp_path / "mine.json"
    entry = {"code": "M1", "name": "Music", "description": "x", "terms": ["Music", "song"]}
    path.write_text(json.dumps({"kind": "topic", "categories": [entry]}))
    found = annotate_by_lexicon(ex, categories(path))
    assert found.features("topic") == found.features("M1") == [1, 3]
    assert len(categories(*DEFAULT_FILES, path)) == 22
    for content, says in (
        ("{", "not a file of categories"),
        ({"kind": "a", "categories": [{"code": "A"}]}, "KeyError: 'terms'"),
        ({"kind": "a", "categories": [entry, entry]}, "code 'M1'.*once"),
        ({"kind": "a", "categories": [entry | {"code": "no ne"}]}, "code 'no ne'"),
        ({"kind": "a", "categories": [entry | {"terms": [1]}]}, "not text"),
    ):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(FastsaeError, match=says):
            categories(path)
    with pytest.raises(FastsaeError, match="cannot be read"):
        categories(tmp_path / "none.json")


class Model:
    """Answers by the first word it is shown."""

    name = "fake"

    def complete(self, messages, max_tokens=40, options=()):
        asked = messages[0]["content"]
        assert "S14 Code Interpreter Abuse" in asked and options[-1] == "none"
        word = asked.rsplit("Words: ", 1)[1].split(",")[0]
        return Reply(
            {"murder": "S1.", "refuse": "d1 - Refusal", "bomb": "?"}.get(word, "none"), 9, 1
        )


def test_by_model_and_files(ex, tmp_path):
    found = annotate_by_model(ex, Model(), range(6))
    assert [(a.feature, a.category) for a in found.entries] == [(0, "S1"), (2, "D1"), (5, "S1")]
    assert found.method == "model fake" and found.of(0)[0].because == ("murder", "Killed")
    path = found.save(tmp_path / "x.annotations.json")
    again = Annotations.load(path)
    assert again.entries == found.entries and again.categories == found.categories
    assert (again.digest, again.method) == ("abc", "model fake")
    edited = json.loads(path.read_text())
    edited["features"][0]["category"] = "S99"
    path.write_text(json.dumps(edited))
    with pytest.raises(FastsaeError, match="'S99' is none of its categories"):
        Annotations.load(path)
    path.write_text("{}")
    with pytest.raises(FastsaeError, match="not a file of annotations"):
        Annotations.load(path)
    empty = annotate_by_model(ex, Model(), [1]).save(tmp_path / "empty.json")
    assert Annotations.load(empty).entries == ()
