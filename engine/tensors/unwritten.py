"""A tensor of a merge that is written nowhere: another merge takes it slab by slab, as if it read a file of it.

Of a stage that several take (a diamond) each slab is made once: the first that asks for it makes it, and the others
find it in the workspace until the next slab. So it is with what its rounds gather. It takes one slab of memory, and
nothing is kept between rounds: there, what is cheap to make again is made again.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.tensors.device import device_aligned
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Read
from mergemill.engine.tensors.kernels import Partial
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, Take
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned


@dataclass(frozen=True, slots=True)
class Unwritten(Expression):
    """What would be written as `dtype`: given as it was computed, or `rounded` as the file would have it."""

    made: Expression
    dtype: str
    rounded: bool
    shared: bool = False
    """Whether several take it, and it is computed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.made.shape

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What it is made of."""
        return (self.made,)

    @property
    def is_merged(self) -> bool:
        """As what it is made of is."""
        return self.made.is_merged

    @property
    def is_watched(self) -> bool:
        """As what it is made of is."""
        return self.made.is_watched

    @property
    def made_with(self) -> object:
        """As of what it is made of."""
        return self.made.made_with

    def rounds(self) -> ExpressionRounds:
        """The rounds of what it is made of; where several take it, each slab of them is gone over once."""
        going, number = Expression.rounds(self), 0
        try:
            asked = next(going)
            while True:
                if self.shared:
                    take = functools.partial(_take_once, (id(self), number), asked.take)
                    asked = Round(take, asked.slabs, asked.whole)
                asked, number = going.send((yield asked)), number + 1
        except StopIteration as finished:
            ready: Ready = finished.value
            return ready

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what gives it: nothing is between, where nothing is rounded and it is taken once."""
        (made,) = inputs
        ready = Rounding(made, self.dtype) if self.rounded else made
        return Sharing(id(self), ready) if self.shared else ready

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """What it is made of; where it is rounded, its bytes, and what they are decoded to; a copy for who comes."""
        shared = aligned(elements * max(4, item_bytes(dtype))) if self.shared else 0
        if not self.rounded:
            return self.made.slab_bytes(elements, dtype) + shared
        rounded, decoded = (aligned(elements * item_bytes(each)) for each in (self.dtype, dtype))
        return self.made.slab_bytes(elements, self.dtype) + rounded + decoded + shared

    def makes_natively(self, dtype: str) -> bool:
        """As what it is made of."""
        return not self.rounded and self.made.makes_natively(dtype)

    def device_bytes(self, elements: int, dtype: str) -> tuple[int, int]:
        """As of what it is made of, and a copy where several take it."""
        lane_bytes, beside_bytes = self.made.device_bytes(elements, dtype)
        shared = device_aligned(elements * max(4, item_bytes(dtype))) if self.shared else 0
        return lane_bytes + shared, beside_bytes

    def find_read(self, span: Span, dtype: str) -> Read | None:
        """As of what it is made of: a rounded copy is in the file as it was."""
        return self.made.find_read(span, dtype) if dtype == self.dtype else None

    def describe(self) -> Mapping[str, Any]:
        """What it is made of, and how it is rounded, where it is."""
        made = self.made.describe()
        return {"rounded": self.dtype, "made": made} if self.rounded else made


@dataclass(frozen=True, slots=True)
class Rounding(Plain):
    """A tensor of which every slab is cast to a dtype and back."""

    made: Ready
    dtype: str

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as it would be read from a file of that dtype."""
        return work.take((span.size,), dtype).copy_(self.made.slab(span, work, self.dtype))


@dataclass(frozen=True, slots=True)
class Sharing:
    """A tensor that several take, of which each slab is made for the first that asks."""

    key: int  # the same for all of them
    made: Ready

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return a copy of the slab."""
        if watch is not None:
            return self.made.slab(span, work, dtype, watch)
        found = work.find_shared((self.key, span, dtype), functools.partial(self.made.slab, span, work, dtype))
        return work.take((span.size,), dtype).copy_(found)

    def lower(self, span: Span, work: Workspace) -> tuple[Arena, str]:
        """Return the slab as float32, which native loops do not change."""
        return work.find_shared((self.key, span), functools.partial(self.made.lower, span, work))

    def encode(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Arena:
        """Return the slab's bytes, as what is shared gives them."""
        return self.made.encode(span, work, dtype, watch)

    def make_watch(self, dtype: str) -> Watch | None:
        """As of what is shared."""
        return self.made.make_watch(dtype)

    @property
    def base(self) -> Ready:
        """That of what is shared."""
        return self.made.base

    def step(self, dtype: str) -> int:
        """As of what is shared."""
        return self.made.step(dtype)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a round gathered up to a slab, and up to the one before."""

    before: Partial
    after: Partial


def _take_once(key: tuple[int, int], take: Take, span: Span, work: Workspace, total: Partial) -> Partial:
    """Return what a round gathers of a slab, added to the total; of equal totals it is gathered once.

    They are the same object, since all that take the tensor begin with none and are given the same.
    """
    known = work.find_shared((*key, span), lambda: _Taken(total, take(span, work, total)))
    same = known.before is total or not (known.before or total)
    return known.after if same else take(span, work, total)
