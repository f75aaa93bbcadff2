"""An accelerated SparseCoder against the same one as sparsify has it."""

import copy
import os
import pickle

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # with Triton installed it has no CPU decoder

import pytest
import torch
from sparsify import SparseCoder, SparseCoderConfig

from fastsae import FastsaeError, compat

D, F, K, N = 24, 1024, 8, 16
CASES = {
    "sae": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "multi_topk": {"multi_topk": True},
}
EVERY = pytest.mark.parametrize("case", CASES)


def pair(case="sae", **options):
    theirs = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **CASES[case]))
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return compat.accelerate(copy.deepcopy(theirs), **options), theirs


def dense(values, indices):
    return values.new_zeros(len(values), F).scatter_add(1, indices, values)


@EVERY
def test_encode_and_decode(case, close):
    ours, theirs = pair(case)
    x = torch.randn(N, D)
    found, wanted = ours.encode(x), theirs.encode(x)
    assert type(found) is type(wanted) and found.pre_acts is None
    assert found.top_indices.dtype == torch.int64
    close(dense(*found[:2]), dense(*wanted[:2]))
    close(ours.decode(*found[:2]), theirs.decode(*wanted[:2]))
    asked = compat.accelerate(copy.deepcopy(theirs), pre_acts=True).encode(x)
    close(asked.pre_acts, wanted.pre_acts.detach())


@EVERY
@pytest.mark.parametrize("dead", [0, 3, 100])
def test_forward_and_its_gradients(case, dead, close, same_gradients):
    ours, theirs = pair(case)
    x, y = torch.randn(N, D), torch.randn(N, D)
    mask = torch.zeros(F, dtype=torch.bool)
    mask[:dead] = True
    for given in ({}, {"y": y}, {"total_variance": torch.tensor(7.0)}):
        outs = []
        for coder in (ours, theirs):
            coder.zero_grad()
            out = coder(x, dead_mask=mask, **given)
            (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            outs.append(out)
        found, wanted = outs
        assert type(found) is type(wanted) and (float(found.auxk_loss) > 0) == (dead > 0)
        for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
            close(getattr(found, name), getattr(wanted, name), name)
        assert found.latent_acts.shape == wanted.latent_acts.shape
        close(dense(*found[1:3]), dense(*wanted[1:3]))
        same_gradients(ours, theirs)


def test_training_steps_agree(close):
    losses, coders = [], pair()
    torch.manual_seed(5)
    xs = torch.randn(30, N, D)
    for coder in coders:
        adam = torch.optim.Adam(coder.parameters(), lr=1e-3)
        kept = []
        for x in xs:
            coder.set_decoder_norm_to_unit_norm()
            loss = coder(x).fvu
            loss.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            adam.step()
            adam.zero_grad()
            kept.append(loss.detach())
        losses.append(torch.stack(kept))
    close(*losses, tolerance=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("gradients", ["sparsify", "exact"])
def test_which_side_is_right_about_the_gradient_of_auxk(gradients, close):
    """AuxK's loss depends on the encoder; sparsify's gradient of it is exactly 0, ours if asked."""
    ours, theirs = pair(gradients=gradients)
    x = torch.randn(N, D)
    mask = torch.zeros(F, dtype=torch.bool)
    mask[:200] = True
    for coder in (ours, theirs):
        coder(x, dead_mask=mask).auxk_loss.backward()
    assert float(theirs.encoder.weight.grad.abs().max()) == 0
    if gradients == "sparsify":
        assert ours.encoder.weight.grad is None or not ours.encoder.weight.grad.any()
        return
    entry = int(ours.encoder.weight.grad.abs().sum(1).argmax()), 0
    exact = copy.deepcopy(theirs).double()
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(exact)
        moved.encoder.weight.data[entry] += sign * step
        with torch.no_grad():
            residual = (x.double() - exact(x.double()).sae_out).detach()
            h = torch.relu(moved.encoder(x.double() - moved.b_dec))[:, :200]
            top = h.topk(D // 2)
            codes = torch.zeros_like(h).scatter(1, top.indices, top.values)
            total = (x.double() - x.double().mean(0)).square().sum()
            values.append((codes @ moved.W_dec[:200] - residual).square().sum() / total)
    slope = (values[0] - values[1]) / (2 * step)
    close(ours.encoder.weight.grad[entry], slope.float(), tolerance=1e-3)


def test_rows_with_fewer_than_k_active_latents(close):
    """Padding is 0 at latents that the row does not use, and gets no gradient."""
    ours, theirs = pair()
    for coder in (ours, theirs):
        coder.encoder.bias.data -= 2.4
    x = torch.randn(N, D)
    found, wanted = ours.encode(x), theirs.encode(x)
    counts = (found.top_acts != 0).sum(1)
    assert 0 < int(counts.sum()) and int(counts.min()) < K
    assert all(len(set(row.tolist())) == K for row in found.top_indices)
    close(dense(*found[:2]), dense(*wanted[:2]))
    close(ours.decode(*found[:2]), theirs.decode(*wanted[:2]))


def test_three_dimensions_and_double_are_theirs():
    ours, theirs = pair()
    x = torch.randn(2, 3, D)
    assert torch.equal(ours.encode(x).top_acts, theirs.encode(x).top_acts)
    ours.double()
    theirs.double()
    mask = torch.ones(F, dtype=torch.bool)
    found, wanted = (c(torch.ones(2, D).double(), dead_mask=mask) for c in (ours, theirs))
    assert torch.equal(found.auxk_loss, wanted.auxk_loss)


@EVERY
def test_copies_pickles_saves_and_restore(case, tmp_path, close):
    ours, theirs = pair(case, pre_acts=True)
    x = torch.randn(N, D)
    wanted = theirs(x).sae_out
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert compat.is_accelerated(other) and other.encode(x).pre_acts is not None
        close(other(x).sae_out, wanted)
    ours.save_to_disk(tmp_path)
    assert torch.equal(SparseCoder.load_from_disk(tmp_path)(x).sae_out, wanted)
    compat.restore(ours)
    assert type(ours) is SparseCoder and torch.equal(ours(x).sae_out, wanted)
    assert vars(ours).keys() == vars(theirs).keys()


def test_refuses_by_name():
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, activation="groupmax"))
    with pytest.raises(FastsaeError, match="groupmax"):
        compat.accelerate(coder)
    _, theirs = pair()
    with pytest.raises(FastsaeError, match="accepted are 'sparsify', 'exact'"):
        compat.accelerate(theirs, gradients="true")
    with pytest.raises(FastsaeError, match="speed"):
        compat.accelerate(theirs, speed=1)
