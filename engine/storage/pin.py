"""Pins: which bytes a plan was made from, so that none other are ever merged in their place."""

import re
from dataclasses import dataclass

from mergemill.engine.errors import SourceChanged

_S3_ETAG = re.compile(r'etag:"[0-9a-f]{32}(-\d+)?"')  # MD5 of the content, or of the MD5s of so many parts of it


@dataclass(frozen=True, slots=True)
class Pin:
    """The identity of a stored file when the plan was made."""

    url: str  # absolute path of a local file, else its URL
    size_bytes: int
    stamp: str  # what changes when the content does: "mtime_ns:… ctime_ns:… inode:…", "etag:…", "sha256:…"


def find_content(pin: Pin) -> str | None:
    """Return what is equal for files of equal content; None where the pin does not say what that is.

    Elsewhere than in S3 an ETag stands for a version of one file: that of nginx is a time and a size.

    >>> find_content(Pin("hf://a/b@c/d", 7, "sha256:00"))
    'sha256:00 of 7 bytes'
    >>> find_content(Pin("http://host/a", 7, 'etag:"65a-7"')), find_content(Pin("/a", 7, "mtime_ns:1"))
    (None, None)
    """
    hashed = pin.stamp.startswith("sha256:") or (pin.url.startswith("s3://") and _S3_ETAG.fullmatch(pin.stamp))
    return f"{pin.stamp} of {pin.size_bytes} bytes" if hashed else None


def changed(pin: Pin, now: str) -> SourceChanged:
    """Return the error for a file that is `now` something else."""
    return SourceChanged(
        f"{pin.url}: changed since the plan was made: {pin.size_bytes} bytes, {pin.stamp} then; {now} now; plan again"
    )
