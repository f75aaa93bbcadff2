"""Search, files and errors of Explanations, on numbers small enough to check by hand."""

import itertools
import json
import math

import pytest
import torch

import fastsae
from fastsae.errors import FastsaeError
from fastsae.explain import Explanations, SAEIdentity, Vocabulary, storage

MUSIC = Vocabulary(("music", "song", "guitar", "bank", "money"), (0.2, 0.1, 0.05, 0.04, 1 / 3))


def _explanations(objective="mi", stats=True, scores=None):
    indices = torch.tensor([[0, 1], [1, 0], [3, 4], [2, 0], [0, 3], [4, 3]], dtype=torch.int32)
    if scores is None:
        scores = [[0.9, 0.5], [0.9, 0.8], [0.7, 0.1], [0.9, 0.9], [0.8, 0.2], [0.6, -0.3]]
    frequency = torch.tensor([0.1, 0.0, 0.3, 0.9, 0.01, 0.2])
    return Explanations(
        torch.tensor(scores),
        indices,
        MUSIC,
        objective,
        20.5,
        "org/model",
        SAEIdentity("blocks.1.hook_resid_post", "org/model", "topk", 4, 6, "abc"),
        fastsae.FeatureStats(frequency, frequency * 2, frequency * 5, 1000) if stats else None,
    )


def _approx(pairs):
    return [(feature, pytest.approx(value, abs=1e-6)) for feature, value in pairs]


def test_search_one_word_ties_to_the_lower_feature():
    ex = _explanations()
    music = _approx([(0, 0.9), (3, 0.9), (1, 0.8), (4, 0.8)])
    assert ex.search("music") == music
    assert ex.search("music", top=2) == music[:2]
    assert ex.search("MUSIC ,\n music") == music
    assert all(type(f) is int and type(v) is float for f, v in ex.search("music"))
    assert ex.search("guitar") == _approx([(3, 0.9)])


def test_search_aggregates_several_words():
    ex = _explanations()
    query = "music song guitar"
    assert ex.search(query) == _approx([(3, 1.8), (1, 1.7), (0, 1.4), (4, 0.8)])
    assert ex.search(query.split()) == ex.search(query)
    assert ex.search(query, aggregate="mean")[0] == (3, pytest.approx(0.6))
    by_max = _approx([(0, 0.9), (1, 0.9), (3, 0.9), (4, 0.8)])
    assert ex.search(query, aggregate="max") == by_max
    count = [(3, 2.0), (1, 2.0), (0, 2.0), (4, 1.0)]
    assert ex.search(query, aggregate="count") == count
    assert [f for f, _ in ex.search("music song", match="all")] == [1, 0]
    assert ex.search("song money", match="all") == []


def test_search_counts_an_absent_word_as_unrelated_and_never_above_the_last_kept():
    ex = _explanations()
    # Feature 5 keeps bank at -0.3: a word it does not keep cannot score 0.
    assert dict(ex.search("bank music"))[5] == pytest.approx(-0.6)
    pmi = [[-0.1, -0.5], [-0.2, -0.4], [-0.1, -9.0], [-1.0, -1.1], [-0.3, -1.2], [-0.5, -2.0]]
    ex = _explanations("pmi", scores=pmi)
    absent = -math.log(6)
    found = dict(ex.search("music song guitar"))
    assert found[0] == pytest.approx(-0.6 + absent) and found[3] == pytest.approx(-2.1 + absent)
    assert dict(ex.search("money music"))[2] == pytest.approx(-18.0)
    assert ex.search("music", top=1) == _approx([(0, -0.1)]), "one word: its own score"
    paper = dict(_explanations("paper", scores=[[-0.1, -0.2]] * 6).search("music guitar"))
    assert paper[0] == pytest.approx(-0.1 - max(0.2, math.log(6) / 5))


