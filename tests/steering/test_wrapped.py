"""Models in wrappings: LoRA adapters, int8 weights, offloaded layers, other ways to generate."""

import pytest
import torch

from fastsae.steering import Policy, add, attach, steer

pytest.importorskip("transformers")

LAYER, NEW = 0, 5
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@pytest.fixture
def rows(everywhere):
    return [everywhere, None]


@pytest.fixture
def check(generate, by_hand, logits, sae, rows):
    """Cached generation equals recomputation; None keeps its bits; every token counted once."""

    def check(model, trunk=None):
        base, _ = generate(model, IDS, torch.ones_like(IDS))
        mask = torch.ones_like(IDS)
        with attach(model, {LAYER: sae}) as handle:
            handle.set(rows)
            tokens, got = generate(model, IDS, mask)
            assert handle.counts()["layers.0.output"] == [IDS.shape[1] - 1 + NEW - 1, 0]
            again, plain = generate(model, IDS, mask, use_cache=False)
        assert torch.equal(tokens, again) and torch.equal(tokens[1], base[1])
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)
        assert not torch.equal(tokens[0], base[0])
        assert torch.equal(generate(model, IDS, mask)[0], base)

    return check


@pytest.mark.parametrize("which", ["wrapper", "model inside"])
def test_peft_adapters(build, check, which):
    peft = pytest.importorskip("peft")
    base = build("llama")
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    check(wrapped.eval() if which == "wrapper" else base)


def test_an_adapter_inside_a_steered_model(build, sae, everywhere, generate):
    """What is attached to the model also steers through the wrapper that is put around it later."""
    peft = pytest.importorskip("peft")
    model = build("llama")
    with attach(model, {LAYER: sae}) as handle:
        handle.set(everywhere)
        want, _ = generate(model, IDS, torch.ones_like(IDS))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        out = wrapped.generate(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=NEW,
            do_sample=False,
        )
    assert torch.equal(out[:, IDS.shape[1] :], want)  # a fresh adapter changes nothing


def test_int8_weights(build, check):
    quantization = pytest.importorskip("torchao.quantization")
    model = build("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    check(model)


def test_a_device_map_with_offloaded_layers(build, check, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    dispatched = accelerate.dispatch_model(
        model, device_map=places, offload_dir=tmp_path, main_device="cpu"
    )
    assert next(dispatched.model.layers[0].parameters()).device.type == "meta"
    check(dispatched)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_types(build, sae, rows, generate, kind):
    model = build("llama").to(kind)
    _, base = generate(model, IDS, torch.ones_like(IDS))
    with attach(model, {LAYER: sae}) as handle:
        handle.set(rows)
        _, got = generate(model, IDS, torch.ones_like(IDS))
        assert handle.counts()["layers.0.output"] == [IDS.shape[1] - 1 + NEW - 1, 0]
    assert torch.equal(got[1], base[1]) and not torch.equal(got[0], base[0])


def test_an_assistant_model_drafts_what_the_steered_model_checks(build, sae, rows):
    model, assistant = build("llama"), build("llama", seed=1)
    ids, options = IDS[:1], {"max_new_tokens": 8, "do_sample": False}
    base = model.generate(ids, **options)
    with steer(model, sae, rows[0]) as handle:
        want = model.generate(ids, **options)
        steered = handle.counts()["layers.0.output"]
        got = model.generate(ids, assistant_model=assistant, **options)
        drafted = handle.counts()["layers.0.output"]
    assert torch.equal(got, want) and not torch.equal(got, base)
    assert steered == [ids.shape[1] - 1 + 7]
    # Drafts that were rejected were steered too: the same positions ran more than once.
    assert drafted[0] - steered[0] >= steered[0]


def test_samples_are_drawn_from_the_steered_distribution(build, sae, rows):
    """The same random numbers give the recomputed sample; streaming shows those very tokens."""
    model, seen = build("llama"), []

    class Stream:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    def sample(**more):
        torch.manual_seed(3)
        return model.generate(IDS[:1], max_new_tokens=8, do_sample=True, top_k=0, **more)

    base = sample()
    with steer(model, sae, rows[0]):
        tokens = sample(streamer=Stream())
        assert torch.equal(tokens, sample(use_cache=False))
    assert seen == [*tokens[0].tolist(), "end"] and not torch.equal(tokens, base)


def test_chunked_prefill_counts_every_token_once(build, sae):
    model = build("llama")
    with attach(model, {LAYER: sae}) as handle:
        for chunk in (1, 2, 3, 5):
            handle.set(Policy(add(3, 4.0)))
            model.generate(
                IDS,
                attention_mask=torch.ones_like(IDS),
                max_new_tokens=NEW,
                do_sample=False,
                prefill_chunk_size=chunk,
            )
            assert handle.counts()["layers.0.output"] == [2 * (IDS.shape[1] - 1 + NEW - 1)]
