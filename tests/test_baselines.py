"""N-grams: the pruned patterns are checked by running the model on them again."""

import pytest
import torch

import fastsae
from fastsae.errors import FastsaeError
from fastsae.explain import Vocabulary, top_activations
from fastsae.explain.activations import _batches, _Best
from fastsae.explain.baselines import ANY, _Pruner, _words_at, ngram_scores, ngrams

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

D, F = 16, 24
WORDS = "the music of song and guitar a bank wants security".split()
TEXTS = [
    "the music of the song and the guitar",
    "a bank wants security of the music",
    "the song of the bank and a guitar wants music",
    "security",
]


@pytest.fixture(scope="module")
def tokenizer():
    names = {"<unk>": 0, "<s>": 1} | {f"▁{word}": i for i, word in enumerate(WORDS, 2)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    built.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    built.decoder = tokenizers.decoders.Replace("▁", " ")
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D,
        intermediate_size=D,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def sae():
    torch.manual_seed(5)
    hook = "blocks.1.hook_resid_post"
    return fastsae.SAE(fastsae.SAEConfig(D, F, activation="topk", k=4, hook_name=hook))


@torch.no_grad()
def _value(sae, model, tokenizer, feature, words):
    ids = torch.tensor([[1] + [tokenizer.convert_tokens_to_ids("▁" + w) for w in words]])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1:]
    return float(sae.encode(hidden).to_dense()[0, feature].clamp(min=0))


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_the_shortest_suffix_that_keeps_the_activation(sae, model, tokenizer, keep):
    got = ngrams(sae, model, tokenizer, TEXTS, range(8), n=2, keep=keep, longest=6)
    places = top_activations(sae, model, tokenizer, TEXTS, range(8), n=2, context=5)
    assert list(got) == list(range(8))
    lengths = set()
    for f in range(8):
        assert sum(g.found for g in got[f]) == len(places[f])
        expected = []
        for place in places[f]:
            words = (place.before + place.token).split()[-6:]
            values = [
                _value(sae, model, tokenizer, f, words[-i:]) for i in range(1, 1 + len(words))
            ]
            fits = [i for i, v in enumerate(values, 1) if v >= keep * place.value]
            length = fits[0] if fits else len(words)
            expected.append((words[-length:], values[length - 1]))
        for gram in got[f]:
            names = [t.strip() for t in gram.tokens]
            alike = [
                value
                for words, value in expected
                if len(words) == len(names)
                and all(a in (ANY, b) for a, b in zip(names[::-1], words[::-1], strict=False))
            ]
            assert any(gram.value == pytest.approx(v, rel=1e-4) for v in alike)
            assert names[-1] != ANY
            assert gram.share >= keep * 0.999 or ANY not in names
            lengths.add(len(names))
    assert len(lengths) > 1


def test_any_is_a_place_whose_substitutes_keep_the_activation(sae, model, tokenizer):
    seen = {True: 0, False: 0}
    places = top_activations(sae, model, tokenizer, TEXTS, range(10), n=2)
    for f, found in places.items():
        for place in found:
            words = (place.before + place.token).split()
            ids = [tokenizer.convert_tokens_to_ids("▁" + w) for w in words]
            if len(ids) < 2:
                continue
            prune = _Pruner(sae, model, tokenizer, None, 0.5, 3)
            likely = prune._likely(ids)
            floor = 0.5 * place.value
            for i, free in enumerate(prune._free(f, ids, floor)):
                with torch.no_grad():
                    row = model(torch.tensor([[1] + ids])).logits[0, i]
                row[[0, 1, ids[i]]] = -torch.inf
                assert likely[i] == row.topk(3).indices.tolist()
                others = [WORDS[t - 2] for t in likely[i]]
                values = [
                    _value(sae, model, tokenizer, f, words[:i] + [o] + words[i + 1 :])
                    for o in others
                ]
                if all(abs(v - floor) > 1e-5 for v in values):
                    assert free == all(v >= floor for v in values)
                    seen[free] += 1
    assert min(seen.values()) > 3, seen


def test_words_of_ngrams_are_those_of_the_pruned_texts(sae, model, tokenizer):
    vocab, n, context = Vocabulary(WORDS), 3, 5
    best = _Best(F, n, context)
    for batch in _batches(sae, model, tokenizer, TEXTS, list(range(F)), None, 2, 64):
        best.merge(batch)
    rows = torch.tensor([7, 2, 11, 3])
    found = ngram_scores(sae, model, tokenizer, best, vocab, rows, n)
    earlier = 0
    for row, f in enumerate(rows.tolist()):
        expected = torch.full((len(WORDS),), -torch.inf)
        for gram in ngrams(sae, model, tokenizer, TEXTS, [f], n=n, longest=context + 1)[f]:
            assert gram.found == 1  # else its value is the largest of several texts'
            names = [t.strip() for t in gram.tokens]
            # A word twice in an n-gram counts once as the last, and once as an earlier one.
            gains = {(name, False): 0.5 for name in names[:-1] if name != ANY}
            for (name, _), share in (gains | {(names[-1], True): 1.0}).items():
                v = WORDS.index(name)
                expected[v] = expected[v].clamp(min=0) + share * gram.value
            earlier += len(gains)
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=0)
    assert earlier > 2


def test_a_word_counts_whole_where_the_ngram_has_one_of_its_pieces():
    pieces = ["un", "like", "ly", " mu", "sic", " of", " the", "ir"]
    assert list(_words_at(pieces, [2, 3])) == [("unlikely", False), ("music", True)]
    assert list(_words_at(pieces, [6])) == [("their", True)]
    assert list(_words_at(["the", " the"], [0, 1])) == [("the", False), ("the", True)]
    assert list(_words_at(["", "...", "7"], [1, 2])) == []


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"n": 0}, "n: got 0"),
        ({"longest": 0}, "longest: got 0"),
        ({"substitutes": True}, "substitutes: got True"),
        ({"keep": 0.0}, "keep: got 0.0"),
        ({"keep": 1.5}, "keep: got 1.5"),
    ],
)
def test_errors(sae, model, tokenizer, option, says):
    with pytest.raises(FastsaeError, match=says):
        ngrams(sae, model, tokenizer, TEXTS, [0], **option)
