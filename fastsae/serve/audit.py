"""One JSON line per steered request: who was steered by what, never what was said."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

from fastsae.errors import FastsaeError


class Audit:
    """Appends to a file; None writes nothing. Lines of several threads or processes never mix."""

    def __init__(self, path: str | Path | None):
        self._lock = threading.Lock()
        try:
            # Unbuffered: one write call per line, which O_APPEND keeps whole.
            self._file = None if path is None else open(path, "ab", buffering=0)
        except OSError as error:
            raise FastsaeError(f"audit: cannot write {path}: {error}") from error

    def record(self, **fields) -> None:
        if self._file is not None:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
            with self._lock:
                self._file.write(json.dumps(line).encode() + b"\n")
