"""Screens: lists that overflow, the certificate, and copies of weights that must never be stale."""

import math
import os

import pytest
import torch

import fastsae
from fastsae import FastsaeError, ops
from fastsae.formats.describe import describe
from fastsae.ops import extension, screens

if extension.problem() is None:
    from fastsae.ops import native


@pytest.mark.parametrize("rows", [3, 70])
def test_more_candidates_than_a_list_holds(isa, rows, monkeypatch, same):
    """No screen can tell 6000 nearly equal features apart: every value of the row is computed."""
    monkeypatch.setattr(native, "CANDIDATES", 64)
    W = torch.randn(1, 50).repeat(6000, 1) * (1 + 1e-6 * torch.randn(6000, 1))
    x = torch.randn(rows, 50)
    bias = torch.full((6000,), 30.0)
    values, indices = native.encode_topk(x, W, bias, 7)
    monkeypatch.setattr(native, "TILE_ROWS", 99)
    monkeypatch.setattr(native, "BYTE_ROWS", 99)
    same(native.encode_topk(x, W, bias, 7), (values, indices))
    offsets = native.encode_threshold(x, W, bias, torch.zeros(6000))[2]
    assert offsets.diff().tolist() == [6000] * rows
    monkeypatch.setattr(native, "TILE_ROWS", 0)
    monkeypatch.setattr(native, "BYTE_ROWS", 0)
    W, near = W * 1e-4, torch.full((6000,), 1.0)  # nor can fp32 products beside 1e4
    native.encode_topk(x, W, near, 7)
    assert native.encode_stages()["full"] > 0, "the test meant to overflow"


# --- the certificate ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "massive"])
def test_the_screen_stays_within_its_bound(encode_sample, kind, instruction_sets):
    """|h − ĥ| ≤ ε for what "fast" returns, with the ε of csrc/screen.h; and ε is not absurd."""
    s = encode_sample(n=64, d=640, f=4500, kind=kind)
    values, indices = native.encode_topk(s.x, s.W_enc, s.b_enc, 40, s.b_dec, "fast")
    d = s.x - s.b_dec
    d = d - d.mean(0)
    about, W = d.double(), s.W_enc.double()
    lost = (about - d.bfloat16().double()).norm(dim=1, keepdim=True)
    bound = lost * W.norm(dim=1) + about.norm(dim=1, keepdim=True) * (
        1.004 * (W - s.W_enc.bfloat16().double()).norm(dim=1) + 650 * 2.0**-24 * W.norm(dim=1)
    )
    h = (s.x.double() - s.b_dec.double()) @ W.T + s.b_enc.double()
    column, active = indices.long(), values > 0
    error = (values - h.gather(1, column)).abs()[active]
    ratio = error / (bound.gather(1, column)[active] + 1e-5)
    assert float(ratio.max()) <= 1
    assert float(ratio.max()) > 0.02 or "amx" not in instruction_sets


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, d, f", [(30, 640, 4500), (17, 83, 2011), (64, 129, 300)])
def test_fp32_products_stay_within_their_bound(isa, n, d, f, weights):
    """What screens many rows without AMX: (128 + D / 128 + 2) 2^-24 |x| |w|, csrc/product.h."""
    if isa == "amx":
        native.set_isa("avx512")
    x, W = torch.randn(n, d) * 10, torch.randn(f, d).to(weights)
    W[7] *= 1e-3
    values, indices = native.encode_topk(x, W, torch.zeros(f), 40, precision="fast")
    column, wide = indices.long(), W.double()
    h = (x.double() @ wide.T).gather(1, column)
    norms = x.double().norm(dim=1, keepdim=True) * wide.norm(dim=1)[column]
    error = ((values - h).abs() / norms).max()
    assert 1e-9 < float(error) <= (128 + d / 128 + 2) * 2.0**-24


@pytest.fixture
def copies(monkeypatch):
    """Copies are made of small weights too; gone after the test."""
    monkeypatch.setattr(screens, "SMALLEST", 0)
    screens.clear()
    yield screens
    screens.clear()


@pytest.mark.parametrize("kind", ["normal", "massive"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 40])
def test_copies_give_the_same_bits(encode_sample, copies, isa, n, weights, kind, same):
    s = encode_sample(n=n, d=83, f=2011, kind=kind)
    W = s.W_enc.to(weights)

    def run():
        return [
            *native.encode_topk(s.x, W, s.b_enc, 17, s.b_dec),
            *native.encode_topk(s.x, W, s.b_enc, 17),
            *native.encode_threshold(s.x, W, s.b_enc, s.threshold, s.b_dec),
        ]

    wanted = run()
    copies.clear()
    for _ in range(3):
        same(run(), wanted)
    tiles = isa == "amx" and weights == torch.float32 and n > native.TILE_ROWS
    made = "bf16" if tiles else "int8" if n <= native.BYTE_ROWS else None
    assert copies.total_bytes() == (copies.size(W, made) + 4 * 83 if made else 0)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("d,f", [(300, 1892), (1056, 300)])
