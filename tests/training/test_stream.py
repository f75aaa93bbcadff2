"""Activations: bounded, seeded, and continued bit for bit."""

import errno
import os
from collections import Counter

import numpy as np
import pytest
import torch

from fastsae.data import ActivationStream, TokenStore, layer_activations, tokenize
from fastsae.errors import FastsaeError
from fastsae.training.cache import ActivationCache

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(32, 48, layers=3, heads=4)


@pytest.fixture
def store(tokenizer, documents):
    return TokenStore.build(tokenize(documents(), tokenizer, 16))


def stream_of(model, tokenizer, store, **options):
    settings = {"batch_tokens": 48, "batch_size": 4, "buffer_tokens": 160, "seed": 3} | options
    return ActivationStream(model, tokenizer, store, 1, **settings)


# --- the model up to one layer -------------------------------------------------------------------


def test_layer_activations_stop_after_the_layer(model):
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
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


# --- the stream ----------------------------------------------------------------------------------


def test_stream_yields_the_right_rows_once_per_epoch(model, tokenizer, documents):
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

    def make(**key):
        return ActivationCache(tmp_path / "a.bin", rows, 32, len(store), "float32", key)

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
