"""Subspace Boosting: singular values of the merged task vector that fell behind, raised to one of the large ones.

Source: Skorobogat et al., "Subspace-boosted model merging", arXiv:2506.16506, section 4, algorithm 1, with the beta
that its code begins with.

For: after a method that adds up many task vectors, whose sum has lost rank.

Evidence: vision and language models (the source's abstract).
"""

import math

from mergemill.engine.methods.contract import Density
from mergemill.engine.methods.matrices import (
    SVD_SLABS,
    are_finite,
    is_matrix,
    on_one_thread,
    whole_matrices,
    with_spectrum,
)
from mergemill.engine.methods.sides import find_side
from mergemill.engine.methods.steps import post_step
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


@post_step(suits=is_matrix, grain=whole_matrices, extra_slabs=SVD_SLABS)
def subspace_boost(merged: Tensor, deltas: list[Tensor], place: Place, *, beta: Density = 0.01) -> Tensor:
    """Raise each singular value of ``D = U·diag(S)·Vᵀ`` to at least sₖ, k the first with ``Σᵢ≤ₖ sᵢ ≥ beta · Σ sᵢ``.

    Singular values that are numerically zero stay as they are: rounding decides their vectors. Shapes: all ``[n]``;
    what is no matrix stays as it is.
    """
    if not is_matrix(place.shape):
        return merged
    if not are_finite([merged]):
        return merged.fill_(math.nan)
    with on_one_thread(place):
        matrix = merged.view(place.shape)
        side = find_side(matrix, merged.dtype)
        values = side.values[: side.clear]
        if not side.clear:
            return merged
        sums = values.cumsum(0)
        least = values[min(int((sums < beta * sums[-1]).sum()), side.clear - 1)]
        return matrix.copy_(with_spectrum(matrix, side, values.clamp(min=least))).view(-1)