@pytest.mark.parametrize("objective", ["pmi", "mi"])
def test_search_finds_what_a_look_at_every_feature_finds(objective):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(-9, 9, (300, 5), generator=generator).float() / 8  # many ties
    scores = scores.sort(1, descending=True).values
    rows = [torch.randperm(40, generator=generator)[:5] for _ in range(300)]
    vocab = Vocabulary([f"w{i}" for i in range(41)])  # no feature keeps the last word
    ex = Explanations(
        scores,
        torch.stack(rows).int(),
        vocab,
        objective,
        1.0,
        "m",
        SAEIdentity("l", "m", "topk", 4, 300, "a"),
    )
    neutral = -math.log(300) if objective == "pmi" else 0.0
    for query in (["w3"], ["w3", "w7", "w40"], ["w1", "w2", "w5"], ["w40"]):
        words = [vocab.index(word) for word in query]
        for aggregate, match in itertools.product(("sum", "mean", "max", "count"), ("any", "all")):
            expected = []
            for f in range(300):
                own = dict(zip(ex.indices[f].tolist(), scores[f].double().tolist(), strict=True))
                absent = min(neutral, float(scores[f, -1]))
                values = [own.get(w, absent) for w in words]
                kept = sum(w in own for w in words)
                if kept >= (1 if match == "any" else len(words)):
                    total = {"mean": sum(values) / len(values), "max": max(values), "count": kept}
                    value = total.get(aggregate, sum(values))
                    expected.append((f, value, sum(values)))
            order = sorted(
                expected, key=lambda e: (-e[1], -e[2] if aggregate == "count" else 0, e[0])
            )
            found = ex.search(query, 300, aggregate=aggregate, match=match)
            assert sorted(f for f, _ in found) == [f for f, _, _ in expected]
            # Values in eighths are summed exactly, but log F is not.
            wanted = [e[1] for e in order]
            assert [v for _, v in found] == pytest.approx(wanted, rel=1e-6, abs=1e-6)
            if objective == "mi" and aggregate != "mean":
                assert [f for f, _ in found] == [e[0] for e in order]


def test_a_word_that_a_file_lists_twice_for_a_feature_counts_once():
    ex = _explanations()
    ex.indices[0, 1] = 0
    assert ex.search("music")[0] == (0, pytest.approx(0.9))
    assert len(ex.search("music")) == 4 and ex.search("music song", match="all")[0][0] == 1


def test_search_filters_by_how_features_fire():
    ex = _explanations()
    assert [f for f, _ in ex.search("music", alive_only=True)] == [0, 3, 4]
    assert [f for f, _ in ex.search("music", max_frequency=0.5)] == [0, 1, 4]
    kept = ex.search("music", max_frequency=0.5, min_frequency=0.05)
    assert [f for f, _ in kept] == [0]
    for option in ({"alive_only": True}, {"max_frequency": 0.1}, {"min_frequency": 0.1}):
        with pytest.raises(FastsaeError, match="no feature statistics"):
            _explanations(stats=False).search("music", **option)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ex: ex.search("guitr"), "'guitr' is not among the 5 words.*close to it: guitar"),
        (lambda ex: ex.search("music zzz"), "'zzz' is not among"),
        (lambda ex: ex.search("  , "), "got no word"),
        (lambda ex: ex.search([]), "got no word"),
        (lambda ex: ex.search("music", top=0), "top: got 0"),
        (lambda ex: ex.search("music", aggregate="median"), "accepted are sum, mean, max, count"),
        (lambda ex: ex.search("music", match="most"), "accepted are any, all"),
        (lambda ex: ex.words(6), "feature: got 6, accepted are 0..5"),
        (lambda ex: ex.scores_of(-1), "feature: got -1"),
        (lambda ex: ex.words("seven"), "feature: got 'seven'"),
        (lambda ex: ex.to_json(features=[9]), "feature: got 9"),
        (lambda ex: ex.to_json(top=0), "top: got 0"),
    ],
)
def test_explanations_errors(call, message):
    with pytest.raises(FastsaeError, match=message):
        call(_explanations())


