"""Two tensors, or two and what both were made from, compared in one additive pass.

Nothing is written: what the one round gathers says how far the tensors lie apart. Each *side* is a difference: without
a base the second tensor less the first; with one, each of both less the base. Sums are exact, so no cut shows in them.
Of matrices a sketch is kept, from which follows the effective rank (`sketch.py`); it is added in float32, in the order
of the pieces.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.comparing import SlabAsked, compare_slabs, compare_stored
from mergemill.engine.tensors.dtypes import is_mergeable, item_bytes
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.rounds import ExpressionRounds, Ready, Round, join_rounds
from mergemill.engine.tensors.sketch import SKETCHED
from mergemill.engine.tensors.slabs import SLAB, STORED_SLABS, Span, row_block, slab_step
from mergemill.engine.tensors.workspace import Workspace, aligned

MOST_COLUMNS = 1 << 17  # of a matrix that is sketched


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
        yield Round(functools.partial(self._take, inputs), self._steps)
        return inputs[0]

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what all read."""
        for each in self.inputs:
            yield from each.reads(span)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """All inputs as float32, as they are stored, and what is calculated beside them."""
        inputs = sum(each.slab_bytes(elements, "F32") + each.slab_bytes(elements, each.dtype) for each in self.inputs)
        return inputs + (0 if self._is_native else 6 * aligned(elements * item_bytes("F64"))) + self._sketch_bytes

    def step_bytes(self, elements: int, dtype: str) -> int:
        """Of one slab, or of as many as native loops take at once."""
        return self.slab_bytes(min(slab_step(self._steps * SLAB, self.block), elements), dtype)

    @property
    def _is_native(self) -> bool:
        """Whether native loops compare."""
        return self.is_number and native.load() is not None

    @property
    def _steps(self) -> int:
        """How many slabs are taken at once: several where native loops take what is stored."""
        return STORED_SLABS if self._is_native and all(each.is_plain for each in self.inputs) else 1

    @property
    def _sketch_bytes(self) -> int:
        """Of both sides, and once more as they are added up."""
        return 2 * 2 * item_bytes("F32") * SKETCHED * self.columns if self.is_sketched else 0

    def suits_device(self, device: str) -> bool:
        """It is done on the CPU."""
        return False

    def makes_natively(self, dtype: str) -> bool:
        """It does not: torch does."""
        return False

    def describe(self) -> Mapping[str, Any]:
        """What is compared."""
        return {"compared": [each.describe() for each in self.inputs], "by_row": self.by_row}

    def _take(self, inputs: tuple[Ready, ...], span: Span, work: Workspace, total: Partial) -> Partial:
        """Gather from a slab."""
        own = [each.dtype for each in self.inputs]
        slabs = [each.lower(span, work) for each in inputs] if self._is_native else []
        alike = [bool(slabs) and slabs[i][1] == own[i] == slabs[k][1] == own[k] for i, k in self.pairs]
        unlike = [
            0 if seen else self._count_unlike(inputs[i], inputs[k], (own[i], own[k]), span, work)
            for (i, k), seen in zip(self.pairs, alike, strict=True)
        ]
        columns = self.columns if self.is_sketched or self.by_row else 0
        asked = SlabAsked(span, self.block, columns, by_row=self.by_row, sketched=self.is_sketched)
        if slabs:
            return compare_stored(slabs, asked, alike, unlike, work, total)
        made = [each.slab(span, work, "F32") for each in inputs] if self.is_number else []
        return compare_slabs(made, asked, unlike, total)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Of which the bytes are compared: first and second, and each with the base."""
        return ((0, 1), (0, 2), (1, 2))[: 1 if len(self.inputs) == 2 else 3]

    @staticmethod
    def _count_unlike(one: Ready, other: Ready, dtypes: tuple[str, str], span: Span, work: Workspace) -> int:
        """Count the elements that are not stored as the same bytes; all where they are of two dtypes."""
        if dtypes[0] != dtypes[1]:
            return span.size
        a, b = (each.encode(span, work, dtypes[0]) for each in (one, other))
        if np.array_equal(a, b):
            return 0
        word = f"u{item_bytes(dtypes[0])}"
        return int(np.count_nonzero(a.view(word) != b.view(word)))
