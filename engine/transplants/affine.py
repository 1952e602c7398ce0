"""Maps of one embedding space into another, from sums over pairs of shared rows: float64, of no more than D x D.

A row y becomes ``(y - origin) @ matrix + centre``.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Doubles: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Sums: TypeAlias = tuple[int, Doubles, Doubles, Doubles, Doubles, Doubles]
"""Of pairs (x, w): how many, the sums of x and of w, of x xT, of w wT and of x wT."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A map of rows."""

    origin: Doubles  # [width of x]
    matrix: Doubles  # [width of x, width of w]
    centre: Doubles  # [width of w]

    def move(self, rows: Doubles) -> Doubles:
        """Return rows ``[rows, width of x]`` in the other space."""
        moved: Doubles = (rows - self.origin) @ self.matrix + self.centre
        return moved


def sum_pairs(x: Doubles, w: Doubles) -> Sums:
    """Return the sums over pairs of rows, ``[rows, width of x]`` and ``[rows, width of w]``."""
    return len(x), x.sum(0), w.sum(0), x.T @ x, w.T @ w, x.T @ w


def centre_sums(sums: Sums) -> tuple[Doubles, Doubles, Doubles, Doubles, Doubles]:
    """Return the means of x and of w, and the products of centred rows: x xT, w wT, x wT."""
    count, x, w, xx, ww, xw = sums
    mean_x, mean_w = x / max(1, count), w / max(1, count)
    return (
        mean_x,
        mean_w,
        xx - count * np.outer(mean_x, mean_x),
        ww - count * np.outer(mean_w, mean_w),
        xw - count * np.outer(mean_x, mean_w),
    )


def find_leading(products: Doubles, count: int) -> Doubles:
    """Return the `count` leading eigenvectors of a symmetric matrix as columns, the largest first."""
    return np.linalg.eigh(products)[1][:, ::-1][:, :count]
