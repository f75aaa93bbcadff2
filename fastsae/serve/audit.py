"""One JSON line per request: what was asked, what was applied, how it ended."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError


class Audit:
    """Appends whole lines to a file ("-": standard output; None: nowhere); text only if asked."""

    def __init__(self, path: str | Path | None, *, with_text: bool = False):
        self.with_text = with_text
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            try:
                self._file = open(1 if str(path) == "-" else path, "a", encoding="utf-8")
            except OSError as error:
                raise FastsaeError(f"audit log: cannot write {path}: {error.strerror}") from error

    def write(self, record: dict[str, Any], *, prompt: str = "", text: str = "") -> None:
        if self._file is None:
            return
        record = {"time": round(time.time(), 3), **record}
        if self.with_text:
            record |= {"prompt": prompt, "text": text}
        line = json.dumps(record, ensure_ascii=False)
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
