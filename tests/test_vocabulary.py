"""Vocabulary: its files, its errors, and word vectors under every way a tokenizer marks a space."""

import builtins
import sys

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.explain.vocabulary import Vocabulary, word_tokens, word_vectors

WORDS = ("music", "song", "guitar", "security", "bank", "the", "wonderful")
# "wonderful" is left out of the training text, so it needs several tokens everywhere.
TEXT = ["the music of the song and the guitar", "a bank wants security", "x y z w o n d e r f u l"]


def _trained(pre_tokenizer, initial=()):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>"], initial_alphabet=list(initial)
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


def _gemma(tokenizers):
    tokenizer = _trained(tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always"))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    return tokenizer


def _llama(tokenizers):
    """A space is put before every text: " music" becomes "▁▁music" and splits off a lone "▁"."""
    tokenizer = _gemma(tokenizers)
    normalizers = tokenizers.normalizers
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def _gpt2(tokenizers):
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(byte_level, tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _spaces_apart(tokenizers):
    """A tokenizer without joint tokens: every space is a token of its own."""
    words = ["<unk>", "▁", "a", *WORDS]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "isolated")
    return tokenizer


BUILDERS = {"gemma": _gemma, "llama": _llama, "gpt2": _gpt2, "spaces_apart": _spaces_apart}
JOINT = {"gemma": "▁", "llama": "▁", "gpt2": "Ġ", "spaces_apart": ""}


@pytest.fixture(params=BUILDERS)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(family):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    built = BUILDERS[family](tokenizers)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.fixture
def model(tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_word_is_tokenized_as_inside_a_text(tokenizer, family):
    ids = word_tokens(tokenizer, WORDS)
    for word, row in zip(WORDS, ids, strict=True):
        inside = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
        assert inside[-len(row) :] == row
        tokens = tokenizer.convert_ids_to_tokens(row)
        assert "".join(tokens) == JOINT[family] + word
        assert len(row) == 1 or tokens[0] not in ("▁", "Ġ") or word == "wonderful"
    assert len(ids[0]) == 1, "the joint token of a frequent word must be used"


def test_llama_spelling_would_split_without_care(tokenizer, family):
    """The case the anchor exists for is real: the plain encoding begins with a lone space."""
    plain = tokenizer(" music", add_special_tokens=False)["input_ids"]
    lone = tokenizer.convert_ids_to_tokens(plain)[0] == "▁"
    assert lone == (family in ("llama", "spaces_apart"))


def test_word_vectors_are_means_of_output_rows(model, tokenizer):
    vectors = word_vectors(model, tokenizer, WORDS)
    table = model.lm_head.weight.detach().double()
    expected = torch.stack([table[row].mean(0) for row in word_tokens(tokenizer, WORDS)])
    assert vectors.dtype == torch.float32 and vectors.shape == (len(WORDS), 16)
    torch.testing.assert_close(vectors.double(), expected, rtol=1e-6, atol=1e-8)
    assert not vectors.requires_grad
    half = word_vectors(model.bfloat16(), tokenizer, Vocabulary(WORDS))
    assert half.dtype == torch.float32
    rows = model.lm_head.weight.detach().double()
    expected = torch.stack([rows[row].mean(0) for row in word_tokens(tokenizer, WORDS)])
    torch.testing.assert_close(half.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["gpt2"])
def test_word_vectors_uses_the_output_embedding_not_the_input(model, tokenizer):
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    before = word_vectors(model, tokenizer, WORDS)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert torch.equal(before, word_vectors(model, tokenizer, WORDS))


@pytest.mark.parametrize("family", ["spaces_apart"])
def test_words_errors(model, tokenizer):
    with pytest.raises(FastsaeError, match=r"knows no token of 2 words \(violin, oboe\)"):
        word_vectors(model, tokenizer, ["music", "violin", "oboe"])
    with pytest.raises(FastsaeError, match="got no word"):
        word_vectors(model, tokenizer, [])
    model.resize_token_embeddings(5)
    with pytest.raises(FastsaeError, match="output embedding has 5 rows"):
        word_vectors(model, tokenizer, ["guitar"])


def test_default_vocabulary():
    pytest.importorskip("wordfreq")
    vocab = Vocabulary.default(5000)
    assert len(vocab) == len(set(vocab)) == 5000
    assert all(w.isascii() and w.isalpha() and w == w.lower() and len(w) >= 2 for w in vocab)
    assert vocab.words[:3] == ("the", "to", "and")
    assert list(vocab.frequencies) == sorted(vocab.frequencies, reverse=True)
    assert 0.04 < vocab.frequencies[0] < 0.07
    assert vocab == Vocabulary.default(5000)
    assert Vocabulary.default(10).words == vocab.words[:10]
    assert "music" in vocab and "zqx" not in vocab
    assert vocab.source.startswith("wordfreq 3")


def test_default_of_other_sizes_languages_and_letters():
    pytest.importorskip("wordfreq")
    german = Vocabulary.default(2000, "de")
    assert {"und", "über"} <= set(german.words) and german.frequencies[0] > german.frequencies[-1]
    ascii_only = Vocabulary.default(1000, "de", letters="ascii")
    assert "und" in ascii_only and all(word.isascii() for word in ascii_only)
    assert "ascii" in ascii_only.source and "ascii" not in german.source
    # Vowel signs are marks, not letters: without them most Hindi words would be lost.
    assert "में" in Vocabulary.default(1000, "hi")
    assert len(Vocabulary.default(50_000)) == 50_000
    assert {"en", "de", "zh"} <= set(Vocabulary.languages())
    with pytest.raises(FastsaeError, match=r"language: got 'xx'.*from_file"):
        Vocabulary.default(1000, "xx")
    with pytest.raises(FastsaeError, match="letters: got 'latin'"):
        Vocabulary.default(1000, letters="latin")
    with pytest.raises(FastsaeError, match="ask for fewer"):
        Vocabulary.default(10_000_000)


def test_merged_inflections_keep_the_most_frequent_form():
    pytest.importorskip("wordfreq")
    stemmer = pytest.importorskip("snowballstemmer").stemmer("english")
    plain, merged = Vocabulary.default(8000), Vocabulary.default(3000, merge_inflections=True)
    stems = [stemmer.stemWord(word) for word in merged]
    assert len(set(stems)) == len(stems) == 3000
    assert "year" in merged and "years" in plain and "years" not in merged
    assert [w for w in plain if w in merged][: len(merged)] == list(merged.words)
    # Its frequency is that of all its forms met on the way.
    last = plain.index(merged.words[-1])
    forms = [i for i, w in enumerate(plain.words[:last]) if stemmer.stemWord(w) == "year"]
    expected = sum(plain.frequencies[i] for i in forms)
    assert merged.frequencies[merged.index("year")] == pytest.approx(expected)
    assert len(forms) > 1 and "inflections merged" in merged.source
    with pytest.raises(FastsaeError, match="merge_inflections: no stemmer for language 'ja'"):
        Vocabulary.default(1000, "ja", merge_inflections=True)


def test_merging_needs_a_stemmer(monkeypatch):
    pytest.importorskip("wordfreq")
    monkeypatch.setitem(sys.modules, "snowballstemmer", None)
    with pytest.raises(FastsaeError, match="pip install snowballstemmer"):
        Vocabulary.default(1000, merge_inflections=True)


def test_scripts_without_spaces_are_tokenized_without_one():
    class Recorder:
        unk_token_id = None

        def __call__(self, texts, add_special_tokens):
            self.seen = texts
            return {"input_ids": [[1] for _ in texts]}

    recorder = Recorder()
    word_tokens(recorder, ["music", "音楽", "ดนตรี", "музыка"])
    assert recorder.seen == [" music", "音楽", "ดนตรี", " музыка"]


def test_default_needs_wordfreq(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wordfreq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FastsaeError, match="pip install wordfreq"):
        Vocabulary.default()


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "many", 10**7])
def test_default_rejects(n):
    pytest.importorskip("wordfreq")
    with pytest.raises(FastsaeError, match="n: got"):
        Vocabulary.default(n)


