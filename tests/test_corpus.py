"""Corpus counts against a count by hand, their merging and files, and objective "corpus-mi"."""

import math
import re

import pytest
import torch

import fastsae
from fastsae.data import layer_activations
from fastsae.errors import FastsaeError
from fastsae.explain import CorpusCounts, Vocabulary, corpus_counts, explain
from fastsae.explain import counts as counts_module
from fastsae.explain.counts import signed_information

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

D, F = 16, 32
TEXTS = [
    "The music of the song, and the guitar's music: wonderful music!",
    "a bank wants security. A bank doesn't want music",
    "Don",
    "...",
    "wonderful security wonderful bank the the the the song and the guitar of the wonderful bank",
]
WORDS = ("music", "song", "guitar", "security", "bank", "the", "wonderful", "don", "unseen")
WINDOWS = ("word", 4, "document")


@pytest.fixture(scope="module")
def tokenizer():
    built = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    built.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>"])
    built.train_from_iterator(TEXTS, trainer)
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", bos_token="<s>"
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=D, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(2)
    return fastsae.SAE(fastsae.SAEConfig(D, F, k=3, hook_name="blocks.0.hook_resid_post"))


@pytest.fixture(scope="module")
def vocab():
    return Vocabulary(WORDS)


def _by_hand(sae, model, tokenizer, window, texts=TEXTS):
    """Sets of words and features per passage, one text, token and letter at a time."""
    passages = []
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        z = sae.encode(layer_activations(model, sae.config.hook_name, ids)[0])
        active = [
            {int(f) for f, a in zip(i, v, strict=True) if a > 0}
            for i, v in zip(z.indices, z.values, strict=True)
        ]
        spans = []
        for found in re.finditer(r"[a-zA-Z]+(?:'[a-zA-Z]+)*", text):
            tokens = [
                t
                for t, (start, end) in enumerate(encoded["offset_mapping"])
                if t and start < found.end() and end > found.start() and end > start
            ]
            spans.append((found.group().lower(), tokens))
        if window == "word":
            passages += [({word}, set.union(*(active[t] for t in at))) for word, at in spans]
            continue
        size = len(ids[0]) if window == "document" else window
        for first in range(1, len(ids[0]), size):
            block = range(first, min(first + size, len(ids[0])))
            words = {word for word, at in spans if at[0] in block}
            passages.append((words, set.union(*(active[t] for t in block))))
    return passages


@pytest.mark.parametrize("window", WINDOWS)
def test_counts_are_those_counted_by_hand(sae, model, tokenizer, vocab, window):
    found = corpus_counts(sae, model, tokenizer, iter(TEXTS), vocab, WINDOWS, batch_size=2)[window]
    passages = _by_hand(sae, model, tokenizer, window)
    assert found.passages == len(passages) and found.window == window
    dense = found.dense(torch.arange(F))
    for f in range(F):
        assert int(found.feature[f]) == sum(f in active for _, active in passages)
        for v, word in enumerate(WORDS):
            together = sum(word in words and f in active for words, active in passages)
            assert int(dense[f, v]) == together, (f, word)
    assert found.word.tolist() == [sum(w in words for words, _ in passages) for w in WORDS]
    assert int(found.word[WORDS.index("music")]) and not int(found.word[WORDS.index("unseen")])
    assert torch.equal(found.dense(torch.tensor([7, 3])), dense[[7, 3]])


def test_a_word_with_an_apostrophe_is_not_its_beginning(sae, model, tokenizer, vocab):
    counts = corpus_counts(sae, model, tokenizer, TEXTS, vocab)["word"]
    # "Don" once; neither "doesn't" nor "guitar's" counts as a word of the vocabulary.
    assert int(counts.word[WORDS.index("don")]) == 1
    assert int(counts.word[WORDS.index("guitar")]) == 1


@pytest.mark.parametrize("window", WINDOWS)
def test_the_sparse_and_the_dense_way_of_counting_agree(
    sae, model, tokenizer, vocab, window, monkeypatch
):
    dense = corpus_counts(sae, model, tokenizer, TEXTS, vocab, (window,))[window]
    monkeypatch.setattr(counts_module, "_DENSE", 0)
    monkeypatch.setattr(counts_module, "_PENDING", 5)  # added up many times on the way
    sparse = corpus_counts(sae, model, tokenizer, TEXTS, vocab, (window,))[window]
    for name in ("keys", "joint", "feature", "word", "passages", "tokens"):
        ours, other = getattr(dense, name), getattr(sparse, name)
        assert torch.equal(ours, other) if isinstance(ours, torch.Tensor) else ours == other, name
    assert (sparse.keys.diff() > 0).all() and (sparse.joint > 0).all()


