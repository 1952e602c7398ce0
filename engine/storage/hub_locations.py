"""Where the bytes of a model's files on the Hub are: at signed addresses, asked for once a file until they run out."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.file_download import HfFileMetadata
from huggingface_hub.utils import build_hf_headers
from urllib3.response import BaseHTTPResponse

from mergemill.engine.errors import Absent, CheckpointError, StorageError
from mergemill.engine.storage.hub_cache import is_hash
from mergemill.engine.storage.hub_errors import Offline, explained
from mergemill.engine.storage.hub_listing import ANSWER_S
from mergemill.engine.storage.hub_place import HubPlace, parse_url
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable
from mergemill.engine.storage.tries import BEFORE, ask_patiently

_HUB = ("https", "huggingface.co")  # mirrors send there for some files


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of a file are, for now."""

    url: str
    own: bool  # whether the Hub itself sends them, to who may read the file, under the file's own ETag

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that it takes: the token goes nowhere but to the Hub."""
        return build_hf_headers(token=None if self.own else False, library_name="mergemill")


class Expired(Unavailable):
    """A location is refused: the next one may hold."""


class Locations:
    """The locations of the files that this process reads."""

    def __init__(self, api: HfApi) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._turns: dict[Pin, threading.Lock] = {}
        self._known: dict[Pin, Location] = {}
        self._etags: dict[tuple[Pin, str], str] = {}  # of a file at a host, as first seen there

    def find(self, pin: Pin) -> Location:
        """Return the location of a file; of many threads one asks the Hub for it."""
        with self._lock:
            turn = self._turns.setdefault(pin, threading.Lock())
        with turn:
            if pin not in self._known:
                self._known[pin] = ask_patiently(lambda: self._ask(pin), BEFORE)
            return self._known[pin]

    def check(self, pin: Pin, location: Location, answer: BaseHTTPResponse) -> None:
        """Raise unless an answer from a location is of the file that was pinned.

        `Expired` where the location is refused, which is then forgotten.
        """
        if answer.status == 416:
            raise changed(pin, "shorter")
        if 400 <= answer.status < 500:
            self._forget(pin, location)
            raise Expired(f"the address that the Hub gave for it is refused ({answer.status})")
        if answer.status in (200, 206):
            self._check_etag(pin, location, answer.headers.get("etag", "").removeprefix("W/").strip('"'))

    def _check_etag(self, pin: Pin, location: Location, etag: str) -> None:
        if location.own and is_hash(pin.stamp):
            expected = pin.stamp.partition(":")[2]
        else:  # one that is not the Hub's, yet it must stay
            expected = self._etags.setdefault((pin, urlsplit(location.url).netloc), etag)
        if etag != expected:
            raise changed(pin, f"ETag {etag or 'none'} instead of {expected or 'none'}")

    def _forget(self, pin: Pin, location: Location) -> None:
        with self._lock:
            if self._known.get(pin) is location:
                del self._known[pin]

    def _ask(self, pin: Pin) -> Location:
        place = parse_url(pin.url)
        found = self._ask_metadata(pin, place)
        if found.etag is None or (is_hash(pin.stamp) and found.etag != pin.stamp.partition(":")[2]):
            raise changed(pin, f"ETag {found.etag}")
        if found.size not in (None, pin.size_bytes):
            raise changed(pin, f"{found.size} bytes")
        parts, hub = urlsplit(found.location), urlsplit(self._api.endpoint)
        return Location(found.location, parts[:2] in (hub[:2], _HUB))

    def _ask_metadata(self, pin: Pin, place: HubPlace) -> HfFileMetadata:
        url = hf_hub_url(place.repo, place.path, revision=place.revision, endpoint=self._api.endpoint)
        try:
            with explained(place, self._api.endpoint):
                return self._api.get_hf_file_metadata(url=url, timeout=ANSWER_S)
        except Absent as error:
            raise changed(pin, "gone") from error
        except CheckpointError as error:
            raise StorageError(str(error)) from error
        except Offline as error:
            raise StorageError(f"{pin.url}: {error}, and its cache does not have the file") from error
