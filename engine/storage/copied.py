"""A file that is only copied, too large to be joined in memory: read a piece at a time, as often as it is sent."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mergemill.engine.errors import Absent, MergemillError
from mergemill.engine.storage.ranges import PIECE_BYTES, Pin, check_pin, pin_file, read_into, read_pieces
from mergemill.engine.storage.store import Storage

# Of a file that is sent at once, from memory (decided 2026-11-29). The Hub takes larger ones as it does shards alone.
JOINED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Copied:
    """A file as it was pinned; `SourceChanged` where it is another one when it is read."""

    pin: Pin
    storage: Storage  # by which it is reached

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.pin.size_bytes

    def read_pieces(self) -> Iterator[bytes]:
        """Yield it from its first byte to its last."""
        return read_pieces(self.pin, storage=self.storage)

    def open(self) -> "CopiedFile":
        """Return it as a file for what sends files."""
        check_pin(self.pin, self.storage)
        return CopiedFile(self)

    def is_at(self, url: str, storage: Storage) -> bool:
        """Whether a file with the same bytes is at `url`, which is reached by `storage`."""
        try:
            found = pin_file(url, storage)
        except Absent:
            return False
        if found.size_bytes != self.size_bytes:
            return False
        pieces = zip(self.read_pieces(), read_pieces(found, storage=storage), strict=True)
        return all(ours == theirs for ours, theirs in pieces)


class CopiedFile(io.RawIOBase):
    """A file that is sent; one piece of it is in memory, from which reads of any size are served."""

    def __init__(self, copied: Copied) -> None:
        super().__init__()
        self.failed: MergemillError | None = None  # what a read has raised: clients make something else of it
        self._copied = copied
        self._at = 0
        self._piece = memoryview(b"")
        self._piece_at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is: what is sent again begins again."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._copied.size_bytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or as much of it as the piece at hand has."""
        if not 0 <= self._at - self._piece_at < len(self._piece):
            self._read_piece()
        found = self._piece[self._at - self._piece_at :][: len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def _read_piece(self) -> None:
        piece = bytearray(max(0, min(PIECE_BYTES, self._copied.size_bytes - self._at)))
        try:
            read_into(self._copied.pin, self._at, memoryview(piece), self._copied.storage)
        except MergemillError as error:
            self.failed = error
            raise
        self._piece, self._piece_at = memoryview(piece), self._at
