"""Memory and time of explaining many features by shards, on weights that are mapped from files.

    python -P benchmarks/explain_scale.py --features 65536 --words 50000 --width 4096 --run 2

times `--run` shards of the full size and extrapolates to all of them, saying so; `--run 0` explains
every feature. "beyond the weights" is the peak of the process's anonymous memory: the decoder
and the output embedding are mapped, everything else (words, logits, Python, torch) is counted.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import fastsae
from fastsae.explain.sharded import Decoder, explain_sharded
from fastsae.ops.mi_parts import MIParts


class Model(nn.Module):
    """What explanations read of a language model: its final norm and output embedding."""

    def __init__(self, embedding: torch.Tensor):
        super().__init__()
        width = embedding.shape[1]
        self.config = SimpleNamespace(hidden_size=width, _name_or_path="random")
        self.layers = nn.ModuleList([nn.Linear(1, 1)])
        self.norm = nn.RMSNorm(width)
        self.head = SimpleNamespace(weight=embedding)

    def get_output_embeddings(self):
        return self.head


class Tokenizer:
    """Words of two tokens."""

    unk_token_id = None

    def __init__(self, size: int):
        self.size = size

    def __call__(self, texts, add_special_tokens=True):
        numbers = [int(text.strip()[1:]) for text in texts]
        return {"input_ids": [[n, (7 * n + 1) % self.size] for n in numbers]}

    def convert_ids_to_tokens(self, token):
        return f"t{token}"


def mapped(folder: Path, name: str, rows: int, width: int) -> torch.Tensor:
    """[rows, width] bfloat16 normals in a file, mapped."""
    path = folder / name
    with open(path, "wb") as file:
        for begin in range(0, rows, 4096):
            part = torch.randn(min(4096, rows - begin), width).bfloat16()
            file.write(part.view(torch.int16).numpy().tobytes())
    flat = torch.from_file(str(path), shared=True, size=rows * width, dtype=torch.bfloat16)
    return flat.view(rows, width)


class PeakMemory:
    """Peak of RssAnon in bytes, sampled every 10 ms."""

    def __init__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._stop.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) << 10)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=65536)
    parser.add_argument("--words", type=int, default=50000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--shard", type=int, default=2048)
    parser.add_argument("--run", type=int, default=1, help="shards to time; 0: everything")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", help="keep the shards here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args, folder: Path) -> None:
    shards = -(-args.features // args.shard)
    rows = args.features if args.run == 0 else min(args.features, args.run * args.shard)
    W_dec = mapped(folder, "decoder", rows, args.width)
    model = Model(mapped(folder, "embedding", args.words, args.width))
    vocab = fastsae.Vocabulary(tuple(f"w{i}" for i in range(args.words)))
    config = fastsae.SAEConfig(args.width, rows, k=32, hook_name="blocks.0.hook_resid_post")
    spent: dict[str, float] = {}
    for name in ("_make_tiles", "moments", "spread", "columns", "topk"):
        setattr(MIParts, name, timed(getattr(MIParts, name), name, spent))
    start = time.perf_counter()
    with PeakMemory() as memory:
        explain_sharded(
            Decoder(config, W_dec, None),
            model,
            Tokenizer(args.words),
            vocab,
            shard=args.shard,
            directory=args.directory,
        )
    whole = time.perf_counter() - start
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items())
    print(f"{rows} features, {args.words} words, width {args.width}: {whole:.1f} s ({told})")
    print(f"peak beyond the weights: {memory.peak / 2**30:.2f} GiB")
    if rows < args.features:
        once = sum(spent.get(name, 0.0) for name in ("_make_tiles", "moments"))
        per_shard = (whole - once) / (rows / args.shard)
        estimate = once + per_shard * shards
        print(f"extrapolated to {args.features} features: {estimate:.0f} s (not run)")


def timed(method, name: str, spent: dict[str, float]):
    def call(*arguments):
        start = time.perf_counter()
        result = method(*arguments)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


if __name__ == "__main__":
    sys.exit(main())
