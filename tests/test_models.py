"""Layers, norms and embeddings of every decoder-only family, found without naming any of them."""

import pytest
import torch
from torch import nn

from fastsae import FastsaeError
from fastsae.models import (
    Hook,
    decoder_layers,
    final_norm,
    hidden_size,
    hook_module,
    load_model,
    model_device,
    output_embedding,
    residual_of,
    resolve_hook,
    with_residual,
)

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, WORDS = 16, 3, 40
LLAMA_LIKE = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    "Llama": LLAMA_LIKE,
    "Mistral": LLAMA_LIKE,
    "Qwen2": LLAMA_LIKE,
    "Gemma2": LLAMA_LIKE,
    "Gemma3Text": LLAMA_LIKE,
    # Experts are a ModuleList inside every layer.
    "Mixtral": LLAMA_LIKE | {"num_local_experts": 3},
    "GPT2": {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2},
    "GPTNeoX": LLAMA_LIKE,
    "Bloom": {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2},
    "Falcon": {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    },
    "OPT": {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "ffn_dim": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    },
}
MODEL_OF = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


@pytest.fixture(scope="module")
def model_of():
    """family -> a tiny random causal language model of it."""
    made = {}

    def build(family):
        if family not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**SMALL[family])
            name = MODEL_OF.get(family, f"{family}ForCausalLM")
            made[family] = getattr(transformers, name)(config).eval()
        return made[family]

    return build


@pytest.mark.parametrize("family", SMALL)
def test_every_family(model_of, family):
    model = model_of(family)
    layers = decoder_layers(model)
    assert isinstance(layers, nn.ModuleList) and len(layers) == LAYERS
    assert hidden_size(model) == WIDTH
    assert output_embedding(model).shape == (WORDS, WIDTH)
    assert isinstance(final_norm(model), nn.Module)
    assert model_device(model).type == "cpu"


@pytest.mark.parametrize("family", SMALL)
def test_hooks_see_and_replace_the_residual_stream(model_of, family):
    """Input of layer 0 is the first hidden state, output of layer L is the next; a change acts."""
    model, ids = model_of(family), torch.tensor([[3, 4, 5, 6]])
    seen, change = {}, torch.randn(WIDTH)

    def output_hook(module, arguments, output):
        seen["output"] = residual_of(output).detach().clone()
        return with_residual(output, residual_of(output) + change)

    def input_hook(module, arguments):
        seen["input"] = arguments[0].detach().clone()

    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        module, side = hook_module(model, "blocks.1.hook_resid_post")
        assert side == "output"
        handles = [module.register_forward_hook(output_hook)]
        handles.append(
            hook_module(model, "layers.1.input")[0].register_forward_pre_hook(input_hook)
        )
        changed = model(ids).logits
        for handle in handles:
            handle.remove()
        again = model(ids).logits
    torch.testing.assert_close(seen["input"], plain.hidden_states[1])
    torch.testing.assert_close(seen["output"], plain.hidden_states[2])
    assert not torch.allclose(changed, plain.logits) and torch.equal(again, plain.logits)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Bloom"])
def test_the_final_norm_stands_before_the_output_embedding(model_of, family):
    model, ids = model_of(family), torch.tensor([[3, 4, 5, 6]])
    captured = []
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda module, arguments, output: captured.append(residual_of(output))
    )
    with torch.no_grad():
        logits = model(ids).logits
        handle.remove()
        by_hand = final_norm(model)(captured[0]) @ output_embedding(model).T
    torch.testing.assert_close(by_hand, logits)


def test_a_model_without_a_final_norm():
    config = transformers.OPTConfig(**SMALL["OPT"], do_layer_norm_before=False)
    assert final_norm(transformers.OPTForCausalLM(config)) is None


