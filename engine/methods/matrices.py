"""What the methods on whole matrices share: their triples, products and polar factors on one thread; what is no matrix.

Singular values and vectors come from the Gram matrix of the smaller side (`sides`); what only changes the spectrum
needs no vectors of the larger side (2026-11-29): it is a product of the matrix with one of the smaller side.

Of large matrices of float32 (2026-11-30) products are float32's where no direction is divided by a small singular
value, and so are polar factors (`polar`) and the largest vectors (`leading`) where they can be made exact; else
decompositions are in float64. What decides is in the data, so bytes do not hang on anything else. How far results are
from float64, and what all this gains, is in tests/bench/README.md.

Before each decomposition and product what is free goes back to the kernel (2026-11-30): blocks of several sizes leave
holes in glibc's heap that the next do not fit, which took up to as much again as what was alive.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from mergemill.engine.errors import MergeError
from mergemill.engine.methods import polar
from mergemill.engine.methods.contract import Grain
from mergemill.engine.methods.polar import Polar
from mergemill.engine.methods.products import is_wide
from mergemill.engine.methods.sides import Side, find_side, is_large
from mergemill.engine.methods.task_vectors import add_deltas
from mergemill.engine.tensors.heap import return_freed_pages
from mergemill.engine.tensors.lazy import Dtype, Tensor, torch
from mergemill.engine.tensors.place import Place

# Of a square matrix LAPACK's SVD takes a copy, both vectors and four more for its work; rounded up.
SVD_SLABS = 8


class Triples(NamedTuple):
    """Singular values, the largest first, and their vectors: ``left · diag(values) · rightᵀ``.

    Values are float64, and so are vectors, if not the largest of a large matrix of float32.
    """

    left: Tensor  # [m, r], orthonormal columns
    values: Tensor  # [r]
    right: Tensor  # [n, r], orthonormal columns


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` is a matrix of any elements."""
    return len(shape) == 2 and math.prod(shape) > 0


def whole_matrices(shape: tuple[int, ...]) -> Grain:
    """The grain of a method that needs matrices whole and takes anything else in blocks."""
    return "tensor" if is_matrix(shape) else "block"


def add_matrix(
    base: Tensor,
    deltas: list[Tensor],
    place: Place,
    join: Callable[[list[Tensor]], Tensor],
    *,
    lambda_: float,
    normalize: bool = False,
) -> Tensor:
    """Return ``base + lambda · join(deltas)``; task arithmetic with weights of 1 where the tensor is no matrix.

    `join` is given matrices ``[m, n]`` and returns one, float64. Of what is not finite there is no decomposition: the
    whole result is NaN then. With `normalize` task arithmetic takes the mean instead of the sum. Shapes: `base` and
    `deltas` flat ``[n]``, overwritten.
    """
    if not is_matrix(place.shape):
        return add_deltas(base, deltas, (1.0,) * len(deltas), lambda_=lambda_, normalize=normalize)
    if not are_finite(deltas):
        return base.fill_(math.nan)
    with on_one_thread(place):
        joined = join([delta.view(place.shape) for delta in deltas]).mul_(lambda_)
        return base.view(place.shape).add_(joined).view(-1)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of every tensor is finite."""
    return all(math.isfinite(end) for tensor in tensors for end in torch.stack(torch.aminmax(tensor)).cpu().tolist())


@contextmanager
def on_one_thread(place: Place) -> Iterator[None]:
    """Keep LAPACK from splitting sums among threads; where it does not converge, `MergeError` names the tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MergeError(f"{place.tensor}: its decomposition does not converge: {error}") from error
    finally:
        torch.set_num_threads(threads)


def with_spectrum(matrix: Tensor, side: Side, values: Tensor) -> Tensor:
    """Return the matrix ``[m, n]`` with `values` for its largest singular values, and 0 for the others, float64.

    Of float32 that is ``V·diag(values/S)·Vᵀ`` of the smaller side times the matrix: a direction whose singular value is
    x of the largest has a relative error of about 1e-16/x², far less than the rounding of what was stored leaves open.
    """
    return_freed_pages()
    kept = len(values)
    if side.others is not None:
        parts = side.vectors[:, :kept] * values.to(side.others.dtype), side.others[:, :kept].T
        return torch.mm(*parts) if is_wide(matrix) else torch.mm(parts[1].T, parts[0].T)
    wide, vectors = matrix.to(torch.float64), side.vectors[:, :kept]
    scaled = vectors * (values / side.values[:kept])
    if 2 * kept > len(side.vectors):
        factor = scaled @ vectors.T
        return factor @ wide if is_wide(matrix) else wide @ factor
    return scaled @ (vectors.T @ wide) if is_wide(matrix) else (wide @ vectors) @ scaled.T


