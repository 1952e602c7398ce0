"""An adapter's change to a weight: W + s · (left · right), made slab by slab, so that no merged copy is ever anywhere.

The two factors are small and held whole; of W a slab reads its own elements and no others. An element's products are
added in float32 in the order of the ranks (`adapted.c`; torch does the same), so the bits hang on no slab, no worker
and no processor.

Native loops are given the weight as it is stored, and the factors (2026-11-30): they make of them the chunk that they
merge, and a sample makes no more than its elements. Nothing is kept from pass to pass: at rank 16 an element's product
takes as long as reading a kept one from memory.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors import native, structures
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, item_bytes
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.stored import ADAPTED, LOWERED, STORED_DTYPES, call_checked
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, tensor_of

_PAIR = 16  # columns whose products native loops make at once, as adapted.c has it
_GROUPS = 4, 16  # rows whose products lie together, where the right factor fits into a core's cache, and where not
_NEAR = 1 << 17  # floats that fit


@dataclass(frozen=True, slots=True)
class Factor:
    """A small matrix of an adapter as one of the two factors of a product: where its elements lie among those stored.

    Element (side, rank) of batch b is number ``start + b·along_batch + side·along_side + rank·along_rank``, where a
    side is a row of the weight for the left factor, and a column for the right one.
    """

    stored: Leaf
    along_side: int
    along_rank: int
    along_batch: int = 0
    start: int = 0

    def holds(self) -> Iterator[Read]:
        """Yield the whole of what is stored."""
        return self.stored.reads(Span(0, self.stored.size))

    def decode(self, work: Workspace, dtype: str) -> Tensor:
        """Return all that is stored, decoded to `dtype`."""
        return self.stored.slab(Span(0, self.stored.size), work, dtype)

    def view(self, decoded: Tensor, batch: int, first: int, count: int, rank: int) -> Tensor:
        """Return the elements of `count` sides among what `decode` gave as ``[count, rank]``."""
        at = decoded.storage_offset() + self.begin(batch) + first * self.along_side
        return decoded.as_strided((count, rank), (self.along_side, self.along_rank), at)

    def begin(self, batch: int) -> int:
        """Return the number of a batch's first element."""
        return self.start + batch * self.along_batch

    def lower(self, work: Workspace) -> structures.NativeFactor:
        """Return it as native loops take it; the memory is the workspace's."""
        whole = Span(0, self.stored.size)
        data, dtype = self.stored.lower(whole, work) if self.stored.is_plain else Plain.lower(self.stored, whole, work)
        places = (self.stored.size, self.start, self.along_side, self.along_rank, self.along_batch)
        return structures.NativeFactor(data.ctypes.data, STORED_DTYPES[dtype], *places)

    def describe(self) -> list[Any]:
        """What is stored, and where in it the elements lie."""
        return [self.stored.describe(), self.start, self.along_batch, self.along_side, self.along_rank]


class Changed(Expression):
    """A weight of which small stored tensors change the values, and nothing else."""

    __slots__ = ()

    weight: Expression

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The weight."""
        return (self.weight,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.weight.shape

    @property
    def dtype(self) -> str:
        """The weight's: an adapter that was trained in float32 makes no float32 model."""
        return self.weight.dtype


