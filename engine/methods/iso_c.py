"""Iso-C: the sum of task vectors with every singular value made their mean.

Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
arXiv:2502.04959, section 4, Iso-C.

For: many tasks of one base, of which none is to be left behind.

Evidence: none known beyond vision models (the source: CLIP ViTs).
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.matrices import SVD_SLABS, add_matrix, find_polar, whole_matrices
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=SVD_SLABS)
def iso_c(base: Tensor, deltas: list[Tensor], place: Place, *, lambda_: float = 1.0) -> Tensor:
    """Return ``base + lambda · mean(S) · U·Vᵀ`` with ``ΣDᵢ = U·diag(S)·Vᵀ``.

    The mean is that of all min(m, n) singular values. Where one is numerically zero its vectors are undefined: it
    counts as zero and stays so, and no task vectors give the base. Shapes: all ``[n]``; what is no matrix is merged by
    task arithmetic.
    """
    return add_matrix(base, deltas, place, _flatten_spectrum, lambda_=lambda_)


def _flatten_spectrum(deltas: list[Tensor]) -> Tensor:
    stored = deltas[0].dtype
    total = deltas[0].to(torch.float64)
    for delta in deltas[1:]:
        total.add_(delta)
    factor, sum_of_values = find_polar(total, stored)
    return factor.mul_(sum_of_values / min(total.shape))
