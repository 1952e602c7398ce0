"""Which row of a matrix is which row of others: what a change of vocabulary does to an embedding, as a value.

A map is as long as the new matrix and says for each of its rows which row of the inputs it is, counted through all
inputs one after the other. What is no row of theirs is negative. A map of 256k rows is 1 MiB, so its digest stands
for it where it is described.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]
Places = np.ndarray[Any, np.dtype[np.int64]]

ZERO = -1  # a row of zeros
MEAN = -2  # the mean of all rows of the map but those
SEVERAL = -3  # the mean of several rows; the next kind of mean is one less, and so on


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """The new matrix's rows; equal maps have equal digests."""

    rows: Ints  # [new rows]: a row of the inputs, `ZERO`, `MEAN`, or ``SEVERAL - i`` for the mean number i
    starts: Ints  # where the members of each mean begin, and where the last ones end: [means + 1]
    members: Ints  # rows of the inputs
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for array in (self.rows, self.starts, self.members):
            digest.update(b"%d;" % len(array) + np.ascontiguousarray(array, "<i4").tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    @property
    def has_mean(self) -> bool:
        """Whether a row is the mean of all others."""
        return bool((self.rows == MEAN).any())

    def is_identity(self, rows: int) -> bool:
        """Whether it gives the `rows` rows of an input as they are."""
        return len(self.rows) == rows and bool((self.rows == np.arange(rows)).all())

    def find_wanted(self, first: int, last: int) -> tuple[Ints, list[tuple[int, int, int]]]:
        """Return what rows `first` to `last` (excluded) are made of, and which of it are means of which.

        The first are the rows themselves, those of means as zeros; then follow the members of the means. Of each mean:
        its place, and the places of its first and after its last member.
        """
        rows = self.rows[first:last]
        places = np.flatnonzero(rows <= SEVERAL)
        if not len(places):
            return rows, []
        numbers = SEVERAL - rows[places]
        members = [self.members[self.starts[number] : self.starts[number + 1]] for number in numbers]
        stops = len(rows) + np.cumsum([len(each) for each in members])
        means = [
            (int(p), int(stop) - len(each), int(stop)) for p, stop, each in zip(places, stops, members, strict=True)
        ]
        direct = rows.copy()
        direct[places] = ZERO
        return np.concatenate([direct, *members]), means


def make_row_map(rows: Sequence[int] | Ints | Places, several: Sequence[Sequence[int]] = ()) -> RowMap:
    """Return a map; several: the rows of which each mean of several is made.

    >>> make_row_map([4, ZERO, SEVERAL], [[0, 7]]).find_wanted(0, 3)[0].tolist()
    [4, -1, -1, 0, 7]
    """
    starts = np.cumsum([0, *(len(each) for each in several)])
    members = np.array([row for each in several for row in each], np.int32)
    return RowMap(np.asarray(rows, np.int32), starts.astype(np.int32), members)


@functools.lru_cache(maxsize=64)
def count_most(map_: RowMap, window: int) -> tuple[int, int]:
    """Return an upper bound of the rows, and of the runs of rows, that `window` rows of a map are made of.

    >>> count_most(make_row_map([0, 1, 2, 7, 8, ZERO]), 4)
    (4, 3)
    """
    rows = map_.rows
    if not len(rows):
        return 0, 0
    sizes = np.diff(map_.starts)
    extra = np.zeros(len(rows), np.int64)
    means = rows <= SEVERAL
    extra[means] = sizes[SEVERAL - rows[means]]
    breaks = np.ones(len(rows), np.int64)
    breaks[1:] = (np.diff(rows.astype(np.int64)) != 1) | (rows[1:] <= 0)
    breaks[rows < 0] = 0
    most = min(window, len(rows))
    return most + _find_most(extra, most), _find_most(breaks + extra, most) + 1


def _find_most(counts: Places, window: int) -> int:
    """Return the largest sum of `window` counts one after the other."""
    sums = np.concatenate([[0], np.cumsum(counts)])
    return int((sums[window:] - sums[:-window]).max())


def cut_runs(rows: Places, hole: int, chunks: Places) -> list[int]:
    """Return where sorted rows are cut, from 0 on: no more than `hole` lie between two of a run, all of one chunk.

    >>> cut_runs(np.array([3, 4, 4, 9, 11, 40]), 4, np.array([0, 0, 0, 0, 1, 4]))
    [0, 4, 5, 6]
    """
    if not len(rows):
        return [0]
    cuts = np.flatnonzero((np.diff(rows) > hole + 1) | (np.diff(chunks) != 0)) + 1
    return [0, *cuts.tolist(), len(rows)]
