"""Top activations and activation samples against a plain loop over single documents."""

import pytest
import torch

import fastsae
from fastsae.errors import FastsaeError
from fastsae.explain import activation_values, top_activations
from fastsae.explain.corpus import corpus_counts
from fastsae.explain.examples import (
    Examples,
    _Pieces,
    _pieces,
    collect_examples,
    counts_and_examples,
)
from fastsae.explain.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

D, F = 16, 24
TEXTS = [
    "the music of the song and the guitar",
    "a bank wants security",
    "",
    "x",
    "café ☕ naïve the song",
    "security of the bank and the music of the bank " * 3,
    "the music of the song and the guitar",
]


@pytest.fixture(scope="module")
def tokenizer():
    level = tokenizers.pre_tokenizers.ByteLevel
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer, built.decoder = (
        level(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([t for t in TEXTS if "☕" not in t], trainer)
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", padding_side="left"
    )


@pytest.fixture(params=["llama, topk", "gpt2, relu"])
def kind(request):
    return request.param.split(", ")


@pytest.fixture
def model(kind, tokenizer):
    torch.manual_seed(4)
    if kind[0] == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=D, n_layer=3, n_head=2, n_positions=64
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D,
        intermediate_size=D,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def sae(kind):
    torch.manual_seed(5)
    k = 4 if kind[1] == "topk" else None
    hook = "blocks.1.hook_resid_post"
    return fastsae.SAE(fastsae.SAEConfig(D, F, activation=kind[1], k=k, hook_name=hook))


@torch.no_grad()
def _oracle(sae, model, tokenizer, features, hidden_state=2, max_length=512):
    """Per feature every (value, document, position) with a positive value, in text order."""
    found = {f: [] for f in features}
    tokens = 0
    for document, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :max_length]
        ids = ids.to(model.device)
        out = model(input_ids=ids, output_hidden_states=True)
        dense = sae.encode(out.hidden_states[hidden_state][0]).to_dense()
        tokens += max(0, len(dense) - 1)
        for f in features:
            for position in range(1, len(dense)):
                if dense[position, f] > 0:
                    found[f].append((float(dense[position, f]), document, position))
    return found, tokens


def _best(entries, n):
    best = {}
    for value, document, position in entries:
        if document not in best or value > best[document][0] + 1e-6:
            best[document] = (value, document, position)
    return sorted(best.values(), key=lambda e: (-round(e[0], 5), e[1]))[:n]


def _check(result, expected):
    assert [(e.document, e.position) for e in result] == [e[1:] for e in expected]
    assert [e.value for e in result] == pytest.approx([e[0] for e in expected], rel=1e-4)


FEATURES = [7, 3, 19, 0, 11]


@pytest.mark.parametrize(("batch_size", "n"), [(1, 4), (3, 1), (16, 4)])
def test_top_activations_match_a_plain_loop(sae, model, tokenizer, batch_size, n, device):
    sae, model = sae.to(device), model.to(device)
    got = top_activations(sae, model, tokenizer, TEXTS, FEATURES, n=n, batch_size=batch_size)
    expected, _ = _oracle(sae, model, tokenizer, FEATURES)
    assert list(got) == FEATURES and any(expected.values())
    for f in FEATURES:
        _check(got[f], _best(expected[f], n))


def test_layer_argument_and_input_side(sae, model, tokenizer):
    got = top_activations(sae, model, tokenizer, TEXTS, FEATURES, layer="blocks.1.hook_resid_pre")
    expected, _ = _oracle(sae, model, tokenizer, FEATURES, hidden_state=1)
    same = top_activations(sae, model, tokenizer, TEXTS, FEATURES, layer=0)
    for f in FEATURES:
        _check(got[f], _best(expected[f], 5))
        _check(same[f], _best(expected[f], 5))


def test_context_is_the_text_around_the_token(sae, model, tokenizer):
    got = top_activations(sae, model, tokenizer, TEXTS, range(F), context=3)
    wide = top_activations(sae, model, tokenizer, TEXTS, range(F), context=200)
    none = top_activations(sae, model, tokenizer, TEXTS, range(F), context=0)
    seen = 0
    for f in range(F):
        for entry, all_text, alone in zip(got[f], wide[f], none[f], strict=True):
            text = TEXTS[entry.document]
            ids = tokenizer(text)["input_ids"]
            assert all_text.before + all_text.token + all_text.after == text
            assert (alone.before, alone.after) == ("", "")
            assert all_text.token in text and "\ufffd" not in entry.before + entry.after
            if text.isascii():
                assert entry.token == alone.token == tokenizer.decode(ids[entry.position])
                assert entry.before + entry.token + entry.after in text
                ours = tokenizer(entry.before + entry.token, add_special_tokens=False)
                assert len(ours["input_ids"]) <= 4
            seen += 1
    assert seen > F


