"""Files of this machine, read by positions into memory that the caller reuses, never mapped.

Mapped pages count as resident and get Dask workers killed. Each process keeps one descriptor a file, and compares the
file with its pin when it opens it and after each read.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mergemill.engine.errors import Absent, CheckpointError, SourceChanged, StorageError
from mergemill.engine.storage import system
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.regular import check_regular, open_regular
from mergemill.engine.storage.stamps import compare_open, describe_change, make_stamp

PIECE_BYTES = 8 << 20  # the longest single read


def resolve(place: str) -> str | None:
    """Return the absolute path of a file or folder; None where nothing is there."""
    path = Path(place)
    return str(path.absolute()) if path.exists() else None


def list_files(folder: str, beneath: str) -> Mapping[str, Pin] | None:
    """Return the files of a folder, and of the one called `beneath` in it; None where `folder` is none.

    `CheckpointError` for a pipe or device among them: without its file a model might be merged as another one.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    found = [each for each in (*path.iterdir(), *(path / beneath).glob("*")) if each.exists() and not each.is_dir()]
    return {each.relative_to(path).as_posix(): pin_file(each) for each in sorted(found)}


def pin_file(path: str | Path) -> Pin:
    """Return the pin of the file at `path`; `CheckpointError` where there is none."""
    return _pin(path, None)


def check_pin(pin: Pin) -> None:
    """Raise `SourceChanged` unless the file is what it was at planning."""
    try:
        now = _pin(pin.url, pin.stamp)
    except CheckpointError as error:
        raise SourceChanged(f"{error}; it was there when the plan was made") from error
    if now != pin:
        raise _explain(pin, now)


def _pin(path: str | Path, like: str | None) -> Pin:
    try:
        found = Path(path).stat()
        check_regular(found)
        str(Path(path).resolve()).encode()
        return Pin(str(Path(path).resolve()), found.st_size, make_stamp(str(path), found, like))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Absent(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeEncodeError as error:  # a plan, which is text, could not name it
        raise CheckpointError(f"{path}: its name is not UTF-8; rename it") from error


def _explain(pin: Pin, now: Pin) -> SourceChanged:
    """Return the error for a file that is not what was pinned."""
    if (now.url, now.size_bytes) != (pin.url, pin.size_bytes):
        return changed(pin, f"{now.size_bytes} bytes, {now.stamp}")
    return changed(pin, f"{now.stamp}: {describe_change(pin.stamp, now.stamp)}")


def read_into(pin: Pin, offset_bytes: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of the pinned file that begin at `offset_bytes`."""
    read_each(pin, (offset_bytes,), (buffer,))


def read_each(pin: Pin, offsets: Iterable[int], buffers: Iterable[memoryview]) -> None:
    """Fill each of `buffers` with the bytes of the pinned file that begin at its offset."""
    descriptor = _open_pinned(pin)
    for offset_bytes, buffer in zip(offsets, buffers, strict=True):
        _fill(descriptor, pin, offset_bytes, buffer)
    _check_open(descriptor, pin)


def read_with(pin: Pin, read: Callable[[int, int], tuple[int, int, int]]) -> None:
    """Have `read` fill memory from the descriptor of the pinned file.

    It is given how many bytes of the file its calls have asked for in this process so far. It returns how many more
    it did; the number of an error, 0 for none and less at the end of the file; and at which byte that was.
    """
    descriptor = _open_pinned(pin)
    asked_bytes, error, at = read(descriptor.number, descriptor.asked_bytes)
    descriptor.asked_bytes += asked_bytes
    if error > 0:
        raise _failed(pin, at, os.strerror(error))
    if error < 0:
        raise _ended(pin, at)
    _check_open(descriptor, pin)


def _failed(pin: Pin, at: int, why: str | None) -> StorageError:
    return StorageError(f"{pin.url}: reading at byte {at}: {why}")


def _ended(pin: Pin, at: int) -> SourceChanged:
    return SourceChanged(f"{pin.url}: ends at byte {at}; it was {pin.size_bytes} bytes at planning")


def _fill(descriptor: "_Descriptor", pin: Pin, offset_bytes: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        try:
            got = system.read_at(descriptor.number, buffer[done : done + PIECE_BYTES], offset_bytes + done)
        except OSError as error:
            raise _failed(pin, offset_bytes + done, error.strerror) from error
        if got == 0:
            raise _ended(pin, offset_bytes + done)
        done += got


def _check_open(descriptor: "_Descriptor", pin: Pin) -> None:
    """Raise `SourceChanged` where what was read may be of other bytes than were pinned.

    Before anything is made of them: a worker that was cut off or frozen may go on long after the merge was finished by
    others, with the output and its sources open; what it then writes is the same bytes, or nothing.
    """
    found = os.fstat(descriptor.number)
    if found.st_size != pin.size_bytes:
        raise changed(pin, f"{found.st_size} bytes")
    if difference := compare_open(found, pin.stamp):
        raise changed(pin, difference)


def read_ahead(pin: Pin, offset_bytes: int, size_bytes: int) -> None:
    """Ask the kernel to fetch a range that will be read soon; returns at once."""
    if size_bytes > 0:
        # Held by name: of two threads that open a file at once one gets a descriptor that is not kept for later.
        descriptor = _open_pinned(pin)
        system.fetch_soon(descriptor.number, offset_bytes, size_bytes)


def close_all() -> None:
    """Close every descriptor that this process keeps."""
    _open_pinned.cache_clear()


class _Descriptor:
    """An open file that is closed when nobody holds it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.asked_bytes = 0  # by `read_with`

    def __del__(self) -> None:
        os.close(self.number)


@functools.lru_cache(maxsize=512)
def _open_pinned(pin: Pin) -> _Descriptor:
    check_pin(pin)
    try:
        return _Descriptor(open_regular(pin.url))  # there is one only where that worked
    except OSError as error:
        raise StorageError(f"{pin.url}: cannot be opened: {error.strerror}") from error
