"""Lazy tensor expressions: what an output tensor is made of, known from headers alone.

An expression knows its `shape` and `dtype`, what it will read for a span of its elements, and gives those elements
when asked. It is a frozen value that pickles in a few hundred bytes; none but `Held` ever holds a tensor.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mergemill.engine.errors import MergeError
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import NAMES, TORCH_DTYPES, item_bytes
from mergemill.engine.tensors.exact import ExactSum, sum_products
from mergemill.engine.tensors.kernels import Gather, Kernel, Partial, advance
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.workspace import Workspace, aligned


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

    @property
    def block(self) -> int:
        """Any will do."""
        return BLOCK

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's one range."""
        item = item_bytes(self.dtype)
        yield Read(self.pin, self.offset_bytes + span.start * item, span.size * item)

    def read(self, span: Span, work: Workspace) -> Tensor:
        """Return the span's bytes, flat uint8, not to be changed."""
        (wanted,) = self.reads(span)
        return work.read(wanted.pin, wanted.offset_bytes, wanted.size_bytes)

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the span decoded to `dtype`."""
        stored = self.read(span, work).view(TORCH_DTYPES[self.dtype])
        return work.take((span.size,), dtype).copy_(stored)

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
        agreed = self.read(span, work).view(TORCH_DTYPES[self.dtype])
        return work.take((span.size,), dtype).copy_(agreed)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Every input as stored, and one decoded."""
        raw = len(self.inputs) * aligned(elements * item_bytes(self.dtype))
        return raw + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The inputs."""
        return {"agreed": [stored.describe() for stored in self.inputs]}


@dataclass(frozen=True, slots=True)
class Difference:
    """One expression less another: the task vector of a model that has a base of its own."""

    model: Expression
    base: Expression

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both."""
        return self.model.shape

    @property
    def dtype(self) -> str:
        """The model's dtype."""
        return self.model.dtype

    @property
    def block(self) -> int:
        """What suits both."""
        return max(self.model.block, self.base.block)

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's ranges in both."""
        yield from self.model.reads(span)
        yield from self.base.reads(span)

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the difference, taken in `dtype`."""
        return self.model.evaluate(span, work, dtype).sub_(self.base.evaluate(span, work, dtype))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """Both, decoded."""
        return self.model.slab_bytes(elements, dtype) + self.base.slab_bytes(elements, dtype)

    def describe(self) -> Mapping[str, Any]:
        """Both."""
        return {"difference": [self.model.describe(), self.base.describe()]}


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge method over other expressions."""

    kernel: Kernel
    inputs: tuple[Expression, ...]  # the base, where there is one, comes first
    has_base: bool
    settings: Mapping[str, Any]  # the method's parameters for this tensor
    place: Place
    dtype: str  # to accumulate in: F32 or F64
    factors: tuple[float, ...] = ()  # on each task vector, before the method; none: all 1
    vectors: tuple[int, ...] = ()  # which of the merge's task vectors each is, where factors follow from their norms

    @property
    def shape(self) -> tuple[int, ...]:
        """The inputs' common shape."""
        return self.place.shape

    @property
    def block(self) -> int:
        """As the method needs it."""
        return self.place.block

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield the span's ranges in every input."""
        for source in self.inputs:
            yield from source.reads(span)

    def advance(self, totals: Sequence[Partial]) -> tuple[Gather | None, Any]:
        """Return what the next round gathers from each slab; None and the statistics when all is known."""
        if not self.place.size:
            return None, None  # of no elements nothing can be known, nor need be
        return advance(self.kernel, self.place, self.settings, self.dtype, totals)

    def rounds(self) -> int:
        """How many rounds of statistics must precede the combination, at most."""
        return 0 if self.advance(())[0] is None else self.kernel.most_rounds

    def gather(self, gather: Gather, span: Span, work: Workspace) -> Partial:
        """Return what one round gathers from one slab."""
        tensors, _ = self._load(span, work)
        return gather(tensors, self.place.at(span.start))

    def combine(self, statistics: Any, span: Span, work: Workspace, watch: Watch | None = None) -> Tensor:
        """Return the merged slab, flat, in the dtype of the accumulation; `watch` sees it and its inputs."""
        tensors, base = self._load(span, work, watch)
        merged = self.kernel.combine(tensors, base, statistics, self.place.at(span.start), self.settings)
        if watch is not None:
            watch.compare(merged)
        return merged

    def evaluate(self, span: Span, work: Workspace, dtype: str) -> Tensor:
        """Return the merged slab of a method that needs no statistics, as `dtype`."""
        result = self.combine(None, span, work)
        return result if dtype == self.dtype else work.take((span.size,), dtype).copy_(result)

    def with_factors(self, factors: Sequence[float]) -> "Merged":
        """Return the expression with its share of the factors that all the merge's task vectors have."""
        return replace(self, factors=tuple(factors[vector] for vector in self.vectors))

    def gather_squares(self, count: int, span: Span, work: Workspace) -> Partial:
        """Return the slab's share of the squared norms of the merge's `count` task vectors."""
        tensors, _ = self._load(span, work)
        squares = [ExactSum() for _ in range(count)]
        for vector, tensor in zip(self.vectors, tensors, strict=True):
            squares[vector] += sum_products(tensor, tensor, self.place.block)
        return tuple(squares)

    def _load(self, span: Span, work: Workspace, watch: Watch | None = None) -> tuple[list[Tensor], Tensor | None]:
        tensors = [source.evaluate(span, work, self.dtype) for source in self.inputs]
        base = tensors.pop(0) if self.has_base else None
        if base is not None and self.kernel.takes_deltas:
            for source, tensor in zip(self.inputs[1:], tensors, strict=True):
                if not isinstance(source, Difference):
                    tensor.sub_(base)
        if watch is not None:
            watch.look(tensors, base)  # as the models are: what large factors make of them is growth
        for tensor, factor in zip(tensors, self.factors, strict=bool(self.factors)):
            if factor != 1.0:
                tensor.mul_(factor)
        return tensors, base

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The inputs' slabs, and what kernels and statistics allocate beside them."""
        inputs = sum(source.slab_bytes(elements, self.dtype) for source in self.inputs)
        slabs = self.kernel.extra_slabs + self.kernel.extra_slabs_each * len(self.inputs)
        beside = slabs * aligned(elements * item_bytes("F64"))
        return inputs + beside + self.kernel.extra_bytes * len(self.inputs) + aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The method, its settings, where its random numbers come from, and its inputs."""
        return {
            "merged": self.kernel.name,
            "settings": dict(self.settings),
            "seed": [self.place.seed, self.place.tensor, *self.place.models],
            "base": self.has_base,
            "dtype": self.dtype,
            "inputs": [source.describe() for source in self.inputs],
            **({"factors": list(self.factors)} if self.factors else {}),
            **({"vectors": list(self.vectors)} if self.vectors else {}),
        }


def input_bytes(expression: Expression) -> int:
    """Return how many bytes of the sources one pass over the whole expression reads."""
    return sum(read.size_bytes for read in expression.reads(Span(0, math.prod(expression.shape))))
