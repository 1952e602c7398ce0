"""A part of a shard as chunks, each a part of a multipart upload."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise

from mergemill.engine.storage.multipart import S3Objects
from mergemill.engine.storage.pin import Pin

CHUNK_BYTES = 8 << 20  # of one upload, at least, and less than twice as much; above what S3 asks for
SLOTS = 4  # chunks of a part in memory at once: one is filled while the others are on their way
BESIDE_BYTES = SLOTS * 2 * CHUNK_BYTES  # the most memory that writing a part takes


@dataclass(frozen=True, slots=True)
class PartUpload:
    """Where the chunks of one part go."""

    s3: S3Objects
    url: str  # of the object
    upload: str  # its id
    first: int  # the number of the part's first chunk
    header: bytes  # of the shard, where the part is its first; else nothing
    size_bytes: int  # of the part, without the header

    @property
    def count(self) -> int:
        """How many uploads the part consists of."""
        return count_chunks(len(self.header) + self.size_bytes)

    @property
    def slot_bytes(self) -> int:
        """The size of the largest chunk."""
        return -(-(len(self.header) + self.size_bytes) // self.count)

    @property
    def sizes(self) -> list[int]:
        """The sizes of the chunks."""
        return cut_chunks(len(self.header) + self.size_bytes)

    def iter_chunks(self) -> Iterator[tuple[int, int]]:
        """Yield where each chunk begins and ends, in header and part."""
        start = 0
        for size in self.sizes:
            yield start, start + size
            start += size

    def send(self, chunk: int, data: memoryview) -> "Future[str]":
        """Begin to upload a chunk, the first being 0; gives its ETag, and until then `data` is left alone."""
        return self.s3.upload_part(self.url, self.upload, self.first + chunk, data)

    def copy(self, chunk: int, source: Pin, offset_bytes: int, size_bytes: int) -> "Future[str]":
        """Begin to have the server copy a range of another object into a chunk; gives its ETag."""
        return self.s3.copy_part(self.url, self.upload, self.first + chunk, source, offset_bytes, size_bytes)


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
