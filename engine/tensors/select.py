"""Which elements of a tensor are its m largest, exactly, in passes over its slabs, without a sort.

The values are the magnitudes of the inputs, or whatever is derived from a slab. A sample and a pass over a window of
keys (`windows.py`) find the m-th largest of nearly every tensor; histograms (`histograms.py`) find the others. Several
ranks of the same values share the passes. Of equal values the first by index are kept.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemill.engine.tensors import native
from mergemill.engine.tensors.cut import Cut, Ranked
from mergemill.engine.tensors.device import count_by_block, is_on_host
from mergemill.engine.tensors.digits import Counts, Digits
from mergemill.engine.tensors.histograms import (
    CountSlab,
    Derive,
    Gathered,
    KeyGather,
    Search,
    StoredDerive,
    search_keys,
)
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import StoredSlab
from mergemill.engine.tensors.windows import (
    ALL,
    Rank,
    Sample,
    Sampling,
    Seen,
    Share,
    Sight,
    Watching,
    Window,
    choose_window,
    find_in_window,
    place_ties,
)

USUAL_ROUNDS = 2  # a sample and a window
VALUE_ROUNDS = {"F32": 2 + 2, "F64": 2 + 4}  # of find_ranked, where histograms are needed
SELECT_ROUNDS = {"F32": 2 + 3, "F64": 2 + 5}  # of select_largest and select_share
RANK_BYTES = 6 << 20  # for each rank: a sample, a window's keys and their copies; or histograms and theirs


def one_more(rounds: Mapping[str, int]) -> tuple[int, int]:
    """Return the usual and the most rounds of statistics that gather once more with what was selected."""
    return USUAL_ROUNDS + 1, max(rounds.values()) + 1


class Magnitudes(StoredDerive):
    """Derives |x| of each input, in place."""

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> Sequence[Tensor]:
        return [x.abs_() for x in tensors]

    def in_stored(self, slab: StoredSlab) -> Sequence[int]:
        """What native loops call the values that are derived."""
        return range(slab.count)


magnitudes = Magnitudes()


def find_ranked(
    place: Place, wanted: Sequence[Sequence[int]], dtype: str, derive: Derive = magnitudes, *, signed: bool = False
) -> Generator[CountSlab, Any, tuple[tuple[float, ...], ...]]:
    """Find for each value that `derive` makes of a slab its ``wanted[i]``-th largest ones; 1 is the largest.

    `derive` may overwrite the slabs that it is given; it returns flat slabs of `dtype`, overwritten here, that hold no
    negative number unless `signed`. A value without ranks is not looked at.
    """
    digits = Digits(dtype, signed)
    found = yield from _find(place, wanted, digits, derive)
    return tuple(
        tuple(digits.value(each.prefix if isinstance(each, Search) else each.key) for each in of_one)
        for of_one in found
    )


def select_largest(
    place: Place, wanted: Sequence[Sequence[int]], dtype: str, derive: Derive = magnitudes, *, signed: bool = False
) -> Generator[CountSlab, Any, tuple[tuple[Cut, ...], ...]]:
    """Find the cuts that keep exactly the ``wanted[i]`` largest of each derived value; see `find_ranked`."""
    digits = Digits(dtype, signed)
    found = yield from _find(place, wanted, digits, derive)
    return (yield from _make_cuts(found, digits, derive))


def select_share(
    place: Place, fraction: float, dtype: str, derive: Derive = magnitudes
) -> Generator[CountSlab, Any, Cut | None]:
    """Find the cut that keeps ``floor(fraction · #{value > 0})`` largest of the one derived value; None for none."""
    digits = Digits(dtype, signed=False)
    found = yield from _find(place, [(Share(fraction),)], digits, derive)
    if not found[0]:
        return None
    ((cut,),) = yield from _make_cuts(found, digits, derive)
    return cut


def mark_largest(values: Tensor, cut: Cut, place: Place, out: Tensor) -> Tensor:
    """Fill `out` with 1 where the element belongs to the `cut`, else 0; flat slabs of one shape and dtype."""
    start = cut.block * place.block - place.start  # of the block that is divided, which may lie before or beyond
    before = max(0, min(start, len(out)))
    torch.ge(values[:before], cut.threshold, out=out[:before])
    torch.gt(values[before:], cut.threshold, out=out[before:])
    if start == before < len(out) and cut.block_ties:
        equal = values[start : start + place.block] == cut.threshold
        out[start : start + place.block].masked_fill_(equal & (equal.cumsum(0) <= cut.block_ties), 1)
    return out


Found = Sequence[Sequence[Ranked | Search]]  # by a window or by histograms
_ZEROS = Window(0, 0)  # also in place of a window that could not be chosen


def _find(
    place: Place, wanted: Sequence[Sequence[Rank]], digits: Digits, derive: Derive
) -> Generator[CountSlab, Any, Found]:
    """Find the wanted keys; a share of nothing is left out."""
    samples: Sequence[Sample | None] = [None] * len(wanted)
    if place.size > ALL:
        samples = yield Sampling(digits, derive, [bool(ranks) for ranks in wanted])
    windows = [
        [choose_window(sample, rank, place.size, digits.most) for rank in ranks]
        for sample, ranks in zip(samples, wanted, strict=True)
    ]
    found: list[list[Ranked | int]] = [[rank for rank in ranks if isinstance(rank, int)] for ranks in wanted]
    if any(map(any, windows)) or any(isinstance(rank, Share) for ranks in wanted for rank in ranks):
        asked = [tuple(_ask(*each)) for each in zip(windows, wanted, strict=True)]
        seen = yield Watching(digits, derive, asked, wanted)
        found = [list(_look_up(*known, place.size)) for known in zip(windows, seen, wanted, strict=True)]
    left = [[rank for rank in of_one if isinstance(rank, int)] for of_one in found]
    searches: Sequence[Sequence[Search]] = [()] * len(left)
    if any(left):
        searches = yield from search_keys(left, digits, derive)
    return [
        [next(searched) if isinstance(each, int) else each for each in of_one]
        for of_one, searched in zip(found, map(iter, searches), strict=True)
    ]


def _ask(windows: Sequence[Window | None], wanted: Sequence[Rank]) -> Iterator[Window]:
    """Yield what to look at: each rank's window, and the zeros at last where a share hangs on them."""
    yield from (window or _ZEROS for window in windows)
    if any(isinstance(rank, Share) for rank in wanted):
        yield _ZEROS


def _look_up(
    windows: Sequence[Window | None], seen: Sequence[Sight], wanted: Sequence[Rank], size: int
) -> Iterator[Ranked | int]:
    """Yield what the windows held of the ranks; else the rank, as a number."""
    for window, sight, rank in zip(windows, seen, wanted, strict=False):
        if not isinstance(sight, Seen):
            yield from (sight,) if sight else ()
            continue
        number = rank if isinstance(rank, int) else rank.rank(size - _count_zeros(seen[-1]))
        if number:
            yield (window and find_in_window(window, sight, number)) or number


def _count_zeros(sight: Sight) -> int:
    assert isinstance(sight, Seen), "slabs of one pass are looked at in one way"
    return int(sight.ends[0].sum())


def _make_cuts(found: Found, digits: Digits, derive: Derive) -> Generator[CountSlab, Any, tuple[tuple[Cut, ...], ...]]:
    """Make cuts of what was found; where histograms did, the ties are still to be counted."""
    searched = [[digits.value(each.prefix) for each in of_one if isinstance(each, Search)] for of_one in found]
    counts: Sequence[Sequence[Counts]] = [()] * len(found)
    if any(searched):
        counts = yield _CountingTies(digits, derive, searched)
    return tuple(
        tuple(_make_cut(each, digits, counted) for each in of_one)
        for of_one, counted in zip(found, map(iter, counts), strict=True)
    )


def _make_cut(found: Ranked | Search, digits: Digits, counted: Iterator[Counts]) -> Cut:
    if isinstance(found, Search):
        found = place_ties(found.prefix, found.above, found.rank, next(counted))
    return Cut(digits.value(found.key), found.above, found.ties, found.block, found.block_ties)


@dataclass(frozen=True)
class _CountingTies(KeyGather):
    """Counts in each block what equals the thresholds."""

    thresholds: Sequence[Sequence[float]]  # of each value

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> Gathered:
        return tuple(
            tuple(_count_ties(values, threshold, place) for threshold in wanted)
            for values, wanted in zip(self.derive(tensors, place), self.thresholds, strict=True)
        )

    def add_stored(self, slab: StoredSlab, total: Gathered) -> Gathered:
        """The same from stored bytes, added in place."""
        blocks = -(-slab.place.size // slab.place.block)
        total = total or tuple(tuple(np.zeros(blocks, np.int64) for _ in wanted) for wanted in self.thresholds)
        slab, numbers = self.in_stored(slab)
        for which, wanted, counts in zip(numbers, self.thresholds, total, strict=True):
            for threshold, into in zip(wanted, counts, strict=True):
                slab.count_equal(which, threshold, into)
        return total


def _count_ties(values: Tensor, threshold: float, place: Place) -> Counts:
    counts = np.zeros(-(-place.size // place.block), np.int64)
    blocks = torch.split(values, place.block)
    first = place.start // place.block
    if not is_on_host(values):
        counts[first : first + len(blocks)] = count_by_block(values == threshold, place.block)
        return counts
    counts[first : first + len(blocks)] = [_count_equal(block, threshold) for block in blocks]
    return counts


def _count_equal(values: Tensor, value: float) -> int:
    return native.count_equal(values, value) if native.suits(values) else int((values.numpy() == value).sum())