def test_the_language_model_inside_a_vision_language_model():
    vision = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(
        text_config=LLAMA_LIKE | {"vocab_size": 300}, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert len(decoder_layers(model)) == LAYERS and hidden_size(model) == WIDTH
    assert isinstance(final_norm(model), nn.Module)
    assert output_embedding(model).shape == (300, WIDTH)


def test_layers_of_two_kinds_in_one_list():
    """Hybrid models alternate attention and recurrence; the list still is the list of layers."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(4, 4)])
            self.layers = nn.ModuleList([Block(), nn.Linear(4, 4), Block()])

    model = Model()
    assert decoder_layers(model) is model.layers


@pytest.mark.parametrize(
    "hook,expected",
    [
        (9, Hook(9, "output")),
        (Hook(2, "input"), Hook(2, "input")),
        ("blocks.9.hook_resid_post", Hook(9, "output")),
        ("blocks.12.hook_resid_pre", Hook(12, "input")),
        ("resid_post.9", Hook(9, "output")),
        ("resid_pre.0", Hook(0, "input")),
        ("layers.9", Hook(9, "output")),
        ("layers.9.input", Hook(9, "input")),
        ("layers.9.output", Hook(9, "output")),
        ("model.layers.9", Hook(9, "output")),
        ("model.language_model.layers.9.output", Hook(9, "output")),
        ("transformer.h.3", Hook(3, "output")),
        ("h.3.input", Hook(3, "input")),
        ("transformer.blocks.3", Hook(3, "output")),
    ],
)
def test_hook_points(hook, expected):
    assert resolve_hook(hook) == expected


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.9.hook_mlp_out",
        "blocks.9.attn.hook_z",
        "layers.9.mlp",
        "layers.9.mlp.output",
        "h.3.attn",
        "blocks.x.hook_resid_post",
        "blocks.9.hook_resid_mid",
        "",
        None,
        True,
        2.0,
    ],
)
def test_other_hook_points_are_errors(hook):
    with pytest.raises(FastsaeError, match=r"hook: cannot place .*; accepted are a layer number"):
        resolve_hook(hook)


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_that_does_not_exist(model_of, layer):
    with pytest.raises(
        FastsaeError, match=f"layer: got {layer}, LlamaForCausalLM has layers 0 to 2"
    ):
        hook_module(model_of("Llama"), layer)


def test_what_is_not_a_language_model(model_of):
    with pytest.raises(FastsaeError, match="model: found no list of decoder layers in Linear"):
        decoder_layers(nn.Linear(2, 2))
    with pytest.raises(
        FastsaeError, match="no output embedding; load it with AutoModelForCausalLM"
    ):
        output_embedding(model_of("Llama").model)
    with pytest.raises(FastsaeError, match="model: the config of Linear has no hidden_size"):
        hidden_size(nn.Linear(2, 2))
    with pytest.raises(FastsaeError, match="the hooked layer returned NoneType"):
        residual_of(None)


def test_the_residual_of_every_kind_of_output():
    from collections import namedtuple

    x, y = torch.zeros(2), torch.ones(2)
    Output = namedtuple("Output", "hidden cache")
    assert residual_of(x) is x and with_residual(x, y) is y
    for output in ((x, None), [x, None], Output(x, None)):
        changed = with_residual(output, y)
        assert residual_of(output) is x and residual_of(changed) is y
        assert type(changed) is type(output) and changed[1] is None


def test_load_model_from_a_folder(model_of, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(level), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    model_of("Llama").save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), dtype="float32")
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.pad_token == "</s>" and tokenizer.padding_side == "left"
    assert torch.equal(output_embedding(model), output_embedding(model_of("Llama")))
    assert load_model(str(tmp_path), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(FastsaeError, match="device: cannot use 'nonsense'"):
        load_model(str(tmp_path), device="nonsense")


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    for name, dtype, words in (
        (str(tmp_path), torch.float32, "model: cannot load"),
        (str(tmp_path), "int8", "dtype: got 'int8'"),
        (str(tmp_path), "no_such_type", "dtype: got 'no_such_type'"),
        (str(tmp_path), None, "dtype: got None"),
    ):
        with pytest.raises(FastsaeError) as error:
            load_model(name, dtype=dtype)
        assert words in str(error.value) and "\n" not in str(error.value)
