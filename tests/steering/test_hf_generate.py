"""Steering tiny transformers models: the same tokens are steered however the model is run."""

import copy

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.steering import Policy, add, attach, hf, steer

pytest.importorskip("transformers")

LAYER, NEW = 0, 5


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
def test_prompts_and_positions_are_found(family, more, sae, shared, batch, generate, assert_clean):
    model = shared(family)
    with steer(model, sae, batch.policies):
        want = generate(model)
        got = generate(model, **more)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert_clean(model)


def test_prompts_given_as_embeddings_or_by_position(llama, sae, batch, generate):
    embeds = llama.get_input_embeddings()(batch.ids).detach()
    with steer(llama, sae, batch.policies):
        _, want = generate(llama)
        out = llama.generate(
            inputs_embeds=embeds,
            attention_mask=batch.mask,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(torch.stack(out.logits, 1), want)
        out = llama.generate(
            inputs=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        torch.testing.assert_close(torch.stack(out.logits, 1), want)


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
def test_a_second_turn_on_a_kept_cache(llama, sae, monkeypatch, whole, batch, count_steered):
    # The prompt is then everything up to the new turn, whether or not the caller repeats it.
    first = llama.generate(
        batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
    )
    ids = torch.cat([first.sequences, torch.tensor([[11, 12]] * 3)], 1)
    mask = torch.cat([batch.mask, torch.ones(3, 5, dtype=torch.long)], 1)
    new = ids if whole else ids[:, first.past_key_values.get_seq_length() :]
    for phase, expected in (("prompt", 3), ("generated", NEW - 1), ("all", 3 + NEW - 1)):
        counter, cache = count_steered(), copy.deepcopy(first.past_key_values)
        with steer(llama, sae, Policy(add(3, 4.0), phase=phase)):
            llama.generate(
                new, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False
            )
        assert counter.rows.tolist() == [expected] * 3, phase
        monkeypatch.undo()


def test_a_decoding_loop_of_ones_own(llama, sae, batch, generate, logits):
    with attach(llama, {LAYER: sae}) as handle, torch.no_grad():
        handle.set(batch.policies)
        tokens, want = generate(llama)
        out = llama(batch.ids, attention_mask=batch.mask, use_cache=True)
        cache, mask, got = out.past_key_values, batch.mask, [out.logits[:, -1]]
        for step in range(NEW - 1):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            out = llama(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache)
            got.append(out.logits[:, -1])
        torch.testing.assert_close(torch.stack(got, 1), want, rtol=1e-4, atol=1e-5)
        # Chunks of a prompt look like generated tokens: then the caller says how long it is.
        handle.set(batch.policies, prompt_lengths=batch.lengths)
        head = llama(batch.ids[:, :3], attention_mask=batch.mask[:, :3], use_cache=True)
        tail = llama(
            batch.ids[:, 3:], attention_mask=batch.mask, past_key_values=head.past_key_values
        )
        torch.testing.assert_close(tail.logits[:, -1], want[:, 0], rtol=1e-4, atol=1e-5)
        ids = torch.cat([batch.ids, tokens], 1)
        mask = torch.cat([batch.mask, torch.ones_like(tokens)], 1)
        again = logits(llama, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        torch.testing.assert_close(again[:, 5:-1], want, rtol=1e-4, atol=1e-5)


def test_a_loop_on_a_state_without_a_length_is_refused(sae, shared, batch, prompt, assert_clean):
    model, token = shared("mamba"), batch.ids[1:2, :1]
    with steer(model, sae, prompt), torch.no_grad():
        state = model(token.expand(1, 3), use_cache=True).cache_params
        with pytest.raises(FastsaeError, match=r"^past_key_values: this cache does not tell"):
            model(token, cache_params=state)
    assert_clean(model)


def test_offloaded_weights(sae, batch, everywhere, prompt, shared, generate, build):
    accelerate = pytest.importorskip("accelerate")
    want = {}
    for policies in (batch.policies, [None, everywhere, prompt]):
        with steer(shared("llama"), sae, policies):
            want[tuple(policies)] = generate(shared("llama"))
    model = accelerate.cpu_offload(build("llama"), execution_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for policies, (tokens, scores) in want.items():
        with steer(model, sae, list(policies)):
            got = generate(model)
        assert torch.equal(got[0], tokens) and torch.equal(got[1], scores)


def test_a_table_follows_its_layer_to_another_device(
    llama, sae, monkeypatch, everywhere, prompt, logits
):
    monkeypatch.setattr(hf, "_device", lambda layer: torch.device("meta"))
    with attach(llama, {LAYER: sae}) as handle:
        handle.set([everywhere, None, prompt])
        got = logits(llama)
    with steer(llama, sae, [everywhere, None, prompt]):
        assert torch.equal(logits(llama), got)


def test_right_padding_in_a_forward(llama, sae, batch, everywhere, logits):
    ids = torch.stack([row.roll(-int((row == 0).sum())) for row in batch.ids])
    mask = (ids != 0).long()
    with steer(llama, sae, everywhere):
        right, left = logits(llama, ids, mask), logits(llama)
    torch.testing.assert_close(right[mask.bool()], left[batch.real], rtol=1e-4, atol=1e-5)


def test_the_first_token_on_request(llama, sae, by_hand, batch, everywhere, logits):
    with by_hand(llama, sae, LAYER, batch.real, everywhere):
        want = logits(llama)
    with steer(llama, sae, everywhere, first_token=True):
        got = logits(llama)
    torch.testing.assert_close(got[batch.real], want[batch.real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more", [{"num_beams": 2, "num_return_sequences": 2}, {"num_return_sequences": 2}], ids=str
)
def test_beams_and_samples_keep_the_policy_of_their_row(
    llama, sae, more, everywhere, generated, batch
):
    def run(ids, mask):
        torch.manual_seed(0)
        sampling = {"do_sample": True, "top_k": 1} if len(more) == 1 else {"do_sample": False}
        return llama.generate(ids, attention_mask=mask, max_new_tokens=NEW, **sampling, **more)

    rows = [everywhere, None, generated]
    with steer(llama, sae, rows):
        together = run(batch.ids, batch.mask)
    for row, policy in enumerate(rows):
        with attach(llama, {LAYER: sae}) as handle:
            handle.set(policy)
            alone = run(batch.ids[row : row + 1], batch.mask[row : row + 1])
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_assisted_decoding_steers_what_plain_decoding_steers(llama, sae, batch):
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    for policy in batch.policies:
        with steer(llama, sae, policy):
            want = llama.generate(ids, max_new_tokens=8, do_sample=False)
            got = llama.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)
        assert torch.equal(got, want)


def test_policies_can_change_between_calls(llama, sae, generate, batch):
    base, wanted = generate(llama)[1], {}
    for policy in batch.policies:
        with steer(llama, sae, policy):
            wanted[policy] = generate(llama)[1]
    with attach(llama, {LAYER: sae}, max_policies=2) as handle:
        for policy in (*batch.policies, None, *batch.policies[::-1], None):
            handle.set(policy)
            want = base if policy is None else wanted[policy]
            torch.testing.assert_close(generate(llama)[1], want)
