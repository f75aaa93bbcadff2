"""What a training run shows and records: a progress bar, and train_log.jsonl."""

import json
import sys
import time
from pathlib import Path

from fastsae.training.files import disk_errors

_SECONDS = 10.0


class Progress:
    """A tqdm bar on a terminal, a plain line every ten seconds elsewhere, nothing when off.

    Everything goes to stderr.
    """

    def __init__(self, title: str, total: int | None, *, start: int = 0, on: bool = True):
        self.title, self.total, self.on = title, total, on
        self.at, self._shown, self._bar = start, time.monotonic(), None
        if on and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=start, desc=title, unit="tok", unit_scale=True)

    def to(self, at: int, **facts: str) -> None:
        """Move to `at` and show `facts` beside the count."""
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(at - self.at)
        elif self.on and (at == self.total or time.monotonic() - self._shown >= _SECONDS):
            self._shown = time.monotonic()
            told = "".join(f", {name} {value}" for name, value in facts.items())
            of = f" of {self.total:,}" if self.total else ""
            print(f"{self.title}: {at:,}{of} tokens{told}", file=sys.stderr)
        self.at = at

    def say(self, line: str) -> None:
        """One line that does not break the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self.on:
            print(line, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()


class Log:
    """train_log.jsonl: an object per logged step. A resumed run first drops what it will repeat."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = []
        if step and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        with disk_errors("the log", path):
            path.write_text("".join(line + "\n" for line in kept))

    def add(self, record: dict) -> None:
        with disk_errors("the log", self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by an interruption
