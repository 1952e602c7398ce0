"""SVC: singular values of the merged task vector, scaled down where the models share a direction.

Source: Li et al., "When shared knowledge hurts: spectral over-accumulation in model merging", arXiv:2602.05536.

For: after a method that adds up: task vectors that share directions.

Evidence: vision and language models (the source's abstract).
"""

import math
from typing import Annotated

from mergemill.engine.methods.contract import Within
from mergemill.engine.methods.matrices import (
    SVD_SLABS,
    Triples,
    are_finite,
    decompose,
    is_matrix,
    multiply,
    on_one_thread,
    whole_matrices,
)
from mergemill.engine.methods.products import is_wide, take_rows, take_units
from mergemill.engine.methods.sides import find_others, find_side, is_large
from mergemill.engine.methods.steps import post_step
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place

FAINT = 1 / 16  # of the root of the mean square of a task vector's images: what is under it is taken in float64


@post_step(suits=is_matrix, grain=whole_matrices, extra_slabs=SVD_SLABS)
def svc(
    merged: Tensor, deltas: list[Tensor], place: Place, *, alpha: Annotated[float, Within(0, None)] = 1.0
) -> Tensor:
    """Multiply each singular value of ``D = U·diag(S)·Vᵀ`` by ``K / Σᵢ max(alpha, sᵢ)``.

    For a left vector u, ``sᵢ = ⟨a, aᵢ⟩/‖aᵢ‖²`` with ``a = uᵀD`` and ``aᵢ = uᵀDᵢ``. Where aᵢ vanishes, or is no more
    than the rounding of Dᵢ, the model takes no part and sᵢ counts as alpha. Singular values that are numerically zero
    stay as they are, and so does every one whose sum is zero, which only an alpha of zero allows.
    Shapes: all ``[n]``; what is no matrix stays as it is.
    """
    if not is_matrix(place.shape):
        return merged
    if not are_finite([merged, *deltas]):
        return merged.fill_(math.nan)
    with on_one_thread(place):
        matrix = merged.view(place.shape)
        left, values, right = _decompose(matrix)
        images = right.T.mul_(values.div(values[:1]).to(right.dtype)[:, None])
        total = torch.zeros_like(values)
        for delta in deltas:
            shares = _find_shares(left, images, delta.view(place.shape))
            total.add_(torch.where(shares.isnan(), alpha, shares.mul_(values[:1])).clamp_(min=alpha))
        factors = torch.where(total > 0, len(deltas) / total, 1.0)
        change = multiply(left.mul_(factors.sub_(1).mul_(values[:1]).to(left.dtype)), images, merged.dtype)
        return matrix.add_(change).view(-1)


def _decompose(matrix: Tensor) -> Triples:
    """Return all singular triples; where the matrix is large and float32, vectors are.

    The other side's then come from a product in float32: their error is that of the largest value's rounding over
    their own, and they count as much as that is.
    """
    if matrix.dtype == torch.float64 or not is_large(matrix.shape):
        return decompose(matrix, matrix.dtype)
    side = find_side(matrix, matrix.dtype)
    vectors = side.vectors[:, : side.clear].to(torch.float32)
    del side
    rows, unit = take_rows(matrix)
    others, lengths = find_others(rows, vectors)
    values = lengths.mul_(unit)
    return Triples(vectors, values, others) if is_wide(matrix) else Triples(others, values, vectors)


def _find_shares(left: Tensor, images: Tensor, delta: Tensor) -> Tensor:
    """Return ``sᵢ`` for every left vector, float64, over the largest singular value, in units of which images are.

    NaN where the model takes no part. Where the vectors are float32, so are products, but for those few whose length
    float32 has too few digits for.
    """
    scaled, unit = take_units(delta, left.dtype)  # so that no square overflows or vanishes
    if not unit:
        return torch.full((len(images),), math.nan, dtype=torch.float64)
    noise = max(torch.finfo(delta.dtype).eps, max(delta.shape) * torch.finfo(torch.float64).eps)
    norm = float(torch.linalg.vector_norm(scaled)) ** 2
    own = left.T @ scaled
    squares, products = _multiply_rows(own, own), _multiply_rows(images, own)
    faint = squares * len(squares) < norm * FAINT**2
    if left.dtype == torch.float32 and bool(faint.any()):
        own = left[:, faint].to(torch.float64).T @ scaled.to(torch.float64)
        squares[faint], products[faint] = _multiply_rows(own, own), _multiply_rows(images[faint].to(own.dtype), own)
    return torch.where(squares > noise * noise * norm, products / squares / unit, math.nan)


def _multiply_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each row with the other's, float64."""
    products: Tensor = torch.linalg.vecdot(left, right)
    return products.to(torch.float64)
