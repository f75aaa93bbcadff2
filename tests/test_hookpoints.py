"""Hook points: every notation, and the module it means in models of many families."""

import pytest
import torch
from torch import nn

from fastsae import FastsaeError
from fastsae.hookpoints import SITES, HookPoint, locate
from fastsae.models import decoder_layers

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS = 16, 3
LLAMA = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "head_dim": 8,
}
MODELS = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "Gemma2": ("Gemma2ForCausalLM", LLAMA),
    "Gemma3Text": ("Gemma3ForCausalLM", LLAMA),
    "Olmo2": ("Olmo2ForCausalLM", LLAMA),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": WIDTH, "n_layer": 3, "n_head": 2}),
    "GPTNeoX": ("GPTNeoXForCausalLM", LLAMA),
}


@pytest.fixture(scope="module")
def model_of():
    made = {}

    def build(family):
        if family not in made:
            torch.manual_seed(0)
            name, options = MODELS[family]
            config = getattr(transformers, f"{family}Config")(**options, pad_token_id=0)
            made[family] = getattr(transformers, name)(config).eval()
            for norm in made[family].modules():
                if "norm" in type(norm).__name__.lower():
                    for p in norm.parameters():
                        nn.init.normal_(p, 0.8, 0.3)
        return made[family]

    return build


def seen(model, hooks):
    """What each hook point reads during one forward, and the hidden states."""
    found, handles = {}, []
    for hook in hooks:
        place = locate(model, hook)

        def keep(module, inputs, output, hook=hook, place=place):
            found[hook] = place.read(inputs, output).detach().clone()

        handles.append(place.module.register_forward_hook(keep))
    with torch.no_grad():
        states = model(torch.tensor([[3, 4, 5, 6]]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return found, states


# --- notations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,site,layer",
    [
        ("blocks.12.hook_resid_post", "resid_post", 12),
        ("resid_post.16", "resid_post", 16),
        ("model.layers.3.output", "resid_post", 3),
        ("layers.10", "resid_post", 10),
        ("transformer.h.3", "resid_post", 3),
        ("gpt_neox.layers.2", "resid_post", 2),
        ("blocks.0.hook_resid_pre", "resid_pre", 0),
        ("layers.7.input", "resid_pre", 7),
        ("blocks.5.attn.hook_z", "attn_z", 5),
        ("attn_out.4", "attn_out", 4),
        ("blocks.3.ln2.hook_normalized", "mlp_normalized", 3),
        ("blocks.3.hook_mlp_in", "mlp_residual", 3),
        ("blocks.3.mlp.hook_in", "mlp_in", 3),
        ("hook_embed", "embed", None),
        ("model.embed_tokens.output", "embed", None),
        ("embed_tokens", "embed", None),
    ],
)
def test_notations(text, site, layer):
    point = HookPoint.parse(text)
    assert (point.site, point.layer) == (site, layer)
    assert HookPoint.parse(point.tl) == point
    assert HookPoint.parse(point) is point


@pytest.mark.parametrize(
    "text,path,side,tl",
    [
        (
            "model.layers.3.post_feedforward_layernorm.output",
            "post_feedforward_layernorm",
            "output",
            "blocks.3.hook_mlp_out",
        ),
        ("layers.3.self_attn.o_proj.input", "self_attn.o_proj", "input", "blocks.3.attn.hook_z"),
        ("h.3.attn", "attn", "output", None),
        ("layers.3.mlp", "mlp", "output", None),
        ("layers.3.mlp.input", "mlp", "input", "blocks.3.mlp.hook_in"),
        ("model.layers.3.mlp.down_proj.input", "mlp.down_proj", "input", "blocks.3.mlp.hook_post"),
        (
            "model.layers.3.pre_feedforward_layernorm.output",
            "pre_feedforward_layernorm",
            "output",
            None,
        ),
    ],
)
def test_module_paths(text, path, side, tl):
    point = HookPoint.parse(text)
    assert point == HookPoint(3, "module", path, side) and point.tl == tl
    assert point.hf == f"layers.3.{path}.{side}"


@pytest.mark.parametrize(
    "text",
    ["", "blocks.3.hook_q", "layers.x", "nowhere", 3, None, "resid_post", "blocks.1.ln1.hook_x"],
)
def test_what_is_no_hook_point(text):
    with pytest.raises(FastsaeError, match="hook: cannot place"):
        HookPoint.parse(text)


# --- places in models -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_the_residual_stream_and_the_last_hidden_state(model_of, family):
    """hidden_states[L + 1] is layer L's output, except the last, which is after the final norm."""
    hooks = [f"blocks.{layer}.hook_resid_{side}" for layer in range(3) for side in ("pre", "post")]
    found, states = seen(model_of(family), [*hooks, "hook_embed"])
    for layer in range(LAYERS):
        assert torch.equal(found[f"blocks.{layer}.hook_resid_pre"], states[layer])
        same = torch.equal(found[f"blocks.{layer}.hook_resid_post"], states[layer + 1])
        assert same is (layer < LAYERS - 1)
    final = [m for n, m in model_of(family).named_modules() if n.split(".")[-1] in
             ("norm", "ln_f", "final_layer_norm")][-1]  # fmt: skip
    torch.testing.assert_close(final(found["blocks.2.hook_resid_post"]), states[-1])
    embedding = found["hook_embed"]
    if family == "GPT2":
        embedding = embedding + model_of(family).transformer.wpe.weight[:4]
    torch.testing.assert_close(embedding, states[0])


@pytest.mark.parametrize("family", [name for name in MODELS if name != "GPTNeoX"])
def test_branches_add_up(model_of, family):
    """resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out: what the model adds."""
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_residual", "mlp_out", "resid_post")
    found, _ = seen(model_of(family), [f"{site}.1" for site in sites])
    pre, attention, mid, also_mid, mlp, post = (found[f"{site}.1"] for site in sites)
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)
    assert torch.equal(mid, also_mid)


