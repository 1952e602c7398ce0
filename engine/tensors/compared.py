"""Two tensors, or two and what both were made from, compared in one additive pass.

Nothing is written: what the one round gathers says how far the tensors lie apart. Each *side* is a difference: without
a base the second tensor less the first; with one, each of both less the base. Sums are exact, so no cut shows in them.
Of matrices a sketch is kept, ``K`` random sums of each side's rows with signs from a hash of the row's number, from
which follows the effective rank ``(Σσ²)² / Σσ⁴`` of its singular values σ: products of two different sums are unbiased
for both. For a matrix of rank 1 it is 1 exactly; for one of high rank it is some 13 % off (two standard errors of K
sums are 26 %). The sketch is added in float64, in the order of the pieces.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors.dtypes import is_mergeable, item_bytes
from mergemill.engine.tensors.exact import Extremes, find_extremes, sum_products
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.kernels import Additive, Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import ExpressionRounds, Ready, Round, join_rounds
from mergemill.engine.tensors.slabs import Span, row_block
from mergemill.engine.tensors.workspace import Workspace, aligned

K = 16  # sums of a sketch
LEAST_EXPONENT, BINS = -48, 64  # of the histogram: powers of 2 of the magnitudes, those beyond in the last on each side
SAMPLED = 8  # one element in so many goes into the histogram
MOST_COLUMNS = 1 << 17  # of a matrix that is sketched

Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Added(Additive):
    """Floats that are added element by element."""

    values: Floats

    def __add__(self, other: Any) -> Any:
        return Added(self.values + other.values)


@dataclass(frozen=True, slots=True)
class Compared(Expression):
    """Two tensors of one shape, and what they are compared with: a base, or none."""

    inputs: tuple[Expression, ...]  # first, second, and the base where there is one
    by_row: bool  # whether each row's own change is asked for, as of a router's experts

    @property
    def shape(self) -> tuple[int, ...]:
        """That of all."""
        return self.inputs[0].shape

    @property
    def dtype(self) -> str:
        """The first one's."""
        return self.inputs[0].dtype

    @property
    def columns(self) -> int:
        """Of the matrix as which it is seen, of all rows one below the other."""
        return self.shape[-1] if len(self.shape) > 1 else max(1, self.size)

    @property
    def is_sketched(self) -> bool:
        """Whether it is a matrix."""
        return len(self.shape) > 1 and 1 < self.columns <= MOST_COLUMNS

    @property
    def is_number(self) -> bool:
        """Whether differences mean something; else bytes alone are compared."""
        return all(is_mergeable(each.dtype) for each in self.inputs)

    @property
    def own_block(self) -> int:
        """Whole rows."""
        return self.size if self.by_row else row_block(self.shape)

    @property
    def block(self) -> int:
        """Whole rows, and whatever the inputs need; of what is there, any will do."""
        others = [each.block for each in self.inputs if not isinstance(each, Leaf)]
        return max(1, min(math.lcm(self.own_block, *others), self.size))

    def count_rounds(self) -> tuple[int, int]:
        """The inputs' rounds, and one."""
        usual, most = Expression.count_rounds(self)
        return usual + 1, most + 1

    def rounds(self) -> ExpressionRounds:
        """The inputs' rounds, and the one that compares."""
        inputs = yield from join_rounds([each.rounds() for each in self.inputs])
        yield Round(_Take(self, inputs))
        return inputs[0]

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what all read."""
        for each in self.inputs:
            yield from each.reads(span)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """All inputs as float32, as they are stored, and what is calculated beside them."""
        inputs = sum(each.slab_bytes(elements, "F32") + each.slab_bytes(elements, each.dtype) for each in self.inputs)
        return inputs + 6 * aligned(elements * item_bytes("F64")) + 2 * 8 * K * self.columns

    def suits_device(self, device: str) -> bool:
        """It is done on the CPU."""
        return False

    def makes_natively(self, dtype: str) -> bool:
        """It does not: torch does."""
        return False

    def describe(self) -> Mapping[str, Any]:
        """What is compared."""
        return {"compared": [each.describe() for each in self.inputs], "by_row": self.by_row}


@dataclass(frozen=True, slots=True)
class SideTotals:
    """What was gathered of one difference."""

    squares: Any  # ExactSum: of the difference
    own: Any  # ExactSum: of what it is taken from
    zeros: int  # elements that are the same
    unlike: int  # elements whose bytes are not
    extremes: Extremes  # of the difference
    histogram: Counts
    sketch: Added  # [K, columns]; [0, 0] where it is no matrix
    rows: Added  # [2, rows]: squares of the difference and of what it is taken from; [2, 0] where not asked for


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was gathered of a tensor."""

    sides: tuple[SideTotals, ...]  # one, or with a base two
    squares: tuple[Any, Any, Any]  # ExactSum: of the pair (the tensors, or the differences) and of their product
    agreeing: int  # elements of the pair that have one sign, of those that are not 0
    signed: int  # those
    apart: int  # elements of first and second whose bytes are not the same


def read_total(total: Partial) -> Gathered:
    """Return the total of the round."""
    sides, pair, counts = total
    return Gathered(tuple(SideTotals(*side) for side in sides), pair, *counts)