def test_parts_add_up_to_the_whole_and_survive_a_file(sae, model, tokenizer, vocab, tmp_path):
    whole = corpus_counts(sae, model, tokenizer, TEXTS, vocab, (4,), batch_size=1)[4]
    parts = []
    for i, texts in enumerate((TEXTS[:2], TEXTS[2:4], TEXTS[4:])):
        part = corpus_counts(sae, model, tokenizer, texts, vocab, (4,), batch_size=1)[4]
        parts.append(CorpusCounts.load(part.save(tmp_path / f"{i}.safetensors")))
    merged = CorpusCounts.merge(parts)
    for name in ("keys", "joint", "feature", "word"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    names = ("passages", "tokens", "window", "sae", "model_name", "vocab")
    assert all(getattr(merged, name) == getattr(whole, name) for name in names)
    scores, indices = whole.top(5)
    assert all(torch.equal(*pair) for pair in zip(merged.top(5), (scores, indices), strict=True))

    other = corpus_counts(sae, model, tokenizer, TEXTS, vocab, ("word",))["word"]
    with pytest.raises(FastsaeError, match="cannot merge, window is 4 and 'word'"):
        CorpusCounts.merge([whole, other])
    fewer = corpus_counts(sae, model, tokenizer, TEXTS, Vocabulary(WORDS[:3]), (4,))[4]
    with pytest.raises(FastsaeError, match="different vocabularies"):
        CorpusCounts.merge([whole, fewer])
    with pytest.raises(FastsaeError, match="cannot merge, sae is"):
        twin = fastsae.SAE(sae.config)
        CorpusCounts.merge([whole, corpus_counts(twin, model, tokenizer, TEXTS, vocab, (4,))[4]])


def test_signed_information_is_that_of_the_two_by_two_table():
    n, n_f, n_v = 40, 10, 16
    cases = {8: +1, 4: 0, 1: -1, 0: -1, 10: +1}
    for together, sign in cases.items():
        table = [[together, n_f - together], [n_v - together, n - n_f - n_v + together]]
        rows, columns = [sum(r) for r in table], [sum(c) for c in zip(*table, strict=True)]
        expected = sum(
            cell / n * math.log(cell * n / (rows[i] * columns[j]))
            for i, line in enumerate(table)
            for j, cell in enumerate(line)
            if cell
        )
        found = signed_information(
            torch.tensor([[together]]), torch.tensor([n_f]), torch.tensor([n_v]), n
        )
        assert float(found) == pytest.approx(sign * expected, abs=1e-12)
    constant = signed_information(torch.tensor([[5]]), torch.tensor([40]), torch.tensor([5]), 40)
    assert float(constant) == 0  # active everywhere: it tells nothing


def test_corpus_mi_ranks_by_the_information_and_keeps_what_made_it(
    sae, model, tokenizer, vocab, tmp_path
):
    counts = corpus_counts(sae, model, tokenizer, TEXTS, vocab, (4,))[4]
    ex = explain(sae, model, tokenizer, vocab, texts=TEXTS, window=4, top=5)
    assert ex.objective == "corpus-mi" and ex.temperature == 1
    oracle = counts.scores(torch.arange(F)).float()
    order = oracle.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ex.scores, order.values[:, :5])
    assert torch.equal(ex.indices.long(), order.indices[:, :5])
    same = explain(sae, model, tokenizer, counts=counts, top=5)
    assert torch.equal(same.indices, ex.indices) and same.vocab is counts.vocab
    loaded = fastsae.Explanations.load(ex.save(tmp_path / "ex.safetensors"))
    expected = {"window": 4, "passages": counts.passages, "tokens": counts.tokens}
    assert loaded.made_with == ex.made_with == expected
    assert fastsae.Explanations.load(ex.save(tmp_path / "ex.json")).made_with == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": (0,)}, "window: got 0"),
        ({"windows": ("sentence",)}, "window: got 'sentence'"),
        ({"windows": ("word", "word")}, "each passage window once"),
        ({"windows": ()}, "at least one"),
        ({"max_pairs": 5, "windows": (4,)}, "max_pairs: more than 5 pairs"),
        ({"texts": []}, "texts: hold no token"),
        ({"texts": "music"}, "texts: got one string"),
    ],
)
def test_errors_of_counting(sae, model, tokenizer, vocab, arguments, message):
    given = {"texts": TEXTS} | arguments
    with pytest.raises(FastsaeError, match=message):
        corpus_counts(sae, model, tokenizer, given.pop("texts"), vocab, **given)


def test_errors_of_corpus_mi(sae, model, tokenizer, vocab, tmp_path):
    counts = corpus_counts(sae, model, tokenizer, TEXTS, vocab)["word"]
    for arguments, message in (
        ({"objective": "corpus-mi"}, r"give texts= or counts="),
        ({"objective": "pmi", "texts": TEXTS}, "reads none"),
        ({"texts": TEXTS, "counts": counts}, "give one of the two"),
        ({"texts": TEXTS, "translator": lambda x: x}, "reads texts, not logits"),
        ({"counts": counts, "vocab": WORDS[:4]}, "another vocabulary"),
    ):
        with pytest.raises(FastsaeError, match=message):
            explain(sae, model, tokenizer, **({"vocab": vocab} | arguments))
    with pytest.raises(FastsaeError, match="made with another SAE"):
        explain(fastsae.SAE(sae.config), model, tokenizer, counts=counts)
    with pytest.raises(FastsaeError, match="cannot read counts"):
        CorpusCounts.load(tmp_path / "missing.safetensors")
    ex = explain(sae, model, tokenizer, counts=counts, top=3)
    with pytest.raises(FastsaeError, match="holds no counts"):
        CorpusCounts.load(ex.save(tmp_path / "ex.safetensors"))

    class Slow:
        is_fast = False

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    with pytest.raises(FastsaeError, match="only fast tokenizers"):
        corpus_counts(sae, model, Slow(), TEXTS, vocab)
