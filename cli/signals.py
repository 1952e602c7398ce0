"""Ctrl-C and SIGTERM: the end of the process, or, where there is work to stop cleanly, an exception."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mergemill.cli import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
PATIENCE_S = 2.0  # wrappers forward a Ctrl-C that the terminal sends too: a second one so soon is the first

Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """The user or the system asked to stop; the text says how far the work was and how to go on.

    Not a KeyboardInterrupt, which Typer would swallow, nor an Exception, which libraries do.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """By the shells' convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


def leave_on_signals() -> None:
    """From now on, a signal ends the process at once, with one line: nothing is lost by that.

    No exception, because libraries that are being imported swallow some.
    """
    for number in SIGNALS:
        _set_handler(number, _leave)


@contextmanager
def raise_interrupts() -> Iterator[None]:
    """Raise `Interrupted` for the first signal; one later than `PATIENCE_S` ends the process at once."""
    first_s: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first_s:
            first_s.append(time.monotonic())
            raise Interrupted(number, WORDS[signal.Signals(number)])
        if time.monotonic() - first_s[0] > PATIENCE_S:
            _leave(number, frame)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        _set_handler(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def hold_back(*, processes: int) -> Iterator[None]:
    """Let signals wait until `let_through`, or the end of the block, in which `processes` workers are started.

    A thread inherits what is held back where it is started, and a process does from its thread. So the
    threads and worker processes of a cluster that starts meanwhile stay deaf to the Ctrl-C that a terminal
    sends to all of them: only the main thread is stopped, and it stops the others.
    """
    if processes:
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # else it starts with the first worker, and lets signals through
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        let_through()


def let_through() -> None:
    """End `hold_back` for this thread; a signal that came meanwhile acts now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _set_handler(number: signal.Signals, handler: Handler) -> None:
    """Handle a signal, unless the process was started to ignore it (``nohup``, a background job)."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    console.restore_terminal()
    console.show_stop(WORDS[signal.Signals(number)])
    os._exit(128 + number)