def test_depth_in_parts_gives_the_same_bits(encode_sample, copies, isa, n, d, f, monkeypatch, same):
    """Tiles multiply 256 columns at a time where panels are wide; bytes have a scale per 128."""
    s = encode_sample(n=n, d=d, f=f, kind="massive")

    def run():
        topk = native.encode_topk(s.x, s.W_enc, s.b_enc, 17, s.b_dec)
        return [*topk, *native.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, s.b_dec)]

    got = [run() for _ in range(3)]
    monkeypatch.setattr(native, "TILE_ROWS", 99)
    monkeypatch.setattr(native, "BYTE_ROWS", 99)
    monkeypatch.setattr(native, "DENSE_SHARE", f)
    for one in got:
        same(one, run())


def test_rows_shared_out_between_threads_give_the_same_bits(encode_sample, copies, threads, same):
    """Many rows and a copy: every thread meets all features with rows of its own."""
    s = encode_sample(n=150, d=7001, f=700)
    threads(2)
    wanted = native.encode_topk(s.x[:1], s.W_enc, s.b_enc, 17, s.b_dec)
    runs = []
    for count in (1, 2, 2, 7):  # 7 threads have too few rows each, and share the features instead
        threads(count)
        topk = native.encode_topk(s.x, s.W_enc, s.b_enc, 17, s.b_dec)
        runs.append([*topk, *native.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, s.b_dec)])
        same([part[:1] for part in topk], wanted)
        same(runs[-1], runs[0])


@pytest.mark.parametrize("n", [2, 40])
def test_copies_follow_their_weights(encode_sample, copies, isa, n, same):
    s = encode_sample(n=n, d=83, f=2011)
    W = s.W_enc.clone()

    def check(W):
        fresh = native.encode_topk(s.x, W.clone(), s.b_enc, 17, s.b_dec)
        for _ in range(3):
            same(native.encode_topk(s.x, W, s.b_enc, 17, s.b_dec), fresh)

    check(W)
    W[5] = s.x[0] * 9  # the version counter sees it
    check(W)
    W.data[1000] = s.x[0] * 9  # only the digest does
    check(W)
    W.untyped_storage().copy_(s.W_enc.flip(0).contiguous().untyped_storage())
    check(W)
    replacement = -W
    W.data = replacement
    check(W)
    assert copies.total_bytes() > 0 or (n > 16 and isa != "amx")
    del W, replacement
    native.encode_topk(s.x, s.W_enc, s.b_enc, 17, s.b_dec)  # the next look clears what is gone
    assert copies.total_bytes() == 0


@pytest.mark.parametrize("op", ["topk", "threshold"])
@pytest.mark.parametrize("n", [2, 40])
def test_the_certificate_knows_a_stale_copy(encode_sample, copies, isa, n, op, same):
    """Weights changed behind every counter: exact values outside their bounds give it away."""
    s = encode_sample(n=n, d=83, f=2011)
    s.x[1] = math.nan  # a row that no screen serves
    W = s.W_enc.clone()

    def run(W):
        if op == "topk":
            return native.encode_topk(s.x, W, s.b_enc, 17, s.b_dec)
        return native.encode_threshold(s.x, W, s.b_enc, s.threshold, s.b_dec)

    for _ in range(2):
        run(W)
    W.data.mul_(1.5)
    digest = torch.ops.fastsae._encode_digest(W)
    for weights in screens._seen.values():
        weights.digest = digest  # as if the digest had been blind
    fresh = run(W.clone())
    same(run(W), fresh)


def test_the_digest_sees_the_end_of_every_row(dtype):
    for d in (83, 3, 1, 16, 33):
        W = torch.randn(3000, d, dtype=dtype)
        before = torch.ops.fastsae._encode_digest(W)
        assert torch.ops.fastsae._encode_digest(W.clone()) == before
        W[:, d - 1] += 1
        assert torch.ops.fastsae._encode_digest(W) != before


def test_no_copy_by_calls_that_record_gradients(encode_sample, copies):
    s = encode_sample(n=2, d=83, f=2011)
    W = s.W_enc.clone().requires_grad_()
    for _ in range(3):
        ops.encode_topk(s.x, W, s.b_enc, 17, b_dec=s.b_dec, backend="native")
        ops.encode_threshold(s.x, W, s.b_enc, s.threshold, backend="native")
    assert copies.total_bytes() == 0
    with torch.no_grad():
        for _ in range(2):
            ops.encode_topk(s.x, W, s.b_enc, 17, b_dec=s.b_dec, backend="native")
    assert copies.total_bytes() > 0


@pytest.mark.parametrize("n", [1, 40])
def test_a_copy_about_an_outlier_is_made_anew(encode_sample, copies, n):
    s = encode_sample(n=n, d=83, f=2011)
    first = s.x * 1e7
    for _ in range(2):
        native.encode_topk(first, s.W_enc, s.b_enc, 17)
    for _ in range(2 + screens._STRIKES):
        native.encode_topk(s.x, s.W_enc, s.b_enc, 17)
    assert native.encode_stages()["full"] == 0


