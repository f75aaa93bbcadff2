"""Steering tiny random transformers models: which tokens are steered, however the model runs."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastsae import SAE, SAEConfig
from fastsae.errors import FastsaeError
from fastsae.steering import (
    Policy,
    ablate,
    add,
    amplify,
    attach,
    calibrate,
    enforce,
    gate,
    hf,
    site,
    steer,
)

transformers = pytest.importorskip("transformers")

D, F, VOCAB, LAYER = 32, 64, 97, 0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # residuals of a length that makes features fire
}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"sliding_window": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", SIZES),
    "falcon": ("FalconConfig", "FalconForCausalLM", SIZES),  # falcon, bloom and gptj return tuples
    "bloom": ("BloomConfig", "BloomForCausalLM", SIZES | {"n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", "MambaForCausalLM", SIZES | {"state_size": 4}),  # no positions at all
    "gptj": ("GPTJConfig", "GPTJForCausalLM", SIZES | {"rotary_dim": 4}),
}

PADDED = torch.tensor([[0, 0, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [0, 9, 8, 7, 6, 3]])
MASK = (PADDED != 0).long()
LENGTHS = [4, 6, 5]
NEW = 5

EVERYWHERE = Policy([add([1, 2], 4.0), calibrate(3, 2.0)])
PROMPT = Policy(add([4, 5], 4.0), phase="prompt", norm="preserve")
GENERATED = Policy([add([6, 7], 4.0), ablate(8)], phase="generated")
POLICIES = [EVERYWHERE, PROMPT, GENERATED]


def build(family: str, seed: int = 0) -> nn.Module:
    config, model, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    model.generation_config.eos_token_id = None  # a random model must not stop early
    return model


shared = functools.cache(build)


@pytest.fixture(params=FAMILIES)
def model(request):
    model = shared(request.param)
    yield model
    assert_clean(model)


@pytest.fixture
def llama():
    model = shared("llama")
    yield model
    assert_clean(model)


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def make_sae(activation="relu", hook="blocks.0.hook_resid_post", width=D):
    torch.manual_seed(1)
    k = 6 if activation == "topk" else None
    sae = SAE(SAEConfig(width, F, activation, k, hook_name=hook))
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(F) * 0.3)
        sae.b_dec.copy_(torch.randn(width) * 0.3)
    return sae


def trunk_and_layers(model):
    trunk = model.base_model
    return trunk, trunk.h if hasattr(trunk, "h") else trunk.layers


def assert_clean(model):
    trunk, layers = trunk_and_layers(model)
    assert type(layers) is nn.ModuleList and "_fastsae_host" not in trunk.__dict__
    assert "generate" not in model.__dict__
    for module in (trunk, *layers):
        assert not [h for h in module._forward_pre_hooks.values() if "fastsae" in h.__module__]
        assert not [h for h in module._forward_hooks.values() if "fastsae" in h.__module__]


@torch.no_grad()
def logits(model, ids=PADDED, mask=MASK, **more):
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits


def generate(model, ids=PADDED, mask=MASK, **more):
    """(tokens [B, NEW], their logits [B, NEW, V])"""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True} | more
    if mask is not None:
        options["attention_mask"] = mask
    out = model.generate(ids, return_dict_in_generate=True, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def by_hand(model, sae, layer, chosen, *policies):
    """A context in which a plain hook edits the tokens `chosen` [B, T], one by one, in float64."""

    def edit(module, args, output):
        residual = (output[0] if isinstance(output, tuple) else output).clone()
        for row, token in chosen.nonzero().tolist():
            policy = policies[row if len(policies) > 1 else 0]
            if policy is not None:
                residual[row, token] = definition(sae, policy, residual[row, token].double())
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    return Removing(trunk_and_layers(model)[1][layer].register_forward_hook(edit))


class Removing:
    def __init__(self, *handles):
        self.handles = handles

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


def definition(sae, policy, x):
    """One token, one feature at a time."""
    with torch.no_grad():
        W, dec, b, b_dec = (p.double() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
        r = x.clone()
        if policy.gate is not None:
            means = [(W[f] @ (x - b_dec) + b[f]).relu() for f in policy.gate.features]
            if sum(means) / len(means) < policy.gate.above:
                return r
        for o in policy.operations:
            h = W @ (r - b_dec) + b
            acts = h.relu()
            if getattr(o, "active", "relu") == "sae":
                acts = torch.where(h >= h.topk(sae.config.k).values[-1], acts, 0)
            value = getattr(o, o.per_feature or "", (-1.0,) * len(o.features))
            if o.op == "enforce":
                v = torch.stack([(o.magnitude - acts[f]).relu() for f in o.features])
                moved = r + o.magnitude * (v / v.sum()) @ dec[list(o.features)]
                r = moved * r.norm() / moved.norm() if v.sum() > 0 else r
                continue
            change = torch.zeros_like(r)
            for f, c in zip(o.features, value, strict=True):
                a = acts[f]
                change += dec[f] * {"add": c, "calibrate": c - a}.get(o.op, c * a)
            r = r + change
        return r * x.norm() / r.norm() if policy.norm == "preserve" else r


def steered_tokens(rows=3, columns=PADDED.shape[1]):
    """[B, T]: every real token but each row's first one."""
    return MASK.bool() & (MASK.cumsum(1) > 1)


