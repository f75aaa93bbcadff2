"""SAEConfig, Latents and SAE: every activation against the dense formula."""

import copy
import pickle

import pytest
import torch

from fastsae import SAE, FastsaeError, Latents, SAEConfig, ops

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "groupmax")
D, F, K = 24, 70, 7  # F is a multiple of K, as groupmax needs, and not of 8


@pytest.fixture
def make(device):
    """An SAE with random weights whose rows have 5 to 35 active latents."""

    def make(activation="topk", dtype="float32", centre=True, seed=0):
        k = K if activation in ("topk", "batchtopk", "groupmax") else None
        config = SAEConfig(D, F, activation, k, apply_b_dec_to_input=centre, dtype=dtype)
        torch.manual_seed(seed)
        sae = SAE(config, device=device)
        with torch.no_grad():
            sae.W_enc.copy_(torch.randn(F, D))
            sae.W_dec.copy_(torch.randn(F, D) / D**0.5)
            sae.b_enc.copy_(torch.randn(F) * 0.3)
            sae.b_dec.copy_(torch.randn(D) * 0.3)
            if config.has_threshold:
                theta = torch.rand(F) if activation == "jumprelu" else torch.full((F,), 0.4)
                sae.threshold.copy_(theta)
        return sae

    return make


@pytest.fixture
def x(device):
    torch.manual_seed(1)
    return torch.randn(3, 5, D, device=device) / D**0.5


def dense_code(sae, x, dtype=torch.float64):
    c = sae.config
    x = x.to(dtype) - (sae.b_dec.to(dtype) if c.apply_b_dec_to_input else 0)
    h = x @ sae.W_enc.to(dtype).T + sae.b_enc.to(dtype)
    if c.activation == "topk":
        kth = h.topk(c.k, dim=-1).values[..., -1:]
        return torch.where(h >= kth, h, 0).relu()
    if c.activation == "groupmax":
        groups = h.unflatten(-1, (c.k, -1))
        return torch.where(groups == groups.amax(-1, keepdim=True), groups, 0).relu().flatten(-2)
    floor = sae.threshold.to(dtype) if c.has_threshold else torch.zeros(())
    return torch.where(h > floor.to(h), h, 0).relu()


def check_latents(z):
    """Active first, descending, distinct indices, counts; padding is 0."""
    width = z.values.shape[-1]
    assert z.values.shape == z.indices.shape and z.counts.shape == z.values.shape[:-1]
    assert z.indices.dtype == z.counts.dtype == torch.int32
    values, indices = z.values.reshape(-1, width), z.indices.reshape(-1, width)
    slot = torch.arange(width, device=values.device)
    active = slot < z.counts.reshape(-1, 1)
    assert torch.equal(~(values <= 0), active)
    assert (values[~active] == 0).all()
    assert (values.nan_to_num(nan=1e30).diff(dim=1) <= 0).all()
    assert (indices.long().sort(dim=1).values.diff(dim=1) > 0).all()
    assert (indices >= 0).all() and (indices < z.d_sae).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "float64"])