def test_model_runs_no_further_than_the_layer_and_is_left_as_it_was(sae, model, tokenizer):
    layers = fastsae.models.decoder_layers(model)
    model.train()
    pulled, runs, later = [], [], []
    first = layers[0].register_forward_pre_hook(lambda *_: runs.append(len(pulled)))
    last = layers[2].register_forward_hook(lambda *_: later.append(1))
    texts = (pulled.append(t) or t for t in TEXTS)
    got = top_activations(sae, model, tokenizer, texts, [3], batch_size=2)
    first.remove()
    last.remove()
    assert not later
    assert runs == [2, 4, 6, 7], "texts are read one batch at a time"
    assert model.training and not layers[1]._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    assert got == top_activations(sae, model, tokenizer, TEXTS, [3], batch_size=2)


def test_long_documents_are_cut(sae, model, tokenizer):
    got = top_activations(sae, model, tokenizer, TEXTS, FEATURES, max_length=6)
    expected, _ = _oracle(sae, model, tokenizer, FEATURES, max_length=6)
    for f in FEATURES:
        _check(got[f], _best(expected[f], 5))
    # 64 positions in the GPT-2 model: a document of 500 tokens is cut there, not an index error.
    top_activations(sae, model, tokenizer, ["music bank " * 250], [3])


@pytest.mark.parametrize("limit", [3, 1000])
def test_activation_values(sae, model, tokenizer, limit):
    got = activation_values(sae, model, tokenizer, TEXTS, FEATURES, limit=limit, batch_size=2)
    expected, tokens = _oracle(sae, model, tokenizer, FEATURES)
    for f in FEATURES:
        values = [value for value, _, _ in expected[f]]
        assert got[f].active == len(values) and got[f].tokens == tokens
        assert got[f].values.dtype == torch.float32
        assert got[f].values.tolist() == pytest.approx(values[:limit], rel=1e-4)


def test_no_text_gives_no_entry(sae, model, tokenizer):
    assert top_activations(sae, model, tokenizer, [], [1, 2]) == {1: [], 2: []}
    assert top_activations(sae, model, tokenizer, ["", "x"], [1, 1], batch_size=1).keys() == {1}
    empty = activation_values(sae, model, tokenizer, [""], [1])[1]
    assert (len(empty.values), empty.active, empty.tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "features: got none"),
        ({"features": [F]}, f"features: got {F}, accepted are 0..{F - 1}"),
        ({"features": [-1]}, "features: got -1"),
        ({"texts": "one text"}, "texts: got one string"),
        ({"texts": ["a", 3]}, "text 1 is a int"),
        ({"n": 0}, "n: got 0"),
        ({"context": -1}, "context: got -1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"max_length": 1}, "max_length: got 1"),
        ({"layer": 9}, "layer: got 9"),
        ({"layer": "blocks.1.hook_mlp_out"}, "hook: cannot place"),
    ],
)
@pytest.mark.parametrize("kind", ["llama, topk"], indirect=True)
def test_errors(sae, model, tokenizer, change, message):
    arguments = {"texts": TEXTS, "features": [1]} | change
    with pytest.raises(FastsaeError, match=message):
        top_activations(sae, model, tokenizer, **arguments)


@pytest.mark.parametrize("kind", ["llama, topk"], indirect=True)
def test_an_sae_of_another_width_or_without_a_place_is_an_error(model, tokenizer):
    with pytest.raises(FastsaeError, match="pass layer="):
        top_activations(fastsae.SAE(fastsae.SAEConfig(D, F, k=2)), model, tokenizer, TEXTS, [1])
    wide = fastsae.SAE(fastsae.SAEConfig(D + 1, F, k=2, hook_name="layers.1"))
    with pytest.raises(FastsaeError, match=f"d_in = {D + 1}.*{D}"):
        top_activations(wide, model, tokenizer, TEXTS, [1])
    sae = fastsae.SAE(fastsae.SAEConfig(D, F, k=2, hook_name="layers.1"))
    with pytest.raises(FastsaeError, match="limit: got 0"):
        activation_values(sae, model, tokenizer, TEXTS, [1], limit=0)