class Counter:
    """Counts, per batch row, the tokens that reach the steer op in a slot other than 0."""

    def __init__(self, monkeypatch):
        self.rows, real = 0, site.steer

        def counting(residual, slots, strengths, table):
            self.rows = self.rows + (slots != 0).sum(1)
            return real(residual, slots, strengths, table)

        monkeypatch.setattr(site, "steer", counting)


# --- every family --------------------------------------------------------------------------------


def test_a_forward_steers_all_real_tokens_but_the_first(model, sae):
    base = logits(model)
    with by_hand(model, sae, LAYER, steered_tokens(), EVERYWHERE):
        want = logits(model)
    with steer(model, sae, EVERYWHERE):
        got = logits(model)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-5)
    assert (got - base).abs()[MASK.bool()].max() > 1e-3
    assert torch.equal(logits(model), base)


def test_generation_steers_the_phases_token_by_token(model, sae):
    tokens, _ = generate(model)
    with steer(model, sae, POLICIES):
        tokens, got = generate(model)
    # Recompute from scratch what the cache should have held, with a hook that knows the columns.
    ids = torch.cat([PADDED, tokens], 1)[:, :-1]
    mask = torch.cat([MASK, torch.ones_like(tokens)], 1)[:, :-1]
    chosen = mask.bool() & (mask.cumsum(1) > 1)
    chosen[1, PADDED.shape[1] :] = False  # PROMPT
    chosen[2, : PADDED.shape[1]] = False  # GENERATED
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with by_hand(model, sae, LAYER, chosen, *POLICIES):
        want = logits(model, ids, mask, **({} if "Bloom" in type(model).__name__ else positions))
    torch.testing.assert_close(got, want[:, PADDED.shape[1] - 1 :], rtol=1e-4, atol=1e-5)


def test_the_cache_changes_nothing(model, sae):
    with steer(model, sae, POLICIES):
        cached_tokens, cached = generate(model)
        tokens, plain = generate(model, use_cache=False)
    assert torch.equal(tokens, cached_tokens)
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


def test_a_padded_row_is_steered_like_the_row_alone(model, sae):
    with steer(model, sae, POLICIES):
        _, together = generate(model)
    for row, policy in enumerate(POLICIES):
        ids = PADDED[row : row + 1, -LENGTHS[row] :]
        with steer(model, sae, policy):
            _, alone = generate(model, ids, None)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_rows_without_a_policy_are_bit_identical(model, sae):
    base, base_logits = logits(model), generate(model)[1]
    with attach(model, {LAYER: sae}) as handle:
        assert torch.equal(logits(model), base)  # idle
        for policies, kept in (([None, EVERYWHERE, None], [0, 2]), ([PROMPT, None, None], [1, 2])):
            handle.set(policies)
            assert torch.equal(logits(model)[kept], base[kept])
            _, got = generate(model)
            assert torch.equal(got[kept], base_logits[kept])
            assert not torch.equal(got, base_logits)
        handle.set([EVERYWHERE] * 3, strengths=[0, 1.0, 0.0])
        assert torch.equal(logits(model)[[0, 2]], base[[0, 2]])
        handle.set(None)
        assert torch.equal(logits(model), base)


