"""A tensor of zeros that is stored nowhere: what adapters are put onto where the base's weights are not wanted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Leaf, Read
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, bytes_of


@dataclass(frozen=True, slots=True)
class Nothing(Leaf):
    """Zeros of a shape, float32."""

    shape: tuple[int, ...]
    dtype = "F32"

    @property
    def is_plain(self) -> bool:
        """Native loops know float32."""
        return True

    def reads(self, span: Span) -> Iterator[Read]:
        """Nothing."""
        return iter(())

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return zeros."""
        return bytes_of(self.slab(span, work, "F32"))

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return zeros."""
        return work.take((span.size,), dtype).zero_()

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The slab."""
        return aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """Their shape."""
        return {"zeros": list(self.shape)}
