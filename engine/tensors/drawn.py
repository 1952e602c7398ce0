"""Tensors that no file holds: drawn at random by position, filled with one value, or given by a task before.

Noise on a stored weight, as for experts of one origin, stands here too: it is drawn in the same way.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Expression, Leaf, Read
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.low_rank import Changed
from mergemill.engine.tensors.normal import NORMAL_BYTES, draw_normal
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import draw_uniform
from mergemill.engine.tensors.rounds import Plain, Ready
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Arena, Workspace, aligned, bytes_of

Law = Literal["normal", "uniform"]


class _Unread(Leaf):
    """What these have in common: nothing is read."""

    __slots__ = ()

    dtype: str

    def reads(self, span: Span) -> Iterator[Read]:
        """Nothing is read from storage."""
        return iter(())

    def suits_device(self, device: str) -> bool:
        """It is made on the CPU."""
        return False

    def read(self, span: Span, work: Workspace) -> Arena:
        """Return the span's bytes."""
        return bytes_of(self.slab(span, work, self.dtype))


@dataclass(frozen=True, slots=True)
class Drawn(_Unread):
    """Rows of random numbers: each row, of a number of its own, is N(0, scale²), or uniform from -scale to scale.

    An element's number hangs on seed, name, row and column, and on nothing else.
    """

    seed: int
    name: str  # that the numbers are keyed by
    rows: tuple[int, ...]  # the number of each row; two of one number are equal
    columns: int
    law: Law
    scale: float
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return len(self.rows), self.columns

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements as `dtype`."""
        wide = work.take((span.size,), "F64")
        at = span.start
        while at < span.stop:
            row, column = divmod(at, self.columns)
            stop = min(span.stop, (row + 1) * self.columns)
            place = Place(self.name, (self.columns,), self.seed, (self.rows[row],), column)
            self._draw(place, self.rows[row], wide[at - span.start : stop - span.start])
            at = stop
        wide.mul_(self.scale)
        return wide if dtype == "F64" else work.take((span.size,), dtype).copy_(wide)

    def _draw(self, place: Place, row: int, out: Tensor) -> None:
        if self.law == "normal":
            draw_normal(place, row, out)
        else:
            draw_uniform(place, row, out).mul_(2.0).sub_(1.0)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The numbers in float64, the cast, and what drawing takes."""
        return aligned(elements * 8) + 2 * aligned(elements * item_bytes(dtype)) + NORMAL_BYTES

    def describe(self) -> Mapping[str, Any]:
        """All that the numbers hang on."""
        return {"drawn": [self.seed, self.name, list(self.rows), self.columns, self.law, self.scale]}


@dataclass(frozen=True, slots=True)
class Filled(_Unread):
    """One value everywhere, as a bias that a model lacks is 0."""

    value: float
    shape: tuple[int, ...]
    dtype: str

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements as `dtype`."""
        return work.take((span.size,), dtype).fill_(self.value)

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The slab, and its bytes."""
        return 2 * aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The value and the shape."""
        return {"filled": self.value, "shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class Given(_Unread):
    """Float32 values that a task computes before the parts that need them, and which are put in then."""

    name: str  # among what is computed
    shape: tuple[int, ...]
    made_of: str  # the digest of what they are computed from
    rows: tuple[int, ...] = ()  # which rows of what is computed, in this order; none: as it is
    values: bytes | None = None
    dtype: str = "F32"

    def put(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> "Given":
        """Return it with its values, of which only the rows that it has are kept."""
        kept = values[list(self.rows)] if self.rows else values
        return Given(self.name, self.shape, self.made_of, self.rows, np.ascontiguousarray(kept, "<f4").tobytes())

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span's elements as `dtype`."""
        assert self.values is not None, "put in before the part is merged"
        found = np.frombuffer(self.values, "<f4", span.size, 4 * span.start)
        return work.take((span.size,), dtype).copy_(torch.from_numpy(found.copy()))

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The values, which came with the task, and the slab."""
        return 3 * 4 * self.size + 2 * aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """What they are computed from."""
        return {"given": self.name, "of": self.made_of, "rows": list(self.rows), "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Noisy(Changed):
    """A weight with noise, ``factor · (weight + scale · N(0, 1))``, in float32; one number for each element."""

    weight: Expression
    scale: float  # standard deviation; 0: no noise
    factor: float
    seed: int
    name: str  # that the numbers are keyed by: of the weight in the output
    number: int  # and of the expert

    def get_ready(self, inputs: tuple[Ready, ...]) -> Ready:
        """Return what adds noise to slabs of the weight."""
        return AddedNoise(self, inputs[0])

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The weight's slab in float32, the numbers in float64 and float32, and the cast."""
        own = aligned(elements * 8) + aligned(elements * 4) + NORMAL_BYTES if self.scale else 0
        return self.weight.slab_bytes(elements, "F32") + own + 2 * aligned(elements * item_bytes(dtype))

    def describe(self) -> Mapping[str, Any]:
        """The weight and what is done to it; of no noise, nothing that it hangs on."""
        noise = [self.scale, self.seed, self.name, self.number] if self.scale else []
        return {"noisy": self.weight.describe(), "noise": noise, "factor": self.factor}


@dataclass(frozen=True, slots=True)
class AddedNoise(Plain):
    """The slabs of a weight with noise added."""

    made: Noisy
    weight: Ready

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`."""
        made, slab = self.made, self.weight.slab(span, work, "F32")
        if made.scale:
            place = Place(made.name, made.shape, made.seed, (made.number,), span.start)
            noise = draw_normal(place, made.number, work.take((span.size,), "F64")).mul_(made.scale)
            slab.add_(work.take((span.size,), "F32").copy_(noise))
        slab.mul_(made.factor)
        return slab if dtype == "F32" else work.take((span.size,), dtype).copy_(slab)


def find_given(expression: Expression) -> Iterator[Given]:
    """Yield what an expression is given by a task before: itself, or some of what it is made of."""
    if isinstance(expression, Given):
        yield expression
    else:
        yield from itertools.chain.from_iterable(map(find_given, expression.inputs))
