"""What adapters do to a tensor beside a low-rank product: magnitudes (DoRA), rows of single tokens, and biases."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergemill.engine.tensors.columns import read_columns, sum_columns
from mergemill.engine.tensors.device import put_beside, to_host
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.exact import sum_rows
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.low_rank import Changed
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@dataclass(frozen=True, slots=True)
class RowMagnitudes(Changed):
    """DoRA: row j of the weight times ``magnitude[j] / ‖row j‖``.

    Rows are contiguous, so a slab reads the rest of its first and its last row as well; no pass before is needed.
    """

    weight: Expression
    magnitude: Leaf  # one for each row
    columns: int

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what the whole rows of the span read."""
        return self.weight.reads(self.widen(span))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what the weight holds, and the magnitudes."""
        return itertools.chain(self.weight.holds(self.widen(span)), self.magnitude.reads(Span(0, self.magnitude.size)))

    def widen(self, span: Span) -> Span:
        """Return the rows that the span touches."""
        return Span(span.start // self.columns * self.columns, -(-span.stop // self.columns) * self.columns)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what scales rows."""
        return ScaledRows(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The weight's rows, the same in float64, and the magnitudes."""
        wide, rows = _widen(dtype), elements + 2 * self.columns
        own = aligned(rows * item_bytes("F64")) + aligned(elements * item_bytes(dtype))
        return self.weight.slab_bytes(rows, wide) + own + self.magnitude.slab_bytes(self.magnitude.size, wide)

    def describe(self) -> Mapping[str, Any]:
        """The weight and the magnitudes."""
        return {"row_magnitudes": [self.weight.describe(), self.magnitude.describe(), self.columns]}


@dataclass(frozen=True, slots=True)
class ScaledRows(Plain):
    """A weight's slabs, each row at its magnitude."""

    made: RowMagnitudes
    weight: Ready

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`, made in float32, or in float64 where that is asked for."""
        made, wide, whole = self.made, _widen(dtype), self.made.widen(span)
        rows = self.weight.slab(whole, work, wide).view(-1, made.columns)
        squares = work.take(tuple(rows.shape), "F64").copy_(rows)
        norms = sum_rows(squares.square_()).sqrt_().to(rows.dtype)
        first = whole.start // made.columns
        magnitude = made.magnitude.slab(Span(0, made.magnitude.size), work, wide)[first : first + len(rows)]
        rows.mul_((magnitude / norms)[:, None])
        slab = rows.view(-1)[span.start - whole.start : span.stop - whole.start]
        return slab if dtype == wide else work.take((span.size,), dtype).copy_(slab)


@dataclass(frozen=True, slots=True)
class ColumnMagnitudes(Changed):
    """DoRA of a weight that is stored transposed: column j times ``magnitude[j] / ‖column j‖``.

    The norms are gathered in a round of their own.
    """

    weight: Expression
    magnitude: Leaf  # one for each column
    columns: int

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what the weight holds, and the magnitudes."""
        return itertools.chain(self.weight.holds(span), self.magnitude.reads(Span(0, self.magnitude.size)))

    def count_rounds(self) -> tuple[int, int]:
        """The weight's, and one."""
        usual, most = Expression.count_rounds(self)
        return usual + 1, most + 1

    def rounds(self) -> ExpressionRounds:
        """Yield the weight's rounds, and one for the norms."""
        weight = yield from self.weight.rounds()
        found = yield Round(ColumnSquares(weight, self.columns).gather)
        return ScaledColumns(self, weight, np.sqrt(read_columns(found, self.columns)))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The weight's slab, its squares, and the magnitudes."""
        squares = 4 * aligned((elements + 2 * self.columns) * item_bytes("F64"))
        own = squares + aligned(elements * item_bytes(dtype)) + 64 * self.columns
        wide = _widen(dtype)
        return self.weight.slab_bytes(elements, wide) + own + self.magnitude.slab_bytes(self.magnitude.size, wide)

    def describe(self) -> Mapping[str, Any]:
        """The weight and the magnitudes."""
        return {"column_magnitudes": [self.weight.describe(), self.magnitude.describe(), self.columns]}


@dataclass(frozen=True, slots=True)
class ColumnSquares:
    """Gathers the sums of the squares of columns."""

    weight: Ready
    columns: int

    def gather(self, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return the sums over a slab, added to `total`."""
        before = span.start % self.columns
        rows = np.zeros((-(-(before + span.size) // self.columns), self.columns))
        rows.reshape(-1)[before : before + span.size] = to_host(self.weight.slab(span, work, "F32"))
        return add_partials(total, sum_columns(np.square(rows, out=rows)))


@dataclass(frozen=True, slots=True)
class ScaledColumns(Plain):
    """A weight's slabs, each column at its magnitude."""

    made: ColumnMagnitudes
    weight: Ready
    norms: np.ndarray[Any, np.dtype[np.float64]] = field(repr=False)

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`, made in float32, or in float64 where that is asked for."""
        made, wide = self.made, _widen(dtype)
        slab = self.weight.slab(span, work, wide)
        magnitude = made.magnitude.slab(Span(0, made.magnitude.size), work, wide)
        slab.view(-1, made.columns).mul_(magnitude / put_beside(self.norms, slab).to(slab.dtype))
        return slab if dtype == wide else work.take((span.size,), dtype).copy_(slab)


@dataclass(frozen=True, slots=True)
class TokenRows(Changed):
    """A matrix of which some rows, those of trained tokens, are stored apart and stand for its own."""

    weight: Expression
    stored: Leaf  # [tokens, columns]
    tokens: tuple[int, ...]  # the row that each stands for

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what the weight holds, and the rows."""
        return itertools.chain(self.weight.holds(span), self.stored.reads(Span(0, self.stored.size)))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what puts rows in their places."""
        return PlacedRows(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The weight's slab and the rows."""
        return self.weight.slab_bytes(elements, dtype) + self.stored.slab_bytes(self.stored.size, dtype)

    def describe(self) -> Mapping[str, Any]:
        """The weight, the rows and where they belong."""
        return {"token_rows": [self.weight.describe(), self.stored.describe(), list(self.tokens)]}


@dataclass(frozen=True, slots=True)
class PlacedRows(Plain):
    """A matrix's slabs with rows of tokens in their places."""

    made: TokenRows
    weight: Ready

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`."""
        slab = self.weight.slab(span, work, dtype)
        columns = self.made.shape[-1]
        touched = [(i, t * columns) for i, t in enumerate(self.made.tokens)]
        touched = [(i, at) for i, at in touched if at < span.stop and at + columns > span.start]
        rows = self.made.stored.slab(Span(0, self.made.stored.size), work, dtype) if touched else slab
        for i, at in touched:
            low, high = max(at, span.start), min(at + columns, span.stop)
            slab[low - span.start : high - span.start] = rows[i * columns + low - at : i * columns + high - at]
        return slab


@dataclass(frozen=True, slots=True)
class Shifted(Changed):
    """A bias, and ``scale`` times another on top of it."""

    weight: Expression
    added: Leaf
    scale: float

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what both read."""
        return itertools.chain(self.weight.reads(span), self.added.reads(span))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what adds."""
        return AddedSlabs(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Both, and the sum."""
        wide = _widen(dtype)
        both = self.weight.slab_bytes(elements, wide) + self.added.slab_bytes(elements, wide)
        return both + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """Both, and the scale."""
        return {"shifted": [self.weight.describe(), self.added.describe(), self.scale]}


@dataclass(frozen=True, slots=True)
class AddedSlabs(Plain):
    """The slabs of a bias with another added."""

    made: Shifted
    weight: Ready

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`, added in float32, or in float64 where that is asked for."""
        wide = _widen(dtype)
        slab, added = self.weight.slab(span, work, wide), self.made.added.slab(span, work, wide)
        slab.add_(added.mul_(torch.tensor(self.made.scale, dtype=slab.dtype)))
        return slab if dtype == wide else work.take((span.size,), dtype).copy_(slab)


def _widen(dtype: str) -> str:
    """Return the dtype to calculate in."""
    return "F64" if dtype == "F64" else "F32"
