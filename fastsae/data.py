"""Text to activations: read documents, pack them into sequences, run the model up to one layer.

Memory is bounded whatever the corpus: token ids live in a file, activations in a shuffle buffer of
fixed size. Everything is seeded, and `ActivationStream.state_dict` continues bit for bit.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.errors import FastsaeError
from fastsae.models import Hook, hook_module, model_device, residual_of, resolve_hook
from fastsae.training.cache import ActivationCache
from fastsae.training.fingerprint import model_fingerprint
from fastsae.training.tokens import TokenStore, special_ids, tokenize

__all__ = [
    "ActivationStream",
    "TokenStore",
    "layer_activations",
    "model_fingerprint",
    "texts",
    "tokenize",
]

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
_LONGEST_DOCUMENT = 1 << 20  # characters; a .txt file without blank lines must not fill the memory
_BUFFER_BYTES = 512 << 20


# --- text ---------------------------------------------------------------------------------------


def texts(paths: str | Path | Iterable[str | Path], *, field: str = "text") -> Iterator[str]:
    """Documents of .txt, .txt.gz, .jsonl and .jsonl.gz files, one at a time, in the order given.

    In a .txt file blank lines separate documents (and a document over 2²⁰ characters is cut at a
    line end); in JSON lines a document is the string `field` of an object. A folder stands for its
    files of these types, sorted by name, at any depth. Empty documents are dropped. UTF-8 only.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> _ = path.write_text("one\\nline\\n\\n\\ntwo\\n")
    >>> list(texts(path))
    ['one\\nline', 'two']
    """
    return _documents(text_files(paths), field)


def text_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that `texts` reads, in order; a missing or unknown one is a FastsaeError."""
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    return [file for path in listed for file in _files(Path(path))]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        if not found:
            raise FastsaeError(f"text: folder {path} holds no {', '.join(SUFFIXES)} file")
        return found
    if not path.is_file():
        raise FastsaeError(f"text: {path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise FastsaeError(f"text: cannot read {path}; accepted are {', '.join(SUFFIXES)}")
    return [path]


def _documents(files: list[Path], field: str) -> Iterator[str]:
    for path in files:
        lines = path.name.removesuffix(".gz").endswith(".jsonl")
        opener = gzip.open if path.name.endswith(".gz") else open
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                found = _json_lines(path, file, field) if lines else _paragraphs(file)
                yield from (text for text in found if text.strip())
        except UnicodeDecodeError as error:
            raise FastsaeError(
                f"text: {path} is not UTF-8 ({error.reason}); convert it, for example with iconv"
            ) from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise FastsaeError(f"text: {path} is a damaged gzip file: {error}") from error


def _json_lines(path: Path, file: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FastsaeError(f"text: {path} line {number} is not JSON: {error.msg}") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
            raise FastsaeError(f"text: {path} line {number} has no string {field!r} (has {has})")
        yield text


def _paragraphs(file: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in file:
        if not line.strip() or size + len(line) > _LONGEST_DOCUMENT:
            yield "".join(held).strip("\n")
            held, size = [], 0
        if line.strip():
            held.append(line)
            size += len(line)
    yield "".join(held).strip("\n")


# --- the model up to one layer ------------------------------------------------------------------


class _Reached(Exception):
    """Raised by the hook: the rest of the model, and its LM head, are not computed."""


def layer_activations(
    model: nn.Module, hook: str | int | Hook, ids: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The residual stream [B, T, D] at a hook point, in the model's dtype; nothing after it is run.

    ids [B, T] int64 on the model's device; mask [B, T] (1 = token) only when rows are padded.
    Runs without gradient, whatever the caller's mode.
    """
    module, side = hook_module(model, hook)
    found: list[Tensor] = []

    def before(_module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    def after(_module, _args, output):
        found.append(residual_of(output))
        raise _Reached

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        raise FastsaeError(f"layer: {type(model).__name__} never ran the layer at {hook!r}")
    return found[0].detach()


# --- activations --------------------------------------------------------------------------------


class ActivationStream:
    """An endless, shuffled, bounded-memory stream of activations: [batch_tokens, D] float32.

    source: a TokenStore, or documents (an iterable of str) to tokenize with `tokenizer`.
    layer: a hook point of `resolve_hook`. ctx_len, pack: see `tokenize`.
    batch_size: sequences per run of the model (default: about 4096 tokens).
    buffer_tokens: capacity of the shuffle buffer, at least 2·batch_tokens (default: up to 131072
    tokens and 512 MB). Half of it is emitted, then refilled from the model, then all of it is
    shuffled again. Each epoch visits the sequences in a new order fixed by (seed, epoch).
    Positions below skip_positions and BOS, EOS and padding tokens are left out: they are attention
    sinks with massive norms. dtype: of the buffer (default: the model's, or the cache's).
    cache: an ActivationCache, so that later epochs do not run the model again. sequences: the part
    of the store to stream. check: called between runs of the model, where the state is consistent;
    it may raise to interrupt.

    Errors: NaN or infinite activations, an empty source, a missing layer, too small a buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        source: "TokenStore | Iterable[str]",
        layer: str | int | Hook,
        *,
        ctx_len: int = 128,
        pack: bool = True,
        batch_tokens: int = 4096,
        batch_size: int | None = None,
        buffer_tokens: int | None = None,
        seed: int = 0,
        skip_positions: int = 1,
        dtype: torch.dtype | None = None,
        cache: ActivationCache | None = None,
        sequences: Sequence[int] | np.ndarray | None = None,
        check: Callable[[], None] | None = None,
    ):
        hook_module(model, layer)  # a missing layer must fail before a corpus is tokenized
        if not isinstance(source, TokenStore):
            source = TokenStore.build(tokenize(source, tokenizer, ctx_len, pack=pack))
        self.model, self.store, self.hook = model, source, resolve_hook(layer)
        self.device = model_device(model)
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size or max(1, 4096 // source.longest)
        self.seed, self.skip_positions = seed, skip_positions
        self.special = special_ids(tokenizer)
        self.kept = source.kept(self.special, skip_positions)
        self.cache, self.check = cache, check
        chosen = np.arange(len(source)) if sequences is None else np.asarray(sequences)
        self.sequences = chosen[self.kept[chosen] > 0]
        self.corpus_tokens = int(self.kept[self.sequences].sum())
        if not self.corpus_tokens:
            raise FastsaeError(
                "text: the corpus is empty: no token is left after BOS, EOS and the first "
                f"{skip_positions} positions of each sequence"
            )
        self._start = np.concatenate([[0], np.cumsum(self.kept)])
        self.epoch = self.position = self.model_batches = 0
        self._order = self._epoch_order()
        self._generator = torch.Generator().manual_seed(seed)
        self._capacity_wanted, self._dtype = buffer_tokens, dtype
        self._rows: Tensor | None = None  # allocated when the width is known
        self._pending: tuple[Tensor, Tensor] | None = None

    # --- sequences to rows ---

    def _epoch_order(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch])
        return self.sequences[rng.permutation(len(self.sequences))]

    def rows(self, sequences: np.ndarray) -> Iterator[Tensor]:
        """Activations of the given sequences in order, unshuffled: [M, D] per run of the model."""
        for i in range(0, len(sequences), self.batch_size):
            yield self._activations(sequences[i : i + self.batch_size])[0]

    def _row_ids(self, sequences: np.ndarray) -> np.ndarray:
        """Global row numbers of the kept tokens of some sequences: their address in the cache."""
        parts = [np.arange(self._start[s], self._start[s + 1]) for s in sequences]
        return np.concatenate(parts)

    def _activations(self, sequences: np.ndarray) -> tuple[Tensor, Tensor]:
        ids = self._row_ids(sequences)
        if self.cache is None:
            return self._run(sequences), torch.from_numpy(ids)
        if not self.cache.done[sequences].all():
            rows = self._run(sequences)
            # The whole batch runs even if a part is known: the values must not depend on history.
            begin = 0
            for s, count in zip(sequences, self.kept[sequences], strict=True):
                if not self.cache.done[s]:
                    self.cache.write(s, int(self._start[s]), rows[begin : begin + count])
                begin += count
        return self.cache.read(ids).to(self.device), torch.from_numpy(ids)

    def _run(self, sequences: np.ndarray) -> Tensor:
        ids, lengths = self.store.batch(sequences)
        position = np.arange(ids.shape[1])
        real = position < lengths[:, None]
        keep = real & (position >= self.skip_positions) & ~np.isin(ids, self.special)
        tokens = torch.from_numpy(ids).to(self.device)
        mask = None if real.all() else torch.from_numpy(real.astype(np.int64)).to(self.device)
        acts = layer_activations(self.model, self.hook, tokens, mask)
        rows = acts[torch.from_numpy(keep).to(self.device)]
        self.model_batches += 1
        if not bool(torch.isfinite(rows).all()):
            raise FastsaeError(
                f"layer {self.hook.layer}: NaN or infinite activations in model batch "
                f"{self.model_batches} (sequences {', '.join(map(str, sequences[:4]))}, ...); "
                "load the model in float32 or bfloat16, or train on an earlier layer"
            )
        return rows

    # --- the shuffle buffer ---

    def _allocate(self, like: Tensor) -> None:
        dtype = self._dtype or like.dtype
        row_bytes = like.shape[1] * dtype.itemsize
        fits = min(1 << 17, _BUFFER_BYTES // row_bytes, self.corpus_tokens)
        least = 2 * self.batch_tokens
        capacity = self._capacity_wanted or max(least, fits)
        if capacity < least:
            raise FastsaeError(
                f"buffer_tokens: got {capacity}, expected at least 2·batch_tokens = {least}"
            )
        self._rows = torch.empty(capacity, like.shape[1], dtype=dtype, device=self.device)
        self._ids = torch.zeros(capacity, dtype=torch.int64)
        # Slots slots[filled:cursor] are free; the others hold rows that were not emitted yet.
        self._slots = torch.arange(capacity)
        self._filled, self._cursor = 0, capacity

    @property
    def buffered(self) -> int:
        """Rows in the buffer that were not emitted yet; grows while it is being filled."""
        return 0 if self._rows is None else len(self._slots) - self._cursor + self._filled

    def _next_rows(self) -> tuple[Tensor, Tensor]:
        if self._pending is not None:
            rows, self._pending = self._pending, None
            return rows
        if self.check is not None:
            self.check()
        chosen = self._order[self.position : self.position + self.batch_size]
        rows = self._activations(chosen)
        self.position += len(chosen)
        if self.position >= len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order()
        return rows

    def _refill(self) -> None:
        if self._rows is None:
            self._pending = self._next_rows()
            self._allocate(self._pending[0])
        if self._filled == 0 and self._cursor < len(self._slots) // 2:
            return
        while self._filled < self._cursor:
            rows, ids = self._next_rows()
            count = min(len(rows), self._cursor - self._filled)
            slots = self._slots[self._filled : self._filled + count]
            self._rows[slots.to(self.device)] = rows[:count].to(self._rows.dtype)
            self._ids[slots] = ids[:count]
            self._filled += count
            if count < len(rows):
                self._pending = rows[count:], ids[count:]
        self._slots = torch.randperm(len(self._slots), generator=self._generator)
        self._filled = self._cursor = 0

    def peek(self, tokens: int) -> Tensor:
        """Up to `tokens` rows of what comes next, float32, without consuming them."""
        self._refill()
        slots = self._slots[self._cursor : self._cursor + tokens]
        return self._rows[slots.to(self.device)].float()

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Tensor:
        batch = self.peek(self.batch_tokens)
        self._cursor += self.batch_tokens
        return batch

    # --- exact resume ---

    def state_dict(self) -> dict[str, int | Tensor]:
        """Position, random state and the rows not yet emitted (addresses only, with a cache)."""
        state: dict[str, int | Tensor] = {
            "epoch": self.epoch,
            "position": self.position,
            "model_batches": self.model_batches,
            "generator": self._generator.get_state(),
        }
        if self._rows is None:
            return state
        live = torch.cat([self._slots[: self._filled], self._slots[self._cursor :]])
        state |= {"filled": self._filled, "cursor": self._cursor, "slots": self._slots.clone()}
        state["ids"] = self._ids[live]
        rows = self._rows[live.to(self.device)]
        if self._pending is not None:
            rows = torch.cat([rows, self._pending[0].to(rows.dtype)])
            state["ids"] = torch.cat([state["ids"], self._pending[1]])
        if self.cache is None:
            state["rows"] = rows.cpu()
        else:
            self.cache.flush()
        return state

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        """Continue exactly where `state_dict` was taken, on the same store, seed and settings."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.model_batches = int(state["model_batches"])
        self._order = self._epoch_order()
        self._generator.set_state(state["generator"])
        self._rows = self._pending = None
        if "slots" not in state:
            return
        ids = state["ids"]
        rows = state["rows"] if self.cache is None else self.cache.read(ids.numpy())
        self._dtype = self._dtype or rows.dtype
        self._capacity_wanted = len(state["slots"])
        self._allocate(rows)
        self._slots = state["slots"].clone()
        self._filled, self._cursor = int(state["filled"]), int(state["cursor"])
        live = torch.cat([self._slots[: self._filled], self._slots[self._cursor :]])
        rows = rows.to(self.device)
        self._rows[live.to(self.device)] = rows[: len(live)].to(self._rows.dtype)
        self._ids[live] = ids[: len(live)]
        if len(ids) > len(live):
            self._pending = rows[len(live) :], ids[len(live) :]
