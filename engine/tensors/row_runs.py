"""The runs in which rows of matrices are read, and how they come to their places."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from typing import Any, TypeAlias

import numpy as np

from mergemill.engine.tensors.dtypes import item_bytes
from mergemill.engine.tensors.expressions import Read, Stored
from mergemill.engine.tensors.row_maps import Ints, Places
from mergemill.engine.tensors.slabs import Span
from mergemill.engine.tensors.workspace import Workspace

Matrix: TypeAlias = Any  # of rows: a tensor, or an array of bytes


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one input that are read at once."""

    span: Span  # elements of the input: the rows, and what it cannot give apart from them
    first: int  # row of the input
    rows: Places  # of the input, sorted
    places: Places  # where each of them belongs


def sort_rows(wanted: Ints, counts: Sequence[int]) -> Iterator[tuple[int, Places, Places]]:
    """Yield the number of each input of which rows are wanted, these in their order, and where each of them belongs.

    counts: the rows of the inputs, through which `wanted` counts one after the other.

    >>> found = sort_rows(np.array([8, -1, 2, 7]), (5, 9))
    >>> [(number, rows.tolist(), places.tolist()) for number, rows, places in found]
    [(0, [2], [2]), (1, [2, 3], [3, 0])]
    """
    for number, (start, stop) in enumerate(pairwise([0, *accumulate(counts)])):
        places = np.flatnonzero((wanted >= start) & (wanted < stop))
        rows = wanted[places].astype(np.int64) - start
        if not len(rows):
            continue
        if not bool((rows[1:] >= rows[:-1]).all()):
            order = np.argsort(rows, kind="stable")
            rows, places = rows[order], places[order]
        yield number, rows, places


def list_reads(stored: Stored, firsts: Places, lasts: Places, columns: int) -> Iterator[Read]:
    """Return what is read for runs of rows, each from its first to its last."""
    whole, row_bytes = next(stored.reads(Span(0, 0))), columns * item_bytes(stored.dtype)
    offsets, sizes = whole.offset_bytes + firsts * row_bytes, (lasts - firsts + 1) * row_bytes
    return map(Read, repeat(whole.pin), offsets.tolist(), sizes.tolist())


def read_in_place(stored: Stored, rows: Places, places: Places, found: Matrix, work: Workspace) -> bool:
    """Read sorted rows of a matrix as they are stored into their places of `found`, ``[rows, bytes of one]``.

    What follows each other in the file and in `found` at once; nothing beside. Whether that was done: only a file of
    this machine whose reads are not kept is read so.
    """
    read, row_bytes = next(stored.reads(Span(0, 0))), found.shape[1]
    if not work.reads_apart(read.pin):
        return False
    bounds = np.array([0, *_find_cuts(rows, places), len(rows)])
    lows, counts = bounds[:-1], np.diff(bounds)
    offsets, targets = read.offset_bytes + rows[lows] * row_bytes, places[lows] * row_bytes
    work.read_apart(read.pin, offsets, targets, counts * row_bytes, found.reshape(-1))
    return True


def place_rows(found: Matrix, run: Run, flat: Matrix, width: int) -> None:
    """Copy the rows of a run to their places; what follows each other in both goes at once."""
    rows, places = run.rows - run.first, run.places
    if len(rows) == 1:  # as nearly all are where vocabularies have nothing in common
        found[int(places[0])] = flat[:width]
        return
    taken = flat[: (int(rows[-1]) + 1) * width].reshape(-1, width)
    bounds = [0, *_find_cuts(rows, places), len(rows)]
    for low, high in pairwise(bounds):
        at, row, count = int(places[low]), int(rows[low]), high - low
        found[at : at + count] = taken[row : row + count]


def _find_cuts(rows: Places, places: Places) -> list[int]:
    found: list[int] = (np.flatnonzero((rows[1:] - rows[:-1] != 1) | (places[1:] - places[:-1] != 1)) + 1).tolist()
    return found
