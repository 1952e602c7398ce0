"""S3 and what speaks like it, through boto3: credentials, endpoints and retries are found and done its way."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import boto3
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

from mergemill.engine.errors import CheckpointError, MergemillError, StorageError
from mergemill.engine.storage.body import check_range, make_range, read_body
from mergemill.engine.storage.fetch import CONNECTIONS
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable

CONNECT_S, READ_S = 10, 60  # how long a connection may take, and how long one may be silent
ATTEMPTS = 5  # by botocore, of a request that is refused; with back-off and jitter
_GONE = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
_CHANGED = ("412", "PreconditionFailed", "InvalidRange")
_DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_PASSING = ("RequestTimeout", "ConditionalRequestConflict", "OperationAborted")  # 4xx that another try may mend


def open_store(scheme: str) -> "S3Store":
    """Return the store of this process."""
    return S3Store()


def split_url(url: str) -> tuple[str, str]:
    """Return bucket and key.

    >>> split_url("s3://models/a/config.json")
    ('models', 'a/config.json')
    """
    bucket, _, key = url.split("://", 1)[1].partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        raise CheckpointError("s3://: a URL is s3://bucket/key; keys come from the environment or a profile")
    return bucket, key


def connect() -> Any:
    """Return a new client, as the environment and the AWS profile say."""
    settings = Config(
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=settings)


class S3Store:
    """Objects of S3, read by range."""

    checks_reads = True

    @functools.cached_property
    def client(self) -> Any:
        """The client of this process; boto3's are safe with threads, once made."""
        return connect()

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

    def read_some(self, pin: Pin, offset_bytes: int, buffer: memoryview) -> int:
        """Read a range of the object that was pinned, and of no other."""
        bucket, key = split_url(pin.url)
        wanted = make_range(offset_bytes, len(buffer))
        with explained(pin.url, pin):
            found = self.client.get_object(
                Bucket=bucket, Key=key, Range=wanted, IfMatch=pin.stamp.removeprefix("etag:")
            )
        response = found["Body"]._raw_stream  # what boto3 puts around it copies every byte twice
        try:
            if _stamp(found["ETag"]) != pin.stamp:
                raise changed(pin, _stamp(found["ETag"]))
            headers = {name.lower(): value for name, value in found["ResponseMetadata"]["HTTPHeaders"].items()}
            status = found["ResponseMetadata"]["HTTPStatusCode"]
            check_range(pin, offset_bytes, len(buffer), status, headers)
            return read_body(response, buffer)
        except Exception:
            response.close()
            raise

    def _list(self, bucket: str, prefix: str) -> Iterator[tuple[str, Pin]]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            for found in page.get("Contents", ()):
                yield found["Key"], Pin(f"s3://{bucket}/{found['Key']}", found["Size"], _stamp(found["ETag"]))


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
            raise kind(f"{url}: no such object, prefix or bucket") from found
        if code in _DENIED:
            raise kind(f"{url}: access denied ({code}); check the credentials that the AWS tools use here") from found
        if again and (status >= 500 or status in (408, 429) or code in _PASSING):
            raise Unavailable(f"{code} ({status})") from found
        raise kind(f"{url}: the server answers {code} ({status})") from found
    except NoCredentialsError as found:
        kind = StorageError if pin is not None else error
        raise kind(f"{url}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from found
    except (HTTPClientError, ConnectionError, IncompleteReadError, ResponseParserError) as found:
        if again:
            raise Unavailable(_shorten(found)) from found
        raise error(f"{url}: cannot be reached: {_shorten(found)}") from found
    except BotoCoreError as found:
        kind = StorageError if pin is not None else error
        raise kind(f"{url}: {_shorten(found)}") from found


def _shorten(error: Exception) -> str:
    """Return the first line, without the query of a URL, which may hold a signature."""
    return str(error).splitlines()[0].split("?", 1)[0]
