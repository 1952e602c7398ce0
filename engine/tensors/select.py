"""The exact m-th largest of a tensor's values, in passes over its slabs, without a sort.

The values are the magnitudes of the inputs, or whatever is derived from a slab. Non-negative floats order as their bit
patterns do, and so do all once the negative ones have their bits turned. One pass counts the upper 16 bits of every
value (15 where there is no sign: a histogram, additive over slabs and workers); the bin that holds the m-th largest
is then counted by the next 16 bits, until all bits are known. Several ranks of the same values share the passes.
A last pass settles ties: of equal values the first by index are kept.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.cut import Cut
from mergemill.engine.tensors.dtypes import TORCH_DTYPES, item_bytes
from mergemill.engine.tensors.kernels import StoredGather
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab

Counts = np.ndarray[Any, np.dtype[np.int64]]
Derive = Callable[[Sequence[Tensor], Place], Sequence[Tensor]]
Gathered = tuple[tuple[Counts, ...], ...]  # for each derived value: for each distinct search, its histogram
CountSlab = Callable[[Sequence[Tensor], Place], Gathered]


class StoredDerive:
    """What derives ranked values, where native loops know them by number as well."""

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """Return the numbers: of tensors, whose magnitudes are ranked, or `SPREAD`."""
        raise NotImplementedError


VALUE_ROUNDS = {"F32": 2, "F64": 4}  # of find_ranked
SELECT_ROUNDS = {"F32": 3, "F64": 5}  # of select_largest
HISTOGRAM_BYTES = 4 << 20  # for each rank: a slab's 65,536 bins, the part's, the total and its running sum


class Magnitudes(StoredDerive):
    """Derives |x| of each input, in place."""

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
        return [x.abs_() for x in tensors]

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """What native loops call the values that are derived."""
        return range(slab.count)


magnitudes = Magnitudes()


def find_ranked(
    wanted: Sequence[Sequence[int]], dtype: str, derive: Derive = magnitudes, *, signed: bool = False
) -> Generator[CountSlab, Any, tuple[tuple[float, ...], ...]]:
    """Find for each value that `derive` makes of a slab its ``wanted[i]``-th largest ones; 1 is the largest.

    `derive` may overwrite the slabs that it is given; it returns flat slabs of `dtype`, overwritten here, that hold no
    negative number unless `signed`. A value without ranks is not looked at.
    """
    digits = _Digits(dtype, signed)
    searches = yield from _search(wanted, digits, derive)
    return tuple(tuple(digits.value(search.prefix) for search in each) for each in searches)


def select_largest(
    place: Place,
    wanted: Sequence[Sequence[int]],
    dtype: str,
    derive: Derive = magnitudes,
    *,
    signed: bool = False,
) -> Generator[CountSlab, Any, tuple[tuple[Cut, ...], ...]]:
    """Find the cuts that keep exactly the ``wanted[i]`` largest of each derived value; see `find_ranked`."""
    digits = _Digits(dtype, signed)
    searches = yield from _search(wanted, digits, derive)
    thresholds = [[digits.value(search.prefix) for search in each] for each in searches]
    ties = yield _CountingTies(thresholds, derive, digits.are_magnitudes)
    return tuple(
        tuple(_make_cut(*known) for known in zip(*of_one, strict=True))
        for of_one in zip(thresholds, searches, ties, strict=True)
    )


def mark_largest(values: Tensor, cut: Cut, place: Place, out: Tensor) -> Tensor:
    """Fill `out` with 1 where the element belongs to the `cut`, else 0; flat slabs of one shape and dtype."""
    for start in range(0, len(out), place.block):
        stop, block = start + place.block, (place.start + start) // place.block
        here, mark = values[start:stop], out[start:stop]
        if block < cut.block:
            torch.ge(here, cut.threshold, out=mark)
        else:
            torch.gt(here, cut.threshold, out=mark)
        if block == cut.block and cut.block_ties:
            equal = here == cut.threshold
            mark[equal & (equal.cumsum(0) <= cut.block_ties)] = 1
    return out


_ROW = 256  # bins; histograms have a multiple of them


@dataclass(frozen=True, slots=True)
class _Search:
    """What is known of one ranked value after some digits."""

    rank: int  # among the elements whose leading digits are `prefix`, counted from the largest
    prefix: int = 0
    above: int = 0

    def narrowed(self, histogram: Counts, width: int) -> "_Search":
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
        return _Search(self.rank - larger, self.prefix << width | digit, self.above + larger)


class _Digits:
    """How floats become unsigned integers of the same order, and split into digits of at most 16 bits."""

    def __init__(self, dtype: str, signed: bool) -> None:
        self._dtype = dtype
        self._integer = "I64" if dtype == "F64" else "I32"
        self._unsigned = np.dtype(np.uint64 if dtype == "F64" else np.uint32)
        self._sign = 8 * item_bytes(dtype) - 1  # the highest bit's number
        self._signed = signed
        self.widths = (16 if signed else 15,) + (16,) * (item_bytes(dtype) // 2 - 1)

    def order(self, values: Tensor) -> Tensor:
        """Return signed integers of the same order as the `values`, which are overwritten."""
        if not self._signed:
            return values.view(TORCH_DTYPES[self._integer])
        bits = values.add_(0.0).view(TORCH_DTYPES[self._integer])  # the sum makes -0 the 0 that it equals
        return bits.bitwise_xor_((bits >> self._sign).bitwise_and_(self._magnitude))

    def value(self, key: int) -> float:
        """Return the float of an unsigned integer."""
        bits = key - self._bias
        if bits < 0:
            bits ^= self._magnitude
        return float(np.array(bits, self._unsigned.str.replace("u", "i")).view(self._unsigned.str.replace("u", "f")))

    def count_first(self, ordered: Tensor) -> Counts:
        """Count the most significant digit; `ordered` is overwritten."""
        shift = sum(self.widths[1:])
        if native.suits_integers(ordered):
            return native.count_first(ordered, self._bias, shift, 1 << self.widths[0])
        digit = ordered.bitwise_right_shift_(shift)
        if self._signed:
            digit.add_(self._bias >> shift)
        counts: Counts = torch.bincount(digit, minlength=1 << self.widths[0]).numpy()
        return counts

    def count_within(self, ordered: Tensor, level: int, prefixes: Sequence[int]) -> Iterator[Counts]:
        """For each of the prefixes count the digit `level` of the elements whose higher digits it is.

        `ordered` is overwritten.
        """
        shift = sum(self.widths[level + 1 :])
        span = 1 << (shift + self.widths[level])
        if native.suits_integers(ordered):
            yield from (native.count_within(ordered, prefix * span - self._bias, span, shift) for prefix in prefixes)
            return
        beyond, least = ordered.numpy().view(self._unsigned), self._bias
        for prefix in prefixes:
            # In place less the least key that begins with the prefix; what is less than that wraps around.
            beyond -= self._unsigned.type((prefix * span - least) % (2 << self._sign))
            least = prefix * span
            inside = beyond[beyond < span] >> self._unsigned.type(shift)
            yield np.bincount(inside.astype(np.int64), minlength=span >> shift)

    @property
    def are_magnitudes(self) -> bool:
        """Whether they are of float32 without a sign: all that native loops know."""
        return self._dtype == "F32" and not self._signed

    @property
    def _magnitude(self) -> int:
        return (1 << self._sign) - 1

    @property
    def _bias(self) -> int:
        """What makes the ordered integers unsigned."""
        return 1 << self._sign if self._signed else 0


def _search(
    wanted: Sequence[Sequence[int]], digits: _Digits, derive: Derive
) -> Generator[CountSlab, Any, list[list[_Search]]]:
    searches = [[_Search(rank) for rank in ranks] for ranks in wanted]
    for level, width in enumerate(digits.widths):
        # Searches that agree so far share a histogram.
        prefixes = [sorted({search.prefix for search in each}) for each in searches]
        gathered = yield _Counting(digits, level, prefixes, derive)
        histograms = [dict(zip(*found, strict=True)) for found in zip(prefixes, gathered, strict=True)]
        searches = [
            [search.narrowed(of[search.prefix], width) for search in each]
            for each, of in zip(searches, histograms, strict=True)
        ]
    return searches


@dataclass(frozen=True)
class _Counting(StoredGather):
    """Counts one digit of every derived value."""

    digits: _Digits
    level: int
    prefixes: Sequence[Sequence[int]]  # of each value: those of its searches
    derive: Derive

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> Gathered:
        return tuple(self._count(*known) for known in zip(self.derive(tensors, place), self.prefixes, strict=True))

    @property
    def knows_stored(self) -> bool:
        """Whether native loops know the values and their digits."""
        return self.digits.are_magnitudes and isinstance(self.derive, StoredDerive)

    def add_stored(self, slab: StoredSlab, total: Gathered) -> Gathered:
        """The same from stored bytes, added in place."""
        bins = 1 << self.digits.widths[self.level]
        total = total or tuple(tuple(np.zeros(bins, np.int64) for _ in wanted) for wanted in self.prefixes)
        assert isinstance(self.derive, StoredDerive)
        known = list(zip(self.derive.in_stored(slab), self.prefixes, total, strict=True))
        if self.level == 0:
            ranked = [(which, *counts) for which, _, counts in known if counts]
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


@dataclass(frozen=True)
class _CountingTies(StoredGather):
    """Counts in each block what equals the thresholds."""

    thresholds: Sequence[Sequence[float]]  # of each value
    derive: Derive
    stored: bool  # whether native loops may be asked

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> Gathered:
        return tuple(
            tuple(_count_ties(values, threshold, place) for threshold in wanted)
            for values, wanted in zip(self.derive(tensors, place), self.thresholds, strict=True)
        )

    @property
    def knows_stored(self) -> bool:
        """Whether native loops know the values."""
        return self.stored and isinstance(self.derive, StoredDerive)

    def add_stored(self, slab: StoredSlab, total: Gathered) -> Gathered:
        """The same from stored bytes, added in place."""
        blocks = -(-slab.place.size // slab.place.block)
        total = total or tuple(tuple(np.zeros(blocks, np.int64) for _ in wanted) for wanted in self.thresholds)
        assert isinstance(self.derive, StoredDerive)
        for which, wanted, counts in zip(self.derive.in_stored(slab), self.thresholds, total, strict=True):
            for threshold, into in zip(wanted, counts, strict=True):
                slab.count_equal(which, threshold, into)
        return total


def _count_ties(values: Tensor, threshold: float, place: Place) -> Counts:
    counts = np.zeros(-(-place.size // place.block), np.int64)
    blocks = torch.split(values, place.block)
    first = place.start // place.block
    counts[first : first + len(blocks)] = [_count_equal(block, threshold) for block in blocks]
    return counts


def _count_equal(values: Tensor, value: float) -> int:
    return native.count_equal(values, value) if native.suits(values) else int((values.numpy() == value).sum())


def _make_cut(threshold: float, search: _Search, counts: Counts) -> Cut:
    before = np.cumsum(counts)
    block = min(int(np.searchsorted(before, search.rank)), len(counts) - 1)
    return Cut(threshold, search.above, search.rank, block, search.rank - int(before[block] - counts[block]))
