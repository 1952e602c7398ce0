"""Inner products of a tensor's inputs: all that methods on the sphere must know before the first element."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from mergemill.engine.tensors.exact import ExactSum, sum_products
from mergemill.engine.tensors.kernels import Gather
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import SLAB

Gram = tuple[tuple[float, ...], ...]  # k rows of k inner products, symmetric
GRAM_BYTES = SLAB * 8  # one float64 copy of each input's slab


def gram_matrix() -> Generator[Gather, tuple[ExactSum, ...], Gram]:
    """Gather the Gram matrix of the inputs over the whole tensor, in float64."""
    products = yield _products
    size = int((2 * len(products)) ** 0.5)
    lower = iter(products)
    rows = [[float(next(lower)) for _ in range(i + 1)] for i in range(size)]
    return tuple(tuple(rows[max(i, j)][min(i, j)] for j in range(size)) for i in range(size))


def _products(tensors: Sequence[Tensor], place: Place) -> tuple[ExactSum, ...]:
    wide = [tensor.to(torch.float64) for tensor in tensors]
    scratch = torch.empty_like(wide[0])
    return tuple(sum_products(wide[i], wide[j], scratch, place.block) for i in range(len(wide)) for j in range(i + 1))
