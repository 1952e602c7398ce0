"""One file of the cache: a range of a remote file, with checksums of its chunks, so that parts of it can be trusted.

Format: the xxh3_128 of each `CHUNK_BYTES` of the range, 16 bytes each, then the range.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from mergemill.engine.storage import system

CHUNK_BYTES = 256 << 10  # what a checksum is of: read and checked as a whole, however little of it is wanted
_DIGEST_BYTES = 16


def file_bytes(size_bytes: int) -> int:
    """Return the size of the file of a range.

    >>> file_bytes(1), file_bytes(8 << 20)
    (17, 8389120)
    """
    return _table_bytes(size_bytes) + size_bytes


def write_entry(descriptor: int, data: memoryview) -> None:
    """Write the file of a range."""
    digests = [xxhash.xxh3_128_digest(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
    table = memoryview(b"".join(digests))
    system.write_at(descriptor, table, 0)
    system.write_at(descriptor, data, len(table))


def read_entry(path: Path, size_bytes: int, start: int, buffer: memoryview) -> bool:
    """Fill `buffer` with what begins at `start` of a range of `size_bytes`; False where its file is damaged.

    Notes that the file was used. Raises OSError where there is none.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.utime(descriptor)
        if os.fstat(descriptor).st_size != file_bytes(size_bytes):
            return False
        table = os.pread(descriptor, _table_bytes(size_bytes), 0)
        return all(
            _read_chunk(descriptor, len(table) + at, into, skip, size, table[_DIGEST_BYTES * number :])
            for number, at, size, skip, into in _cut(size_bytes, start, buffer)
        )
    finally:
        os.close(descriptor)


def _cut(size_bytes: int, start: int, buffer: memoryview) -> Iterator[tuple[int, int, int, int, memoryview]]:
    """Yield each chunk that `buffer` has a part of: number, offset and size; how much to skip of it, and the part."""
    stop = start + len(buffer)
    for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
        at = number * CHUNK_BYTES
        size = min(CHUNK_BYTES, size_bytes - at)
        skip = max(start - at, 0)
        yield number, at, size, skip, buffer[at + skip - start : min(at + size, stop) - start]


def _read_chunk(descriptor: int, at: int, into: memoryview, skip: int, size: int, digest: bytes) -> bool:
    """Read the part `into` of a chunk; False unless all of the chunk is as it was written."""
    whole = into if len(into) == size else memoryview(bytearray(size))
    done = 0
    while done < size:
        if not (got := system.read_at(descriptor, whole[done:], at + done)):
            return False
        done += got
    if xxhash.xxh3_128_digest(whole) != digest[:_DIGEST_BYTES]:
        return False
    if whole is not into:
        into[:] = whole[skip : skip + len(into)]
    return True


def _table_bytes(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES) * _DIGEST_BYTES
