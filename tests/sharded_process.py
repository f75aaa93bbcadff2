"""One process of test_sharded.py: python sharded_process.py RANK WORLD THREADS FOLDER."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import fastsae
from fastsae.explain.sharded import explain_sharded
from fastsae.ops import extension, native

V, F, D, SHARD = 301, 203, 48, 32


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=D, _name_or_path="tiny")
        self.layers = nn.ModuleList([nn.Linear(D, D)])
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V + 1)

    def get_output_embeddings(self):
        return self.head


class Tokenizer:
    """A token per word, and the word list."""

    unk_token_id = 0
    words = tuple(f"w{i}" for i in range(V))

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[int(part[1:]) + 1 for part in t.split()] for t in texts]}

    def convert_ids_to_tokens(self, token):
        return f"w{token - 1}"


def build():
    torch.manual_seed(3)
    model = Model().eval()
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(V + 1, D))
        model.norm.weight.copy_(torch.rand(D) + 0.5)
    sae = fastsae.SAE(fastsae.SAEConfig(D, F, k=4, hook_name="blocks.0.hook_resid_post"))
    sae.stats = fastsae.FeatureStats(*torch.rand(3, F), 100)
    with torch.no_grad():
        sae.W_dec[5] = 0  # a dead feature
        sae.W_dec[40] = 1e-15  # its values cannot be split into bf16 parts
    return sae, model, Tokenizer(), fastsae.Vocabulary(Tokenizer.words)


def arithmetics():
    """Every way to compute that this machine has: (name, what selects it)."""
    if extension.problem() is None:
        features = native.cpu_features()
        for isa in ("amx", "avx512", "avx2"):
            if features[isa]:
                yield isa, lambda isa=isa: native.set_isa(isa)
    yield "reference", lambda: __import__("os").environ.update(FASTSAE_BACKEND="reference")


def main(rank: int, world: int, threads: int, folder: Path) -> None:
    torch.set_num_threads(threads)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world
        )
    sae, model, tokenizer, vocab = build()
    result = {}
    for name, select in arithmetics():
        select()
        for objective in ("mi", "pmi", "logit"):
            ex = explain_sharded(
                sae, model, tokenizer, vocab, objective, 7, shard=SHARD, progress=False
            )
            key = f"{name} {objective}"
            result[key] = (ex.scores, ex.indices, torch.tensor(ex.temperature, dtype=torch.float64))
    torch.save(result, folder / f"{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
