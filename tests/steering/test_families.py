"""Every decoder-only family of transformers that builds tiny, at every place in a layer."""

from pathlib import Path

import pytest
import torch

from fastsae import FastsaeError, places
from fastsae.models import decoder_layers, residual_of, with_residual
from fastsae.places import POINTS, site
from fastsae.steering import Policy, ablate, add, attach

transformers = pytest.importorskip("transformers")

LAYER, DOCS = 1, Path(__file__).parents[2] / "docs" / "steering.md"
INSIDE = ("resid_mid", "attn_out", "mlp_in", "mlp_out")
WIDTHS = "hidden_size n_embd d_model dim word_embed_proj_dim attention_hidden_size lru_width"
SIZES = (
    dict.fromkeys(WIDTHS.split(), 32)
    | dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers".split(), 2)
    | dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads".split(), 4
    )
    | dict.fromkeys(
        "intermediate_size ffn_dim d_ff decoder_ffn_dim n_inner ffn_hidden_size".split(), 48
    )
    | dict.fromkeys("max_position_embeddings n_positions max_seq_len".split(), 64)
    | dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4)
    | dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 16)
    | dict.fromkeys("q_lora_rank kv_lora_rank v_head_dim head_dim".split(), 8)
    | dict.fromkeys("qk_rope_head_dim qk_nope_head_dim rotary_dim state_size".split(), 4)
    | dict.fromkeys("num_experts_per_tok num_key_value_heads".split(), 2)
    | dict.fromkeys("n_group topk_group first_k_dense_replace n_shared_experts".split(), 1)
    | {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | {"initializer_range": 0.15, "sliding_window": 4, "decoder_start_token_id": 1}
)
FAMILIES = (
    "apertus arcee aria_text bailing_hybrid biogpt bitnet bloom codegen cohere cohere2 cwm "
    "deepseek_v2 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 falcon flex_olmo gemma gemma2 "
    "gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite "
    "granitemoe helium hunyuan_v1_dense jais2 llama mellum minimax ministral mistral mixtral "
    "modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe "
    "qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2 vaultgemma "
    "xglm"
).split()
OWN_SIZES = {
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3_text": {"sliding_window": 4},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def build(family):
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = transformers.CONFIG_MAPPING[family]
    default, sizes = kind(), SIZES | OWN_SIZES.get(family, {})
    known = {
        name: value
        for name, value in sizes.items()
        if value is not None and (name in kind.attribute_map or hasattr(default, name))
    }
    if isinstance(getattr(default, "layer_types", None), list):
        known["layer_types"] = default.layer_types[-2:]
    torch.manual_seed(0)
    model = getattr(transformers, names[family])(kind(**known)).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, build(request.param)


@torch.no_grad()
def run(model, edits=()):
    """Logits of IDS, each (point, function) applied there by a hook that knows nothing of ours."""

    def after(change):
        return lambda module, args, output: with_residual(output, change(residual_of(output)))

    def before(change, in_place):
        def hook(module, args, kwargs):
            name = None if args else "hidden_states"
            given = args[0] if args else kwargs[name]
            new = change(given)
            if in_place:
                given.copy_(new)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {name: new})

        return hook

    handles = []
    try:
        for point, change in edits:
            module, side = site(model, LAYER, point)
            handles.append(
                module.register_forward_hook(after(change))
                if side == "output"
                else module.register_forward_pre_hook(
                    before(change, point == "resid_mid"), with_kwargs=True
                )
            )
        return model(IDS, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def available(model):
    found = []
    for point in POINTS:
        try:
            site(model, LAYER, point)
        except FastsaeError:
            continue
        found.append(point)
    return found


def test_steering_at_every_place_is_adding_there(family, make_sae, assert_clean):
    """A row with a policy equals a plain hook that adds; the row without one keeps its bits."""
    name, model = family
    sae, base, points = make_sae(hook=None), run(model), available(model)
    step = 3.0 * sae.W_dec[3].detach() - 2.0 * sae.W_dec[7].detach()
    assert points[0] == "resid_pre" and "resid_post" in points
    for point in points:

        def change(x):
            x = x.clone()
            x.view(2, IDS.shape[1], -1)[0, 1:] += step
            return x

        want = run(model, [(point, change)])
        with attach(model, {places.Place(LAYER, point): sae}) as handle:
            assert torch.equal(run(model), base), point
            handle.set([Policy(add([3, 7], [3.0, -2.0])), None])
            got = run(model)
            assert next(iter(handle.counts().values())) == [IDS.shape[1] - 1, 0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=f"{name} {point}")
        assert torch.equal(got[1], base[1]), point
        assert not torch.allclose(got[0, 1:], base[0, 1:]), point
    assert torch.equal(run(model), base)
    assert model.generate.__func__ is type(model).generate


def test_the_places_are_what_they_are_called(family):
    """Without what a branch adds, the residual is the same on both sides of it."""
    _, model = family
    points, seen = available(model), {}

    def keep(key):
        return lambda x: seen.setdefault(key, x.clone())

    def nothing(x):
        return torch.zeros_like(x)

    mid = "resid_mid" in points
    if mid and "mlp_out" in points:
        run(model, [("mlp_out", nothing), ("resid_mid", keep(1)), ("resid_post", keep(2))])
        assert torch.equal(seen[1].flatten(), seen[2].flatten())
    if mid and "attn_out" in points:
        run(model, [("resid_pre", keep(3)), ("attn_out", nothing), ("resid_mid", keep(4))])
        assert torch.equal(seen[3].flatten(), seen[4].flatten())
    if not mid and "attn_out" in points and "minimax" not in model.config.model_type:
        both = [("attn_out", nothing), ("mlp_out", nothing)]
        run(model, [("resid_pre", keep(5)), *both, ("resid_post", keep(6))])
        assert torch.equal(seen[5].flatten(), seen[6].flatten())
    assert len(points) > 2


def test_cached_generation_is_recomputed_generation(family, make_sae):
    _, model = family
    policies = [Policy([add(3, 4.0), ablate(5)]), Policy(add(6, 4.0), phase="generated")]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    found = []
    with attach(model, {0: make_sae()}) as handle:
        for use_cache in (True, False):
            handle.set(policies)
            out = model.generate(
                IDS,
                attention_mask=torch.ones_like(IDS),
                use_cache=use_cache,
                return_dict_in_generate=True,
                **options,
            )
            found.append((out.sequences, torch.stack(out.logits, 1)))
            if use_cache:
                assert handle.counts() == {"layers.0.output": [IDS.shape[1] - 1 + 3, 3]}
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_the_table_in_the_docs_is_up_to_date():
    rows = ["| family | a layer returns | " + " | ".join(INSIDE) + " |", "|---" * 6 + "|"]
    for name in FAMILIES:
        model, returned = build(name), []
        handle = decoder_layers(model)[LAYER].register_forward_hook(
            lambda module, args, output, to=returned: to.append(type(output).__name__.lower())
        )
        run(model)
        handle.remove()
        points = available(model)
        marks = " | ".join("yes" if point in points else "no" for point in INSIDE)
        rows.append(f"| {name} | {returned[0]} | {marks} |")
    table = "\n".join(rows)
    assert table in DOCS.read_text(encoding="utf-8"), f"put this into docs/steering.md:\n{table}"


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("T5ForConditionalGeneration", {"d_kv": 8, "num_decoder_layers": 2}, "encoder-decoder"),
        ("BartForConditionalGeneration", {"encoder_ffn_dim": 8}, "encoder-decoder model"),
        ("XLNetLMHeadModel", {"d_inner": 48}, "time-major"),
        ("XLMWithLMHeadModel", {"emb_dim": 32}, "separate lists"),
        ("CpmAntForCausalLM", {"dim_head": 8, "dim_ff": 48}, "tokens of its own"),
    ],
)
def test_other_layouts_are_refused(name, sizes, message, make_sae):
    kind = getattr(transformers, name)
    default = kind.config_class()
    names = set(vars(default)) | set(kind.config_class.attribute_map)
    known = {key: value for key, value in SIZES.items() if key in names and key != "head_dim"}
    model = kind(kind.config_class(**(known | sizes)))
    with pytest.raises(FastsaeError, match=message):
        attach(model, {0: make_sae()})


def test_layers_that_carry_several_streams_are_refused(make_sae):
    model = build("deepseek_v4")
    with attach(model, {0: make_sae(hook=None)}) as handle, torch.no_grad():
        handle.set(Policy(add(1, 1.0)))
        with pytest.raises(FastsaeError, match=r"sae: reads residuals \[batch, tokens, 32\]"):
            model(IDS, use_cache=False)
    with pytest.raises(FastsaeError, match=r"several stacks of HrmText"):
        attach(build("hrm_text"), {0: make_sae()})
