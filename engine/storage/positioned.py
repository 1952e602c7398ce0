"""Writing a file by positions: created at its full size, filled by many processes in any order, renamed when whole."""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage import system


def create_positioned(path: Path, size_bytes: int, prefix: bytes) -> None:
    """Create `path` with `size_bytes` zero bytes that begin with `prefix`; an existing file keeps what is behind it."""
    with _explained(path, "creating"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(descriptor, size_bytes)
            system.write_at(descriptor, memoryview(prefix), 0)
        finally:
            os.close(descriptor)


class PositionedWriter:
    """An open file to write ranges into; the ranges of different writers do not overlap."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _explained(path, "opening"):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Write `data` at `offset_bytes`."""
        with _explained(self._path, f"writing at byte {offset_bytes} of"), _turn(self._path):
            system.write_at(self._descriptor, data, offset_bytes)

    def sync(self) -> None:
        """Return once what was written is on the disk."""
        with _explained(self._path, "syncing"):
            system.sync_content(self._descriptor)

    def start_writeback(self, offset_bytes: int, size_bytes: int) -> None:
        """Ask the kernel to begin writing a range to the disk, so that little is left for the last sync."""
        system.write_soon(self._descriptor, offset_bytes, size_bytes)

    def close(self) -> None:
        """Close the file; nothing is synced."""
        os.close(self._descriptor)


@contextmanager
def open_positioned(path: Path) -> Iterator[PositionedWriter]:
    """Open `path` for positioned writes and close it afterwards."""
    writer = PositionedWriter(path)
    try:
        yield writer
    finally:
        writer.close()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there either whole or not at all: beside it, synced, renamed."""
    beside = beside_path(path)
    with _explained(path, "writing"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            system.sync(file.fileno())
        beside.replace(path)
    sync_folder(path.parent)


def beside_path(path: Path) -> Path:
    """Return where `write_file` writes what it renames to `path`."""
    return path.with_name(f".{path.name}.tmp")


def rename_file(path: Path, target: Path) -> None:
    """Rename a finished file to where it belongs."""
    with _explained(target, "renaming to"):
        path.rename(target)


def sync_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the disk."""
    with _explained(folder, "syncing"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            system.sync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents; `OutputError` where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be created: {error.strerror}; choose a folder that you can write"
        ) from error
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raise `OutputError` where nothing can be made in a folder that is there."""
    if not os.access(folder, os.W_OK | os.X_OK):
        why = "the disk is read-only" if os.statvfs(folder).f_flag & os.ST_RDONLY else "permission denied"
        raise OutputError(f"{folder}: cannot be written: {why}; choose a folder that you can write")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise `StorageError` unless the disk of `folder` has `needed_bytes` free."""
    found = os.statvfs(folder)
    free_bytes = found.f_bavail * found.f_frsize
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{folder}: disk too full: {needed_bytes} bytes are needed, {free_bytes} are free; "
            f"free {needed_bytes - free_bytes} bytes or choose another disk"
        )


@functools.lru_cache(maxsize=64)
def _turn(path: Path) -> threading.Lock:
    """Return the lock of a file's writers in this process: the kernel has one at a time, and lets the others spin."""
    return threading.Lock()


@contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {doing} this file failed: {error.strerror}") from error
