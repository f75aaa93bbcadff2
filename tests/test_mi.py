"""mi_topk against the dense formulas in float64, and the temperature that logit_std finds."""

import math

import pytest
import torch

from fastsae import FastsaeError, ops
from fastsae.ops import extension, native
from fastsae.ops.backend import interpreting
from fastsae.ops.mi import logit_std

pytestmark = pytest.mark.op("mi_topk")
on_tiles = pytest.mark.skipif(
    extension.problem() is not None or native.isa() != "amx", reason="needs AMX"
)
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


@pytest.mark.parametrize("f", [23, 45])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_types(mi_sample, as_good_as_torch, objective, f, dtype, device, backend):
    s = mi_sample(f, dtype=dtype, device=device)
    check(s, 9, objective, 1.0, backend, as_good_as_torch)


def test_features_and_words_of_different_types(mi_sample, as_good_as_torch, mixed, device, backend):
    s = mi_sample(45, 61, 40, device=device)
    s.features, s.words = s.features.to(mixed[0]), s.words.to(mixed[1])
    check(s, 9, "mi", 1.0, backend, as_good_as_torch)


@pytest.mark.parametrize("kind", ["normal", "massive"])
@pytest.mark.parametrize("f,v,d", [(32, 33, 7), (37, 31, 641), (129, 257, 33), (65, 1000, 1)])
def test_shapes_that_fill_no_tile(mi_sample, as_good_as_torch, kind, f, v, d, device, backend):
    check(mi_sample(f, v, d, kind=kind, device=device), 11, "mi", 2.0, backend, as_good_as_torch)


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


