"""Small objects of a storage, each read whole: what is kept beside an output to resume and verify it.

They are written whole, too, but for files that are only copied and may be larger: see `copied`.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from mergemill.engine.errors import MergemillError, StorageError
from mergemill.engine.storage.bounds import find_state_bound
from mergemill.engine.storage.copied import Copied


def check_state(data: bytes, place: str) -> bytes:
    """Return what was read of a file beside an output; `StorageError` where it is more than such a file may be."""
    if len(data) > (most := find_state_bound(place)):
        raise StorageError(f"{place}: has more than {most} bytes, as no such file of mergemill's has; remove it")
    return data


class Objects(Protocol):
    """Objects by their URLs; `S3Objects` for S3, `AnyObjects` for what fsspec knows."""

    def put(
        self, url: str, data: bytes | Copied, *, absent: bool = False, error: type[MergemillError] = StorageError
    ) -> bool:
        """Write an object; with `absent` only where there is none, and return whether `data` is there now."""

    def get(self, url: str, *, error: type[MergemillError] = StorageError) -> bytes | None:
        """Return an object; None where there is none."""

    def get_all(self, urls: Sequence[str]) -> list[bytes | None]:
        """Return objects, fetched at the same time where that is possible."""

    def get_age(self, url: str) -> float | None:
        """Return how many seconds ago an object was written, by the clock of the server; None where there is none."""

    def delete(self, urls: Sequence[str]) -> None:
        """Remove objects, in their order; what is not there is no error."""

    def list_objects(self, url: str, *, error: type[MergemillError] = StorageError) -> Mapping[str, int]:
        """Return the sizes in bytes of all objects below a prefix, by their names after it."""
