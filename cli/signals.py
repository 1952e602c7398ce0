"""Ctrl-C and SIGTERM as an exception in the main thread."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mergemill.cli.console import restore_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 2.0  # wrappers forward a Ctrl-C that the terminal has sent already: one soon after the first is the same


class Interrupted(BaseException):
    """The user or the system asked to stop; the text says how to go on.

    Not a KeyboardInterrupt, which Typer would swallow, nor an Exception, which libraries do.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """By the shells' convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    def at(self, progress: str) -> "Interrupted":
        """Return the same with `progress` behind its word."""
        return Interrupted(self.number, f"{self}{progress}")


@contextmanager
def raise_interrupts() -> Iterator[None]:
    """Raise `Interrupted` for the first signal; another one, later than `PATIENCE_S`, ends the process at once.

    A signal that the process was started to ignore (``nohup``, a background job) stays ignored.
    """
    first_s: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first_s:
            first_s.append(time.monotonic())
            raise Interrupted(number, "interrupted" if number == signal.SIGINT else "terminated")
        if time.monotonic() - first_s[0] > PATIENCE_S:
            restore_terminal()
            os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
