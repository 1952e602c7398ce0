"""S3 and what speaks like it: found, listed and asked about through s3fs, read by ranges past it.

A range costs boto3 4 ms of a core and s3fs more; 1.3 ms are left where boto3 only signs an address, which is then good
for every range of an object for some minutes (``tests/bench/storage.py``).
"""

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from urllib3.response import BaseHTTPResponse

from mergemill.engine.errors import Absent, CheckpointError, StorageError
from mergemill.engine.storage.connections import Connections
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.s3_clients import open_client, open_files
from mergemill.engine.storage.s3_errors import explained
from mergemill.engine.storage.store import Unavailable, check_options

OPTIONS = ("profile", "region", "endpoint_url", "addressing_style", "anonymous")  # that a recipe may give
SIGNED_S = 300  # that an address is used for; it is good for twice as long
LEAST_SIGNED_S = 10  # after which one that is refused may be too old for its credentials


def open_store(scheme: str, options: Mapping[str, Any]) -> "S3Store":
    """Return the store of this process; options go before the environment."""
    check_options(scheme, options, OPTIONS)
    return S3Store(options)


def split_url(url: str) -> tuple[str, str]:
    """Return bucket and key.

    >>> split_url("s3://models/a/config.json")
    ('models', 'a/config.json')
    """
    bucket, _, key = url.split("://", 1)[1].partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        raise CheckpointError("s3://: a URL is s3://bucket/key; keys come from the environment or a profile")
    return bucket, key


@dataclass(frozen=True, slots=True)
class _Signed:
    """An address with a signature, which is a secret for as long as it is good."""

    address: str
    made_s: float  # by the clock of this process

    def __repr__(self) -> str:
        """Say nothing of it."""
        return "_Signed()"


class S3Store:
    """Objects of S3, read by range."""

    checks_reads = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._connections = Connections(ca_certs=os.environ.get("AWS_CA_BUNDLE"))
        self._signed: dict[str, _Signed] = {}
        self._lock = threading.RLock()
        self._client: Any = None
        self._files: Any = None

    @property
    def client(self) -> Any:
        """boto3's client, for what is hot; it is safe with threads, once made."""
        with self._lock:
            if self._client is None:
                self._client = open_client(self._options)
            return self._client

    @property
    def files(self) -> Any:
        """fsspec's file system, for all else; what threads ask of it runs in its one loop."""
        with self._lock:
            if self._files is None:
                self._files = open_files(self._options, self.client)
            return self._files

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL without a slash at its end."""
        if revision is not None:
            raise CheckpointError(f"{url}@{revision}: objects have no revisions; only models on the Hub have")
        split_url(url)
        return "s3://" + url.split("://", 1)[1].rstrip("/")

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return the objects below a prefix, by one request for each thousand; None where `url` is an object."""
        place = "/".join(split_url(url)).rstrip("/")
        with explained(url):
            found = self.files.ls(place, detail=True, refresh=True)
            if any((each["name"], each["type"]) == (f"{place}/{beneath}", "directory") for each in found):
                found = [*found, *self.files.ls(f"{place}/{beneath}", detail=True, refresh=True)]
        objects = {each["name"]: each for each in found if each["type"] == "file"}
        if not objects:
            raise Absent(f"{url}: no such object, prefix or bucket")
        if place in objects:
            return None
        pins = {name: _make_pin(f"s3://{name}", each) for name, each in sorted(objects.items())}
        return {name.removeprefix(f"{place}/"): pin for name, pin in pins.items() if name != f"{place}/"}

    def pin_file(self, url: str) -> Pin:
        """Return the pin of an object, by one request: s3fs's `info` lists a folder of the name of one that is not."""
        bucket, key = split_url(url)
        if not key:
            raise Absent(f"{url}: no such object, prefix or bucket")
        with explained(url):
            found = self.files.call_s3("head_object", Bucket=bucket, Key=key)
        return _make_pin(url, {"size": found["ContentLength"], "ETag": found["ETag"]})

    def find_system(self, url: str) -> Any:
        """Return the one of this store."""
        return self.files

    def is_here(self, pin: Pin) -> bool:
        """Nothing is."""
        return False

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range of the object that was pinned, and of no other."""
        signed = self._sign(pin)
        conditions = {"If-Match": pin.stamp.removeprefix("etag:")}
        return self._connections.read_range(
            pin, signed.address, conditions, offset_bytes, buffer, lambda answer: self._check(pin, answer, signed)
        )

    def _sign(self, pin: Pin) -> "_Signed":
        """Return an address of the object that is good for minutes, made with the credentials of now."""
        signed = self._signed.get(pin.url)
        if signed is None or time.monotonic() - signed.made_s > SIGNED_S:
            bucket, key = split_url(pin.url)
            with explained(pin.url, pin):
                address = self.client.generate_presigned_url(
                    "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=2 * SIGNED_S
                )
            self._signed[pin.url] = signed = _Signed(address, time.monotonic())
        return signed

    def _check(self, pin: Pin, answer: BaseHTTPResponse, signed: "_Signed") -> None:
        """Raise unless an answer is of the object that was pinned."""
        if answer.status in (404, 410):
            raise changed(pin, "gone")
        if answer.status == 412 or (
            answer.status in (200, 206) and _stamp(answer.headers.get("etag", "")) != pin.stamp
        ):
            raise changed(pin, _stamp(answer.headers.get("etag", "another")))
        if answer.status == 416:
            raise changed(pin, "fewer bytes")
        if answer.status not in (200, 206):
            code = _find_code(answer.read(decode_content=False)[:4096])
            if self._signed.pop(pin.url, None) is signed and time.monotonic() - signed.made_s > LEAST_SIGNED_S:
                raise Unavailable(f"{code} ({answer.status}) to an address that was signed a while ago")
            denied = "access denied" if answer.status in (401, 403) else "the server answers"
            raise StorageError(f"{pin.url}: {denied}: {code} ({answer.status})")


def _make_pin(url: str, found: Mapping[str, Any]) -> Pin:
    return Pin(url, found["size"], _stamp(found["ETag"]))


def _find_code(body: bytes) -> str:
    """Return the server's word for what went wrong."""
    found = re.search(rb"<Code>(\w+)</Code>", body)
    return found[1].decode() if found else "an error"


def _stamp(etag: str) -> str:
    return f"etag:{etag}"
