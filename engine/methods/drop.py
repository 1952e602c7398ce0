"""Dropping elements of task vectors at random, and rescaling what is left.

Source: Yu et al., "Language models are super mario" (DARE), arXiv:2311.03099, section 3; the factor here restores the
L1 norm that the drop took, instead of dividing by the density.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergemill.engine.methods.task_vectors import rescale_factor, sum_absolute
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.random import keep_with_probability


def kept_norms(place: Place, density: Sequence[float], rescale: bool) -> Generator[Gather, Any, tuple[float, ...]]:
    """Find the factor that restores each task vector's L1 norm after the drop."""
    if not rescale or all(d <= 0 or d >= 1 for d in density):
        return (1.0,) * len(density)
    norms = yield _norms_at(density)
    return tuple(rescale_factor(float(whole), float(kept)) for whole, kept in norms)


def drop_at_random(deltas: Sequence[Tensor], density: Sequence[float], factors: Sequence[float], place: Place) -> None:
    """Keep each element with its model's density, times the model's factor, in place."""
    for i, (delta, kept, factor) in enumerate(zip(deltas, density, factors, strict=True)):
        _drop(delta, kept, place, i)
        if factor != 1.0:
            delta.mul_(factor)


def _drop(delta: Tensor, density: float, place: Place, i: int) -> Tensor:
    if density >= 1:
        return delta
    if density <= 0:
        return delta.zero_()
    return delta.mul_(keep_with_probability(place, place.models[i], density, torch.empty_like(delta)))


def _norms_at(density: Sequence[float]) -> Callable[[Sequence[Tensor], Place], tuple[tuple[ExactSum, ExactSum], ...]]:
    def gather(deltas: Sequence[Tensor], place: Place) -> tuple[tuple[ExactSum, ExactSum], ...]:
        return tuple(
            (sum_absolute(delta, place), sum_absolute(_drop(delta, d, place, i), place))
            for i, (delta, d) in enumerate(zip(deltas, density, strict=True))
        )

    return gather
