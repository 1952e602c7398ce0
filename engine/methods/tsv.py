"""TSV-Merge: the largest singular triples of every model's task matrix, made orthonormal together.

Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging", arXiv:2412.00081,
section 4.2 and algorithm 1.

For: many tasks of one base, whose matrices are of low rank.

Evidence: CLIP ViTs (the source); a 3B LLM as what arXiv:2602.05943 compares with.
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.matrices import (
    SVD_SLABS,
    add_matrix,
    decompose,
    join_triples,
    make_orthonormal,
    multiply,
    whole_matrices,
)
from mergemill.engine.tensors.lazy import Tensor
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
    share = max(1, min(deltas[0].shape) // len(deltas))
    found = (decompose(delta, stored, share) for delta in deltas)
    left, values, right = join_triples(found, deltas[0], share * len(deltas))
    left = make_orthonormal(left, stored).mul_(values)
    return multiply(left, make_orthonormal(right, stored).T, stored)
