"""Accelerated dictionaries against the same ones as dictionary_learning has them."""

import copy
import pickle

import pytest
import torch
from dictionary_learning import dictionary as dl
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

from fastsae import FastsaeError, compat

D, F, K = 24, 2048, 8
CASES = {
    "AutoEncoder": lambda: dl.AutoEncoder(D, F),
    "AutoEncoderNew": lambda: dl.AutoEncoderNew(D, F),
    "Gated": lambda: dl.GatedAutoEncoder(D, F),
    "JumpRelu": lambda: dl.JumpReluAutoEncoder(D, F),
    "TopK": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopK": lambda: BatchTopKSAE(D, F, K),
    "Matryoshka": lambda: MatryoshkaBatchTopKSAE(D, F, K, [F // 4, 3 * F // 4]),
}
EVERY = pytest.mark.parametrize("case", CASES)
BIASES = ("encoder.bias", "b_enc", "gate_bias", "mag_bias")


def pair(case):
    theirs = CASES[case]()
    for name, parameter in theirs.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
        parameter.data -= 2.2 if name in BIASES else 0
    if case in ("BatchTopK", "Matryoshka"):
        theirs.threshold.fill_(0.3)
    return compat.accelerate(copy.deepcopy(theirs)), theirs


@EVERY
def test_values_and_gradients(case, close, same_gradients):
    ours, theirs = pair(case)
    x = torch.randn(20, D)
    outs = []
    for dictionary in (ours, theirs):
        given = x.clone().requires_grad_()
        f = dictionary.encode(given)
        out = dictionary.decode(f)
        (out.square().sum() + f.sum()).backward()
        outs.append((f, out, given.grad))
    for found, wanted in zip(*outs, strict=True):
        close(found, wanted)
    same_gradients(ours, theirs)
    assert 0 < float((outs[0][0] != 0).float().mean()) < 1 / 16


@EVERY
@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (0, D)])
def test_forward(case, shape, close):
    ours, theirs = pair(case)
    x = torch.randn(*shape)
    with torch.no_grad():
        close(ours(x), theirs(x))
        for found, wanted in zip(
            ours(x, output_features=True), theirs(x, output_features=True), strict=True
        ):
            close(found, wanted)


def test_an_untrained_threshold_is_a_plain_relu(close):
    ours, theirs = pair("BatchTopK")
    x = torch.randn(9, D)
    for dictionary in (ours, theirs):
        dictionary.threshold.fill_(-1.0)
    close(ours.encode(x), theirs.encode(x))


def test_what_asks_for_more_than_the_code_is_theirs(close):
    x = torch.randn(9, D)
    for case, options in (
        ("TopK", {"return_topk": True}),
        ("TopK", {"use_threshold": True}),
        ("BatchTopK", {"use_threshold": False}),
        ("BatchTopK", {"return_active": True}),
        ("Gated", {"return_gate": True}),
        ("Gated", {"normalize_decoder": True}),
        ("JumpRelu", {"output_pre_jump": True}),
    ):
        found, wanted = (d.encode(x, **options) for d in pair(case))
        if not isinstance(wanted, tuple):
            found, wanted = (found,), (wanted,)
        for got, want in zip(found, wanted, strict=True):
            close(got, want) if got.is_floating_point() else torch.equal(got, want)
    ours, theirs = pair("AutoEncoder")
    mask = torch.ones(F)
    for got, want in zip(ours(x, ghost_mask=mask), theirs(x, ghost_mask=mask), strict=True):
        close(got, want)


def test_fewer_active_groups(close):
    ours, theirs = pair("Matryoshka")
    for dictionary in (ours, theirs):
        dictionary.active_groups = 1
    x = torch.randn(9, D)
    close(ours(x), theirs(x))
    assert not ours.encode(x)[:, F // 4 :].any()


@EVERY
def test_copies_pickles_and_restore(case, close):
    ours, theirs = pair(case)
    kind, x = type(theirs), torch.randn(9, D)
    wanted = theirs(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert compat.is_accelerated(other)
        close(other(x), wanted)
    theirs.load_state_dict(ours.state_dict())
    compat.restore(ours)
    assert type(ours) is kind and torch.equal(ours(x), wanted)


@EVERY
def test_scaled_biases_count_at_once(case, close):
    ours, theirs = pair(case)
    if case == "AutoEncoderNew":  # has no scale_biases
        for d in (ours, theirs):
            d.encoder.bias.data *= 0.9
    else:
        for d in (ours, theirs):
            d.scale_biases(0.9)
    x = torch.randn(9, D)
    close(ours(x), theirs(x))


def test_refuses_by_name():
    with pytest.raises(FastsaeError, match="IdentityDict"):
        compat.accelerate(dl.IdentityDict(D))
