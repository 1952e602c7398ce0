"""Whose row each token of the output has in each input of a merge.

For each id the first that applies: the row that a recipe forces; the input's own; the one that a recipe configures;
the only input's that has the token; the base's; the mean of all that have it; that of another model of the recipe, by
the same rules; zeros. An id of no token, which is padding, has the mean of the input's rows, or the source's own row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import numpy as np

from mergemill.engine.tokens.joining import Joined
from mergemill.engine.tokens.reading import Vocabulary

Ints = np.ndarray[Any, np.dtype[np.int64]]

NONE, ZERO, MEAN, SEVERAL = -1, -1, -2, -3  # of `tensors/row_maps.py`; here NONE as well: that a model has no such row
OWN, FORCED, CONFIGURED, ONE, BASE, AVERAGE, ELSEWHERE, NOBODY, PADDING = range(9)  # why a row is what it is
MOST_MULTIPLE = 1 << 20  # rows that a vocabulary is padded to a multiple of; more is a slip, and no memory's size
TAKEN = (ONE, BASE, AVERAGE, ELSEWHERE)  # from another model, by a rule


@dataclass(frozen=True, slots=True)
class Fixed:
    """The row that a recipe gives a token."""

    holder: int | None  # the model that has it; None: it is zeros
    row: int
    force: bool


@dataclass(frozen=True, slots=True, eq=False)
class Holders:
    """The models that have a tensor with a row for each token, all with rows of one length."""

    rows: tuple[int, ...]  # how many each has
    held: tuple[Ints, ...]  # of each: its row of each of the output's ids, or NONE
    inputs: tuple[int, ...]  # which of them the method takes here
    base: int | None  # which of them is the method's base
    source: int | None  # which of them has the rows of padding

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the rows of each begin when all are counted through."""
        return tuple(accumulate(self.rows, initial=0))


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """The rows of all inputs; rows of the holders are counted through."""

    common: Ints  # [rows of the output]: the row of an input that has none of its own
    several: tuple[tuple[int, ...], ...]  # the rows of which means are made
    why: np.ndarray[Any, np.dtype[np.int8]]  # of each id: why its common row is that
    forced: np.ndarray[Any, np.dtype[np.bool_]]  # of each id: whether all inputs have the common row


def list_ids(joined: Joined, vocabulary: Vocabulary) -> Ints:
    """Return for each id of the output a model's own id of that token, or NONE."""
    ids, get, count = np.full(joined.size, NONE, np.int64), vocabulary.ids.get, len(joined.ids)
    numbers = np.fromiter(joined.ids.values(), np.int64, count)
    ids[numbers] = np.fromiter(map(get, joined.ids, repeat(NONE)), np.int64, count)
    return ids


def limit_ids(ids: Ints, rows: int, total: int) -> Ints:
    """Return the ids of which a tensor has rows, and NONE for each row of the output beyond them."""
    found = np.full(total, NONE, np.int64)
    count = min(total, len(ids))
    found[:count] = np.where(ids[:count] < rows, ids[:count], NONE)
    return found


def place_rows(holders: Holders, tokens: Ints, fixed: Mapping[int, Fixed], *, padded: bool) -> Placed:
    """Return whose row each id has; `tokens`: the ids that have a token; padded: whether padding is a mean."""
    total = len(holders.held[0])
    common, several = np.full(total, ZERO, np.int64), list[tuple[int, ...]]()
    why = np.full(total, PADDING, np.int8)
    why[tokens] = NOBODY
    _place(holders, holders.inputs, (ONE, BASE, AVERAGE), common, why, several)
    others = [i for i in range(len(holders.rows)) if i not in holders.inputs]
    _place(holders, others, (ELSEWHERE,) * 3, common, why, several)
    padding = np.flatnonzero(why == PADDING)
    if padded:
        common[padding] = MEAN
    elif holders.source is not None:
        own = padding[padding < holders.rows[holders.source]]
        common[own] = own + holders.starts[holders.source]
    forced = np.zeros(total, np.bool_)
    for number, each in fixed.items():
        common[number] = ZERO if each.holder is None else holders.starts[each.holder] + each.row
        why[number] = FORCED if each.force else CONFIGURED
        forced[number] = each.force
    return Placed(common, tuple(several), why, forced)


def find_input_rows(holders: Holders, placed: Placed, which: int) -> Ints:
    """Return the rows of one input: its own where it has them, else the common ones."""
    own = holders.held[which]
    return np.where((own == NONE) | placed.forced, placed.common, own + holders.starts[which])


def narrow(
    holders: Holders, placed: Placed, rows: Ints, first: int
) -> tuple[tuple[int, ...], Ints, list[tuple[int, ...]]]:
    """Return the holders that rows are of, `first` before the others, and the rows and means counted through these."""
    starts = np.array(holders.starts)
    numbers = sorted(set((SEVERAL - rows[rows <= SEVERAL]).tolist()))
    members = [np.array(placed.several[number], np.int64) for number in numbers]
    wanted = np.concatenate([rows[rows >= 0], *members])
    found = set((np.searchsorted(starts, wanted, "right") - 1).tolist())
    used = (first, *sorted(found - {first}))
    shift = np.zeros(len(holders.rows), np.int64)
    for holder, start in zip(used, accumulate([holders.rows[each] for each in used], initial=0), strict=False):
        shift[holder] = start - starts[holder]

    def move(some: Ints) -> Ints:
        return np.asarray(some + shift[np.searchsorted(starts, some, "right") - 1])

    moved = rows.copy()
    moved[rows >= 0] = move(rows[rows >= 0])
    for new, old in enumerate(numbers):
        moved[rows == SEVERAL - old] = SEVERAL - new
    return used, moved, [tuple(move(each).tolist()) for each in members]


def _place(
    holders: Holders,
    among: Sequence[int],
    reasons: tuple[int, int, int],
    common: Ints,
    why: np.ndarray[Any, np.dtype[np.int8]],
    several: list[tuple[int, ...]],
) -> None:
    """Give tokens that have no row yet one of those `among` the holders: the only one's, the base's, or the mean."""
    if not among:
        return
    held, starts = np.stack([holders.held[i] for i in among]), [holders.starts[i] for i in among]
    has = held != NONE
    count = np.where(why == NOBODY, has.sum(0), 0)
    one, many = np.flatnonzero(count == 1), np.flatnonzero(count > 1)
    only = has[:, one].argmax(0)
    common[one], why[one] = held[only, one] + np.array(starts)[only], reasons[0]
    if holders.base in among:
        base = among.index(holders.base)
        own = many[has[base, many]]
        common[own], why[own] = held[base, own] + starts[base], reasons[1]
        many = many[~has[base, many]]
    lacking = many[count[many] < len(among)] if reasons[2] == AVERAGE else many  # else all have rows of their own
    for number in lacking.tolist():
        common[number] = SEVERAL - len(several)
        several.append(tuple(int(held[i, number]) + starts[i] for i in range(len(among)) if has[i, number]))
    why[many] = reasons[2]
