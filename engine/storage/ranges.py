"""Pinned files wherever they are stored, and ranges of them read into a caller's buffer."""

from collections.abc import Mapping
from pathlib import Path

from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage import fetch, local
from mergemill.engine.storage.cache import RangeCache
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.sample import is_sampled
from mergemill.engine.storage.store import close_stores, is_remote, store_of

__all__ = [
    "Pin",
    "check_pin",
    "close_all",
    "is_remote",
    "join",
    "list_files",
    "pin_file",
    "read_ahead",
    "read_into",
    "read_whole",
]


def join(folder: str, name: str) -> str:
    """Return where the file `name` of a folder is.

    >>> join("s3://models/a", "config.json"), join("/models/a/", "config.json")
    ('s3://models/a/config.json', '/models/a/config.json')
    """
    return f"{folder.rstrip('/')}/{name}"


def list_files(place: str, beneath: str) -> Mapping[str, Pin] | None:
    """Return the files of the folder at `place`, and of the one called `beneath` in it; None where it is a file."""
    return store_of(place).list_files(place, beneath) if is_remote(place) else local.list_files(place, beneath)


def pin_file(place: str | Path) -> Pin:
    """Return the pin of the file at a path or URL; `CheckpointError` where there is none."""
    url = str(place)
    return store_of(url).pin_file(url) if is_remote(url) else local.pin_file(url)


def check_pin(pin: Pin) -> None:
    """Raise `SourceChanged` unless the file is what it was at planning.

    A store that compares each of its answers with the pin is not asked for one more, unless it has none to compare.
    """
    if not is_remote(pin.url):
        local.check_pin(pin)
    elif not store_of(pin.url).checks_reads or is_sampled(pin.stamp):
        _check_remote(pin)


def _check_remote(pin: Pin) -> None:
    try:
        now = pin_file(pin.url)
    except CheckpointError as error:
        raise changed(pin, "gone") from error
    if now != pin:
        raise changed(pin, f"{now.size_bytes} bytes, {now.stamp}")


def read_into(pin: Pin, offset_bytes: int, buffer: memoryview, cache: RangeCache | None = None) -> None:
    """Fill `buffer` with the bytes of the pinned file that begin at `offset_bytes`; `cache` is for remote ones."""
    if is_remote(pin.url):
        fetch.read_remote(pin, offset_bytes, buffer, cache)
    else:
        local.read_into(pin, offset_bytes, buffer)


def read_whole(pin: Pin, most_bytes: int | None = None) -> bytes:
    """Return a small file as it was pinned, or its first `most_bytes`."""
    data = bytearray(pin.size_bytes if most_bytes is None else min(most_bytes, pin.size_bytes))
    check_pin(pin)
    read_into(pin, 0, memoryview(data))
    return bytes(data)


def read_ahead(pin: Pin, offset_bytes: int, size_bytes: int) -> None:
    """Ask the kernel to fetch a range of a local file that will be read soon; returns at once."""
    if not is_remote(pin.url):
        local.read_ahead(pin, offset_bytes, size_bytes)


def close_all() -> None:
    """Close every file and connection that this process keeps."""
    local.close_all()
    close_stores()
