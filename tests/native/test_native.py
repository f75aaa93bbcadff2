"""What only the C++ kernels can get wrong: instruction sets, threads, screens, fallbacks, borders.

Values against the oracle are the business of tests/test_<op>.py, for every backend alike.
"""

import math

import pytest
import torch

from fastsae.ops import extension, reference

if extension.problem() is None:
    from fastsae.ops import native


def every_op(sae):
    """Outputs of all ops on one problem, flattened into one list."""
    s = sae
    out = [*native.topk(s.W_enc.view(83, 2011), 17)]
    values, indices = native.encode_topk(s.x, s.W_enc, s.b_enc, 17, s.b_dec)
    out += [values, indices]
    out += native.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, s.b_dec)
    out += [native.decode(values, indices, s.W_enc, s.b_dec)]
    out += [native.gather_dot(s.x, s.W_enc, indices)]
    out += native.sparse_outer(values, indices, s.x, s.W_enc.shape[0])
    # The leaf ops of mi_topk: the sums inside torch.mm may depend on the number of threads.
    logits, maximum, total = s.W_enc.view(83, 2011), torch.zeros(2011), torch.zeros(2011)
    torch.ops.fastsae._mi_columns(logits, 1.5, maximum, total)
    out += [maximum, total]
    out += torch.ops.fastsae._mi_topk(logits, maximum + total.log(), 1.5, 0, math.log(83), 11)
    return out


# --- instruction sets ---------------------------------------------------------------------------


def test_instruction_sets_are_reported_and_refused(instruction_sets):
    assert native.isa() == native.cpu_features()["isa"] == instruction_sets[-1]
    with pytest.raises(ValueError, match="isa: got 'sse9'"):
        native.set_isa("sse9")
    assert native.isa() == instruction_sets[-1]


def test_vector_instruction_sets_agree_bit_for_bit(sae, same, instruction_sets):
    """All have the same lanes and the same fused products. Scalar code has no fused product."""
    results = []
    for name in instruction_sets[1:]:
        native.set_isa(name)
        results.append(every_op(sae))
    native.set_isa("auto")
    for result in results[1:]:
        same(result, results[0])


def test_every_instruction_set_is_right(sae, isa, same):
    s = sae
    oracle = (s.x.double() - s.b_dec.double()) @ s.W_enc.double().T + s.b_enc.double()
    values, indices = native.encode_topk(s.x, s.W_enc, s.b_enc, 17, s.b_dec)
    exact = torch.where(values > 0, oracle.gather(1, indices.long()), 0)
    assert (values - exact).abs().max() < 1e-5 * oracle.abs().max()
    assert (oracle > oracle.gather(1, indices[:, -1:].long()) + 1e-5).sum(1).max() < 17
    x = torch.randn(5, 2011)
    x[0], x[1, ::3], x[2, 5::97], x[3] = 2.0, -0.0, math.nan, -math.inf
    for k in (1, 17, 700, 2011):
        same(native.topk(x, k), reference.topk(x, k))


# --- rule 1: one dot defines the value ----------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_thread_counts_give_the_same_bits(sae, threads, count, same):
    threads(2)
    wanted = every_op(sae)
    threads(count)
    same(every_op(sae), wanted)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_batch_sizes_give_the_same_bits(sae, isa, n, same):
    """Up to TILE_ROWS rows there is no screen at all, and more rows screen in other tiles."""
    s = sae
    values, indices = native.encode_topk(s.x, s.W_enc, s.b_enc, 17, s.b_dec)
    part = native.encode_topk(s.x[:n], s.W_enc, s.b_enc, 17, s.b_dec)
    same(part, (values[:n], indices[:n]))
    all_rows = native.encode_threshold(s.x, s.W_enc, s.b_enc, s.threshold, s.b_dec)
    part = native.encode_threshold(s.x[:n], s.W_enc, s.b_enc, s.threshold, s.b_dec)
    nnz = int(all_rows[2][n])
    same(part, (all_rows[0][:nnz], all_rows[1][:nnz], all_rows[2][: n + 1]))


@pytest.mark.parametrize(
    "name,value",
    [
        ("TILE_ROWS", 0),  # always a screen
        ("TILE_ROWS", 99),  # never one
        ("DENSE_SHARE", 99),  # nor here
        ("CANDIDATES", 1),  # lists are full early
        ("WORKSPACE", 1),  # one row at a time
        ("WORKSPACE", 100_000),  # a few rows at a time
    ],
)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_screens_tiles_and_fallbacks_give_the_same_bits(
    sae, monkeypatch, weights, name, value, same
):
    s, W = sae, sae.W_enc.to(weights)

    def run():
        return [
            *native.encode_topk(s.x, W, s.b_enc, 17, s.b_dec),
            *native.encode_topk(s.x, W, s.b_enc - 2.5, 400),  # few positives: padding
            *native.encode_threshold(s.x, W, s.b_enc, s.threshold, s.b_dec),
        ]

    wanted = run()
    monkeypatch.setattr(native, name, value)
    same(run(), wanted)