def test_each_token_is_steered_exactly_once(model, sae, monkeypatch):
    counter = Counter(monkeypatch)
    with steer(model, sae, POLICIES):
        generate(model)
    # The last sampled token is never fed back, and the first real one is left alone.
    assert counter.rows.tolist() == [LENGTHS[0] - 1 + NEW - 1, LENGTHS[1] - 1, NEW - 1]


def test_the_generated_phase_leaves_the_first_token_alone(model, sae):
    _, base = generate(model)
    with steer(model, sae, GENERATED):
        _, got = generate(model)
    assert torch.equal(got[:, 0], base[:, 0])
    assert not torch.allclose(got[:, 1], base[:, 1])


def test_an_idle_hook_returns_the_layers_own_output(model, sae):
    layer, seen = trunk_and_layers(model)[1][LAYER], []
    watch = functools.partial(layer.register_forward_hook, lambda m, a, out: seen.append(out))
    with attach(model, {LAYER: sae}) as handle, Removing(watch(prepend=True), watch()):
        handle.set(None)
        logits(model)
        assert seen[0] is seen[1]
        handle.set([None, None])
        assert not handle.active
        handle.set(EVERYWHERE)
        logits(model)
        assert seen[2] is not seen[3] and type(seen[2]) is type(seen[3])
        if isinstance(seen[2], tuple):
            assert all(a is b for a, b in zip(seen[2][1:], seen[3][1:], strict=True))


# --- operations ----------------------------------------------------------------------------------

OPERATIONS = {
    "amplify": Policy(amplify(range(8), [1.5, -0.5] * 4)),
    "ablate": Policy(ablate(range(8))),
    "calibrate": Policy(calibrate([1, 2], [0.0, 3.0])),
    "enforce": Policy(enforce([6, 7, 8], 1.5)),
    "order": Policy([add(3, 2.0), amplify(3, 1.0), ablate(4), calibrate(4, 0.5)]),
    "gate": Policy(add(3, 2.0), gate=gate([1, 2], above=0.3)),
    "norm": Policy([add(3, 5.0), amplify(2, 1.0)], norm="preserve"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_reach_the_model(llama, sae, name):
    policy = OPERATIONS[name]
    with by_hand(llama, sae, LAYER, steered_tokens(), policy):
        want = logits(llama)
    with steer(llama, sae, policy):
        got = logits(llama)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, logits(llama))


@pytest.mark.parametrize("name", OPERATIONS)
def test_top_k_membership_and_plain_rows_share_a_batch(llama, name):
    sae, plain = make_sae("topk"), OPERATIONS[name]
    own = amplify([3, 5, 9, 11, 20, 21, 22], 3.0, active="sae")
    staged = Policy([*plain.operations, own], gate=plain.gate, norm=plain.norm)
    base = logits(llama)
    for rows in ([staged, None, plain], [staged, staged, staged], [None, None, staged]):
        with by_hand(llama, sae, LAYER, steered_tokens(), *rows):
            want = logits(llama)
        with steer(llama, sae, rows):
            got = logits(llama)
        torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-5)
        kept = [row for row, policy in enumerate(rows) if policy is None]
        assert torch.equal(got[kept], base[kept])
    with steer(llama, sae, [staged, plain, None]):
        tokens, scores = generate(llama, num_return_sequences=1)
        plainly = generate(llama, use_cache=False)
    assert torch.equal(tokens, plainly[0])
    torch.testing.assert_close(scores, plainly[1], rtol=1e-4, atol=1e-5)


def test_strength_scales_each_row(llama, sae):
    with steer(llama, sae, Policy(add(3, 6.0))):
        want = logits(llama)
    with steer(llama, sae, Policy(add(3, 2.0)), strength=3.0):
        torch.testing.assert_close(logits(llama), want)
    with steer(llama, sae, [Policy(add(3, 2.0))] * 3, strength=[3.0, 1.5, 6.0]):
        got = logits(llama)
    torch.testing.assert_close(got[0], want[0])
    with steer(llama, sae, Policy(add(3, 3.0))):
        torch.testing.assert_close(got[1], logits(llama)[1])


def test_half_precision_models_stay_in_half_precision(sae):
    model = build("llama").to(torch.bfloat16)
    base = logits(model)
    with steer(model, sae, [EVERYWHERE, None, PROMPT]):
        got = logits(model)
    assert got.dtype == torch.bfloat16 and torch.equal(got[1], base[1])
    assert not torch.equal(got[0], base[0])


