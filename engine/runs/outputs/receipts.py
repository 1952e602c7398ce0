"""Receipts of finished parts, and the journal that keeps them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergemill.engine.errors import StorageError

Upload = Sequence[int | str]  # number from 1, and ETag, of a part of a multipart upload
Copied = Sequence[int | str]  # URL, size in bytes and stamp of a source; where in it, and how many bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a task returns once its part is written: all that a resume needs, 1 kB or some 100 bytes a tensor."""

    part: int  # number in the plan
    shard: str
    start_bytes: int  # in the shard's file
    stop_bytes: int
    checksum: str  # xxh3_128 of the range, 32 hexadecimal digits; empty where the bytes never came here
    read_bytes: int  # read from the sources, second reads included
    seconds: float  # of the task, waiting for memory excluded
    drifts: Sequence[Sequence[float | None]] = ()  # what the guard saw of each merged piece: `guard.Row`
    uploads: Sequence[Upload] = ()  # what the part consists of where it was uploaded
    copied: Sequence[Copied] = ()  # what the part was copied from, in order, where the server did that


class Journal:
    """An append-only file of receipts, one JSON object a line; a torn last line counts as none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._followed_bytes = 0

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""
        for line in self._lines():
            if "part" in line:
                yield Receipt(**line)

    def follow(self) -> Iterator[Receipt]:
        """Yield the receipts that were written since this was last asked, whoever wrote them."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._followed_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # what follows is being written
        self._followed_bytes += len(whole)
        yield from (Receipt(**line) for line in _parse_lines(whole.decode()) if "part" in line)

    def is_committed(self) -> bool:
        """Whether the merge was finished."""
        return any(line.get("committed") for line in self._lines())

    def append(self, receipt: Receipt) -> None:
        """Add a receipt."""
        self._append(asdict(receipt))

    def append_commit(self) -> None:
        """Note that the output is whole."""
        self._append({"committed": True})

    def _append(self, line: dict[str, object]) -> None:
        try:
            # A torn line of a driver that was killed must not swallow this one: begin on a line of its own.
            start = "" if self._ends_whole() else "\n"
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(start + json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self._path}: writing a receipt failed: {error.strerror}") from error

    def _ends_whole(self) -> bool:
        if not self._path.exists() or self._path.stat().st_size == 0:
            return True
        with open(self._path, "rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self._path.exists():
            yield from _parse_lines(self._path.read_text("utf-8"))


def _parse_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
