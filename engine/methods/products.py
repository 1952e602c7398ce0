"""Products of large matrices in float32, in units in which nothing overflows."""

import math

from mergemill.engine.tensors.lazy import Dtype, Tensor, torch

CHUNK = 512  # products that are added up in float32


def is_wide(matrix: Tensor) -> bool:
    """Whether rows are the smaller side."""
    return matrix.shape[0] <= matrix.shape[1]


def take_units(matrix: Tensor, dtype: Dtype) -> tuple[Tensor, float]:
    """Return a matrix in a unit, a power of two, as `dtype`; and the unit.

    The largest element is then between 1 and 2; of a matrix of zeros the unit is 0.
    """
    largest = max(map(abs, torch.stack(torch.aminmax(matrix)).tolist()))
    unit = math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 0.0
    return matrix.div(unit or 1.0).to(dtype), unit


def take_rows(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the rows of the smaller side, ``[s, l]``, in a unit as float32; and the unit (`take_units`)."""
    return take_units(matrix if is_wide(matrix) else matrix.T, torch.float32)


def sum_gram(rows: Tensor) -> Tensor:
    """Return the Gram matrix ``[s, s]`` of rows of float32 as float64: the blocks of `split_lower`.

    Sums of a few hundred products are float32's, the sum of these is float64's: the error is that of one rounding.
    """
    gram = rows.new_zeros((len(rows),) * 2, dtype=torch.float64)
    for start in range(0, rows.shape[1], CHUNK):
        columns = rows[:, start : start + CHUNK]
        for own, above in split_lower(len(rows)):
            gram[own, above] += columns[own] @ columns[above].T
    return gram


def mirror(gram: Tensor) -> Tensor:
    """Fill in what `sum_gram` left out, in place; returns the whole matrix."""
    for own, _ in split_lower(len(gram)):
        gram[: own.start, own] = gram[own, : own.start].T
    return gram


def split_lower(side: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of the blocks that make up the lower triangle of a square matrix.

    >>> split_lower(100)
    [(slice(0, 64, None), slice(0, 64, None)), (slice(64, 100, None), slice(0, 100, None))]
    """
    step = max(64, -(-side // 4))
    stops = [min(start + step, side) for start in range(0, side, step)]
    return [(slice(start, stop), slice(0, stop)) for start, stop in zip(range(0, side, step), stops, strict=True)]
