"""Where a part is written, as a value that travels to the worker that merges it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from mergemill.engine.errors import SourceChanged
from mergemill.engine.plan.values import Part
from mergemill.engine.runs.outputs.checksum import checksum_range
from mergemill.engine.runs.outputs.receipts import Receipt, Upload
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.positioned import PositionedWriter, open_positioned
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.tensors.workspace import Arena


class PartWriter(Protocol):
    """Takes the bytes of one part."""

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Write `data` at `offset_bytes` of the shard; the bytes of a part come in order, without holes."""

    def finish(self) -> Sequence[Upload]:
        """Return once the part is written: the uploads that it consists of, if it was uploaded."""


class PartTarget(Protocol):
    """The place of one part, which is written by a task of its own."""

    @property
    def beside_bytes(self) -> int:
        """The memory that writing a part takes."""

    def copy_part(self, part: Part, shard: str, workplace: Workplace) -> Receipt | None:
        """Have the storage copy a part that is only copied, and return its receipt; None where it must be merged."""

    def open_part(self, part: Part, room: Arena) -> AbstractContextManager[PartWriter]:
        """Open the part to be written, with `beside_bytes` of room for that."""

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """Whether what is written of the part is what its receipt says."""


class ShardWriter(Protocol):
    """Takes the bytes of a shard from its first to its last."""

    def write(self, data: memoryview) -> None:
        """Add what follows."""

    def finish(self) -> None:
        """Return once all that was added is written."""

    def deliver(self, check_going: Callable[[], None]) -> Sequence[Upload]:
        """Bring the finished shard where it belongs; returns what it is there.

        It takes no more memory than `beside_bytes`; `check_going` raises where the worker is to end.
        """


@runtime_checkable
class ShardTarget(Protocol):
    """The place of a shard, which one task writes from its first part to its last."""

    @property
    def beside_bytes(self) -> int:
        """The memory that writing a shard takes, which the writer allocates itself."""

    def open_shard(self) -> AbstractContextManager[ShardWriter]:
        """Begin the shard with its header; what is left of it when the block ends early is no shard."""

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """Whether what is written of the part is what its receipt says."""


Target = PartTarget | ShardTarget


@dataclass(frozen=True, slots=True)
class FileTarget:
    """A shard on a disk that all workers see."""

    path: Path
    beside_bytes = 0

    def copy_part(self, part: Part, shard: str, workplace: Workplace) -> Receipt | None:
        """Never: the bytes go through this process, and are checksummed on the way."""
        return None

    @contextmanager
    def open_part(self, part: Part, room: Arena) -> Iterator["FileWriter"]:
        """Open the file, which is there."""
        with open_positioned(self.path) as writer:
            yield FileWriter(writer, part)

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """Read the part's range again; not while others write into the file, as a killed driver's tasks may."""
        try:
            return receipt.checksum == checksum_range(
                pin_file(self.path, workplace.storage), part.start_bytes, part.stop_bytes, workplace
            )
        except SourceChanged:
            return False


class FileWriter:
    """Writes a part into an open file."""

    def __init__(self, writer: PositionedWriter, part: Part) -> None:
        self._writer = writer
        self._part = part
        self.write = writer.write

    def finish(self) -> Sequence[Upload]:
        """Ask the kernel to begin writing the part to the disk."""
        self._writer.start_writeback(self._part.start_bytes, self._part.size_bytes)
        return ()
