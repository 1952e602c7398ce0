"""Parts of a shard as parts of a multipart upload: cut into chunks, several of them on their way at once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Part, Plan
from mergemill.engine.runs.outputs.receipts import Receipt, Upload
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.multipart import MOST_BYTES, MOST_PARTS, upload_part
from mergemill.engine.tensors.workspace import Arena

CHUNK_BYTES = 8 << 20  # of one upload, at least, and less than twice as much; above what S3 asks for
SLOTS = 4  # chunks of a part in memory at once: one is filled while the others are on their way
BESIDE_BYTES = SLOTS * 2 * CHUNK_BYTES  # the most memory that writing a part takes


@dataclass(frozen=True, slots=True)
class UploadTarget:
    """One part of the plan in a multipart upload."""

    url: str  # of the object
    upload: str  # its id
    first: int  # the number of the part's first chunk
    header: bytes  # of the shard, where the part is its first; else nothing
    size_bytes: int  # of the part, without the header

    @property
    def chunks(self) -> int:
        """How many uploads the part consists of."""
        return count_chunks(len(self.header) + self.size_bytes)

    @property
    def slot_bytes(self) -> int:
        """The size of the largest chunk."""
        return -(-(len(self.header) + self.size_bytes) // self.chunks)

    @property
    def beside_bytes(self) -> int:
        """The memory for the chunks that are filled or on their way."""
        return min(SLOTS, self.chunks) * self.slot_bytes

    def copy_part(self, part: Part, shard: str, workplace: Workplace) -> Receipt | None:
        """Have the server copy what lies in the same storage."""
        from mergemill.engine.runs.outputs.copies import copy_stored

        return copy_stored(part, shard, self, workplace)

    @contextmanager
    def open_part(self, part: Part, room: Arena) -> Iterator["UploadWriter"]:
        """Begin with the header; at the end nothing reads `room` any more."""
        writer = UploadWriter(self, room)
        try:
            yield writer
        finally:
            writer.close()

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """The server has listed the part's uploads as the receipt says, or the receipt would not be trusted."""
        return True


class UploadWriter:
    """Fills one chunk while others are uploaded."""

    def __init__(self, target: UploadTarget, room: Arena) -> None:
        self._target = target
        size = target.slot_bytes
        self._slots = [room[i * size : (i + 1) * size].data for i in range(len(room) // size)]
        self._coming: list[Future[str]] = []
        self._filled_bytes = 0  # of the chunk at hand
        self._sizes = cut_chunks(len(target.header) + target.size_bytes)
        self._add(memoryview(target.header))

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Add what follows; an upload that failed is told of here."""
        self._add(data.cast("B"))

    def finish(self) -> Sequence[Upload]:
        """Return number and ETag of each upload, once all are there."""
        return [(self._target.first + i, coming.result()) for i, coming in enumerate(self._coming)]

    def close(self) -> None:
        """Return once nothing reads the room any more."""
        for coming in self._coming:
            if not coming.cancel():
                coming.exception()

    def _add(self, data: memoryview) -> None:
        while len(data):
            number = len(self._coming)
            slot, size = self._slots[number % len(self._slots)], self._sizes[number]
            if self._filled_bytes == 0 and number >= len(self._slots):
                self._coming[number - len(self._slots)].result()  # then its slot is free
            here = min(size - self._filled_bytes, len(data))
            slot[self._filled_bytes : self._filled_bytes + here] = data[:here]
            self._filled_bytes += here
            data = data[here:]
            if self._filled_bytes == size:
                target = self._target
                self._coming.append(upload_part(target.url, target.upload, target.first + number, slot[:size]))
                self._filled_bytes = 0


def count_chunks(size_bytes: int) -> int:
    """Return how many uploads a part of `size_bytes` consists of.

    >>> count_chunks(100), count_chunks(15 << 20), count_chunks(128 << 20)
    (1, 1, 16)
    """
    return max(1, size_bytes // CHUNK_BYTES)


def cut_chunks(size_bytes: int) -> list[int]:
    """Return the sizes of these uploads, none of which is smaller than `CHUNK_BYTES` unless it is the only one."""
    count = count_chunks(size_bytes)
    ends = [size_bytes * i // count for i in range(count + 1)]
    return [stop - start for start, stop in pairwise(ends)]


def make_targets(plan: Plan, urls: Sequence[str], uploads: Sequence[str]) -> list[Target]:
    """Return the target of each part of the plan, from the URL and the upload's id of each shard."""
    numbers = [1] * len(plan.shards)
    targets: list[Target] = []
    for part in plan.parts:
        header = plan.shards[part.shard].header if numbers[part.shard] == 1 else b""
        target = UploadTarget(urls[part.shard], uploads[part.shard], numbers[part.shard], header, part.size_bytes)
        numbers[part.shard] += target.chunks
        targets.append(target)
    return targets


def check_limits(plan: Plan) -> None:
    """Raise `OutputError` for shards that no S3 takes."""
    for shard in plan.shards:
        parts = [part for part in plan.parts if plan.shards[part.shard] is shard]
        count = sum(count_chunks(part.size_bytes) for part in parts)
        if shard.size_bytes > MOST_BYTES or count > MOST_PARTS:
            raise OutputError(
                f"{shard.name}: {shard.size_bytes} bytes in {count} uploads; S3 takes {MOST_BYTES} bytes and "
                f"{MOST_PARTS} uploads for an object; choose a smaller --shard-size"
            )
