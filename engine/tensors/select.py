"""The exact m-th largest magnitude of a tensor, in passes over its slabs, without a sort.

Non-negative floats order as their bit patterns do. One pass counts the upper 16 bits of every |x| (a histogram of
65,536 bins, additive over slabs and workers); the bin that holds the m-th largest is then counted by the next 16
bits, until all bits are known. A last pass settles ties: of equal magnitudes the first by index are kept.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergemill.engine.tensors.place import Place

Counts = np.ndarray[Any, np.dtype[np.int64]]
Component = Counts | int  # of a round's gathering; 0 for an input that takes no part
CountSlab = Callable[[Sequence[Tensor], Place], tuple[Component, ...]]
Rounds = Generator[CountSlab, Any, tuple["Cut | None", ...]]

SELECT_ROUNDS = {torch.float32: 3, torch.float64: 5}


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements are the m largest: those above `threshold`, and the first `ties` equal to it."""

    threshold: float
    above: int  # how many elements are larger than the threshold
    ties: int  # how many elements that equal it are kept, the first by index
    block: int  # the block (of the tensor's) in which the last of them lies
    block_ties: int  # how many are kept in that block


def select_largest(place: Place, wanted: Sequence[int | None], dtype: torch.dtype) -> Rounds:
    """Find for each input its `wanted[i]` largest magnitudes (None: not asked); yields rounds, returns the cuts.

    What a round gathers overwrites the slabs that it is given.
    """
    digits = _Digits(dtype)
    searches = [None if count is None else _Search(rank=count) for count in wanted]
    for level in range(digits.levels):
        histograms = yield _counting(digits, level, [None if search is None else search.prefix for search in searches])
        searches = [
            None if search is None else search.narrowed(histogram, digits.width(level))
            for search, histogram in zip(searches, histograms, strict=True)
        ]
    thresholds = [None if search is None else digits.value(search.prefix) for search in searches]
    ties = yield _counting_ties(thresholds)
    return tuple(
        None if search is None or threshold is None else _make_cut(threshold, search, counts)
        for search, threshold, counts in zip(searches, thresholds, ties, strict=True)
    )


def mark_largest(magnitude: Tensor, cut: Cut, place: Place, out: Tensor) -> Tensor:
    """Fill `out` with 1 where the element belongs to the `cut`, else 0; flat slabs of one shape and dtype."""
    for start in range(0, len(out), place.block):
        stop, block = start + place.block, (place.start + start) // place.block
        here, mark = magnitude[start:stop], out[start:stop]
        if block < cut.block:
            torch.ge(here, cut.threshold, out=mark)
        else:
            torch.gt(here, cut.threshold, out=mark)
        if block == cut.block and cut.block_ties:
            equal = here == cut.threshold
            mark[equal & (equal.cumsum(0) <= cut.block_ties)] = 1
    return out


@dataclass(frozen=True, slots=True)
class _Search:
    """What is known of the threshold after some digits."""

    rank: int  # among the elements whose leading digits are `prefix`, counted from the largest
    prefix: int = 0
    above: int = 0

    def narrowed(self, histogram: Counts, width: int) -> "_Search":
        """Return the search one digit further."""
        from_top = np.cumsum(histogram[::-1])
        place = min(int(np.searchsorted(from_top, self.rank)), len(histogram) - 1)
        digit = len(histogram) - 1 - place
        larger = int(from_top[place] - histogram[digit])
        return _Search(self.rank - larger, self.prefix << width | digit, self.above + larger)


class _Digits:
    """How the bits of a magnitude split into digits of at most 16 bits, the most significant first."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._integer = torch.int64 if dtype == torch.float64 else torch.int32
        self._dtype = dtype
        self._widths = (16, 16, 16, 15) if dtype == torch.float64 else (16, 15)

    @property
    def levels(self) -> int:
        return len(self._widths)

    def width(self, level: int) -> int:
        return self._widths[level]

    def shift(self, level: int) -> int:
        return sum(self._widths[level + 1 :])

    def bits(self, magnitude: Tensor) -> Tensor:
        return magnitude.view(self._integer)

    def value(self, prefix: int) -> float:
        return float(torch.tensor(prefix, dtype=self._integer).view(self._dtype))


def _counting(digits: _Digits, level: int, prefixes: Sequence[int | None]) -> CountSlab:
    def count(tensors: Sequence[Tensor], place: Place) -> tuple[Component, ...]:
        bins = 1 << digits.width(level)
        return tuple(
            0
            if prefix is None
            else _count_digit(digits.bits(x.abs_()), digits.shift(level), bins, prefix, first=level == 0)
            for x, prefix in zip(tensors, prefixes, strict=True)
        )

    return count


def _count_digit(bits: Tensor, shift: int, bins: int, prefix: int, *, first: bool) -> Counts:
    """Count one digit of the elements whose higher digits are `prefix`; the others fall into two outer bins."""
    if first:
        counts: Counts = torch.bincount(bits >> shift, minlength=bins).numpy()
        return counts
    digit = (bits - (prefix * bins << shift)).bitwise_right_shift_(shift).clamp_(-1, bins).add_(1)
    counts = torch.bincount(digit, minlength=bins + 2).numpy()
    return counts[1:-1]


def _counting_ties(thresholds: Sequence[float | None]) -> CountSlab:
    def count(tensors: Sequence[Tensor], place: Place) -> tuple[Component, ...]:
        return tuple(
            0 if threshold is None else _count_ties(x.abs_(), threshold, place)
            for x, threshold in zip(tensors, thresholds, strict=True)
        )

    return count


def _count_ties(magnitude: Tensor, threshold: float, place: Place) -> Counts:
    counts = np.zeros(-(-place.size // place.block), np.int64)
    equal = torch.eq(magnitude, threshold, out=torch.empty_like(magnitude))
    here = [int(block.sum(dtype=torch.float64)) for block in torch.split(equal, place.block)]
    counts[place.start // place.block :][: len(here)] = here
    return counts


def _make_cut(threshold: float, search: _Search, counts: Counts) -> Cut:
    before = np.cumsum(counts)
    block = min(int(np.searchsorted(before, search.rank)), len(counts) - 1)
    return Cut(threshold, search.above, search.rank, block, search.rank - int(before[block] - counts[block]))