def truncate(matrix: Tensor, side: Side, most: int, scale: float = 1.0) -> Tensor:
    """Return `scale` times the matrix of the `most` largest singular values; float32 where `multiply` is.

    No direction is divided by its singular value, so float32 loses what it rounds and no more.
    """
    if side.others is not None or not most or not is_large(matrix.shape):
        return with_spectrum(matrix, side, side.values[:most] * scale)
    narrow, vectors = matrix.to(torch.float32), side.vectors[:, :most].to(torch.float32)
    scaled = vectors * scale
    return scaled @ (vectors.T @ narrow) if is_wide(matrix) else (narrow @ vectors) @ scaled.T


def multiply(left: Tensor, right: Tensor, stored: Dtype) -> Tensor:
    """Return the product of two float64 matrices, in float32 where `stored` is and the result is large.

    That rounds each element by less than 1e-6 of the largest.
    """
    if stored == torch.float64 or not is_large((len(left), right.shape[1])):
        return left @ right
    return left.to(torch.float32) @ right.to(torch.float32)


def decompose(
    matrix: Tensor, stored: Dtype, most: int | None = None, *, unit: float = 0.0, apart: bool = False
) -> Triples:
    """Return the `most` largest singular triples (all by default), without what is numerically zero (`find_side`).

    So there may be fewer triples than asked for, of a matrix of zeros none.
    """
    side = find_side(matrix, stored, unit=unit, most=most, apart=apart)
    return take_triples(matrix, side, side.clear if most is None else min(most, side.clear))


def take_triples(matrix: Tensor, side: Side, most: int) -> Triples:
    """Return the `most` largest singular triples; values and other vectors follow from the matrix itself."""
    vectors = side.vectors[:, :most]
    if side.others is not None:
        values, others = side.values[:most], side.others[:, :most]
    else:
        wide = matrix.to(torch.float64)
        others = (wide.T if is_wide(matrix) else wide) @ vectors
        values = others.square().sum(0).sqrt_()
        others.div_(values)
    return Triples(vectors, values, others) if is_wide(matrix) else Triples(others, values, vectors)


def join_triples(found: Iterable[Triples], like: Tensor, most: int) -> Triples:
    """Return at most `most` triples in all, one decomposition's beside the other's. Float64, beside a matrix `like`."""
    m, n = like.shape
    left, values, right = (like.new_empty((*rows, most), dtype=torch.float64) for rows in ((m,), (), (n,)))
    columns = 0
    for triples in found:
        at = slice(columns, columns + len(triples.values))
        left[:, at], values[at], right[:, at] = triples
        columns = at.stop
        del triples  # views of all vectors of the matrix, while the next is decomposed
    return Triples(left[:, :columns], values[:columns], right[:, :columns])


def make_orthonormal(joined: Tensor, stored: Dtype) -> Tensor:
    """Return the nearest matrix of orthonormal columns; its columns are as dependent as the given ones.

    Float64, or float32 where `stored` is and the matrix is large.
    """
    return find_polar(joined, stored).factor if joined.numel() else torch.zeros_like(joined)


def find_polar(matrix: Tensor, stored: Dtype) -> Polar:
    """Return the nearest matrix of orthonormal columns or rows, and the sum of the singular values.

    Without directions that are numerically zero (`find_side`). Dtypes as in `make_orthonormal`.
    """
    if stored == torch.float32 and is_large(matrix.shape):
        found = polar.find_polar(matrix, max(matrix.shape) * torch.finfo(stored).eps)
        if found:
            return found
    side = find_side(matrix, stored)
    values = side.values[: side.clear]
    return Polar(with_spectrum(matrix, side, torch.ones_like(values)), float(values.sum()))


def find_norm(matrix: Tensor) -> float:
    """Return the Frobenius norm, without a square that overflows or vanishes."""
    largest = float(max(map(abs, torch.stack(torch.aminmax(matrix)).cpu().tolist())))
    if not largest:
        return 0.0
    scaled = matrix.to(torch.float64, copy=True).div_(largest)
    return largest * math.sqrt(float(scaled.square_().sum()))
