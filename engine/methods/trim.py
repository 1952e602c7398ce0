"""Trimming task vectors by magnitude, exactly, without a sort: to their largest elements, or these less outliers.

Source: Yadav et al., "TIES-Merging", arXiv:2306.01708, section 3 (trim); Davari and Belilovsky, "Model Breadcrumbs",
arXiv:2312.06795, section 3 (outliers).
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergemill.engine.methods.task_vectors import rescale_factor, sum_absolute
from mergemill.engine.tensors import native
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.exact import ExactSum
from mergemill.engine.tensors.fusion import Keep
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.select import RANK_BYTES, SELECT_ROUNDS, mark_largest, one_more, select_largest
from mergemill.engine.tensors.stored import StoredSlab

TRIM_ROUNDS = one_more(SELECT_ROUNDS)
TRIM_BYTES = RANK_BYTES
OUTLIER_BYTES = 2 * RANK_BYTES


@dataclass(frozen=True, slots=True)
class Trim:
    """How one task vector is trimmed: what is kept, and the factor on that."""

    cut: Cut | None  # its elements are kept; None: all of them
    factor: float
    outliers: Cut | None = None  # but not these, the largest
    ranks: tuple[int, ...] = ()  # until both are found: how many these are together, and how many of them outliers


def trim_to_largest(
    place: Place, dtype: str, density: Sequence[float], rescale: bool
) -> Generator[Gather, Any, tuple[Trim, ...]]:
    """Find for each task vector its ``max(1, floor(density · n))`` largest elements and, with `rescale`, the factor."""
    return (yield from _find_trims(place, dtype, _ask_largest(place.size, density), rescale))


def rank_largest(size: int, density: Sequence[float], rescale: bool) -> Sequence[Trim] | None:
    """Return the trims of `trim_to_largest` with their ranks; None where a factor hangs on what is kept."""
    return None if rescale else _ask_largest(size, density)


def _ask_largest(size: int, density: Sequence[float]) -> list[Trim]:
    ranks = [(max(1, math.floor(d * size)),) if 0 < d < 1 else () for d in density]
    return [Trim(None, 1.0 if d > 0 else 0.0, ranks=asked) for d, asked in zip(density, ranks, strict=True)]


def trim_outliers(
    place: Place, dtype: str, density: Sequence[float], gamma: Sequence[float], rescale: bool
) -> Generator[Gather, Any, tuple[Trim, ...]]:
    """Find for each task vector the ``m = floor(density · n)`` largest elements under its outliers.

    These are the ``floor(gamma · n)`` largest; fewer, where m elements would not be left.
    """
    return (yield from _find_trims(place, dtype, _ask_under_outliers(place.size, density, gamma), rescale))


def rank_under_outliers(
    size: int, density: Sequence[float], gamma: Sequence[float], rescale: bool
) -> Sequence[Trim] | None:
    """Return the trims of `trim_outliers` with their ranks; None where a factor hangs on what is kept."""
    return None if rescale else _ask_under_outliers(size, density, gamma)


def _ask_under_outliers(size: int, density: Sequence[float], gamma: Sequence[float]) -> list[Trim]:
    asked = []
    for d, g in zip(density, gamma, strict=True):
        kept = math.floor(d * size)
        outliers = min(math.floor(g * size), size - kept)
        ranks = (kept + outliers, outliers) if outliers else (kept,)
        asked.append(Trim(None, 1.0 if kept else 0.0, ranks=ranks if kept and d < 1 else ()))
    return asked


def _find_trims(
    place: Place, dtype: str, asked: Sequence[Trim], rescale: bool
) -> Generator[Gather, Any, tuple[Trim, ...]]:
    """Find the cuts of the trims that have ranks."""
    ranks = [trim.ranks for trim in asked]
    if not any(ranks):
        return tuple(asked)
    cuts = yield from select_largest(place, ranks, dtype)
    trims = tuple(_make_trim(*found) if found else trim for trim, found in zip(asked, cuts, strict=True))
    if not rescale:
        return trims
    norms = yield _TrimNorms(trims)
    return tuple(
        trim if trim.cut is None else replace(trim, factor=rescale_factor(float(whole), float(kept)))
        for trim, (whole, kept) in zip(trims, norms, strict=True)
    )


def _make_trim(cut: Cut, outliers: Cut | None = None) -> Trim:
    return Trim(cut, 1.0, outliers)


def apply_trims(deltas: Sequence[Tensor], trims: Sequence[Trim], place: Place) -> None:
    """Trim the slabs of the task vectors in place."""
    for delta, trim in zip(deltas, trims, strict=True):
        _keep(delta, trim, place)
        if trim.factor != 1.0:
            delta.mul_(trim.factor)


def keeps_of(trims: Sequence[Trim]) -> tuple[Keep, ...]:
    """Return `apply_trims` as native loops do it."""
    return tuple(Keep(trim.factor, cut=trim.cut, outliers=trim.outliers, ranks=trim.ranks) for trim in trims)


def _keep(delta: Tensor, trim: Trim, place: Place) -> Tensor:
    if trim.cut is None:
        return delta
    if trim.outliers is None and native.suits(delta):
        return _keep_natively(delta, trim.cut, place)
    magnitude = delta.abs()
    marks = mark_largest(magnitude, trim.cut, place, torch.empty_like(delta))
    if trim.outliers is not None:
        marks.sub_(mark_largest(magnitude, trim.outliers, place, torch.empty_like(delta)))
    return delta.mul_(marks)


def _keep_natively(delta: Tensor, cut: Cut, place: Place) -> Tensor:
    """Drop what does not belong to the cut: up to its last tie all that equals the threshold stays, then none."""
    first, last = cut.block * place.block - place.start, (cut.block + 1) * place.block - place.start
    size = len(delta)
    first, last = min(max(first, 0), size), min(max(last, 0), size)
    native.keep_large(delta[:first], cut.threshold, inclusive=True)
    native.keep_large(delta[last:], cut.threshold, inclusive=False)
    if first < last:
        tied = delta[first:last]
        tied.mul_(mark_largest(tied.abs(), cut, place.at(place.start + first), torch.empty_like(tied)))
    return delta


@dataclass(frozen=True)
class _TrimNorms(StoredGather):
    """Gathers the L1 norm of each task vector that is cut, before and after."""

    whole = True  # they are few numbers

    trims: Sequence[Trim]

    def __call__(self, deltas: Sequence[Tensor], place: Place) -> tuple[tuple[ExactSum, ExactSum], ...]:
        return tuple(_norms(delta, trim, place) for delta, trim in zip(deltas, self.trims, strict=True))

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        norms = tuple(
            (ExactSum(), ExactSum()) if trim.cut is None else slab.sum_absolute(i, keep)
            for i, (trim, keep) in enumerate(zip(self.trims, keeps_of(self.trims), strict=True))
        )
        return add_partials(total, norms)


def _norms(delta: Tensor, trim: Trim, place: Place) -> tuple[ExactSum, ExactSum]:
    if trim.cut is None:
        return ExactSum(), ExactSum()
    return sum_absolute(delta, place), sum_absolute(_keep(delta, trim, place), place)
