"""Parts that are copied as they are within one S3: the server copies them, and no byte of them comes here.

What is copied so has no checksum; its receipt says where it is from, and verifying compares it with that.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergemill.engine.plan.values import Part
from mergemill.engine.runs.outputs.chunks import PartUpload
from mergemill.engine.runs.outputs.receipts import Copied, Receipt
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.multipart import LEAST_BYTES
from mergemill.engine.storage.ranges import Pin, read_into
from mergemill.engine.storage.store import Storage
from mergemill.engine.tensors.workspace import aligned


@dataclass(frozen=True, slots=True)
class CopiedStretch:
    """Bytes of a part that lie in a source as they are, one after the other."""

    start_bytes: int  # in what is uploaded for the part: its header, if it has one, and its data
    size_bytes: int
    pin: Pin
    offset_bytes: int  # in the source

    def to_receipt(self) -> Copied:
        """Return the stretch as a receipt has it."""
        return self.pin.url, self.pin.size_bytes, self.pin.stamp, self.offset_bytes, self.size_bytes


def copy_stored(part: Part, shard: str, to: PartUpload, workplace: Workplace) -> Receipt | None:
    """Copy a part whose bytes lie in sources of the same store; None where it must be merged, or little would gain."""
    stretches = find_stretches(part, len(to.header))
    if stretches is None or all(find_source(stretches, *chunk) is None for chunk in to.iter_chunks()):
        return None
    started = time.perf_counter()
    read_bytes = 0
    with workplace.lend(aligned(to.slot_bytes)) as arena:
        coming = {}
        for number, (start, stop) in enumerate(to.iter_chunks()):
            workplace.check_going()
            source = find_source(stretches, start, stop)
            if source is not None:
                coming[number] = to.copy(number, *source, stop - start)
            else:
                read_bytes += _fill(arena.data[: stop - start], start, to.header, stretches, workplace.storage)
                coming[number] = to.send(number, arena.data[: stop - start])
                coming[number].result()  # then the arena is free again
        uploads = tuple((to.first + number, etag.result()) for number, etag in coming.items())
    copied = tuple(each.to_receipt() for each in stretches)
    seconds = round(time.perf_counter() - started, 6)
    return Receipt(part.number, shard, part.start_bytes, part.stop_bytes, "", read_bytes, seconds, (), uploads, copied)


def find_stretches(part: Part, header_bytes: int) -> list[CopiedStretch] | None:
    """Return where the part's bytes lie in S3, as few stretches as can be; None where they do not."""
    found: list[CopiedStretch] = []
    for piece in part.pieces:
        read = piece.tensor.expression.find_read(piece.span, piece.tensor.dtype)
        if read is None or not read.pin.url.startswith("s3://"):
            return None
        start = header_bytes + piece.offset_bytes - part.start_bytes
        found.append(CopiedStretch(start, read.size_bytes, read.pin, read.offset_bytes))
    return list(_join(found))


def find_source(stretches: Sequence[CopiedStretch], start: int, stop: int) -> tuple[Pin, int] | None:
    """Return the source that holds all bytes of a chunk, and where; None where several do, or it is too small."""
    for stretch in stretches:
        at = start - stretch.start_bytes
        if at >= 0 and at + (stop - start) <= stretch.size_bytes and stop - start >= LEAST_BYTES:
            return stretch.pin, stretch.offset_bytes + at
    return None


def _join(stretches: Sequence[CopiedStretch]) -> Iterator[CopiedStretch]:
    held = stretches[0]
    for each in stretches[1:]:
        if each.pin == held.pin and each.offset_bytes == held.offset_bytes + held.size_bytes:
            held = CopiedStretch(held.start_bytes, held.size_bytes + each.size_bytes, held.pin, held.offset_bytes)
        else:
            yield held
            held = each
    yield held


def _fill(chunk: memoryview, start: int, header: bytes, stretches: Sequence[CopiedStretch], storage: Storage) -> int:
    """Put the bytes of a chunk that begins at `start` into it; returns what was read for it."""
    own, stop = header[start : start + len(chunk)], start + len(chunk)
    chunk[: len(own)] = own
    read_bytes = 0
    for stretch in stretches:
        first, last = max(start, stretch.start_bytes), min(stop, stretch.start_bytes + stretch.size_bytes)
        if first < last:
            offset_bytes = stretch.offset_bytes + first - stretch.start_bytes
            read_into(stretch.pin, offset_bytes, chunk[first - start : last - start], storage)
            read_bytes += last - first
    return read_bytes
