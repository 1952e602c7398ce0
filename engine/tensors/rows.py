"""A matrix whose rows are rows of others: an embedding in the order of another vocabulary.

A slab reads the rows that it is made of, in runs: rows that follow each other are one read, holes of up to
`MOST_HOLE_BYTES` are read over, and a run ends where its input's next slab begins. That depends on nothing but the
map, so what a slab reads is part of what a larger span reads; and the workspace gets back what a run took, so that no
more than a slab of an input is in memory. Where a slab is rows of one input in their order, it is that input's own
slab, without a copy.

The mean of all rows, for rows of padding, is gathered in a round of its own (`columns.py`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np

from mergemill.engine.tensors.columns import Floats, read_columns, sum_columns
from mergemill.engine.tensors.device import put_beside, to_host
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Leaf, Read, Stored
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, join_rounds
from mergemill.engine.tensors.row_maps import MEAN, ZERO, Ints, Places, RowMap, count_most, cut_runs
from mergemill.engine.tensors.row_runs import Run, list_reads, place_rows, read_in_place, sort_rows
from mergemill.engine.tensors.slabs import BLOCK, SLAB, Span
from mergemill.engine.tensors.stacked import widen
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned

MOST_HOLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Expression):
    """Rows of several matrices, or elements of vectors, as a map says; all are as long as those of the first."""

    inputs: tuple[Expression, ...]
    map: RowMap
    dtype: str  # that of the model whose tensor it stands for

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as the map has."""
        return (len(self.map.rows), *self.inputs[0].shape[1:])

    @property
    def columns(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.inputs[0].shape[1:])

    @property
    def block(self) -> int:
        """Any will do: of an input whole rows and whole blocks are asked for."""
        return BLOCK

    def iter_blocks(self) -> Iterator[int]:
        """Any, whatever the blocks of the inputs are."""
        yield self.own_block

    @property
    def grain(self) -> int:
        """Any: no piece reads more than its rows."""
        return 1

    @property
    def is_lowered(self) -> bool:
        """Where rows are joined as they are stored; a mean is one of few."""
        return all(each.is_plain and each.dtype == self.dtype for each in self.inputs)

    def lowered_bytes(self, elements: int) -> int:
        """The rows as they are stored; where some are means, all may be float32."""
        made = self.map.has_mean or len(self.map.members) or not self.is_lowered
        return self.slab_bytes(elements, "F32" if made else self.dtype)

    def count_rounds(self) -> tuple[int, int]:
        """The inputs', and one for the mean."""
        usual, most = Expression.count_rounds(self)
        return usual + self.map.has_mean, most + self.map.has_mean

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what the runs of the span read, and what rounds of the inputs read while they pass over it."""
        for number, each in enumerate(self.inputs):
            if not span.size:
                yield from each.reads(Span(0, 0))
            elif each.count_rounds()[1]:
                yield from each.reads(self._scale(number, span))
        wanted = self.map.find_wanted(*self.find_rows(span))[0] if span.size else self.map.rows[:0]
        for number, rows, _ in self.sort_rows(wanted):
            each = self.inputs[number]
            bounds = np.array(self._cut(each, rows))
            firsts, lasts = rows[bounds[:-1]], rows[bounds[1:] - 1]
            if isinstance(each, Stored):
                yield from list_reads(each, firsts, lasts, self.columns)
            else:
                for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                    yield from each.reads(self._span_rows(each, first, last))

    def reads_ahead(self, span: Span) -> Iterator[Read]:
        """Yield what is long enough: `read_ranges` asks for the many short ones itself."""
        return (read for read in self.reads(span) if read.size_bytes > MOST_HOLE_BYTES)

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what the inputs hold for all that the span takes of them."""
        if all(isinstance(each, Stored) for each in self.inputs):
            return
        hulls: dict[int, Span] = {} if span.size else {number: Span(0, 0) for number in range(len(self.inputs))}
        for number, each in enumerate(self.inputs):
            if span.size and each.count_rounds()[1]:
                hulls[number] = self._scale(number, span)
        for number, run in self._iter_runs(span):
            hull = hulls.get(number, run.span)
            hulls[number] = Span(min(hull.start, run.span.start), max(hull.stop, run.span.stop))
        for number, hull in hulls.items():
            yield from self.inputs[number].holds(hull)

    def rounds(self) -> ExpressionRounds:
        """Yield the inputs' rounds, which pass over them as this passes over itself, and one for the mean."""
        inputs = yield from join_rounds([self._follow(number) for number in range(len(self.inputs))])
        if not self.map.has_mean:
            return GatheredRows(self, inputs, None)
        found = yield Round(GatheredRows(self, inputs, np.zeros(self.columns)).sum_rows)
        count = int((self.map.rows != MEAN).sum())
        return GatheredRows(self, inputs, read_columns(found, self.columns) / max(1, count))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The rows, what is read for them with its holes and ends, and what the mean is added up in."""
        rows, runs = count_most(self.map, elements // self.columns + 2)
        runs += len(self.inputs) - 1  # where rows of one follow those of another
        wide = _widen(dtype) if len(self.map.members) else dtype
        own = aligned(rows * self.columns * item_bytes(wide)) + aligned(elements * item_bytes(dtype))
        run = max(each.slab_bytes(self._most_taken(each, elements, rows, runs), wide) for each in self.inputs)
        sums = 4 * aligned((elements + 2 * self.columns) * item_bytes("F64")) if self.map.has_mean else 0
        return own + run + sums

    def suits_device(self, device: str) -> bool:
        """It is put together on the CPU, and so is what is merged with it."""
        return False

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what puts rows in their places."""
        return GatheredRows(self, inputs, None)

    def describe(self) -> Mapping[str, Any]:
        """The inputs, and the digest of the map."""
        return {"rows": [each.describe() for each in self.inputs], "map": self.map.digest, "dtype": self.dtype}

    def find_rows(self, span: Span) -> tuple[int, int]:
        """Return the rows that the span touches: the first, and the one after the last."""
        return span.start // self.columns, -(-span.stop // self.columns)

    def find_runs(self, wanted: Ints) -> Iterator[tuple[int, Run]]:
        """Yield the runs in which rows are read, with the number of the input."""
        for number, rows, places in self.sort_rows(wanted):
            for low, high in pairwise(self._cut(self.inputs[number], rows)):
                yield number, self._make_run(self.inputs[number], rows[low:high], places[low:high])

    def sort_rows(self, wanted: Ints) -> Iterator[tuple[int, Places, Places]]:
        """Yield the number of each input of which rows are wanted, these in their order, and their places."""
        return sort_rows(wanted, [each.shape[0] for each in self.inputs])

    def _cut(self, each: Expression, rows: Places) -> list[int]:
        return cut_runs(rows, self._find_hole(each), rows * self.columns // SLAB)

    def _iter_runs(self, span: Span) -> Iterator[tuple[int, Run]]:
        if span.size:
            yield from self.find_runs(self.map.find_wanted(*self.find_rows(span))[0])

    def _make_run(self, each: Expression, rows: Places, places: Places) -> Run:
        first = int(rows[0])
        return Run(self._span_rows(each, first, int(rows[-1])), first, rows, places)

    def _span_rows(self, each: Expression, first: int, last: int) -> Span:
        return widen(each, Span(first * self.columns, (last + 1) * self.columns))

    def _find_hole(self, each: Expression) -> int:
        """Return how many rows that nobody wants may lie between two of one run."""
        if isinstance(each, Leaf):
            return MOST_HOLE_BYTES // (self.columns * item_bytes(each.dtype))
        return max(0, -(-each.block // self.columns) - 1)  # rows so near share a block

    def _most_taken(self, each: Expression, elements: int, rows: int, runs: int) -> int:
        """Return how many elements of an input may be in memory at once."""
        holes = runs * self._find_hole(each) * self.columns
        taken = min(rows * self.columns + holes, SLAB + self.columns)
        if not isinstance(each, Leaf):
            taken += 2 * each.block
        if each.count_rounds()[1]:
            taken = max(taken, -(-elements * each.size // max(1, self.size)) + 2 * each.block)
        return min(taken, each.size)

    def _scale(self, number: int, span: Span) -> Span:
        """Return the blocks of an input that a pass over the span takes, so that one over all takes each once."""
        each = self.inputs[number]
        blocks, size = -(-each.size // each.block), self.size
        start, stop = span.start * blocks // size, span.stop * blocks // size
        return Span(min(start * each.block, each.size), min(stop * each.block, each.size))

    def _follow(self, number: int) -> ExpressionRounds:
        rounds = self.inputs[number].rounds()
        try:
            asked = next(rounds)
            while True:
                asked = rounds.send((yield replace(asked, take=self._scale_take(number, asked))))
        except StopIteration as finished:
            ready: Ready = finished.value
            return ready

    def _scale_take(self, number: int, asked: Round) -> Callable[[Span, Workspace, Partial], Partial]:
        def take(span: Span, work: Workspace, total: Partial) -> Partial:
            scaled = self._scale(number, span)
            return asked.take(scaled, work, total) if scaled.size else total

        return take


@dataclass(frozen=True, slots=True, eq=False)
class GatheredRows(Plain):
    """Rows of matrices that are ready."""

    made: Rows
    inputs: tuple[Ready, ...]
    mean: Floats | None = field(repr=False)

    @property
    def dtype(self) -> str:
        """As was said."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`; means are taken in float32, or in float64 where that is asked for."""
        if alone := self._find_alone(span):
            return alone[0].slab(alone[1], work, dtype)
        columns, (first, last) = self.made.columns, self.made.find_rows(span)
        wanted, means = self.made.map.find_wanted(first, last)
        wide = _widen(dtype) if means else dtype
        found = work.take((len(wanted), columns), wide)
        for number, run in self.made.find_runs(wanted):
            with work.scratch():
                slab = self.inputs[number].slab(run.span, work, wide)
                place_rows(found, run, slab[run.first * columns - run.span.start :], columns)
        for place in np.flatnonzero(wanted == ZERO).tolist():
            found[place].zero_()
        for place in np.flatnonzero(wanted == MEAN).tolist():
            found[place].copy_(put_beside(cast(Floats, self.mean), found))
        for place, start, stop in means:
            for member in range(start, stop):
                found[place].add_(found[member])
            found[place].div_(stop - start)
        slab = found.view(-1)[span.start - first * columns : span.stop - first * columns]
        return slab if dtype == wide else work.take((span.size,), dtype).copy_(slab)

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the span as it is stored, where native loops know the dtype, else as float32."""
        if alone := self._find_alone(span):
            return alone[0].lower(alone[1], work)
        plain = all(each.is_plain for each in self.made.inputs)  # what is made of others is not rounded to a dtype
        return (
            (self._join(span, work), self.dtype) if plain and self._is_stored(span) else Plain.lower(self, span, work)
        )

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`: as they are, or cast."""
        if dtype == self.dtype and self._is_stored(span):
            return self._join(span, work)
        return Plain.encode(self, span, work, dtype, watch)

    def sum_rows(self, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return the sums of columns over the rows that are no mean of others, added to `total`, in digits."""
        columns, (first, last) = self.made.columns, self.made.find_rows(span)
        before = span.start - first * columns
        rows = np.zeros((last - first, columns))
        rows.reshape(-1)[before : before + span.size] = to_host(self.slab(span, work, _widen(self.dtype)))
        rows[self.made.map.rows[first:last] == MEAN] = 0.0
        return add_partials(total, sum_columns(rows))

    def _find_alone(self, span: Span) -> tuple[Ready, Span] | None:
        """Return the one input of which the span is a span, and which; None where it is put together."""
        first, last = self.made.find_rows(span)
        rows = self.made.map.rows[first:last]
        if not len(rows) or rows[0] < 0 or int(rows[-1]) - int(rows[0]) != len(rows) - 1:
            return None
        starts = [0, *accumulate(each.shape[0] for each in self.made.inputs)]
        number = next(i for i, stop in enumerate(starts[1:]) if rows[0] < stop)
        each = self.made.inputs[number]
        if rows[-1] >= starts[number + 1] or not isinstance(each, Leaf) or not bool((np.diff(rows) == 1).all()):
            return None
        by = (int(rows[0]) - starts[number] - first) * self.made.columns
        return self.inputs[number], Span(span.start + by, span.stop + by)

    def _is_stored(self, span: Span) -> bool:
        """Whether all rows of the span are stored as they are wanted."""
        rows = self.made.map.rows[slice(*self.made.find_rows(span))]
        return bool((rows >= ZERO).all()) and all(each.dtype == self.dtype for each in self.made.inputs)

    def _join(self, span: Span, work: Workspace) -> Arena:
        if alone := self._find_alone(span):
            return alone[0].encode(alone[1], work, self.dtype)
        (first, last), row_bytes = self.made.find_rows(span), self.made.columns * item_bytes(self.dtype)
        wanted = self.made.map.rows[first:last]
        found = work.take_bytes(len(wanted) * row_bytes).reshape(-1, row_bytes)
        apart = [
            number
            for number, rows, places in self.made.sort_rows(wanted)
            if isinstance(each := self.inputs[number], Stored) and read_in_place(each, rows, places, found, work)
        ]
        for number, run in self.made.find_runs(wanted) if len(apart) < len(self.inputs) else ():
            if number in apart:
                continue
            with work.scratch():
                encoded = self.inputs[number].encode(run.span, work, self.dtype)
                before = run.first * row_bytes - run.span.start * item_bytes(self.dtype)
                place_rows(found, run, encoded[before:], row_bytes)
        found[wanted == ZERO] = 0
        item = item_bytes(self.dtype)
        start = span.start * item - first * row_bytes
        joined: Arena = found.reshape(-1)[start : start + span.size * item]
        return joined


def map_rows(inputs: Sequence[Expression], map_: RowMap, dtype: str) -> Expression:
    """Return rows of the inputs as `map_` says: the first input itself, where these are all of its rows."""
    if map_.is_identity(inputs[0].shape[0]) and dtype == inputs[0].dtype:
        return inputs[0]
    return Rows(tuple(inputs), map_, dtype)


def _widen(dtype: str) -> str:
    """Return the dtype to take means in."""
    return "F64" if dtype == "F64" else "F32"
