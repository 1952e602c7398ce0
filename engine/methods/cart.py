"""CART: task arithmetic around the mean of the models, with task vectors of low rank.

Source: Choi et al., "Revisiting weight averaging for model merging", arXiv:2412.12153, section 4: centered arithmetic
with rank-reduced task vectors; rank and lambda of the authors' configuration for a merge without data.

For: many tasks, also where the base is not at hand.

Evidence: CLIP ViTs and RoBERTa (the source); none known for LLMs.
"""

import math

from mergemill.engine.methods.contract import Density, merge_method
from mergemill.engine.methods.matrices import SVD_SLABS, are_finite, is_matrix, on_one_thread, truncate, whole_matrices
from mergemill.engine.methods.sides import find_side
from mergemill.engine.methods.sums import sum_weighted
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


@merge_method(reads="matrix", grain=whole_matrices, extra_slabs=SVD_SLABS + 4)
def cart(models: list[Tensor], place: Place, *, rank: Density = 0.08, lambda_: float = 1.0) -> Tensor:
    """Return ``M + lambda · Σ SVDₖ(Wᵢ - M)`` with the mean M of the models and k = ⌊rank · min(m, n)⌋, at least one.

    SVDₖ keeps the k largest singular triples; with all of them the sum is zero. No base takes part. Shapes: all
    ``[n]``; what is no matrix is averaged.
    """
    if not is_matrix(place.shape):
        return divide_(sum_weighted(models, (1.0,) * len(models)), len(models))
    if not are_finite(models):
        return models[0].fill_(math.nan)
    with on_one_thread(place):
        kept = max(1, math.floor(rank * min(place.shape)))
        merged = _merge_around_mean([model.view(place.shape) for model in models], kept, lambda_)
        return models[0].copy_(merged.view(-1))


def _merge_around_mean(models: list[Tensor], kept: int, lambda_: float) -> Tensor:
    mean = models[0].to(torch.float64, copy=True)
    for model in models[1:]:
        mean.add_(model)
    mean.div_(len(models))
    merged = mean.clone()
    for model in models:
        rest = model.to(torch.float64, copy=True).sub_(mean)
        side = find_side(rest, model.dtype, most=kept)
        merged.add_(truncate(rest, side, min(kept, side.clear), lambda_))
    return merged
