"""Whether two places are one, or one lies in the other, however each of them is written."""

import os
from pathlib import Path

from mergemill.engine.storage.store import is_on_disk
from mergemill.engine.storage.urls import is_url

_ALIASES = {"s3a": "s3", "gcs": "gs", "ssh": "sftp", "abfss": "abfs", "az": "abfs"}  # schemes of the same storage


def resolve_place(place: str) -> str:
    """Return the one text of a place, as `parse_place` returns it: links of this machine are followed.

    >>> resolve_place("s3a://b/out/"), resolve_place("local:///"), resolve_place("/./")
    ('s3://b/out', '/', '/')
    """
    scheme, found, rest = place.partition("://")
    if not is_url(place):
        return os.path.realpath(place)
    assert found
    if is_on_disk(place):
        return os.path.realpath(Path(rest).expanduser())  # as fsspec takes it
    rest = rest.strip("/") if scheme == "memory" else rest.rstrip("/")
    return f"{_ALIASES.get(scheme, scheme)}://{rest}"


def holds_place(outer: str, inner: str) -> bool:
    """Whether the place `inner` is `outer`, or lies in it.

    >>> holds_place("s3://b/out", "s3a://b/out/x"), holds_place("s3://b/out", "s3://b/out-2"), holds_place("/a", "s3://a")
    (True, False, False)
    >>> holds_place("/a/../b", "local:///b/c"), holds_place("local:///b", "/b")
    (True, True)
    """
    above, below = resolve_place(outer), resolve_place(inner)
    return below == above or below.startswith(f"{above.rstrip('/')}/")
