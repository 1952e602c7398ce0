"""Parts of a shard as parts of a multipart upload: cut into chunks, several of them on their way at once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Part, Plan
from mergemill.engine.runs.outputs.chunks import SLOTS, PartUpload, count_chunks
from mergemill.engine.runs.outputs.copies import copy_stored
from mergemill.engine.runs.outputs.receipts import Receipt, Upload
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.multipart import MOST_BYTES, MOST_PARTS, S3Objects
from mergemill.engine.tensors.workspace import Arena


@dataclass(frozen=True, slots=True)
class UploadTarget:
    """One part of the plan in a multipart upload."""

    to: PartUpload

    @property
    def beside_bytes(self) -> int:
        """The memory for the chunks that are filled or on their way."""
        return min(SLOTS, self.to.count) * self.to.slot_bytes

    def copy_part(self, part: Part, shard: str, workplace: Workplace) -> Receipt | None:
        """Have the server copy what lies in the same storage."""
        return copy_stored(part, shard, self.to, workplace)

    @contextmanager
    def open_part(self, part: Part, room: Arena) -> Iterator["UploadWriter"]:
        """Begin with the header; at the end nothing reads `room` any more."""
        writer = UploadWriter(self.to, room)
        try:
            yield writer
        finally:
            writer.close()

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """The server has listed the part's uploads as the receipt says, or the receipt would not be trusted."""
        return True


class UploadWriter:
    """Fills one chunk while others are uploaded."""

    def __init__(self, to: PartUpload, room: Arena) -> None:
        self._to = to
        size = to.slot_bytes
        self._slots = [room[i * size : (i + 1) * size].data for i in range(len(room) // size)]
        self._coming: list[Future[str]] = []
        self._filled_bytes = 0  # of the chunk at hand
        self._sizes = to.sizes
        self._add(memoryview(to.header))

    def write(self, offset_bytes: int, data: memoryview) -> None:
        """Add what follows; an upload that failed is told of here."""
        self._add(data.cast("B"))

    def finish(self) -> Sequence[Upload]:
        """Return number and ETag of each upload, once all are there."""
        return [(self._to.first + i, coming.result()) for i, coming in enumerate(self._coming)]

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
                self._coming.append(self._to.send(number, slot[:size]))
                self._filled_bytes = 0


def make_targets(plan: Plan, s3: S3Objects, urls: Sequence[str], uploads: Sequence[str]) -> list[Target]:
    """Return the target of each part of the plan, from the URL and the upload's id of each shard."""
    numbers = [1] * len(plan.shards)
    targets: list[Target] = []
    for part in plan.parts:
        header = plan.shards[part.shard].header if numbers[part.shard] == 1 else b""
        number, upload = numbers[part.shard], uploads[part.shard]
        to = PartUpload(s3, urls[part.shard], upload, number, header, part.size_bytes)
        numbers[part.shard] += to.count
        targets.append(UploadTarget(to))
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
