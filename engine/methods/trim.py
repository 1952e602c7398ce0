"""Trimming task vectors to their largest elements, exactly, without a sort.

Source: Yadav et al., "TIES-Merging", arXiv:2306.01708, section 3 (trim).
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergemill.engine.methods.task_vectors import rescale_factor, sum_absolute
from mergemill.engine.tensors.dtypes import TORCH_DTYPES
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import SELECT_ROUNDS, Cut, mark_largest, select_largest

TRIM_ROUNDS = max(SELECT_ROUNDS.values()) + 1
TRIM_BYTES = 4 << 20  # histograms of 65,536 bins: a slab's, the part's, the total and its running sum


@dataclass(frozen=True, slots=True)
class Trim:
    """How one task vector is trimmed: what is kept (None: all of it), and the factor on what was kept."""

    cut: Cut | None
    factor: float


def trim_to_largest(
    place: Place, dtype: str, density: Sequence[float], rescale: bool
) -> Generator[Gather, Any, tuple[Trim, ...]]:
    """Find for each task vector its ``max(1, floor(density · n))`` largest elements and, with `rescale`, the factor."""
    wanted = [None if not 0 < d < 1 else max(1, math.floor(d * place.size)) for d in density]
    plain = tuple(Trim(None, 1.0 if d > 0 else 0.0) for d in density)
    if all(count is None for count in wanted):
        return plain
    cuts = yield from select_largest(place, wanted, TORCH_DTYPES[dtype])
    norms = (yield _norms_of(cuts)) if rescale else [(1.0, 1.0)] * len(cuts)
    return tuple(
        trim if cut is None else Trim(cut, rescale_factor(float(whole), float(kept)))
        for trim, cut, (whole, kept) in zip(plain, cuts, norms, strict=True)
    )


def apply_trims(deltas: Sequence[Tensor], trims: Sequence[Trim], place: Place) -> None:
    """Trim the slabs of the task vectors in place."""
    for delta, trim in zip(deltas, trims, strict=True):
        if trim.cut is not None:
            _drop_small(delta, trim.cut, place)
        if trim.factor != 1.0:
            delta.mul_(trim.factor)


def _drop_small(delta: Tensor, cut: Cut, place: Place) -> Tensor:
    magnitude = delta.abs()
    return delta.mul_(mark_largest(magnitude, cut, place, torch.empty_like(delta)))


def _norms_of(cuts: Sequence[Cut | None]) -> Callable[[Sequence[Tensor], Place], tuple[tuple[ExactSum, ExactSum], ...]]:
    def gather(deltas: Sequence[Tensor], place: Place) -> tuple[tuple[ExactSum, ExactSum], ...]:
        return tuple(_norms(delta, cut, place) for delta, cut in zip(deltas, cuts, strict=True))

    return gather


def _norms(delta: Tensor, cut: Cut | None, place: Place) -> tuple[ExactSum, ExactSum]:
    if cut is None:
        return ExactSum(), ExactSum()
    whole = sum_absolute(delta, place)
    return whole, sum_absolute(_drop_small(delta, cut, place), place)
