"""Several tensors that one computation gives: each is an expression, and a task that writes them computes them once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Read
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


class Computation(Protocol):
    """What gives several tensors of whole inputs; a frozen value that all its `Component`s share."""

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What it is given, whole."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors that it gives."""

    @property
    def dtype(self) -> str:
        """In which it is given its inputs, and gives its results."""

    @property
    def extra_bytes(self) -> int:
        """What it may allocate beside its inputs and results."""

    def compute(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Return the tensors; the inputs, flat, may be overwritten."""

    def describe(self) -> Mapping[str, Any]:
        """Return what the results depend on beside the inputs, as JSON."""


@dataclass(frozen=True, slots=True)
class Component(Expression):
    """One of the tensors of a computation."""

    computation: Computation
    number: int

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """Those of the computation."""
        return self.computation.inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """As the computation says."""
        return self.computation.shapes[self.number]

    @property
    def dtype(self) -> str:
        """As the computation says."""
        return self.computation.dtype

    @property
    def block(self) -> int:
        """The whole tensor."""
        return max(1, self.size)

    @property
    def made_with(self) -> object:
        """The computation: what it gives is best written by one task."""
        return self.computation

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield all that the computation reads, whatever the span."""
        for each in self.inputs:
            yield from each.reads(Span(0, each.size))

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield all that the computation's inputs need whole."""
        for each in self.inputs:
            yield from each.holds(Span(0, each.size))

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what computes all components once."""
        return Computed(self.dtype, self, inputs)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The inputs whole, all results, and what the computation takes beside."""
        item = item_bytes(self.dtype)
        inputs = sum(each.slab_bytes(each.size, self.dtype) for each in self.inputs)
        results = sum(aligned(Component(self.computation, i).size * item) for i in range(len(self.computation.shapes)))
        return inputs + results + self.computation.extra_bytes + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The computation, its inputs, and which of its tensors this is."""
        computed = {"computed": self.computation.describe(), "number": self.number}
        return {**computed, "inputs": [each.describe() for each in self.inputs]}


@dataclass(frozen=True, slots=True)
class Computed(Plain):
    """A component of which the inputs are ready."""

    dtype: str
    component: Component
    inputs: tuple[Ready, ...]

    def slab(self, span: Span, work: Workspace, dtype: str, watch: object = None) -> Tensor:
        """Return a copy of the span as `dtype`."""
        computation = self.component.computation

        def compute() -> Sequence[Tensor]:
            sources = zip(self.inputs, computation.inputs, strict=True)
            return computation.compute([each.slab(Span(0, of.size), work, self.dtype) for each, of in sources])

        found = work.results.find(computation, compute)[self.component.number]
        return work.take((span.size,), dtype).copy_(found.reshape(-1)[span.start : span.stop])
