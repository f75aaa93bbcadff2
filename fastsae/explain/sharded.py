"""`explain` for many features: by shards, resumable from files, across processes, the same bits."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.explanations import Explanations, identity_of
from fastsae.explain.mi import _checked, _name_of, _on_cpu, feature_vectors
from fastsae.explain.progress import Progress
from fastsae.explain.storage import replacing
from fastsae.explain.vocabulary import Vocabulary, word_vectors
from fastsae.ops.mi_parts import MIParts, combine

PLAN = "plan.json"


@torch.no_grad()
def explain_sharded(
    sae,
    model,
    tokenizer,
    vocab: Vocabulary | None = None,
    objective: str = "pmi",
    top: int = 20,
    *,
    directory: str | Path | None = None,
    shard: int = 2048,
    temperature: float | str = "auto",
    translator: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Explanations:
    """`explain` in shards of `shard` features: the same scores, up to the rounding of sums.

    Three stages: the spread of the logits where temperature is "auto"; the column sums Σ_f e^(L/T)
    of every shard; the best words of every shard. Memory beyond the weights: the words (6·V·D bytes
    in AMX tiles, else 4·V·D) and logits of 512 features (2 kB per word), whatever F is.

    directory: keeps the result of every shard in files; a run that was stopped continues from them.
    A directory of another SAE, vocabulary or setting is an error that names the difference.
    sae: an SAE, or a `Decoder` with what explanations need of it: `W_dec` may be bfloat16, and
    memory-mapped as `fastsae.formats.load` gives it. Other arguments as in `explain`.

    Under torch.distributed (initialised by the caller; gloo or nccl) rank r computes shards r,
    r + world, ...; every rank calls this function and gets the whole result. Shards and the order
    in which they are combined do not depend on the number of processes or threads, so the result is
    the same bits for any of them, on equal hardware (one instruction set, or one GPU model; ranks
    that differ are an error).
    """
    vocab = _checked(objective, top, vocab)
    if isinstance(shard, bool) or not isinstance(shard, int) or shard < 1:
        raise FastsaeError(f"shard: got {shard!r}, accepted is an integer of 1 or more")
    if temperature != "auto" and not (
        isinstance(temperature, int | float) and 0 < temperature < math.inf
    ):
        raise FastsaeError(
            f'temperature: got {temperature!r}, expected a positive number or "auto"'
        )
    device = torch.device(sae.W_dec.device if device is None else device)
    run = _Run(sae, model, translator, device, shard, _Group(device))

    def words(begin: int, end: int) -> Tensor:
        part = Vocabulary(vocab.words[begin:end])
        return word_vectors(model, tokenizer, part).to(device, torch.float32)

    parts = MIParts(words, len(vocab), sae.config.d_in, device=device)
    identity, top = identity_of(sae), min(top, len(vocab))
    plan = {
        "sae": identity._asdict(),
        "model": _name_of(model),
        "vocabulary": hashlib.sha256("\n".join(vocab.words).encode()).hexdigest(),
        "objective": objective,
        "temperature": temperature,
        "top": top,
        "shard": shard,
        "arithmetic": parts.arithmetic,
        # What a lens or another model of the same name would change.
        "features": _digest(run.vectors(0)[:64]),
        "words": _digest(words(0, min(256, len(vocab)))),
    }
    run.group.agree(plan)
    if directory is not None:
        run.directory = _open(Path(directory), plan)
        run.group.wait()

    logit, auto = objective == "logit", temperature == "auto" and objective != "logit"
    costs = {"spread": 0.2 if auto else 0, "columns": 0 if logit else 1, "words": 1}
    total = sum(costs.values()) * len(sae.W_dec)
    with Progress("explain", total, "steps", on=progress and run.group.rank == 0) as bar:
        run.bar, run.costs = bar, costs
        if auto:
            temperature = _temperature(run, parts)
        temperature = 1.0 if logit else float(temperature)
        lse = torch.zeros(len(vocab))
        if not logit:
            found = run.stage("columns", lambda f: {"columns": parts.columns(f, temperature)})
            lse = combine(run.group.gather(found["columns"], run.count))
        kept = run.stage(
            "words",
            lambda f: dict(
                zip(
                    ("scores", "indices"),
                    parts.topk(f, lse, len(sae.W_dec), top, objective, temperature),
                    strict=True,
                )
            ),
        )
    scores, indices = (
        torch.cat(run.group.gather_rows(kept[name], run.rows)) for name in ("scores", "indices")
    )
    stats = None if sae.stats is None else sae.stats._replace(**_on_cpu(sae.stats))
    return Explanations(
        scores, indices, vocab, objective, temperature, _name_of(model), identity, stats
    )


class Decoder(NamedTuple):
    """The part of an SAE that explanations need."""

    config: object
    W_dec: Tensor
    stats: object


def _temperature(run: "_Run", parts: MIParts) -> float:
    """Standard deviation of L: within the rows by the words' Gram matrix, between them exactly."""
    moments: list[Tensor] = []

    def spread(features: Tensor) -> dict[str, Tensor]:
        if not moments:
            moments.extend(parts.moments())
        within, means = parts.spread(features, *moments)
        return {"within": within[None], "means": means}

    found = run.stage("spread", spread)
    moments.clear()
    within = run.group.gather(found["within"], run.count)[:, 0].tolist()
    means = torch.cat(run.group.gather_rows(found["means"], run.rows)).tolist()
    centre = math.fsum(means) / len(means)
    between = math.fsum((m - centre) ** 2 for m in means)
    square = (math.fsum(within) / parts.count + between) / len(means)
    if not 0 < square < math.inf:
        raise FastsaeError(
            f'temperature="auto": the logits have variance {square}; '
            "check features and words for NaN or constant rows"
        )
    return math.sqrt(square)


