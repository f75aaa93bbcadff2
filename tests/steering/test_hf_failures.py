"""What goes wrong around a steered model, and what must not go on unsteered or half steered."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from fastsae.errors import FastsaeError
from fastsae.places import Place, resolve_place, site
from fastsae.steering import Dose, Policy, add, amplify, attach, calibrate, steer
from fastsae.steering.dose import clamp, relative_change

pytest.importorskip("transformers")

LAYER = 0
CALM = Policy(add(1, 2.0), name="calm", required=True)


# --- required policies ---------------------------------------------------------------------------


def test_a_dose_that_is_no_number_is_refused(llama, sae, logits, monkeypatch):
    def broken(x, slots, strengths, table):
        return torch.full_like(x, float("nan"))

    monkeypatch.setattr("fastsae.steering.site.steer", broken)
    with steer(llama, sae, CALM, layer=LAYER, dose=Dose(0.5, "refuse")):
        with pytest.raises(FastsaeError, match="moved a token by nan times"):
            logits(llama)
    x = torch.ones(3, 4)
    r = torch.stack([x[0], x[1] * float("nan"), x[2] * 3])
    assert relative_change(x, r).isnan().tolist() == [False, True, False]
    assert relative_change(x, r)[[0, 2]].tolist() == [0.0, 2.0]


def test_a_required_policy_that_no_forward_reaches_stops_the_forward(build, sae, logits, batch):
    model = build("llama")
    model.config.num_hidden_layers = 1  # LlamaModel then never calls its second layer
    with attach(model, {1: sae}) as handle:
        handle.set([None, CALM, None])
        with pytest.raises(FastsaeError, match=r"policy calm is required, but layers\.1\.output"):
            logits(model)
        handle.set([None, None, None])
        logits(model)
    with attach(model, {0: sae}) as handle:
        handle.set([None, CALM, None])
        logits(model)
        # Someone takes all hooks of the layer away.
        model.model.layers[0]._forward_hooks.clear()
        with pytest.raises(FastsaeError, match=r"policy calm is required"):
            logits(model)


@pytest.mark.parametrize("rows", [[CALM, None], [CALM] * 4])
def test_a_required_policy_of_another_batch_stops_both_ways(llama, sae, rows, logits, generate):
    with steer(llama, sae, rows):
        for use in (logits, generate):
            with pytest.raises(FastsaeError, match=r"^policies: \d were set, but the batch has 3"):
                use(llama)


def test_a_layer_that_runs_twice_is_refused(sae):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

        def forward(self, inputs_embeds):
            for layer in (*self.layers, self.layers[0]):
                inputs_embeds = layer(inputs_embeds)
            return inputs_embeds

    with steer(Twice(), sae, CALM) as handle, pytest.raises(FastsaeError, match="ran twice in one"):
        handle.model(torch.randn(1, 3, 32))


# --- weights, devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc"])
def test_nan_in_the_weights_of_a_steered_feature_is_refused(llama, make_sae, name, logits):
    sae, base = make_sae(), logits(llama)
    with torch.no_grad():
        getattr(sae, name)[3].fill_(float("nan"))
    with attach(llama, {LAYER: sae}) as handle:
        with pytest.raises(FastsaeError, match=r"features: 3 has NaN or infinite weights"):
            handle.set(Policy(add(3, 1.0)))
        handle.set(Policy(add(4, 1.0)))  # another feature's weights are not touched
        assert logits(llama).isfinite().all() and not torch.equal(logits(llama), base)


def test_a_model_that_moves_after_attach_takes_its_tables_along(build, sae, everywhere, batch):
    model = build("llama")
    with attach(model, {LAYER: sae}) as handle:
        handle.set([everywhere, None, everywhere])
        model.to("meta")
        out = model(batch.ids.to("meta")).logits
        table = handle.sites[Place(LAYER, "resid_post")].table
        assert out.device.type == "meta" and table.device.type == "meta"


def test_half_a_model_in_another_type_is_followed(build, sae, everywhere, logits):
    model = build("llama")
    with attach(model, {LAYER: sae}) as handle:
        handle.set(everywhere)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            model.to(dtype)
            got = logits(model)
            handle.set(None)
            assert got.dtype == dtype and not torch.equal(got, logits(model))
            handle.set(everywhere)


# --- processes and threads -----------------------------------------------------------------------


def test_two_threads_cannot_steer_one_model_at_once(llama, sae, everywhere, generate):
    """The second waits for nothing: it is refused, and the first writes what it would have."""
    inside, go, caught = threading.Event(), threading.Event(), []

    class Pause:
        def put(self, value):
            inside.set()
            assert go.wait(60)

        def end(self):
            pass

    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 4, "do_sample": False}
    with steer(llama, sae, everywhere) as handle:
        want, got = llama.generate(ids, **options), []
        first = threading.Thread(
            target=lambda: got.append(llama.generate(ids, streamer=Pause(), **options))
        )
        first.start()
        assert inside.wait(60)
        for use in (lambda: llama.generate(ids, **options), lambda: llama(ids)):
            with pytest.raises(FastsaeError, match=r"^model: another thread is running this"):
                use()
            caught.append(use)
        go.set()
        first.join(60)
        assert torch.equal(got[0], want) and len(caught) == 2
        assert torch.equal(llama.generate(ids, **options), want)
        handle.set(None)  # idle, any number of threads may run it
        base, texts = llama.generate(ids, **options), []
        threads = [
            threading.Thread(target=lambda: texts.append(llama.generate(ids, **options)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(texts) == 3 and all(torch.equal(text, base) for text in texts)
        handle.set(everywhere)
        assert torch.equal(llama.generate(ids, **options), want)


FORK = """
import os, torch, transformers
from fastsae import SAE, SAEConfig
from fastsae.steering import Policy, add, attach
torch.set_num_threads(1)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)).eval()
ids = torch.tensor([[5, 6, 7, 8]])
run = lambda: model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True,
                             return_dict_in_generate=True).logits[-1]
