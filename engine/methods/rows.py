"""Inner products of the rows of a slab, one number a row, in an order that depends on the row alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergemill.engine.tensors.exact import sum_rows
from mergemill.engine.tensors.place import Place


def view_rows(tensor: Tensor, place: Place) -> Tensor:
    """Return a flat slab of whole rows (of the last axis) as ``[rows, elements]``; a vector is one row."""
    return tensor.view(-1, place.shape[-1] if place.shape else 1)


def row_products(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the inner products of inputs ``[r, c]``, row by row: of input i with inputs 0 to i, ``[r]`` each."""
    wide = [row.to(torch.float64) for row in rows]
    scratch = torch.empty_like(wide[0])
    return [[sum_rows(torch.mul(wide[i], wide[j], out=scratch)) for j in range(i + 1)] for i in range(len(wide))]
