"""Text, tokens, activations: bounded, seeded, and continued bit for bit."""

import errno
import gzip
import json
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch

from fastsae.data import ActivationStream, TokenStore, layer_activations, texts, tokenize
from fastsae.errors import FastsaeError
from fastsae.training.cache import ActivationCache
from fastsae.training.sampling import sample, sample_batch, sample_texts, write_samples

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = 50


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, because the tensors are tiny; no fsync, because no test can see its effect."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    level = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    level.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=level, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def documents(count=40, seed=0):
    """Each begins with a word of its own, so that no two activations are equal."""
    rng = random.Random(seed)
    return [
        " ".join([f"w{i}"] + [f"w{rng.randrange(WORDS)}" for _ in range(rng.randrange(30))])
        for i in range(count)
    ]


@pytest.fixture
def store(tokenizer):
    return TokenStore.build(tokenize(documents(), tokenizer, 16))


def stream_of(model, tokenizer, store, **options):
    settings = {"batch_tokens": 48, "batch_size": 4, "buffer_tokens": 160, "seed": 3} | options
    return ActivationStream(model, tokenizer, store, 1, **settings)


# --- text ---------------------------------------------------------------------------------------


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


# --- tokens -------------------------------------------------------------------------------------


def test_packing_keeps_every_token_in_order(tokenizer):
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
    endless = (f"w{i % WORDS}" for i in iter(int, 1))
    assert len(next(tokenize(endless, tokenizer, 8))) == 8
    with pytest.raises(FastsaeError, match="ctx_len"):
        next(tokenize(["w1"], tokenizer, 1))


def test_store_round_trip_limit_and_kept(tokenizer, tmp_path):
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


# --- the model up to one layer ------------------------------------------------------------------


def test_layer_activations_stop_after_the_layer(model):
    ids = torch.randint(3, WORDS, (2, 9))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    # transformers leaves hooks of its own (for output_hidden_states): ours must not add to them.
    modules = list(model.modules())
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    ran = []
    watched = [model.model.layers[2], model.lm_head, model.model.layers[1]]
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in watched]
    assert torch.equal(layer_activations(model, 0, ids), hidden[1])
    assert torch.equal(layer_activations(model, "blocks.1.hook_resid_pre", ids), hidden[1])
    assert not ran
    assert torch.equal(layer_activations(model, "layers.1", ids), hidden[2])
    assert ran == [watched[2]]
    for handle in handles:
        handle.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] == before
    with torch.no_grad():
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[1], hidden[1])


def test_missing_layer_names_the_range(model, tokenizer, store):
    with pytest.raises(FastsaeError, match=r"layer: got 7, .* layers 0 to 2"):
        ActivationStream(model, tokenizer, store, 7)


# --- the stream ---------------------------------------------------------------------------------


def test_stream_yields_the_right_rows_once_per_epoch(model, tokenizer):
    store = TokenStore.build(tokenize(documents(), tokenizer, 32, pack=False))
    stream = stream_of(model, tokenizer, store)
    known = {}
    for s in range(len(store)):
        ids, lengths = store.batch(np.array([s]))
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[2][0]
        keep = [p for p in range(1, lengths[0]) if ids[0, p] not in (0, 1)]
        for p in keep:
            known[(s, p)] = hidden[p]
    assert stream.corpus_tokens == len(known)
    rows = torch.stack(list(known.values()))
    emitted = Counter()
    while stream.epoch < 3:
        batch = next(stream)
        assert batch.shape == (48, 32) and batch.dtype == torch.float32
        distance = torch.cdist(batch, rows, compute_mode="donot_use_mm_for_euclid_dist")
        # Padding and batching change the last bits of the model, nothing more.
        assert float(distance.min(1).values.max()) < 1e-5
        emitted.update(distance.argmin(1).tolist())
    assert len(stream._rows) == 160
    assert max(emitted.values()) <= 4 and len(emitted) == len(known)
    # Everything that was run is emitted or waiting.
    left = sum(stream.kept[stream._order[: stream.position]]) + 3 * len(known)
    assert sum(emitted.values()) + len(stream.state_dict()["ids"]) == left


def test_stream_shuffles_by_seed_and_epoch(model, tokenizer, store):
    first, same, other = (next(stream_of(model, tokenizer, store, seed=s)) for s in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)
    stream = stream_of(model, tokenizer, store)
    order = stream._order
    stream.epoch = 1
    assert not np.array_equal(order, stream._epoch_order())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("interrupt", ["between batches", "while refilling"])
