"""WUDI-Merging in closed form: the task vector that interferes least with each model's own.

Source: Cheng et al., "Whoever started the interference should end it: guiding data-free model merging via task
vectors", arXiv:2503.08099, whose objective is minimised there by gradient descent.

For: many tasks of one base, and no weight to tune.

Evidence: CLIP ViTs, RoBERTa, LLMs of 13B and 14B by the authors' own gradient descent (the source).
"""

from typing import Annotated, NamedTuple

from mergemill.engine.methods.contract import Within, merge_method
from mergemill.engine.methods.matrices import add_matrix, find_norm, whole_matrices
from mergemill.engine.tensors.heap import return_freed_pages
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


# For each input one slab of the matrix that is solved with; two of the seven for what LAPACK and MKL pack.
@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=7, extra_slabs_each=1)
def wudi(
    base: Tensor,
    deltas: list[Tensor],
    place: Place,
    *,
    ridge: Annotated[float, Within(1e-8, None)] = 1e-6,
    lambda_: float = 1.0,
) -> Tensor:
    """Return ``base + lambda · D``, D the minimum of ``Σᵢ ‖(D - Dᵢ)Dᵢᵀ‖²/‖Dᵢ‖² + ρ‖D‖²`` in Frobenius norms.

    That is ``D = (Σ DᵢGᵢ)(Σ Gᵢ + ρ)⁻¹`` with ``Gᵢ = DᵢᵀDᵢ/‖Dᵢ‖²`` and ρ `ridge` times the mean of the diagonal of
    ``Σ Gᵢ``; as it goes to zero, the inverse becomes the pseudo-inverse. It is solved on the smaller side: with the
    ``[n, n]`` matrix above, or, of the stacked ``B`` of all ``Dᵢ/‖Dᵢ‖``, with the ``[Km, Km]`` matrix ``BBᵀ + ρ``,
    which gives the same D. (The mirrored form with ``DᵢDᵢᵀ`` on the left would be smaller still for wide matrices,
    but it minimises ``‖Dᵢᵀ(D - Dᵢ)‖``: interference of outputs, not of the inputs that the rows of Dᵢ stand for.)

    A task vector of zeros takes no part. Shapes: all ``[n]``; what is no matrix is merged by task arithmetic.
    """

    def join(matrices: list[Tensor]) -> Tensor:
        parts = [TaskVector(matrix, find_norm(matrix)) for matrix in matrices if matrix.any()]
        if not parts:
            return base.new_zeros(place.shape, dtype=torch.float64)
        m, n = place.shape
        return _solve_columns(parts, ridge) if n <= len(parts) * m else _solve_rows(parts, ridge)

    return add_matrix(base, deltas, place, join, lambda_=lambda_)


class TaskVector(NamedTuple):
    """A task vector that is not zero."""

    matrix: Tensor  # [m, n]
    norm: float  # Frobenius

    def unit(self) -> Tensor:
        """Return the matrix over its norm, as a new float64 tensor."""
        return self.matrix.to(torch.float64, copy=True).div_(self.norm)


def _solve_columns(parts: list[TaskVector], ridge: float) -> Tensor:
    """Return ``(Σ DᵢGᵢ)(Σ Gᵢ + ρ)⁻¹``."""
    m, n = parts[0].matrix.shape
    products, grams = (parts[0].matrix.new_zeros((rows, n), dtype=torch.float64) for rows in (m, n))
    for part in parts:
        return_freed_pages()
        matrix, norm = part.unit(), part.norm
        if n <= m:
            gram = matrix.T @ matrix
            grams.add_(gram)
            products.addmm_(matrix, gram, alpha=norm)
            del gram
        else:
            grams.addmm_(matrix.T, matrix)
            products.addmm_(matrix @ matrix.T, matrix, alpha=norm)
        del matrix  # before the next is made
    return _divide(products, grams, ridge / n)


def _solve_rows(parts: list[TaskVector], ridge: float) -> Tensor:
    """Return ``C(BBᵀ + ρ)⁻¹B`` with ``C = [‖Dᵢ‖·BᵢBᵢᵀ …]``."""
    m, n = parts[0].matrix.shape
    rows = [slice(start, start + m) for start in range(0, len(parts) * m, m)]
    like = parts[0].matrix
    grams = like.new_zeros((len(parts) * m, len(parts) * m), dtype=torch.float64)  # its upper triangle is enough
    own = like.new_empty((m, len(parts) * m), dtype=torch.float64)
    for i, part in enumerate(parts):
        return_freed_pages()
        unit = part.unit()
        for j, other in enumerate(parts[: i + 1]):
            torch.mm(other.unit(), unit.T, out=grams[rows[j], rows[i]])
        torch.mul(grams[rows[i], rows[i]], part.norm, out=own[:, rows[i]])
    mixed = _divide(own, grams, ridge / n)
    total = like.new_zeros((m, n), dtype=torch.float64)
    for at, part in zip(rows, parts, strict=True):
        total.addmm_(mixed[:, at], part.unit())
    return total


def _divide(left: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Return ``left · (right + ridge · trace(right))⁻¹`` for a positive `right`, of which the upper triangle is read.

    Both are overwritten: in the order in which LAPACK keeps them, as their transposes, nothing is copied.
    """
    return_freed_pages()
    right.diagonal().add_(ridge * float(right.diagonal().sum()))
    factor, result = right.T, left.T
    torch.linalg.cholesky_ex(factor, check_errors=True, out=(factor, right.new_empty((), dtype=torch.int32)))
    torch.linalg.solve_triangular(factor, result, upper=False, out=result)
    torch.linalg.solve_triangular(factor.T, result, upper=True, out=result)
    return left
