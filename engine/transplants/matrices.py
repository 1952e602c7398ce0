"""The two matrices that new rows are made of, gone over row by row as a map says, and sums over them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mergemill.engine.tensors.columns import sum_columns
from mergemill.engine.tensors.expressions import Expression, Stored
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import Ready
from mergemill.engine.tensors.row_maps import Ints, make_row_map
from mergemill.engine.tensors.rows import Rows
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace
from mergemill.engine.transplants.affine import sum_pairs
from mergemill.engine.transplants.changes import Changes
from mergemill.engine.transplants.methods import Approximation, Sizes, Sources, find_method
from mergemill.engine.transplants.streams import Pass, Passes

STEP = 1 << 20  # elements of a matrix that are gone over at once


@dataclass(frozen=True, slots=True, eq=False)
class Matrices:
    """The matrices of the model and of the donor, and what becomes of their rows."""

    model: Expression  # [rows of the model, width]
    donor: Expression | None  # [rows of the donor, its width]; None where nothing is made of it
    changes: Changes

    @property
    def sources(self) -> tuple[Expression, ...]:
        """Those that are there."""
        return (self.model,) if self.donor is None else (self.model, self.donor)

    @property
    def compute(self) -> str:
        """The dtype in which rows are made."""
        return "F64" if any(each.dtype == "F64" for each in self.sources) else "F32"

    @property
    def widths(self) -> tuple[int, int]:
        """Of donor and model."""
        return self.donor.shape[1] if self.donor else 0, self.model.shape[1]

    @property
    def sizes(self) -> Sizes:
        """The widths of donor and model, and how many tokens they share."""
        return *self.widths, len(self.changes.donors)

    @property
    def stored(self) -> str:
        """The dtype that holds the donor's rows as they are; empty where there is none, or none is in float32."""
        if self.donor is None or self.compute != "F32":
            return ""
        return self.donor.dtype if isinstance(self.donor, Stored) else "F32"  # what is quantised is a float32 product

    def find_method(self, name: str) -> Approximation:
        """Return how rows are made, as it suits the matrices."""
        return find_method(name, self.sizes, len(self.changes.new), self.stored)

    def rows_of_model(self, numbers: Ints) -> Rows:
        """Return rows of the model."""
        return Rows((self.model,), make_row_map(numbers), self.model.dtype)

    def rows_of_donor(self, numbers: Ints) -> Rows:
        """Return rows of the donor."""
        assert self.donor is not None
        return Rows((self.donor,), make_row_map(numbers), self.donor.dtype)

    def iter_all(self) -> Iterator[Rows]:
        """Yield all rows of each."""
        for each, rows in zip(self.sources, (self.rows_of_model, self.rows_of_donor), strict=False):
            yield rows(np.arange(each.shape[0], dtype=np.int32))

    def open_sources(self, work: Workspace, dtype: str) -> Sources:
        """Return what a method goes over: shared rows of the donor and of the model, and all of the model's."""
        everything = next(self.iter_all())
        return Sources(
            pass_over(self.rows_of_donor(self.changes.donors), work, dtype) if self.donor else None,
            pass_over(self.rows_of_model(self.changes.models), work, dtype),
            pass_over(everything, work, dtype),
            torch.from_numpy(self.changes.models.astype(np.int64)),
            self.model.shape[1],
        )

    def sum_tokens(self, first: int, last: int, work: Workspace, *, products: bool) -> Partial:
        """Return the sums of columns over the model's rows with tokens in a range, and w wT where asked for."""
        tokens = self.changes.find_tokens(first, last)
        found: Partial = ((), ())
        for _, slab in pass_over(self.rows_of_model(tokens), work, "F64")() if len(tokens) else ():
            w = slab.numpy()
            found = add_partials(found, (sum_columns(w.copy()), (w.T @ w,) if products else ()))
        return found

    def sum_shared(self, first: int, last: int, work: Workspace) -> Partial:
        """Return the sums over pairs of rows of the tokens that both have, by a range of the donor's ids."""
        low, high = np.searchsorted(self.changes.donors, (first, last)).tolist()
        step = max(1, STEP // max(self.widths))
        found: Partial = ()
        for start in range(low, high, step):
            here = slice(start, min(start + step, high))
            with work.scratch():
                x = read_rows(self.rows_of_donor(self.changes.donors[here]), work, "F64")
                w = read_rows(self.rows_of_model(self.changes.models[here]), work, "F64")
                found = add_partials(found, sum_pairs(x.numpy(), w.numpy()))
        return found

    def count_bytes(self, dtype: str) -> int:
        """Return an upper bound of what a pass has in memory, of either, and of both where they stream together."""
        found = 0
        for rows in self.iter_all():
            step = max(1, STEP // rows.columns) * rows.columns
            found += rows.slab_bytes(min(step, max(rows.columns, rows.size)), dtype)
        return found


def pass_over(rows: Rows, work: Workspace, dtype: str) -> Passes:
    """Return passes over rows that a map gives; the workspace gets back what a slab took."""
    ready = get_ready(rows)

    def go() -> Pass:
        step = max(1, STEP // rows.columns)
        for first in range(0, rows.shape[0], step):
            last = min(first + step, rows.shape[0])
            with work.scratch():
                slab = ready.slab(Span(first * rows.columns, last * rows.columns), work, dtype)
                yield first, slab.view(last - first, rows.columns)

    return go


def read_rows(rows: Rows, work: Workspace, dtype: str) -> Tensor:
    """Return all rows of a map, in the workspace."""
    return get_ready(rows).slab(Span(0, rows.size), work, dtype).view(rows.shape)


def get_ready(expression: Expression) -> Ready:
    """Return what gives slabs of an expression without rounds."""
    return expression.get_ready(tuple(get_ready(each) for each in expression.inputs))
