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
from mergemill.engine.methods.steps import post_step
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


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
        triples = decompose(merged.view(place.shape), merged.dtype)
        total = torch.zeros_like(triples.values)
        for delta in deltas:
            total.add_(_find_shares(triples, delta.view(place.shape), alpha).clamp_(min=alpha))
        factors = torch.where(total > 0, len(deltas) / total, 1.0)
        left, values, right = triples
        change = multiply(left.mul_(values * factors.sub_(1)), right.T, merged.dtype)
        return merged.view(place.shape).add_(change).view(-1)


def _find_shares(merged: Triples, delta: Tensor, alpha: float) -> Tensor:
    """Return ``sᵢ`` for every left vector."""
    noise = max(torch.finfo(delta.dtype).eps, max(delta.shape) * torch.finfo(torch.float64).eps)
    wide = delta.to(torch.float64)
    # Both in units of their largest value, so that no square overflows or vanishes.
    unit, largest = float(wide.abs().max()), merged.values[:1]
    if not unit:
        return torch.full_like(merged.values, alpha)
    images = (merged.left.T @ wide).div_(unit)
    squares = images.square().sum(1)
    least = noise * noise * float(wide.div(unit).square_().sum())
    products = images.mul_(merged.right.T).sum(1).mul_(merged.values / largest)
    return torch.where(squares > least, products / squares * (largest / unit), alpha)
