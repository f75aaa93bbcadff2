"""mi_topk against the dense formulas in float64, and the temperature that logit_std finds."""

import math

import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops.backend import interpreting
from fastsae.ops.mi import logit_std

pytestmark = pytest.mark.op("mi_topk")
OBJECTIVES = ["mi", "pmi", "paper", "logit"]


def dense(s, objective, temperature, dtype=torch.float64):
    """score(f, v) as MATH.md §3 writes it, [F, V]."""
    raw = s.features.to(dtype) @ s.words.to(dtype).T
    if objective == "logit":
        return raw
    p_word = (raw / temperature).softmax(1)
    log_p_feature = (raw / temperature).log_softmax(0)
    if objective == "pmi":
        return log_p_feature
    log_f = math.log(max(1, raw.shape[0])) if objective == "mi" else 0.0
    return p_word * (log_p_feature + log_f)


def check(s, top, objective, temperature, backend, close):
    scores, indices = ops.mi_topk(
        s.features, s.words, top, objective=objective, temperature=temperature, backend=backend
    )
    f = s.features.shape[0]
    assert scores.shape == indices.shape == (f, top)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int32
    assert all(len(set(row)) == top for row in indices.tolist())
    assert (scores.diff(dim=1) <= 0).all(), "not descending"
    exact, by_torch = (dense(s, objective, temperature, d) for d in (torch.float64, torch.float32))
    column = indices.long()
    close(scores, exact.gather(1, column), by_torch.gather(1, column), "scores")
    # Nothing omitted beats anything kept by more than twice torch's own error (and rounding).
    slack = 2 * float((by_torch.double() - exact).abs().max()) if f else 0.0
    slack += 8 * torch.finfo(torch.float32).eps * float(exact.abs().max()) if f else 0.0
    omitted = exact.scatter(1, column, -math.inf)
    kept = exact.gather(1, column)
    assert (omitted.max(1).values <= kept.min(1).values + slack).all() if f else True
    return scores, indices


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "f,v,d,top", [(23, 61, 32, 7), (1, 61, 32, 5), (0, 5, 8, 2), (17, 5, 3, 5)]
)
def test_objectives_and_shapes(
    mi_sample, as_good_as_torch, objective, f, v, d, top, device, backend
):
    check(mi_sample(f, v, d, device=device), top, objective, 1.5, backend, as_good_as_torch)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_types(mi_sample, as_good_as_torch, objective, dtype, device, backend):
    s = mi_sample(dtype=dtype, device=device)
    check(s, 9, objective, 1.0, backend, as_good_as_torch)


@pytest.mark.parametrize("objective", ["mi", "pmi"])
def test_across_tiles(mi_sample, as_good_as_torch, objective, device, backend):
    check(mi_sample(301, 523, 24, device=device), 20, objective, 4.0, backend, as_good_as_torch)


@pytest.mark.parametrize("objective", ["mi", "pmi"])
def test_massive_dimensions_and_saturated_softmax(
    mi_sample, as_good_as_torch, objective, device, backend
):
    """Logits of size 1000 at T = 1: probabilities underflow, log p(f|v) must not."""
    s = mi_sample(23, 61, 40, kind="massive", device=device)
    s.features *= 40
    scores, _ = check(s, 9, objective, 1.0, backend, as_good_as_torch)
    assert torch.isfinite(scores).all()


def test_mi_is_the_mutual_information(mi_sample, device, backend):
    """Σ score / F over all pairs is Σ_f p(f) Σ_v p(v|f) log(p(f|v) / p(f)) with p(f) = 1/F."""
    s = mi_sample(device=device)
    scores, _ = ops.mi_topk(s.features, s.words, 61, objective="mi", backend=backend)
    logits = (s.features @ s.words.T).double()
    joint = logits.softmax(1) / 23
    expected = (joint * (logits.log_softmax(0) + math.log(23))).sum()
    torch.testing.assert_close(scores.double().sum() / 23, expected, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_index(device, backend):
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], device=device)
    words = torch.tensor([[2.0, 0.0], [1.0, 1.0], [2.0, 0.0], [1.0, 1.0]], device=device)
    for objective in OBJECTIVES:
        _, indices = ops.mi_topk(features, words, 4, objective=objective, backend=backend)
        twins = indices.tolist()
        assert all(row.index(0) < row.index(2) and row.index(1) < row.index(3) for row in twins)
    assert ops.mi_topk(features, words, 3, objective="logit", backend=backend)[1][2].tolist() == [
        0,
        1,
        2,
    ]


def test_a_nan_feature_stays_in_its_row_for_logits(mi_sample, device, backend):
    s = mi_sample(device=device)
    clean = ops.mi_topk(s.features, s.words, 5, objective="logit", backend=backend)
    s.features[3, 2] = float("nan")
    scores, indices = ops.mi_topk(s.features, s.words, 5, objective="logit", backend=backend)
    assert scores[3].isnan().all() and indices[3].tolist() == [0, 1, 2, 3, 4]
    rest = [i for i in range(23) if i != 3]
    assert torch.equal(scores[rest], clean[0][rest]) and torch.equal(indices[rest], clean[1][rest])


