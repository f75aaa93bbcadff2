"""One JSON line per request: what was asked, what was applied, how it ended."""

import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from fastsae.errors import FastsaeError

log = logging.getLogger("uvicorn.error")


class Audit:
    """Appends to a file ("-": standard output; None: nothing). Lines never mix, whoever writes.

    with_text: whether callers should also record prompts and answers. A file that was moved or
    deleted is opened anew. A line that cannot be written (the disk is full, the folder is gone) is
    lost: `lost` counts them, the first of a row of them is a warning in the log, and requests are
    answered all the same.
    """

    def __init__(self, path: str | Path | None, *, with_text: bool = False):
        self.with_text = with_text
        self.lost = 0
        self._path = None if path is None or str(path) == "-" else Path(path)
        self._lock = threading.Lock()
        self._failing = False
        self._torn = False  # the file ends within a line
        try:
            # Unbuffered: one write call per line, which O_APPEND keeps whole.
            where = 1 if str(path) == "-" else path
            self._file = None if path is None else open(where, "ab", buffering=0)
        except OSError as error:
            raise FastsaeError(f"audit: cannot write {path}: {error}") from error

    def record(self, **fields) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if self._file is None:
                return
            try:
                self._write(text)
            except OSError as error:
                self.lost += 1
                if not self._failing:
                    log.warning(
                        "audit: cannot write %s: %s; requests are answered without audit lines "
                        "until it can be written again",
                        self._path or "standard output",
                        error,
                    )
                self._failing = True
            else:
                self._failing = False

    def _write(self, text: bytes) -> None:
        if self._path is not None and self._moved():
            fresh = open(self._path, "ab", buffering=0)
            self._file.close()
            self._file, self._torn = fresh, False
        text = b"\n" + text if self._torn else text
        written = self._file.write(text)
        if written != len(text):
            self._torn = self._torn or bool(written)
            raise OSError(f"only {written} of {len(text)} bytes were written")
        self._torn = False

    def _moved(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
