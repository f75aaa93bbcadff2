"""Gradients of encode_topk and encode_threshold: every input, every backend, AuxK, compiled."""

import pytest
import torch

from fastsae import ops

pytestmark = pytest.mark.op("encode_topk")
threshold_op = pytest.mark.op("encode_threshold")

DIFFERENTIABLE = ("x", "W_enc", "b_enc", "b_dec")


@pytest.mark.parametrize("centre", [True, False])
def test_gradcheck(encode_sample, centre, device):
    s = encode_sample(2, 4, 7, dtype=torch.float64, device=device)
    inputs = s.leaves()[: 4 if centre else 3]

    def topk(x, W, b, b_dec=None):
        return ops.encode_topk(x, W, b, 3, b_dec=b_dec)[0]

    def threshold(x, W, b, b_dec=None):
        return ops.encode_threshold(x, W, b, s.threshold.double() * 0.3, b_dec=b_dec)[0]

    for function in (topk, threshold):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def gradients(outputs, weight, inputs):
    return torch.autograd.grad((outputs * weight).sum(), inputs)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_topk_gradient_of_every_backend(encode_sample, as_good_as_torch, mixed, n, device, backend):
    s = encode_sample(n, dtype=mixed[0], weights=mixed[1], device=device)
    s.b_enc -= 0.7  # some rows have fewer than k positives: padding must get no gradient
    inputs = s.leaves()
    values, indices = ops.encode_topk(*inputs[:3], 20, b_dec=inputs[3], backend=backend)
    assert not indices.requires_grad
    weight = torch.randn(values.shape).to(device)
    got = gradients(values, weight, inputs)

    def dense(dtype):
        t = s.leaves(dtype)
        h = (t[0] - t[3]) @ t[1].T + t[2]
        active = torch.where(values > 0, h.gather(1, indices.long()), 0)
        return gradients(active, weight.to(dtype), t)

    for name, ours, exact, torchs, like in zip(
        DIFFERENTIABLE, got, dense(torch.float64), dense(torch.float32), inputs, strict=True
    ):
        assert ours.dtype == like.dtype
        as_good_as_torch(ours, exact, torchs.to(like.dtype), name)


@threshold_op
@pytest.mark.parametrize("n", [0, 1, 7])
def test_threshold_gradient_of_every_backend(encode_sample, as_good_as_torch, n, device, backend):
    s = encode_sample(n, device=device)
    inputs, theta = s.leaves(), s.threshold.requires_grad_()
    values, indices, offsets = ops.encode_threshold(
        *inputs[:3], theta, b_dec=inputs[3], backend=backend
    )
    assert not indices.requires_grad and not offsets.requires_grad
    weight = torch.randn(values.shape).to(device)
    assert torch.autograd.grad(values.sum(), theta, allow_unused=True, retain_graph=True) == (None,)
    got = gradients(values, weight, inputs)
    row = torch.repeat_interleave(torch.arange(n, device=device), offsets.diff())

    def dense(dtype):
        t = s.leaves(dtype)
        h = (t[0] - t[3]) @ t[1].T + t[2]
        return gradients(h[row, indices.long()], weight.to(dtype), t)

    for name, ours, exact, torchs in zip(
        DIFFERENTIABLE, got, dense(torch.float64), dense(torch.float32), strict=True
    ):
        as_good_as_torch(ours, exact, torchs, name)


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_a_single_gradient(encode_sample, wanted, device, backend):
    """Only what is asked for is computed, and it is what all together give."""
    s = encode_sample(device=device)
    inputs = s.leaves()
    values, _ = ops.encode_topk(*inputs[:3], 8, b_dec=inputs[3], backend=backend)
    together = dict(zip(DIFFERENTIABLE, torch.autograd.grad(values.sum(), inputs), strict=True))
    one = getattr(s, wanted).detach().requires_grad_()
    args = {name: getattr(s, name).detach() for name in DIFFERENTIABLE} | {wanted: one}
    values, _ = ops.encode_topk(**args, k=8, backend=backend)
    assert torch.equal(torch.autograd.grad(values.sum(), one)[0], together[wanted])


def test_auxk_reaches_the_encoder(encode_sample, activations, device):
    """Dead latents reconstruct the residual; the loss moves W_enc of the dead rows and b_dec."""
    s = encode_sample(4, 6, 12, dtype=torch.float64, device=device)
    W_dec = activations(12, 6, dtype=torch.float64, device=device, seed=9).requires_grad_()
    dead = torch.tensor([1, 4, 5, 8, 9, 11], device=device)
    inputs = [*s.leaves()[1:], W_dec]

    def auxk(W_enc, b_enc, b_dec, W_dec):
        main = ops.decode(*ops.encode_topk(s.x, W_enc, b_enc, 3, b_dec=b_dec), W_dec, b_dec)
        residual = s.x - main
        aux = ops.encode_topk(s.x, W_enc[dead], b_enc[dead], 4, b_dec=b_dec)
        return (residual - ops.decode(*aux, W_dec[dead])).square().sum()

    assert torch.autograd.gradcheck(auxk, inputs, fast_mode=True)
    with torch.no_grad():
        aux_only = [t.clone().requires_grad_() for t in inputs]
    values, indices = ops.encode_topk(
        s.x, aux_only[0][dead], aux_only[1][dead], 4, b_dec=aux_only[2]
    )
    ops.decode(values, indices, aux_only[3][dead]).square().sum().backward()
    for parameter in aux_only:
        assert parameter.grad.abs().sum() > 0
    alive = [i for i in range(12) if i not in dead.tolist()]
    assert (aux_only[0].grad[alive] == 0).all()


def test_the_compiled_gradient_is_the_eager_one(encode_sample, decode_sample, device, backend):
    s, W_dec = encode_sample(device=device), decode_sample(device=device).W
    inputs = [*s.leaves(), W_dec.requires_grad_()]

    def loss(x, W_enc, b_enc, b_dec, W_dec):
        code = ops.encode_topk(x, W_enc, b_enc, 8, b_dec=b_dec, backend=backend)
        return (ops.decode(*code, W_dec, b_dec, backend=backend) - x).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for ours, wanted in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(ours, wanted)
