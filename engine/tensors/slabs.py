"""Cutting flattened tensors into slabs.

A tensor is seen flattened, as elements 0…n-1. It is cut at multiples of its block only, so that whatever is computed
a block at a time (sums, ties) comes out the same however the tensor is cut into slabs and parts. A block is `BLOCK`
elements; as many whole rows as fit into that, for methods that need whole rows; or the whole tensor.
A slab is what one step of a kernel works on: four blocks, a compromise between the L2 cache, which would have two, and
threads, which hand the interpreter over less often the more there is to do in a step.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BLOCK = 1 << 16  # elements
SLAB = 4 * BLOCK  # elements
STORED_SLABS = 4  # slabs that native loops work on at once: they decode nothing to memory, and Python has less to do


class Span(NamedTuple):
    """Elements `start` to `stop` (excluded) of a flattened tensor."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start


def row_block(shape: Sequence[int]) -> int:
    """Return the elements of as many whole rows (last axis) as fit into `BLOCK`, or of one row.

    >>> row_block((100, 4096)), row_block((3, 40_000)), row_block((3, 2, 100_000)), row_block((7,))
    (65536, 40000, 100000, 7)
    """
    row = max(1, shape[-1] if shape else 1)
    return min(max(1, BLOCK // row) * row, max(1, math.prod(shape)))


def slab_step(slab: int, block: int) -> int:
    """Return the elements of a slab of about `slab` elements that ends at a multiple of `block`.

    >>> slab_step(10, 4), slab_step(10, 25)
    (8, 25)
    """
    return max(1, slab // block) * block


def iter_slabs(span: Span, slab: int = SLAB, block: int = BLOCK) -> Iterator[Span]:
    """Yield the slabs of `span`, which begins at a multiple of `block`.

    >>> [(s.start, s.stop) for s in iter_slabs(Span(0, 5), slab=2, block=1)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = slab_step(slab, block)
    for start in range(span.start, span.stop, step):
        yield Span(start, min(start + step, span.stop))


def cut_evenly(size: int, most: int, block: int = BLOCK) -> list[Span]:
    """Return the fewest spans of at most about `most` elements that cover `size`, cut at multiples of `block`.

    >>> [s.size for s in cut_evenly(10 * BLOCK + 7, 4 * BLOCK)]
    [262144, 262144, 131079]
    """
    step = slab_step(most, block)
    pieces = max(1, -(-size // step))
    blocks = -(-size // block)
    step = max(1, -(-blocks // pieces)) * block
    return [Span(start, min(start + step, size)) for start in range(0, size, step)] or [Span(0, 0)]