def test_a_copy_about_one_row_is_made_anew_about_many(encode_sample, copies):
    """Generation meets a row at a time, and one row is no centre for the others."""
    s = encode_sample(n=screens.SETTLED + 4, d=83, f=2011)
    rows = s.x.split(1)
    for row in (rows[0], *rows[: screens.SETTLED - 1]):  # the first call makes no copy
        native.encode_topk(row, s.W_enc, s.b_enc, 17, s.b_dec)
    (weights,) = screens._seen.values()
    assert torch.equal(weights.centre, rows[0][0] - s.b_dec)
    native.encode_topk(rows[screens.SETTLED - 1], s.W_enc, s.b_enc, 17, s.b_dec)
    mean = (s.x[: screens.SETTLED] - s.b_dec).mean(0)
    torch.testing.assert_close(weights.centre, mean, rtol=1e-4, atol=1e-5)
    first = weights.copies["int8"]
    native.encode_topk(s.x[-4:], s.W_enc, s.b_enc, 17, s.b_dec)
    assert weights.copies["int8"] is first and not weights.rows


def test_one_long_row_does_not_spoil_the_centre():
    x = torch.randn(65, 40) + 3
    x[7] *= 1e5
    x[9] = math.inf
    centre = torch.ops.fastsae._encode_centre(x, torch.ones(40))
    assert (centre - 2).abs().max() < 1
    assert not torch.ops.fastsae._encode_centre(x[9:10], None).any()


def test_the_least_used_weights_are_forgotten_first(encode_sample, copies, monkeypatch):
    monkeypatch.setattr(screens, "REMEMBERED", 3)
    s = encode_sample(n=2, d=83, f=2011)
    several = [s.W_enc.clone() for _ in range(5)]
    for W in several[:2]:
        for _ in range(2):
            native.encode_topk(s.x, W, s.b_enc, 17)
    kept = copies.total_bytes()
    for W in several[2:]:
        native.encode_topk(s.x, W, s.b_enc, 17)
    assert copies.total_bytes() == kept > 0


def test_a_forked_child_starts_without_copies(encode_sample, copies):
    s = encode_sample(n=2, d=83, f=2011)
    for _ in range(2):
        native.encode_topk(s.x, s.W_enc, s.b_enc, 17)
    assert copies.total_bytes() > 0
    with screens._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if copies.total_bytes() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_copies_can_be_turned_off(encode_sample, copies, monkeypatch):
    s = encode_sample(n=2, d=83, f=2011)
    monkeypatch.setenv("FASTSAE_SCREENS", "0")
    for _ in range(3):
        native.encode_topk(s.x, s.W_enc, s.b_enc, 17)
    assert copies.total_bytes() == 0
    monkeypatch.setenv("FASTSAE_SCREENS", "yes")
    with pytest.raises(FastsaeError, match="FASTSAE_SCREENS: got 'yes', expected 0 or 1"):
        native.encode_topk(s.x, s.W_enc, s.b_enc, 17)


@pytest.mark.parametrize("edit", ["in_place", "data", "element", "storage"])
def test_any_edit_of_small_weights_is_seen(sae, edit, same):
    s, W = sae, sae.W_enc.clone()
    native.encode_topk(s.x, W, s.b_enc, 17, s.b_dec)
    if edit == "in_place":
        W.mul_(-1)
    elif edit == "data":
        W.data[1000] = s.x[0] * 9
    elif edit == "element":
        W.numpy()[1003, 4] = 1e4
    else:
        replacement = s.W_enc.flip(0).contiguous()
        W.untyped_storage().copy_(replacement.untyped_storage())
    fresh = native.encode_topk(s.x, W.clone(), s.b_enc, 17, s.b_dec)
    same(native.encode_topk(s.x, W, s.b_enc, 17, s.b_dec), fresh)


def test_inspect_counts_the_copies_that_encoding_makes(copies, tmp_path, instruction_sets):
    sae = fastsae.SAE(fastsae.SAEConfig(d_in=70, d_sae=500, k=9)).eval()
    sae.save_pretrained(tmp_path)
    counted = describe(tmp_path)["screen_copies_on_a_cpu"]
    centres = 4 * 70
    with torch.no_grad():
        for _ in range(2):
            sae.encode(torch.randn(2, 70))
        assert copies.total_bytes() == counted["int8"] + centres
        for _ in range(2):
            sae.encode(torch.randn(40, 70))
        sae.encode(torch.randn(2, 70))  # the many rows made a better centre, for both copies
    tiled = (counted["bf16"] + centres) * ("amx" in instruction_sets)
    assert copies.total_bytes() == counted["int8"] + centres + tiled
    copies.SMALLEST = 1 << 40
    assert describe(tmp_path)["screen_copies_on_a_cpu"]["int8"] == 0