# --- examples: the same places, with every token's activation ------------------------------------


@torch.no_grad()
def _dense(sae, model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
    values = sae.encode(hidden).to_dense().clamp(min=0)
    values[0] = 0
    return values


@pytest.mark.parametrize("context", [0, 3, 200])
def test_examples_hold_the_places_the_text_and_every_activation(sae, model, tokenizer, context):
    got = collect_examples(sae, model, tokenizer, TEXTS, n=4, context=context, batch_size=3)
    places = top_activations(sae, model, tokenizer, TEXTS, range(F), n=4, context=context)
    values = activation_values(sae, model, tokenizer, TEXTS, range(F), batch_size=3)
    dense = [_dense(sae, model, tokenizer, text) for text in TEXTS]
    assert got.features == list(range(F)) and got.tokens == values[0].tokens
    for f in range(F):
        known = got[f]
        assert [e[1:3] for e in known.examples] == [(p.document, p.position) for p in places[f]]
        for e, p in zip(known.examples, places[f], strict=True):
            assert e.value == pytest.approx(p.value, rel=1e-5)
            assert e.text == p.before + p.token + p.after or "\ufffd" in e.text + p.token
            start = max(0, p.position - context)
            expected = dense[e.document][start : p.position + context + 1, f]
            assert list(e.values) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
            assert e.peak == p.position - start and e.values[e.peak] == e.value
            assert len(e.tokens) == len(e.values)
        assert known.active == values[f].active == sum(known.counts)
        for low, high, n in zip(known.edges, known.edges[1:], known.counts, strict=False):
            assert n == int(((values[f].values >= low) & (values[f].values < high)).sum())


def test_pieces_with_a_memory_are_those_without(tokenizer):
    fast, seen = _Pieces(tokenizer), 0
    for text in [*TEXTS, "<s>", "", "a <s>b", "☕" * 3, "\ufffd bank"]:
        ids = tokenizer(text)["input_ids"]
        for start in range(len(ids)):
            for end in (start, start + 1, start + 4, len(ids)):
                part = ids[start:end]
                assert fast(part) == _pieces(tokenizer, part), (text, start, end)
                seen += len(part)
    assert seen > 1000 and len(fast._behind) > 20


def test_counts_and_examples_of_one_pass_are_those_of_two(sae, model, tokenizer, monkeypatch):
    vocab, passes = Vocabulary(("music", "song", "bank")), []
    windows = ("word", 4)
    examples = collect_examples(sae, model, tokenizer, TEXTS)
    counts = corpus_counts(sae, model, tokenizer, TEXTS, vocab, windows)
    forward = type(model).forward

    def counted(self, *arguments, **options):
        passes.append(1)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    both, found = counts_and_examples(sae, model, tokenizer, TEXTS, vocab, windows)
    assert len(passes) == -(-len(TEXTS) // 8)
    assert found._text == examples._text and found.header == examples.header
    for window in windows:
        for name in ("keys", "joint", "word", "feature"):
            assert torch.equal(getattr(both[window], name), getattr(counts[window], name))
    with pytest.raises(FastsaeError, match="n: got 0"):
        counts_and_examples(sae, model, tokenizer, TEXTS, vocab, n=0)


def test_examples_files_and_words(sae, model, tokenizer, tmp_path):
    got = collect_examples(sae, model, tokenizer, TEXTS, [5, 2, 9], n=2, context=40)
    path = got.save(tmp_path / "x.examples.jsonl")
    again = Examples.load(path)
    assert again.features == [5, 2, 9] and 2 in again and 3 not in again
    assert all(again[f] == got[f] for f in got.features)
    for words in (["guitar"], ["BANK"], ["café"], ["music", "bank"], ["ban"]):
        by_hand = [
            f
            for f in got.features
            for e in got[f].examples
            if all(w.lower() in e.text.lower().split() for w in words)
        ]
        assert again.find(words, 10) == list(dict.fromkeys(by_hand)), words
    assert len(again.find(["the"], 1)) <= 1
    whole = path.read_text()
    for content, says in (
        (whole[:-200].rsplit("\n", 1)[0], "truncated"),
        ("{}\n", "holds no examples"),
        ("x", "not a file of examples"),
    ):
        path.write_text(content)
        with pytest.raises(FastsaeError, match=says):
            Examples.load(path)
    with pytest.raises(FastsaeError, match="n: got 0"):
        collect_examples(sae, model, tokenizer, TEXTS, n=0)
