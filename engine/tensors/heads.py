"""The rows of queries and keys in another order: the two halves of each head one after the other, or interleaved.

Rotary embeddings turn pairs of elements. In Hugging Face's Llama a pair is one row of each half of a head; in GGUF,
as in Meta's own, the two rows stand beside each other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Leaf
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned


@dataclass(frozen=True, slots=True)
class Interleaved(Expression):
    """A tensor ``[heads · rows, …]`` with the rows of each head in another order."""

    inner: Expression
    heads: int
    to_halves: bool = False  # whether what is interleaved is taken apart

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
        """What is put in order."""
        return (self.inner,)

    @property
    def own_block(self) -> int:
        """A head."""
        return max(1, self.size // self.heads)

    @property
    def block(self) -> int:
        """Whole heads, and what is inside; of what is there, any will do."""
        others = 1 if isinstance(self.inner, Leaf) else self.inner.block
        return max(1, min(math.lcm(self.own_block, others), self.size))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what puts slabs in order."""
        return Interleaving(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Both orders."""
        return self.inner.slab_bytes(elements, dtype) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """What is put in which order."""
        return {"interleaved": self.inner.describe(), "heads": self.heads, "to_halves": self.to_halves}


@dataclass(frozen=True, slots=True)
class Interleaving(Plain):
    """A tensor whose rows are there."""

    made: Interleaved
    inner: Ready

    @property
    def dtype(self) -> str:
        """That of what is put in order."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span, which begins and ends at whole heads, in order."""
        heads, (first, second), columns = self._find_sides(span)
        found = self.inner.slab(span, work, dtype, watch).view(heads, first, second, columns)
        ordered = work.take((span.size,), dtype)
        ordered.view(heads, second, first, columns).copy_(found.transpose(1, 2))
        return ordered

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the same as the inner one is lowered, where that is one value after the other: torch is not needed."""
        inner = self.inner
        if not isinstance(inner, Leaf) or (inner.is_lowered and not inner.is_plain):
            return Plain.lower(self, span, work)
        found, dtype = inner.lower(span, work)
        heads, (first, second), columns = self._find_sides(span)
        ordered = work.take_bytes(found.size)
        of_bytes = columns * item_bytes(dtype)
        ordered.reshape(heads, second, first, of_bytes)[:] = found.reshape(heads, first, second, of_bytes).swapaxes(
            1, 2
        )
        return ordered, dtype

    def _find_sides(self, span: Span) -> tuple[int, tuple[int, int], int]:
        """Return heads, what their rows are taken apart into, and columns."""
        columns = math.prod(self.made.shape[1:])
        half = self.made.own_block // columns // 2
        return span.size // self.made.own_block, (half, 2) if self.made.to_halves else (2, half), columns
