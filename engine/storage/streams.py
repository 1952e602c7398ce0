"""Files of any storage that fsspec can write, from their first byte to their last, never whole in memory.

Some stores have folders and rename files in place; a file that is being written can be seen there. In object stores it
appears when it is finished, and a renamed one would be a copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.spec import AbstractBufferedFile

from mergemill.engine.errors import MergemillError, OutputError, StorageError
from mergemill.engine.storage.anything import AnyStore
from mergemill.engine.storage.connections import shorten
from mergemill.engine.storage.store import Storage, find_store

T = TypeVar("T")

BLOCK_BYTES = 8 << 20  # that a driver gathers before it sends them; S3 takes no less than 5 MiB, and 10,000 of them
MOST_BYTES = 10_000 * BLOCK_BYTES  # of a file in an object store
BESIDE_BYTES = 4 * BLOCK_BYTES  # the most that a driver holds: a block, while it grows, and its copies on their way
UNFINISHED = ".tmp-"  # in the name of a file that has none of its own yet
_PIECE_BYTES = 1 << 20  # that a driver is given at once: it gathers a block and as much more
_FOLDERS = frozenset({"arrow_hdfs", "ftp", "hdfs", "local", "sftp", "smb", "ssh", "webhdfs"})  # they rename in place
_READ_ONLY = frozenset({"data", "gist", "git", "github", "http", "https", "libarchive", "reference", "tar", "zip"})
_USUAL = "a folder, s3://, gs://, az://, hf://org/name"


def check_place(url: str) -> None:
    """Raise `OutputError` for a URL of no storage that can be written, as far as its text says; nothing is asked."""
    scheme = urlsplit(url).scheme
    if scheme in _READ_ONLY:
        raise OutputError(f"{url}: can be read and not written; the output is {_USUAL}, or what else fsspec writes")
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        known = f"{_USUAL}, or what else fsspec writes"
        raise OutputError(f"{url}: {scheme}:// is no kind of storage; the output is {known}") from error
    except ImportError as error:
        raise OutputError(f"{url}: needs a package that is not installed: {error}") from error


def is_folder_like(url: str) -> bool:
    """Whether renaming is cheap there, folders must be made, and a file that is being written can be seen."""
    return urlsplit(url).scheme in _FOLDERS


def is_of_process(url: str) -> bool:
    """Whether no other process sees what is stored there."""
    return urlsplit(url).scheme == "memory"


def find_local(url: str, storage: Storage) -> str | None:
    """Return the path that a URL means on this machine's disks; None where it means none."""
    return locate(url, storage)[1] if urlsplit(url).scheme == "local" else None


def locate(url: str, storage: Storage) -> tuple[Any, str]:
    """Return the file system of a URL, the one that reads use as well, and what it calls the file.

    Not all that drivers can do takes the URL itself.
    """
    store = find_store(urlsplit(url).scheme, storage)
    assert isinstance(store, AnyStore)
    system = store.find_system(url)
    return system, str(system._strip_protocol(url))


class Stream:
    """A file that is being written."""

    def __init__(self, url: str, storage: Storage) -> None:
        self._url = url
        self._file = in_folder(url, storage, lambda system, path: system.open(path, "wb", block_size=BLOCK_BYTES))

    def write(self, data: memoryview) -> None:
        """Add what follows."""
        data = data.cast("B")
        with explained(self._url):
            for start in range(0, len(data), _PIECE_BYTES):
                self._file.write(data[start : start + _PIECE_BYTES])

    def finish(self) -> None:
        """Return once the file is there, whole."""
        with explained(self._url):
            self._file.close()

    def discard(self) -> None:
        """Give the file up. Where one can be seen before it is finished, what was written stays."""
        with suppress(Exception):  # whatever made it be given up is the error to be told of
            if not isinstance(self._file, AbstractBufferedFile):
                self._file.close()
            elif not self._file.closed:
                self._file.discard()
        if isinstance(self._file, AbstractBufferedFile):
            self._file.closed = True  # or it would finish the file when nobody holds it any more


@contextmanager
def open_stream(url: str, storage: Storage) -> Iterator[Stream]:
    """Create a file, or replace it; unless it is finished in the block it is given up."""
    stream = Stream(url, storage)
    try:
        yield stream
    except BaseException:
        stream.discard()
        raise


def rename(url: str, to: str, storage: Storage) -> None:
    """Rename a file where that is cheap."""
    (system, path), (_, new) = locate(url, storage), locate(to, storage)
    with explained(to):
        system.mv(path, new)


def remove_empty(url: str, storage: Storage) -> None:
    """Remove a folder where there are folders, if nothing is in it."""
    system, path = locate(url, storage)
    with explained(url), suppress(FileNotFoundError):
        if is_folder_like(url) and not system.ls(path, detail=False):
            system.rmdir(path)


def in_folder(
    url: str, storage: Storage, write: Callable[[Any, str], T], error: type[MergemillError] = StorageError
) -> T:
    """Return what `write` returns for a file; its folder is made where there are folders and it is missing."""
    system, path = locate(url, storage)
    with explained(url, error):
        try:
            return write(system, path)
        except FileNotFoundError:
            if not is_folder_like(url):
                raise
            system.makedirs(system._parent(path), exist_ok=True)
            return write(system, path)


@contextmanager
def explained(url: str, error: type[MergemillError] = StorageError, doing: str = "written") -> Iterator[None]:
    """Turn what any driver raises into `error`, and what shows that it can never write into `OutputError`.

    What may pass is tried again by the drivers, as each is made and configured.
    """
    try:
        yield
    except MergemillError:
        raise
    except NotImplementedError as found:
        raise OutputError(f"{url}: {urlsplit(url).scheme}:// cannot be written to; the output is {_USUAL}") from found
    except FileNotFoundError as found:
        raise error(f"{url}: no such bucket or folder; create it first") from found
    except PermissionError as found:
        raise error(f"{url}: access denied; check the credentials for it") from found
    except Exception as found:
        raise error(f"{url}: cannot be {doing}: {shorten(found)}") from found
