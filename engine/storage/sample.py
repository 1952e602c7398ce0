"""A checksum of a file's head, its tail and some of what is between: for storage that says nothing better of a file.

It finds another model of the same size, and not a change between the blocks that it looks at.
"""

import hashlib
from collections.abc import Callable
from itertools import pairwise

BLOCK_BYTES = 32 << 10
BLOCKS = 5


def make_sample(size_bytes: int, read: Callable[[int, int], bytes]) -> str:
    """Return the field of a stamp for a file of `size_bytes`, of which `read` returns the bytes of a range."""
    digest = hashlib.sha256()
    for start, stop in list_blocks(size_bytes):
        digest.update(read(start, stop))
    return f"sample:{digest.hexdigest()[:32]}"


def list_blocks(size_bytes: int) -> list[tuple[int, int]]:
    """Return where the blocks that are looked at begin and end: of a small file one that is all of it.

    >>> list_blocks(0), list_blocks(163_840), list_blocks(1 << 30)[-1]
    ([], [(0, 163840)], (1073709056, 1073741824))
    """
    if size_bytes <= BLOCKS * BLOCK_BYTES:
        return [(0, size_bytes)] if size_bytes else []
    starts = [(size_bytes - BLOCK_BYTES) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    assert all(after - before >= BLOCK_BYTES for before, after in pairwise(starts))
    return [(start, start + BLOCK_BYTES) for start in starts]


def is_sampled(stamp: str) -> bool:
    """Whether a stamp holds such a checksum, which no answer of a store is compared with.

    >>> is_sampled("created:1 sample:00"), is_sampled('etag:"sample:"')
    (True, False)
    """
    return stamp.rpartition(" ")[2].startswith("sample:")
