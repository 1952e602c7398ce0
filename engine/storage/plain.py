"""Slices of any storage through fsspec alone, as ``reader: fsspec`` asks for it.

Slower, and with a copy more, than the way of each store: for a store with which that way has trouble. What there is,
and what is pinned of it, is found as ever, so plans do not differ. No answer is compared with the pin, so files are
looked at again by the tasks that read them.
"""

import threading
from collections.abc import Mapping
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from mergemill.engine.errors import SourceChanged, StorageError
from mergemill.engine.storage import local
from mergemill.engine.storage.anything import AnyStore, read_plainly
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.store import Store

IN_FLIGHT = 4  # pieces of a process: a driver holds each of them about twice, beside what was promised to tasks
_room = threading.BoundedSemaphore(IN_FLIGHT)


def open_plain(store: Store) -> Store:
    """Return the reader of a store; other storage is read so anyhow."""
    return store if isinstance(store, AnyStore) else PlainStore(store)


class PlainStore:
    """A store whose files are read through fsspec, but for those that lie on this machine already."""

    checks_reads = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def resolve(self, url: str, revision: str | None) -> str:
        """As the store does."""
        return self._store.resolve(url, revision)

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """As the store does."""
        return self._store.list_files(url, beneath)

    def pin_file(self, url: str) -> Pin:
        """As the store does."""
        return self._store.pin_file(url)

    def find_system(self, url: str) -> Any:
        """As the store does."""
        return self._store.find_system(url)

    def is_here(self, pin: Pin) -> bool:
        """As the store does."""
        return self._store.is_here(pin)

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range of the file as it is now."""
        if self._store.is_here(pin):
            return self._store.read_some(pin, offset_bytes, buffer)
        with _room:
            return read_plainly(self._store, pin, offset_bytes, buffer)


def read_local(pin: Pin, offset_bytes: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a file of this machine, which is looked at before and after."""
    local.check_pin(pin)  # that it is a file, too: fsspec would wait for a pipe
    system = LocalFileSystem()
    for start in range(0, len(buffer), local.PIECE_BYTES):
        piece = buffer[start : start + local.PIECE_BYTES]
        try:
            data = system.cat_file(pin.url, start=offset_bytes + start, end=offset_bytes + start + len(piece))
        except OSError as error:
            raise StorageError(f"{pin.url}: reading at byte {offset_bytes + start}: {error.strerror}") from error
        if len(data) != len(piece):
            raise SourceChanged(
                f"{pin.url}: ends at byte {offset_bytes + start + len(data)}; it was {pin.size_bytes} bytes at planning"
            )
        piece[:] = data
    local.check_pin(pin)
