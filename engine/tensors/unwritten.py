"""A tensor of a merge that is written nowhere: another merge takes it slab by slab, as if it read a file of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Read
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@dataclass(frozen=True, slots=True)
class Unwritten(Expression):
    """What would be written as `dtype`: given as it was computed, or `rounded` as the file would have it."""

    made: Expression
    dtype: str
    rounded: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.made.shape

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return (self.made,)

    @property
    def is_merged(self) -> bool:
        """As what it is made of is."""
        return self.made.is_merged

    @property
    def made_with(self) -> object:
        """As of what it is made of."""
        return self.made.made_with

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what gives it: nothing is between, where nothing is rounded."""
        (made,) = inputs
        return Rounding(made, self.dtype) if self.rounded else made

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """What it is made of; where it is rounded, its bytes, and what they are decoded to."""
        if not self.rounded:
            return self.made.slab_bytes(elements, dtype)
        rounded, decoded = (aligned(elements * item_bytes(each)) for each in (self.dtype, dtype))
        return self.made.slab_bytes(elements, self.dtype) + rounded + decoded

    def makes_natively(self, dtype: str) -> bool:
        """As what it is made of."""
        return not self.rounded and self.made.makes_natively(dtype)

    def device_bytes(self, elements: int, dtype: str) -> tuple[int, int]:
        """As of what it is made of."""
        return self.made.device_bytes(elements, dtype)

    def find_read(self, span: Span, dtype: str) -> Read | None:
        """As of what it is made of: a rounded copy is in the file as it was."""
        return self.made.find_read(span, dtype) if dtype == self.dtype else None

    def describe(self) -> Mapping[str, Any]:
        """What it is made of, and how it is rounded, where it is."""
        made = self.made.describe()
        return {"rounded": self.dtype, "made": made} if self.rounded else made


@dataclass(frozen=True, slots=True)
class Rounding(Plain):
    """A tensor of which every slab is cast to a dtype and back."""

    made: Ready
    dtype: str

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as it would be read from a file of that dtype."""
        return work.take((span.size,), dtype).copy_(self.made.slab(span, work, self.dtype))
