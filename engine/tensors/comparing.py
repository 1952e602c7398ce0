"""What is gathered of one slab of two tensors, or of two and their base: by `compared.c`, or by NumPy.

Both give the same bits, but for sums of rows and sketches, which NumPy adds in another order (and native loops in
float32, where only their squares are asked for). A difference that leaves float32, as of 3e38 and -3e38, is taken in
float64; its sketch is not finite, and its effective rank not known. A sum of squares or
products goes over 32 lanes within each `BLOCK` elements, row after row, then over the lanes; those of blocks are added
exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors.exact import Extremes, count_cuts, sum_lanes
from mergemill.engine.tensors.kernels import Additive, Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.sketch import SKETCHED, Singles, make_signs
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.stored import StoredSlab
from mergemill.engine.tensors.workspace import Arena, Workspace

LEAST_EXPONENT, BINS = -48, 64  # of the histogram: powers of 2 of the magnitudes, those beyond in the last on each side
SAMPLED = 8  # one element in so many goes into the histogram
FIELDS = 256  # of a float32's exponent
# The counts, as compared.c has them; of each side, but for the signs, and for the pairs of which bytes are compared.
# The largest is a float64's bits.
ZEROS, LARGEST, SIGNED, OPPOSITE, UNLIKE, EXPONENTS = 0, 2, 4, 5, 6, 9

Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Added(Additive):
    """Floats that are added element by element."""

    values: np.ndarray[Any, np.dtype[Any]]

    def __add__(self, other: Any) -> Any:
        return Added(self.values + other.values)


@dataclass(frozen=True, slots=True)
class SlabAsked:
    """What is asked of a slab."""

    span: Span
    block: int
    columns: int  # of the rows; 0 where nothing is asked of rows
    by_row: bool  # whether each row's squares are
    sketched: bool

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.span.size // self.columns if self.columns else 0


@dataclass(frozen=True, slots=True)
class SideTotals:
    """What was gathered of one difference."""

    squares: float  # of the difference
    own: float  # of what it is taken from
    fourths: float  # of the rows of the difference, the squares of their squares
    zeros: int  # elements that are the same
    unlike: int  # elements whose bytes are not
    largest: float  # magnitude of the difference
    histogram: Counts
    sketch: Singles  # [SKETCHED, columns]; [SKETCHED, 0] where it is no matrix
    rows: Floats  # [2, rows]: squares of the difference and of what it is taken from; [2, 0] where not asked for


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was gathered of a tensor."""

    sides: tuple[SideTotals, ...]  # one, or with a base two; none where it holds no numbers
    squares: tuple[float, float, float]  # of both of the pair (the tensors, or the differences) and of their product
    agreeing: int  # elements of the pair that have one sign, of those that are not 0
    signed: int  # those
    apart: int  # elements of first and second whose bytes are not the same


