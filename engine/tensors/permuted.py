"""A tensor that is stored with its axes in another order: a transposed matrix, an image's channels last.

It is read as it lies, in ranges as any other, and put in order in the workspace. What a cut never divides is the part
of it in which elements change places: all after the leading axes that stand in both orders first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, join_blocks
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@dataclass(frozen=True, slots=True)
class Permuted(Expression):
    """A tensor whose elements another has in the order of other axes."""

    stored: Expression  # its shape is `shape` in the order of `axes`
    axes: tuple[int, ...]  # of this tensor, as the elements of `stored` go by them, from the slowest

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes in their own order."""
        return tuple(self.stored.shape[self.axes.index(axis)] for axis in range(len(self.axes)))

    @property
    def dtype(self) -> str:
        """That of what is stored."""
        return self.stored.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What is stored."""
        return (self.stored,)

    @property
    def kept_axes(self) -> int:
        """How many leading axes are in their place."""
        return next((i for i, axis in enumerate(self.axes) if axis != i), len(self.axes))

    @property
    def block(self) -> int:
        """Its own, as the data are read as they lie."""
        return join_blocks([self.own_block, self.stored.block], self.size)

    @property
    def own_block(self) -> int:
        """All of the axes that are not."""
        return max(1, math.prod(self.shape[self.kept_axes :]))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what puts slabs in order."""
        return Reordering(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """What is stored, decoded, and the same in order."""
        return self.stored.slab_bytes(elements, dtype) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """What is stored, and the order."""
        return {"permuted": self.stored.describe(), "axes": list(self.axes)}


@dataclass(frozen=True, slots=True)
class Reordering(Plain):
    """A permuted tensor whose elements are there."""

    permuted: Permuted
    stored: Ready

    @property
    def dtype(self) -> str:
        """That of what is stored."""
        return self.permuted.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span, which begins and ends at multiples of a block, in order."""
        kept, axes, shape = self.permuted.kept_axes, self.permuted.axes, self.permuted.shape
        inner = [axis - kept for axis in axes[kept:]]
        count = span.size // self.permuted.own_block
        found = self.stored.slab(span, work, dtype).view(count, *(shape[axis] for axis in axes[kept:]))
        places = [0, *(1 + inner.index(axis) for axis in range(len(inner)))]
        ordered = work.take((span.size,), dtype)
        ordered.view(count, *shape[kept:]).copy_(found.permute(places))
        return ordered
