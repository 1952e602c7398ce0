"""Dropping elements of task vectors at random, and rescaling what is left.

Source: Yu et al., "Language models are super mario" (DARE), arXiv:2311.03099, section 3, and Deep et al.,
"DELLA-Merging", arXiv:2406.11617, section 3 (MagPrune); the factor here restores the L1 norm that the drop took,
instead of dividing by the density.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mergemill.engine.methods.contract import say_number
from mergemill.engine.methods.task_vectors import rescale_factor, sum_absolute
from mergemill.engine.tensors.device import is_on_host, put_beside
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.fusion import Keep, Limits
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import drop_with_probability, find_limit, keep_under_limits, random_limits
from mergemill.engine.tensors.stored import StoredSlab

MAGPRUNE_SLABS = 5  # keys to sort by, limits, masks

Drop = Callable[[Tensor, Place, int], Tensor]  # thins the slab of the task vector i in place


def kept_norms(place: Place, density: Sequence[float], rescale: bool) -> Generator[Gather, Any, tuple[float, ...]]:
    """Find the factor that restores each task vector's L1 norm after `drop_at_random`."""
    keeps = keeps_at_random(density, (1.0,) * len(density))
    return (yield from _find_factors(_DropNorms(partial(_drop, density), keeps), density, rescale))


def drop_at_random(deltas: Sequence[Tensor], density: Sequence[float], factors: Sequence[float], place: Place) -> None:
    """Keep each element with its model's density, times the model's factor, in place."""
    _thin(deltas, partial(_drop, density), factors, place)


def magpruned_norms(
    place: Place, density: Sequence[float], epsilon: Sequence[float], rescale: bool
) -> Generator[Gather, Any, tuple[float, ...]]:
    """Find the factor that restores each task vector's L1 norm after `magprune`."""
    keeps = keeps_of_magprune(density, epsilon, (1.0,) * len(density), place)
    return (yield from _find_factors(_DropNorms(partial(_magprune, density, epsilon), keeps), density, rescale))


def magprune(
    deltas: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    factors: Sequence[float],
    place: Place,
) -> None:
    """Keep each element, times the model's factor, with a probability that grows with its rank in its row, in place.

    From ``density - epsilon`` for the smallest magnitude to ``density + epsilon`` for the largest; of equal ones the
    first by index ranks lower. The slabs hold whole rows; a vector is one row; a row of one has the density itself.
    """
    _thin(deltas, partial(_magprune, density, epsilon), factors, place)


def refuse_epsilon(density: Sequence[float], epsilon: Sequence[float]) -> str | None:
    """Say which of the densities, where they thin at all, leave the open range from 0 to 1 by their epsilon."""
    for d, e in zip(density, epsilon, strict=True):
        if 0 < d < 1 and not (0 < d - e < 1 and 0 < d + e < 1):
            return f"density {say_number(d)} ± epsilon {say_number(e)} must lie between 0 and 1, and not reach them"
    return None


def keeps_at_random(density: Sequence[float], factors: Sequence[float]) -> tuple[Keep, ...]:
    """Return `drop_at_random` as native loops do it."""
    return tuple(
        _keep_all_or_nothing(d, factor) or Keep(factor, limit=find_limit(d))
        for d, factor in zip(density, factors, strict=True)
    )


def keeps_of_magprune(
    density: Sequence[float], epsilon: Sequence[float], factors: Sequence[float], place: Place
) -> tuple[Keep, ...]:
    """Return `magprune` as native loops do it."""
    columns = _count_columns(place)
    return tuple(
        _keep_all_or_nothing(d, factor) or Keep(factor, limits=_rank_limits(d, e, columns))
        for d, e, factor in zip(density, epsilon, factors, strict=True)
    )


def _keep_all_or_nothing(density: float, factor: float) -> Keep | None:
    return None if 0 < density < 1 else Keep(factor, nothing=density <= 0)


def _find_factors(
    norms: "_DropNorms", density: Sequence[float], rescale: bool
) -> Generator[Gather, Any, tuple[float, ...]]:
    if not rescale or all(d <= 0 or d >= 1 for d in density):
        return (1.0,) * len(density)
    found = yield norms
    return tuple(rescale_factor(float(whole), float(kept)) for whole, kept in found)


@dataclass(frozen=True)
class _DropNorms(StoredGather):
    """Gathers the L1 norm of each task vector before and after it is thinned."""

    drop: Drop
    keeps: tuple[Keep, ...]

    @property
    def whole(self) -> bool:
        """Unless it hangs on ranks, for which masks are made."""
        return all(keep.limits is None for keep in self.keeps)

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> tuple[tuple[ExactSum, ExactSum], ...]:
        return tuple(
            (sum_absolute(delta, place), sum_absolute(self.drop(delta, place, i), place))
            for i, delta in enumerate(deltas)
        )

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        return add_partials(total, tuple(slab.sum_absolute(i, keep) for i, keep in enumerate(self.keeps)))


def _thin(deltas: Sequence[Tensor], drop: Drop, factors: Sequence[float], place: Place) -> None:
    for i, (delta, factor) in enumerate(zip(deltas, factors, strict=True)):
        drop(delta, place, i)
        if factor != 1.0:
            delta.mul_(factor)


def _drop(density: Sequence[float], delta: Tensor, place: Place, i: int) -> Tensor:
    if not 0 < density[i] < 1:
        return delta if density[i] >= 1 else delta.zero_()
    return drop_with_probability(delta, place, place.models[i], density[i])


def _magprune(density: Sequence[float], epsilon: Sequence[float], delta: Tensor, place: Place, i: int) -> Tensor:
    if not 0 < density[i] < 1:
        return delta if density[i] >= 1 else delta.zero_()
    rows = delta.view(-1, _count_columns(place))
    by_rank = put_beside(_rank_limits(density[i], epsilon[i], rows.shape[1]), delta).expand(rows.shape)
    limits = rows.new_empty(rows.shape, dtype=torch.int32).scatter_(1, _sort_rows(rows), by_rank)
    return delta.mul_(keep_under_limits(place, place.models[i], limits.view(-1), torch.empty_like(delta)))


def _count_columns(place: Place) -> int:
    return place.shape[-1] if place.shape else 1


def _rank_limits(density: float, epsilon: float, columns: int) -> Limits:
    """Return the limit of each rank's random number, the smallest magnitude's first."""
    steps = np.arange(columns) / (columns - 1) if columns > 1 else np.array([0.5])
    return random_limits(density - epsilon + 2 * epsilon * steps)


def _sort_rows(rows: Tensor) -> Tensor:
    """Return the columns of each row in ascending order of magnitude, equal ones by index; int64."""
    magnitude = rows.abs()
    if rows.dtype != torch.float32:
        return magnitude.sort(dim=1, stable=True).indices
    # Bits and column in one integer: no two are equal, so that the fast sort, which is not stable, will do.
    keys = magnitude.view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(put_beside(np.arange(rows.shape[1]), rows))
    if not is_on_host(keys):
        return keys.sort(dim=1).values.bitwise_and_(0xFFFFFFFF)
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(0xFFFFFFFF)
