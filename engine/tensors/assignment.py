"""Pairs of rows and columns of which the sum is largest: the assignment problem, solved exactly.

Source: Kuhn, "The Hungarian method for the assignment problem", 1955, as successive shortest paths with potentials
(Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems", 1987).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def assign(gains: Sequence[Sequence[float]] | np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Return for each row of a square matrix its column, so that the sum of their gains is largest.

    O(n³). Of equal sums one is taken, always the same.

    >>> assign([[1.0, 2.0], [2.0, 4.0]]), assign([[3.0, 2.0], [2.0, 0.0]])
    ([0, 1], [1, 0])
    """
    costs = -np.asarray(gains, np.float64)
    count = len(costs)
    row_of = np.full(count + 1, -1)  # by column; the last stands for the row that is to be placed
    of_rows, of_columns = np.zeros(count), np.zeros(count + 1)  # potentials
    for row in range(count):
        row_of[count] = row
        least, before = np.full(count, np.inf), np.full(count, count)
        seen, column = np.zeros(count + 1, bool), count
        while row_of[column] != -1:
            seen[column] = True
            at = row_of[column]
            reduced = costs[at] - of_rows[at] - of_columns[:count]
            better = ~seen[:count] & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.where(seen[:count], np.inf, least).argmin())
            step = least[following]
            of_rows[row_of[seen]] += step
            of_columns[seen] -= step
            least[~seen[:count]] -= step
            column = following
        while column != count:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    columns = np.empty(count, int)
    columns[row_of[:count]] = np.arange(count)
    return [int(each) for each in columns]
