"""Inner products of a tensor's inputs: all that methods on the sphere must know before the first element.

What these methods return is a linear combination of their inputs. Its coefficients follow from the Gram matrix alone,
in float64, so that no iteration looks at the tensors again.
"""

import math
from collections.abc import Generator, Sequence

from mergemill.engine.methods.sums import sum_weighted
from mergemill.engine.tensors import native
from mergemill.engine.tensors.exact import ExactSum, sum_products
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.kernels import Gather, Partial, StoredGather, add_partials
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place
from mergemill.engine.tensors.slabs import SLAB
from mergemill.engine.tensors.stored import StoredSlab

Gram = tuple[tuple[float, ...], ...]  # k rows of k inner products, symmetric
Coefficients = tuple[float, ...]  # one for each input
_MOST = (2 - 2**-23) * 2.0**127  # of float32
GRAM_BYTES = SLAB * 8  # one float64 copy of each input's slab


def gram_matrix() -> Generator[Gather, tuple[ExactSum, ...], Gram]:
    """Gather the Gram matrix of the inputs over the whole tensor, in float64."""
    products = yield _Products()
    size = int((2 * len(products)) ** 0.5)
    lower = iter(products)
    rows = [[float(next(lower)) for _ in range(i + 1)] for i in range(size)]
    return tuple(tuple(rows[max(i, j)][min(i, j)] for j in range(size)) for i in range(size))


def is_finite(gram: Gram) -> bool:
    """Whether every product is within float64; they are not where values exceed about 1e150."""
    return all(math.isfinite(product) for row in gram for product in row)


def split_gram(gram: Gram) -> tuple[tuple[float, ...], Gram]:
    """Return the norms of the inputs and the Gram matrix of their unit vectors; that of a zero is zero."""
    norms = tuple(math.sqrt(gram[i][i]) for i in range(len(gram)))
    units = tuple(
        tuple(product / (left * right) if left * right else 0.0 for product, right in zip(row, norms, strict=True))
        for row, left in zip(gram, norms, strict=True)
    )
    return norms, units


def times(gram: Gram, coefficients: Sequence[float]) -> Coefficients:
    """Return the inner product of each input with the combination."""
    return tuple(dot(row, coefficients) for row in gram)


def norm(gram: Gram, coefficients: Sequence[float]) -> float:
    """Return the length of the combination."""
    return math.sqrt(max(0.0, dot(coefficients, times(gram, coefficients))))


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the sum of the products, rounded once, as every version of Python rounds it."""
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def combine_linearly(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return ``sum(coefficients[i] · tensors[i])``, in one of them; all are overwritten."""
    if native.suits(*tensors) and all(abs(factor) <= _MOST for factor in coefficients):
        return native.combine(tensors, coefficients)
    return sum_weighted(tensors, coefficients, _scale)


def fuse_linearly(coefficients: Sequence[float]) -> Fusion | None:
    """Return `combine_linearly` as native loops do it."""
    if not all(abs(factor) <= _MOST for factor in coefficients):
        return None
    return Fusion(Join("sum", tuple(coefficients)))


def fuse_added(coefficients: Sequence[float], lambda_: float) -> Fusion | None:
    """Return the base plus `lambda_` times `combine_linearly` as native loops do it."""
    if not all(abs(factor) <= _MOST for factor in coefficients):
        return None
    return Fusion(Join("add", tuple(coefficients), lambda_=lambda_))


def _scale(tensor: Tensor, factor: float) -> Tensor:
    if abs(factor) <= torch.finfo(tensor.dtype).max:
        return tensor.mul_(factor)
    # Of a tiny tensor beside a huge one: the factor exceeds float32, the product does not.
    root = math.sqrt(abs(factor))
    return tensor.mul_(root).mul_(math.copysign(root, factor))


class _Products(StoredGather):
    """Gathers the inner product of each input i with each j <= i, in this order."""

    whole = True  # they are few numbers

    def __call__(self, tensors: Sequence[Tensor], place: Place) -> tuple[ExactSum, ...]:
        return tuple(
            sum_products(tensors[i], tensors[j], place.block) for i in range(len(tensors)) for j in range(i + 1)
        )

    def add_stored(self, slab: StoredSlab, total: Partial) -> Partial:
        """The same from stored bytes."""
        return add_partials(total, slab.sum_products())
