"""Sums of a matrix's columns, added up as integers, so that no cut of the rows and no order of additions shows.

Exact to 2**-80. What is no number, or larger than 2**36, is counted beside: such a column's sum is no number.
"""

from typing import Any, TypeAlias

import numpy as np

from mergemill.engine.tensors.kernels import Partial

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_DIGIT = 2.0**40  # of the numbers in which sums are added up
_DIGITS = 3
_MOST = 2.0**36  # what is larger is no weight, and a billion of them are still an integer


def sum_columns(rows: Floats) -> Partial:
    """Return the sum of each column as three digits, integers, and how many broken values it has; overwrites `rows`.

    >>> sum_columns(np.array([[2.5, 2.0**-41], [1.0, 0.0]]))[0].tolist()
    [[3, 0], [549755813888, 0], [0, 549755813888]]
    """
    broken = ~(np.abs(rows) <= _MOST)
    rows[broken] = 0.0
    digits = np.empty((_DIGITS, rows.shape[1]), np.int64)
    for i in range(_DIGITS):
        whole = np.floor(rows)
        digits[i] = whole.astype(np.int64).sum(0)
        rows -= whole
        rows *= _DIGIT
    return digits, broken.sum(0, dtype=np.int64)


def read_columns(total: Partial, columns: int) -> Floats:
    """Return the sums from what `sum_columns` gave of all rows, added up; of no rows they are 0.

    >>> read_columns(sum_columns(np.array([[2.5, -1.0], [1.0, np.inf]])), 2).tolist()
    [3.5, nan]
    """
    if not total:
        return np.zeros(columns)
    digits, broken = total
    sums: Floats = digits[0] + digits[1] / _DIGIT + digits[2] / _DIGIT**2
    return np.where(broken > 0, np.nan, sums)
