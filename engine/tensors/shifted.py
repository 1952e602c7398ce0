"""A tensor with a number added to every element: weights of norms that a file holds with 1 added, or without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@dataclass(frozen=True, slots=True)
class Offset(Expression):
    """A tensor, and a number that is added to it in float32 (or float64, as it is), and rounded once."""

    inner: Expression
    number: float

    @property
    def shape(self) -> tuple[int, ...]:
        """As before."""
        return self.inner.shape

    @property
    def dtype(self) -> str:
        """As before."""
        return self.inner.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What it is added to."""
        return (self.inner,)

    @property
    def wide(self) -> str:
        """The dtype that it is added in."""
        return "F64" if self.dtype == "F64" else "F32"

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what adds it to slabs."""
        return Offsetting(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """A wide slab, and the cast."""
        return self.inner.slab_bytes(elements, self.wide) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """What is added to what."""
        return {"shifted": self.inner.describe(), "number": self.number}


@dataclass(frozen=True, slots=True)
class Offsetting(Plain):
    """A tensor that a number is added to."""

    made: Offset
    inner: Ready

    @property
    def dtype(self) -> str:
        """That of what it is added to."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span with the number added."""
        slab = self.inner.slab(span, work, self.made.wide).add_(self.made.number)
        return slab if dtype == self.made.wide else work.take((span.size,), dtype).copy_(slab)
