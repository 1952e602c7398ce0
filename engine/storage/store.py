"""What a kind of storage beside the local disk must be able to do, and which one a URL belongs to."""

import functools
import importlib
from collections.abc import Mapping
from typing import Protocol

from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.pin import Pin

_STORES = {"s3": "s3", "s3a": "s3", "hf": "hub", "http": "http", "https": "http"}  # scheme -> module; else fsspec's
_EXTRAS = {"s3": "s3", "hub": "hub"}  # module -> the extra that installs what it needs


class Unavailable(Exception):
    """A request failed in a way that may pass: worth another try."""


class Store(Protocol):
    """A kind of storage that is read over a network."""

    checks_reads: bool  # whether every answer is compared with the pin, so that a change cannot go unseen

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL of a folder or file as it will stay; `CheckpointError` where nothing is there."""

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return a folder's files, and those of the folder `beneath` in it; None where `url` is a file."""

    def pin_file(self, url: str) -> Pin:
        """Return the pin of a file; `CheckpointError` where there is none."""

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Fill the beginning of `buffer` by one request, and return how much of it.

        Raises `SourceChanged` where the file is not what was pinned, `StorageError` for what trying again does not
        mend, and `Unavailable` for the rest.
        """


def is_remote(url: str) -> bool:
    """Whether `url` is not of this machine's files."""
    return "://" in url and not url.startswith("file://")


@functools.cache
def find_store(scheme: str) -> Store:
    """Return the store for URLs of `scheme`; `CheckpointError` names the extra that it lacks."""
    name = _STORES.get(scheme, "anything")
    try:
        store: Store = importlib.import_module(f"mergemill.engine.storage.{name}").open_store(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(name)
        needed = f"mergemill[{extra}]" if extra else f"the fsspec package for {scheme}://"
        raise CheckpointError(f"{scheme}://: {error.name or error} is not installed; install {needed}") from error
    return store


def store_of(url: str) -> Store:
    """Return the store that a URL belongs to."""
    return find_store(url.split("://", 1)[0])
