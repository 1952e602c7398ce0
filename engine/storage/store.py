"""What a kind of storage beside the local disk must be able to do, and which one a URL belongs to."""

import functools
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.urls import is_url

_STORES = {"s3": "s3", "s3a": "s3", "hf": "hub", "http": "http", "https": "http"}  # scheme -> module; else fsspec's
_EXTRAS = {"s3": "s3", "hub": "hub"}  # module -> the extra that installs what it needs


Options = Mapping[str, Mapping[str, Any]]
"""How storage is reached where the environment does not say it: by scheme, then by name."""

EVERY = "*"  # the scheme of what is said of every kind of storage, this machine's disks too
READER = "reader"  # an option of every scheme: how slices are read
READERS = ("direct", "fsspec")
READER_VARIABLE = "MERGEMILL_READER"

_STORES_KEPT = 64  # with their connections; one that is dropped is opened again
_opening = threading.RLock()


@dataclass(frozen=True, slots=True, repr=False)
class Storage:
    """How a merge reaches storage: its options by scheme; where it has none, the environment says it.

    A value that goes with everything that opens a store (2026-11-29): merges that share a process, as on the workers of
    a cluster, may reach storage in different ways. Stores are kept by the options that they were opened with.
    """

    options: tuple[tuple[str, tuple[tuple[str, str | int | bool], ...]], ...] = ()  # sorted, so that equals are equal
    plain: tuple[str, ...] = ()  # schemes that are read through fsspec, sorted; `EVERY` for all but `direct`
    direct: tuple[str, ...] = ()  # schemes that are not, whatever `plain` says

    def __repr__(self) -> str:
        """Name the schemes alone: a program may have given secrets."""
        return f"Storage({', '.join(scheme for scheme, _ in self.options)})"

    def find(self, scheme: str) -> tuple[tuple[str, str | int | bool], ...]:
        """Return the options of one scheme, names and values."""
        return dict(self.options).get(scheme, ())

    def reads_plainly(self, scheme: str) -> bool:
        """Whether slices of a kind of storage, ``file`` for local ones, are read through fsspec."""
        return scheme in self.plain or (EVERY in self.plain and scheme not in self.direct)


ENVIRONMENT = Storage()  # nothing but what the environment says


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

    def find_system(self, url: str) -> Any:
        """Return fsspec's file system of a URL."""

    def is_here(self, pin: Pin) -> bool:
        """Whether a file's bytes lie on this machine already, so that nothing is won by keeping them."""

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Fill the beginning of `buffer` by one request, and return how much of it.

        Raises `SourceChanged` where the file is not what was pinned, `StorageError` for what trying again does not
        mend, and `Unavailable` for the rest.
        """


@functools.lru_cache(maxsize=4096)  # of each tensor of a plan it is asked for each of its inputs
def is_remote(url: str) -> bool:
    """Whether a place, as `parse_place` returns it, is not of this machine's files."""
    return is_url(url)


def is_on_disk(url: str) -> bool:
    """Whether `url` is a path of this machine, or holds one.

    >>> is_on_disk("models/a"), is_on_disk("file:///models/a"), is_on_disk("local:///models/a"), is_on_disk("s3://b/a")
    (True, True, True, False)
    """
    return not is_remote(url) or url.startswith(("local://", "file://"))


def make_storage(options: Options | None) -> Storage:
    """Return options as a value; `CheckpointError` for one that is not text, a number or true.

    Each scheme may say its `reader`, and `EVERY` for those that do not; where that does not, the environment says it.
    """
    readers = {EVERY: _check_reader(os.environ.get(READER_VARIABLE) or "direct", READER_VARIABLE)}
    own: dict[str, dict[str, Any]] = {}
    for scheme, named in sorted((options or {}).items()):
        for name, value in sorted(named.items()):
            if not isinstance(value, str | int | float):
                raise CheckpointError(f"storage_options: {scheme}: {name}: must be text, a number or true")
            if name == READER:
                readers[scheme] = _check_reader(value, f"storage_options: {scheme}: {READER}")
            else:
                own.setdefault(scheme, {})[name] = value
    check_options(EVERY, own.pop(EVERY, {}), (READER,))
    plain, direct = (tuple(sorted(s for s, reader in readers.items() if reader == each)) for each in reversed(READERS))
    exceptions = direct if EVERY in plain else ()  # else they say nothing
    return Storage(tuple((scheme, tuple(named.items())) for scheme, named in own.items()), plain, exceptions)


def _check_reader(value: object, where: str) -> str:
    if value not in READERS:
        raise CheckpointError(f"{where}: must be {' or '.join(READERS)}, not {value!r}")
    return str(value)


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


def find_store(scheme: str, storage: Storage = ENVIRONMENT) -> Store:
    """Return the store for URLs of `scheme`; `CheckpointError` names the extra that it lacks."""
    with _opening:  # or models that are opened at once would each have a store of their own
        return _open_store(scheme, storage.find(scheme))


@functools.lru_cache(_STORES_KEPT)
def _open_store(scheme: str, options: tuple[tuple[str, str | int | bool], ...]) -> Store:
    name = _STORES.get(scheme, "anything")
    try:
        module = importlib.import_module(f"mergemill.engine.storage.{name}")
        store: Store = module.open_store(scheme, dict(options))
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


def store_of(url: str, storage: Storage = ENVIRONMENT) -> Store:
    """Return the store that a URL belongs to."""
    return find_store(url.split("://", 1)[0], storage)


def reader_of(url: str, storage: Storage = ENVIRONMENT) -> Store:
    """Return what slices of a URL are read by: its store, or fsspec alone where `storage` says so."""
    scheme = url.split("://", 1)[0]
    store = find_store(scheme, storage)
    if not storage.reads_plainly(scheme):
        return store
    plain: Store = importlib.import_module("mergemill.engine.storage.plain").open_plain(store)
    return plain
