"""On a GPU: whichever product screens, one result, bit for bit. (In the interpreter, on smaller
problems: test_screen_interpreter.py.)"""

import pytest
import torch

from fastsae.ops import encode_topk

REPEATS = 200
PROBLEMS = ((5, 2304, 20000, 32), (64, 768, 16384, 32), (300, 2048, 24576, 64))  # N, D, F, k
LIMITS = {"int8": 16, "step": 64, "fused": 1 << 30, "cublas": 1 << 30}  # rows each one takes


def problem(n, d, f, device):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw)
    x[:, :8] *= d**0.5 / 3  # massive dimensions, as real activations have
    W = torch.randn(f, d, generator=draw) / d**0.5
    W[7] = W[9]
    return [t.to(device) for t in (x, W, torch.randn(f, generator=draw) / 10)]


@pytest.mark.op("encode_topk", but=("native", "reference"))
@pytest.mark.parametrize("n, d, f, k", PROBLEMS)
def test_products_agree(n, d, f, k, device, backend, monkeypatch):
    from fastsae.kernels import candidates

    x, W, b = problem(n, d, f, device)
    results = {}
    for name, rows in LIMITS.items():
        if n <= rows:
            monkeypatch.setattr(candidates, "CHOICES", ((1 << 62, 1 << 30, name),))
            results[name] = encode_topk(x, W, b, k, b_dec=x.mean(0), backend=backend)
    h = (x.double() - x.mean(0).double()) @ W.double().T + b.double()
    best = h.topk(k + 1).values
    for name, (values, indices) in results.items():
        assert torch.equal(values, results["cublas"][0]), name
        assert torch.equal(indices, results["cublas"][1]), name
        assert (values - best[:, :k]).abs().max() < 1e-4
        clear = best[:, k - 1] - best[:, k] > 1e-4
        wanted = h.topk(k).indices.sort(1).values
        assert torch.equal(indices.long().sort(1).values[clear], wanted[clear])


def products(n, x, W, b):
    """{name: (a call that makes the screened product h [n, F], its rows, copy and features)}."""
    from fastsae.kernels import fused, matmul, screen

    def prefill(rows, w, features):
        firsts = range(0, W.shape[0], fused.PREFILL_COLUMNS)
        widths = [min(fused.PREFILL_COLUMNS, W.shape[0] - first) for first in firsts]
        parts = zip(firsts, widths, strict=True)
        made = [fused.prefill(rows.rounded, w.copy, features.bias, *part)[0] for part in parts]
        return torch.cat(made, 1)

    def cublas(rows, w, features):
        with matmul.full_fp32(W.device):
            return matmul.product(rows.rounded, w.copy)

    def step(*operands):
        return fused.step(*operands)[0]

    calls = {"int8": step, "step": step, "fused": prefill, "cublas": cublas}
    for name, most in LIMITS.items():
        if n <= most:
            w = screen.weights(W, "int8" if name == "int8" else "bf16", x, None)
            operands = screen.rows(x, None, w), w, screen.features(W, w, b, None, 8)
            if name != "fused" or fused.has_tma(operands[0].rounded, w.copy):
                yield name, calls[name], operands


@pytest.mark.op("encode_topk", but=("native", "reference"))
@pytest.mark.parametrize("n, d, f, k", PROBLEMS)
def test_products_repeat_and_keep_their_bounds(n, d, f, k, device, backend):
    """Of every pair, and with no rescoring that would hide it: a race shows in the repeats, a
    tensor core that rounds more than it is granted in the bounds."""
    x, W, b = problem(n, d, f, device)
    exact = x.double() @ W.double().T + b.double()
    for name, call, (rows, w, features) in products(n, x, W, b):
        h, bias = call(rows, w, features), features.bias[:f].double()
        differing = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(REPEATS if h.is_cuda else 1):
            differing += (call(rows, w, features) != h).sum()
        assert differing == 0, name
        s, bounds = h.double() + bias, rows.bounds.double()
        error = bounds[:, :1] * w.norms[:f].double() + bounds[:, 1:] * w.lost[:f].double()
        assert ((s - exact).abs() <= error + 9.6e-7 * (s.abs() + bias.abs())).all(), name
