"""Random policies against the definition of every operation, one token and feature at a time."""

import random

import pytest
import torch
from torch import nn

from fastsae import SAE, FeatureStats, SAEConfig
from fastsae.steering import (
    Policy,
    ablate,
    add,
    amplify,
    attach,
    calibrate,
    enforce,
    gate,
)

D, F = 32, 64
LENGTHS = (3, 7, 5, 1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


class Stream(nn.Module):
    """A residual stream and nothing else: what comes out is what the hooks made of it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, inputs_embeds, attention_mask=None, past_key_values=None):
        return self.layers[0](inputs_embeds)


@pytest.fixture(scope="module", params=["relu", "topk", "jumprelu"])
def sae(request):
    torch.manual_seed(1)
    sae = SAE(SAEConfig(D, F, request.param, 6 if request.param == "topk" else None))
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(F) * 0.3)
        sae.b_dec.copy_(torch.randn(D) * 0.3)
        if sae.config.has_threshold:
            sae.threshold.copy_(torch.rand(F))
    sae.stats = FeatureStats(torch.rand(F), torch.rand(F) + 0.1, torch.rand(F) + 2, 100)
    return sae


def some_policy(draw: random.Random) -> Policy:
    def features():
        return draw.sample(range(F), draw.randint(1, 6))

    def numbers(listed):
        return [draw.uniform(-2, 3) for _ in listed]

    operations = []
    for _ in range(draw.randint(1, 4)):
        f, unit = features(), draw.choice(["raw", "max", "mean"])
        operations.append(
            draw.choice(
                [
                    lambda f=f: amplify(f, numbers(f), active=draw.choice(["relu", "sae"])),
                    lambda f=f: ablate(f),
                    lambda f=f, u=unit: calibrate(f, numbers(f), unit=u),
                    lambda f=f, u=unit: calibrate(f, numbers(f), mode="floor", unit=u),
                    lambda f=f, u=unit: add(f, numbers(f), unit=u),
                    lambda f=f: enforce(f, draw.uniform(0.2, 3)),
                ]
            )()
        )
    return Policy(
        operations,
        phase=draw.choice(["all", "prompt", "generated"]),
        gate=gate(features(), above=draw.uniform(0, 1)) if draw.random() < 0.4 else None,
        norm=draw.choice([None, "preserve"]),
    )


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_random_batches_of_random_policies(sae, oracle, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, x = Stream(), torch.randn(4, max(LENGTHS), D)
    mask = torch.zeros(4, max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        left = draw.random() < 0.5  # padding on either side
        mask[row, -length:] = 1 if left else 0
        mask[row, :length] = 1 if not left else mask[row, :length]
    prompts = [draw.randint(0, length) for length in LENGTHS]
    with attach(model, {0: sae}) as handle:
        for first_rows in (True, False):
            rows = [some_policy(draw) if draw.random() < 0.8 else None for _ in LENGTHS]
            strengths = [draw.choice([0.0, 0.5, 1.0, 1.7]) for _ in LENGTHS]
            handle.set(rows, strengths=strengths, prompt_lengths=prompts)
            got = model(x, attention_mask=mask)
            want, expected = x.clone(), []
            for row, policy in enumerate(rows):
                real = mask[row].nonzero()[:, 0].tolist()
                expected.append(0)
                for position, token in enumerate(real):
                    if policy is None or strengths[row] == 0 or position == 0:
                        continue
                    phase = "generated" if position >= prompts[row] else "prompt"
                    if policy.phase in ("all", phase):
                        expected[-1] += 1
                        want[row, token] = oracle(
                            sae, policy, x[row, token].double(), strengths[row]
                        ).float()
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
            untouched = torch.ones(4, max(LENGTHS), dtype=torch.bool)
            for row, policy in enumerate(rows):
                if policy is not None and strengths[row]:
                    untouched[row] = mask[row] == 0
            assert torch.equal(got[untouched], x[untouched])
            assert handle.counts()["layers.0.output"] == expected, first_rows


@torch.no_grad()
def test_strengths_change_without_a_recompile(sae, oracle, count_compiles):
    model, x = Stream(), torch.randn(3, 4, D)
    policy = Policy([add([1, 2], 2.0), amplify(3, 1.0)])
    with attach(model, {0: sae}) as handle:
        handle.set([policy] * 3, strengths=[1.0, 2.0, 3.0])
        compiled, counter = count_compiles(model)
        compiled(x)
        graphs = counter.frame_count
        for strengths in ([0.1, 0.2, 0.3], [5.0, 4.0, 3.0], [-1.0, 1.0, 2.5]):
            handle.set([policy] * 3, strengths=strengths)
            got = compiled(x)
            for row, strength in enumerate(strengths):
                want = oracle(sae, policy, x[row, 2].double(), strength).float()
                torch.testing.assert_close(got[row, 2], want, rtol=2e-4, atol=2e-4)
            assert handle.counts()["layers.0.output"] == [3, 3, 3]  # graphs count too
        assert counter.frame_count == graphs
