"""Models on the Hub, read by range where its storage has them, without a copy on any disk.

huggingface_hub says what there is: one request pins a revision to a commit and lists it, one more finds where a file's
bytes are, at a signed address that runs out. What the Hub's own cache has is read from there. Without the Hub, or with
HF_HUB_OFFLINE, the cache says what there is as well, and its pins are the same.
"""

import os
import threading
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub import HfApi, HfFileSystem, constants
from urllib3.response import BaseHTTPResponse

from mergemill.engine.errors import CheckpointError
from mergemill.engine.storage import local
from mergemill.engine.storage.connections import Connections
from mergemill.engine.storage.hub_cache import find_cached
from mergemill.engine.storage.hub_listing import Listing
from mergemill.engine.storage.hub_locations import Expired, Locations
from mergemill.engine.storage.hub_place import HubPlace, parse_url
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.store import check_options


def open_store(scheme: str, options: Mapping[str, Any]) -> "HubStore":
    """Return the store of this process, for the Hub at HF_ENDPOINT."""
    check_options(scheme, options, ())
    return HubStore((os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"))


class HubStore:
    """Models on the Hub."""

    checks_reads = True

    def __init__(self, endpoint: str) -> None:
        self._api = HfApi(endpoint=endpoint, library_name="mergemill", library_version=version("mergemill"))
        self._listing = Listing(self._api)
        self._locations = Locations(self._api)
        self._connections = Connections()
        self._cached: dict[Pin, Pin | None] = {}
        self._opening = threading.Lock()
        self._files: HfFileSystem | None = None

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL at the commit that the revision is now, by default that of the main branch."""
        place = parse_url(url)
        if revision is not None and place.revision is not None:
            raise CheckpointError(f"{url}@{revision}: two revisions, {place.revision!r} and {revision!r}; give one")
        commit = self._listing.find_commit(HubPlace(place.repo, revision or place.revision, place.path))
        return str(HubPlace(place.repo, commit, place.path))

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return a folder's files at a commit, and those of the folder `beneath` in it; None where `url` is a file."""
        place = parse_url(url)
        files = self._listing.list_files(place)
        if place.path in files:
            return None
        start = f"{place.path}/" if place.path else ""
        below = {path.removeprefix(start): pin for path, pin in files.items() if path.startswith(start)}
        if place.path and not below:
            message = f"{url}: {place.repo} has no file or folder {place.path!r} at this commit"
            raise self._listing.explain_missing(place, message)
        self._listing.check_whole(place, below)
        return {name: pin for name, pin in below.items() if name.rpartition("/")[0] in ("", beneath)}

    def pin_file(self, url: str) -> Pin:
        """Return the pin of a file at a commit."""
        place = parse_url(url)
        files = self._listing.list_files(place)
        if place.path not in files:
            raise self._listing.explain_missing(place, f"{url}: no such file at this commit")
        return files[place.path]

    def find_system(self, url: str) -> Any:
        """Return the Hub's own; it keeps what it is told, and that does not change: pins name commits."""
        with self._opening:
            if self._files is None:
                self._files = HfFileSystem(endpoint=self._api.endpoint, skip_instance_cache=True)
            return self._files

    def is_here(self, pin: Pin) -> bool:
        """Whether the Hub's own cache has the file."""
        return self._find_cached(pin) is not None

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range, from the cache if that has the file, else from where the Hub says that it is."""
        if cached := self._find_cached(pin):
            local.read_into(cached, offset_bytes, buffer)
            return len(buffer)
        try:
            return self._read(pin, offset_bytes, buffer)
        except Expired:
            return self._read(pin, offset_bytes, buffer)

    def _read(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        location = self._locations.find(pin)

        def check(answer: BaseHTTPResponse) -> None:
            self._locations.check(pin, location, answer)

        return self._connections.read_range(pin, location.url, location.headers, offset_bytes, buffer, check)

    def _find_cached(self, pin: Pin) -> Pin | None:
        if pin not in self._cached:
            place = parse_url(pin.url)
            assert place.revision
            self._cached[pin] = find_cached(pin, place.repo, place.revision, place.path)
        return self._cached[pin]
