"""Accelerated SAELens SAEs against the same SAE as SAELens has it."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer
from sae_lens.saes import abstopk_sae, gated_sae, jumprelu_sae, standard_sae, topk_sae, transcoder
from transformer_lens import HookedTransformerConfig

from fastsae import FastsaeError, compat
from fastsae.compat import codes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
D, F = 48, 2048
OUT = {"d_out": 32, "apply_b_dec_to_input": False}
MODULES = (standard_sae, topk_sae, jumprelu_sae, gated_sae, transcoder)
CASES = {
    "standard": ("StandardSAE", {}),
    "no b_dec": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "topk": ("TopKSAE", {"k": 8}),
    "topk rescaled": ("TopKSAE", {"k": 8, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "transcoder": ("Transcoder", OUT),
    "skip transcoder": ("SkipTranscoder", OUT),
    "jumprelu transcoder": ("JumpReLUTranscoder", OUT),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", OUT),
    "layer_norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "norm rescale": ("TopKSAE", {"k": 8, "normalize_activations": "constant_norm_rescale"}),
    "hook_z": ("JumpReLUSAE", {"reshape_activations": "hook_z"}),
}
EVERY = pytest.mark.parametrize("case", CASES)


def sae_of(case: str, **options):
    """A random SAE with about 30 active latents of 2048."""
    name, settings = CASES.get(case, (case, {}))
    module = next(m for m in MODULES if hasattr(m, name))
    config = getattr(module, f"{name}Config")
    sae = getattr(module, name)(config(d_in=D, d_sae=F, **settings, **options))
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 0.1)
    for bias in ("b_enc", "b_gate", "b_mag"):
        if isinstance(getattr(sae, bias, None), torch.Tensor):
            getattr(sae, bias).data -= 2.2
    if case == "gated":
        sae.b_mag.data += 1.0
    return sae


def pair(case: str, **options):
    theirs = sae_of(case, **options)
    return compat.accelerate(copy.deepcopy(theirs)), theirs


def inputs(case: str, *leading: int):
    leading = leading or (3, 5)
    return torch.randn(*leading, 6, 8) if case == "hook_z" else torch.randn(*leading, D)


def run(sae, x, how):
    x = x.clone().requires_grad_()
    if how == "forward":
        out = sae(x)
        out.square().sum().backward()
        return x, out, None
    acts = sae.encode(x)
    out = sae.decode(acts)
    (out.square().sum() + (acts.sum() if how == "l1" else 0)).backward()
    return x, out, acts


@EVERY
@pytest.mark.parametrize("how", ["forward", "encode", "l1"])
def test_values_and_gradients(case, how, close, same_gradients):
    ours, theirs = pair(case)
    x = inputs(case)
    (x1, out1, acts1), (x2, out2, acts2) = run(ours, x, how), run(theirs, x, how)
    close(out1, out2, "out")
    close(x1.grad, x2.grad, "x")
    same_gradients(ours, theirs)
    if acts2 is not None:
        close(acts1, acts2, "acts")
        active = (acts2 != 0).sum(-1)
        assert 1 <= int(active.min()) and int(active.max()) * codes.DENSE_SHARE <= F


@EVERY
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients(case, context, close):
    ours, theirs = pair(case)
    for leading in ((7,), (1,), (0,), (2, 3)):
        x = inputs(case, *leading)
        with context():
            close(ours(x), theirs(x))
            found, wanted = ours.encode(x), theirs.encode(x)
            close(found, wanted)
            close(ours.decode(found), theirs.decode(wanted))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["topk", "jumprelu", "standard"])
def test_half_types_keep_shape_and_type_and_are_more_exact(case, name, close):
    """SAELens rounds pre-activations to the type of the weights before it selects; we do not."""
    ours, theirs = pair(case)
    half = getattr(torch, name)
    ours.to(dtype=half)
    theirs.to(dtype=half)
    x = inputs(case).to(half)
    with torch.no_grad():
        h = theirs.process_sae_in(x).double() @ theirs.W_enc.double() + theirs.b_enc.double()
        truth = h.relu()
        if case == "topk":
            top = h.topk(8)
            truth = torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
        elif case == "jumprelu":
            truth = truth * (h > theirs.threshold)
        found, wanted = ours.encode(x), theirs.encode(x)
        assert found.dtype == wanted.dtype == half and found.shape == wanted.shape
        close(ours.decode(found), theirs.decode(found), tolerance=torch.finfo(half).eps * 2)
    error, theirs_error = ((t.double() - truth).square().sum() for t in (found, wanted))
    assert 0 < error < theirs_error


@EVERY
def test_hooks_fire_as_before(case, close):
    seen = {}
    for sae in pair(case):
        names = list(sae.hook_dict)
        record = []
        hooks = [
            (name, lambda t, hook, record=record: record.append((hook.name, t.clone())))
            for name in names
        ]
        x = inputs(case)
        torch.manual_seed(1)
        with sae.hooks(fwd_hooks=hooks):
            sae(torch.randn_like(x))
        seen[compat.is_accelerated(sae)] = record
    assert [name for name, _ in seen[True]] == [name for name, _ in seen[False]]
    assert len(seen[True]) >= 4
    for (name, found), (_, wanted) in zip(seen[True], seen[False], strict=True):
        close(found, wanted, name)


@pytest.mark.parametrize("point", ["input", "acts_pre", "acts_post", "recons"])
@pytest.mark.parametrize("case", ["topk", "jumprelu", "gated", "layer_norm"])
def test_a_hook_that_edits_is_obeyed(case, point, close):
    outs = []
    x = inputs(case)
    for sae in pair(case):
        edit = [(f"hook_sae_{point}", lambda t, hook: t * 1.5 + 0.01)]
        with sae.hooks(fwd_hooks=edit):
            outs.append(sae(x))
    close(*outs)


def test_backward_hooks_see_the_dense_gradient(close):
    seen = []
    x = inputs("topk")
    for sae in pair("topk"):
        grads = []
        hooks = [("hook_sae_acts_post", lambda g, hook, grads=grads: grads.append(g.clone()))]
        with sae.hooks(bwd_hooks=hooks):
            sae(x.clone().requires_grad_()).square().sum().backward()
        seen.append(grads[0])
    close(*seen)


def test_forward_builds_a_dense_code_only_for_a_listener(monkeypatch):
    ours, _ = pair("topk")
    made = []
    real = codes.dense
    monkeypatch.setattr(codes, "dense", lambda *a: made.append(1) or real(*a))
    ours(inputs("topk"))
    assert not made
    with ours.hooks(fwd_hooks=[("hook_sae_acts_post", lambda t, hook: None)]):
        ours(inputs("topk"))
    assert made


@pytest.mark.parametrize("case", ["topk", "layer_norm", "hook_z"])
def test_error_term(case, close):
    ours, theirs = pair(case)
    ours.use_error_term = theirs.use_error_term = True
    x = inputs(case)
    close(ours(x), x)
    outs = []
    for sae in (ours, theirs):
        with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda t, hook: t * 2)]):
            outs.append(sae(x))
    close(*outs)
    assert (outs[0] - x).abs().max() > 0.1


def test_each_code_is_decoded_with_the_norms_of_its_own_encode(close):
    ours, theirs = pair("layer_norm")
    x, y = inputs("layer_norm"), inputs("layer_norm") * 9
    with torch.no_grad():
        first, _second = ours.encode(x), ours.encode(y)
        wanted = theirs.decode(theirs.encode(x))
        close(ours.decode(first), wanted)
        close(ours.decode(first), wanted, "again")


def test_threads_do_not_share_the_norms(close):
    ours, theirs = pair("layer_norm")
    xs = [inputs("layer_norm", 64) * 3**i for i in range(4)]
    wanted = [theirs(x).detach() for x in xs]
    found = {}

    def work(i):
        with torch.no_grad():
            found[i] = [ours.decode(ours.encode(xs[i]).clone()) for _ in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(wanted):
        for got in found[i]:
            close(got, want)


def test_decode_without_encode_says_what_is_missing():
    ours, _ = pair("layer_norm")
    with pytest.raises(FastsaeError, match="call encode first"):
        ours.decode(torch.rand(2, F))


@EVERY
def test_any_edit_of_the_weights_counts_at_once(case, close):
    ours, theirs = pair(case)
    x = inputs(case)
    with torch.no_grad():
        ours(x)
        for sae in (ours, theirs):
            sae.W_enc.data[:, ::3] *= 1.5
            sae.W_enc[0, 0] += 1
            sae.W_dec.data *= 0.5
        close(ours(x), theirs(x))
        fresh = torch.randn(D, F) * 0.1
        for sae in (ours, theirs):
            sae.W_enc.data = fresh.clone()  # another layout than accelerate left
        close(ours(x), theirs(x))


@EVERY
def test_restore_gives_back_the_same_object(case):
    theirs = sae_of(case)
    state = {name: t.clone() for name, t in theirs.state_dict().items()}
    kind, x = type(theirs), inputs(case)
    before = theirs(x)
    assert compat.accelerate(theirs) is theirs and isinstance(theirs, kind)
    assert compat.is_accelerated(theirs) and compat.restore(theirs) is theirs
    assert type(theirs) is kind and not compat.is_accelerated(theirs)
    assert torch.equal(theirs(x), before) and theirs.W_enc.is_contiguous()
    for name, t in theirs.state_dict().items():
        assert torch.equal(t, state[name])
    compat.restore(theirs)


@EVERY
def test_copies_work_on_their_own_weights(case, close):
    ours, theirs = pair(case)
    x = inputs(case)
    with torch.no_grad():
        wanted = theirs(x)
        other = copy.deepcopy(ours)
        assert compat.is_accelerated(other)
        for parameter in ours.parameters():
            parameter.zero_()
        close(other(x), wanted)


def test_saves_and_loads(tmp_path, close):
    ours, theirs = pair("jumprelu")
    x = inputs("jumprelu")
    ours.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is type(theirs)
    with torch.no_grad():
        assert torch.equal(loaded(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_where_their_own_code_runs(close):
    """float64, autocast, function transforms and pre-activation hooks are SAELens' business."""
    ours, theirs = pair("topk")
    x = inputs("topk")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        close(ours(x), theirs(x))
    batched = torch.func.vmap(lambda t: ours.decode(ours.encode(t)))(x)
    close(batched, torch.func.vmap(lambda t: theirs.decode(theirs.encode(t)))(x))
    ours.to(dtype=torch.float64)
    theirs.to(dtype=torch.float64)
    close(ours(x.double()), theirs(x.double()), tolerance=1e-14)


