"""What becomes of the rows of a vocabulary's tensor when its tokens become another's, as a value.

It goes to the workers once a run, some bytes a row; its digest stands for it where it is described.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mergemill.engine.tensors.row_maps import Ints


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """The new tensor's rows, but for those that are copied; equal ones have equal digests."""

    new: Ints  # rows that are made, ascending
    means: Ints  # rows that are the model's mean row, ascending
    donors: Ints  # of the tokens that both have: the donor's rows, ascending
    models: Ints  # the model's rows of the same tokens
    tokens: Ints  # the model's rows that belong to a token, ascending
    starts: Ints  # where the model's tokens that spell each new one begin, and where the last end: [new + 1]
    spelling: Ints  # these tokens
    targets: Ints  # the donor's rows of the new tokens, in the order of `new`
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for each in (self.new, self.means, self.donors, self.models, self.tokens, self.starts, self.spelling):
            digest.update(b"%d;" % len(each) + np.ascontiguousarray(each, "<i4").tobytes())
        if not np.array_equal(self.targets, self.new):  # as in a merge, whose ids are not the donor's
            digest.update(b"targets;" + np.ascontiguousarray(self.targets, "<i4").tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    def find_new(self, first: int, last: int) -> Ints:
        """Return the rows from `first` to `last` (excluded) that are made."""
        return _cut(self.new, first, last)

    def find_means(self, first: int, last: int) -> Ints:
        """Return the rows of that range that are the model's mean row."""
        return _cut(self.means, first, last)

    def find_tokens(self, first: int, last: int) -> Ints:
        """Return the model's rows in a range that belong to a token."""
        return _cut(self.tokens, first, last)

    def find_spelling(self, place: int) -> Ints:
        """Return the model's tokens that spell the new row at a place in `new`."""
        return self.spelling[self.starts[place] : self.starts[place + 1]]


def make_changes(
    *,
    new: Sequence[int],
    means: Sequence[int] = (),
    shared: Sequence[tuple[int, int]] = (),
    tokens: Sequence[int] = (),
    spellings: Sequence[Sequence[int]] = (),
    targets: Sequence[int] | None = None,
) -> Changes:
    """Return the changes; shared: pairs of rows, of the donor and of the model; spellings: of each of `new`.

    targets: the donor's rows of the new tokens; without them its ids are the new ones.

    >>> make_changes(new=[7, 9], spellings=[[1, 2], [3]]).find_spelling(1).tolist()
    [3]
    """
    pairs = sorted(shared)
    starts = np.cumsum([0, *(len(each) for each in spellings)])
    return Changes(
        _ints(new),
        _ints(means),
        _ints([donor for donor, _ in pairs]),
        _ints([model for _, model in pairs]),
        _ints(tokens),
        _ints(starts),
        _ints([token for each in spellings for token in each]),
        _ints(new if targets is None else targets),
    )


def _ints(values: "Sequence[int] | np.ndarray") -> Ints:
    return np.asarray(values, np.int32)


def _cut(rows: Ints, first: int, last: int) -> Ints:
    low, high = np.searchsorted(rows, (first, last))
    return rows[low:high]
