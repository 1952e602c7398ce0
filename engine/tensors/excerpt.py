"""A part of a tensor as one of its own: an expert of those that are packed, a share of the rows of a matrix."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.expressions import Expression, Leaf, Read, Stored
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.stacked import cut_stored, widen
from mergemill.engine.tensors.workspace import Workspace


def take_apart(whole: Expression, shapes: Sequence[tuple[int, ...]]) -> list[Expression]:
    """Return the tensors of `shapes` that another, without rounds, is the stack of."""
    if isinstance(whole, Stored):
        return list(cut_stored(whole, shapes))
    starts = accumulate((math.prod(shape) for shape in shapes), initial=0)
    return [Excerpt(whole, start, shape) for start, shape in zip(starts, shapes, strict=False)]


@dataclass(frozen=True, slots=True)
class Excerpt(Expression):
    """The elements of a tensor from one on, under a shape of their own; the tensor has no rounds."""

    whole: Expression
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The tensor's."""
        return self.whole.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensor."""
        return (self.whole,)

    @property
    def block(self) -> int:
        """Any will do: of a tensor that is cut at its own blocks alone, whole blocks are asked for."""
        return BLOCK

    def move(self, span: Span) -> Span:
        """Return the tensor's elements for those of the span: whole blocks, unless it gives any."""
        return widen(self.whole, Span(self.start + span.start, self.start + span.stop)) if span.size else Span(0, 0)

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what the tensor reads for them."""
        return self.whole.reads(self.move(span))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what it holds for them."""
        return self.whole.holds(self.move(span))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what asks for them."""
        return ExcerptSlabs(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """As much of the tensor, and what its ends take."""
        return self.whole.slab_bytes(elements + (0 if isinstance(self.whole, Leaf) else 2 * self.whole.block), dtype)

    def describe(self) -> Mapping[str, Any]:
        """The tensor, and which part."""
        return {"part": self.whole.describe(), "from": self.start, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class ExcerptSlabs(Plain):
    """The slabs of a part of a tensor."""

    made: Excerpt
    whole: Ready

    @property
    def dtype(self) -> str:
        """The tensor's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements as `dtype`."""
        moved, at = self.made.move(span), self.made.start + span.start
        return self.whole.slab(moved, work, dtype)[at - moved.start : at - moved.start + span.size]
