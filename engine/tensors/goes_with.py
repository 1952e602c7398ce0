"""A tensor of another shape that is read whole with every span of the one that it goes with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.expressions import Expression, Read
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace


@dataclass(frozen=True, slots=True)
class GoesWith(Expression):
    """A tensor that goes with one of `shape`, which is worked on whole: any span of it is all of what is inside."""

    inside: Expression
    shape: tuple[int, ...]
    scratch_bytes: int = 0  # what is made of it and the others like it

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What is inside."""
        return (self.inside,)

    @property
    def dtype(self) -> str:
        """Its own."""
        return self.inside.dtype

    @property
    def block(self) -> int:
        """All that it goes with."""
        return max(1, self.size)

    @property
    def own_block(self) -> int:
        """All that it goes with."""
        return max(1, self.size)

    def iter_blocks(self) -> Iterator[int]:
        """Yield that alone: its input's spans are none of it."""
        yield self.own_block

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield all of it; of no span, the files alone."""
        return self.inside.reads(Span(0, self.inside.size) if span.size else span)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what gives all of it."""
        return GivenWhole(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """All of it, whatever the slab, and what is made of it."""
        return self.inside.slab_bytes(self.inside.size, dtype) + self.scratch_bytes

    def suits_device(self, device: str) -> bool:
        """A device's slabs are counted in what it goes with, so it stays with the CPU."""
        return False

    def describe(self) -> Mapping[str, Any]:
        """What is inside, and what it goes with."""
        return {"beside": self.inside.describe(), "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class GivenWhole(Plain):
    """A tensor that is given whole with every slab."""

    made: GoesWith
    inside: Ready

    @property
    def dtype(self) -> str:
        """Its own."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return all of it, flat."""
        return self.inside.slab(Span(0, self.made.inside.size), work, dtype)
