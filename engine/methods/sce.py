"""SCE: select the elements on which the models differ most, calculate weights, erase minority signs.

Source: Wan et al., "FuseChat: knowledge fusion of chat models", arXiv:2408.07990, section 3.3.

For: several fine-tunes that were trained to hold one source model's knowledge each.

Evidence: chat LLMs of 7B (the source).
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.task_vectors import elect_sign
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.exact import ExactSum, sum_products
from mergemill.engine.tensors.fusion import SPREAD, Fusion, Join
from mergemill.engine.tensors.histograms import StoredDerive
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import RANK_BYTES, SELECT_ROUNDS, mark_largest, one_more, select_share
from mergemill.engine.tensors.stored import StoredSlab

_NO_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True)
class Selection:
    """Which elements take part, and with which weight each model does."""

    kept: Cut | int  # a cut of the spread over the models, or the same for all: 1 where all take part, 0 where none do
    weight: tuple[float, ...]


def select_spread(place: Place, dtype: str, select_topk: float) -> Generator[Gather, Any, Selection]:
    """Find the ``floor(select_topk · #{spread > 0})`` elements of largest spread, and the weights of the models."""
    kept: Cut | int = 1
    if select_topk < 1:
        kept = (yield from select_share(place, select_topk, dtype, _Spread())) or 0
    squares = yield _Squares(kept)
    return Selection(kept, _weigh([float(square) / place.size for square in squares]))


def _fuse(statistics: Selection) -> Fusion | None:
    if statistics.kept == 0:
        return None
    marked = statistics.kept if isinstance(statistics.kept, Cut) else None
    return Fusion(Join("share", statistics.weight), marked=marked)


@merge_method(
    reads="rank",
    base="required",
    statistics=select_spread,
    rounds=one_more(SELECT_ROUNDS),
    extra_slabs=7,
    extra_bytes=RANK_BYTES,
    fused=_fuse,
)
def sce(base: Tensor, deltas: list[Tensor], statistics: Selection, place: Place, *, select_topk: float = 1.0) -> Tensor:
    """Return the base plus the weighted mean, over the models of the elected sign, of the selected elements.

    ``base + sum(q[i] · deltas[i]) / sum(q[i])`` over the models whose sign is that of the sum of the deltas, 0 counting
    as plus; ``q[i]`` is the model's share in the mean squares of what was selected. Shapes: all ``[n]``.
    """
    _keep(deltas, statistics.kept, place)
    sign = elect_sign(deltas)
    total, divisor, agrees = torch.zeros_like(base), torch.zeros_like(base), torch.empty_like(base)
    for delta, weight in zip(deltas, statistics.weight, strict=True):
        torch.mul(delta, sign, out=agrees)
        torch.gt(agrees, 0, out=agrees).mul_(weight)
        total.add_(delta.mul_(agrees))
        divisor.add_(agrees)
    return base.add_(total.div_(divisor.clamp_(min=_NO_WEIGHT)))


def _keep(deltas: Sequence[Tensor], kept: Cut | int, place: Place) -> None:
    if kept == 1:
        return
    marks = torch.zeros_like(deltas[0])
    if isinstance(kept, Cut):
        mark_largest(find_spread(deltas), kept, place, marks)
    for delta in deltas:
        delta.mul_(marks)


def find_spread(deltas: Sequence[Tensor]) -> Tensor:
    """Return the standard deviation over the models, which orders as the variance does but stays in float32's range.

    Computed in float64, from the differences to the first: equal models have none at all.
    """
    first = deltas[0].to(torch.float64)
    mean, squares = torch.zeros_like(first), torch.zeros_like(first)
    for delta in deltas[1:]:
        mean.add_(delta - first)
    divide_(mean, len(deltas))
    for delta in deltas:
        deviation = (delta - first).sub_(mean)
        squares.add_(deviation.mul_(deviation))
    return divide_(squares, len(deltas)).sqrt_().to(deltas[0].dtype)


class _Spread(StoredDerive):
    """Derives the spread, to rank it."""

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
        return [find_spread(deltas)]

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """What native loops call it."""
        return (SPREAD,)


@dataclass(frozen=True)
class _Squares(StoredGather):
    """Gathers the squares of each task vector's selected elements."""

    kept: Cut | int

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> tuple[ExactSum, ...]:
        _keep(deltas, self.kept, place)
        return tuple(_sum_squares(delta, place) for delta in deltas)

    @property
    def knows_stored(self) -> bool:
        """Unless nothing is selected."""
        return self.kept != 0

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        return add_partials(total, slab.sum_marked_squares(self.kept if isinstance(self.kept, Cut) else None))


def _sum_squares(delta: Tensor, place: Place) -> ExactSum:
    return sum_products(delta, delta, place.block)


def _weigh(squares: Sequence[float]) -> tuple[float, ...]:
    total = sum(squares)
    if total < _NO_WEIGHT or not math.isfinite(total):
        return (1.0 / len(squares),) * len(squares)
    return tuple(square / total for square in squares)