# --- layers --------------------------------------------------------------------------------------


def test_nested_blocks_steer_several_layers(llama, sae):
    other = make_sae(hook="blocks.1.hook_resid_post")
    chosen = steered_tokens()
    with by_hand(llama, sae, 0, chosen, EVERYWHERE), by_hand(llama, other, 1, chosen, PROMPT):
        want = logits(llama)
    with steer(llama, sae, EVERYWHERE), steer(llama, other, PROMPT):
        got = logits(llama)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_the_same_layer_twice_composes_in_order(llama, sae):
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


def test_the_input_of_a_layer_is_the_output_of_the_one_before(model):
    before = make_sae(hook="blocks.1.hook_resid_pre")
    with steer(model, make_sae(), EVERYWHERE):
        want = logits(model)
    for layer in (None, 1, "blocks.1.hook_resid_pre", "layers.1.input"):
        with steer(model, before, EVERYWHERE, layer=layer):
            assert torch.equal(logits(model), want)
    with steer(model, before, EVERYWHERE, layer=0):  # another layer: its output
        assert torch.equal(logits(model), want)


def test_one_handle_for_several_layers(llama, sae):
    other = make_sae(hook="blocks.1.hook_resid_pre")
    with steer(llama, sae, EVERYWHERE), steer(llama, other, PROMPT, layer="layers.1.output"):
        want = logits(llama)
    base = logits(llama)
    with attach(llama, {0: sae, "layers.1.output": other}) as handle:
        handle.set({0: EVERYWHERE, "layers.1": [PROMPT] * 3})
        assert torch.equal(logits(llama), want)
        handle.set({0: EVERYWHERE})  # layers left out are off
        with steer(llama, sae, EVERYWHERE):
            pass
        assert not torch.equal(logits(llama), want)
        with pytest.raises(FastsaeError, match=r"2 layers are attached.*pass \{layer: policies\}"):
            handle.set(EVERYWHERE)
        with pytest.raises(
            FastsaeError, match=r"nothing is attached at 7, only at layers\.0\.output"
        ):
            handle.set({7: EVERYWHERE})
        handle.set(None)
        assert torch.equal(logits(llama), base)


def test_recorded_hidden_states_are_the_steered_ones(sae):
    model = build("llama")  # its own: output_hidden_states leaves a hook on every layer
    for recorder_first in (False, True):
        with steer(model, sae, Policy(add(3, 5.0))):
            states = logits_and_states(model)
        assert torch.allclose(states[LAYER + 1], expected_state(model, sae)), recorder_first


def logits_and_states(model):
    with torch.no_grad():
        return model(PADDED, attention_mask=MASK, output_hidden_states=True).hidden_states


def expected_state(model, sae):
    state = logits_and_states(model)[LAYER + 1].clone()
    state[steered_tokens()] += 5.0 * sae.W_dec[3].detach()
    return state


# --- ways of running -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize(
    "more",
    [
        {"mask": None},  # generate finds the padding by itself
        {"prefill_chunk_size": 2},
        {"prefill_chunk_size": 2, "mask": None},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "mask": None},
        {"cache_implementation": "static", "mask": None, "prefill_chunk_size": 2},
    ],
    ids=lambda more: "-".join(more),
)
def test_prompts_and_positions_are_found(family, more, sae):
    model = shared(family)
    with steer(model, sae, POLICIES):
        want = generate(model)
        got = generate(model, **more)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert_clean(model)


