"""Mistakes in steering: one clear error each, and the model and what was set stay as they were."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastsae.errors import FastsaeError
from fastsae.steering import Policy, ablate, add, attach, steer

pytest.importorskip("transformers")

LAYER = 0
PROMPT = Policy(add([4, 5], 4.0), phase="prompt", norm="preserve")


@pytest.mark.parametrize("where", ["body", "model"])
def test_an_exception_leaves_the_model_as_it_was(
    llama, sae, where, logits, everywhere, batch, assert_clean
):
    base = logits(llama)
    with pytest.raises((RuntimeError, IndexError)), steer(llama, sae, everywhere):
        if where == "body":
            raise RuntimeError("the caller's own")
        logits(llama, batch.ids + llama.config.vocab_size)
    assert_clean(llama)
    assert torch.equal(logits(llama), base)


def test_a_batch_of_another_size_is_refused(llama, sae, everywhere, generate, logits, batch):
    with steer(llama, sae, [everywhere, None]):
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but the batch has 3 rows"):
            logits(llama)
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but the batch has 3 rows"):
            generate(llama)
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but the batch has 4 rows"):
            logits(llama, batch.ids.repeat(2, 1)[:4], None)  # only generate repeats rows
        logits(llama, batch.ids[:2], batch.mask[:2])


@pytest.mark.parametrize(
    "use,message",
    [
        (
            lambda m, make: attach(m, {2: make()}),
            "layer: got 2, LlamaForCausalLM has layers 0 to 1",
        ),
        (
            lambda m, make: attach(m, {0: make(), "layers.0": make()}),
            "saes: 'layers.0' names the",
        ),
        (lambda m, make: attach(m, {0: None}), "saes: expected a fastsae.SAE for 0, got NoneType"),
        (lambda m, make: attach(m, {}), "saes: expected at least one"),
        (lambda m, make: attach(m, make(hook=None)), "layer: this SAE does not say where"),
        (lambda m, make: attach(m, make(hook="blocks.0.hook_mlp_in")), "hook: cannot place"),
        (lambda m, make: attach(m, make(width=16)), "sae: reads 16 dimensions, Llama.* has 32"),
        (lambda m, make: attach(m, make(), max_features=0), "max_features: expected a positive"),
        (lambda m, make: attach(nn.Linear(2, 2), make()), "model: found no list of decoder layers"),
    ],
)
def test_what_cannot_be_attached(llama, make_sae, use, message):
    with pytest.raises(FastsaeError, match=f"^{message}"):
        use(llama, make_sae)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"policies": []}, "policies: expected a Policy, a list of them, or None"),
        ({"policies": "calm"}, "policies: expected a Policy"),
        ({"policies": [None, add(1, 1.0)]}, r"policies\[1\]: expected a Policy or None"),
        ({"policies": [None, PROMPT], "strengths": [1.0]}, "strengths: got 1 for 2 policies"),
        ({"policies": PROMPT, "strengths": float("nan")}, r"strengths\[0\]: expected a finite"),
        ({"policies": PROMPT, "prompt_lengths": [-1]}, r"prompt_lengths\[0\]: expected an integer"),
        ({"policies": Policy(ablate(99))}, r"policy \w+: operations\[0\].features: 99 is out of"),
        ({"policies": Policy(ablate(range(9)))}, "max_features: .* needs 9"),
        ({"policies": [Policy(add(1, c)) for c in (1, 2, 3, 4, 5)]}, "max_policies: "),
    ],
)
def test_a_set_that_fails_keeps_what_was_set(llama, sae, arguments, message, everywhere, logits):
    with attach(llama, {LAYER: sae}, max_features=8, max_policies=4) as handle:
        handle.set([everywhere, None, PROMPT], strengths=[1, 2, 3])
        before = logits(llama)
        with pytest.raises(FastsaeError, match=f"^{message}"):
            handle.set(**arguments)
        assert torch.equal(logits(llama), before)
    with pytest.raises(FastsaeError, match=r"^handle: it is detached"):
        handle.set(None)
    handle.detach()


def test_one_bad_layer_keeps_all_layers(llama, sae, make_sae, everywhere, logits):
    with attach(llama, {0: sae, 1: make_sae(hook=None)}) as handle:
        handle.set({0: everywhere, 1: PROMPT})
        before = logits(llama)
        with pytest.raises(FastsaeError, match="99 is out of range"):
            handle.set({0: PROMPT, 1: Policy(ablate(99))})
        assert torch.equal(logits(llama), before)


def test_a_required_policy_that_was_not_applied_stops_generate(sae, build, generate, everywhere):
    model = build("llama")
    model.config.num_hidden_layers = 1  # LlamaModel then never calls its second layer
    calm = Policy(add(1, 1.0), name="calm", required=True)
    with steer(model, sae, calm, layer=1):
        with pytest.raises(
            FastsaeError, match=r"policy calm is required, but layers.1.output never"
        ):
            generate(model)
    with steer(model, sae, everywhere, layer=1), pytest.warns(UserWarning, match="never ran"):
        generate(model)
    with steer(model, sae, calm, layer=0):
        generate(model)


def test_a_packed_forward_without_a_manager_is_refused(llama, sae, logits, batch):
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)}
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with steer(llama, sae, PROMPT), pytest.raises(FastsaeError, match=r"made before attach"):
        logits(llama, batch.ids[1:2], None, position_ids=positions, **packed)


def test_what_others_put_around_generate_survives(llama, sae, everywhere, generate):
    calls = []
    original = llama.generate
    llama.generate = lambda *a, **k: calls.append(1) or original(*a, **k)
    ours = llama.__dict__["generate"]
    with steer(llama, sae, everywhere):
        generate(llama)
    assert llama.__dict__["generate"] is ours and calls == [1]
    del llama.generate


def test_transformers_is_never_imported():
    code = "import sys, fastsae.steering; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
