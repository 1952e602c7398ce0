"""The largest eigenvalues of a Gram matrix, and their vectors: found in float32, then made exact in float64.

LAPACK decomposes in float32 twice as fast as in float64, but of vectors whose eigenvalues lie close together it finds
only the space that they span. So what is found is the start of a Newton-like step: the residuals of the largest few, in
float64, over their distance from the other eigenvalues, say how far the space is to be turned; a Rayleigh-Ritz step
within the space, in float64, then finds its vectors. What is left of the residuals bounds the error of the space
(Davis and Kahan, "The rotation of eigenvectors by a perturbation III", 1970), and is checked: where it is too large,
since the spectrum falls off too steeply for float32, there is no answer, and the caller decomposes in float64.

Where the space alone is asked for, and not which of its vectors is which, so much is done at the cut only: vectors on
both sides of it are told apart in float64, and all others are so far from it that one turn is exact: what is left of it
is of the size of its square.

2026-11-30: on matrices of fine-tunes of SmolLM2 one step is enough for 8 % of the vectors and one or two for a quarter,
and the space is right to 1e-9. Block Krylov spaces took longer than LAPACK in float64 unless the spectrum had a gap.
"""

from typing import NamedTuple

from mergemill.engine.tensors.lazy import Tensor, torch

SMALLEST = 512  # a side; below, LAPACK in float64 is as fast
SHARE = 0.3  # of the vectors; of more the steps take longer than they save
STEPS = 3
LEAST = 1e-5  # of the largest eigenvalue is the least at the cut
SINE = 1e-6  # of the largest angle between the space that is found and the true one


class Rough(NamedTuple):
    """An eigendecomposition in float32, the largest first."""

    values: Tensor  # [s], float64
    vectors: Tensor  # [s, s], float32


def find_rough(gram: Tensor) -> Rough | None:
    """Decompose a Gram matrix ``[s, s]``, float64, of which the lower triangle is read; None of one of zeros."""
    unit = float(gram.diagonal().max())
    if not unit:
        return None
    values, vectors = torch.linalg.eigh((gram / unit).to(torch.float32))
    return Rough(values.flip(0).to(torch.float64).mul_(unit), vectors.flip(1))


def find_space(rough: Rough, vectors: Tensor, images: Tensor, most: int) -> Tensor | None:
    """Return an orthonormal basis ``[s, most]``, float64, of the space of the `most` largest eigenvalues' vectors.

    None where it is not found. Given are the largest vectors, float64, at least `count_near_cut` more than `most`, and
    what the matrix makes of them; overwritten.
    """
    near = count_near_cut(len(vectors))
    low, kept = max(0, most - near), most + near
    cut = _find_ritz(vectors[:, low:kept], images[:, low:kept])
    if cut is None:
        return None
    vectors[:, low:kept], _, images[:, low:kept] = cut
    values = (vectors[:, :kept] * images[:, :kept]).sum(0)
    largest, basis = values[:most], vectors[:, :most]
    if not float(largest[-1]) > LEAST * float(largest[0]):
        return None
    others = torch.cat([vectors[:, most:kept].to(torch.float32), rough.vectors[:, kept:]], 1)
    below = torch.cat([values[most:], rough.values[kept:]])[:, None]
    residuals = (images[:, :most] - basis * largest).div_(largest[0])
    distances = ((largest - below) / largest[0]).clamp_(min=LEAST)
    distances[:near, low:] = torch.inf  # at right angles already
    turns = (others.T @ residuals.to(torch.float32)).div_(distances.to(torch.float32))
    if not float(turns.square().sum()) <= SINE:
        return None
    return basis + (others @ turns).to(torch.float64)


def count_near_cut(side: int) -> int:
    """Return how many vectors on each side of a cut are told apart in float64."""
    return max(16, side // 32)


def refine(gram: Tensor, rough: Rough, most: int) -> tuple[Tensor, Tensor] | None:
    """Return the `most` largest eigenvalues and their vectors ``[s, most]``, float64; None where they are not found.

    A few more take part, so that the vectors at the cut are told from those behind it. The lower triangle of `gram` is
    read.
    """
    kept = most + count_near_cut(len(gram))
    if not has_room(len(gram), most) or not kept < len(gram):
        return None
    whole = gram.tril()
    whole.add_(whole.tril(-1).T)
    vectors, values = rough.vectors[:, :kept].to(torch.float64), rough.values[:kept]
    images = whole @ vectors
    for _ in range(STEPS):
        vectors = _turn(vectors, values, images, rough, most)
        found = _find_ritz(vectors, whole @ vectors)
        if found is None:
            return None
        vectors, values, images = found
        distance = float(values[most - 1] - rough.values[kept])
        left_over = (images[:, :most] - vectors[:, :most] * values[:most]).square_().sum().sqrt_()
        if float(left_over) <= SINE * distance:
            return values[:most], vectors[:, :most]
    return None


def has_room(side: int, most: int) -> bool:
    """Whether so few vectors are found faster here than with all others in float64."""
    return side >= SMALLEST and most <= SHARE * side


def _turn(vectors: Tensor, values: Tensor, images: Tensor, rough: Rough, most: int) -> Tensor:
    """Return the vectors with what their residuals have of the others; behind the `most` largest less than that."""
    kept, unit = len(values), rough.values[0]
    others, below = rough.vectors[:, kept:], rough.values[kept:, None]
    residuals = (images - vectors * values).div_(unit)
    distances = (values - below) / unit
    least = float(((values[most - 1] - below[0]) / unit).clamp_(min=1e-9))
    shares = (others.T @ residuals.to(torch.float32)).div_(distances.clamp_(min=least).to(torch.float32))
    return vectors + (others @ shares).to(torch.float64)


def _find_ritz(vectors: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return orthonormal vectors of the same space that diagonalise the matrix there, their values and their images.

    None where the vectors are dependent.
    """
    factor, failed = torch.linalg.cholesky_ex(vectors.T @ vectors)
    if int(failed):
        return None
    half = torch.linalg.solve_triangular(factor, vectors.T @ images, upper=False)
    inner = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, turned = torch.linalg.eigh(inner)
    turned = torch.linalg.solve_triangular(factor.T, turned.flip(1), upper=True)
    return vectors @ turned, values.flip(0), images @ turned