def test_prompts_given_as_embeddings_or_by_position(llama, sae):
    embeds = llama.get_input_embeddings()(PADDED).detach()
    with steer(llama, sae, POLICIES):
        _, want = generate(llama)
        out = llama.generate(
            inputs_embeds=embeds,
            attention_mask=MASK,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(torch.stack(out.logits, 1), want)
        out = llama.generate(
            inputs=PADDED,
            attention_mask=MASK,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(torch.stack(out.logits, 1), want)


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
def test_a_second_turn_on_a_kept_cache(llama, sae, monkeypatch, whole):
    # The prompt is then everything up to the new turn, whether or not the caller repeats it.
    first = llama.generate(
        PADDED, attention_mask=MASK, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    ids = torch.cat([first.sequences, torch.tensor([[11, 12]] * 3)], 1)
    mask = torch.cat([MASK, torch.ones(3, 5, dtype=torch.long)], 1)
    new = ids if whole else ids[:, first.past_key_values.get_seq_length() :]
    for phase, expected in (("prompt", 3), ("generated", NEW - 1), ("all", 3 + NEW - 1)):
        counter, cache = Counter(monkeypatch), copy.deepcopy(first.past_key_values)
        with steer(llama, sae, Policy(add(3, 4.0), phase=phase)):
            llama.generate(
                new, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False
            )
        assert counter.rows.tolist() == [expected] * 3, phase
        monkeypatch.undo()


def test_a_decoding_loop_of_ones_own(llama, sae):
    with attach(llama, {LAYER: sae}) as handle, torch.no_grad():
        handle.set(POLICIES)
        tokens, want = generate(llama)
        out = llama(PADDED, attention_mask=MASK, use_cache=True)
        cache, mask, got = out.past_key_values, MASK, [out.logits[:, -1]]
        for step in range(NEW - 1):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            out = llama(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
            got.append(out.logits[:, -1])
        torch.testing.assert_close(torch.stack(got, 1), want, rtol=1e-4, atol=1e-5)
        # Chunks of a prompt look like generated tokens: then the caller says how long it is.
        handle.set(POLICIES, prompt_lengths=LENGTHS)
        head = llama(PADDED[:, :3], attention_mask=MASK[:, :3], use_cache=True)
        tail = llama(PADDED[:, 3:], attention_mask=MASK, past_key_values=head.past_key_values)
        torch.testing.assert_close(tail.logits[:, -1], want[:, 0], rtol=1e-4, atol=1e-5)
        ids, mask = torch.cat([PADDED, tokens], 1), torch.cat([MASK, torch.ones_like(tokens)], 1)
        again = logits(llama, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        torch.testing.assert_close(again[:, 5:-1], want, rtol=1e-4, atol=1e-5)


def test_a_loop_on_a_state_without_a_length_is_refused(sae):
    model, token = shared("mamba"), PADDED[1:2, :1]
    with steer(model, sae, PROMPT), torch.no_grad():
        state = model(token.expand(1, 3), use_cache=True).cache_params
        with pytest.raises(FastsaeError, match=r"^past_key_values: this cache does not tell"):
            model(token, cache_params=state)
    assert_clean(model)


def test_offloaded_weights(sae):
    accelerate = pytest.importorskip("accelerate")
    want = {}
    for policies in (POLICIES, [None, EVERYWHERE, PROMPT]):
        with steer(shared("llama"), sae, policies):
            want[tuple(policies)] = generate(shared("llama"))
    model = accelerate.cpu_offload(build("llama"), execution_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for policies, (tokens, scores) in want.items():
        with steer(model, sae, list(policies)):
            got = generate(model)
        assert torch.equal(got[0], tokens) and torch.equal(got[1], scores)


def test_a_table_follows_its_layer_to_another_device(llama, sae, monkeypatch):
    monkeypatch.setattr(hf, "_device", lambda layer: torch.device("meta"))
    with attach(llama, {LAYER: sae}) as handle:
        handle.set([EVERYWHERE, None, PROMPT])
        got = logits(llama)
    with steer(llama, sae, [EVERYWHERE, None, PROMPT]):
        assert torch.equal(logits(llama), got)


def test_right_padding_in_a_forward(llama, sae):
    ids = torch.stack([row.roll(-int((row == 0).sum())) for row in PADDED])
    mask = (ids != 0).long()
    with steer(llama, sae, EVERYWHERE):
        right, left = logits(llama, ids, mask), logits(llama)
    torch.testing.assert_close(right[mask.bool()], left[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_the_first_token_on_request(llama, sae):
    with by_hand(llama, sae, LAYER, MASK.bool(), EVERYWHERE):
        want = logits(llama)
    with steer(llama, sae, EVERYWHERE, first_token=True):
        got = logits(llama)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more", [{"num_beams": 2, "num_return_sequences": 2}, {"num_return_sequences": 2}], ids=str
)
def test_beams_and_samples_keep_the_policy_of_their_row(llama, sae, more):
    def run(ids, mask):
        torch.manual_seed(0)
        sampling = {"do_sample": True, "top_k": 1} if len(more) == 1 else {"do_sample": False}
        return llama.generate(ids, attention_mask=mask, max_new_tokens=NEW, **sampling, **more)

    rows = [EVERYWHERE, None, GENERATED]
    with steer(llama, sae, rows):
        together = run(PADDED, MASK)
    for row, policy in enumerate(rows):
        with attach(llama, {LAYER: sae}) as handle:
            handle.set(policy)
            alone = run(PADDED[row : row + 1], MASK[row : row + 1])
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_assisted_decoding_steers_what_plain_decoding_steers(llama, sae):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    for policy in POLICIES:
        with steer(llama, sae, policy):
            want = llama.generate(ids, max_new_tokens=8, do_sample=False)
            got = llama.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
        assert torch.equal(got, want)


def test_policies_can_change_between_calls(llama, sae):
    base, wanted = generate(llama)[1], {}
    for policy in POLICIES:
        with steer(llama, sae, policy):
            wanted[policy] = generate(llama)[1]
    with attach(llama, {LAYER: sae}, max_policies=2) as handle:
        for policy in (*POLICIES, None, *POLICIES[::-1], None):
            handle.set(policy)
            want = base if policy is None else wanted[policy]
            torch.testing.assert_close(generate(llama)[1], want)


# --- compiled models -----------------------------------------------------------------------------


def compiled_generate(model, **more):
    config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # by default only accelerators compile
    return generate(model, cache_implementation="static", compile_config=config, **more)


def test_generate_that_compiles_itself(sae, count_compiles):
    model = build("gemma3")
    base = compiled_generate(model)  # a graph without hooks exists already
    for policies in (POLICIES, POLICIES[::-1]):
        with steer(model, sae, policies):
            want, got = generate(model), compiled_generate(model)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled_generate(model)[1], base[1])


class Small(nn.Module):
    """The least that can be steered; a real model takes seconds to trace."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, inputs_embeds, attention_mask=None):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


@torch.no_grad()
def test_a_model_compiled_after_attach_follows_every_set(count_compiles):
    sae, x = make_sae("topk"), torch.randn(3, 6, D)
    staged = Policy([*EVERYWHERE.operations, amplify(range(20), 2.0, active="sae")])
    count_compiles(Small())[0](x, MASK)  # a graph of the same class, without hooks
    model = Small()
    base, wanted = model(x, MASK), {}
    for policy in (*POLICIES, staged):
        with steer(model, sae, policy):
            wanted[policy] = model(x, MASK)
    assert torch.equal(wanted[GENERATED], base)  # outside generate, all is prompt
    with attach(model, {LAYER: sae}) as handle:
        compiled, counter = count_compiles(model)
        for policy in (
            None,
            EVERYWHERE,
            PROMPT,
            staged,
            None,
            GENERATED,
            EVERYWHERE,
            PROMPT,
            staged,
        ):
            handle.set(policy)
            want = base if policy is None else wanted[policy]
            torch.testing.assert_close(compiled(x, MASK), want)
        assert counter.frame_count == 4  # off; one policy, with and without a phase; staged
        handle.set([None, EVERYWHERE, PROMPT])
        graphs = counter.frame_count
        for rows in (
            [PROMPT, None, EVERYWHERE],
            [None, None, PROMPT],
            [GENERATED, PROMPT, EVERYWHERE],
        ):
            handle.set(rows)
            for row, policy in enumerate(rows):
                want = base if policy is None else wanted[policy]
                torch.testing.assert_close(compiled(x, MASK)[row], want[row])
        assert counter.frame_count == graphs + 1
        with attach(model, {1: make_sae()}) as second:  # even this late, if not through `compiled`
            second.set(EVERYWHERE)
            torch.testing.assert_close(compiled(x, MASK), model(x, MASK))
    torch.testing.assert_close(compiled(x, MASK), base)


@pytest.mark.parametrize("how", ["wrapper", "in place", "forward", "trunk", "layer"])
def test_a_compiled_model_is_refused(sae, how):
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
    for use in (lambda: attach(given, {0: sae}), lambda: steer(given, sae, EVERYWHERE).__enter__()):
        with pytest.raises(
            FastsaeError, match=r"^model: Llama\w+ is compiled already.*compile after"
        ):
            use()


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["body", "model"])
def test_an_exception_leaves_the_model_as_it_was(llama, sae, where):
    base = logits(llama)
    with pytest.raises((RuntimeError, IndexError)), steer(llama, sae, EVERYWHERE):
        if where == "body":
            raise RuntimeError("the caller's own")
        logits(llama, PADDED + VOCAB)
    assert_clean(llama)
    assert torch.equal(logits(llama), base)


def test_a_batch_of_another_size_is_refused(llama, sae):
    with steer(llama, sae, [EVERYWHERE, None]):
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but the batch has 3 rows"):
            logits(llama)
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but the batch has 3 rows"):
            generate(llama)
        with pytest.raises(FastsaeError, match=r"^policies: 2 were set, but the batch has 4 rows"):
            logits(llama, PADDED.repeat(2, 1)[:4], None)  # only generate repeats rows
        logits(llama, PADDED[:2], MASK[:2])


@pytest.mark.parametrize(
    "use,message",
    [
        (lambda m: attach(m, {2: make_sae()}), "layer: got 2, LlamaForCausalLM has layers 0 to 1"),
        (
            lambda m: attach(m, {0: make_sae(), "layers.0": make_sae()}),
            "saes: 'layers.0' names the",
        ),
        (lambda m: attach(m, {0: None}), "saes: expected a fastsae.SAE for 0, got NoneType"),
        (lambda m: attach(m, {}), "saes: expected at least one"),
        (lambda m: attach(m, make_sae(hook=None)), "layer: this SAE does not say where"),
        (lambda m: attach(m, make_sae(hook="blocks.0.hook_mlp_out")), "hook: cannot place"),
        (lambda m: attach(m, make_sae(width=16)), "sae: reads 16 dimensions, Llama.* has 32"),
        (lambda m: attach(m, make_sae(), max_features=0), "max_features: expected a positive"),
        (lambda m: attach(nn.Linear(2, 2), make_sae()), "model: found no list of decoder layers"),
    ],
)
def test_what_cannot_be_attached(llama, use, message):
    with pytest.raises(FastsaeError, match=f"^{message}"):
        use(llama)


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
def test_a_set_that_fails_keeps_what_was_set(llama, sae, arguments, message):
    with attach(llama, {LAYER: sae}, max_features=8, max_policies=4) as handle:
        handle.set([EVERYWHERE, None, PROMPT], strengths=[1, 2, 3])
        before = logits(llama)
        with pytest.raises(FastsaeError, match=f"^{message}"):
            handle.set(**arguments)
        assert torch.equal(logits(llama), before)
    with pytest.raises(FastsaeError, match=r"^handle: it is detached"):
        handle.set(None)
    handle.detach()


def test_one_bad_layer_keeps_all_layers(llama, sae):
    with attach(llama, {0: sae, 1: make_sae(hook=None)}) as handle:
        handle.set({0: EVERYWHERE, 1: PROMPT})
        before = logits(llama)
        with pytest.raises(FastsaeError, match="99 is out of range"):
            handle.set({0: PROMPT, 1: Policy(ablate(99))})
        assert torch.equal(logits(llama), before)


def test_a_required_policy_that_was_not_applied_stops_generate(sae):
    model = build("llama")
    model.config.num_hidden_layers = 1  # LlamaModel then never calls its second layer
    calm = Policy(add(1, 1.0), name="calm", required=True)
    with steer(model, sae, calm, layer=1):
        with pytest.raises(FastsaeError, match=r"policy calm is required, but layer 1 never ran"):
            generate(model)
    with steer(model, sae, EVERYWHERE, layer=1), pytest.warns(UserWarning, match="never ran"):
        generate(model)
    with steer(model, sae, calm, layer=0):
        generate(model)


def test_a_packed_batch_has_no_phases(llama, sae):
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)}
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with steer(llama, sae, PROMPT), pytest.raises(FastsaeError, match=r"^phase: generate_batch"):
        logits(llama, PADDED[1:2], None, position_ids=positions, **packed)


def test_what_others_put_around_generate_survives(llama, sae):
    calls = []
    original = llama.generate
    llama.generate = lambda *a, **k: calls.append(1) or original(*a, **k)
    ours = llama.__dict__["generate"]
    with steer(llama, sae, EVERYWHERE):
        generate(llama)
    assert llama.__dict__["generate"] is ours and calls == [1]
    del llama.generate


def test_transformers_is_never_imported():
    code = "import sys, fastsae.steering; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