def test_compiled():
    """In a process of its own: nnsight, which other tests import, breaks this torch's compiler."""
    here = Path(__file__)
    script = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("helpers", {str(here)!r})
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
ours, theirs = helpers.pair("topk")
x = helpers.inputs("topk")
with torch.no_grad():
    torch.testing.assert_close(torch.compile(ours, backend="eager")(x), theirs(x))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refuses_by_name():
    config = abstopk_sae.AbsTopKSAEConfig(d_in=D, d_sae=F, k=4)
    with pytest.raises(FastsaeError, match="AbsTopKSAE"):
        compat.accelerate(abstopk_sae.AbsTopKSAE(config))
    with pytest.raises(FastsaeError, match="Linear"):
        compat.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(FastsaeError, match="speed"):
        compat.accelerate(sae_of("topk"), speed=9)
    with pytest.raises(FastsaeError, match="layer_norm"):
        compat.accelerate(sae_of("Transcoder", **OUT, normalize_activations="layer_norm"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=8, n_heads=6, d_vocab=100, act_fn="gelu_new"
    )
    return HookedSAETransformer(config)


@pytest.mark.parametrize("error_term", [False, True])
def test_hooked_transformer(model, error_term, close):
    tokens = torch.randint(0, 100, (2, 10))
    outs, caches = [], []
    for sae, heads in zip(pair("topk"), pair("hook_z"), strict=True):
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        heads.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
        for each in (sae, heads):
            model.add_sae(each, use_error_term=error_term)
        assert compat.is_accelerated(model) == compat.is_accelerated(sae)
        outs.append(model(tokens))
        out, cache = model.run_with_cache(tokens)
        close(out, outs[-1])
        caches.append(cache)
        model.reset_saes()
    close(*outs)
    assert list(caches[0].keys()) == list(caches[1].keys())
    for name in caches[0]:
        close(caches[0][name], caches[1][name], name)


def test_accelerating_a_model_accelerates_its_saes(model, close):
    tokens = torch.randint(0, 100, (2, 10))
    sae = sae_of("jumprelu")
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    model.add_sae(sae)
    wanted = model(tokens)
    compat.accelerate(model)
    assert compat.is_accelerated(sae)
    close(model(tokens), wanted)
    compat.restore(model)
    assert not compat.is_accelerated(sae)
    model.reset_saes()
