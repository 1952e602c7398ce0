"""The checksum of what was written, read again."""

from collections.abc import Iterable, Sequence

import xxhash

from mergemill.engine.runs.outputs.receipts import Copied
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import Pin, read_into

BUFFER_BYTES = 8 << 20


def checksum_range(pin: Pin, start_bytes: int, stop_bytes: int, workplace: Workplace) -> str:
    """Return the xxh3_128 of a range of a file, or of as much of it as there is."""
    return checksum_ranges([(pin, start_bytes, min(stop_bytes, pin.size_bytes))], workplace)


def checksum_ranges(ranges: Iterable[tuple[Pin, int, int]], workplace: Workplace) -> str:
    """Return the xxh3_128 of ranges (file, first byte, byte after the last), one after the other."""
    checksum = xxhash.xxh3_128()
    buffer_bytes = min(BUFFER_BYTES, workplace.share_bytes)
    with workplace.lend(buffer_bytes) as arena:
        for pin, start_bytes, stop_bytes in ranges:
            for start in range(start_bytes, stop_bytes, buffer_bytes):
                workplace.check_going()
                buffer = arena.data[: min(buffer_bytes, stop_bytes - start)]
                read_into(pin, start, buffer, workplace.storage)
                checksum.update(buffer)
    return checksum.hexdigest()


def checksum_copied(copied: Sequence[Copied], workplace: Workplace) -> str:
    """Return the checksum of what a part was copied from; `SourceChanged` where that is not what it was."""
    ranges = [(Pin(str(url), int(size), str(stamp)), int(at), int(at) + int(n)) for url, size, stamp, at, n in copied]
    return checksum_ranges(ranges, workplace)
