"""Documents to token sequences, kept in a file: [tokens] int32 and the offsets of the sequences."""

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from fastsae.errors import FastsaeError
from fastsae.training.files import disk_errors, replace_directory

_CHUNK = 1 << 20


def special_ids(tokenizer) -> list[int]:
    """Ids of BOS, EOS and padding, those the tokenizer has."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return sorted({i for name in names if (i := getattr(tokenizer, name, None)) is not None})


def tokenize(
    documents: Iterable[str], tokenizer, ctx_len: int, *, pack: bool = True
) -> Iterator[list[int]]:
    """Sequences of at most ctx_len token ids, each beginning with BOS (if the tokenizer has one).

    pack=True: documents follow one another, separated by EOS (or BOS), and every sequence but the
    last is full. pack=False: a sequence holds one document or a piece of it. Deterministic; the
    order of the documents is kept. A document may hold any number of tokens.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    head = [] if bos is None else [bos]
    separator = [eos] if eos is not None else head
    body = ctx_len - len(head)
    if body < 1:
        raise FastsaeError(f"ctx_len: got {ctx_len}, expected at least {len(head) + 1}")
    held: list[int] = []
    for ids in _encoded(documents, tokenizer):
        if pack:
            held += (separator + ids) if held else ids
            full = len(held) - len(held) % body
        else:
            held, full = ids, len(ids)
        for i in range(0, full, body):
            yield head + held[i : min(i + body, full)]
        held = held[full:]
    if held:
        yield head + held


def _groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def _encoded(documents: Iterable[str], tokenizer) -> Iterator[list[int]]:
    for group in _groups(_limited(documents), 128):
        # verbose=False: "sequence longer than the model's maximum" is what packing is for.
        found = tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
        yield from (list(ids) for ids in found if len(ids))


def _limited(documents: Iterable[str]) -> Iterator[str]:
    """One long document must not make a group of 128 unbounded: cut it at white space."""
    for text in documents:
        while len(text) > _CHUNK:
            cut = text.rfind(" ", _CHUNK // 2, _CHUNK)
            cut = _CHUNK if cut < 0 else cut
            yield text[:cut]
            text = text[cut:]
        yield text


class TokenStore:
    """Token sequences on disk, memory-mapped: sequence s is tokens[offsets[s] : offsets[s + 1]].

    `about` is what was stored with it: digest (SHA-256 of the ids and lengths), sequences, tokens,
    and the caller's own entries. A store built without a directory lives in a temporary one.
    """

    def __init__(self, directory: Path, temporary: tempfile.TemporaryDirectory | None = None):
        self._temporary = temporary  # deleted with the store
        self.about = json.loads((directory / "about.json").read_text())
        self.offsets = np.load(directory / "offsets.npy")
        self.tokens = np.memmap(directory / "ids.bin", dtype=np.int32, mode="r")
        self.lengths = np.diff(self.offsets)
        self.longest = int(self.lengths.max())
        self._kept: dict[tuple, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        return self.about["digest"]

    @classmethod
    def build(
        cls,
        sequences: Iterable[list[int]],
        directory: Path | None = None,
        *,
        limit: int | None = None,
        about: dict | None = None,
        report: Callable[[int], None] | None = None,
    ) -> "TokenStore":
        """Write sequences until they hold `limit` tokens; `directory` appears whole or not at all.

        report(tokens) is called about every thousand sequences. An empty source is a FastsaeError.
        """
        temporary = tempfile.TemporaryDirectory() if directory is None else None
        final = Path(temporary.name) / "tokens" if temporary else directory
        draft = final.with_name(final.name + ".partial")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with disk_errors("the token file", final):
                draft.mkdir(parents=True)
                offsets, digest = _write_ids(sequences, draft / "ids.bin", limit, report)
                if len(offsets) < 2:
                    raise FastsaeError("text: the corpus is empty: it holds no token")
                np.save(draft / "offsets.npy", np.asarray(offsets, dtype=np.int64))
                record = {"digest": digest, "sequences": len(offsets) - 1, "tokens": offsets[-1]}
                (draft / "about.json").write_text(json.dumps((about or {}) | record, indent=1))
                replace_directory(draft, final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # what a failure leaves would fill the disk
        return cls(final, temporary)

    def kept(self, special: list[int], skip_positions: int) -> np.ndarray:
        """[sequences] int64: tokens of each that are at skip_positions or later and not special."""
        key = (tuple(special), skip_positions)
        if key not in self._kept:
            self._kept[key] = self._count(special, skip_positions)
        return self._kept[key]

    def _count(self, special: list[int], skip_positions: int) -> np.ndarray:
        counts = np.zeros(len(self), dtype=np.int64)
        step = max(1, (4 << 20) // self.longest)
        for first in range(0, len(self), step):
            last = min(first + step, len(self))
            base, offsets = self.offsets[first], self.offsets[first : last + 1]
            keep = ~np.isin(self.tokens[base : offsets[-1]], special)
            for skipped in range(skip_positions):
                at = offsets[:-1] - base + skipped
                keep[at[skipped < self.lengths[first:last]]] = False
            counts[first:last] = np.add.reduceat(keep, offsets[:-1] - base, dtype=np.int64)
        return counts

    def batch(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, T] int64, lengths [B]): the sequences padded on the right with zeros."""
        lengths = self.lengths[sequences]
        ids = np.zeros((len(sequences), int(lengths.max())), dtype=np.int64)
        for row, s in enumerate(sequences):
            ids[row, : lengths[row]] = self.tokens[self.offsets[s] : self.offsets[s + 1]]
        return ids, lengths


def _write_ids(sequences, path: Path, limit, report) -> tuple[array, str]:
    offsets, hasher = array("q", [0]), hashlib.sha256()
    with open(path, "wb") as file:
        for group in _groups(sequences, 1024):
            for ids in group:
                offsets.append(offsets[-1] + len(ids))
                if limit is not None and offsets[-1] >= limit:
                    break
            data = np.concatenate([np.asarray(i, dtype=np.int32) for i in group])
            data = data[: offsets[-1] - file.tell() // 4]
            hasher.update(data.tobytes())
            file.write(data.tobytes())
            if report is not None:
                report(offsets[-1])
            if limit is not None and offsets[-1] >= limit:
                break
    hasher.update(np.asarray(offsets, dtype=np.int64).tobytes())
    return offsets, hasher.hexdigest()
