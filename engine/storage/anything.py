"""Every other storage that fsspec knows, by its URL: slower than those with a client of their own, and as exact."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec

from mergemill.engine.errors import CheckpointError, StorageError
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable

_STAMPS = (
    "etag",
    "ETag",
    "md5Hash",
    "md5",
    "content_md5",
    "generation",
    "last_modified",
    "mtime",
    "created",
    "updated",
)


def open_store(scheme: str) -> "AnyStore":
    """Return the store for URLs of `scheme`, which fsspec must know."""
    if scheme not in fsspec.available_protocols():
        raise CheckpointError(f"{scheme}://: no such kind of storage; known are {', '.join(_known())}")
    return AnyStore(fsspec.filesystem(scheme), scheme)


def _known() -> list[str]:
    return sorted({"s3", "hf", "gs", "az", "http", "https", "file", "memory"} & {*fsspec.available_protocols(), "hf"})


class AnyStore:
    """Files of an fsspec file system."""

    checks_reads = False  # what cat_file returns says nothing of the file that it is from

    def __init__(self, files: Any, scheme: str) -> None:
        self._files = files
        self._scheme = scheme

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL without a slash at its end."""
        if revision is not None:
            raise CheckpointError(f"{url}@{revision}: only models on the Hub have revisions")
        return url.rstrip("/")

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return a folder's files, and those of the folder `beneath` in it."""
        with _explained(url):
            if self._files.isfile(url):
                return None
            folder = self._files._strip_protocol(url).rstrip("/")  # its public names all ask the server first
            found = list(self._files.ls(url, detail=True))
            if any(each["name"].rstrip("/") == f"{folder}/{beneath}" for each in found):
                found += self._files.ls(f"{url}/{beneath}", detail=True)
        files = [each for each in found if each["type"] == "file"]
        return {each["name"].removeprefix(f"{folder}/"): self._pin(each) for each in files}

    def pin_file(self, url: str) -> Pin:
        """Return the pin of a file."""
        with _explained(url):
            self._files.invalidate_cache()
            return self._pin(self._files.info(url), url)

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range of the file as it is now."""
        with _explained(pin.url, pin):
            data = self._files.cat_file(pin.url, start=offset_bytes, end=offset_bytes + len(buffer))
        if len(data) > len(buffer):
            raise StorageError(f"{pin.url}: its server does not serve ranges; copy the file first")
        buffer[: len(data)] = data
        return len(data)

    def _pin(self, found: Mapping[str, Any], url: str | None = None) -> Pin:
        stamps = [f"{name}:{found[name]}" for name in _STAMPS if found.get(name) is not None]
        return Pin(url or self._files.unstrip_protocol(found["name"]), int(found["size"]), stamps[0] if stamps else "")


@contextmanager
def _explained(url: str, pin: Pin | None = None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise changed(pin, "gone") if pin else CheckpointError(f"{url}: no such file or folder") from error
    except PermissionError as error:
        kind = StorageError if pin else CheckpointError
        raise kind(f"{url}: access denied; check the credentials for it") from error
    except Exception as error:
        if pin:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        raise CheckpointError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
