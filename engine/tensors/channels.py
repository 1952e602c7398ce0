"""Some rows or columns of a matrix, and matrices side by side: what cuts an MLP into fewer channels, or joins several.

Rows are contiguous. Of columns whole rows are read, of which a cut keeps a part; what is kept lies in spans of its own,
and the inputs' rounds go over theirs. Rows of a matrix that has rounds cannot be had apart: see `Excerpt`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes, promote
from mergemill.engine.tensors.excerpt import take_apart
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, join_rounds
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Workspace, aligned


class Rowwise(Expression):
    """What has the rows of its inputs, and other columns; its blocks are whole rows, and whole blocks of its inputs."""

    __slots__ = ()

    @property
    def block(self) -> int:
        """As many rows as fit into a block, or as the inputs' blocks ask for."""
        columns = max(1, self.shape[1])
        rows = math.lcm(*(each.own_rows for each in self._sides))
        return min(max(1, BLOCK // (columns * rows)) * rows * columns, max(1, self.size))

    @property
    def own_block(self) -> int:
        """A row."""
        return self.shape[1]

    @property
    def _sides(self) -> "tuple[_Side, ...]":
        return tuple(_Side(each, self.shape[1]) for each in self.inputs)

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what the inputs read for the span's rows."""
        for side in self._sides:
            yield from side.matrix.reads(side.move(span))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what they hold for these."""
        for side in self._sides:
            yield from side.matrix.holds(side.move(span))

    def rounds(self) -> ExpressionRounds:
        """Yield the inputs' rounds, each over its own spans."""
        inputs = yield from join_rounds([_move_rounds(side) for side in self._sides])
        return self.get_ready(inputs)


@dataclass(frozen=True, slots=True)
class _Side:
    """An input of what has other columns."""

    matrix: Expression
    columns: int  # of that

    @property
    def own_rows(self) -> int:
        """Rows of the input's block; a tensor that is there gives any rows."""
        block, width = self.matrix.block, max(1, self.matrix.shape[1])
        return 1 if isinstance(self.matrix, Leaf) or block >= self.matrix.size else math.lcm(block, width) // width

    def move(self, span: Span) -> Span:
        """Return the input's elements in the rows that the span touches."""
        width = self.matrix.shape[1]
        return Span(span.start // self.columns * width, -(-span.stop // self.columns) * width)


def _move_rounds(side: _Side) -> ExpressionRounds:
    rounds = side.matrix.rounds()
    total: Any = None
    try:
        while True:
            total = yield _move_round(rounds.send(total), side)
    except StopIteration as finished:
        ready: Ready = finished.value
        return ready


def _move_round(asked: Round, side: _Side) -> Round:
    def take(span: Span, work: Workspace, total: Partial) -> Partial:
        return asked.take(side.move(span), work, total)

    return Round(take, 1, asked.whole)


@dataclass(frozen=True, slots=True)
class Columns(Rowwise):
    """The columns of a matrix from one on."""

    matrix: Expression
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """All rows, some columns."""
        return self.matrix.shape[0], self.stop - self.start

    @property
    def dtype(self) -> str:
        """The matrix's."""
        return self.matrix.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The matrix."""
        return (self.matrix,)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what cuts rows."""
        return CutRows(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Whole rows of the matrix, and what is kept."""
        rows = elements // self.shape[1] + 2
        return self.matrix.slab_bytes(rows * self.matrix.shape[1], dtype) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The matrix, and which columns."""
        return {"columns": self.matrix.describe(), "from": self.start, "to": self.stop}


@dataclass(frozen=True, slots=True)
class CutRows(Plain):
    """The rows of a matrix, of which some columns are kept."""

    made: Columns
    matrix: Ready

    @property
    def dtype(self) -> str:
        """The matrix's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements as `dtype`."""
        made, columns = self.made, self.made.shape[1]
        moved = _Side(made.matrix, columns).move(span)
        rows = self.matrix.slab(moved, work, dtype).view(-1, made.matrix.shape[1])
        kept = work.take((len(rows), columns), dtype).copy_(rows[:, made.start : made.stop]).view(-1)
        first = span.start // columns * columns
        return kept[span.start - first : span.stop - first]


@dataclass(frozen=True, slots=True)
class Beside(Rowwise):
    """Matrices of as many rows, side by side."""

    inputs: tuple[Expression, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Their rows, and all their columns."""
        return self.inputs[0].shape[0], sum(each.shape[1] for each in self.inputs)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what joins rows."""
        return JoinedRows(self, inputs)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The rows of all, and these side by side."""
        rows = elements // self.shape[1] + 2
        own = aligned(rows * self.shape[1] * item_bytes(dtype))
        return own + sum(each.slab_bytes(rows * each.shape[1], dtype) for each in self.inputs)

    def describe(self) -> Mapping[str, Any]:
        """The matrices in their order."""
        return {"beside": [each.describe() for each in self.inputs]}


@dataclass(frozen=True, slots=True)
class JoinedRows(Plain):
    """The rows of matrices side by side."""

    made: Beside
    inputs: tuple[Ready, ...]

    @property
    def dtype(self) -> str:
        """What the inputs promote to."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements as `dtype`."""
        columns = self.made.shape[1]
        first, stop = span.start // columns, -(-span.stop // columns)
        joined = work.take((stop - first, columns), dtype)
        ends = list(accumulate(each.shape[1] for each in self.made.inputs))
        for matrix, ready, end in zip(self.made.inputs, self.inputs, ends, strict=True):
            width = matrix.shape[1]
            rows = ready.slab(_Side(matrix, columns).move(span), work, dtype)
            joined[:, end - width : end].copy_(rows.view(-1, width))
        return joined.view(-1)[span.start - first * columns : span.stop - first * columns]


def put_beside(matrices: Sequence[Expression]) -> Expression:
    """Return matrices of as many rows, side by side; one alone as it is."""
    return matrices[0] if len(matrices) == 1 else Beside(tuple(matrices), promote([each.dtype for each in matrices]))


def cut_rows(matrix: Expression, count: int) -> list[Expression]:
    """Return a matrix without rounds as so many of equal height; one alone is the matrix itself."""
    if count == 1:
        return [matrix]
    height = matrix.shape[0] // count
    return take_apart(matrix, [(height, matrix.shape[1])] * count)


def cut_columns(matrix: Expression, count: int) -> list[Expression]:
    """Return a matrix as so many of equal width; one alone is the matrix itself."""
    width = matrix.shape[1] // count
    return [Columns(matrix, i * width, (i + 1) * width) for i in range(count)] if count > 1 else [matrix]