def test_every_activation_is_the_dense_formula(make, x, activation, centre, weights):
    sae = make(activation, weights, centre)
    x = x.to(sae.W_enc.dtype)
    z, exact = sae.encode(x), dense_code(sae, x)
    check_latents(z)
    assert z.d_sae == F and z.values.dtype == torch.promote_types(x.dtype, torch.float32)
    fixed = activation in ("topk", "groupmax")
    assert z.values.shape[-1] == (K if fixed else int(z.counts.max()))
    torch.testing.assert_close(z.to_dense().double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(z.counts, (exact > 0).sum(-1))
    wanted = exact @ sae.W_dec.double() + sae.b_dec.double()
    assert sae(x).dtype == z.values.dtype and sae(x).shape == x.shape
    torch.testing.assert_close(sae(x).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_code_decodes_to_the_same(make, x, activation):
    sae = make(activation)
    z = sae.encode(x)
    torch.testing.assert_close(sae.decode(z.to_dense()), sae.decode(z))
    assert z.to_dense().shape == (3, 5, F)
    assert torch.equal((z.to_dense() != 0).sum(-1), z.counts)


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 0, D), (1, D)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes(make, device, activation, shape):
    sae = make(activation)
    z = sae.encode(torch.zeros(shape, device=device))
    check_latents(z)
    assert z.values.shape[:-1] == shape[:-1] and z.to_dense().shape == (*shape[:-1], F)
    assert sae.decode(z).shape == sae.decode(z.to_dense()).shape == shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_rows_are_counted_and_stay_in_their_row(make, x, activation):
    sae = make(activation)
    clean = sae.encode(x)
    x = x.clone()
    x[1, 2, 4] = float("nan")
    z = sae.encode(x)
    check_latents(z)
    assert z.counts[1, 2] == (K if activation in ("topk", "groupmax") else F)
    assert z.values[1, 2].isnan().all() and sae.decode(z)[1, 2].isnan().all()
    step = F // K if activation == "groupmax" else 1  # the first feature of every group
    assert torch.equal(z.indices[1, 2], step * torch.arange(z.values.shape[-1]).to(z.indices))
    other = torch.ones(3, 5, dtype=torch.bool)
    other[1, 2] = False
    assert torch.equal(z.counts[other], clean.counts[other])
    torch.testing.assert_close(z.to_dense()[other], clean.to_dense()[other])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_reach_every_parameter_and_the_input(make, x, activation):
    sae = make(activation, "float64")
    x = x.double().requires_grad_()
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    parameters = [getattr(sae, name) for name in names]
    loss = (sae(x) - x).square().sum()
    got = torch.autograd.grad(loss, [x, *parameters])
    code = dense_code(sae, x)
    dense = (code @ sae.W_dec + sae.b_dec - x).square().sum()
    for ours, wanted in zip(got, torch.autograd.grad(dense, [x, *parameters]), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_the_gradient_of_a_dense_code(make, x):
    sae = make()
    dense = sae.encode(x).to_dense().detach().requires_grad_()
    got = torch.autograd.grad(sae.decode(dense).square().sum(), dense)[0]
    wanted = 2 * (dense @ sae.W_dec + sae.b_dec) @ sae.W_dec.T
    torch.testing.assert_close(got, wanted)
    values = sae.encode(x).values.detach().requires_grad_()
    z = sae.encode(x)._replace(values=values)
    (z.to_dense() * 3).sum().backward()
    assert (values.grad == 3).all()


def test_a_new_sae_reconstructs_along_its_own_rows(device):
    sae = SAE(SAEConfig(D, F, k=K), device=device)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F, device=device))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert sae.W_enc.shape == sae.W_dec.shape == (F, D) and sae.W_enc.is_contiguous()
    assert (sae.b_enc == 0).all() and (sae.b_dec == 0).all() and sae.stats is None
    assert not hasattr(sae, "threshold")


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
def test_a_cast_leaves_thresholds_in_fp32(make, activation):
    sae = make(activation)
    exact = sae.threshold.detach().clone()
    for cast in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bfloat16):
        sae = sae.to(cast)
        assert sae.W_enc.dtype == sae.b_enc.dtype == cast
        assert sae.config.dtype == str(cast).removeprefix("torch.")
        assert sae.threshold.dtype == torch.promote_types(cast, torch.float32)
        assert torch.equal(sae.threshold.float(), exact), "a cast moved the gates"
        assert isinstance(sae.threshold, torch.nn.Parameter)
    assert torch.equal(sae.half().threshold, exact) and sae.half().W_dec.dtype == torch.float16
    assert set(dict(sae.named_parameters())) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


def test_a_module_travels_through_the_usual_ways(make, x):
    sae = make("jumprelu", "bfloat16")
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert twin.config == sae.config
        assert torch.equal(twin(x.bfloat16()), sae(x.bfloat16()))
    other = make("jumprelu", "bfloat16", seed=5)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other(x.bfloat16()), sae(x.bfloat16()))
    meta = SAE(sae.config, device="meta")
    assert meta.W_enc.device.type == "meta" and meta.threshold.dtype == torch.float32
    assert repr(sae).startswith("SAE(jumprelu, d_in=24, d_sae=70")


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_an_sae_compiles_to_one_graph(make, x, activation):
    sae = make(activation)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(lambda x: sae(x + 0), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), sae(x))
    torch._dynamo.reset()


