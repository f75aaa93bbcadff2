"""One JSON line per request: what was asked, what was applied, how it ended."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

from fastsae.errors import FastsaeError


class Audit:
    """Appends to a file ("-": standard output; None: nothing). Lines never mix, whoever writes.

    with_text: whether callers should also record prompts and answers.
    """

    def __init__(self, path: str | Path | None, *, with_text: bool = False):
        self.with_text = with_text
        self._lock = threading.Lock()
        try:
            # Unbuffered: one write call per line, which O_APPEND keeps whole.
            where = 1 if str(path) == "-" else path
            self._file = None if path is None else open(where, "ab", buffering=0)
        except OSError as error:
            raise FastsaeError(f"audit: cannot write {path}: {error}") from error

    def record(self, **fields) -> None:
        if self._file is not None:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
            with self._lock:
                self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
