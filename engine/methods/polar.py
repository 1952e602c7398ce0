"""The orthogonal factor of a large matrix's polar decomposition, in float32: to a millionth of its largest element.

``A = H·X``: X is the nearest matrix of orthonormal rows (of the smaller side), and the trace of H the sum of A's
singular values. With eigenvectors V of the Gram matrix it is ``V·Y``, Y being the rows of ``Vᵀ·A`` at unit length. As
float32 finds them, the vectors of small eigenvalues are mixed, so that those rows are not at right angles. What their
angles are is measured, and made good to first order: with Eᵢⱼ their cosines, ``X = V·(1 - Eᵢⱼ·sⱼ/(sᵢ + sⱼ))·Y``, where
nothing is divided by a small value or a small difference. (The derivative of a matrix's inverse square root by divided
differences: Higham, "Functions of matrices", 2008, section 3.2.) Rows for which float32 has too few digits, of a few
small directions, are first told from the others, and from each other, in float64.

Where there are many of these, or the angles are so far from right that their second order counts, there is no answer,
and the caller decomposes in float64. Where all singular values lie close together, the angles are not looked at.

2026-11-30: QDWH in float32, on the Gram matrix and on the matrix itself, and Newton and Schulz were tried beside it: no
faster at this error, and of square matrices inexact (tests/bench/README.md).
"""

from typing import NamedTuple

from mergemill.engine.methods.products import is_wide, mirror, split_lower, sum_gram, take_rows
from mergemill.engine.tensors.heap import return_freed_pages
from mergemill.engine.tensors.lazy import Tensor, torch

SMALL = 1 / 16  # of the root of the mean square of the singular values: what is under it is looked at in float64
FEW = 1 / 6  # of all directions; of more, float64 for all is as fast
ANGLES = 2.5e-7  # for each row, the sum of the squared cosines
CLOSE = 16.0  # the largest eigenvalue over the smallest


class Polar(NamedTuple):
    """The orthogonal factor of a matrix ``[m, n]``, and the sum of its singular values."""

    factor: Tensor  # [m, n], float32; nothing in directions that are numerically zero
    total: float


def find_polar(matrix: Tensor, least: float) -> Polar | None:
    """Return the orthogonal factor of a matrix, float64; None where float32 does not give it.

    Numerically zero are singular values of at most `least` of the largest.
    """
    return_freed_pages()
    rows, unit = take_rows(matrix)
    squares, vectors = torch.linalg.eigh(sum_gram(rows).to(torch.float32))
    small = int((squares < squares.mean() * SMALL**2).sum())
    if not float(squares[-1]) or small > FEW * len(squares):
        return None
    images = vectors.T @ rows
    if small:
        _tell_apart(vectors, images, rows, small)
    del rows
    values = _make_unit(images, least)
    if squares[0] * CLOSE < squares[-1]:
        angles = _find_angles(images)
        if not float(angles.square().sum()) <= ANGLES * len(angles):
            return None
        angles.mul_(-values).div_((values[:, None] + values).clamp_(min=1e-30)).fill_diagonal_(1.0)
        vectors = vectors @ angles
    factor = vectors @ images if is_wide(matrix) else images.T @ vectors.T
    return Polar(factor, float(values.sum(dtype=torch.float64)) * unit)


def _tell_apart(vectors: Tensor, images: Tensor, rows: Tensor, small: int) -> None:
    """Turn the vectors of the `small` smallest values away from the others, and to each other's axes; images follow."""
    others, large = vectors[:, small:], images[small:]
    own = vectors[:, :small].to(torch.float64)
    pictures = own.T @ rows.to(torch.float64)
    squares = large.square().sum(1)[:, None]
    beside = squares - pictures.square().sum(1).to(torch.float32)
    turns = (large @ pictures.T.to(torch.float32)).div_(torch.maximum(beside, squares / 2))
    pictures.sub_((turns.T @ large).to(torch.float64))
    own.sub_((others @ turns).to(torch.float64))
    others.add_(own.to(torch.float32) @ turns.T)
    large.add_(turns @ pictures.to(torch.float32))
    _, axes = torch.linalg.eigh(pictures @ pictures.T)
    vectors[:, :small] = own @ axes
    images[:small] = axes.T @ pictures


def _make_unit(images: Tensor, least: float) -> Tensor:
    """Return the lengths of the rows, and divide by them; rows that are numerically zero are set to 0."""
    values: Tensor = torch.linalg.vector_norm(images, dim=1)
    values.mul_(values > least * values.max())
    images.mul_(torch.where(values > 0, 1 / values, 0.0)[:, None])
    return values


def _find_angles(images: Tensor) -> Tensor:
    """Return the cosines of the angles between rows of unit length, 0 on the diagonal."""
    angles = images.new_empty((len(images),) * 2)
    for own, above in split_lower(len(images)):
        torch.mm(images[own], images[above].T, out=angles[own, above])
    return mirror(angles).fill_diagonal_(0.0)
