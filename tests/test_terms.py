"""The inverted index of texts, and close words, against a look at every text and word."""

import difflib
import random
import re

import pytest

from fastsae.errors import FastsaeError
from fastsae.explain import Vocabulary
from fastsae.explain.terms import TermIndex

PARTS = [
    "song",
    "Song",
    "songs",
    "don't",
    "dont",
    "c++",
    "C+",
    "$",
    "5",
    "über",
    "ß",
    "x_y",
    "音楽",
]
JOINTS = [" ", "-", ", ", "", ".", '"', "\n", "é"]


def _holds(text, term):
    """Neither a letter nor a digit beside it, by another way than the index's."""
    for at in range(len(text) - len(term) + 1):
        if text[at : at + len(term)].lower() == term.lower():
            beside = text[max(0, at - 1) : at] + text[at + len(term) : at + len(term) + 1]
            if not any(c.isalnum() for c in beside):
                return True
    return False


def test_terms_are_found_where_a_look_at_every_text_finds_them():
    draw = random.Random(0)
    texts = [
        "".join(draw.choice(PARTS) + draw.choice(JOINTS) for _ in range(draw.randint(0, 5)))
        for _ in range(400)
    ]
    index = TermIndex(texts)
    queries = [[part] for part in (*PARTS, "+", "_", "'", "son", "none", "5-$")]
    queries += [draw.sample(PARTS, 2) for _ in range(30)]
    seen = 0
    for query in queries:
        expected = [i for i, t in enumerate(texts) if all(_holds(t, term) for term in query)]
        assert list(index.of(query, texts.__getitem__)) == expected, query
        seen += len(expected)
    assert seen > 500
    assert list(index.of([], texts.__getitem__)) == []


def test_texts_are_read_again_only_where_the_index_is_not_enough():
    asked, texts = [], ["a song", "a c+ song", "c++", "++"]
    index = TermIndex(texts)

    def text(number):
        asked.append(number)
        return texts[number]

    assert list(index.of(["song", "a"], text)) == [0, 1] and not asked
    assert list(index.of(["c++"], text)) == [2] and asked == [1, 2]


@pytest.mark.parametrize("word", ["musik", "guitr", "nothin", "Mönchengladbach", "😀", "privacyy"])
def test_close_words_are_those_of_difflib(word):
    pytest.importorskip("wordfreq")
    vocab = Vocabulary.default(5000)
    expected = difflib.get_close_matches(word.lower(), vocab.words, n=3)
    with pytest.raises(FastsaeError) as error:
        vocab.index(word)
    close = re.search(r"close to it: (.*)$", str(error.value))
    assert (close[1].split(", ") if close else []) == expected
