"""The model's own samples as a training corpus: batched generation with the KV cache."""

import gzip
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.errors import FastsaeError
from fastsae.models import model_device
from fastsae.training.files import disk_errors, write_json
from fastsae.training.fingerprint import model_fingerprint


def sample_texts(
    model: nn.Module,
    tokenizer,
    n_tokens: int,
    *,
    prompts: Sequence[str] = (),
    length: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Documents sampled from the model, together about n_tokens tokens of `length` each.

    Every document starts with BOS (or EOS, or nothing but the prompt) and one of `prompts` drawn at
    random; words make good prompts. A document ends at EOS. Batch b draws from a generator seeded
    with (seed, b) alone, so the samples do not depend on where one starts or stops.

    >>> next(sample_texts(model, tokenizer, 10_000))  # doctest: +SKIP
    """
    for b in range(_batches(n_tokens, batch_size, length)):
        yield from sample_batch(
            model,
            tokenizer,
            b,
            prompts=prompts,
            length=length,
            seed=seed,
            batch_size=batch_size,
            temperature=temperature,
            top_p=top_p,
        )


def write_samples(
    path: str | Path,
    model: nn.Module,
    tokenizer,
    n_tokens: int,
    *,
    batch_size: int = 32,
    length: int = 128,
    report: Callable[[int], None] | None = None,
    **options,
) -> Path:
    """`sample_texts` into a .jsonl or .jsonl.gz file, {"text": ...} per line; returns its path.

    `path`.json records the settings. A finished file with the same settings is kept; an interrupted
    call loses at most one batch, and the next one goes on where the last complete batch ended. A
    finished file with other settings is a FastsaeError. report(tokens) is called after every batch.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise FastsaeError(f"path: got {path}, samples are written as .jsonl or .jsonl.gz")
    settings = {"n_tokens": n_tokens, "batch_size": batch_size, "length": length} | options
    settings |= {"model": model_fingerprint(model)}
    record, draft = path.with_name(path.name + ".json"), path.with_name(path.name + ".partial")
    state = json.loads(record.read_text()) if record.exists() else {}
    same = state.get("settings") == json.loads(json.dumps(settings))
    if path.exists():
        if same:
            return path
        raise FastsaeError(f"samples: {path} exists with other settings; delete it or move it away")
    if not same or not draft.exists():
        state = {"settings": settings, "batches": 0, "bytes": 0}
    with disk_errors("the samples", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "r+b" if draft.exists() else "w+b") as file:
            file.truncate(state["bytes"])
            file.seek(state["bytes"])
            for b in range(state["batches"], _batches(n_tokens, batch_size, length)):
                documents = sample_batch(
                    model, tokenizer, b, batch_size=batch_size, length=length, **options
                )
                lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
                # Concatenated gzip members are one valid gzip file: a batch is one member.
                file.write(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
                file.flush()
                os.fsync(file.fileno())
                write_json(record, state | {"batches": b + 1, "bytes": file.tell()})
                if report is not None:
                    report((b + 1) * batch_size * length)
        os.replace(draft, path)
    return path


def _batches(n_tokens: int, batch_size: int, length: int) -> int:
    if n_tokens < 1:
        raise FastsaeError(f"n_tokens: got {n_tokens}, expected at least 1")
    return -(-n_tokens // (batch_size * length))


@torch.no_grad()
def sample_batch(
    model: nn.Module,
    tokenizer,
    batch: int,
    *,
    prompts: Sequence[str] = (),
    length: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[str]:
    """The documents of one batch; see `sample_texts`."""
    if not temperature > 0 or not 0 < top_p <= 1:
        raise FastsaeError(
            f"temperature, top_p: got {temperature} and {top_p}, expected > 0 and in (0, 1]"
        )
    device = model_device(model)
    rng = np.random.default_rng([seed, batch])
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    forced = _starts(tokenizer, prompts, batch_size, length, rng)
    ids = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    given = torch.tensor([len(row) for row in forced], device=device)
    for row, start in enumerate(forced):
        ids[row, : len(start)] = torch.tensor(start)
    done, eos = torch.zeros(batch_size, dtype=torch.bool, device=device), tokenizer.eos_token_id
    at, cache, new = int(given.min()), None, ids[:, : int(given.min())]
    while at < length and not bool(done.all()):
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        sampled = sample(out.logits[:, -1], temperature, top_p, generator)
        # Prompts differ in length: a row still inside its prompt takes the prompt's token.
        ids[:, at] = torch.where(at < given, ids[:, at], sampled)
        if eos is not None:
            done |= (ids[:, at] == eos) & (at >= given)
        new, at = ids[:, at : at + 1], at + 1
    return [
        text
        for row, start in zip(ids[:, :at].tolist(), forced, strict=True)
        if (text := _text(tokenizer, row, len(start), eos))
    ]


def _starts(tokenizer, prompts, batch_size, length, rng) -> list[list[int]]:
    bos = tokenizer.bos_token_id
    head = tokenizer.eos_token_id if bos is None else bos
    head = [] if head is None else [head]
    if not head and not prompts:
        raise FastsaeError("prompts: this tokenizer has neither BOS nor EOS; give some prompts")
    chosen = [prompts[i] for i in rng.integers(len(prompts), size=batch_size)] if prompts else []
    encoded = tokenizer(chosen, add_special_tokens=False)["input_ids"] if chosen else []
    starts = [head + list(ids) for ids in encoded] or [head] * batch_size
    return [start[: max(1, length - 1)] for start in starts]


def _text(tokenizer, row: list[int], start: int, eos: int | None) -> str:
    if eos is not None and eos in row[start:]:
        row = row[: start + row[start:].index(eos)]
    return tokenizer.decode(row, skip_special_tokens=True).strip()


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row of logits [B, V] by nucleus sampling: [B] int64.

    A draw v from softmax(logits / T) is in the nucleus iff the tokens more probable than v hold
    less than top_p of the mass; others are drawn again. That needs 1 / top_p draws on average and
    no sort of a 262 144-token vocabulary. The most probable token stands in after 64 refusals.
    """
    p = torch.softmax(logits.float() / temperature, dim=-1)
    cumulative = p.cumsum(-1)
    chosen = p.argmax(-1)
    open_rows = torch.ones_like(chosen, dtype=torch.bool)
    for _ in range(64):
        u = torch.rand(len(p), 1, generator=generator, device=p.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, u, right=True).clamp(max=p.shape[1] - 1)
        if top_p < 1:
            above = torch.where(p > p.gather(1, drawn), p, 0).sum(-1)
            accepted = open_rows & (above < top_p)
        else:
            accepted = open_rows
        chosen = torch.where(accepted, drawn[:, 0], chosen)
        open_rows = open_rows & ~accepted
        if not bool(open_rows.any()):
            break
    return chosen
