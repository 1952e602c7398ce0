"""A pickle as it is read: byte after byte from a range of a stored file, and never more of it than a bound."""

from mergemill.engine.errors import PickledError
from mergemill.engine.storage.ranges import Pin, read_into
from mergemill.engine.storage.store import Storage

MOST_BYTES = 64 << 20  # of the pickles of a file: 300,000 tensors take as many
MOST_LINE = 1 << 12  # of what a line feed ends
FIRST_BYTES = 64 << 10  # read at once; each time after that, twice as many
MOST_BLOCK = 8 << 20


class Reader:
    """Gives the bytes of a range of a file, in order."""

    def __init__(self, pin: Pin, start_bytes: int, stop_bytes: int, storage: Storage, *, where: str) -> None:
        self._pin = pin
        self._storage = storage
        self._start = start_bytes
        self._stop = stop_bytes
        self._read_to = start_bytes
        self._buffer = b""
        self._at = 0  # in the buffer, whose end is what was read last
        self._block = FIRST_BYTES
        self.where = where

    @property
    def position_bytes(self) -> int:
        """Where the next byte is, from the start of the file."""
        return self._read_to - (len(self._buffer) - self._at)

    def take(self, count: int) -> bytes:
        """Return the next bytes; `PickledError` where the range ends before, or a pickle has no end."""
        if self._at + count > len(self._buffer):
            self._fill(count)
        found = self._buffer[self._at : self._at + count]
        self._at += count
        return found

    def take_line(self) -> bytes:
        """Return what comes before the next line feed, and pass that."""
        line = bytearray()
        while (byte := self.take(1)) != b"\n":
            line += byte
            if len(line) > MOST_LINE:
                raise PickledError(f"{self.where}: a line of its pickle is longer than {MOST_LINE} bytes")
        return bytes(line)

    def _fill(self, count: int) -> None:
        position = self.position_bytes
        if position + count > self._stop:
            raise PickledError(f"{self.where}: cut short: its pickle goes on after byte {self._stop}, where it ends")
        if position + count - self._start > MOST_BYTES:
            raise PickledError(
                f"{self.where}: its pickle is longer than {MOST_BYTES >> 20} MiB, all without its tensors"
            )
        stop = min(self._stop, max(position + count, self._read_to + self._block))
        self._block = min(2 * self._block, MOST_BLOCK)
        self._buffer = self._buffer[self._at :] + read_bytes(self._pin, self._read_to, stop, self._storage)
        self._at = 0
        self._read_to = stop


def read_bytes(pin: Pin, start_bytes: int, stop_bytes: int, storage: Storage) -> bytes:
    """Return a range of a stored file."""
    buffer = bytearray(stop_bytes - start_bytes)
    read_into(pin, start_bytes, memoryview(buffer), storage)
    return bytes(buffer)
