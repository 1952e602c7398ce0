"""Inner products of the rows of a slab, one number a row, in an order that depends on the row alone."""

from mergemill.engine.tensors.exact import sum_rows
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


def view_rows(tensor: Tensor, place: Place) -> Tensor:
    """Return a flat slab of whole rows (of the last axis) as ``[rows, elements]``; a vector is one row."""
    return tensor.view(-1, place.shape[-1] if place.shape else 1)


def multiply_rows(left: Tensor, right: Tensor, scratch: Tensor) -> Tensor:
    """Return the inner product of each row of float64 ``[r, c]`` as ``[r]``; `scratch`, ``[r, c]``, is overwritten."""
    return sum_rows(torch.mul(left, right, out=scratch))
