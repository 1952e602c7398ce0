"""A vocabulary's tensor with the rows of another vocabulary: the model's own where both have a token, else made here.

What is made goes batch by batch of new rows, whatever the slabs: a batch is of the rows of one range, and pieces are
cut at ranges, so that no two tasks make the same rows. Both matrices stream by rows; a donor's that a pursuit goes over
again and again is held as it is stored, up to `HELD_BYTES`. Batches and ranges hang on shapes and settings alone, and
so no byte hangs on workers or memory.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mergemill.engine.errors import RunError
from mergemill.engine.tensors.columns import read_columns
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Read
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.rounds import ExpressionRounds, Ready, Round, join_rounds
from mergemill.engine.tensors.slabs import Span, row_block
from mergemill.engine.tensors.workspace import Workspace
from mergemill.engine.transplants.affine import Affine, Doubles
from mergemill.engine.transplants.matrices import Matrices
from mergemill.engine.transplants.methods import HELD_BYTES, Approximation, Batch, Manner, Sizes
from mergemill.engine.transplants.transplanting import Transplanting

_ROUND_SLABS = 8  # that a round takes at once
_RANGE_BYTES = 128 << 20  # the most that a range of rows takes of the output


def transplant(copied: Expression, matrices: Matrices, asked: Manner) -> "Transplanted":
    """Return the tensor of `copied` with new rows.

    Its ranges are of about as many new rows as a batch has, and of whole blocks.
    """
    rows, width = copied.shape
    batch_rows = matrices.find_method(asked.method).count_rows(matrices.sizes, asked)
    unit = max(1, row_block(copied.shape) // width)
    ranges = -(-len(matrices.changes.new) // batch_rows) or 1
    most = _RANGE_BYTES // (width * item_bytes(matrices.model.dtype))
    range_rows = max(1, min(-(-rows // ranges), most) // unit) * unit
    return Transplanted(copied, matrices, asked, batch_rows, range_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Transplanted(Expression):
    """The tensor: `copied` has the rows that are the model's own, zeros, and anything where rows are made."""

    copied: Expression
    matrices: Matrices
    asked: Manner
    batch_rows: int  # the most rows that are made at once
    range_rows: int  # rows of the output whose new ones are made together

    @property
    def shape(self) -> tuple[int, ...]:
        """The new vocabulary's rows."""
        return self.copied.shape

    @property
    def dtype(self) -> str:
        """The model's."""
        return self.matrices.model.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What is copied."""
        return (self.copied,)

    @property
    def width(self) -> int:
        """The elements of a row."""
        return self.shape[1]

    @property
    def method(self) -> Approximation:
        """How rows are made."""
        return self.matrices.find_method(self.asked.method)

    @property
    def sizes(self) -> Sizes:
        """The widths of donor and model, and how many tokens they share."""
        return self.matrices.sizes

    @property
    def own_block(self) -> int:
        """A row."""
        return self.width

    @property
    def block(self) -> int:
        """Whole rows."""
        return row_block(self.shape)

    @property
    def grain(self) -> int:
        """A range of rows, where making them costs more than reading them."""
        grain = math.lcm(self.range_rows * self.width, self.block)
        return grain if self.method.is_costly and grain < self.size else self.block

    @property
    def is_watched(self) -> bool:
        """Rows are calculated."""
        return True

    @property
    def gathers(self) -> bool:
        """Whether sums over rows are needed first."""
        return bool(len(self.matrices.changes.means)) or self.method.sums != ""

    @property
    def solves(self) -> bool:
        """Whether a map follows from the sums."""
        return self.method.solve is not None

    def count_rounds(self) -> tuple[int, int]:
        """Those of what is copied, one for sums, and one in which one task solves what follows from them."""
        usual, most = self.copied.count_rounds()
        count = self.gathers + self.solves
        return usual + count, most + count

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what is copied, and where there are rounds both matrices: they go over all of them."""
        yield from self.copied.reads(span)
        for each in self.matrices.sources:
            yield from each.reads(Span(0, each.size if span.size and self.gathers else 0))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what the sources hold, and a matrix that is gone over again and again."""
        yield from self.copied.holds(span)
        makes = bool(span.size) and len(self.matrices.changes.find_new(*self.find_rows(span))) > 0
        for each in self.matrices.sources:
            yield from each.holds(Span(0, each.size if makes or (span.size and self.gathers) else 0))
        donor = self.matrices.donor
        often = makes and self.method.passes_often and not self.gathers
        if often and donor is not None and not donor.inputs and donor.size * item_bytes(donor.dtype) <= HELD_BYTES:
            yield from donor.reads(Span(0, donor.size))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """What is copied, a batch with what streams by, and the sums."""
        batch = self.method.count_bytes(self.batch_rows, self.sizes, self.asked)
        stream = 2 * self.matrices.count_bytes("F64" if self.gathers else self.matrices.compute)
        return self.copied.slab_bytes(elements, dtype) + batch + stream + self._sum_bytes()

    def _sum_bytes(self) -> int:
        """Return what the sums and what is solved of them take: of matrices of D x D some at once."""
        donor, model, _ = self.sizes
        side = {"pairs": donor + model, "rows": model}.get(self.method.sums, 0)
        return 8 * (4 * side * side + 64 * model) if self.gathers else 0

    def suits_device(self, device: str) -> bool:
        """The CPU makes it."""
        return False

    def rounds(self) -> ExpressionRounds:
        """Yield a round of sums, and one that solves what follows from them, as the method needs them."""
        (copied,) = yield from join_rounds([self.copied.rounds()])
        mean, solved = None, None
        if self.gathers:
            columns, products = (yield Round(self._gather, _ROUND_SLABS)) or ((), ())
            mean = read_columns(columns, self.width) / max(1, len(self.matrices.changes.tokens))
            if self.solves:
                found = yield Round(functools.partial(self._solve, mean, products), _ROUND_SLABS)
                solved = Affine(*found)
        return self._make_ready(copied, mean, solved)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """It needs no round."""
        return self._make_ready(inputs[0], None, None)

    def describe(self) -> Mapping[str, Any]:
        """What it is made of, how, and the digest of what becomes of the rows."""
        return {
            "transplanted": [self.copied.describe(), *(each.describe() for each in self.matrices.sources)],
            "changes": self.matrices.changes.digest,
            "asked": self.asked.describe(),
            "batches": [self.batch_rows, self.range_rows],
        }

    def find_rows(self, span: Span) -> tuple[int, int]:
        """Return the rows of a span: the first, and the one after the last."""
        return span.start // self.width, -(-span.stop // self.width)

    def cut_batches(self) -> tuple[Batch, ...]:
        """Return the new rows, cut at ranges and at the most that is made at once."""
        new, most = self.matrices.changes.new, self.batch_rows
        cuts = np.flatnonzero(np.diff(new // self.range_rows)) + 1
        bounds = [0, *cuts.tolist(), len(new)]
        return tuple(
            Batch(new[first : min(first + most, stop)], first)
            for start, stop in pairwise(bounds)
            for first in range(start, stop, most)
        )

    def _make_ready(self, copied: Ready, mean: Doubles | None, solved: Affine | None) -> Ready:
        return Transplanting(copied, self.matrices, self.asked, self.cut_batches(), mean, solved)

    def _gather(self, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return the sums over a span's share of the rows, added to `total`."""
        first, last = self.find_rows(span)
        count, rows = self.matrices.model.shape[0], self.shape[0]
        low, high = first * count // rows, last * count // rows
        found = self.matrices.sum_tokens(low, high, work, products=self.method.sums == "rows")
        if self.method.sums == "pairs":
            wide = 0 if self.matrices.donor is None else self.matrices.donor.shape[0]
            shared = self.matrices.sum_shared(first * wide // rows, last * wide // rows, work)
            found = add_partials(found, ((), shared))
        return add_partials(total, found)

    def _solve(self, mean: Any, products: Partial, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return the map that follows from the sums, where the span is the first."""
        if span.start or self.method.solve is None:
            return total
        tokens = len(self.matrices.changes.tokens)
        sums = products if self.method.sums == "pairs" else (tokens, mean * tokens, *products)
        if not all(np.isfinite(each).all() for each in sums):
            raise RunError(f"{self.asked.tensor}: rows that {self.asked.method} goes by hold NaN or infinity")
        found = self.method.solve(sums, self.matrices.open_sources(work, "F64"), self.asked)
        return found.origin, found.matrix, found.centre