def compare_stored(
    slabs: Sequence[tuple[Arena, str]],
    asked: SlabAsked,
    alike: Sequence[bool],
    unlike: Sequence[int],
    work: Workspace,
    total: Partial,
) -> Partial:
    """Return the total with a slab of each tensor, given as native loops take it.

    alike: of which pairs bytes are to be compared. unlike: how many differ, of the others. The sketch of the total is
    overwritten.
    """
    first, second, *base = slabs
    arrays, dtypes = zip(*base, first, second, strict=True)
    place = Place("", (asked.span.stop,), 0, (0, 1), asked.span.start, asked.block)
    slab = StoredSlab(arrays, dtypes, bool(base), (False, False), (), place, asked.span.size, work)
    counts, squares, sketch = _make_room(asked, total)
    fourths = np.zeros((2, -(-asked.span.size // asked.block)))
    sums = slab.compare(
        sum(1 << i for i, each in enumerate(alike) if each), counts, asked.columns, fourths, squares, sketch
    )
    return _add(sums, fourths, counts, squares, sketch, unlike, total)


def compare_slabs(slabs: Sequence[Tensor], asked: SlabAsked, unlike: Sequence[int], total: Partial) -> Partial:
    """Return the total with a slab of each tensor, given as float32; without any where they hold no numbers."""
    counts, squares, sketch = _make_room(asked, total)
    fourths = np.zeros((2, 1))
    if not slabs:
        return _add(np.zeros((4, 0)), fourths, counts, squares, sketch, unlike, total)
    with np.errstate(all="ignore"):
        first, second, *base = (each.numpy() for each in slabs)
        x, y = (first - base[0], second - base[0]) if base else (first, second)
        wide = [_differ(first, base[0]), _differ(second, base[0]), base[0].astype(np.float64)] if base else []
        wide = wide or [first.astype(np.float64), second.astype(np.float64), _differ(second, first)]
        sides = list(zip([x, y], wide[:2], strict=True)) if base else [(second - first, wide[2])]
        for i, (side, exact) in enumerate(sides):
            magnitudes = side.view(np.int32) & 0x7FFFFFFF
            counts[ZEROS + i] = len(side) - np.count_nonzero(magnitudes)
            counts[LARGEST + i] = np.abs(exact).view(np.int64).max(initial=0)
            sampled = slice(-asked.span.start % SAMPLED, None, SAMPLED)
            beyond = np.isfinite(exact[sampled]) & ~np.isfinite(side[sampled])
            fields = np.where(magnitudes[sampled] == 0, FIELDS - 1, magnitudes[sampled] >> 23) - beyond
            counts[EXPONENTS + i * FIELDS :][:FIELDS] = np.bincount(fields, minlength=FIELDS)
        signed = (np.abs(x) > 0) & (np.abs(y) > 0)
        counts[SIGNED] = np.count_nonzero(signed)
        counts[OPPOSITE] = np.count_nonzero(signed & ((x.view(np.int32) ^ y.view(np.int32)) < 0))
        of_rows = (*(each for _, each in sides), *([None] * (2 - len(sides))), wide[2 if base else 0])
        for i, taken in enumerate(of_rows):
            if taken is None or not asked.columns:
                continue
            found = (taken.reshape(-1, asked.columns) ** 2).sum(axis=1)
            if asked.by_row:
                squares[i] = found
            if i < 2:
                fourths[i] = (found**2).sum()
                if asked.sketched:
                    matrix = sides[i][0].reshape(-1, asked.columns)
                    sketch[i] += make_signs(asked.span.start // asked.columns, len(matrix)) @ matrix
        products = ((0, 0), (1, 1), (2, 2), (0, 1))
        sums = np.stack([_sum_products(wide[i], wide[k], asked.block) for i, k in products])
    return _add(sums, fourths, counts, squares, sketch, unlike, total)


def _differ(values: Singles, less: Singles) -> Floats:
    """Return the differences as float32 has them, or as float64 where they are beyond it."""
    near: Floats = (values - less).astype(np.float64)
    return np.where(np.isfinite(near), near, values.astype(np.float64) - less)


def _make_room(asked: SlabAsked, total: Partial) -> tuple[Counts, Floats, Singles]:
    """Return the counts, sums of rows' squares [3, rows] and sketches [2, SKETCHED, columns] that are added to."""
    columns = asked.columns if asked.sketched else 0
    sketch = total[-1].values if total else np.zeros((2, SKETCHED, columns), np.float32)
    return np.zeros(EXPONENTS + 2 * FIELDS, np.int64), np.zeros((3, asked.rows if asked.by_row else 0)), sketch


def _sum_products(left: Floats, right: Floats, block: int) -> Floats:
    """Return the sum of each cut."""
    cuts = count_cuts(len(left), block)
    products = np.zeros((cuts, BLOCK))
    starts = (at for first in range(0, len(left), block) for at in range(first, min(first + block, len(left)), BLOCK))
    for row, start in zip(products, starts, strict=True):
        stop = min(start + BLOCK, (start // block + 1) * block, len(left))
        row[: stop - start] = left[start:stop] * right[start:stop]
    lanes = np.add.reduce(products.reshape(cuts, -1, 32), axis=1)
    sums: Floats = np.zeros(cuts)
    for lane in lanes.T:  # a reduction along them would go in another order
        sums += lane
    return sums


def _add(
    sums: Floats,
    fourths: Floats,
    counts: Counts,
    squares: Floats,
    sketch: Singles,
    unlike: Sequence[int],
    total: Partial,
) -> Partial:
    """Return the total with what was gathered of a slab; its sketch is that of the total already."""
    largest = tuple(_make_extremes(bits) for bits in counts[LARGEST:SIGNED])
    counts[LARGEST:SIGNED] = 0
    counts[UNLIKE:][: len(unlike)] += unlike
    exact = tuple(sum_lanes(each[:, None]) for each in (*sums, *fourths))
    found = (exact, counts, largest, Added(squares))
    return *add_partials(total[:-1], found), Added(sketch)


def _make_extremes(bits: int) -> Extremes:
    """Return the magnitude of a float64's bits as the largest, and as the least 0; of what is no number neither."""
    value = float(np.array([bits], np.int64).view(np.float64)[0])
    return Extremes(min(0.0, value), value)


def read_total(total: Partial, *, based: bool, is_number: bool) -> Gathered:
    """Return what was gathered of a tensor, with a base or without."""
    exact, counts, largest, rows, sketch = total
    xx, yy, zz, xy, *fourths = (float(each) for each in exact)
    found = counts.tolist()
    apart, *beside = found[UNLIKE : UNLIKE + 3]
    unlike = beside if based else [apart]
    if not is_number:
        return Gathered((), (0.0, 0.0, 0.0), 0, 0, apart)
    sides = tuple(
        SideTotals(
            each,
            zz if based else xx,
            fourths[i],
            found[ZEROS + i],
            unlike[i],
            largest[i].most,
            _make_histogram(counts[EXPONENTS + i * FIELDS :][:FIELDS]),
            sketch.values[i],
            rows.values[[i, 2]],
        )
        for i, each in enumerate((xx, yy) if based else (zz,))
    )
    return Gathered(sides, (xx, yy, xy), found[SIGNED] - found[OPPOSITE], found[SIGNED], apart)


def _make_histogram(fields: Counts) -> Counts:
    """Return how many magnitudes there are of each power of 2, without zeros and what is not finite."""
    found: Counts = np.zeros(BINS, np.int64)
    np.add.at(found, np.clip(np.arange(FIELDS - 1) - 127 - LEAST_EXPONENT, 0, BINS - 1), fields[: FIELDS - 1])
    return found
