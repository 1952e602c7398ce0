"""The body of an HTTP answer, read into memory that the caller lends."""

import http.client
from collections.abc import Mapping
from typing import Any

import urllib3

from mergemill.engine.errors import StorageError
from mergemill.engine.storage.pin import Pin, changed
from mergemill.engine.storage.store import Unavailable

BLOCK_BYTES = 256 << 10  # read at a time: what came before a connection was lost is kept, up to the last block

# What a connection that is lost on the way raises, by whichever of its layers notices.
LOST = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError)


def make_range(offset_bytes: int, size_bytes: int) -> str:
    """Return the header that asks for a range.

    >>> make_range(10, 5)
    'bytes=10-14'
    """
    return f"bytes={offset_bytes}-{offset_bytes + size_bytes - 1}"


def check_range(pin: Pin, offset_bytes: int, size_bytes: int, status: int, headers: Mapping[str, str]) -> None:
    """Raise unless the answer is the range that was asked for, of the file that was pinned."""
    length = headers.get("content-length")
    if status == 200 and (offset_bytes, size_bytes) == (0, pin.size_bytes):
        expected = None
    elif status != 206:
        raise StorageError(f"{pin.url}: its server does not serve ranges (it answers {status}); copy the file first")
    else:
        expected = f"bytes {offset_bytes}-{offset_bytes + size_bytes - 1}/{pin.size_bytes}"
    found = headers.get("content-range")
    if expected and found and found.rsplit("/", 1)[-1] not in ("*", str(pin.size_bytes)):
        raise changed(pin, f"{found.rsplit('/', 1)[-1]} bytes")
    if expected and found != expected:
        raise Unavailable(f"the answer holds {found or 'an unknown range'} instead of {expected}")
    if length is not None and length.strip() != str(size_bytes):
        raise Unavailable(f"the answer has {length} bytes instead of {size_bytes}")


def read_body(response: Any, buffer: memoryview) -> int:
    """Fill the beginning of `buffer` with what comes until the connection ends, and return how much that is.

    response: of urllib3, not yet read; it gives its connection back. Reading what is beneath it, of the standard
    library, spares a copy.
    """
    raw = getattr(response, "_fp", None)
    source = raw if isinstance(raw, http.client.HTTPResponse) else response
    done = 0
    try:
        while done < len(buffer) and (got := source.readinto(buffer[done : done + BLOCK_BYTES])):
            done += got
    except LOST as error:
        if not done:
            raise Unavailable(str(error) or type(error).__name__) from error
    if done == len(buffer) and (source is response or source.isclosed()):
        response.release_conn()  # the end of chunks, which is not read here, would stand before the next answer
    else:
        response.close()
    return done