def test_a_parallel_model_has_no_middle(model_of):
    model = model_of("GPTNeoX")
    found, _ = seen(model, ["resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1"])
    total = found["resid_pre.1"] + found["attn_out.1"] + found["mlp_out.1"]
    torch.testing.assert_close(total, found["resid_post.1"])
    for site in ("resid_mid", "mlp_normalized", "mlp_residual"):
        with pytest.raises(FastsaeError, match="GPTNeoXLayer has no resid_mid"):
            locate(model, f"{site}.1")


@pytest.mark.parametrize("family", MODELS)
def test_inside_the_branches(model_of, family):
    """hook_z through the output projection is the attention's output; hook_post the MLP's."""
    model = model_of(family)
    found, _ = seen(model, ["attn_z.1", "mlp_post.1", "mlp_in.1"])
    layer = decoder_layers(model)[1]
    attention = locate(model, "attn_z.1").module
    assert found["attn_z.1"].shape[-1] == WIDTH and attention(found["attn_z.1"]).shape[-1] == WIDTH
    mlp = locate(model, "mlp_in.1").module
    torch.testing.assert_close(
        mlp(found["mlp_in.1"]), locate(model, "mlp_post.1").module(found["mlp_post.1"])
    )
    assert mlp is layer.mlp and locate(model, "mlp_in.1").path.endswith(".1.mlp")


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Gemma3Text", "GPT2"])
def test_the_norm_before_its_weight(model_of, family):
    """ln2.hook_normalized times the norm's weight (and bias) is the MLP's input."""
    model = model_of(family)
    found, _ = seen(model, ["blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"])
    norm = locate(model, "blocks.1.ln2.hook_normalized").module
    weight = 1 + norm.weight if family.startswith("Gemma") else norm.weight
    value = found["blocks.1.ln2.hook_normalized"] * weight + getattr(norm, "bias", 0)
    torch.testing.assert_close(value, found["blocks.1.mlp.hook_in"])
    with pytest.raises(FastsaeError, match="no norm before its MLP"):
        locate(model_of("Olmo2"), "blocks.1.ln2.hook_normalized")


def test_gemma_scope_2_places(model_of):
    """Its transcoders read the norm's output, which SAELens calls hook_mlp_in: HF's name wins."""
    model = model_of("Gemma3Text")
    norms = "model.layers.1.{}_feedforward_layernorm.output"
    hooks = [norms.format("pre"), norms.format("post"), "mlp_in.1", "mlp_out.1", "mlp_residual.1"]
    found, _ = seen(model, hooks)
    assert torch.equal(found[hooks[0]], found["mlp_in.1"])
    assert torch.equal(found[hooks[1]], found["mlp_out.1"])
    assert not torch.allclose(found[hooks[0]], found["mlp_residual.1"])


def test_sparsify_names_of_another_family(model_of):
    """`attn` and `self_attn` are one thing; outputs that are tuples give their first entry."""
    found, _ = seen(model_of("Llama"), ["h.1.attn", "layers.1.self_attn.output"])
    assert torch.equal(found["h.1.attn"], found["layers.1.self_attn.output"])


@pytest.mark.parametrize(
    "hook,words",
    [
        ("blocks.3.hook_resid_post", "layer: got 3, LlamaForCausalLM has layers 0 to 2"),
        ("layers.1.self_attn.c_proj", "LlamaAttention has no c_proj; it has q_proj"),
        ("layers.1.router", "LlamaDecoderLayer has no router; it has self_attn, mlp"),
        ("layers.1.pre_feedforward_layernorm.output", "has no pre_feedforward_layernorm"),
    ],
)
def test_places_that_do_not_exist(model_of, hook, words):
    with pytest.raises(FastsaeError, match=words):
        locate(model_of("Llama"), hook)


def test_every_site_has_a_name_of_its_own():
    names = [HookPoint(2, site).tl for site in SITES]
    assert len(set(names)) == len(SITES)
    assert {HookPoint.parse(name).site for name in names} == set(SITES)
