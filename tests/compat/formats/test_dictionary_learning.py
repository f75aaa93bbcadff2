"""dictionary_learning's own classes on the files it loads: codes and reconstructions."""

import warnings

import pytest
import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

from fastsae import SAE

D, F, K = 16, 64, 8
CLASSES = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D, F),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, F),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, F),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [16, 48]),
}


@pytest.fixture
def write(tmp_path, randomise, put):
    def write(kind, threshold=1.5):
        theirs = CLASSES[kind]()
        randomise(theirs)
        if "threshold" in dict(theirs.named_buffers()):
            theirs.threshold.fill_(threshold)
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3}
        trainer |= {"lm_name": "m"} | ({"k": K} if "TopK" in kind else {})
        put(tmp_path / "ae.pt", theirs.state_dict(), config={"trainer": trainer, "buffer": {}})
        return theirs

    return write


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_every_class(tmp_path, write, agrees, kind):
    theirs = write(kind)
    x = torch.randn(150, D)
    agrees(SAE.from_pretrained(tmp_path), x, theirs.encode(x), theirs(x))


@torch.no_grad()
def test_the_librarys_own_loading(tmp_path, write, agrees):
    """AutoEncoder.from_pretrained normalises the decoder unless told not to; both are to be had."""
    write("AutoEncoder")
    x = torch.randn(150, D)
    kind = dictionary.AutoEncoder
    plain = kind.from_pretrained(tmp_path / "ae.pt", normalize_decoder=False)
    agrees(SAE.from_pretrained(tmp_path), x, plain.encode(x), plain(x))
    unit = kind.from_pretrained(tmp_path / "ae.pt")
    ours = SAE.from_pretrained(tmp_path, overrides={"normalize_decoder": True})
    agrees(ours, x, unit.encode(x), unit(x))


@torch.no_grad()
def test_a_threshold_that_was_never_set(tmp_path, write, agrees):
    theirs = write("BatchTopKSAE", threshold=-1.0)
    x = torch.randn(150, D)
    with pytest.warns(UserWarning, match="threshold was never set"):
        ours = SAE.from_pretrained(tmp_path)
    agrees(ours, x, theirs.encode(x), theirs(x))


@torch.no_grad()
def test_positions_zeroed_instead_of_features(tmp_path, write, agrees):
    """Matryoshka with fewer active groups on [batch, position, D]: its library cuts positions off.
    Ours has all groups, and 3-D input is read row by row."""
    theirs = write("MatryoshkaBatchTopKSAE")
    x = torch.randn(2, 30, D)
    rows = theirs.encode(x.flatten(0, 1)).view(2, 30, F)
    torch.testing.assert_close(SAE.from_pretrained(tmp_path).encode(x).to_dense(), rows)
    theirs.active_groups = 1
    cut = theirs.encode(x)
    assert (cut[:, 16:] == 0).all() and (cut[:, :16, 16:] > 0).any()


@torch.no_grad()
def test_batch_topk_counts_documents(tmp_path, write):
    """k·x.size(0) of the whole batch without a threshold: 3-D input keeps k per document, not per
    token. The threshold, which is what we load, does not depend on the batch."""
    theirs = write("BatchTopKSAE")
    x = torch.randn(2, 30, D)
    without = theirs.encode(x, use_threshold=False)
    assert (without > 0).sum() == 2 * K
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = SAE.from_pretrained(tmp_path)
    z = ours.encode(x)
    torch.testing.assert_close(z.to_dense()[0, :5], ours.encode(x[0, :5]).to_dense())
    torch.testing.assert_close(z.to_dense(), theirs.encode(x))