@dataclass(frozen=True, slots=True)
class LowRank(Changed):
    """A weight and, on top of it, ``scale · left · right``; of several matrices, each its own."""

    weight: Expression
    left: Factor
    right: Factor
    rank: int
    scale: float
    rows: int  # of one matrix
    columns: int

    @property
    def size_of_one(self) -> int:
        """The number of elements of one matrix."""
        return self.rows * self.columns

    def holds(self, span: Span) -> Iterator[Read]:
        """Yield what the weight holds, and both factors."""
        return itertools.chain(self.weight.holds(span), self.left.holds(), self.right.holds())

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what adds the product to slabs of the weight."""
        return AddedProduct(self, inputs[0])

    @property
    def is_lowered(self) -> bool:
        """Native loops add the product where they take the weight, if they take that as it is stored."""
        return native.load() is not None and self.weight.is_lowered

    @property
    def is_lowered_whole(self) -> bool:
        """The room hangs on rows and columns alone."""
        return native.load() is not None and self.weight.is_lowered_whole

    def lowered_bytes(self, elements: int) -> int:
        """The weight as it is, and room for the right factor and the products of some rows."""
        if native.load() is None:
            return self.slab_bytes(elements, "F32")
        factors = sum(map(_lowered_bytes, (self.left, self.right)))
        return self.weight.lowered_bytes(elements) + aligned(4 * self.room_floats) + factors

    @property
    def room_floats(self) -> int:
        """What native loops need room for."""
        return -(-self.columns // _PAIR) * _PAIR * (self.rank + self.group) + self.group * self.rank

    @property
    def group(self) -> int:
        """Rows whose products native loops make together."""
        return _GROUPS[self.columns * self.rank > _NEAR]

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The slab, what native loops are given for it, and the cast; without them, all that is multiplied."""
        wide = "F64" if dtype == "F64" else "F32"
        made = aligned(elements * item_bytes(wide)) + aligned(elements * item_bytes(dtype))
        if native.load() is not None and wide == "F32":
            return self.lowered_bytes(elements) + made
        rows = min(self.rows, elements // self.columns + 2)
        own = sum(each.stored.slab_bytes(each.stored.size, wide) for each in (self.left, self.right))
        own += 2 * aligned(rows * self.columns * item_bytes(wide))
        return self.weight.slab_bytes(elements, wide) + made + own

    def describe(self) -> Mapping[str, Any]:
        """The weight, the factors and the scale."""
        factors = [self.left.describe(), self.right.describe()]
        return {"low_rank": [self.weight.describe(), *factors, self.rank, self.scale, self.rows, self.columns]}


@dataclass(frozen=True, slots=True)
class AddedProduct(Plain):
    """The slabs of a weight with the product of the factors added."""

    made: LowRank
    weight: Ready

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the weight as it is and the factors, where there are native loops."""
        if not self._suits_native(work) or not span.size:
            return Plain.lower(self, span, work)
        made, (data, dtype) = self.made, self.weight.lower(span, work)
        left, right = made.left.lower(work), made.right.lower(work)
        room, there = work.take_bytes(4 * made.room_floats), np.array([-1, -1], np.int64)
        lowered = structures.NativeAdapted(
            weight=data.ctypes.data,
            dtype=LOWERED[dtype],
            scale=made.scale,
            start=span.start,
            rows=made.rows,
            columns=made.columns,
            rank=made.rank,
            group=made.group,
            left=left,
            right=right,
            room=room.ctypes.data,
            floats=made.room_floats,
            there=there.ctypes.data,
        )
        lowered.alive = (data, room, there)
        return np.frombuffer(memoryview(lowered), np.uint8), ADAPTED

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span, added up in float32, or in float64 where that is asked for, as `dtype`."""
        wide = "F64" if dtype == "F64" else "F32"
        if wide == "F32" and self._suits_native(work) and span.size:
            slab = tensor_of(self._make(span, work)).view(torch.float32)
        else:
            slab = self._add(self.weight.slab(span, work, wide), span, work, wide)
        return slab if dtype == wide else work.take((span.size,), dtype).copy_(slab)

    @staticmethod
    def _suits_native(work: Workspace) -> bool:
        return work.lanes is None and native.load() is not None

    def _make(self, span: Span, work: Workspace) -> Arena:
        """Return the span as float32, made by native loops."""
        out, (data, dtype) = work.take_bytes(4 * span.size), self.lower(span, work)
        call_checked("decode", data.ctypes.data, LOWERED[dtype], span.size, out.ctypes.data)
        return out

    def _split(self, span: Span) -> Iterator[tuple[int, Span]]:
        """Yield the matrices that the span touches, each by its number and with its share of the span."""
        size = self.made.size_of_one
        for batch in range(span.start // size, -(-span.stop // size)):
            yield batch, Span(max(span.start, batch * size), min(span.stop, (batch + 1) * size))

    def _add(self, slab: Tensor, span: Span, work: Workspace, dtype: str) -> Tensor:
        made = self.made
        both = made.left.decode(work, dtype), made.right.decode(work, dtype)
        room = min(made.rows, span.size // made.columns + 2) * made.columns
        total, one = work.take((room,), dtype), work.take((room,), dtype)
        scale = torch.tensor(made.scale, dtype=TORCH_DTYPES[dtype])
        for batch, part in self._split(span):
            start = part.start - batch * made.size_of_one
            first, rows = start // made.columns, (start + part.size - 1) // made.columns + 1 - start // made.columns
            left = made.left.view(both[0], batch, first, rows, made.rank)
            right = made.right.view(both[1], batch, 0, made.columns, made.rank)
            products = total[: rows * made.columns].view(rows, made.columns).zero_()
            for k in range(made.rank):
                products.add_(
                    torch.mul(left[:, k, None], right[None, :, k], out=one[: rows * made.columns].view_as(products))
                )
            begin = start - first * made.columns
            here = slab[part.start - span.start : part.stop - span.start]
            here.add_(total[begin : begin + part.size].mul_(scale))
        return slab


def _lowered_bytes(factor: Factor) -> int:
    """What native loops are given for a factor: nothing beside what is held, unless they do not know its dtype."""
    return 0 if factor.stored.is_plain else factor.stored.slab_bytes(factor.stored.size, "F32")
