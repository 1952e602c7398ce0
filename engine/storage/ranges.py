"""Pinned files and ranged reads into a caller's buffer.

Files are read with ``preadv`` into memory that the caller reuses, never mapped: mapped pages count as resident
and get Dask workers killed. Each process keeps one descriptor a file, and compares the file with its pin when it
opens it, so a source that changed after planning is an error and never a silent mixture.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.errors import CheckpointError, SourceChanged, StorageError

PIECE_BYTES = 8 << 20  # the longest single read


@dataclass(frozen=True, slots=True)
class Pin:
    """The identity of a stored file when the plan was made."""

    url: str  # absolute path of a local file
    size_bytes: int
    stamp: str  # what changes when the content does: "mtime_ns:…"


def pin_file(path: str | Path) -> Pin:
    """Return the pin of the file at `path`; `CheckpointError` where there is none."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return Pin(str(Path(path).resolve()), found.st_size, f"mtime_ns:{found.st_mtime_ns}")


def check_pin(pin: Pin) -> None:
    """Raise `SourceChanged` unless the file is what it was at planning."""
    try:
        now = pin_file(pin.url)
    except CheckpointError as error:
        raise SourceChanged(f"{error}; it was there when the plan was made") from error
    if now != pin:
        raise SourceChanged(
            f"{pin.url}: changed since the plan was made: {pin.size_bytes} bytes, {pin.stamp} then; "
            f"{now.size_bytes} bytes, {now.stamp} now; plan again"
        )


def read_into(pin: Pin, offset_bytes: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of the pinned file that begin at `offset_bytes`."""
    descriptor = _open_pinned(pin)
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(descriptor.number, [buffer[done : done + PIECE_BYTES]], offset_bytes + done)
        except OSError as error:
            raise StorageError(f"{pin.url}: reading at byte {offset_bytes + done}: {error.strerror}") from error
        if got == 0:
            raise SourceChanged(
                f"{pin.url}: ends at byte {offset_bytes + done}; it was {pin.size_bytes} bytes at planning"
            )
        done += got


def read_ahead(pin: Pin, offset_bytes: int, size_bytes: int) -> None:
    """Ask the kernel to fetch a range that will be read soon; returns at once."""
    if size_bytes > 0:
        # Held by name: of two threads that open a file at once one gets a descriptor that is not kept for later.
        descriptor = _open_pinned(pin)
        os.posix_fadvise(descriptor.number, offset_bytes, size_bytes, os.POSIX_FADV_WILLNEED)


def close_all() -> None:
    """Close every descriptor that this process keeps."""
    _open_pinned.cache_clear()


class _Descriptor:
    """An open file that is closed when nobody holds it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.number)


@functools.lru_cache(maxsize=512)
def _open_pinned(pin: Pin) -> _Descriptor:
    check_pin(pin)
    try:
        return _Descriptor(pin.url)
    except OSError as error:
        raise StorageError(f"{pin.url}: cannot be opened: {error.strerror}") from error
