"""The m-th largest of a tensor's values from histograms of their keys' digits: exact for any values, in bounded memory.

One pass counts the upper 16 bits of every key (15 where there is no sign), additive over slabs and workers; the bin
that holds the m-th largest is then counted by the next 16 bits, until all bits are known.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergemill.engine.tensors.digits import Counts, Digits
from mergemill.engine.tensors.fusion import Derived
from mergemill.engine.tensors.kernels import StoredGather
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab

Derive = Callable[[Sequence[Tensor], Place], Sequence[Tensor]]
Gathered = tuple[tuple[Counts, ...], ...]  # for each derived value: for each distinct search, its histogram
CountSlab = Callable[[Sequence[Tensor], Place], Any]


class StoredDerive:
    """What derives ranked values, where native loops know them by number as well."""

    signed = False  # whether they are values with a sign

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """Return the numbers: of tensors, whose magnitudes are ranked, of their scores, or what stands for all."""
        raise NotImplementedError

    @property
    def derived(self) -> Derived | None:
        """What scores and importances hang on."""
        return None


_ROW = 256  # bins; histograms have a multiple of them


@dataclass(frozen=True, slots=True)
class Search:
    """What is known of one ranked value after some digits."""

    rank: int  # among the elements whose leading digits are `prefix`, counted from the largest
    prefix: int = 0
    above: int = 0

    def narrowed(self, histogram: Counts, width: int) -> "Search":
        """Return the search one digit further."""
        from_top = histogram[::-1]
        rows = from_top.reshape(-1, _ROW)
        sums = rows.sum(axis=1)  # a row at a time first: few tensors are so large that adding up all bins is little
        row = min(int(np.searchsorted(np.cumsum(sums), self.rank)), len(rows) - 1)
        before = int(sums[:row].sum())
        within = np.cumsum(rows[row])
        place = min(int(np.searchsorted(within, self.rank - before)), _ROW - 1)
        digit = len(histogram) - 1 - (row * _ROW + place)
        larger = before + int(within[place]) - int(histogram[digit])
        return Search(self.rank - larger, self.prefix << width | digit, self.above + larger)


def search_keys(
    wanted: Sequence[Sequence[int]], digits: Digits, derive: Derive
) -> Generator[CountSlab, Any, list[list[Search]]]:
    searches = [[Search(rank) for rank in ranks] for ranks in wanted]
    for level, width in enumerate(digits.widths):
        # Searches that agree so far share a histogram.
        prefixes = [sorted({search.prefix for search in each}) for each in searches]
        gathered = yield _Counting(digits, derive, level, prefixes)
        histograms = [dict(zip(*found, strict=True)) for found in zip(prefixes, gathered, strict=True)]
        searches = [
            [search.narrowed(of[search.prefix], width) for search in each]
            for each, of in zip(searches, histograms, strict=True)
        ]
    return searches


@dataclass(frozen=True)
class KeyGather(StoredGather):
    """What a round gathers of the keys of derived values."""

    knows_signs = False  # whether native loops do this for values with a sign
    digits: Digits
    derive: Derive

    @property
    def knows_stored(self) -> bool:
        """Whether native loops know the values and their keys."""
        if not self.digits.are_single or not isinstance(self.derive, StoredDerive):
            return False
        signed = self.digits.signed
        return self.derive.signed == signed and (self.knows_signs or not signed)

    def in_stored(self, slab: StoredSlab) -> tuple[StoredSlab, Sequence[int]]:
        """Return the slab with what the values hang on, and what native loops call these."""
        assert isinstance(self.derive, StoredDerive)
        derived = self.derive.derived
        return slab if derived is None else replace(slab, derived=derived), self.derive.in_stored(slab)


@dataclass(frozen=True)
class _Counting(KeyGather):
    """Counts one digit of every derived value."""

    level: int
    prefixes: Sequence[Sequence[int]]  # of each value: those of its searches

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> Gathered:
        return tuple(self._count(*known) for known in zip(self.derive(tensors, place), self.prefixes, strict=True))

    def add_stored(self, slab: StoredSlab, total: Gathered) -> Gathered:
        """The same from stored bytes, added in place."""
        bins = 1 << self.digits.widths[self.level]
        total = total or tuple(tuple(np.zeros(bins, np.int64) for _ in wanted) for wanted in self.prefixes)
        slab, numbers = self.in_stored(slab)
        known = list(zip(numbers, self.prefixes, total, strict=True))
        if self.level == 0:
            ranked = [(which, counts[0]) for which, _, counts in known if counts]  # of all bits: one for each value
            slab.count_upper([which for which, _ in ranked], [counts for _, counts in ranked])
            return total
        for which, wanted, counts in known:
            for prefix, into in zip(wanted, counts, strict=True):
                slab.count_lower(which, prefix, into)
        return total

    def _count(self, values: Tensor, wanted: Sequence[int]) -> tuple[Counts, ...]:
        if not wanted:
            return ()
        ordered = self.digits.order(values)
        if self.level == 0:
            return (self.digits.count_first(ordered),)
        return tuple(self.digits.count_within(ordered, self.level, wanted))
