"""Receipts of finished parts, and the journal that keeps them."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import RawIOBase

from pydantic import TypeAdapter, ValidationError

from mergemill.engine.checkpoint.unfinished import COMMITTED
from mergemill.engine.errors import RunError, StorageError
from mergemill.engine.storage.beneath import Beneath

Upload = tuple[int, str]  # number from 1, and ETag, of a part of a multipart upload
Copied = tuple[str, int, str, int, int]  # URL, size in bytes and stamp of a source; where in it, and how many bytes
Range = tuple[str, int, int]  # of a part of a plan: its shard, first byte, byte after the last


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
    drifts: Sequence[Sequence[float | None]] = ()  # what the guard saw of each merged or cast piece: `guard.Row`
    uploads: Sequence[Upload] = ()  # what the part consists of where it was uploaded
    copied: Sequence[Copied] = ()  # what the part was copied from, in order, where the server did that


class Journal:
    """An append-only file of receipts, one JSON object a line; lines that are torn or damaged count as none.

    A driver creates it once; it must still be there for each receipt, or nothing would tell what the output is.
    """

    def __init__(self, files: Beneath, name: str) -> None:
        self._files = files
        self._name = name
        self._followed_bytes = 0

    def create(self) -> None:
        """Make an empty one unless there is one."""
        os.close(self._files.open(self._name, os.O_WRONLY | os.O_CREAT))

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""
        yield from parse_lines(self._files.read(self._name) or b"")

    def follow(self) -> Iterator[Receipt]:
        """Yield the receipts that were written since this was last asked, whoever wrote them."""
        if self._files.find(self._name) is None:
            return
        with open(self._files.open(self._name, os.O_RDONLY), "rb") as file:
            file.seek(self._followed_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # what follows is being written
        self._followed_bytes += len(whole)
        yield from parse_lines(whole)

    def is_committed(self) -> bool:
        """Whether the merge was finished, be it that the folder was named ``local://…`` then."""
        if COMMITTED in (self._files.read(self._name) or b"").split(b"\n"):
            return True
        return self._files.find(f"{self._name.rpartition('/')[0]}/committed") is not None

    def append(self, receipt: Receipt) -> None:
        """Add a receipt."""
        self._append(json.dumps(asdict(receipt)).encode())

    def append_commit(self) -> None:
        """Note that the output is whole."""
        self._append(COMMITTED)

    def _append(self, line: bytes) -> None:
        path = self._files.place(self._name)
        if self._files.find(self._name) is None:
            raise RunError(f"{path}: is gone, while the merge ran; nothing else may write here: run the merge again")
        try:
            with open(self._files.open(self._name, os.O_RDWR | os.O_APPEND), "r+b", buffering=0) as file:
                # A torn line of a driver that was killed must not swallow this one: begin on a line of its own.
                start = b"" if _ends_whole(file) else b"\n"
                data = start + line + b"\n"
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StorageError(f"{path}: writing a receipt failed: {error.strerror}") from error


def parse_receipt(line: bytes) -> Receipt | None:
    """Return the receipt that a line of JSON is; None where it is none: another line, torn, or damaged."""
    try:
        return _RECEIPT.validate_json(line, strict=True)
    except ValidationError:
        return None


def parse_receipts(text: bytes) -> list[Receipt] | None:
    """Return the receipts of a JSON list; None where it is none."""
    try:
        return _RECEIPTS.validate_json(text, strict=True)
    except ValidationError:
        return None


def keep_planned(receipts: Iterable[Receipt], ranges: Sequence[Range]) -> dict[int, Receipt]:
    """Return the last receipt of each part by its number; `ranges` are those of a plan's parts, others are no receipts.

    >>> receipts = [Receipt(number, "a", 8, 16, "", 0, 0.0) for number in range(3)]
    >>> keep_planned(receipts, [("a", 0, 8), ("a", 8, 16)]).keys()
    dict_keys([1])
    """
    return {
        receipt.part: receipt
        for receipt in receipts
        if 0 <= receipt.part < len(ranges)
        and (receipt.shard, receipt.start_bytes, receipt.stop_bytes) == tuple(ranges[receipt.part])
    }


def _ends_whole(file: RawIOBase) -> bool:
    size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes == 0:
        return True
    file.seek(size_bytes - 1)
    return file.read(1) == b"\n"


def parse_lines(text: bytes) -> Iterator[Receipt]:
    """Yield the receipts among the lines of a journal."""
    return filter(None, map(parse_receipt, text.split(b"\n")))


_RECEIPT, _RECEIPTS = TypeAdapter(Receipt), TypeAdapter(list[Receipt])
