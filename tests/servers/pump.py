"""Bodies of HTTP/1.1, passed from one socket to another without looking at them.

Source: RFC 9112, section 7.1 (chunks); splice(2).
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable

from servers.http1 import Ended, Wire

PIECE_BYTES = 1 << 20
PIPE_BYTES = 1 << 18
"""A user has 64 MiB of pipes."""
PACE_S = 0.005
"""A paced body goes in pieces that take about this long."""
CATCH_UP_S = 0.05
"""How much of a lateness a paced body makes up for."""
OTHER = bytes(byte ^ 0xFF for byte in range(256))


class Unwanted(Exception):
    """The receiver of a message is gone before its end."""


class Cut(Exception):
    """As much as should pass has passed."""


class Pace:
    """Lets the bytes of one body pass at a rate; time before its first byte earns nothing."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.piece_bytes = int(min(PIECE_BYTES, max(1, rate * PACE_S)))
        self._due = time.monotonic()

    def wait(self, size_bytes: int) -> None:
        """Return when these bytes have had the time to arrive."""
        now = time.monotonic()
        self._due = max(self._due, now - CATCH_UP_S) + size_bytes / self.rate
        if self._due > now:
            time.sleep(self._due - now)


class Outlet:
    """Where a body goes: counted, paced, and cut where a fault says so."""

    def __init__(self, target: int, pace: Pace, count: Callable[[int], None], cut_after_bytes: int | None) -> None:
        self.target = target
        self.other_bytes = False
        self._pace = pace
        self._count = count
        self._left = cut_after_bytes

    def allow(self, size_bytes: int) -> int:
        """Return how many of so many bytes may go now, at least one; raise Cut where none may."""
        if self._left == 0:
            raise Cut
        return min(size_bytes, self._pace.piece_bytes, size_bytes if self._left is None else self._left)

    def note(self, size_bytes: int) -> None:
        """Count bytes that are about to go, when they should."""
        if self._left is not None:
            self._left -= size_bytes
        self._count(size_bytes)
        self._pace.wait(size_bytes)

    def write(self, data: bytes) -> None:
        """Send these bytes as they are."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.target, view) :]
        except OSError as error:
            raise Unwanted from error


class Pump:
    """Moves bodies through a pipe of its own, within the kernel: a third of the CPU time of reading and writing."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        with contextlib.suppress(PermissionError):  # too many of them: those of the usual size do as well
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._in)
        os.close(self._out)

    def move(self, source: Wire, outlet: Outlet, size_bytes: int) -> None:
        """Pass on exactly so many bytes."""
        while size_bytes:
            size_bytes -= self._move_some(source, outlet, outlet.allow(size_bytes))

    def move_chunks(self, source: Wire, outlet: Outlet) -> None:
        """Pass on chunks as they are, to the last one and its trailer."""
        size_bytes = 1
        while size_bytes:
            line = source.read_line()
            size_bytes = int(line.split(b";")[0], 16)
            outlet.write(line)
            self.move(source, outlet, size_bytes)
            if size_bytes:
                outlet.write(source.read_line())
        while (line := source.read_line()) != b"\r\n":
            outlet.write(line)
        outlet.write(line)

    def move_rest(self, source: Wire, outlet: Outlet) -> None:
        """Pass on what comes until the sender closes."""
        try:
            while True:
                self._move_some(source, outlet, outlet.allow(PIECE_BYTES))
        except Ended:
            return

    def _move_some(self, source: Wire, outlet: Outlet, most: int) -> int:
        """Pass on at least one byte; return how many."""
        if source.waiting or outlet.other_bytes:
            data = source.take(most) or source.socket.recv(most)
            if not data:
                raise Ended
            outlet.note(len(data))
            outlet.write(data.translate(OTHER) if outlet.other_bytes else data)
            return len(data)
        if not (moved := os.splice(source.socket.fileno(), self._in, most)):
            raise Ended
        outlet.note(moved)
        self._empty(outlet, moved)
        return moved

    def _empty(self, outlet: Outlet, size_bytes: int) -> None:
        try:
            while size_bytes:
                size_bytes -= os.splice(self._out, outlet.target, size_bytes)
        except OSError as error:
            raise Unwanted from error
