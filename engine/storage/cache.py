"""Ranges of remote files on a local disk, for merges that read the same models again: off unless asked for.

A range is kept as it was asked for, and found whatever is asked for later: a read is put together from the ranges that
overlap it, and what they lack is fetched. So nothing is fetched that is not wanted, and no memory is taken beside the
caller's; ranges cut at fixed places would cost one or the other. A file of a model has a folder of its own, named by
what its pin says, so that a changed one is another:

    v1/lock                                       how many bytes there are; who holds its lock may change that
    v1/new/<random>                               being written
    v1/<hash of the pin>/<shelf>/<start>-<stop>   a range; a shelf is 128 MiB of the file

Several processes use one folder. Readers take no lock: a range appears whole, by a rename, and one that is removed
while it is read can be read to its end. A writer first adds its size to the count and creates its file, removing what
was used longest ago where there would be too much; so the limit holds at any moment, and a writer that is killed makes
the count too high at worst, until it is next taken from the disk itself. A disk that is full, or cannot be written,
means that nothing is kept; what cannot be read, or is damaged, is fetched.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergemill.engine.errors import InputError
from mergemill.engine.storage import system
from mergemill.engine.storage.entry import file_bytes, read_entry, write_entry
from mergemill.engine.storage.pin import Pin

RANGE_BYTES = 8 << 20  # the longest range that is kept
LEAST_BYTES = 64 << 20  # a cache of less is of no use
SPARE_BYTES = 1 << 30  # of the disk, left free
_VERSION = "v1"  # of what is in the folder; another one begins anew, beside it
_SHELF_BYTES = 128 << 20  # of a file: its ranges share a folder, which is listed to find one
_BLOCK_BYTES = 4096  # what a file takes of a disk, at least
_ROOM = 0.9  # of the limit, to which the cache shrinks when it is full, so that it seldom has to
_ABANDONED_S = 600.0  # after which a file that is still being written has no writer any more
_REST_S = 60.0  # for which nothing is kept once that failed

FetchRange = Callable[[int, memoryview], bool]  # from an offset into memory; False where it was stopped


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """A cache as it is asked for; it is opened on each host."""

    limit_bytes: int
    folder: str | None  # None: below the home folder of who runs the worker
    spare_bytes: int = SPARE_BYTES  # of the disk, left free

    def find_folder(self) -> Path:
        """Return where the cache is on this host."""
        return Path(self.folder) if self.folder is not None else default_folder()


def default_folder() -> Path:
    """Return ``~/.cache/mergemill``, or where XDG_CACHE_HOME says that caches are."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if Path(named).is_absolute() else Path.home() / ".cache") / "mergemill"


def make_cache_folder(folder: Path) -> None:
    """Create a cache's folder, for this user alone; `InputError` where that cannot be."""
    place = folder / _VERSION
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: no cache can be there: {error.strerror}; choose another --cache-folder") from error
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{folder}: no cache can be there: permission denied; choose another --cache-folder")


def open_cache(options: CacheOptions | None) -> "RangeCache | None":
    """Return the cache of this host, shrunk to its limit; None where none is wanted."""
    if options is None:
        return None
    cache = RangeCache(options.find_folder(), options.limit_bytes, options.spare_bytes)
    cache.shrink()
    return cache