def test_latents_are_what_the_docstring_says(device):
    values = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 0.0]], device=device)
    indices = torch.tensor([[4, 1, 0], [0, 1, 2]], dtype=torch.int32, device=device)
    z = Latents(values, indices, torch.tensor([2, 1], dtype=torch.int32, device=device), 6)
    wanted = [[0.0, 1.0, 0.0, 0.0, 3.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert z.to_dense().tolist() == wanted


@pytest.mark.parametrize(
    "change,words",
    [
        ({"d_in": 0}, ["d_in: got 0", "positive integer"]),
        ({"d_sae": 3.0}, ["d_sae: got 3.0"]),
        ({"d_in": True}, ["d_in: got True"]),
        (
            {"activation": "gelu"},
            ["activation: got 'gelu'", "topk, batchtopk, jumprelu, relu, groupmax"],
        ),
        ({"k": None}, ["k: got None", "1 to d_sae = 8"]),
        ({"k": 0}, ["k: got 0"]),
        ({"k": 9}, ["k: got 9", "d_sae = 8"]),
        ({"activation": "relu"}, ["k: got 2", "activation='relu' has no k"]),
        ({"dtype": "float8"}, ["dtype: got 'float8'", "float32, bfloat16"]),
        ({"activation": "groupmax", "k": 3}, ["k: got 3", "8 features make no 3 equal groups"]),
        ({"d_out": 3}, ["apply_b_dec_to_input: got True", "a transcoder"]),
        ({"d_out": 0}, ["d_out: got 0"]),
        ({"hook_name_out": "layers.1.output"}, ["hook_name_out", "pass d_out"]),
        ({"normalization": "batch"}, ["normalization: got 'batch'", "layer_norm"]),
        ({"reshape": "hook_q"}, ["reshape: got 'hook_q'", "hook_z"]),
    ],
)
def test_a_bad_config_names_the_field(change, words):
    good = {"d_in": 4, "d_sae": 8, "activation": "topk", "k": 2}
    with pytest.raises(FastsaeError) as error:
        SAEConfig(**good | change)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_inputs_name_what_is_wrong(make, x):
    sae = make()
    with pytest.raises(FastsaeError, match=r"x: got shape \[3, 5, 23\], expected \[..., 24\]"):
        sae.encode(x[..., 1:])
    with pytest.raises(FastsaeError, match=r"z: got shape \[3, 5, 24\], expected \[..., 70\]"):
        sae.decode(x)
    with pytest.raises(FastsaeError, match="z: has d_sae = 71, this SAE has 70"):
        sae.decode(sae.encode(x)._replace(d_sae=71))
    with pytest.raises(FastsaeError, match="x: got list"):
        sae.encode([1.0])


TRANSCODER = {"d_out": 10, "apply_b_dec_to_input": False}


def extended(device, **fields):
    torch.manual_seed(5)
    fields = {"activation": "topk", "k": K} | fields
    sae = SAE(SAEConfig(D, F, **fields), device=device)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(
                torch.rand(p.shape) + 0.5 if name == "activation_scale" else torch.randn(p.shape)
            )
    return sae


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "center"])
def test_transcoders(device, x, activation, skip, normalization):
    """d_out of its own, raw x through the skip connection, normalization of the input only."""
    options = TRANSCODER | {"skip": skip, "normalization": normalization}
    sae = extended(device, activation=activation, k=K if activation == "topk" else None, **options)
    plain = extended(device, activation=activation, k=sae.config.k, **TRANSCODER)
    plain.load_state_dict({n: p for n, p in sae.state_dict().items() if n != "W_skip"})
    inside = x if normalization == "none" else x - x.mean(-1, keepdim=True)
    if normalization == "layer_norm":
        inside = inside / (inside.std(-1, keepdim=True) + 1e-5)
    wanted = plain.encode(inside).to_dense() @ sae.W_dec + sae.b_dec
    wanted = wanted + x @ sae.W_skip.T if skip else wanted
    assert sae(x).shape == (3, 5, 10) and sae.W_dec.shape == (F, 10) and sae.b_dec.shape == (10,)
    torch.testing.assert_close(sae(x), wanted)
    torch.testing.assert_close(
        sae.decode(sae.encode(x)) + (x @ sae.W_skip.T if skip else 0), wanted
    )
    check_latents(sae.encode(x))
    assert "d_out=10" in repr(sae) and ("skip" in repr(sae)) is skip


