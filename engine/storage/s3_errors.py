"""What S3's clients raise, as the errors of this room; the same of boto3 and of s3fs."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
)
from botocore.parsers import ResponseParserError

from mergemill.engine.errors import Absent, CheckpointError, MergemillError, StorageError
from mergemill.engine.storage.body import LOST
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable
from mergemill.engine.storage.urls import hide_secrets

_GONE = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
_CHANGED = ("412", "PreconditionFailed", "InvalidRange")
_DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
_PASSING = ("RequestTimeout", "ConditionalRequestConflict", "OperationAborted")  # 4xx that another try may mend


@contextmanager
def explained(
    url: str, pin: Pin | None = None, error: type[MergemillError] = CheckpointError, *, again: bool = False
) -> Iterator[None]:
    """Turn what boto3 and s3fs raise into the errors of this room: with `pin` those of reading, else `error`.

    With `pin`, or where the caller will try `again`, what may pass is `Unavailable`.
    """
    again = again or pin is not None
    try:
        with _as_answered():
            yield
    except ClientError as found:
        code = str(found.response.get("Error", {}).get("Code", ""))
        status = int(found.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if pin is not None and (code in _GONE or code in _CHANGED or status == 412):
            raise changed(pin, "gone" if code in _GONE else "another ETag") from found
        kind = StorageError if pin is not None else error
        if code in _GONE:
            raise _missing(url, kind) from found
        if code in _DENIED:
            raise kind(f"{url}: access denied ({code}); check the credentials that the AWS tools use here") from found
        if again and (status >= 500 or status in (408, 429) or code in _PASSING):
            raise Unavailable(f"{code} ({status})") from found
        raise kind(f"{url}: the server answers {code} ({status})") from found
    except NoCredentialsError as found:
        kind = StorageError if pin is not None else error
        raise kind(f"{url}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from found
    except (HTTPClientError, ConnectionError, IncompleteReadError, ResponseParserError, *LOST) as found:
        if isinstance(found, FileNotFoundError) and found.errno is None:  # of s3fs, not of this machine's files
            raise _missing(url, error) from found
        if again:
            raise Unavailable(shorten(found)) from found
        raise error(f"{url}: cannot be reached: {shorten(found)}") from found
    except BotoCoreError as found:
        kind = StorageError if pin is not None else error
        raise kind(f"{url}: {shorten(found)}") from found


@contextmanager
def _as_answered() -> Iterator[None]:
    """Raise what the server said: s3fs makes Python's errors of it, which have no code and no status."""
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, ClientError):
            raise error.__cause__ from None
        raise
    except _find_lost_bodies() as error:
        raise HTTPClientError(error=error) from error


@functools.cache
def _find_lost_bodies() -> type[Exception]:
    """Return what s3fs raises of a body that ends too early; a worker that only reads slices does not import it."""
    import aiohttp

    return aiohttp.ClientError


def _missing(url: str, kind: type[MergemillError]) -> MergemillError:
    return (Absent if kind is CheckpointError else kind)(f"{url}: no such object, prefix or bucket")


def shorten(error: Exception) -> str:
    """Return the first line, without the query of a URL, which may hold a signature."""
    return hide_secrets((str(error) or type(error).__name__).splitlines()[0])
