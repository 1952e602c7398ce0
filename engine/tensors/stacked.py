"""Several tensors as one, and a part of one: for layouts that differ in what is stored as one tensor.

Experts that are stored one by one lie one after the other in the tensor that packs them, and so do the rows of
projections that are stored as one: a stack reads ranges of its parts, and a range of what is stored is stored too.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes, promote
from mergemill.engine.tensors.expressions import Expression, Leaf, Read, Stored
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import BLOCK, Span
from mergemill.engine.tensors.stored import STORED_DTYPES
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned

Touched = Iterator[tuple[int, Span]]  # the number of a tensor, and elements of it


@dataclass(frozen=True, slots=True)
class Stacked(Expression):
    """Tensors one after the other, seen flat, under a shape of their own; none of them is empty or has rounds."""

    inputs: tuple[Expression, ...]
    shape: tuple[int, ...]
    dtype: str
    stops: tuple[int, ...]  # where each of the inputs ends, in elements
    kinds: tuple[Expression, ...]  # one of the inputs for each kind that takes memory in its own way
    least: int  # elements of the smallest input

    @property
    def block(self) -> int:
        """Any will do: of an input that is cut at its own blocks alone, whole blocks are asked for."""
        return BLOCK

    def reads(self, span: Span) -> Iterator[Read]:
        """Yield what is read of each tensor that the span touches; of an empty span, of all."""
        touched = self.find(span) if span.size else ((number, Span(0, 0)) for number in range(len(self.inputs)))
        for number, inner in touched:
            each = self.inputs[number]
            yield from each.reads(widen(each, inner))

    def iter_pins(self) -> Iterator[Pin]:
        """The tensors' own."""
        return chain.from_iterable([each.iter_pins() for each in self.inputs])

    def find(self, span: Span) -> Touched:
        """Yield the tensors that the span touches, and which elements of each."""
        number, at = bisect_right(self.stops, span.start), span.start
        while at < span.stop:
            first = self.stops[number - 1] if number else 0
            stop = min(span.stop, self.stops[number])
            yield number, Span(at - first, stop - first)
            number, at = number + 1, stop

    @property
    def takes_matrices(self) -> bool:
        """Whether one of the tensors does."""
        return any(each.takes_matrices for each in self.kinds)

    def count_rounds(self) -> tuple[int, int]:
        """None."""
        return 0, 0

    def suits_device(self, device: str) -> bool:
        """Whether all tensors do."""
        return all(each.suits_device(device) for each in self.kinds)

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what joins the tensors' slabs."""
        return Stacking(self.dtype, self, inputs)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The slab itself, as much of the tensors, and for each that it may touch what its ends take."""
        touched = min(len(self.inputs), elements // self.least + 2)
        whole = max(each.slab_bytes(elements, dtype) for each in self.kinds)
        ends = max(each.slab_bytes(1 if isinstance(each, Leaf) else 2 * each.block, dtype) for each in self.kinds)
        return aligned(elements * item_bytes(dtype)) + whole + touched * ends

    def describe(self) -> Mapping[str, Any]:
        """The tensors, in their order."""
        return {"stacked": [each.describe() for each in self.inputs], "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Stacking(Plain):
    """A stack of which the tensors are ready."""

    dtype: str
    stacked: Stacked
    inputs: tuple[Ready, ...]

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements, flat, as `dtype`."""
        touched = list(self.stacked.find(span))
        if len(touched) == 1:
            return self._slab(*touched[0], work, dtype)
        joined, at = work.take((span.size,), dtype), 0
        for number, inner in touched:
            joined[at : at + inner.size] = self._slab(number, inner, work, dtype)
            at += inner.size
        return joined

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the span as it is, where native loops know the dtype, else as float32."""
        plain = all(each.is_plain for each in self.stacked.kinds)  # what is made of others is not rounded to a dtype
        if not plain or self.dtype not in STORED_DTYPES:
            return Plain.lower(self, span, work)
        return self._join(span, work, self.dtype), self.dtype

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the span's bytes as `dtype`: as they are, or cast."""
        return self._join(span, work, dtype) if dtype == self.dtype else Plain.encode(self, span, work, dtype, watch)

    def _join(self, span: Span, work: Workspace, dtype: str) -> Arena:
        touched = list(self.stacked.find(span))
        if len(touched) == 1:
            return self._encode(*touched[0], work, dtype)
        item = item_bytes(dtype)
        joined, at = work.take_bytes(span.size * item), 0
        for number, inner in touched:
            joined[at : at + inner.size * item] = self._encode(number, inner, work, dtype)
            at += inner.size * item
        return joined

    def _slab(self, number: int, inner: Span, work: Workspace, dtype: str) -> Tensor:
        wide = widen(self.stacked.inputs[number], inner)
        slab = self.inputs[number].slab(wide, work, dtype)
        return slab[inner.start - wide.start : inner.stop - wide.start]

    def _encode(self, number: int, inner: Span, work: Workspace, dtype: str) -> Arena:
        wide, item = widen(self.stacked.inputs[number], inner), item_bytes(dtype)
        encoded = self.inputs[number].encode(wide, work, dtype)
        return encoded[(inner.start - wide.start) * item : (inner.stop - wide.start) * item]


def stack(parts: Sequence[Expression], shape: tuple[int, ...]) -> Expression:
    """Return tensors, in their order, as one of `shape`."""
    sizes = [each.size for each in parts]
    kinds = {(type(each), each.dtype, each.shape): each for each in parts}
    dtype = promote([each.dtype for each in parts])
    return Stacked(tuple(parts), shape, dtype, tuple(accumulate(sizes)), tuple(kinds.values()), min(sizes))


def cut_stored(stored: Stored, shapes: Sequence[tuple[int, ...]]) -> list[Stored]:
    """Return the tensors of `shapes` that a stored one is the stack of."""
    cut, offset_bytes = [], stored.offset_bytes
    for shape in shapes:
        part = replace(stored, offset_bytes=offset_bytes, shape=shape)
        cut.append(part)
        offset_bytes += part.size * item_bytes(part.dtype)
    return cut


def widen(expression: Expression, span: Span) -> Span:
    """Return a span that an expression can give: a tensor that is there gives any, another one whole blocks."""
    if isinstance(expression, Leaf):
        return span
    block = expression.block
    return Span(span.start // block * block, min(-(-span.stop // block) * block, expression.size))
