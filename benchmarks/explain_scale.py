"""Memory and time of explaining many features by shards, on weights that are mapped from files.

    python -P benchmarks/explain_scale.py           # 65 536 features, 50 000 words, width 4 096
    python -P benchmarks/explain_scale.py --run 2   # two shards of them, and an extrapolation

"Beyond the weights" is the peak of the process's anonymous memory: the decoder and the output
embedding (random, --dtype) are mapped, everything else (words, logits, Python, torch) is counted.
Exit code 1 when it is more than 2 GB. A few scores are compared with float64 afterwards. --out
writes a row of results/*.csv, of the whole size only, and not from a busy machine.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from machine import Load, busy, machine, output_bytes, version
from rows import Row, write_csv

import fastsae
from fastsae.explain.mi import feature_vectors
from fastsae.explain.sharded import Decoder, explain_sharded
from fastsae.explain.vocabulary import word_vectors
from fastsae.ops import extension
from fastsae.ops.mi_parts import MIParts

LIMIT_GB = 2
BUSY_CORES = 0.5  # load of others above which nothing is recorded
DTYPES = ("bfloat16", "float32")


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


def mapped(folder: Path, name: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, width] normals in a file, mapped."""
    path = folder / name
    with open(path, "wb") as file:
        for begin in range(0, rows, 4096):
            part = torch.randn(min(4096, rows - begin), width).to(dtype)
            file.write(part.view(torch.uint8).numpy().tobytes())
    flat = torch.from_file(str(path), shared=True, size=rows * width, dtype=dtype)
    return flat.view(rows, width)


class PeakMemory:
    """Peak of RssAnon in bytes, sampled every 10 ms."""

    def __init__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                self.peak = max(self.peak, int(line.split()[1]) << 10)

    def _watch(self):
        while not self._stop.wait(0.01):
            self._look()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._look()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=65536)
    parser.add_argument("--words", type=int, default=50000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--shard", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--run", type=int, default=0, help="shards to time; 0 (default): all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", help="keep the shards here: a stopped run continues")
    parser.add_argument("--out", type=Path, help="write the row to this csv")
    parser.add_argument("--anyway", action="store_true", help="record on a busy CPU too")
    args = parser.parse_args(arguments)
    if args.out and (args.run or args.directory):
        raise SystemExit(
            "--out: records whole runs of all features; leave --run and --directory out"
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return run(args, Path(folder))


def run(args, folder: Path) -> int:
    shards = -(-args.features // args.shard)
    rows = min(args.features, args.run * args.shard) if args.run else args.features
    dtype = getattr(torch, args.dtype)
    W_dec = mapped(folder, "decoder", rows, args.width, dtype)
    model = Model(mapped(folder, "embedding", args.words, args.width, dtype))
    tokenizer = Tokenizer(args.words)
    vocab = fastsae.Vocabulary(tuple(f"w{i}" for i in range(args.words)))
    config = fastsae.SAEConfig(args.width, rows, k=32, hook_name="blocks.0.hook_resid_post")
    decoder = Decoder(config, W_dec, None)
    spent: dict[str, float] = {}
    disturbed, load = busy(), Load()
    with contextlib.ExitStack() as watched:
        for name in ("_make_tiles", "moments", "spread", "columns", "topk"):
            method = timed(getattr(MIParts, name), name, spent)
            watched.enter_context(mock.patch.object(MIParts, name, method))
        memory = watched.enter_context(PeakMemory())
        start = time.perf_counter()
        ex = explain_sharded(
            decoder, model, tokenizer, vocab, shard=args.shard, directory=args.directory
        )
        whole = time.perf_counter() - start
    disturbed = max(disturbed, load.others())
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items())
    print(f"{rows} features, {args.words} words, width {args.width}: {whole:.1f} s ({told})")
    print(f"peak beyond the weights: {memory.peak / 1e9:.2f} GB (limit {LIMIT_GB} GB)")
    check(ex, decoder, model, tokenizer, args.shard)
    if rows < args.features:
        once = sum(spent.get(name, 0.0) for name in ("_make_tiles", "moments"))
        per_shard = (whole - once) / (rows / args.shard)
        estimate = once + per_shard * shards
        print(f"extrapolated to {args.features} features: {estimate:.0f} s (not run)")
    if disturbed > BUSY_CORES:
        print(f"busy machine, this time is no measurement: others used {disturbed:.1f} cores")
    if args.out and disturbed > BUSY_CORES and not args.anyway:
        print("not recorded: the machine is busy (--anyway records)", file=sys.stderr)
    elif args.out:
        write_csv(args.out, [row_of(args, ex, whole, memory.peak)])
        print(f"wrote {args.out}")
    return int(memory.peak > LIMIT_GB * 1e9)


def check(ex, decoder: Decoder, model, tokenizer, shard: int) -> None:
    """Scores of the first, the middle and the last feature against log p(f|v) in float64."""
    features = [0, len(ex) // 2, len(ex) - 1]
    kept = ex.indices[features].long()
    words = word_vectors(model, tokenizer, [ex.vocab.words[v] for v in kept.flatten().tolist()])
    logits = []
    for rows in decoder.W_dec.split(shard):
        part = Decoder(decoder.config, rows, None)
        logits.append(feature_vectors(part, model, device="cpu").double() @ words.double().T)
    scaled = torch.cat(logits) / ex.temperature
    exact = scaled.log_softmax(0)[features].view(3, 3, -1)[range(3), range(3)]
    error = (ex.scores[features] - exact).abs().max().item()
    # fp32 logits of size |L|/T, and a sum over F of their exponentials
    bound = 1e-5 * scaled.abs().max().item()
    print(f"largest error of {exact.numel()} scores against float64: {error:.2g}")
    assert error <= bound, f"scores: error {error:.3g}, accepted are {bound:.3g}"


def row_of(args, ex, seconds: float, peak: int) -> Row:
    # Two products of every feature with every word (column sums, best words), and one of the words
    # with themselves for the temperature.
    flops = 4 * args.features * args.words * args.width + 2 * args.words * args.width**2
    size = getattr(torch, args.dtype).itemsize
    ms = seconds * 1e3
    return Row(
        op="explain_sharded",
        provider="native" if extension.problem() is None else "reference",
        version=version("fastsae-engine"),
        N=None,
        D=args.width,
        F=args.features,
        k=None,
        V=args.words,
        dtype=args.dtype,
        p20_ms=ms,
        p50_ms=ms,
        p80_ms=ms,
        base="",
        ratio=None,
        traffic_bytes=(args.features + args.words) * args.width * size,
        flops=flops,
        gbps=None,
        tflops=flops / ms / 1e9,
        peak_mb=peak / 2**20,
        output_mb=output_bytes((ex.scores, ex.indices)) / 2**20,
        kept_mb=None,
        state="one run",
        **machine("cpu"),
    )


def timed(method, name: str, spent: dict[str, float]):
    def call(*arguments):
        start = time.perf_counter()
        result = method(*arguments)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


if __name__ == "__main__":
    sys.exit(main())