def test_process_wide_precision_flags_do_not_reach_the_result(sae, same):
    wanted = every_op(sae)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = native.encode_topk(sae.x, sae.W_enc, sae.b_enc, 17, sae.b_dec)
    finally:
        torch.set_float32_matmul_precision("highest")
    same(got, wanted[2:4])


def test_near_ties_and_duplicates_are_told_apart(isa, same):
    """Rows that differ in the last bit of one weight, far below what bf16 can see."""
    W = torch.randn(1, 64).repeat(700, 1)
    W[::2, 7] *= 1 + 2**-22
    x = torch.randn(1, 64).repeat(6, 1)
    values, indices = native.encode_topk(x, W, torch.full((700,), 40.0), 300)
    same(native.encode_topk(x[:1], W, torch.full((700,), 40.0), 300), (values[:1], indices[:1]))
    h = native.encode_threshold(x, W, torch.full((700,), 40.0), torch.zeros(700))[0].view(6, 700)
    wanted = torch.sort(h, dim=1, descending=True, stable=True)
    same((values, indices.long()), (wanted.values[:, :300], wanted.indices[:, :300]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 1e-39])
@pytest.mark.parametrize("where", ["x", "W", "b_enc", "b_dec"])
def test_extreme_numbers_are_never_lost(encode_sample, isa, bad, where, same):
    """The screened result is that of full rows of dots, whatever is in the operands."""
    s = encode_sample(n=6, d=40, f=900)
    operands = {"x": s.x, "W": s.W_enc, "b_enc": s.b_enc, "b_dec": s.b_dec}
    operands[where].view(-1)[operands[where].numel() // 2] = bad
    x, W, b_enc, b_dec = operands.values()
    rows = [native.encode_topk(x[i : i + 1], W, b_enc, 9, b_dec) for i in range(6)]
    same(native.encode_topk(x, W, b_enc, 9, b_dec), [torch.cat(c) for c in zip(*rows, strict=True)])
    rows = [native.encode_threshold(x[i : i + 1], W, b_enc, s.threshold, b_dec) for i in range(6)]
    got = native.encode_threshold(x, W, b_enc, s.threshold, b_dec)
    same(got[:2], [torch.cat(c) for c in zip(*rows, strict=True)][:2])
    if math.isnan(bad) and where in ("W", "b_enc"):
        column = 450
        values, indices = native.encode_topk(x, W, b_enc, 9, b_dec)
        assert values[:, 0].isnan().all() and (indices[:, 0] == column).all()


# --- borders ------------------------------------------------------------------------------------


def guarded(tensor):
    """The same numbers at an odd offset between NaN (or absurd index) borders."""
    fill = math.nan if tensor.is_floating_point() else -(2**30)
    buffer = tensor.new_full((tensor.numel() + 66,), fill)
    buffer[33 : 33 + tensor.numel()] = tensor.flatten()
    return buffer[33 : 33 + tensor.numel()].view(tensor.shape), buffer


@pytest.mark.parametrize("d,f", [(1, 1), (15, 17), (31, 255), (33, 257), (100, 4097)])
def test_nothing_is_read_or_written_past_the_borders(encode_sample, isa, d, f, same):
    s = encode_sample(n=5, d=d, f=f)
    k = min(f, 9)
    plain = [s.x, s.W_enc, s.b_enc, s.b_dec, s.threshold]
    views, buffers = zip(*(guarded(t) for t in plain), strict=True)

    def run(x, W, b_enc, b_dec, threshold):
        values, indices = native.encode_topk(x, W, b_enc, k, b_dec)
        index, _ = guarded(indices)
        weight, _ = guarded(values)
        return [
            values,
            *native.encode_threshold(x, W, b_enc, threshold, b_dec),
            *native.topk(W, d),
            native.decode(weight, index, W, b_dec),
            native.gather_dot(x, W, index),
            *native.sparse_outer(weight, index, x, f),
            *native.mi_topk(W, x, 5, "paper", 1.0),
        ]

    before = [b.clone() for b in buffers]
    same(run(*views), run(*plain))
    same(buffers, before)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
def test_column_sums_stay_within_their_buffers(isa, columns):
    logits = torch.randn(13, columns)
    maximum, sentinel = guarded(torch.full((columns,), -math.inf))
    total, other = guarded(torch.zeros(columns))
    torch.ops.fastsae._mi_columns(logits, 2.0, maximum, total)
    wanted = torch.logsumexp(2.0 * logits.double(), 0)
    assert torch.allclose(maximum + total.log(), wanted.float(), atol=1e-5)
    for buffer in (sentinel, other):
        assert buffer[:33].isnan().all() and buffer[33 + columns :].isnan().all()


def test_rows_of_extremes(isa, same):
    """k = 1 and k = F, all equal, one value, -0.0, denormals; F on both sides of every block."""
    for f in (1, 2, 16, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 5000):
        x = torch.stack(
            [
                torch.zeros(f),
                torch.full((f,), -0.0),
                torch.full((f,), -math.inf),
                torch.arange(f) * 1e-45,
                -torch.arange(f).float(),
                torch.where(torch.arange(f) % 2 == 0, 0.0, -0.0),
            ]
        )
        for k in {1, (f + 1) // 2, f}:
            values, indices = native.topk(x, k)
            wanted = reference.topk(x, k)
            same((values, indices), wanted)
            assert torch.equal(values.signbit(), wanted[0].signbit())


def test_rows_do_not_mix(threads, isa, dtype, same):
    """A row's columns are picked out while the next row is read: rows with NaN, ties and infinities
    stand among others in several orders, and each gets what it gets alone."""
    threads(1)
    for f in (512, 1023, 1024, 2304, 5000):
        kinds = torch.randn(9, f)
        kinds[1::4, f // 3] = math.nan
        kinds[2] = 1.5
        kinds[3, ::2] = math.inf
        kinds[4] = -math.inf
        for seed in range(4):
            x = kinds[torch.randperm(9, generator=torch.Generator().manual_seed(seed))].to(dtype)
            limit = (f + 255) // 256 * 8  # above, maxima do not pay
            for k in (1, 17, 64, f // 2, limit, limit + 1):
                got = native.topk(x, k)
                same(got, reference.topk(x, k))
                for n in range(9):
                    same([part[n : n + 1] for part in got], native.topk(x[n : n + 1], k))


# --- sparse gradients ---------------------------------------------------------------------------


def test_a_hot_feature_and_an_unused_one(threads, isa, same):
    """One feature in every row is cut by columns; more than 256 entries add up in segments."""
    n, f, d = 3000, 50, 70
    values, g = torch.randn(n, 3), torch.randn(n, d)
    indices = torch.randint(1, f - 1, (n, 3), dtype=torch.int32)
    indices[:, 0] = 7
    values[::5, 1] = 0
    oracle = torch.zeros(f, n, dtype=torch.float64)
    oracle.index_put_((indices.T.long(), torch.arange(n)), values.T.double(), accumulate=True)
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(native.sparse_outer(values, indices, g, f))
    for dW, db in results:
        assert torch.allclose(dW.double(), oracle @ g.double(), atol=2e-4)
        assert torch.allclose(db.double(), oracle.sum(1), atol=2e-4)
        assert not dW[0].any() and not dW[f - 1].any()
    same(results[0], results[1])
    same(results[0], results[2])


def test_outputs_on_large_pages():
    """Above 16 MB the pages of dW are asked for in another way."""
    n, f, d = 50, 9000, 512
    values, g = torch.randn(n, 4), torch.randn(n, d)
    indices = torch.randint(0, f, (n, 4), dtype=torch.int32)
    dW, _ = native.sparse_outer(values, indices, g, f)
    wanted = torch.zeros(f, d, dtype=torch.float64)
    products = values.double().unsqueeze(-1) * g.double().unsqueeze(1)
    wanted.index_add_(0, indices.flatten(), products.flatten(0, 1))
    assert torch.allclose(dW.double(), wanted, atol=1e-5)


def test_padding_never_meets_the_weights():
    W, g = torch.randn(20, 33), torch.randn(2, 33)
    W[0], g[1] = math.nan, math.inf
    values = torch.tensor([[1.0, 0.0, -0.0], [0.0, 0.0, 0.0]])
    indices = torch.tensor([[3, 0, 0], [0, 1, 2]], dtype=torch.int32)
    out = native.decode(values, indices, W)
    assert torch.equal(out[0], W[3]) and not out[1].any()
    assert torch.isfinite(native.sparse_outer(values, indices, g, 20)[0]).all()


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_index_out_of_range_is_an_error(bad):
    values, indices = torch.ones(1, 2), torch.tensor([[3, bad]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="indices: got values"):
        native.decode(values, indices, torch.randn(20, 8))
    with pytest.raises(RuntimeError, match="indices: got values"):
        native.sparse_outer(values, indices, torch.randn(1, 8), 20)
