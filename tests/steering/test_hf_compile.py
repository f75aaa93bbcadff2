"""Steering models that are compiled after attach; one compiled before is refused."""

import pytest
import torch
from torch import nn

from fastsae.errors import FastsaeError
from fastsae.steering import Policy, add, amplify, attach, steer

transformers = pytest.importorskip("transformers")

D, LAYER = 32, 0
REQUIRED = Policy(add(1, 2.0), name="calm", required=True)


@pytest.fixture
def compiled_generate(generate):
    def compiled_generate(model, **more):
        config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
        config._compile_all_devices = True  # by default only accelerators compile
        return generate(model, cache_implementation="static", compile_config=config, **more)

    return compiled_generate


def test_generate_that_compiles_itself(
    sae, count_compiles, build, compiled_generate, batch, generate
):
    model = build("gemma3")
    base = compiled_generate(model)  # a graph without hooks exists already
    for policies in (batch.policies, batch.policies[::-1]):
        with steer(model, sae, policies) as handle:
            want, counted = generate(model), handle.counts()
            handle.set(policies)
            got = compiled_generate(model)
            assert handle.counts() == counted and sum(counted["layers.0.output"]) > 10
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_generate(model)[1], base[1])


@pytest.mark.parametrize("lost", ["layer", "all"])
def test_a_required_policy_that_a_compiled_generate_loses_stops_it(
    count_compiles, sae, build, compiled_generate, lost
):
    model = build("llama")
    with attach(model, {LAYER: sae}) as handle:
        handle.set(REQUIRED)
        compiled_generate(model)
        steered = handle.counts()
        assert sum(steered["layers.0.output"]) > 10
        torch._dynamo.reset()
        # Someone takes the hooks away: those of the layer, or those that notice it, too.
        model.model.layers[LAYER]._forward_hooks.clear()
        if lost == "all":
            model.model._forward_pre_hooks.clear()
            model.model._forward_hooks.clear()
        with pytest.raises(FastsaeError, match=r"policy calm is required, but layers\.0\.output"):
            compiled_generate(model)
        assert handle.counts() == steered
        handle.set(None)
        compiled_generate(model)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_required_policy_that_a_graph_does_not_reach_stops_it(sae, fullgraph):
    model, x = Small(), torch.randn(1, 3, D)
    base, model.run = model(x), 1  # the forward leaves its second layer out
    torch._dynamo.reset()
    with attach(model, {1: sae}) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        want = compiled(x)  # the graph exists before the policy
        handle.set(REQUIRED)
        # A whole graph has no room for an error: dynamo then says that it met one.
        with pytest.raises(FastsaeError if not fullgraph else Exception) as caught:
            compiled(x)
        assert isinstance(caught.value, (FastsaeError, torch._dynamo.exc.Unsupported))
        assert fullgraph or "policy calm is required, but layers.1.output" in str(caught.value)
        handle.set(None)
        assert torch.equal(compiled(x), want)
        model.run = 2
        handle.set(REQUIRED)
        assert not torch.equal(compiled(x), base)
    torch._dynamo.reset()


class Small(nn.Module):
    """The least that can be steered; a real model takes seconds to trace."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.run = 2

    def forward(self, inputs_embeds, attention_mask=None):
        for layer in self.layers[: self.run]:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


@torch.no_grad()
def test_a_model_compiled_after_attach_follows_every_set(
    count_compiles, make_sae, everywhere, batch, generated, prompt
):
    sae, x = make_sae("topk"), torch.randn(3, 6, D)
    staged = Policy([*everywhere.operations, amplify(range(20), 2.0, active="sae")])
    count_compiles(Small())[0](x, batch.mask)  # a graph of the same class, without hooks
    model = Small()
    base, wanted = model(x, batch.mask), {}
    for policy in (*batch.policies, staged):
        with steer(model, sae, policy):
            wanted[policy] = model(x, batch.mask)
    assert torch.equal(wanted[generated], base)  # outside generate, all is prompt
    with attach(model, {LAYER: sae}) as handle:
        compiled, counter = count_compiles(model)
        for policy in (
            None,
            everywhere,
            prompt,
            staged,
            None,
            generated,
            everywhere,
            prompt,
            staged,
        ):
            handle.set(policy)
            want = base if policy is None else wanted[policy]
            torch.testing.assert_close(compiled(x, batch.mask), want)
        assert counter.frame_count == 4  # off; one policy, with and without a phase; staged
        handle.set([None, everywhere, prompt])
        graphs = counter.frame_count
        for rows in (
            [prompt, None, everywhere],
            [None, None, prompt],
            [generated, prompt, everywhere],
        ):
            handle.set(rows)
            for row, policy in enumerate(rows):
                want = base if policy is None else wanted[policy]
                torch.testing.assert_close(compiled(x, batch.mask)[row], want[row])
        assert counter.frame_count == graphs + 1
        with attach(model, {1: make_sae()}) as second:  # even this late, if not through `compiled`
            second.set(everywhere)
            torch.testing.assert_close(compiled(x, batch.mask), model(x, batch.mask))
    torch.testing.assert_close(compiled(x, batch.mask), base)


@pytest.mark.parametrize("how", ["wrapper", "in place", "forward", "trunk", "layer"])
def test_a_compiled_model_is_refused(sae, how, build, everywhere):
    model = build("llama")
    given = model
    if how == "wrapper":
        given = torch.compile(model)
    elif how == "in place":
        model.compile()
    elif how == "forward":
        model.forward = torch.compile(model.forward)
    elif how == "trunk":
        model.model = torch.compile(model.model)
    else:
        model.model.layers[1].compile()
    for use in (lambda: attach(given, {0: sae}), lambda: steer(given, sae, everywhere).__enter__()):
        with pytest.raises(
            FastsaeError, match=r"^model: Llama\w+ is compiled already.*compile after"
        ):
            use()
