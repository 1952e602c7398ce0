"""Ranges of remote files, in pieces: many requests in flight, each tried again where that may help.

One pool of threads in a process serves all of its tasks, first come first served. A piece goes from the connection
into the caller's memory; nothing else holds it, unless there is a cache on a disk.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from mergemill.engine.storage.cache import RangeCache, can_keep
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.sample import make_sample
from mergemill.engine.storage.store import ENVIRONMENT, Storage, Store, Unavailable, reader_of, store_of
from mergemill.engine.storage.tries import insist

T = TypeVar("T")

PIECE_BYTES = 8 << 20  # of one request
CONNECTIONS = 32  # requests of a process in flight


@dataclass(frozen=True, slots=True)
class _Way:
    """How pieces come here, and what stops them."""

    storage: Storage
    cache: RangeCache | None
    stop: threading.Event


class Fetch:
    """A range on its way into memory that the caller lends until `wait` has returned, or `cancel`."""

    def __init__(
        self,
        pin: Pin,
        offset_bytes: int,
        buffer: memoryview,
        storage: Storage = ENVIRONMENT,
        cache: RangeCache | None = None,
    ) -> None:
        starts = range(0, len(buffer), PIECE_BYTES)
        self._done_bytes = 0  # waited for
        self._stop = threading.Event()
        way = _Way(storage, cache, self._stop)
        self._pieces = [
            _pool().submit(_read_piece, pin, offset_bytes + start, buffer[start : start + PIECE_BYTES], way)
            for start in starts
        ]

    def wait(self, size_bytes: int) -> None:
        """Return once the first `size_bytes` are there; raises what kept a piece from coming."""
        while self._done_bytes < size_bytes:
            self._pieces[self._done_bytes // PIECE_BYTES].result()
            self._done_bytes += PIECE_BYTES

    def cancel(self) -> None:
        """Return once nothing writes into the memory any more."""
        self._stop.set()
        for piece in self._pieces:
            if not piece.cancel():
                _outcome(piece)


def read_remote(
    pin: Pin, offset_bytes: int, buffer: memoryview, storage: Storage = ENVIRONMENT, cache: RangeCache | None = None
) -> None:
    """Fill `buffer` with the bytes of the pinned file that begin at `offset_bytes`."""
    if len(buffer) <= PIECE_BYTES:
        _read_piece(pin, offset_bytes, buffer, _Way(storage, cache, threading.Event()))
        return
    fetch = Fetch(pin, offset_bytes, buffer, storage, cache)
    try:
        fetch.wait(len(buffer))
    finally:
        fetch.cancel()


def sample_remote(store: Store, url: str, size_bytes: int) -> str:
    """Return the field of a stamp that stands for the content of a store's file as it is now: see `make_sample`."""

    def read(start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        _fill(store, Pin(url, size_bytes, ""), start, memoryview(data), threading.Event())
        return bytes(data)

    return make_sample(size_bytes, read)


def submit(work: Callable[[], T]) -> "Future[T]":
    """Run `work` on a thread that moves bytes."""
    return _pool().submit(work)


def _read_piece(pin: Pin, offset_bytes: int, buffer: memoryview, way: _Way) -> None:
    """Fill `buffer`, unless stopped, from the cache and from afar."""
    if way.cache is None or not can_keep(pin) or store_of(pin.url, way.storage).is_here(pin):
        _download(pin, offset_bytes, buffer, way)
    else:
        way.cache.read(pin, offset_bytes, buffer, lambda at, into: _download(pin, at, into, way))


def _download(pin: Pin, offset_bytes: int, buffer: memoryview, way: _Way) -> bool:
    """Fill `buffer` from the store; False where that was stopped."""
    return _fill(reader_of(pin.url, way.storage), pin, offset_bytes, buffer, way.stop)


def _fill(store: Store, pin: Pin, offset_bytes: int, buffer: memoryview, stop: threading.Event) -> bool:
    """Fill `buffer`, unless stopped; attempts are counted anew after each byte that came."""
    done = 0

    def read_some() -> int:
        if stop.is_set():
            return 0
        got = store.read_some(pin, offset_bytes + done, buffer[done:])
        if not got:
            raise Unavailable("the connection was closed before the first byte")
        return got

    while done < len(buffer) and not stop.is_set():
        done += insist(read_some, f"{pin.url}: reading at byte {offset_bytes + done}")
    return done == len(buffer)


def _outcome(piece: "Future[None]") -> BaseException | None:
    return piece.exception()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, "mergemill-fetch")
