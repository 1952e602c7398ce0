"""Rows that are gone over slab by slab, as often as an approximation asks: no more than a slab of them is in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mergemill.engine.tensors.lazy import Tensor, torch

NONE = -1  # in place of a row's number
Pass = Iterator[tuple[int, Tensor]]
Passes = Callable[[], Pass]
"""Goes over rows in their order: the number of the first of a slab, and the slab, ``[rows, width]``, not to be kept."""


@dataclass(frozen=True, slots=True)
class Combination:
    """New rows as sums of rows: for each of them numbers and weights, ``[new, terms]``; `NONE` stands for no term."""

    numbers: Tensor
    weights: Tensor  # float64


def pass_over(rows: Tensor, step: int = 1024) -> Passes:
    """Return passes over rows that are in memory."""
    return lambda: ((first, rows[first : first + step]) for first in range(0, len(rows), step))


def gather_rows(passes: Passes, numbers: Tensor, width: int) -> Tensor:
    """Return rows by their numbers, ``[new, terms, width]``, in the dtype of the slabs; zeros for `NONE`."""
    found: Tensor | None = None
    for first, slab in passes():
        if found is None:
            found = slab.new_zeros(*numbers.shape, width)
        new, term = _find_within(numbers, first, len(slab))
        found[new, term] = slab[numbers[new, term] - first]
    return torch.zeros(*numbers.shape, width) if found is None else found


def combine_rows(passes: Passes, combination: Combination, width: int) -> Tensor:
    """Return ``sum_j weights[i, j] * row(numbers[i, j])`` for each i: ``[new, width]``, in the dtype of the slabs."""
    numbers, weights = combination.numbers, combination.weights
    total: Tensor | None = None
    for first, slab in passes():
        if total is None:
            total = slab.new_zeros(len(numbers), width)
        new, term = _find_within(numbers, first, len(slab))
        if len(new):
            rows, place = torch.unique(numbers[new, term] - first, return_inverse=True)
            shares = slab.new_zeros(len(numbers), len(rows))
            shares.index_put_((new, place), weights[new, term].to(slab.dtype), accumulate=True)
            total.addmm_(shares, slab[rows])
    return torch.zeros(len(numbers), width) if total is None else total


def _find_within(numbers: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return where the numbers of a slab's rows stand."""
    new, term = ((numbers >= first) & (numbers < first + count)).nonzero(as_tuple=True)
    return new, term
