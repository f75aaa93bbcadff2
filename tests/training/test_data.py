"""Text and tokens: read in order, packed without loss, and stored whole or not at all."""

import gzip

import numpy as np
import pytest

from fastsae.data import TokenStore, texts, tokenize
from fastsae.errors import FastsaeError

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


# --- text ----------------------------------------------------------------------------------------


def test_texts_of_every_kind_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("one\nline\n\n \n\ntwo  \n\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("naïve ☕")
    (tmp_path / "c.jsonl").write_text('{"text": "x\\n\\ny"}\n\n{"text": " "}\n{"text": "z"}\n')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "q", "id": 1}\n')
    (tmp_path / "ignored.csv").write_text("no")
    assert list(texts(tmp_path)) == ["naïve ☕", "one\nline", "two  ", "x\n\ny", "z", "q"]
    assert next(texts([tmp_path / "c.jsonl", str(tmp_path / "b.txt")])) == "x\n\ny"
    assert list(texts(tmp_path / "d.jsonl.gz")) == ["q"]


def test_a_text_file_without_blank_lines_is_cut(tmp_path):
    lines = [f"{i:07d}" for i in range(300_000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    found = list(texts(tmp_path / "long.txt"))
    assert max(map(len, found)) <= 1 << 20 and len(found) == 3
    assert "\n".join(found).split("\n") == lines


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "has 'body'"),
        ("a.jsonl", b"[1]\n", "no object"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], "damaged gzip"),
        ("a.txt.gz", b"plain", "damaged gzip"),
        ("a.pdf", b"", "accepted are .txt"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FastsaeError, match=told) as error:
        list(texts(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_missing_text_is_reported_at_once(tmp_path):
    with pytest.raises(FastsaeError, match="does not exist"):
        texts(tmp_path / "nothing.txt")
    with pytest.raises(FastsaeError, match="holds no"):
        texts(tmp_path)


# --- tokens --------------------------------------------------------------------------------------


def test_packing_keeps_every_token_in_order(tokenizer, documents):
    texts_ = documents()
    sequences = list(tokenize(texts_, tokenizer, 16))
    assert all(s[0] == 0 for s in sequences)
    assert {len(s) for s in sequences[:-1]} == {16} and 1 < len(sequences[-1]) <= 16
    flat = [t for s in sequences for t in s[1:]]
    wanted = []
    for text in texts_:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # EOS separates documents, except where one ended exactly at the end of a sequence.
        wanted += ([1] if len(wanted) % 15 else []) + ids
    assert flat == wanted


def test_unpacked_sequences_hold_one_document(tokenizer):
    sequences = list(tokenize(["w1 w2 w3 w4 w5", "w6"], tokenizer, 4, pack=False))
    assert sequences == [[0, 4, 5, 6], [0, 7, 8], [0, 9]]


def test_tokenize_streams_and_needs_room_for_bos(tokenizer):
    endless = (f"w{i}" for i in iter(int, 1))
    assert len(next(tokenize(endless, tokenizer, 8))) == 8
    with pytest.raises(FastsaeError, match="ctx_len"):
        next(tokenize(["w1"], tokenizer, 1))


def test_store_round_trip_limit_and_kept(tokenizer, tmp_path, documents):
    sequences = list(tokenize(documents(), tokenizer, 16, pack=False))
    store = TokenStore.build(iter(sequences), tmp_path / "tokens", about={"mine": 1})
    ids, lengths = store.batch(np.arange(len(store)))
    assert [list(row[:n]) for row, n in zip(ids, lengths, strict=True)] == sequences
    again = TokenStore(tmp_path / "tokens")
    assert again.digest == store.digest and again.about["mine"] == 1
    for skip in (0, 1, 3):
        brute = [sum(t not in (0, 1) for t in s[skip:]) for s in sequences]
        assert store.kept([0, 1], skip).tolist() == brute
    short = TokenStore.build(iter(sequences), limit=40)
    assert 40 <= short.about["tokens"] < 40 + 16 and short.digest != store.digest


def test_store_appears_whole_or_not_at_all(tmp_path, tokenizer):
    def broken():
        yield [0, 5]
        raise RuntimeError("the network went away")

    with pytest.raises(RuntimeError):
        TokenStore.build(broken(), tmp_path / "tokens")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FastsaeError, match="corpus is empty"):
        TokenStore.build(tokenize(["  "], tokenizer, 8), tmp_path / "tokens")
    assert not list(tmp_path.iterdir())
