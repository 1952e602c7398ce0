"""A weight of which some channels are drawn anew, each from the normal distribution of all that are replaced.

Source: Nakamura et al., "Drop-Upcycling", arXiv:2502.19261, section 3: a share of an MLP's intermediate channels, the
same rows of gate and up and columns of down, is drawn from N(mean, std²) of what it replaces in that matrix.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors.channels import Rowwise
from mergemill.engine.tensors.device import to_host
from mergemill.engine.tensors.drift import Watch
from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.exact import ExactSum, exact, sum_rows
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.kernels import Partial, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.normal import NORMAL_BYTES, draw_normal
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import draw_uniform
from mergemill.engine.tensors.rounds import ExpressionRounds, Plain, Ready, Round, join_rounds
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace, aligned


@dataclass(frozen=True, slots=True)
class Redraw:
    """Which channels of an MLP are drawn anew: the same for all of its matrices."""

    seed: int
    mlp: str  # the MLP's name in the output
    number: int  # of the expert
    channels: int  # that it has
    count: int  # of those that are drawn


@functools.lru_cache(maxsize=64)
def pick_channels(redraw: Redraw) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the channels that are drawn anew, ascending."""
    place = Place(f"{redraw.mlp}/channels", (redraw.channels,), redraw.seed, (redraw.number,))
    drawn = draw_uniform(place, redraw.number, torch.empty(redraw.channels, dtype=torch.float64))
    order = np.argsort(drawn.numpy(), kind="stable")
    found: np.ndarray[Any, np.dtype[np.int64]] = np.sort(order[: redraw.count])
    return found


@dataclass(frozen=True, slots=True)
class Redrawn(Rowwise):
    """A matrix ``[rows, columns]`` of which the channels, along `axis`, are drawn anew."""

    weight: Expression
    axis: int  # 0: rows are channels; 1: columns are
    redraw: Redraw
    name: str  # that the numbers are keyed by: of the weight in the output

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
        """The weight's."""
        return self.weight.dtype

    def count_rounds(self) -> tuple[int, int]:
        """The weight's, and one."""
        usual, most = Expression.count_rounds(self)
        return usual + 1, most + 1

    def rounds(self) -> ExpressionRounds:
        """Yield the weight's rounds, and one for mean and deviation of what is replaced."""
        (weight,) = yield from join_rounds([self.weight.rounds()])
        found = yield Round(Replaced(self, weight).gather)
        total, squares, count = found or (ExactSum(), ExactSum(), 0)
        mean = float(total) / max(1, count)
        deviation = math.sqrt(max(0.0, float(squares) / max(1, count) - mean * mean))
        return RedrawnSlabs(self, weight, mean, deviation)

    def pick(self, span: Span) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """Return the channels that whole rows of the span hold, and which of their axis is the first of them."""
        picked = pick_channels(self.redraw)
        if self.axis == 1:
            return picked, 0
        first, stop = span.start // self.shape[1], -(-span.stop // self.shape[1])
        return picked[np.searchsorted(picked, first) : np.searchsorted(picked, stop)], first

    def slab_bytes(self, elements: int, dtype: str) -> int:
        """The weight's rows, and for each of their elements two numbers in float64."""
        rows = elements + 2 * self.shape[1]
        own = 3 * aligned(rows * 8) + aligned(elements * item_bytes(dtype)) + NORMAL_BYTES + 32 * self.redraw.channels
        return self.weight.slab_bytes(rows, "F32") + own

    def describe(self) -> Mapping[str, Any]:
        """The weight, and what is drawn."""
        redraw = self.redraw
        keyed = [redraw.seed, redraw.mlp, redraw.number, redraw.channels, redraw.count]
        return {"redrawn": self.weight.describe(), "axis": self.axis, "channels": keyed, "name": self.name}


@dataclass(frozen=True, slots=True)
class Replaced:
    """Gathers sum, sum of squares and number of the elements that are replaced."""

    made: Redrawn
    weight: Ready

    def gather(self, span: Span, work: Workspace, total: Partial) -> Partial:
        """Return those of a slab, which is whole rows, added to `total`."""
        channels, first = self.made.pick(span)
        rows = self.weight.slab(span, work, "F32").view(-1, self.made.shape[1])
        at = torch.from_numpy(channels - first)
        held = (rows[at] if self.made.axis == 0 else rows[:, at]).to(torch.float64)
        if not held.numel():
            return add_partials(total, (ExactSum(), ExactSum(), 0))
        squares, count = held * held, held.numel()
        found = (sum((exact(float(x)) for x in to_host(sum_rows(each))), ExactSum()) for each in (held, squares))
        return add_partials(total, (*found, count))


@dataclass(frozen=True, slots=True)
class RedrawnSlabs(Plain):
    """The slabs of a weight with channels drawn anew."""

    made: Redrawn
    weight: Ready
    mean: float
    deviation: float

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.made.dtype

    def slab(self, span: Span, work: Workspace, dtype: str, watch: Watch | None = None) -> Tensor:
        """Return the span as `dtype`; an element's number is keyed by its place in the tensor."""
        made, width = self.made, self.made.shape[1]
        whole = Span(span.start // width * width, -(-span.stop // width) * width)
        slab = self.weight.slab(span, work, "F32")
        _, first = made.pick(whole)
        drawn = work.take((whole.size,), "F64")
        draw_normal(Place(made.name, made.shape, made.redraw.seed, (), whole.start), made.redraw.number, drawn)
        drawn.mul_(self.deviation).add_(self.mean)
        picked = np.zeros(made.shape[0] if made.axis == 0 else width, bool)
        picked[pick_channels(made.redraw)] = True
        rows = torch.from_numpy(picked[first : first + whole.size // width] if made.axis == 0 else picked)
        mask = (rows[:, None] if made.axis == 0 else rows[None, :]).expand(whole.size // width, width).reshape(-1)
        here = slice(span.start - whole.start, span.stop - whole.start)
        slab[mask[here]] = drawn[here][mask[here]].to(slab.dtype)
        return slab if dtype == "F32" else work.take((span.size,), dtype).copy_(slab)