def test_an_activation_scale_keeps_the_selection(device, x):
    sae = extended(device, activation_scale=True)
    plain = extended(device)
    plain.load_state_dict({n: p for n, p in sae.state_dict().items() if n != "activation_scale"})
    z = sae.encode(x)
    check_latents(z)
    wanted = plain.encode(x).to_dense() * sae.activation_scale
    torch.testing.assert_close(z.to_dense(), wanted)
    half = sae.bfloat16()
    assert half.activation_scale.dtype == torch.float32 and half.W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm", "center"])
def test_gradients_through_a_normalization(device, x, normalization):
    sae = extended(device, normalization=normalization).double()
    flat = x.double().view(-1, D)[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x), flat)


def test_a_normalized_code_needs_its_latents(device, x):
    plain, sae = extended(device), extended(device, normalization="layer_norm")
    with pytest.raises(FastsaeError, match="a dense code does not know the layer_norm"):
        sae.decode(sae.encode(x).to_dense())
    for one, other in ((plain, sae), (sae, plain)):
        with pytest.raises(FastsaeError, match="z: the Latents of an SAE with another"):
            one.decode(other.encode(x))
    edited = sae.encode(x)
    edited = edited._replace(values=edited.values * 0)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    torch.testing.assert_close(sae.decode(edited), sae.b_dec * std + mean)


@pytest.mark.parametrize(
    "fields,words",
    [
        (TRANSCODER, "a transcoder"),
        ({"skip": True}, "a skip connection"),
        ({"normalization": "layer_norm"}, "normalization='layer_norm'"),
        ({"activation_scale": True}, "an activation_scale"),
    ],
)
def test_steering_and_measuring_refuse_by_name(device, x, fields, words):
    from fastsae.steering.table import PolicyTable
    from fastsae.training.measure import reconstruction

    sae = extended(device, **fields)
    with pytest.raises(FastsaeError, match="steering needs a plain autoencoder") as error:
        PolicyTable(sae)
    assert words in str(error.value)
    with pytest.raises(FastsaeError, match="measuring a reconstruction"):
        reconstruction(sae, [x.view(-1, D)])
    extended(device).config.require_plain("anything")


def test_steering_reads_a_centred_sae_from_plain_activations(device, x):
    """The rows that steering keeps see mean(x) as the SAE does: not at all."""
    from fastsae.steering.lower import fetch_rows
    from fastsae.steering.table import PolicyTable

    sae = extended(device, activation="relu", k=None, normalization="center")
    PolicyTable(sae)
    rows = fetch_rows(sae, [(feature, False) for feature in range(F)])
    shifted = x.cpu() + 3
    h = (shifted @ rows.enc.T + rows.bias).relu()
    torch.testing.assert_close(h, sae.encode(x).to_dense().cpu(), rtol=1e-4, atol=1e-4)


def test_an_sae_uses_the_ops(make, x, monkeypatch):
    """sae.encode → ops.encode_topk: one call, with the SAE's own tensors."""
    sae, calls = make(), []
    real = ops.encode_topk
    monkeypatch.setattr(ops, "encode_topk", lambda *a, **k: calls.append(a) or real(*a, **k))
    sae.encode(x)
    assert len(calls) == 1 and calls[0][1] is sae.W_enc and calls[0][3] == K
