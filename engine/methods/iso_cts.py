"""Iso-CTS: a flat spectrum over the directions that the task vectors share and those that each has alone.

Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
arXiv:2502.04959, section 4, Iso-CTS, algorithm 2; numbers of directions as in the authors' code (iso-merging). What is
no matrix is averaged, as there; Iso-C here adds it up, as TSV-Merge does.

For: as iso_c, with more and less related tasks.

Evidence: none known beyond vision models (the source: CLIP ViTs).
"""

from collections.abc import Iterator

from mergemill.engine.methods.contract import Density, merge_method
from mergemill.engine.methods.matrices import (
    SVD_SLABS,
    Triples,
    add_matrix,
    decompose,
    find_norm,
    join_triples,
    make_orthonormal,
    whole_matrices,
)
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


# Beside a decomposition: the joined left and right vectors, the sum and what a task vector has beside the common space.
@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=SVD_SLABS + 8)
def iso_cts(base: Tensor, deltas: list[Tensor], place: Place, *, common: Density = 0.8, lambda_: float = 1.0) -> Tensor:
    """Return ``base + lambda · mean(S) · U·Vᵀ``, U and V the nearest orthonormal factors of the joined directions.

    Joined are c of ``ΣDᵢ = U·diag(S)·Vᵀ``, about the share `common` of all r = min(m, n), and of each of the K task
    vectors, less its projection on these left vectors, the s largest: ``s = round((r - ⌊common·r⌋)/K)``, at most
    ⌊r/K⌋, and ``c = r - K·s``. The mean is over r values. Numerically zero ones take no part; dependent directions are
    taken once, as in TSV-Merge. Shapes: all ``[n]``; of what is no matrix the mean task vector is added.
    """

    def join(matrices: list[Tensor]) -> Tensor:
        stored, rank = matrices[0].dtype, min(place.shape)
        found = _find_directions(matrices, *_share_out(rank, len(matrices), common))
        left, values, right = join_triples(found, matrices[0], rank)
        mean = float(values.sum()) / rank
        return (make_orthonormal(left, stored) @ make_orthonormal(right, stored).T).mul_(mean)

    return add_matrix(base, deltas, place, join, lambda_=lambda_, normalize=True)


def _share_out(rank: int, models: int, common: float) -> tuple[int, int]:
    """Return how many directions are common, and how many are each model's own.

    >>> _share_out(100, 3, 0.8), _share_out(3, 5, 0.0), _share_out(10, 4, 1.0)
    ((79, 7), (3, 0), (10, 0))
    """
    own = min(round((rank - int(rank * common)) / models), rank // models)
    return rank - models * own, own


def _find_directions(matrices: list[Tensor], common: int, own: int) -> Iterator[Triples]:
    """Yield the triples of each model's own directions, and those of the common ones last, as the authors join them."""
    stored = matrices[0].dtype
    total = matrices[0].to(torch.float64, copy=True)
    for matrix in matrices[1:]:
        total.add_(matrix)
    shared = decompose(total, stored, common) if common else None
    for matrix in matrices if own else []:
        rest = matrix.to(torch.float64, copy=True)
        unit = find_norm(matrix)
        if shared is not None:
            rest.sub_(shared.left @ (shared.left.T @ rest))
        yield decompose(rest, stored, own, unit=unit)
    if shared is not None:
        yield shared
