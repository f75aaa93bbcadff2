"""Progress of long work on stderr, with the time that is left."""

import math
import sys
import time

_SECONDS = 10.0


class Progress:
    """A tqdm bar on a terminal, a plain line every ten seconds elsewhere, nothing when off."""

    def __init__(self, title: str, total: float, unit: str, *, on: bool = True):
        self.title, self.total, self.unit, self.on = title, total, unit, on
        self.at, self._skipped, self._bar = 0.0, 0.0, None
        self._start = self._shown = time.monotonic()
        if on and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}{postfix}]"
            known = not math.isinf(total)
            self._bar = tqdm(
                total=total if known else None, desc=title, unit=unit,
                bar_format=shape if known else None,
            )  # fmt: skip

    def skip(self, amount: float) -> None:
        """Work that an earlier run has done: it counts, but says nothing about the speed."""
        self.at += amount
        self._skipped += amount
        if self._bar is not None:
            self._bar.initial += amount
            self._bar.update(amount)

    def add(self, amount: float, note: str = "") -> None:
        """Move by `amount` and show `note` beside the count."""
        self.at += amount
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
            return
        done = self.at >= self.total * (1 - 1e-9)  # sums of fractions end just below the total
        if self.on and (done or time.monotonic() - self._shown >= _SECONDS):
            self._shown = time.monotonic()
            size = "?" if math.isinf(self.total) else f"{self.total:,.0f}"
            line = f"{self.title}: {self.at:,.0f} of {size} {self.unit}, {self.left()}"
            print(line + (f", {note}" if note else ""), file=sys.stderr, flush=True)

    def left(self) -> str:
        """The time that the rest takes at the speed so far."""
        if math.isinf(self.total):
            return "? left"
        done, spent = self.at - self._skipped, time.monotonic() - self._start
        if done <= 0:
            return "? left"
        seconds = round(spent * max(0.0, self.total - self.at) / done)
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()
