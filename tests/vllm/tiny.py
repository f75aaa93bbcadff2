"""A random Llama with a tokenizer, an SAE for it and eight policies, written into a folder."""

import json
from pathlib import Path

import torch

LAYER = 2
WIDTH = 64
VOCABULARY = 512
POLICIES = [
    {"operations": [{"op": "amplify", "features": [1, 5, 9], "alpha": 6.0}]},
    {"operations": [{"op": "add", "features": [3], "strength": 9.0}]},
    {"operations": [{"op": "ablate", "features": [7, 8]}], "norm": "preserve"},
    {"operations": [{"op": "calibrate", "features": [11], "beta": 8.0}], "phase": "generated"},
    {"operations": [{"op": "add", "features": [20], "strength": -9.0}], "phase": "prompt"},
    {
        "operations": [{"op": "add", "features": [30], "strength": 12.0}],
        "gate": {"features": [4, 6], "above": 0.3},
    },
    {"operations": [{"op": "enforce", "features": [40, 41], "magnitude": 20.0}]},
    {
        "operations": [
            {"op": "add", "features": [2], "strength": 3.0},
            {"op": "amplify", "features": [10, 50, 90, 130], "alpha": 9.0, "active": "sae"},
            {"op": "add", "features": [60], "strength": 3.0},
        ],
        "gate": {"features": [14, 16], "above": 0.05},
        "norm": "preserve",
    },
]


def make(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import fastsae

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():  # random weights of this size give lively tokens
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    words += [f"<{i}>" for i in range(VOCABULARY - len(words))]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    sae = fastsae.SAE(
        fastsae.SAEConfig(WIDTH, 256, k=16, hook_name=f"blocks.{LAYER}.hook_resid_post")
    )
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
    sae.save_pretrained(folder / "sae")
    named = [{"name": f"p{i}", "version": "1", **each} for i, each in enumerate(POLICIES)]
    (folder / "policies.json").write_text(json.dumps(named))


def settings(folder: Path, **more) -> dict:
    site = {"sae": str(folder / "sae"), "policies": str(folder / "policies.json")}
    return {"fastsae": {"sites": [site], "membership": 1, **more}}


def engine_arguments(folder: Path, **more) -> dict:
    return {
        "model": str(folder / "model"),
        "dtype": "float32",
        "max_model_len": 400,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": True,
        "enforce_eager": True,
        **more,
    }


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
