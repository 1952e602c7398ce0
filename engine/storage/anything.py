"""Every other storage that fsspec knows, by its URL: slower than those with a client of their own, and as exact."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import fsspec

from mergemill.engine.errors import Absent, CheckpointError, SourceChanged, StorageError
from mergemill.engine.storage.connections import shorten
from mergemill.engine.storage.fetch import sample_remote
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Store, Unavailable

# What file systems say of a file that changes when its content does; the first that one of them says is its stamp.
_VERSIONS = ("etag", "ETag", "md5Hash", "md5", "content_md5", "generation")
# Else a time, which can be set back or be of whole seconds, with a checksum of a sample of the content.
_TIMES = (
    "last_modified",
    "LastModified",
    "mtime",
    "modificationTime",
    "modified",
    "modify",
    "updated",
    "created",
)
_USUAL = "s3, hf, gs, az, http, https, file, memory"


def open_store(scheme: str, options: Mapping[str, Any]) -> "AnyStore":
    """Return the store for URLs of `scheme`, which fsspec must know; the options are those of its file system."""
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        known = f"{_USUAL} and whatever fsspec knows"
        raise CheckpointError(f"{scheme}://: no such kind of storage; known are {known}") from error
    except ImportError as error:
        raise CheckpointError(f"{scheme}://: needs a package that is not installed: {error}") from error
    return AnyStore(options)


class AnyStore:
    """Files of fsspec's file systems."""

    checks_reads = False  # what cat_file returns says nothing of the file that it is from

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._shared: dict[str, Any] = {}
        self._own = threading.local()

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL without a slash at its end."""
        if revision is not None:
            raise CheckpointError(f"{url}@{revision}: only models on the Hub have revisions")
        return url.rstrip("/")

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return a folder's files, and those of the folder `beneath` in it."""
        with _explained(url):
            files = self.find_system(url)
            files.invalidate_cache()
            if files.isfile(url):
                return None
            folder = files._strip_protocol(url).rstrip("/")  # its public names all ask the server first
            found = list(files.ls(url, detail=True))
            if any(each["name"].rstrip("/") == f"{folder}/{beneath}" for each in found):
                found += files.ls(f"{url}/{beneath}", detail=True)
            names = {each["name"].removeprefix(f"{folder}/"): each for each in found if each["type"] == "file"}
            return {name: self._make_pin(f"{url}/{name}", each) for name, each in names.items()}

    def pin_file(self, url: str) -> Pin:
        """Return the pin of a file."""
        with _explained(url):
            files = self.find_system(url)
            files.invalidate_cache()
            return self._make_pin(url, files.info(url))

    def is_here(self, pin: Pin) -> bool:
        """Nothing is."""
        return False

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range of the file as it is now."""
        try:
            return read_plainly(self, pin, offset_bytes, buffer)
        except Unavailable:
            self._own.__dict__.clear()  # a connection that is lost stays so
            raise

    def _make_pin(self, url: str, found: Mapping[str, Any]) -> Pin:
        if found.get("size") is None:
            raise CheckpointError(f"{url}: its server does not say how long it is; copy the file first")
        stamp, size_bytes = _find_first(_VERSIONS, found), int(found["size"])
        if not stamp:
            stamp = f"{_find_first(_TIMES, found)} {sample_remote(self, url, size_bytes)}".strip()
        return Pin(url, size_bytes, stamp)

    def find_system(self, url: str) -> Any:
        """Return the file system of a URL: one for a server or bucket, and for a thread where its driver is no other's.

        The threads of a process cannot share a connection of SFTP or FTP: each would read the answers to others.
        """
        parts = urlsplit(url)
        kept = self._shared if fsspec.get_filesystem_class(parts.scheme).async_impl else self._own.__dict__
        key = f"{parts.scheme}://{parts.netloc}"
        if key not in kept:
            kept.setdefault(
                key, fsspec.url_to_fs(url, skip_instance_cache=kept is not self._shared, **self._options)[0]
            )
        return kept[key]


def read_plainly(store: Store, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
    """Fill the beginning of `buffer` from fsspec's file system, with the file as it is now; return how much of it."""
    with _explained(pin.url, pin):
        data = store.find_system(pin.url).cat_file(pin.url, start=offset_bytes, end=offset_bytes + len(buffer))
    if len(data) > len(buffer):
        raise StorageError(f"{pin.url}: its server does not serve ranges; copy the file first")
    if not data:
        raise changed(pin, f"not longer than {offset_bytes} bytes")
    buffer[: len(data)] = data
    return len(data)


def _find_first(names: Sequence[str], found: Mapping[str, Any]) -> str:
    return next((f"{name}:{_plain(found[name])}" for name in names if found.get(name) is not None), "")


def _plain(value: Any) -> Any:
    """Return a time as a number: some drivers list it so, and say it otherwise when asked about one file."""
    return value.timestamp() if isinstance(value, datetime) else value


@contextmanager
def _explained(url: str, pin: Pin | None = None) -> Iterator[None]:
    """Turn what any driver raises into the errors of this room: with `pin` those of reading."""
    try:
        yield
    except (CheckpointError, StorageError, SourceChanged):
        raise
    except FileNotFoundError as error:
        raise changed(pin, "gone") if pin else Absent(f"{url}: no such file or folder") from error
    except PermissionError as error:
        kind = StorageError if pin else CheckpointError
        raise kind(f"{url}: access denied; check the credentials for it") from error
    except Exception as error:
        if pin:
            raise Unavailable(shorten(error)) from error
        raise CheckpointError(f"{url}: cannot be read: {shorten(error)}") from error
