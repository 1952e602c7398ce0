"""Small notes beside an output, below ``.mergemill/``: by them its driver and commands on other machines meet."""

import math
import time
from typing import Protocol

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.storage.beneath import Beneath
from mergemill.engine.storage.objects import Objects
from mergemill.engine.storage.ranges import join


class Notes(Protocol):
    """Notes by their names. Nothing of a merge depends on one, so none is synced to a disk."""

    def read(self, name: str) -> bytes | None:
        """Return a note; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write a note, or replace it; it is there whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a note; none is no error."""

    def get_age(self, name: str) -> float | None:
        """Return how many seconds ago a note was written; infinity where there is none, None where nobody can say."""


class FileNotes:
    """Notes in a folder, which is there."""

    def __init__(self, files: Beneath, folder: str) -> None:
        self._files = files
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        """Return a note; None where there is none."""
        return self._files.read(join(self._folder, name))

    def write(self, name: str, data: bytes) -> None:
        """Write a note beside its place, then rename it."""
        self._files.write(join(self._folder, name), data, beside=self._folder, synced=False)

    def remove(self, name: str) -> None:
        """Remove a note; none is no error."""
        self._files.remove(join(self._folder, name))

    def get_age(self, name: str) -> float | None:
        """Return how many seconds ago a note was written, by this machine's clock."""
        try:
            found = self._files.find(join(self._folder, name))
        except (StorageError, OutputError):
            return None
        return math.inf if found is None else max(0.0, time.time() - found.st_mtime)


class ObjectNotes:
    """Notes as objects below a URL."""

    def __init__(self, objects: Objects, url: str) -> None:
        self._objects = objects
        self._url = url

    def read(self, name: str) -> bytes | None:
        """Return a note; None where there is none."""
        return self._objects.get(join(self._url, name))

    def write(self, name: str, data: bytes) -> None:
        """Write a note, or replace it."""
        self._objects.put(join(self._url, name), data)

    def remove(self, name: str) -> None:
        """Remove a note; none is no error."""
        self._objects.delete([join(self._url, name)])

    def get_age(self, name: str) -> float | None:
        """Return how many seconds ago a note was written, by the clock of the server."""
        try:
            age_s = self._objects.get_age(join(self._url, name))
        except (StorageError, OutputError):  # some storage tells the time only to who may write, or to nobody
            return None
        return math.inf if age_s is None else max(0.0, age_s)
