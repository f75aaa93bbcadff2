"""A transcoder is steered as a pair: features of the MLP's input change the MLP's output."""

import dataclasses

import pytest
import torch

from fastsae import SAE, SAEConfig
from fastsae.errors import FastsaeError
from fastsae.places import site
from fastsae.steering import (
    Dose,
    Policy,
    ablate,
    add,
    amplify,
    attach,
    calibrate,
    enforce,
    gate,
    steer,
)

pytest.importorskip("transformers")

D, F, LAYER = 32, 64, 1
READS, WRITES = "mlp_in.1", "mlp_out.1"
PLAIN = Policy([add([1, 2], 3.0), amplify([3, 4, 5], 2.0), ablate(range(6, 20))])
CALIBRATED = Policy([calibrate([1, 2, 3], 2.0), calibrate(range(4, 30), 0.7, mode="floor")])
GATED = Policy(amplify(range(30), 1.5), gate=gate(range(8), 0.45))
OWN = Policy([ablate(40), amplify(range(30), 2.0, active="sae"), add(50, 1.0)])


def transcoder(activation="relu", normalization="none", reads=READS, writes=WRITES, **more):
    torch.manual_seed(3)
    config = SAEConfig(
        D,
        F,
        activation,
        6 if activation == "topk" else None,
        apply_b_dec_to_input=False,
        hook_name=reads,
        hook_name_out=writes,
        normalization=normalization,
        skip=True,
        **({"d_out": D} | more),
    )
    sae = SAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(F, sae.config.d_out))
        sae.b_enc.copy_(torch.randn(F) * 0.3)
        sae.W_skip.copy_(torch.randn(sae.W_skip.shape))
        if sae.config.has_threshold:
            sae.threshold.fill_(0.4)
    return sae


@torch.no_grad()
def definition(sae, policy, x, y, strength=1.0):
    """One token in float64, one feature at a time, from nothing but the weights."""
    x = x - x.mean() if sae.config.normalization == "center" else x
    h = [(sae.W_enc[f].double() @ x + sae.b_enc[f].double()).item() for f in range(F)]
    if policy.gate is not None:
        means = [max(h[f], 0.0) for f in policy.gate.features]
        if sum(means) / len(means) < policy.gate.above:
            return y
    largest = sorted(h, reverse=True)[: sae.config.k or F]
    for o in policy.operations:
        values = getattr(o, o.per_feature or "", (-1.0,) * len(o.features))
        for f, c in zip(o.features, values, strict=True):
            a = max(h[f], 0.0)
            if getattr(o, "active", "relu") == "sae":
                above = h[f] > sae.threshold[f] if sae.config.has_threshold else h[f] >= largest[-1]
                a = a if above else 0.0
            if o.op == "calibrate":
                change = max(c - a, 0.0) if o.mode == "floor" else c - a
            else:
                change = c if o.op == "add" else c * a
            y = y + strength * change * sae.W_dec[f].double()
    return y


@pytest.fixture
def by_hand():
    """Hooks that keep the MLP's input and edit its output, tokens `chosen` [B, T] in float64."""

    def by_hand(model, sae, chosen, policies, strengths):
        module_in, _ = site(model, LAYER, "mlp_in")
        module_out, _ = site(model, LAYER, "mlp_out")
        kept = []

        def keep(module, args):
            kept[:] = [args[0].clone()]

        def edit(module, args, output):
            output = output.clone()
            for row, token in chosen.nonzero().tolist():
                if policies[row] is not None:
                    x, y = kept[0][row, token].double(), output[row, token].double()
                    output[row, token] = definition(sae, policies[row], x, y, strengths[row])
            return output

        hooks = module_in.register_forward_pre_hook(keep), module_out.register_forward_hook(edit)
        return lambda: [hook.remove() for hook in hooks]

    return by_hand


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_policies_change_the_output_by_features_of_the_input(
    family, activation, shared, logits, batch, by_hand
):
    model, sae = shared(family), transcoder(activation)
    base = logits(model)
    for policies in ([PLAIN, None, CALIBRATED], [GATED, OWN, None]):
        strengths = [1.0, 0.5, 2.0]
        undo = by_hand(model, sae, batch.steered, policies, strengths)
        want = logits(model)
        undo()
        with attach(model, sae) as handle:
            torch.testing.assert_close(logits(model), base, rtol=0, atol=0)  # idle
            handle.set(policies, strengths=strengths)
            got = logits(model)
            counts = handle.counts()[WRITES]
        torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-4)
        for row, policy in enumerate(policies):
            assert counts[row] == (0 if policy is None else int(batch.steered[row].sum()))
            if policy is not GATED:  # its gate may be closed for a whole row
                assert torch.equal(got[row], base[row]) == (policy is None)


def test_the_gate_was_open_for_some_tokens_and_closed_for_others(shared, batch, logits):
    model, sae = shared("llama"), transcoder()
    module, _ = site(model, LAYER, "mlp_in")
    kept = []
    hook = module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    logits(model)
    hook.remove()
    x, zero = kept[0][batch.steered].double(), torch.zeros(D).double()
    moved = [bool(definition(sae, GATED, row, zero).norm() > 0) for row in x]
    assert 0 < sum(moved) < len(moved)


