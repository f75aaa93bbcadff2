"""On a GPU: whichever product screens, one result, bit for bit. (In the interpreter, on smaller
problems: test_screen_interpreter.py.)"""

import pytest
import torch

from fastsae.ops import encode_topk

PROBLEMS = ((5, 2304, 20000, 32), (64, 768, 16384, 32), (300, 2048, 24576, 64))  # N, D, F, k
LIMITS = {"int8": 16, "step": 64, "fused": 1 << 30, "cublas": 1 << 30}  # rows each one takes


@pytest.mark.op("encode_topk", but=("native", "reference"))
@pytest.mark.parametrize("n, d, f, k", PROBLEMS)
def test_products_agree(n, d, f, k, device, backend, monkeypatch):
    from fastsae.kernels import candidates

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=draw)
    x[:, :8] *= d**0.5 / 3  # massive dimensions, as real activations have
    W = torch.randn(f, d, generator=draw) / d**0.5
    W[7] = W[9]
    x, W, b = (t.to(device) for t in (x, W, torch.randn(f, generator=draw) / 10))
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