def test_every_memory_layout(mi_sample, relayout, layout, device, backend):
    s = mi_sample(device=device)
    s.features, s.words = relayout(s.features, layout), relayout(s.words, layout)
    plain = ops.mi_topk(s.features.clone(), s.words.clone(), 7, backend=backend)
    got = ops.mi_topk(s.features, s.words, 7, backend=backend)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


def test_process_wide_modes(mi_sample, process_mode, mode, device, backend):
    s = mi_sample(device=device)
    plain = ops.mi_topk(s.features, s.words, 7, temperature="auto", backend=backend)
    with process_mode(mode, device):
        got = ops.mi_topk(s.features, s.words, 7, temperature="auto", backend=backend)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


# --- temperature --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "massive"])
def test_the_automatic_temperature_is_the_std_of_all_logits(mi_sample, kind, device):
    s = mi_sample(kind=kind, device=device)
    s.features += 100  # a common offset: the sums of squares cancel
    exact = (s.features.double() @ s.words.double().T).std(correction=0)
    assert logit_std(s.features, s.words) == pytest.approx(float(exact), rel=1e-9)
    auto = ops.mi_topk(s.features, s.words, 5, temperature="auto")
    given = ops.mi_topk(s.features, s.words, 5, temperature=float(exact))
    assert torch.equal(auto[1], given[1])


def test_the_automatic_temperature_goes_by_tiles(mi_sample, monkeypatch):
    from fastsae.ops import mi

    s = mi_sample()
    whole = logit_std(s.features, s.words)
    monkeypatch.setattr(mi, "TILE_BYTES", 4096)
    assert logit_std(s.features, s.words) == pytest.approx(whole, rel=1e-12)


def test_a_temperature_that_does_not_exist_is_an_error(mi_sample):
    s = mi_sample()
    for features in (torch.zeros_like(s.features), s.features * float("nan"), s.features[:0]):
        with pytest.raises(FastsaeError, match='temperature="auto"'):
            ops.mi_topk(features, s.words, 5, temperature="auto")


# --- dispatch, memory, errors -------------------------------------------------------------------


def test_reruns_are_bit_equal(mi_sample, threads, device, backend):
    s = mi_sample(301, 523, 24, device=device)
    first = ops.mi_topk(s.features, s.words, 9, backend=backend)
    again = ops.mi_topk(s.features, s.words, 9, backend=backend)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_no_gradient(mi_sample, device, backend):
    s = mi_sample(device=device)
    scores, _ = ops.mi_topk(s.features.requires_grad_(), s.words, 5, backend=backend)
    with pytest.raises(RuntimeError, match="does not require grad"):
        scores.sum().backward()


def test_opcheck(mi_sample, device, backend):
    s = mi_sample(5, 9, 8, device=device)
    op = torch.ops.fastsae.mi_topk.default
    torch.library.opcheck(op, (s.features, s.words, 3, "mi", 2.0, backend))


def test_nothing_of_size_f_v(mi_sample, largest_allocation, device, backend):
    if interpreting():
        pytest.skip("too slow in Triton's interpreter")
    f, v = 6000 if device == "cpu" else 24000, 6000  # F·V·4 bytes = 144 MB
    s = mi_sample(f, v, 8, device=device)

    def run():
        return ops.mi_topk(s.features, s.words, 8, backend=backend)

    assert largest_allocation(run, device) < 0.6 * f * v * 4


def test_errors_name_the_argument_and_the_fix(mi_sample):
    s = mi_sample()
    good = {"features": s.features, "words": s.words, "top": 5}
    for change, words in (
        ({"top": 62}, ["top: got 62", "the number of words = 61"]),
        ({"top": 0}, ["top: got 0"]),
        ({"words": s.words[:, :5]}, ["words: got shape [61, 5], expected [rows, 32]"]),
        ({"features": s.features[0]}, ["features: got shape [32]", "2-D"]),
        ({"objective": "pmi2"}, ["objective: got 'pmi2'", "mi, pmi, paper, logit"]),
        ({"temperature": 0}, ["temperature: got 0", 'positive number or "auto"']),
        ({"temperature": -1.0}, ["temperature: got -1.0"]),
        ({"temperature": float("nan")}, ["temperature: got nan"]),
        ({"temperature": "hot"}, ["temperature: got 'hot'"]),
        ({"temperature": None}, ["temperature: got None"]),
        ({"words": s.words.to("meta")}, ["words on meta", ".to(device)"]),
    ):
        with pytest.raises(FastsaeError) as error:
            ops.mi_topk(**good | change)
        assert all(word in str(error.value) for word in words), error.value
