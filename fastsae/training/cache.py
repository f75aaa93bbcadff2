"""Activations on disk, so that later epochs (and later runs) do not run the model again."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.training.files import disk_errors, sync, write_json

_TYPES = {"float32": np.float32, "bfloat16": np.int16, "float16": np.float16}


class ActivationCache:
    """Rows [R, D] in one flat file `path`, which sequences are present in `path`.done.npy.

    key identifies the rows (model, layer, tokens, ...); a file that holds other rows is an error
    naming the first entry that differs. Rows read back are what a later run will read, so the
    activations are rounded to `dtype` ("float32", "bfloat16", "float16") from their first use on.
    """

    def __init__(self, path: Path, rows: int, width: int, sequences: int, dtype: str, key: dict):
        self.path, self.width, self.dtype = Path(path), width, getattr(torch, dtype)
        self._numpy = np.dtype(_TYPES[dtype])
        self._about = self.path.with_name(self.path.name + ".json")
        self._done = self.path.with_name(self.path.name + ".done.npy")
        self.done = np.zeros(sequences, dtype=bool)
        wanted = {"width": width, "rows": rows, "dtype": dtype} | key
        with disk_errors("the activation cache", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self._about.exists():
                self._check(json.loads(self._about.read_text()), wanted)
                if self._done.exists():
                    self.done = np.load(self._done)
            else:
                self._done.unlink(missing_ok=True)
            # No writable mapping: on a full disk that dies of SIGBUS where pwrite says ENOSPC.
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, rows * width * self._numpy.itemsize)
            write_json(self._about, wanted)
        self._map = np.memmap(self.path, dtype=self._numpy, mode="r", shape=(rows, width))

    def _check(self, found: dict, wanted: dict) -> None:
        for name, value in wanted.items():
            if found.get(name) != value:
                raise FastsaeError(
                    f"activation_cache: {self.path} holds other activations ({name} is "
                    f"{found.get(name)!r}, this run has {value!r}); delete it or name another file"
                )

    def write(self, sequence: int, start: int, rows: Tensor) -> None:
        """Store the rows [M, D] of one sequence, the first of them at row `start` of the file."""
        data = rows.to(self.dtype).cpu().contiguous()
        if self.dtype == torch.bfloat16:
            data = data.view(torch.int16)
        with disk_errors("the activation cache", self.path):
            view = memoryview(data.numpy()).cast("B")
            at = start * self.width * self._numpy.itemsize
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
        self.done[sequence] = True

    def read(self, ids: np.ndarray) -> Tensor:
        """Rows by number: [M, D] in the cache's dtype, on the CPU."""
        if len(ids) and ids[-1] - ids[0] == len(ids) - 1 and (np.diff(ids) == 1).all():
            rows = torch.from_numpy(self._map[ids[0] : ids[-1] + 1].copy())
        else:
            rows = torch.from_numpy(self._map[ids])
        return rows.view(torch.bfloat16) if self.dtype == torch.bfloat16 else rows

    def flush(self) -> None:
        """Make every row that `done` promises durable, then the promise itself."""
        with disk_errors("the activation cache", self.path):
            os.fsync(self._file)
            draft = self._done.with_name(self._done.name + ".partial")
            with open(draft, "wb") as file:
                np.save(file, self.done)
            sync(draft)
            os.replace(draft, self._done)

    def close(self) -> None:
        os.close(self._file)

    def delete(self) -> None:
        """Close the cache and remove its files."""
        self.close()
        for path in (self.path, self._about, self._done):
            path.unlink(missing_ok=True)