def test_a_centring_transcoder(shared, logits, batch, by_hand):
    model, sae = shared("llama"), transcoder("relu", "center")
    undo = by_hand(model, sae, batch.steered, [PLAIN] * 3, [1.0] * 3)
    want = logits(model)
    undo()
    with steer(model, sae, PLAIN):
        got = logits(model)
    torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-4)


def test_cached_and_recomputed_generation_agree_and_phases_hold(shared, generate, batch):
    model, sae = shared("llama"), transcoder("topk")
    policies = [
        OWN,
        dataclasses.replace(PLAIN, phase="generated"),
        dataclasses.replace(CALIBRATED, phase="prompt"),
    ]
    with attach(model, sae) as handle:
        handle.set(policies)
        tokens, want = generate(model)
        counted = handle.counts()[WRITES]
        recomputed, got = generate(model, use_cache=False)
        assert torch.equal(tokens, recomputed)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counted == [4 - 1 + 4, 4, 5 - 1]  # a prompt less its first token; n − 1 of 5 tokens


def test_it_reads_what_other_handles_leave_at_its_input(shared, logits, batch, by_hand, make_sae):
    model, sae = shared("llama"), transcoder()
    other = make_sae(hook=READS)
    with steer(model, other, Policy(add(3, 4.0))):
        undo = by_hand(model, sae, batch.steered, [PLAIN] * 3, [1.0] * 3)
        want = logits(model)  # the plain hook comes later in line than ours
        undo()
    with steer(model, sae, PLAIN), steer(model, other, Policy(add(3, 4.0))):
        got = logits(model)
    torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-4)


def test_compiled_batched_and_clamped(build, logits, batch, count_compiles):
    model, sae = build("llama"), transcoder()
    with attach(model, sae, dose=Dose(0.05, "clamp")) as handle:
        handle.set([PLAIN, None, CALIBRATED])
        module, _ = site(model, LAYER, "mlp_out")
        seen = []
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
        want = logits(model)
        handle.set(None)
        logits(model)
        hook.remove()
        r, y = (each[0][batch.steered[0]] for each in seen)
        change = (r - y).norm(dim=-1) / y.norm(dim=-1)
        torch.testing.assert_close(change, torch.full_like(change, 0.05), rtol=1e-3, atol=1e-4)
        handle.set([PLAIN, None, CALIBRATED])
        compiled, _ = count_compiles(model)
        got = compiled(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_generate_batch(shared, batch):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, sae = shared("llama"), transcoder()
    prompts = [batch.ids[row][batch.real[row]].tolist() for row in range(3)]
    policies = [PLAIN, None, CALIBRATED]
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    config = ContinuousBatchingConfig(allow_block_sharing=False, num_blocks=16, page_size=8)
    with attach(model, sae) as handle:
        wanted = []
        for prompt, policy in zip(prompts, policies, strict=True):
            handle.set(policy)
            out = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
            wanted.append(out[0, len(prompt) :].tolist())
        handle.set(policies)
        results = model.generate_batch(
            prompts, generation_config=options, continuous_batching_config=config
        )
    got = sorted(results.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
    assert [result.generated_tokens for _, result in got] == wanted


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Policy(enforce(1, 2.0)), r"operations\[0\]\.op: enforce keeps the length"),
        (Policy(add(1, 2.0), norm="preserve"), r"norm: 'preserve' keeps the length"),
        (Policy([ablate([1, 2]), add(2, 1.0)]), r"operations\[1\]\.features: 2 is in an earlier"),
    ],
)
def test_a_policy_without_one_meaning_is_refused(llama, policy, text):
    with attach(llama, transcoder()) as handle, pytest.raises(FastsaeError, match=text):
        handle.set(policy)


@pytest.mark.parametrize(
    ("given", "layer", "text"),
    [
        ({"writes": None}, None, "does not say where it reads and writes"),
        ({"reads": None}, 1, "does not say where it reads and writes"),
        ({}, 0, r"layer: got 0, but this transcoder writes at mlp_out\.1"),
        ({}, "mlp_in.1", r"layer: got 'mlp_in\.1', but"),
        ({"d_out": D + 1}, None, rf"sae: writes {D + 1} dimensions, \w+ has {D}"),
        ({"normalization": "layer_norm"}, None, "needs a plain autoencoder"),
        ({"reads": "layers.1.nothing.input"}, None, "has no module 'nothing'"),
    ],
)
def test_a_transcoder_that_cannot_be_placed_is_refused(llama, given, layer, text):
    sae = transcoder(**given)
    with pytest.raises(FastsaeError, match=text):
        attach(llama, sae if layer is None else {layer: sae})


@pytest.mark.parametrize("reads", ["layers.1.output", WRITES])
def test_an_input_that_does_not_come_before_the_output_stops_the_forward(llama, reads, logits):
    with (
        steer(llama, transcoder(reads=reads), PLAIN),
        pytest.raises(FastsaeError, match="input never passed at"),
    ):
        logits(llama)


def test_a_trace_of_a_transcoder_is_refused(llama):
    with (
        attach(llama, transcoder()) as handle,
        pytest.raises(FastsaeError, match=r"^trace: mlp_out\.1 is"),
    ):
        handle.trace(1).__enter__()


def test_watching_a_transcoder_is_refused(llama):
    with pytest.raises(FastsaeError, match="watch: a transcoder's activations"):
        attach(llama, transcoder(), watch=True)
