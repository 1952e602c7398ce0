"""Arcee Importance: take over from a model what differs most, by elements and by the distributions of their rows.

Source: Arcee AI, https://arcee.ai, as mergekit 0.1.5 has it; but the quantiles of large tensors, which are estimates
there, are exact.

For: one fine-tune, of which only what matters is to be taken over.

Evidence: none published.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.rows import view_rows
from mergemill.engine.tensors.device import put_beside, to_host
from mergemill.engine.tensors.elementary import exp_, log_
from mergemill.engine.tensors.exact import sum_rows
from mergemill.engine.tensors.fusion import IMPORTANCE, Divergences, Fusion, Importances, Join
from mergemill.engine.tensors.histograms import Derive, StoredDerive
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import RANK_BYTES, VALUE_ROUNDS, find_ranked, one_more
from mergemill.engine.tensors.stored import StoredSlab

_EPS = 1e-8  # added to every probability
_KEPT_ROWS = 1 << 18  # of so many rows the divergences are kept between the passes; those of more are computed anew


@dataclass(frozen=True, slots=True)
class Importance:
    """From which importance on an element is taken over."""

    threshold: float
    divergences: Divergences | None  # of all rows


def find_threshold(place: Place, dtype: str) -> Generator[Gather, Any, Importance]:
    """Find ``median + 1.5 · (q3 - q1)`` of the importance over the whole tensor."""
    divergences = None
    if _count_rows(place) <= _KEPT_ROWS:
        (divergences,) = yield _Divergences()
    last = place.size - 1
    ranks = [place.size - last * quarter // 4 for quarter in (1, 2, 3)]
    derive: Derive = (
        partial(_derive_importance, None) if divergences is None else _Weighing(divergences, _count_columns(place))
    )
    ((lower, median, upper),) = yield from find_ranked(place, [ranks], dtype, derive)
    return Importance(median + 1.5 * (upper - lower), divergences)


def _fuse(statistics: Importance, place: Place) -> Fusion | None:
    if statistics.divergences is None:
        return None
    join = Join("exceed", (1.0, 1.0), threshold=statistics.threshold)
    return Fusion(join, derived=Importances(statistics.divergences, _count_columns(place)))


@merge_method(
    reads="row",
    base="first of two",
    inputs=(2, 2),
    statistics=find_threshold,
    rounds=one_more(VALUE_ROUNDS),
    grain="row",
    extra_slabs=4,
    extra_bytes=3 * RANK_BYTES + 2 * 8 * _KEPT_ROWS,
    fused=_fuse,
)
def arcee_fusion(models: list[Tensor], statistics: Importance, place: Place) -> Tensor:
    """Return the base (``models[0]``), and the other model where its importance reaches the threshold.

    The importance of an element is ``|W_1 - W_0| · KL(softmax(W_1) ‖ softmax(W_0))`` with the divergence of its row
    (of the last axis; a vector is one row). Shapes: both ``[n]``, whole rows; the result ``[n]``.
    """
    base, other = models
    divergence = _find_divergence(models, statistics.divergences, place)
    delta = other.sub_(base)
    importance = _weigh(delta.abs(), divergence, place)
    return base.add_(delta.mul_(torch.ge(importance, statistics.threshold, out=importance)))


def _derive_importance(known: Divergences | None, models: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
    divergence = _find_divergence(models, known, place)
    base, other = models
    return [_weigh(other.sub_(base).abs_(), divergence, place)]


def _weigh(magnitude: Tensor, divergence: Tensor, place: Place) -> Tensor:
    view_rows(magnitude, place).mul_(divergence.to(magnitude.dtype).unsqueeze(1))
    return magnitude


@dataclass(frozen=True, eq=False)
class _Weighing(StoredDerive):
    """Derives the importances, from the divergences of all rows."""

    divergences: Divergences
    columns: int

    def __call__(self, models: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
        return _derive_importance(self.divergences, models, place)

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """What native loops call them."""
        return (IMPORTANCE,)

    @property
    def derived(self) -> Importances:
        """What they hang on."""
        return Importances(self.divergences, self.columns)


class _Divergences(StoredGather):
    """Gathers the divergence of each row of the tensor."""

    whole = True  # they are few numbers

    def __call__(self, models: Sequence[Tensor], place: Place) -> tuple[Divergences]:
        gathered = np.zeros(_count_rows(place))
        gathered[_rows_here(models[0], place)] = to_host(_find_divergence(models, None, place))
        return (gathered,)

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes, added in place."""
        (gathered,) = total or (np.zeros(_count_rows(slab.place)),)
        found = slab.find_divergences(_count_columns(slab.place))
        first = slab.place.start // _count_columns(slab.place)
        gathered[first : first + len(found)] += found
        return (gathered,)


def _find_divergence(models: Sequence[Tensor], known: Divergences | None, place: Place) -> Tensor:
    """Return the divergence of each row of the slab, float64; the models are not changed."""
    if known is not None:
        return put_beside(known[_rows_here(models[0], place)], models[0])
    before, after = (_soften(view_rows(model, place)) for model in models)
    torch.div(after, before, out=before)
    odd = before[:, 0].mul(0.0)  # of rows that have no softmax, no number
    log_(before.view(-1))
    # Rounding may leave a little less than the nothing that equal rows differ by.
    return sum_rows(before.mul_(after)).clamp_(min=0.0).add_(odd)


def _soften(rows: Tensor) -> Tensor:
    """Return the rows' softmax and a little more, float64."""
    wide = rows.to(torch.float64, copy=True)
    wide.sub_(wide.amax(dim=1, keepdim=True))
    exp_(wide.view(-1))
    return wide.div_(sum_rows(wide.clone()).unsqueeze(1)).add_(_EPS)


def _rows_here(model: Tensor, place: Place) -> slice:
    columns = _count_columns(place)
    return slice(place.start // columns, (place.start + len(model)) // columns)


def _count_rows(place: Place) -> int:
    return place.size // place.shape[-1] if place.shape else 1


def _count_columns(place: Place) -> int:
    return place.shape[-1] if place.shape else 1