def test_stream_resumes_bit_for_bit(model, tokenizer, store, tmp_path, cached, interrupt):
    def cache():
        if not cached:
            return None
        rows = int(store.kept([0, 1], 1).sum())
        return ActivationCache(tmp_path / "acts.bin", rows, 32, len(store), "bfloat16", {"n": 1})

    class Stop(Exception):
        pass

    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop

    stop_at = None
    stream = stream_of(model, tokenizer, store, cache=cache())
    wanted = [next(stream) for _ in range(40)]
    assert stream.epoch > 1
    for at in (0, 1, 7, 23):
        stop_at, calls = None, 0
        stream = stream_of(model, tokenizer, store, cache=cache(), check=check)
        if interrupt == "while refilling":
            stop_at = at + 2
        got = []
        try:
            while len(got) < at or stop_at:
                got.append(next(stream))
        except Stop:
            pass
        state = stream.state_dict()
        assert ("rows" in state) == (not cached and "slots" in state)
        stream = stream_of(model, tokenizer, store, cache=cache())
        stream.load_state_dict(state)
        got += [next(stream) for _ in range(40 - len(got))]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_cached_epochs_do_not_run_the_model(model, tokenizer, store, tmp_path):
    rows = int(store.kept([0, 1], 1).sum())
    make = lambda **key: ActivationCache(tmp_path / "a.bin", rows, 32, len(store), "float32", key)  # noqa: E731
    plain, cached = (
        stream_of(model, tokenizer, store),
        stream_of(model, tokenizer, store, cache=make(layer=1)),
    )
    while cached.epoch < 2:
        assert torch.equal(next(plain), next(cached))
    assert cached.model_batches == -(-len(store) // 4) < plain.model_batches
    cached.cache.flush()
    again = stream_of(model, tokenizer, store, cache=make(layer=1))
    assert next(again).shape == (48, 32) and again.model_batches == 0
    with pytest.raises(FastsaeError, match=r"layer is 1, this run has 2"):
        make(layer=2)
    assert set(os.listdir(tmp_path)) == {"a.bin", "a.bin.json", "a.bin.done.npy"}


def test_full_disk_while_caching_is_one_line(model, tokenizer, store, tmp_path, monkeypatch):
    rows = int(store.kept([0, 1], 1).sum())
    cache = ActivationCache(tmp_path / "a.bin", rows, 32, len(store), "float16", {})
    stream = stream_of(model, tokenizer, store, cache=cache)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FastsaeError, match="disk is full") as error:
        next(stream)
    assert "\n" not in str(error.value) and "a.bin" in str(error.value)


def test_stream_errors(model, tokenizer, store):
    with pytest.raises(FastsaeError, match="at least 2·batch_tokens = 96"):
        next(stream_of(model, tokenizer, store, buffer_tokens=95))
    with pytest.raises(FastsaeError, match="corpus is empty"):
        stream_of(model, tokenizer, TokenStore.build(iter([[0], [0, 1]])))
    with pytest.raises(FastsaeError, match="corpus is empty"):
        ActivationStream(model, tokenizer, [], 1)
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(FastsaeError, match=r"layer 1: NaN .* model batch 1 \(sequences"):
            next(stream_of(model, tokenizer, store))
    finally:
        with torch.no_grad():
            weight.copy_(before)


# --- the model's own samples --------------------------------------------------------------------


def test_greedy_samples_are_what_generate_gives(model, tokenizer):
    prompts = ["w1", "w2 w3 w4", "w5 w6"]
    # Temperature 1e-6 leaves one token: prompts of different lengths must not disturb each other.
    found = sample_batch(
        model, tokenizer, 0, prompts=prompts, length=12, batch_size=8, temperature=1e-6
    )
    wanted = set()
    for prompt in prompts:
        ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_length=12, do_sample=False
        )
        wanted.add(tokenizer.decode(out[0], skip_special_tokens=True))
    assert set(found) <= wanted and len(found) == 8 and len(set(found)) > 1


def test_samples_are_seeded_and_bounded(model, tokenizer):
    options = {"length": 16, "batch_size": 4, "prompts": ["w1", "w2"], "top_p": 0.9}
    found = list(sample_texts(model, tokenizer, 200, seed=5, **options))
    assert found == list(sample_texts(model, tokenizer, 200, seed=5, **options))
    assert found != list(sample_texts(model, tokenizer, 200, seed=6, **options))
    assert len(found) <= 16 and all(t.startswith(("w1", "w2")) for t in found)
    assert max(len(t.split()) for t in found) <= 15
    with pytest.raises(FastsaeError, match="top_p"):
        sample_batch(model, tokenizer, 0, top_p=0.0)


def test_sampling_is_the_nucleus_distribution():
    p = torch.tensor([0.05, 0.4, 0.25, 0.0, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    rows = p.log().expand(20_000, -1)
    full = sample(rows, 1.0, 1.0, generator).bincount(minlength=6) / 20_000
    assert torch.allclose(full, p, atol=0.02) and full[3] == 0
    # The smallest set with at least 0.6 of the mass is {1, 2}.
    nucleus = sample(rows, 1.0, 0.6, generator).bincount(minlength=6) / 20_000
    assert torch.allclose(nucleus, torch.tensor([0, 0.4, 0.25, 0, 0, 0]) / 0.65, atol=0.02)
    sharp = sample(rows, 0.5, 1.0, generator).bincount(minlength=6) / 20_000
    assert torch.allclose(sharp, p.square() / p.square().sum(), atol=0.02)


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_interrupted_sampling_goes_on(model, tokenizer, tmp_path, name):
    options = {"length": 8, "batch_size": 4, "seed": 1}
    whole = write_samples(tmp_path / "whole" / name, model, tokenizer, 150, **options)

    def interrupt(tokens):
        if tokens == 64:
            raise KeyboardInterrupt

    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        write_samples(path, model, tokenizer, 150, report=interrupt, **options)
    assert not path.exists()
    with open(tmp_path / (name + ".partial"), "ab") as file:
        file.write(b"half a batch")
    reported = []
    write_samples(path, model, tokenizer, 150, report=reported.append, **options)
    assert reported == [96, 128, 160] and path.read_bytes() == whole.read_bytes()
    assert list(texts(path)) == list(sample_texts(model, tokenizer, 150, **options))
    assert write_samples(path, model, tokenizer, 150, **options) == path
    with pytest.raises(FastsaeError, match="other settings"):
        write_samples(path, model, tokenizer, 151, **options)
    assert json.loads((tmp_path / (name + ".json")).read_text())["batches"] == 5
