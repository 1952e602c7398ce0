"""The m-th largest of a tensor's values from one pass: a sample says between which keys it lies, all but surely.

(The passes of small tensors take all keys; where a slab is the whole of one, native loops find the key at once.)
The pass counts what is above that window, collects the keys inside, and counts what equals its ends: values that many
elements have are ends. From that follows the exact key, or that the window was wrong; then histograms find it. So the
sample plays no part in the result, and may be taken in any way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from mergemill.engine.tensors.cut import Ranked
from mergemill.engine.tensors.device import count_by_block, is_on_host, to_host
from mergemill.engine.tensors.digits import Counts, Digits, Keys
from mergemill.engine.tensors.histograms import KeyGather
from mergemill.engine.tensors.kernels import Additive
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.stored import MOST_NEAR, NearKeys, StoredSlab

ALL = MOST_NEAR  # elements; up to here one window holds them all
RUN = 64  # elements that are sampled together
MOST_SAMPLED = 1 << 18  # elements
MOST_KEYS = MOST_NEAR  # of a window that are kept
_LEAST_SAMPLED = 1 << 15
_SAMPLED_SHARE = 1 / 64
_FOUND: WeakKeyDictionary[Additive, dict[Any, Any]] = WeakKeyDictionary()
_MARGINS = (4.0, 2.0)  # standard errors on each side; the second, where the first would keep too much


@dataclass(frozen=True, slots=True)
class Share:
    """In place of a rank: so much of the elements that are not 0, rounded down."""

    fraction: float

    def rank(self, nonzero: int) -> int:
        """Return the rank; 0 where that is none."""
        return math.floor(self.fraction * nonzero)


Rank = int | Share
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Window:
    """Keys from `low` to `high`, with both."""

    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Sample(Additive):
    """Keys of runs of elements from all over a tensor: arrays ``[runs, RUN]``."""

    runs: tuple[Keys, ...] = ()

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(self.runs + other.runs)


@dataclass(frozen=True, eq=False)
class Seen(Additive):
    """What a pass saw of one window."""

    above: int  # elements
    inside: int  # between the ends
    ends: Counts  # [2, blocks of the tensor]: what equals the low end, and the high one
    near: tuple[NearKeys, ...]  # those inside, of each slab; none where they are too many

    def __add__(self, other: "Seen") -> "Seen":
        inside = self.inside + other.inside
        near = self.near + other.near if inside <= MOST_KEYS else ()
        return Seen(self.above + other.above, inside, self.ends + other.ends, near)


Sight = Seen | Ranked | None  # of one window; or, of a whole tensor, what was looked for, None for a share of nothing


def place_ties(key: int, above: int, ties: int, equal: Counts) -> Ranked:
    """Return where the last of the first `ties` lies of what equals the key, `equal` in each block."""
    before = np.cumsum(equal)
    block = min(int(np.searchsorted(before, ties)), len(equal) - 1)
    return Ranked(key, above, ties, block, ties - int(before[block] - equal[block]))


def choose_window(sample: Sample | None, rank: Rank, size: int, most: int) -> Window | None:
    """Return where the key of that rank among `size` lies, all but surely; None where that would be too many keys.

    Without a sample it is anywhere. Runs differ more than single elements would, as rows of weights do, so that the
    standard error is that of the runs.
    """
    if sample is None:
        return Window(0, most)
    return _once(sample, (rank, size, most), lambda: _choose_window(sample, rank, size, most))


def _once(key: Additive, asked: tuple[Any, ...], find: Callable[[], F]) -> F:
    """Find something once for as long as what it is found in is held: every piece of a cut tensor asks the same."""
    found = _FOUND.setdefault(key, {})
    if asked not in found:
        found[asked] = find()
    answer: F = found[asked]
    return answer


def _choose_window(sample: Sample, rank: Rank, size: int, most: int) -> Window | None:
    runs = np.concatenate(sample.runs)
    if not len(runs):
        return None
    ordered = np.sort(runs, axis=None)
    zeros = np.searchsorted(ordered, ordered.dtype.type(0), side="right")
    place = len(ordered) - _expect(rank, len(ordered) - int(zeros), len(ordered) / size)
    pivot = ordered[min(max(int(place), 0), len(ordered) - 1)]
    larger = (runs > pivot).sum(axis=1) - (rank.fraction * (runs > 0).sum(axis=1) if isinstance(rank, Share) else 0.0)
    error = float(larger.std()) * math.sqrt(len(runs))
    for margin in _MARGINS:
        window = _cut_sample(ordered, place, 2 + margin * error, most)
        inside = len(ordered[(ordered > window.low) & (ordered < window.high)])
        if inside / len(ordered) * size < MOST_KEYS:
            return window
    return None


def _expect(rank: Rank, nonzero: int, sampled: float) -> float:
    return rank.fraction * nonzero if isinstance(rank, Share) else rank * sampled


def _cut_sample(ordered: Keys, place: float, margin: float, most: int) -> Window:
    first, last = math.floor(place - margin), math.ceil(place + margin)
    low = int(ordered[first]) if first >= 0 else 0
    return Window(low, int(ordered[last]) if last < len(ordered) else most)


def find_in_window(window: Window, seen: Seen, rank: int) -> Ranked | None:
    """Return the key of that rank; None where it is not in the window, or was not kept."""
    return _once(seen, (window, rank), lambda: _find_in_window(window, seen, rank))


def _find_in_window(window: Window, seen: Seen, rank: int) -> Ranked | None:
    low, high = seen.ends
    left = rank - seen.above
    if left <= 0:
        return None
    if left <= int(high.sum()):
        return place_ties(window.high, seen.above, left, high)
    above, left = rank - left + int(high.sum()), left - int(high.sum())
    if left > seen.inside:
        above, left = above + seen.inside, left - seen.inside
        known = window.low < window.high and left <= int(low.sum())
        return place_ties(window.low, above, left, low) if known else None
    if seen.inside > MOST_KEYS:
        return None
    keys = seen.near[0].keys if len(seen.near) == 1 else np.concatenate([near.keys for near in seen.near])
    place = len(keys) - left
    key = int(np.partition(keys, place)[place])
    larger = int(np.count_nonzero(keys > key))
    return place_ties(key, above + larger, left - larger, _count_blocks(seen.near, keys == key, len(low)))


def _count_blocks(near: Sequence[NearKeys], chosen: np.ndarray[Any, Any], blocks: int) -> Counts:
    """Count in each block of the tensor which of the keys are chosen."""
    ends = np.cumsum(np.concatenate([of_slab.counts for of_slab in near]))
    numbers = np.concatenate([of_slab.first_block + np.arange(len(of_slab.counts)) for of_slab in near])
    places = np.searchsorted(ends, np.flatnonzero(chosen), side="right")
    return np.bincount(numbers[places], minlength=blocks)


@dataclass(frozen=True)
class Sampling(KeyGather):
    """Takes a sample of every value that is looked at."""

    whole = True  # what is taken of a tensor is little
    knows_signs = True
    looked: Sequence[bool]

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> tuple[Sample, ...]:
        values = self.derive(tensors, place)
        return tuple(
            Sample((_sample(value, self.digits, place),)) if looked else Sample()
            for value, looked in zip(values, self.looked, strict=True)
        )

    def add_stored(self, slab: StoredSlab, total: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """The same from stored bytes."""
        slab, numbers = self.in_stored(slab)
        known = zip(numbers, self.looked, strict=True)
        first, stride = _first_run(slab.place)
        samples = tuple(
            Sample((slab.sample(which, first, stride, RUN),)) if looked else Sample() for which, looked in known
        )
        return tuple(a + b for a, b in zip(total, samples, strict=True)) if total else samples


def _first_run(place: Place) -> tuple[int, int]:
    """Return where the slab's first run begins, and how many elements lie from run to run: an odd number of runs.

    So the runs lie in other columns of most rows.
    """
    wanted = min(max(place.size * _SAMPLED_SHARE, _LEAST_SAMPLED), MOST_SAMPLED)
    stride = RUN * (math.ceil(place.size / wanted) | 1)
    return -place.start % stride, stride


def _sample(value: Tensor, digits: Digits, place: Place) -> Keys:
    first, stride = _first_run(place)
    if not is_on_host(value):
        ordered = digits.order(value)
        there = ordered[first:].unfold(0, RUN, stride) if first + RUN <= len(ordered) else ordered[:0].view(-1, RUN)
        return digits.to_keys(there.contiguous())
    keys = digits.keys(value)
    starts = np.arange(first, len(keys) - RUN + 1, stride)
    runs: Keys = keys[starts[:, None] + np.arange(RUN)]
    return runs


@dataclass(frozen=True)
class Watching(KeyGather):
    """Looks at the windows of every value."""

    whole = True  # what is kept of a tensor is little
    knows_signs = True
    windows: Sequence[Sequence[Window]]  # of each value
    wanted: Sequence[Sequence[Rank]]  # what is looked for in them

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> tuple[tuple[Seen, ...], ...]:
        values = self.derive(tensors, place)
        return tuple(
            tuple(self._watch(value, windows, place)) for value, windows in zip(values, self.windows, strict=True)
        )

    def add_stored(self, slab: StoredSlab, total: tuple[tuple[Seen, ...], ...]) -> tuple[tuple[Sight, ...], ...]:
        """The same from stored bytes; what equals the ends is added in place. Of a whole tensor, the ranks."""
        slab, numbers = self.in_stored(slab)
        if slab.size == slab.place.size <= ALL:
            return self._find_ranks(slab, numbers)
        flat = [
            (which, window.low, window.high)
            for which, windows in zip(numbers, self.windows, strict=True)
            for window in windows
        ]
        known = [each for of_value in total for each in of_value] or [_nothing(slab.place) for _ in flat]
        counted = slab.count_windows(flat, [each.ends for each in known])
        seen = iter(_add_counted(*of_window) for of_window in zip(known, counted, strict=True))
        return tuple(tuple(next(seen) for _ in windows) for windows in self.windows)

    def _find_ranks(self, slab: StoredSlab, numbers: Sequence[int]) -> tuple[tuple[Ranked | None, ...], ...]:
        ranks = [(which, rank) for which, ranks in zip(numbers, self.wanted, strict=True) for rank in ranks]
        given = ((which, *((0, rank.fraction) if isinstance(rank, Share) else (rank, 0.0))) for which, rank in ranks)
        found = iter(slab.find_ranks(list(given)))
        return tuple(tuple(next(found) for _ in ranks) for ranks in self.wanted)

    def _watch(self, value: Tensor, windows: Sequence[Window], place: Place) -> Iterator[Seen]:
        if not windows:
            return
        if not is_on_host(value):
            ordered = self.digits.order(value)
            yield from (self._watch_there(ordered, window, place) for window in windows)
            return
        keys = self.digits.keys(value)
        first, blocks = place.start // place.block, -(-len(keys) // place.block)
        for window in windows:
            inside = np.flatnonzero((keys > window.low) & (keys < window.high))
            counts = np.bincount(inside // place.block, minlength=blocks)
            ends = _nothing(place).ends
            for end, key in zip(ends, (window.low, window.high), strict=True):
                equal = np.flatnonzero(keys == key) // place.block
                end[first : first + blocks] = np.bincount(equal, minlength=blocks)
            above = int(np.count_nonzero(keys > window.high))
            near = (NearKeys(first, counts, keys[inside]),) if len(inside) <= MOST_KEYS else ()
            yield Seen(above, len(inside), ends, near)

    def _watch_there(self, ordered: Tensor, window: Window, place: Place) -> Seen:
        """The same on a device; what comes from there are counts, and the keys inside."""
        low, high = (self.digits.from_key(key) for key in (window.low, window.high))
        mask = (ordered > low) & (ordered < high)
        counts = count_by_block(mask, place.block)
        inside, first = int(counts.sum()), place.start // place.block
        ends = _nothing(place).ends
        for end, key in zip(ends, (low, high), strict=True):
            end[first : first + len(counts)] = count_by_block(ordered == key, place.block)
        above = int(to_host((ordered > high).sum()))
        near = (NearKeys(first, counts, self.digits.to_keys(ordered[mask])),) if inside <= MOST_KEYS else ()
        return Seen(above, inside, ends, near)


def _nothing(place: Place) -> Seen:
    return Seen(0, 0, np.zeros((2, -(-place.size // place.block)), np.int64), ())


def _add_counted(old: Seen, counted: tuple[int, int, NearKeys | None]) -> Seen:
    above, inside, near = counted
    inside += old.inside
    kept = (*old.near, near) if near is not None and inside <= MOST_KEYS else ()
    return Seen(old.above + above, inside, old.ends, kept)
