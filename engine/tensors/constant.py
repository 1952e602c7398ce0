"""A tensor of few numbers that no file holds: what a format stores and another calculates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Leaf, Read
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, tensor_of


@dataclass(frozen=True, slots=True)
class Constant(Leaf):
    """Numbers, as float32."""

    values: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """One axis."""
        return (len(self.values),)

    @property
    def dtype(self) -> str:
        """Float32."""
        return "F32"

    def reads(self, span: Span) -> Iterator[Read]:
        """Nothing is read."""
        return iter(())

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return the span's bytes."""
        return np.array(self.values[span.start : span.stop], "<f4").view(np.uint8)

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`."""
        return work.decode(tensor_of(self.read(span, work)), "F32", dtype)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The numbers, and as they are given."""
        return aligned(4 * elements) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The numbers."""
        return {"constant": list(self.values)}
