"""Steering several layers of tiny transformers models, and one layer several times."""

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.steering import Policy, add, attach, calibrate, steer

pytest.importorskip("transformers")

LAYER = 0


def test_nested_blocks_steer_several_layers(
    llama, sae, make_sae, batch, by_hand, everywhere, prompt, logits
):
    other = make_sae(hook="blocks.1.hook_resid_post")
    chosen = batch.steered
    with by_hand(llama, sae, 0, chosen, everywhere), by_hand(llama, other, 1, chosen, prompt):
        want = logits(llama)
    with steer(llama, sae, everywhere), steer(llama, other, prompt):
        got = logits(llama)
    torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-5)


def test_the_same_layer_twice_composes_in_order(llama, sae, logits):
    first, second = Policy(add(3, 5.0)), Policy(calibrate(3, 1.0))
    with steer(llama, sae, Policy([*first.operations, *second.operations])):
        want = logits(llama)
    with steer(llama, sae, first), steer(llama, sae, second):
        torch.testing.assert_close(logits(llama), want)
    with steer(llama, sae, second), steer(llama, sae, first):
        assert not torch.allclose(logits(llama), want)
    with attach(llama, {0: sae}) as a, attach(llama, {0: sae}) as b:
        b.set(second)
        a.set(first)
        torch.testing.assert_close(logits(llama), want)


def test_the_input_of_a_layer_is_the_output_of_the_one_before(model, make_sae, everywhere, logits):
    before = make_sae(hook="blocks.1.hook_resid_pre")
    with steer(model, make_sae(), everywhere):
        want = logits(model)
    for layer in (None, 1, "blocks.1.hook_resid_pre", "layers.1.input"):
        with steer(model, before, everywhere, layer=layer):
            assert torch.equal(logits(model), want)
    with steer(model, before, everywhere, layer=0):  # another layer: its output
        assert torch.equal(logits(model), want)


def test_one_handle_for_several_layers(llama, sae, make_sae, everywhere, prompt, logits):
    other = make_sae(hook="blocks.1.hook_resid_pre")
    with steer(llama, sae, everywhere), steer(llama, other, prompt, layer="layers.1.output"):
        want = logits(llama)
    base = logits(llama)
    with attach(llama, {0: sae, "layers.1.output": other}) as handle:
        handle.set({0: everywhere, "layers.1": [prompt] * 3})
        assert torch.equal(logits(llama), want)
        handle.set({0: everywhere})  # layers left out are off
        with steer(llama, sae, everywhere):
            pass
        assert not torch.equal(logits(llama), want)
        with pytest.raises(FastsaeError, match=r"2 layers are attached.*pass \{layer: policies\}"):
            handle.set(everywhere)
        with pytest.raises(
            FastsaeError, match=r"nothing is attached at 7, only at layers\.0\.output"
        ):
            handle.set({7: everywhere})
        handle.set(None)
        assert torch.equal(logits(llama), base)


def test_recorded_hidden_states_are_the_steered_ones(sae, build, batch):
    model = build("llama")  # its own: output_hidden_states leaves a hook on every layer
    for recorder_first in (False, True):
        with steer(model, sae, Policy(add(3, 5.0))):
            state = hidden_states(model, batch)
        want = hidden_states(model, batch).clone()
        want[batch.steered] += 5.0 * sae.W_dec[3].detach()
        assert torch.allclose(state, want), recorder_first


def hidden_states(model, batch):
    with torch.no_grad():
        out = model(batch.ids, attention_mask=batch.mask, output_hidden_states=True)
    return out.hidden_states[LAYER + 1]