class _Run:
    """The shards of this process, and what is known of them."""

    bar: Progress
    costs: dict[str, float]

    def __init__(self, sae, model, translator, device, shard: int, group: "_Group"):
        self.sae, self.model, self.translator, self.device = sae, model, translator, device
        self.group, self.directory = group, None
        total = len(sae.W_dec)
        self.edges = [(i, min(i + shard, total)) for i in range(0, total, shard)]
        self.rows = [end - begin for begin, end in self.edges]
        self.count = len(self.edges)
        self.mine = range(group.rank, self.count, group.world)
        if group.world > self.count:
            raise FastsaeError(
                f"shard: {total} features are {self.count} shards of {shard}, fewer than the "
                f"{group.world} processes; use a smaller shard"
            )

    def vectors(self, number: int) -> Tensor:
        part = Decoder(self.sae.config, self.sae.W_dec[slice(*self.edges[number])], None)
        return feature_vectors(part, self.model, translator=self.translator, device=self.device)

    def stage(self, name: str, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, dict]:
        """{tensor name: {shard: tensor}} of this process's shards, from files where they exist."""
        found: dict[str, dict[int, Tensor]] = {}
        for number in self.mine:
            # The bar of rank 0 stands for all ranks, which do equal shares.
            step = self.costs[name] * self.rows[number] * self.count / len(self.mine)
            path = self.directory and self.directory / f"{name}-{number:05}.safetensors"
            if path and path.exists():
                tensors = _read(path)
                self.bar.skip(step)
            else:
                tensors = {k: t.contiguous() for k, t in compute(self.vectors(number)).items()}
                if path:
                    with replacing(path) as temporary:
                        save_file(tensors, temporary)
                self.bar.add(step, f"{name} {number + 1} of {self.count}")
            for key, tensor in tensors.items():
                found.setdefault(key, {})[number] = tensor
        return found


class _Group:
    """The processes, or one. Sums have one addend that is not zero: bits travel unchanged."""

    def __init__(self, device: torch.device):
        self.on = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.on else 0
        self.world = dist.get_world_size() if self.on else 1
        nccl = self.on and dist.get_backend() == "nccl"
        self.device = device if nccl else torch.device("cpu")

    def gather(self, mine: dict[int, Tensor] | None, count: int) -> Tensor:
        """[count, ...]: equal tensors of all shards in their order."""
        if not self.on:
            return torch.stack([mine[i] for i in range(count)])
        like = mine[self.rank]
        bits = {4: torch.int32, 8: torch.int64}[like.element_size()]
        out = torch.zeros(count, *like.shape, dtype=bits)
        for number, tensor in mine.items():
            out[number] = tensor.view(bits)
        out = out.to(self.device)
        dist.all_reduce(out)
        return out.cpu().view(like.dtype)

    def gather_rows(self, mine: dict[int, Tensor], rows: list[int]) -> list[Tensor]:
        """Tensors of all shards in their order; the last shard may have fewer rows."""
        if not self.on:
            return [mine[i] for i in range(len(rows))]
        padded = {
            i: torch.cat([t, t.new_zeros(max(rows) - len(t), *t.shape[1:])])
            for i, t in mine.items()
        }
        return [t[:n] for t, n in zip(self.gather(padded, len(rows)), rows, strict=True)]

    def agree(self, plan: dict) -> None:
        if not self.on:
            return
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).digest()
        own = torch.tensor(int.from_bytes(digest[:7], "big"), device=self.device)
        least, most = own.clone(), own.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if int(least) != int(most):
            raise FastsaeError(
                "the processes were given different SAEs, words, settings or hardware (rank "
                f"{self.rank}: {plan['arithmetic']}); start them alike"
            )

    def wait(self) -> None:
        if self.on:
            dist.all_reduce(torch.zeros(1, device=self.device))


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.float().cpu().contiguous().numpy()).hexdigest()[:16]


def _open(directory: Path, plan: dict) -> Path:
    """The directory, with its plan written or found equal."""
    path = directory / PLAN
    try:
        directory.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, json.JSONDecodeError) as error:
        raise FastsaeError(f"{path}: cannot be read ({error}); delete the directory") from None
    if found is None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    elif different := [key for key in plan if found.get(key) != plan[key]]:
        raise FastsaeError(
            f"{directory}: holds shards of another run ({_differences(found, plan, different)}); "
            "give another directory, or delete this one"
        )
    return directory


def _differences(found: dict, plan: dict, keys: Iterable[str]) -> str:
    short = {"sae", "vocabulary", "features", "words"}
    return ", ".join(
        f"{k} differs" if k in short else f"{k} {found.get(k)!r}, now {plan[k]!r}" for k in keys
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise FastsaeError(f"{path}: damaged ({error}); delete it and start again") from None
