"""TSV-Merge: the largest singular triples of every model's task matrix, made orthonormal together.

Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging", arXiv:2412.00081,
section 4.2 and algorithm 1.
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.matrices import SVD_SLABS, Triples, add_matrix, decompose, whole_matrices
from mergemill.engine.tensors.lazy import Dtype, Tensor, torch
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
    stored = deltas[0].dtype
    left, values, right = _collect_triples(deltas)
    left = _make_orthonormal(left, stored).mul_(values)
    return left @ _make_orthonormal(right, stored).T


def _collect_triples(deltas: list[Tensor]) -> Triples:
    """Return the models' triples, one model's beside the other's."""
    m, n = deltas[0].shape
    most = max(1, min(m, n) // len(deltas)) * len(deltas)
    left, values, right = (deltas[0].new_empty((*rows, most), dtype=torch.float64) for rows in ((m,), (), (n,)))
    columns = 0
    for delta in deltas:
        columns += _put_triples(decompose(delta, delta.dtype, most // len(deltas)), left, values, right, columns)
    return Triples(left[:, :columns], values[:columns], right[:, :columns])


def _put_triples(triples: Triples, left: Tensor, values: Tensor, right: Tensor, start: int) -> int:
    at = slice(start, start + len(triples.values))
    left[:, at], values[at], right[:, at] = triples
    return len(triples.values)


def _make_orthonormal(joined: Tensor, stored: Dtype) -> Tensor:
    """Return the nearest matrix of orthonormal columns; its columns are as dependent as the given ones."""
    if not joined.numel():
        return torch.zeros_like(joined)
    left, _, right = decompose(joined, stored)
    return left @ right.T
