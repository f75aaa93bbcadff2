"""SIGINT and SIGTERM during training: finish the step, write a checkpoint, leave with one line."""

import signal
import threading


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after writing a checkpoint; str(error) is one clear line."""


class StopRequested(Exception):
    """Raised by `Signals.check` where the run can be continued exactly."""


class Signals:
    """Inside the block the first SIGINT or SIGTERM sets `requested`; a second one acts as usual.

    Outside the main thread Python does not allow handlers, and nothing is changed.
    """

    def __init__(self):
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, _number, _frame):
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def check(self) -> None:
        if self.requested:
            raise StopRequested

    def __exit__(self, *_):
        self._restore()
