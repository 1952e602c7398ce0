"""Pins: which bytes a plan was made from, so that none other are ever merged in their place."""

from dataclasses import dataclass

from mergemill.engine.errors import SourceChanged


@dataclass(frozen=True, slots=True)
class Pin:
    """The identity of a stored file when the plan was made."""

    url: str  # absolute path of a local file, else its URL
    size_bytes: int
    stamp: str  # what changes when the content does: "mtime_ns:…", "etag:…", "sha256:…"


def changed(pin: Pin, now: str) -> SourceChanged:
    """Return the error for a file that is `now` something else."""
    return SourceChanged(
        f"{pin.url}: changed since the plan was made: {pin.size_bytes} bytes, {pin.stamp} then; {now} now; plan again"
    )