# --- files ------------------------------------------------------------------------------------


def _equal(a, b):
    assert torch.equal(a.scores, b.scores) and a.scores.dtype == b.scores.dtype
    assert torch.equal(a.indices, b.indices) and a.indices.dtype == b.indices.dtype
    for name in ("vocab", "objective", "temperature", "model_name", "sae"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.vocab.source == b.vocab.source
    assert (a.stats is None) == (b.stats is None)
    for x, y in zip(a.stats or (), b.stats or (), strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("name", ["ex.safetensors", "no-suffix", "ex.json", ""])
def test_save_and_load(tmp_path, name, stats):
    ex = _explanations(stats=stats)
    _explanations("pmi").save(tmp_path / name)  # is replaced
    written = ex.save(str(tmp_path / name))
    assert written.is_file() and written.stat().st_mode & 0o444
    loaded = Explanations.load(tmp_path / name)
    _equal(ex, loaded)
    assert loaded.search("music song") == ex.search("music song")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "a temporary file stayed"


def test_to_json_is_readable(tmp_path):
    ex = _explanations()
    text = ex.to_json(tmp_path / "part.json", features=[3, 0], top=1)
    assert (tmp_path / "part.json").read_text() == text
    data = json.loads(text)
    assert data["objective"] == "mi" and data["sae"]["d_sae"] == 6
    first, second = data["features"]
    assert (first["feature"], first["words"]) == (3, ["guitar"])
    assert second["scores"] == [pytest.approx(0.9)] and second["frequency"] == pytest.approx(0.1)
    with pytest.raises(FastsaeError, match="2 of 6 features"):
        Explanations.load(tmp_path / "part.json")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    ex, path = _explanations(), tmp_path / "ex"
    ex.save(path)

    def fails(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        ex.save(path)
    _equal(ex, Explanations.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_broken_files_give_one_clear_error(tmp_path):
    good, path = _explanations().save(tmp_path / "good"), tmp_path / "bad"
    data = good.read_bytes()
    for content in (
        b"",
        b"x",
        data[:5],
        data[:200],
        data[:-1],
        b"{",
        b'{"format": 1',
        b"\xff" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(FastsaeError, match="not a file of explanations, or truncated") as error:
            Explanations.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    text = _explanations().to_json()
    for content, message in (
        ("{}", "holds no explanations"),
        (text.replace('"version": 1', '"version": 99'), "format version 99"),
        (text.replace('"objective"', '"object"'), "metadata of the explanations is damaged"),
        (text.replace('["music", "song"', '["violin", "song"'), "damaged"),
    ):
        path.write_text(content)
        with pytest.raises(FastsaeError, match=message):
            Explanations.load(path)
    with pytest.raises(FastsaeError, match="no such file"):
        Explanations.load(tmp_path / "missing")
    with pytest.raises(FastsaeError, match="does not exist; create it first"):
        _explanations().save(tmp_path / "no" / "folder.safetensors")


def test_load_refuses_foreign_tensors_and_wrong_indices(tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"scores": torch.zeros(2, 2)}, tmp_path / "foreign")
    with pytest.raises(FastsaeError, match="holds no explanations"):
        Explanations.load(tmp_path / "foreign")
    good = _explanations().save(tmp_path / "good")
    meta = {"fastsae": json.dumps(storage._metadata(_explanations()))}
    for change, message in (
        ({"indices": torch.full((6, 2), 5, dtype=torch.int32)}, "word indices leave 0..4"),
        ({"scores": torch.zeros(5, 2)}, r"must both be \[6, M\]"),
    ):
        save_file(load_file(good) | change, tmp_path / "bad", metadata=meta)
        with pytest.raises(FastsaeError, match=message):
            Explanations.load(tmp_path / "bad")
