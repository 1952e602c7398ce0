"""TSV-Merge: the largest singular triples of every model's task matrix, made orthonormal together.

Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging", arXiv:2412.00081,
section 4.2 and algorithm 1.
"""

import torch
from torch import Tensor

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.matrices import SVD_SLABS, add_matrix, decompose, whole_matrices
from mergemill.engine.tensors.place import Place


# Beside a decomposition: the joined left and right vectors.
@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=SVD_SLABS + 2)
def tsv(base: Tensor, deltas: list[Tensor], place: Place, *, lambda_: float = 1.0) -> Tensor:
    """Return ``base + lambda · U·diag(S)·Vᵀ``, U and V the nearest orthonormal factors of the models' joined vectors.

    Each of the K models gives its ⌊min(m, n)/K⌋ largest singular triples, at least one; numerically zero ones take
    no part. Where the joined vectors are dependent, as of equal models, the nearest orthonormal factor is not unique:
    the directions that are missing stay zero. Shapes: all ``[n]``; what is no matrix is merged by task arithmetic.
    """
    return add_matrix(base, deltas, place, _join_triples, lambda_=lambda_)


def _join_triples(deltas: list[Tensor]) -> Tensor:
    stored, (m, n) = deltas[0].dtype, deltas[0].shape
    kept = max(1, min(m, n) // len(deltas))
    left, values, right = (torch.empty((rows, kept * len(deltas)), dtype=torch.float64) for rows in (m, 1, n))
    columns = 0
    for delta in deltas:
        triples = decompose(delta, stored, kept)
        added = slice(columns, columns + len(triples.values))
        left[:, added], values[:, added], right[:, added] = triples
        columns = added.stop
    left = _make_orthonormal(left[:, :columns], stored).mul_(values[:, :columns])
    return left @ _make_orthonormal(right[:, :columns], stored).T


def _make_orthonormal(joined: Tensor, stored: torch.dtype) -> Tensor:
    """Return the nearest matrix of orthonormal columns; its columns are as dependent as the given ones."""
    if not joined.numel():
        return torch.zeros_like(joined)
    left, _, right = decompose(joined, stored)
    return left @ right.T