base = run()
handle = attach(model, {0: SAE(SAEConfig(32, 64, "relu"))})
handle.set(Policy(add(3, 9.0)))
steered = run()
child = os.fork()
if child == 0:
    same = torch.equal(run(), steered) and not torch.equal(steered, base)
    handle.set(None)
    os._exit(0 if same and torch.equal(run(), base) else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(run(), steered)  # what the child sets is the child's own
print("child", code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_steers_and_sets_for_itself():
    run = subprocess.run([sys.executable, "-P", "-c", FORK], capture_output=True, text=True)
    assert run.stdout.strip() == "child 0", run.stderr


def test_two_handles_share_a_model_and_part_in_any_order(llama, sae, make_sae, logits, everywhere):
    other, base = make_sae(hook=None), logits(llama)
    first, second = attach(llama, {0: sae}), attach(llama, {"mlp_out.1": other})
    first.set(everywhere)
    second.set(Policy(add(3, 5.0)))
    both = logits(llama)
    first.detach()
    with steer(llama, other, Policy(add(3, 5.0)), layer="mlp_out.1"):
        pass
    alone = logits(llama)
    assert not torch.equal(alone, both) and not torch.equal(alone, base)
    with pytest.raises(FastsaeError, match=r"^handle: it is detached"):
        first.set(everywhere)
    second.detach()
    assert torch.equal(logits(llama), base)


# --- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notation", "place"),
    [
        (3, Place(3, "resid_post")),
        ("blocks.3.hook_resid_pre", Place(3, "resid_pre")),
        ("blocks.3.hook_resid_mid", Place(3, "resid_mid")),
        ("blocks.3.hook_attn_out", Place(3, "attn_out")),
        ("blocks.3.hook_mlp_out", Place(3, "mlp_out")),
        ("mlp_in.3", Place(3, "mlp_in")),
        ("layers.3.mlp", Place(3, "mlp.output")),
        ("model.layers.3.self_attn.o_proj", Place(3, "self_attn.o_proj.output")),
        ("transformer.h.3.mlp.input", Place(3, "mlp.input")),
    ],
)
def test_notations_of_places(notation, place):
    assert resolve_place(notation) == place and resolve_place(str(place)) == place


@pytest.mark.parametrize(
    "notation",
    ["blocks.3.hook_mlp_in", "blocks.3.ln2.hook_normalized", "blocks.3.attn.hook_z", "3", "", None],
)
def test_notations_that_name_no_module(notation):
    with pytest.raises(FastsaeError, match=r"^hook: cannot place"):
        resolve_place(notation)


@pytest.mark.parametrize(
    ("family", "point", "message"),
    [
        ("llama", "mlp.gate.output", "layers.0 has no module 'mlp.gate'; its parts are self_attn"),
        ("mamba", "attn_out", "MambaBlock has no attn_out: none of its parts"),
        ("gptj", "resid_mid", "attention and MLP read the same residual"),
        ("bloom", "mlp_out", "adds its own output to the residual"),
    ],
)
def test_places_that_a_layer_does_not_have(shared, family, point, message):
    with pytest.raises(FastsaeError, match=message):
        site(shared(family), 0, point)


# --- doses ---------------------------------------------------------------------------------------


def test_a_dose_is_the_relative_norm_of_the_change():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    r = torch.tensor([[3.0, 14.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert relative_change(x, r).tolist() == [2.0, float("inf"), 0.0, 0.0]
    within = clamp(x, r, 0.5)
    assert within.tolist() == [[3.0, 6.5], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert torch.equal(clamp(x, r, 3.0)[0], r[0])


def test_dose_guards(llama, sae, logits, batch):
    weak, strong = Policy(add(3, 0.5)), Policy([add(3, 40.0), calibrate(2, 3.0)])
    base = logits(llama)
    with steer(llama, sae, weak):
        mild = logits(llama)
    with steer(llama, sae, strong):
        wild = logits(llama)
    seen = {}

    def keep(module, args, output):
        seen["after"] = output.clone()

    for action in ("warn", "clamp", "refuse"):
        with attach(llama, {LAYER: sae}, dose=Dose(1.0, action)) as handle:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                handle.set(weak)
                assert torch.equal(logits(llama), mild)
            handle.set([strong, None, weak])
            if action == "warn":
                with pytest.warns(UserWarning, match=r"dose: a policy moved a token by [\d.]+ tim"):
                    got = logits(llama)
                torch.testing.assert_close(got[0], wild[0])
            elif action == "refuse":
                with pytest.raises(FastsaeError, match=r"^dose: .* above the limit of 1; lower"):
                    logits(llama)
                continue
            else:
                with llama.model.layers[LAYER].register_forward_hook(keep):
                    got = logits(llama)
                assert not torch.allclose(got[0], wild[0])
            assert torch.equal(got[1], base[1])
            torch.testing.assert_close(got[2], mild[2])
    with llama.model.layers[LAYER].register_forward_hook(keep):
        logits(llama)
        plain = seen["after"]
        with attach(llama, {LAYER: sae}, dose=Dose(0.25, "clamp")) as handle:
            handle.set(strong)
            logits(llama)
    doses = relative_change(plain, seen["after"])[batch.steered]
    torch.testing.assert_close(doses, torch.full_like(doses, 0.25), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "limit: expected a finite number above 0"),
        ((float("nan"),), "limit: expected a finite"),
        ((True,), "limit: expected a finite"),
        ((1.0, "stop"), "action: expected one of warn, clamp, refuse, got 'stop'"),
    ],
)
def test_what_is_not_a_dose(arguments, message):
    with pytest.raises(FastsaeError, match=f"^{message}"):
        Dose(*arguments)


def test_attach_takes_a_dose_and_nothing_else(llama, sae):
    with pytest.raises(FastsaeError, match=r"^dose: expected fastsae.steering.Dose"):
        attach(llama, {0: sae}, dose=0.5)


def test_top_k_membership_obeys_the_dose(llama, make_sae, batch, logits):
    own = Policy(amplify([3, 5, 9, 11, 20], 500.0, active="sae"))
    with attach(llama, {LAYER: make_sae("topk")}, dose=Dose(0.5, "refuse")) as handle:
        handle.set(own)
        with pytest.raises(FastsaeError, match=r"^dose: "):
            logits(llama)