@pytest.mark.parametrize("objective", ["mi", "pmi", "logit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e-30])
@pytest.mark.parametrize("where", ["features", "words"])
def test_values_beyond_the_range_of_tiles(mi_sample, objective, value, where, device, backend):
    """One such row must not change what the others are, nor become anything but the formula's."""
    s = mi_sample(40, 61, 24, device=device)
    getattr(s, where)[3, 2:] = value
    scores, indices = ops.mi_topk(s.features, s.words, 5, objective=objective, backend=backend)
    wanted = ops.mi_topk(s.features, s.words, 5, objective=objective, backend="reference")
    torch.testing.assert_close(scores, wanted[0], rtol=1e-4, atol=1e-6, equal_nan=True)
    certain = ~scores.isnan().any(1)  # which NaN comes first is a tie
    assert torch.equal(indices[certain], wanted[1][certain])


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


# --- AMX tiles -----------------------------------------------------------------------------------


def product(features, words, parts):
    logits = torch.empty(features.shape[0], words.shape[0])
    tiles = torch.ops.fastsae._mi_words(words, parts)
    torch.ops.fastsae._mi_product(features, tiles, words.shape[0], parts, 1.0, [], [logits])
    return logits


def difficult(kind, f, v, d):
    draw = torch.Generator().manual_seed(d)
    features, words = (torch.randn(n, d, generator=draw) for n in (f, v))
    if kind == "massive":  # half of |f|² and of |w|² in eight dimensions
        for rows in (features, words):
            rows[:, :8] *= max(1.0, d / 8) ** 0.5
    elif kind == "apart":  # one huge dimension each, in different places
        features[:, 1] *= 1000
        words[:, 2] *= 1000
    elif kind == "heavy":
        features /= torch.rand(f, d, generator=draw) + 1e-6
        words /= torch.rand(v, d, generator=draw) + 1e-6
    elif kind == "cancelling":  # terms come in pairs that add up to nearly nothing
        features[:, d // 2 : d // 2 * 2] = features[:, : d // 2] * (1 + 1e-4)
        words[:, d // 2 : d // 2 * 2] = -words[:, : d // 2]
    elif kind == "offset":
        features += 30
        words += 10
    return features, words


@on_tiles
@pytest.mark.parametrize("kind", ["normal", "massive", "apart", "heavy", "cancelling", "offset"])
@pytest.mark.parametrize("f,v,d", [(257, 301, 640), (130, 65, 1024), (64, 100, 37), (33, 40, 4609)])
def test_a_split_product_is_as_exact_as_an_fp32_one(kind, f, v, d):
    """Errors in units of |f| |w| against float64; two parts each have 7 times torch's error."""
    features, words = difficult(kind, f, v, d)
    exact = features.double() @ words.double().T
    size = torch.outer(features.double().norm(dim=1), words.double().norm(dim=1))
    ours, torchs = (
        ((logits.double() - exact) / size).abs()
        for logits in (product(features, words, 3), features @ words.T)
    )
    assert ours.max() <= 1.25 * torchs.max()
    assert ours.square().mean().sqrt() <= torchs.square().mean().sqrt()


@on_tiles
def test_bfloat16_needs_one_part():
    features, words = (x.bfloat16() for x in difficult("normal", 70, 45, 100))
    whole = product(features, words, 1)
    exact = features.double() @ words.double().T
    by_torch = (features.float() @ words.float().T).double()
    assert (whole - exact).abs().max() <= 1.5 * (by_torch - exact).abs().max()
    torch.testing.assert_close(product(features, words, 3), whole, rtol=0, atol=1e-4)


@on_tiles
def test_kept_recomputed_and_chunked_logits_give_the_same_bits(mi_sample, monkeypatch):
    s = mi_sample(301, 333, 41)
    whole = ops.mi_topk(s.features, s.words, 9, backend="native")
    for chunk, keep in ((64, 301), (64, 150), (32, 0)):
        words = 333 * 41 * 6
        monkeypatch.setattr(native, "MI_CHUNK_BYTES", chunk * 333 * 4)
        monkeypatch.setattr(native, "MI_BYTES", (2 * chunk + keep) * 333 * 4 + words)
        parts = ops.mi_topk(s.features, s.words, 9, backend="native")
        assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])


@on_tiles
def test_when_tiles_are_used(mi_sample):
    s = mi_sample(40, 61, 24)
    s.features[5] = 0
    assert native._tile_product(s.features, s.words, 1.0)
    for value in (math.nan, math.inf, 2.0**41, 2.0**-41):
        features = s.features.clone()
        features[7] = value
        assert native._tile_product(features, s.words, 1.0) is None
        assert native._tile_product(s.words, features, 1.0) is None
    assert native._tile_product(s.features[:31], s.words, 1.0) is None


@on_tiles
def test_tiles_of_other_words_are_refused():
    tiles = torch.ops.fastsae._mi_words(torch.randn(40, 64), 3)
    logits = torch.empty(8, 70)
    with pytest.raises(RuntimeError, match="not of these words"):
        torch.ops.fastsae._mi_product(torch.randn(8, 64), tiles, 70, 3, 1.0, [], [logits])
    with pytest.raises(RuntimeError, match="one part holds bfloat16 only"):
        torch.ops.fastsae._mi_words(torch.randn(40, 64), 1)


# --- dispatch, memory, errors -------------------------------------------------------------------


def test_reruns_are_bit_equal(mi_sample, threads, device, backend):
    s = mi_sample(301, 523, 24, device=device)
    first = ops.mi_topk(s.features, s.words, 9, backend=backend)
    for _ in range(2):
        again = ops.mi_topk(s.features, s.words, 9, backend=backend)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@on_tiles
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_number_of_threads_changes_no_bit(mi_sample, threads, objective):
    s = mi_sample(301, 1523, 24)
    results = []
    for count in (1, 2, 7):
        threads(count)
        results += [ops.mi_topk(s.features, s.words, 9, objective=objective, backend="native")]
    for scores, indices in results[1:]:
        assert torch.equal(scores, results[0][0]) and torch.equal(indices, results[0][1])


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
    f, v = 24000, 6000  # F·V·4 bytes = 576 MB, of which 200 MiB may be kept on a CPU
    s = mi_sample(f, v, 8, device=device)

    def run():
        return ops.mi_topk(s.features, s.words, 8, backend=backend)

    assert largest_allocation(run, device) < (0.4 if device == "cpu" else 0.6) * f * v * 4


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
