"""Lazy tensor expressions: what an output tensor is made of, known from headers alone.

An expression knows its `shape` and `dtype`, what it will read for a span of its elements, and gives those elements
when asked. It is a frozen value that pickles in a few hundred bytes; none but `Held` ever holds a tensor.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mergemill.engine.errors import MergeError
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.dtypes import NAMES, item_bytes
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of one stored file."""

    pin: Pin
    offset_bytes: int
    size_bytes: int


class Expression(Protocol):
    """A tensor that can be had, span by span."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""

    @property
    def dtype(self) -> str:
        """The dtype that the expression has by itself, by its safetensors name."""

    @property
    def block(self) -> int:
        """Elements at whose multiples it may be cut into spans."""

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what one evaluation of `span` reads."""

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the span's elements, flat, as `dtype`, in memory that the caller may overwrite."""

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """An upper bound of what `evaluate` takes for a slab: of the workspace and of memory beside it."""

    def describe(self) -> Mapping[str, Any]:
        """Return what the expression's value depends on, as JSON: it goes into the plan's digest."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a safetensors file."""

    pin: Pin
    offset_bytes: int  # of the first element, from the start of the file
    dtype: str
    shape: tuple[int, ...]
    read_from: Pin | None = None  # a file with the same content that is read instead

    @property
    def block(self) -> int:
        """Any will do."""
        return BLOCK

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's one range."""
        item = item_bytes(self.dtype)
        yield Read(self.read_from or self.pin, self.offset_bytes + span.start * item, span.size * item)

    def read(self, span: Span, work: Workspace) -> Tensor:
        """Return the span's bytes, flat uint8, not to be changed."""
        (wanted,) = self.reads(span)
        return work.read(wanted.pin, wanted.offset_bytes, wanted.size_bytes)

    def read_array(self, span: Span, work: Workspace) -> Arena:
        """Return the span's bytes as an array, not to be changed."""
        (wanted,) = self.reads(span)
        return work.read_array(wanted.pin, wanted.offset_bytes, wanted.size_bytes)

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the span decoded to `dtype`."""
        return work.decode(self.read(span, work), self.dtype, dtype)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Bytes as stored and bytes decoded."""
        return aligned(elements * item_bytes(self.dtype)) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The file as pinned, and the place in it."""
        pin = [self.pin.url, self.pin.size_bytes, self.pin.stamp]
        return {"stored": pin, "at": self.offset_bytes, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor in this process's memory, on any device and with any strides; copied span by span, never changed."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """The tensor's dtype."""
        return NAMES[self.tensor.dtype]

    @property
    def block(self) -> int:
        """Any will do."""
        return BLOCK

    def reads(self, span: Span) -> Iterator[Read]:
        """Nothing is read from storage."""
        return iter(())

    def read(self, span: Span, work: Workspace) -> Tensor:
        """Return the span's bytes, flat uint8, not to be changed."""
        return self._slice(span).cpu().contiguous().view(torch.uint8)

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return a copy of the span as `dtype`."""
        return work.take((span.size,), dtype).copy_(self._slice(span))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The copy; the tensor itself is there already."""
        return aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """Its kind alone: a tensor in memory goes into no digest."""
        return {"held": list(self.shape), "dtype": self.dtype}

    def _slice(self, span: Span) -> Tensor:
        tensor = self.tensor.detach()
        if tensor.is_contiguous():
            return tensor.view(-1)[span.start : span.stop]
        tensor = tensor.squeeze()  # then no more is copied than the entries of the first axis that the span touches
        entry = tensor[0].numel()
        first = span.start // entry
        flat = tensor[first : -(-span.stop // entry)].reshape(-1)
        return flat[span.start - first * entry : span.stop - first * entry]


@dataclass(frozen=True, slots=True)
class Agreed:
    """A buffer that arithmetic does not suit: the same bytes in every input, or an error."""

    tensor: str  # name in the output
    inputs: tuple[Stored | Held, ...]
    models: tuple[str, ...]  # the inputs' models, for the error

    @property
    def shape(self) -> tuple[int, ...]:
        """The inputs' common shape."""
        return self.inputs[0].shape

    @property
    def dtype(self) -> str:
        """The inputs' common dtype."""
        return self.inputs[0].dtype

    @property
    def block(self) -> int:
        """Any will do."""
        return BLOCK

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's range in every input."""
        for stored in self.inputs:
            yield from stored.reads(span)

    def read(self, span: Span, work: Workspace) -> Tensor:
        """Return the bytes on which all inputs agree; `MergeError` names two that do not."""
        first = self.inputs[0].read(span, work)
        for stored, model in zip(self.inputs[1:], self.models[1:], strict=True):
            if not torch.equal(first, stored.read(span, work)):
                raise MergeError(
                    f"{self.tensor}: {self.models[0]} and {model} hold different values, and {self.dtype} "
                    f"tensors are not merged but copied where all models agree"
                )
        return first

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the span's common elements as `dtype`."""
        return work.decode(self.read(span, work), self.dtype, dtype)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Every input as stored, and one decoded."""
        raw = len(self.inputs) * aligned(elements * item_bytes(self.dtype))
        return raw + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The inputs."""
        return {"agreed": [stored.describe() for stored in self.inputs]}


def input_bytes(expression: Expression) -> int:
    """Return how many bytes of the sources one pass over the whole expression reads."""
    return sum(read.size_bytes for read in expression.reads(Span(0, math.prod(expression.shape))))
