"""RegMean: the linear layer whose outputs are nearest to those of every model's, on that model's own inputs.

Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", arXiv:2212.09849, section 3,
equation 2, with the inner products between different inputs made smaller by `alpha` (section 3.3). What no input
decides, which the paper leaves open, is as in the average: a ridge of `ridge` of the mean square of the inputs.

For: fine-tunes of one model of which the inputs' Gram matrices, layer by layer, are known.

Evidence: DistilBERT, RoBERTa, DeBERTa and T5 (the source).
"""

from typing import Annotated

from mergemill.engine.errors import MergeError
from mergemill.engine.methods.contract import PerModel, Within, merge_method
from mergemill.engine.methods.fisher import weigh_in
from mergemill.engine.methods.linear import linear
from mergemill.engine.methods.matrices import are_finite, on_one_thread, whole_matrices
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place

GRAMS = 4  # of the size of a Gram matrix in float64: their sum, one of them, the factor, and what LAPACK takes for it
_ROWS = 256  # that are compared at once


# Of a layer's size: the sum of products, one of them, the mean, a model in float64, and the solution.
@merge_method(reads="matrix", grain=whole_matrices, check=weigh_in, extra_slabs=8, extra_slabs_each=1)
def regmean(
    models: list[Tensor],
    importances: list[Tensor] | None,
    place: Place,
    *,
    weight: PerModel[float] = (1.0,),
    alpha: Annotated[float, Within(0.0, 1.0)] = 0.9,
    ridge: Annotated[float, Within(1e-12, 1.0)] = 1e-6,
) -> Tensor:
    """Return ``W`` that minimises ``Σ wᵢ tr((W - Wᵢ)Gᵢ(W - Wᵢ)ᵀ) + ρ‖W - W̄‖²``; the mean W̄ where there is no G.

    That is ``(Σ wᵢWᵢGᵢ + ρW̄)(Σ wᵢGᵢ + ρ)⁻¹``, where Gᵢ is ``XᵢᵀXᵢ`` of the inputs ``[samples, n]`` of a layer
    ``[m, n]``, its elements off the diagonal times `alpha`. Shapes: models ``[m·n]``, importances ``[n·n]``.
    """
    if importances is None:
        return linear(models, weight=weight)
    m, n = place.shape
    if not are_finite([*models, *importances]):
        raise MergeError(f"{place.tensor}: a model or a Gram matrix has values that are not finite")
    with on_one_thread(place):
        grams, products, mean = (models[0].new_zeros((rows, n), dtype=torch.float64) for rows in (n, m, m))
        for number, (model, given, w) in enumerate(zip(models, importances, weight, strict=True), start=1):
            gram = _make_gram(given.view(n, n), alpha, f"{place.tensor}: the Gram matrix of model {number}")
            wide = model.view(m, n).to(torch.float64)
            grams.add_(gram, alpha=w)
            products.addmm_(wide, gram, alpha=w)
            mean.add_(wide, alpha=w / sum(weight))
        shift = ridge * (float(grams.diagonal().mean()) or 1.0)
        grams.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(grams)
        if failed:
            raise MergeError(
                f"{place.tensor}: the Gram matrices decide too little in float64 beside a ridge of {ridge:g}; give "
                f"a larger ridge, or a smaller alpha"
            )
        solved = torch.cholesky_solve(products.add_(mean, alpha=shift).T, factor).T
        return models[0].view(m, n).copy_(solved).view(-1)


def _make_gram(given: Tensor, alpha: float, named: str) -> Tensor:
    """Return a Gram matrix as float64, less of it off the diagonal; `MergeError` for what can be none."""
    diagonal = given.diagonal().to(torch.float64, copy=True)
    if bool((diagonal < 0).any()) or not _is_symmetric(given, 1e-3 * float(diagonal.max())):
        raise MergeError(f"{named} is none: it must be symmetric, and its diagonal must not be negative")
    gram = given.to(torch.float64, copy=True).mul_(alpha)
    gram.diagonal().copy_(diagonal)
    return gram


def _is_symmetric(matrix: Tensor, most: float) -> bool:
    """Whether it is but for rounding, also that of bfloat16."""
    starts = range(0, len(matrix), _ROWS)
    parts = [(matrix[start : start + _ROWS], matrix[:, start : start + _ROWS].T) for start in starts]
    return all(torch.allclose(rows, columns, rtol=1e-2, atol=most) for rows, columns in parts)
