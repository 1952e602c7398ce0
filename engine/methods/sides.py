"""Singular values, and the vectors of a matrix's smaller side: the rows', where these are no more than the columns.

For float32 they come from the eigenvectors of the Gram matrix, in float64: half the time of LAPACK's own SVD in float64
or less, and far more exact than that in float32. The Gram matrix squares the condition, which float64 has room for as
long as singular values under ``max(m, n) · eps`` of the largest count as zero (eps of float32); float64 itself has no
such room and goes through LAPACK's SVD. Where only the largest are asked for, they begin in float32 (`leading`).
"""

from collections.abc import Callable
from typing import NamedTuple

from mergemill.engine.methods import leading
from mergemill.engine.methods.products import is_wide, mirror, split_lower, sum_gram, take_rows
from mergemill.engine.tensors.heap import return_freed_pages
from mergemill.engine.tensors.lazy import Dtype, Tensor, torch

FAINT = 1 / 128  # of all singular values may be so small that rounding shows in them, where their sum is asked for


class Side(NamedTuple):
    """Singular values, the largest first, and the vectors of the smaller side: of rows, where these are no more."""

    vectors: Tensor  # [s, s], s = min(m, n), or fewer columns; orthonormal, also of what is zero; as `Triples`
    values: Tensor  # one for each, or more
    others: Tensor | None  # the other side's, [max(m, n), s], where a decomposition of the matrix itself gave them
    clear: int  # so many values are not numerically zero


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether the time of a matrix is that of its products and decompositions, in float64 or in float32."""
    return min(shape) >= leading.SMALLEST


def find_side(
    matrix: Tensor,
    stored: Dtype,
    *,
    unit: float = 0.0,
    most: int | Callable[[Tensor], int] | None = None,
    apart: bool = False,
) -> Side:
    """Return the singular values and the vectors of the smaller side of a matrix that is exact to `stored`'s rounding.

    Of these the `most` largest are needed (all by default), or as many as `most` says of all values; other vectors may
    be left out. Which is which among these is exact only if they are to be `apart`: their space always is.

    Numerically zero are singular values of at most ``max(m, n) · eps`` of the largest, or of `unit` where that is
    larger (the norm of what the matrix is a difference of), with the eps of `stored`: rounding decides their vectors.
    """
    return_freed_pages()
    if stored == torch.float64:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        vectors, others = (left, right.T) if is_wide(matrix) else (right.T, left)
    else:
        found = None if most is None or apart else _find_space(matrix, most)
        vectors, values, others = found or _decompose_gram(matrix, most if isinstance(most, int) else None)
    least = max(matrix.shape) * torch.finfo(stored).eps * values[:1].clamp(min=unit)
    return Side(vectors, values, others, int((values > least).sum()))


def _find_space(matrix: Tensor, most: int | Callable[[Tensor], int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return vectors of the smaller side, singular values and vectors of the other side: the largest, by float32.

    Where `most` is told of all values, all are returned. None where float32 does not find them, or no faster.
    """
    count = 1 if callable(most) else most
    if not leading.has_room(min(matrix.shape), count):
        return None
    rows, unit = take_rows(matrix)
    gram = sum_gram(rows)
    rough = leading.find_rough(gram)
    if rough is None:
        return None
    needed = len(gram) if callable(most) else count + leading.count_near_cut(len(gram))
    vectors = rough.vectors[:, :needed].to(torch.float64)
    images = mirror(gram) @ vectors
    squares = (vectors * images).sum(0)
    if callable(most):
        if int((squares < leading.LEAST * squares.mean()).sum()) > FAINT * len(gram):
            return None
        count = most(squares.clamp_(min=0.0).sqrt())
        if not leading.has_room(len(vectors), count):
            return None
    found = leading.find_space(rough, vectors, images, count)
    if found is None:
        return None
    basis = found.to(torch.float32)
    others, lengths = find_others(rows, basis)
    squares[:count] = lengths.square()
    return basis, squares.sqrt_().mul_(unit), others


def find_others(rows: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors of the other side, and the singular values, float64, that belong to these of the smaller."""
    others = rows.T @ vectors
    lengths = torch.linalg.vector_norm(others, dim=0)
    return others.div_(lengths), lengths.to(torch.float64)


def _decompose_gram(matrix: Tensor, most: int | None) -> tuple[Tensor, Tensor, None]:
    """Return the vectors of the smaller side and the singular values: at least the `most` largest."""
    gram = _gram(matrix)
    if most is not None and leading.has_room(len(gram), most):
        rough = leading.find_rough(gram)
        found = leading.refine(gram, rough, most) if rough else None
        if found:
            return found[1], found[0].clamp_(min=0.0).sqrt_(), None
    return_freed_pages()
    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), squares.flip(0).clamp_(min=0.0).sqrt_(), None


def _gram(matrix: Tensor) -> Tensor:
    """Return the Gram matrix of the smaller side, float64, of which the lower triangle is what is meant."""
    wide = matrix.to(torch.float64)
    rows = wide if is_wide(matrix) else wide.T
    gram = wide.new_zeros((len(rows),) * 2)
    for own, above in split_lower(len(rows)):
        torch.mm(rows[own], rows[above].T, out=gram[own, above])
    return gram