class RangeCache:
    """A bounded cache in `folder`; all threads of a process may use one, and other processes theirs."""

    def __init__(self, folder: Path, limit_bytes: int, spare_bytes: int = SPARE_BYTES) -> None:
        self._folder = folder / _VERSION
        self._limit_bytes = limit_bytes
        self._spare_bytes = spare_bytes
        self._resting_until_s = 0.0

    def read(self, pin: Pin, offset_bytes: int, buffer: memoryview, fetch: FetchRange) -> None:
        """Fill `buffer` with the bytes of the pinned file that begin at `offset_bytes`; what is not here by `fetch`."""
        home = self._folder / _name(pin)
        stop = offset_bytes + len(buffer)
        found = sorted(_find_overlapping(home, offset_bytes, stop))
        at = offset_bytes
        while at < stop:
            into = buffer[at - offset_bytes :]
            covering = max((each for each in found if each[0] <= at < each[1]), key=lambda each: each[1], default=None)
            if covering is not None:
                upto = min(covering[1], stop)
                if not _read(home, covering, at, into[: upto - at]):
                    found.remove(covering)
                    continue
            else:
                upto = min([stop, *(start for start, _ in found if start > at)])
                if not fetch(at, into[: upto - at]):
                    return
                self._keep(home, at, into[: upto - at])
            at = upto

    def shrink(self) -> None:
        """Remove what is beyond the limit, that which was used longest ago first."""
        with suppress(OSError), self._locked() as lock:
            if _read_count(lock) is None or self._count(lock) > self._limit_bytes:
                self._evict(lock, 0)

    def _keep(self, home: Path, start: int, data: memoryview) -> None:
        """Keep a range, if there is room for it or room can be made."""
        if not 0 < len(data) <= RANGE_BYTES or time.monotonic() < self._resting_until_s:
            return
        size = _round_up(file_bytes(len(data)))
        new = self._folder / "new" / secrets.token_hex(16)
        try:
            if not self._reserve(new, size, len(data)):
                return
            try:
                _write(new, data)
                self._finish(new, _place(home, start, start + len(data)), size)
            except BaseException:
                self._give_up(new, size)
                raise
        except OSError:
            self._resting_until_s = time.monotonic() + _REST_S

    def _reserve(self, new: Path, size: int, data_bytes: int) -> bool:
        """Count `size` more bytes and create the file; False where there is no room."""
        with self._locked() as lock:
            disk = os.statvfs(self._folder)
            if size > self._limit_bytes or disk.f_bavail * disk.f_frsize < size + self._spare_bytes:
                return False
            total = self._count(lock)
            if total + size > self._limit_bytes:
                total = self._evict(lock, size)
            if total + size > self._limit_bytes:
                return False  # what others are writing is not removed
            _write_count(lock, total + size)
            _create(new, file_bytes(data_bytes))  # at its full size, for who counts before it is written
        return True

    def _finish(self, new: Path, target: Path, size: int) -> None:
        """Put a file in its place; not while somebody counts, who would miss it."""
        with self._locked() as lock:
            if target.exists():  # another was as quick
                _write_count(lock, max(0, self._count(lock) - size))
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.rename(target)

    def _give_up(self, new: Path, size: int) -> None:
        """Remove a file that is not whole, unless somebody took it for abandoned and did."""
        with suppress(OSError), self._locked() as lock:
            new.unlink()
            _write_count(lock, max(0, self._count(lock) - size))

    def _count(self, lock: int) -> int:
        """Return the bytes that are here or on their way, as counted so far; anew where nobody has."""
        total = _read_count(lock)
        if total is None:
            total = sum(size for _, size, _ in self._list_files())
        return total

    def _evict(self, lock: int, wanted_bytes: int) -> int:
        """Make room for `wanted_bytes` and some more; returns the bytes that are left, taken from the disk itself."""
        files = sorted(self._list_files())
        total = sum(size for _, size, _ in files)
        most = self._limit_bytes - wanted_bytes
        if total > most:
            most = min(most, int(self._limit_bytes * _ROOM))
        now_s = time.time()
        for used_s, size, path in files:
            if path.parent.name == "new":
                if now_s - used_s < _ABANDONED_S:
                    continue
            elif total <= most:
                continue
            path.unlink(missing_ok=True)
            total -= size
            with suppress(OSError):  # it holds other ranges, or is about to
                path.parent.rmdir()
                path.parent.parent.rmdir()
        _write_count(lock, total)
        return total

    def _list_files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each file was last used, what it takes of the disk, and where it is."""
        for path in [*self._folder.glob("new/*"), *self._folder.glob("*/*/*-*")]:
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, _round_up(found.st_size), path

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Lend the descriptor of the lock's file, while no other thread or process has it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            system.lock(descriptor, wait=True)
            yield descriptor
        finally:
            os.close(descriptor)


def can_keep(pin: Pin) -> bool:
    """Whether a pin says what the bytes are, not only where: a cache outlives the file.

    >>> [can_keep(Pin("http://a/b", 1, stamp)) for stamp in ('etag:"x"', 'etag:W/"x"', "sample:00", "")]
    [True, False, False, False]
    """
    return bool(pin.stamp) and not pin.stamp.startswith(("etag:W/", "sample:"))


def _name(pin: Pin) -> str:
    return hashlib.sha256(f"{pin.url}\n{pin.size_bytes}\n{pin.stamp}".encode()).hexdigest()[:32]


def _place(home: Path, start: int, stop: int) -> Path:
    return home / str(start // _SHELF_BYTES) / f"{start}-{stop}"


def _find_overlapping(home: Path, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the kept ranges that overlap one: those of its shelves, and the last of the shelf before."""
    for shelf in range(max(0, start - RANGE_BYTES) // _SHELF_BYTES, (stop - 1) // _SHELF_BYTES + 1):
        try:
            with os.scandir(home / str(shelf)) as entries:
                names = [entry.name for entry in entries]
        except OSError:
            continue
        for name in names:
            first, _, last = name.partition("-")
            if first.isdecimal() and last.isdecimal() and int(first) < stop and start < int(last):
                yield int(first), int(last)


def _read(home: Path, kept: tuple[int, int], at: int, into: memoryview) -> bool:
    """Fill `into` from a kept range; False where it is gone or damaged, and then gone."""
    path = _place(home, *kept)
    try:
        if read_entry(path, kept[1] - kept[0], at - kept[0], into):
            return True
        path.unlink()
    except OSError:
        pass
    return False


def _create(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _write(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        write_entry(descriptor, data)
    finally:
        os.close(descriptor)


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _read_count(lock: int) -> int | None:
    text = os.pread(lock, 32, 0)
    return int(text) if text.isdigit() else None


def _write_count(lock: int, total: int) -> None:
    os.pwrite(lock, b"%020d" % total, 0)
