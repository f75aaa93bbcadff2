"""Explanations on disk: one safetensors file with JSON in its header, or one JSON file."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastsae.errors import FastsaeError
from fastsae.explain.explanations import Explanations, SAEIdentity
from fastsae.explain.vocabulary import Vocabulary
from fastsae.sae import FeatureStats

FORMAT = "fastsae-explanations"
VERSION = 1
FILE_NAME = "explanations.safetensors"
_KEY = "fastsae"  # safetensors headers map strings to strings; ours holds one JSON text


def _metadata(ex: Explanations) -> dict:
    return {
        "format": FORMAT,
        "version": VERSION,
        "objective": ex.objective,
        "temperature": ex.temperature,
        "model_name": ex.model_name,
        "sae": ex.sae._asdict(),
        "vocabulary": {
            "source": ex.vocab.source,
            "words": ex.vocab.words,
            "frequencies": ex.vocab.frequencies,
        },
        "made_with": ex.made_with,
        "stats_tokens": None if ex.stats is None else ex.stats.tokens,
    }


def _build(meta: dict, scores, indices, stats: dict | None) -> Explanations:
    vocabulary = meta["vocabulary"]
    vocab = Vocabulary(vocabulary["words"], vocabulary["frequencies"], vocabulary["source"])
    if stats is not None:
        stats = FeatureStats(**stats, tokens=meta["stats_tokens"])
    return Explanations(
        scores,
        indices,
        vocab,
        meta["objective"],
        meta["temperature"],
        meta["model_name"],
        SAEIdentity(**meta["sae"]),
        stats,
        meta.get("made_with", {}),
    )


def _stats_tensors(ex: Explanations) -> dict[str, torch.Tensor]:
    if ex.stats is None:
        return {}
    names = ("frequency", "mean", "max")
    return {name: getattr(ex.stats, name).float().cpu().contiguous() for name in names}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that takes its place when the block succeeds."""
    if not path.parent.is_dir():
        raise FastsaeError(f"{path}: the folder {path.parent} does not exist; create it first")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would hide the file from colleagues
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(ex: Explanations, path: Path) -> Path:
    if path.suffix == ".json":
        to_json(ex, path)
        return path
    if path.is_dir():
        path = path / FILE_NAME
    tensors = {"scores": ex.scores.contiguous(), "indices": ex.indices.contiguous()}
    tensors |= {f"stats.{name}": t for name, t in _stats_tensors(ex).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(_metadata(ex))})
    return path


def to_json(
    ex: Explanations,
    path: Path | None,
    features: Sequence[int] | None = None,
    top: int | None = None,
) -> str:
    if top is not None and top < 1:
        raise FastsaeError(f"top: got {top}, accepted is an integer of 1 or more, or None for all")
    chosen = range(len(ex)) if features is None else [ex._row(f) for f in features]
    stats = {name: t.tolist() for name, t in _stats_tensors(ex).items()}
    entries = [
        {
            "feature": f,
            "words": ex.words(f)[:top],
            "scores": ex.scores_of(f)[:top],
            **{name: values[f] for name, values in stats.items()},
        }
        for f in chosen
    ]
    text = json.dumps(_metadata(ex) | {"features": entries}, ensure_ascii=False)
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def load(path: Path) -> Explanations:
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FastsaeError(f"{path}: no such file; explanations are written by Explanations.save")
    try:
        # safetensors begins with the 8 bytes of its header's length and then "{"; JSON with "{".
        with open(path, "rb") as file:
            is_json = file.read(1) == b"{" and file.read(8)[7:] != b"{"
        return _load_json(path) if is_json else _load_safetensors(path)
    except FastsaeError as error:
        raise FastsaeError(f"{path}: {error}") from None
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise FastsaeError(
            f"{path}: not a file of explanations, or truncated ({reason}); save it again"
        ) from None
    except (KeyError, TypeError) as error:
        raise FastsaeError(
            f"{path}: the metadata of the explanations is damaged ({error}); save it again"
        ) from None


def _checked(meta: object) -> dict:
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise FastsaeError("holds no explanations of fastsae (Explanations.save writes them)")
    if meta.get("version") != VERSION:
        raise FastsaeError(
            f"format version {meta.get('version')}, this fastsae reads {VERSION}; update fastsae"
        )
    return meta


def _load_safetensors(path: Path) -> Explanations:
    with safe_open(path, framework="pt") as file:
        meta = _checked(json.loads((file.metadata() or {}).get(_KEY, "null")))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    stats = {n.removeprefix("stats."): t for n, t in tensors.items() if n.startswith("stats.")}
    return _build(meta, tensors["scores"], tensors["indices"], stats or None)


def _load_json(path: Path) -> Explanations:
    meta = _checked(json.loads(path.read_text(encoding="utf-8")))
    entries = meta["features"]
    lengths = {len(e["words"]) for e in entries}
    complete = [e["feature"] for e in entries] == list(range(meta["sae"]["d_sae"]))
    if not complete or len(lengths) != 1:
        raise FastsaeError(
            f"holds {len(entries)} of {meta['sae']['d_sae']} features, an excerpt for reading; "
            "load a file that was saved whole"
        )
    position = {word: i for i, word in enumerate(meta["vocabulary"]["words"])}
    scores = torch.tensor([e["scores"] for e in entries], dtype=torch.float32)
    indices = torch.tensor([[position[w] for w in e["words"]] for e in entries], dtype=torch.int32)
    stats = None
    if meta["stats_tokens"] is not None:
        stats = {n: torch.tensor([e[n] for e in entries]) for n in ("frequency", "mean", "max")}
    return _build(meta, scores, indices, stats)
