"""What a kind of storage beside the local disk must be able to do, and which one a URL belongs to."""

import functools
import importlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.pin import Pin

_STORES = {"s3": "s3", "s3a": "s3", "hf": "hub", "http": "http", "https": "http"}  # scheme -> module; else fsspec's
_EXTRAS = {"s3": "s3", "hub": "hub"}  # module -> the extra that installs what it needs


Options = Mapping[str, Mapping[str, Any]]
"""How storage is reached where the environment does not say it: by scheme, then by name."""

_options: dict[str, Mapping[str, Any]] = {}  # of this process, by scheme
_opening = threading.RLock()


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

    def is_here(self, pin: Pin) -> bool:
        """Whether a file's bytes lie on this machine already, so that nothing is won by keeping them."""

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Fill the beginning of `buffer` by one request, and return how much of it.

        Raises `SourceChanged` where the file is not what was pinned, `StorageError` for what trying again does not
        mend, and `Unavailable` for the rest.
        """


def is_remote(url: str) -> bool:
    """Whether `url` is not of this machine's files."""
    return "://" in url and not url.startswith("file://")


def use_options(options: Options | None) -> None:
    """Have this process open its stores with these options from now on; None: as it did before."""
    if options is not None and options != _options:
        _options.clear()
        _options.update(options)
        close_stores()


def join_options(
    weak: Mapping[str, Mapping[str, Any]], strong: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the options of both, by scheme; of one that both have, that of `strong`.

    >>> join_options({"s3": {"profile": "a", "region": "b"}}, {"s3": {"profile": "c"}})
    {'s3': {'profile': 'c', 'region': 'b'}}
    """
    return {scheme: {**weak.get(scheme, {}), **strong.get(scheme, {})} for scheme in {**weak, **strong}}


def close_stores() -> None:
    """Forget the stores of this process, and with them their connections."""
    _open_store.cache_clear()


def find_store(scheme: str) -> Store:
    """Return the store for URLs of `scheme`; `CheckpointError` names the extra that it lacks."""
    with _opening:  # or models that are opened at once would each have a store of their own
        return _open_store(scheme)


@functools.cache
def _open_store(scheme: str) -> Store:
    name = _STORES.get(scheme, "anything")
    try:
        module = importlib.import_module(f"mergemill.engine.storage.{name}")
        store: Store = module.open_store(scheme, _options.get(scheme, {}))
    except ImportError as error:
        extra = _EXTRAS.get(name)
        needed = f"mergemill[{extra}]" if extra else f"the fsspec package for {scheme}://"
        raise CheckpointError(f"{scheme}://: {error.name or error} is not installed; install {needed}") from error
    return store


def check_options(scheme: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise `CheckpointError` for options that a store does not have."""
    for name in options:
        if name not in known:
            hint = f"known are {', '.join(known)}" if known else "it takes none, and goes by the environment"
            raise CheckpointError(f"storage_options: {scheme}: unknown option {name!r}; {hint}")


def store_of(url: str) -> Store:
    """Return the store that a URL belongs to."""
    return find_store(url.split("://", 1)[0])