@dataclass(frozen=True, slots=True)
class _Take:
    """Gathers from a slab."""

    compared: Compared
    inputs: tuple[Ready, ...]

    def __call__(self, span: Span, work: Workspace, total: Partial) -> Partial:
        compared, block = self.compared, self.compared.block
        pairs = ((0, 1), (0, 2), (1, 2)) if len(self.inputs) == 3 else ((0, 1), (0, 1))
        apart, *unlike = (self._count_unlike(*pair, span, work) for pair in pairs)
        if not compared.is_number:
            return add_partials(total, (tuple(_no_side(each, span.size) for each in unlike), (), (0, 0, apart)))
        first, second, *base = (each.slab(span, work, "F32") for each in self.inputs)
        if base:
            pair = first - base[0], second - base[0]
            sides = [(pair[0], base[0]), (pair[1], base[0])]
        else:
            pair, sides = (first, second), [(second - first, first)]
        own = sum_products(sides[0][1], sides[0][1], block)  # both sides are taken from the same
        found = tuple(self._gather(*side, own, each, span) for side, each in zip(sides, unlike, strict=True))
        squares = found[0][0] if base else own, found[1][0] if base else sum_products(pair[1], pair[1], block)
        products = *squares, sum_products(*pair, block)
        return add_partials(total, (found, products, (*_count_signs(*pair), apart)))

    def _count_unlike(self, one: int, other: int, span: Span, work: Workspace) -> int:
        """Count the elements that are not stored as the same bytes; all where they are of two dtypes."""
        left, right = self.compared.inputs[one].dtype, self.compared.inputs[other].dtype
        if left != right:
            return span.size
        a, b = (self.inputs[each].encode(span, work, left) for each in (one, other))
        if np.array_equal(a, b):
            return 0
        word = f"u{item_bytes(left)}"
        return int(np.count_nonzero(a.view(word) != b.view(word)))

    def _gather(self, delta: Tensor, less: Tensor, own: Any, unlike: int, span: Span) -> Partial:
        compared, columns = self.compared, self.compared.columns
        sketch, rows = np.zeros((0, 0)), np.zeros((2, 0))
        if compared.is_sketched:
            matrix = delta.view(-1, columns)
            sketch = (_make_signs(span.start // columns, len(matrix)) @ matrix).numpy().astype(np.float64)
        if compared.by_row:
            rows = np.stack([(each.view(-1, columns).double() ** 2).sum(1).numpy() for each in (delta, less)])
        return (
            sum_products(delta, delta, compared.block),
            own,
            int(np.count_nonzero(delta.numpy() == 0)),
            unlike,
            find_extremes(delta),
            _count_exponents(delta[-span.start % SAMPLED :: SAMPLED]),
            Added(sketch),
            Added(rows),
        )


def _no_side(unlike: int, size: int) -> Partial:
    """Return what is known of what are no numbers."""
    return (
        (),
        (),
        size - unlike,
        unlike,
        Extremes(),
        np.zeros(BINS, np.int64),
        Added(np.zeros((0, 0))),
        Added(np.zeros((2, 0))),
    )


def _count_signs(one: Tensor, other: Tensor) -> tuple[int, int]:
    """Return how many elements have one sign in both tensors, of how many that are numbers other than 0 in both."""
    x, y = one.numpy(), other.numpy()
    signed = np.abs(x) > 0
    signed &= np.abs(y) > 0
    opposite = (x.view(np.int32) ^ y.view(np.int32)) < 0
    opposite &= signed
    count = int(np.count_nonzero(signed))
    return count - int(np.count_nonzero(opposite)), count


def _count_exponents(values: Tensor) -> Counts:
    """Return how many magnitudes there are of each power of 2, without zeros and what is not finite."""
    bits = values.numpy().view(np.int32) & 0x7FFFFFFF
    fields = np.bincount(bits >> 23, minlength=256)  # of the exponent: 0 of denormals too, 255 of what is not finite
    fields[0] -= len(bits) - np.count_nonzero(bits)
    found: Counts = np.zeros(BINS, np.int64)
    np.add.at(found, np.clip(np.arange(255) - 127 - LEAST_EXPONENT, 0, BINS - 1), fields[:255])
    return found


def _make_signs(first: int, count: int) -> Tensor:
    """Return K random signs for each of `count` rows, ``[K, count]``: splitmix64 of the row's number."""
    with np.errstate(over="ignore"):
        x = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = (x ^ (x >> np.uint64(31)))[None] >> np.arange(K, dtype=np.uint64)[:, None] & np.uint64(1)
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def find_effective_rank(sketch: Floats) -> float:
    """Return the effective rank from a sketch ``[K, columns]``; 0 where all of it is 0.

    >>> find_effective_rank(np.outer([1.0, -1.0, 1.0], [3.0, 4.0]))
    1.0
    """
    gram = sketch @ sketch.T
    norms = np.diag(gram)
    apart = ~np.eye(len(gram), dtype=bool)
    products = float((gram[apart] ** 2).sum())
    return float(np.outer(norms, norms)[apart].sum() / products) if products > 0 else 0.0
