"""Pinned files wherever they are stored, and ranges of them read into a caller's buffer."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mergemill.engine.errors import Absent, CheckpointError, StorageError
from mergemill.engine.storage import fetch, local
from mergemill.engine.storage.bounds import COPIED_BYTES
from mergemill.engine.storage.cache import RangeCache
from mergemill.engine.storage.local import read_each, read_with
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.sample import is_sampled
from mergemill.engine.storage.store import ENVIRONMENT, Storage, close_stores, is_remote, reader_of, store_of

__all__ = [
    "Pin",
    "check_pin",
    "check_size",
    "close_all",
    "is_remote",
    "join",
    "list_files",
    "pin_file",
    "read_ahead",
    "read_beginning",
    "read_each",
    "read_into",
    "read_pieces",
    "read_whole",
    "read_with",
    "reads_apart",
]

PIECE_BYTES = 4 << 20  # of a small file


def join(folder: str, name: str) -> str:
    """Return where the file `name` of a folder is.

    >>> join("s3://models/a", "config.json"), join("/models/a/", "config.json")
    ('s3://models/a/config.json', '/models/a/config.json')
    """
    return f"{folder.rstrip('/')}/{name}"


def list_files(place: str, beneath: str, storage: Storage = ENVIRONMENT) -> Mapping[str, Pin] | None:
    """Return the files of the folder at `place`, and of the one called `beneath` in it; None where it is a file."""
    if is_remote(place):
        return store_of(place, storage).list_files(place, beneath)
    return local.list_files(place, beneath)


def pin_file(place: str | Path, storage: Storage = ENVIRONMENT) -> Pin:
    """Return the pin of the file at a path or URL; `CheckpointError` where there is none."""
    url = str(place)
    return store_of(url, storage).pin_file(url) if is_remote(url) else local.pin_file(url)


def check_pin(pin: Pin, storage: Storage = ENVIRONMENT) -> None:
    """Raise `SourceChanged` unless the file is what it was at planning.

    A store that compares each of its answers with the pin is not asked for one more, unless it has none to compare.
    """
    if not is_remote(pin.url):
        local.check_pin(pin)
    elif not reader_of(pin.url, storage).checks_reads or is_sampled(pin.stamp):
        _check_remote(pin, storage)


def _check_remote(pin: Pin, storage: Storage) -> None:
    try:
        now = pin_file(pin.url, storage)
    except Absent as error:
        raise changed(pin, "gone") from error
    except CheckpointError as error:
        raise StorageError(str(error)) from error
    if now != pin:
        raise changed(pin, f"{now.size_bytes} bytes, {now.stamp}")


def read_into(
    pin: Pin, offset_bytes: int, buffer: memoryview, storage: Storage = ENVIRONMENT, cache: RangeCache | None = None
) -> None:
    """Fill `buffer` with the bytes of the pinned file that begin at `offset_bytes`; `cache` is for remote ones."""
    if is_remote(pin.url):
        fetch.read_remote(pin, offset_bytes, buffer, storage, cache)
    elif storage.reads_plainly("file"):
        from mergemill.engine.storage.plain import read_local

        read_local(pin, offset_bytes, buffer)
    else:
        local.read_into(pin, offset_bytes, buffer)


def reads_apart(pin: Pin, storage: Storage = ENVIRONMENT) -> bool:
    """Whether a file is one of this machine whose ranges `read_each` and `read_with` read."""
    return not is_remote(pin.url) and not storage.reads_plainly("file")


def check_size(pin: Pin, most_bytes: int) -> None:
    """Raise `StorageError` for a small file that is larger than it may be."""
    if pin.size_bytes > most_bytes:
        raise StorageError(f"{pin.url}: has {pin.size_bytes} bytes; such a file has at most {most_bytes}")


def read_whole(pin: Pin, most_bytes: int = COPIED_BYTES, storage: Storage = ENVIRONMENT) -> bytes:
    """Return a small file as it was pinned; `StorageError` for one that is larger than it may be: see `bounds`."""
    return b"".join(read_pieces(pin, most_bytes, storage))


def read_beginning(pin: Pin, size_bytes: int, storage: Storage = ENVIRONMENT) -> bytes:
    """Return the first bytes of a file as it was pinned; all of one that is shorter."""
    check_pin(pin, storage)
    return _read(pin, 0, min(size_bytes, pin.size_bytes), storage)


def read_pieces(pin: Pin, most_bytes: int = COPIED_BYTES, storage: Storage = ENVIRONMENT) -> Iterator[bytes]:
    """Yield a small file as it was pinned, a few megabytes at a time; errors as of `read_whole`."""
    check_size(pin, most_bytes)
    check_pin(pin, storage)
    for start in range(0, pin.size_bytes, PIECE_BYTES):
        yield _read(pin, start, min(PIECE_BYTES, pin.size_bytes - start), storage)


def _read(pin: Pin, offset_bytes: int, size_bytes: int, storage: Storage) -> bytes:
    data = bytearray(size_bytes)
    read_into(pin, offset_bytes, memoryview(data), storage)
    return bytes(data)


def read_ahead(pin: Pin, offset_bytes: int, size_bytes: int) -> None:
    """Ask the kernel to fetch a range of a local file that will be read soon; returns at once."""
    if not is_remote(pin.url):
        local.read_ahead(pin, offset_bytes, size_bytes)


def close_all() -> None:
    """Close every file and connection that this process keeps."""
    local.close_all()
    close_stores()
