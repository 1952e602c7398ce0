"""S3 and what speaks like it, through boto3: credentials, endpoints and retries are found and done its way.

What is hot goes past it: boto3 takes 4 ms of a core for each request, and 1.3 ms are left where it only signs an
address, which is then good for every range of an object for some minutes (``tests/bench/storage.py``).
"""

import functools
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
)
from botocore.parsers import ResponseParserError
from urllib3.response import BaseHTTPResponse

from mergemill.engine.errors import Absent, CheckpointError, MergemillError, StorageError
from mergemill.engine.storage.body import LOST
from mergemill.engine.storage.connections import CONNECT_S, READ_S, Connections
from mergemill.engine.storage.fetch import CONNECTIONS
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable, check_options
from mergemill.engine.storage.tries import note_retry
from mergemill.engine.storage.urls import hide_secrets

OPTIONS = ("profile", "region", "endpoint_url", "addressing_style", "anonymous")  # that a recipe may give
SIGNED_S = 300  # that an address is used for; it is good for twice as long
LEAST_SIGNED_S = 10  # after which one that is refused may be too old for its credentials
ATTEMPTS = 5  # by botocore, of a request that is refused; with back-off and jitter
_GONE = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
_CHANGED = ("412", "PreconditionFailed", "InvalidRange")
_DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_PASSING = ("RequestTimeout", "ConditionalRequestConflict", "OperationAborted")  # 4xx that another try may mend


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


def connect(options: Mapping[str, Any]) -> Any:
    """Return a new client, as the options, the environment and the AWS profile say.

    What is sent is signed with its SHA-256 only where the connection itself does not protect it.
    """
    client = _connect(options, payload_signing_enabled=None)
    if client.meta.endpoint_url.startswith("https://"):
        return _connect(options, payload_signing_enabled=False)
    return client


def _connect(options: Mapping[str, Any], **s3: Any) -> Any:
    if "addressing_style" in options:
        s3["addressing_style"] = options["addressing_style"]
    settings = Config(
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=UNSIGNED if options.get("anonymous") else "s3v4",
        s3=s3,
    )
    try:
        shared = botocore.session.Session()
        shared.register_component("data_loader", _loader())
        session = boto3.session.Session(
            profile_name=options.get("profile"), region_name=options.get("region"), botocore_session=shared
        )
        client = session.client("s3", endpoint_url=options.get("endpoint_url"), config=settings)
    except (BotoCoreError, ValueError) as error:  # a profile that nobody has, an endpoint that is no URL
        raise CheckpointError(f"s3://: {_shorten(error)}") from error
    client.meta.events.register("before-send.s3", _note_attempt)
    return client


def _note_attempt(request: Any, **_: Any) -> None:
    """Count what botocore itself tries again; its header says which attempt a request is."""
    if "attempt=" in (said := str(request.headers.get("amz-sdk-request", ""))) and "attempt=1" not in said:
        note_retry()


@functools.cache
def _loader() -> Any:
    """What reads the descriptions of services, once: that takes a quarter of a second, the rest of a client 30 ms."""
    return botocore.session.Session().get_component("data_loader")


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
        self._lock = threading.Lock()
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The client of this process; boto3's are safe with threads, once made."""
        with self._lock:
            if self._client is None:
                self._client = connect(self._options)
            return self._client

    def resolve(self, url: str, revision: str | None) -> str:
        """Return the URL without a slash at its end."""
        if revision is not None:
            raise CheckpointError(f"{url}@{revision}: objects have no revisions; only models on the Hub have")
        split_url(url)
        return "s3://" + url.split("://", 1)[1].rstrip("/")

    def list_files(self, url: str, beneath: str) -> Mapping[str, Pin] | None:
        """Return the objects below a prefix, by one request for each thousand; None where `url` is an object."""
        bucket, key = split_url(url)
        prefix = f"{key}/" if key else ""
        with explained(url):
            found = dict(self._list(bucket, prefix)) | dict(self._list(bucket, f"{prefix}{beneath}/"))
        if found:
            return {name.removeprefix(prefix): pin for name, pin in sorted(found.items()) if name != prefix}
        self.pin_file(url)
        return None

    def pin_file(self, url: str) -> Pin:
        """Return the pin of an object."""
        bucket, key = split_url(url)
        with explained(url):
            found = self.client.head_object(Bucket=bucket, Key=key)
        return Pin(url, found["ContentLength"], _stamp(found["ETag"]))

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

    def _list(self, bucket: str, prefix: str) -> Iterator[tuple[str, Pin]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            for found in page.get("Contents", ()):
                yield found["Key"], Pin(f"s3://{bucket}/{found['Key']}", found["Size"], _stamp(found["ETag"]))


def _find_code(body: bytes) -> str:
    """Return the server's word for what went wrong."""
    found = re.search(rb"<Code>(\w+)</Code>", body)
    return found[1].decode() if found else "an error"


def _stamp(etag: str) -> str:
    return f"etag:{etag}"


@contextmanager
def explained(
    url: str, pin: Pin | None = None, error: type[MergemillError] = CheckpointError, *, again: bool = False
) -> Iterator[None]:
    """Turn what boto3 raises into the errors of this room: with `pin` those of reading, else `error`.

    With `pin`, or where the caller will try `again`, what may pass is `Unavailable`.
    """
    again = again or pin is not None
    try:
        yield
    except ClientError as found:
        code = str(found.response.get("Error", {}).get("Code", ""))
        status = int(found.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if pin is not None and (code in _GONE or code in _CHANGED or status == 412):
            raise changed(pin, "gone" if code in _GONE else "another ETag") from found
        kind = StorageError if pin is not None else error
        if code in _GONE:
            kind = Absent if kind is CheckpointError else kind
            raise kind(f"{url}: no such object, prefix or bucket") from found
        if code in _DENIED:
            raise kind(f"{url}: access denied ({code}); check the credentials that the AWS tools use here") from found
        if again and (status >= 500 or status in (408, 429) or code in _PASSING):
            raise Unavailable(f"{code} ({status})") from found
        raise kind(f"{url}: the server answers {code} ({status})") from found
    except NoCredentialsError as found:
        kind = StorageError if pin is not None else error
        raise kind(f"{url}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from found
    except (HTTPClientError, ConnectionError, IncompleteReadError, ResponseParserError, *LOST) as found:
        if again:
            raise Unavailable(_shorten(found)) from found
        raise error(f"{url}: cannot be reached: {_shorten(found)}") from found
    except BotoCoreError as found:
        kind = StorageError if pin is not None else error
        raise kind(f"{url}: {_shorten(found)}") from found


def _shorten(error: Exception) -> str:
    """Return the first line, without the query of a URL, which may hold a signature."""
    return hide_secrets((str(error) or type(error).__name__).splitlines()[0])