def test_lookup():
    vocab = Vocabulary(["music", "Paris", "song"])
    assert [vocab.index(w) for w in vocab] == [0, 1, 2]
    assert vocab.index("MUSIC") == 0 and vocab.index("Paris") == 1
    with pytest.raises(FastsaeError, match=r"'musik' is not among the 3 words.*close to it: music"):
        vocab.index("musik")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "got no word"),
        ("music", "got the string"),
        (["a", ""], r"words\[1\]: got ''"),
        (["new york"], r"words\[0\]: got 'new york'"),
        (["a", "b", "a"], r"words\[2\]: 'a' is already words\[0\]"),
        (["a", 3], r"words\[1\]: got 3"),
    ],
)
def test_rejects_words(words, message):
    with pytest.raises(FastsaeError, match=message):
        Vocabulary(words)


@pytest.mark.parametrize("frequencies", [(0.1,), (0.1, float("nan")), (0.1, -1.0)])
def test_rejects_frequencies(frequencies):
    with pytest.raises(FastsaeError, match="frequencies"):
        Vocabulary(("a", "b"), frequencies)


@pytest.mark.parametrize("frequencies", [None, (0.1, 1e-7, 1 / 3)])
def test_file_round_trip(tmp_path, frequencies):
    vocab = Vocabulary(("naïve", "c#", "Paris"), frequencies, "made here")
    vocab.to_file(tmp_path / "words.txt")
    again = Vocabulary.from_file(tmp_path / "words.txt")
    assert (again.words, again.frequencies) == (vocab.words, vocab.frequencies)
    assert again.source == "file words.txt"


def test_file_syntax(tmp_path):
    path = tmp_path / "w.txt"
    path.write_bytes("\ufeff# header\r\nmusic\t0.5\r\n\r\n  song   2e-3  # a note\r\n".encode())
    vocab = Vocabulary.from_file(path)
    assert vocab.words == ("music", "song") and vocab.frequencies == (0.5, 0.002)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no word"),
        (b"# only\n\n", "holds no word"),
        (b"a\nb\na\n", "line 3: 'a' is already on line 1"),
        (b"a\nnew york\n", "line 2: got 'new york'"),
        (b"a 0.5 0.2\n", "line 1: got 'a 0.5 0.2'"),
        (b"a -1\n", "line 1: got 'a -1'"),
        (b"a 0.5\nb\n", "line 2: has no frequency"),
        (b"a\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_file_errors(tmp_path, text, message):
    path = tmp_path / "w.txt"
    path.write_bytes(text)
    with pytest.raises(FastsaeError, match=message) as error:
        Vocabulary.from_file(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FastsaeError, match="cannot be read"):
        Vocabulary.from_file(tmp_path / "none.txt")
    with pytest.raises(FastsaeError, match="starts with '#'"):
        Vocabulary(("#tag",)).to_file(tmp_path / "w.txt")
