"""Midpoint: from the base towards the mean of the models.

Source: an example of mergemill's README.
"""

from torch import Tensor

from mergemill.engine.methods import PerModel, merge_method

HALF = 0.5


def add_up(tensors: list[Tensor], weights: PerModel[float]) -> Tensor:
    """Return the weighted sum, in the memory of the first tensor."""
    total = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.mul_(weight))
    return total


@merge_method(reads="element", base="required")
def midpoint(base: Tensor, deltas: list[Tensor], *, weight: PerModel[float] = (1.0,), lambda_: float = HALF) -> Tensor:
    """Return ``base + lambda · mean(weight[i] · deltas[i])``. Shapes: all ``[n]``."""
    return base.add_(add_up(deltas, weight).mul_(lambda_ / len(deltas)))
