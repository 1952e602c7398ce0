"""Cutting flattened tensors into slabs.

A tensor is seen flattened, as elements 0…n-1. It is cut at multiples of `BLOCK` only, so that whatever is computed
a block at a time (sums, random numbers, ties) comes out the same however the tensor is cut into slabs and parts.
A slab is what one step of a kernel works on: four blocks, a compromise between the L2 cache, which would have two, and
threads, which hand the interpreter over less often the more there is to do in a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 1 << 16  # elements
SLAB = 4 * BLOCK  # elements


@dataclass(frozen=True, slots=True)
class Span:
    """Elements `start` to `stop` (excluded) of a flattened tensor."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start


def iter_slabs(span: Span, slab: int = SLAB) -> Iterator[Span]:
    """Yield the slabs of `span`, which begins at a multiple of `BLOCK`.

    >>> [(s.start, s.stop) for s in iter_slabs(Span(0, 5), slab=2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(span.start, span.stop, slab):
        yield Span(start, min(start + slab, span.stop))


def cut_evenly(size: int, most: int) -> list[Span]:
    """Return the fewest spans of at most about `most` elements that cover `size`, cut at multiples of `BLOCK`.

    >>> [s.size for s in cut_evenly(10 * BLOCK + 7, 4 * BLOCK)]
    [262144, 262144, 131079]
    """
    step = max(BLOCK, most // BLOCK * BLOCK)
    pieces = max(1, -(-size // step))
    blocks = -(-size // BLOCK)
    step = max(1, -(-blocks // pieces)) * BLOCK
    return [Span(start, min(start + step, size)) for start in range(0, size, step)] or [Span(0, 0)]
