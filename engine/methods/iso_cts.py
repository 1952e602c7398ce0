"""Iso-CTS: a flat spectrum over the directions that the task vectors share and those that each has alone.

Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
arXiv:2502.04959, section 4, Iso-CTS, algorithm 2; numbers of directions as in the authors' code (iso-merging). What is
no matrix is averaged, as there; Iso-C here adds it up, as TSV-Merge does.

For: as iso_c, with more and less related tasks.

Evidence: none known beyond vision models (the source: CLIP ViTs).
"""

from mergemill.engine.methods.contract import Density, merge_method
from mergemill.engine.methods.matrices import (
    SVD_SLABS,
    Triples,
    add_matrix,
    decompose,
    find_norm,
    join_triples,
    make_orthonormal,
    multiply,
    take_triples,
    whole_matrices,
)
from mergemill.engine.methods.products import is_wide
from mergemill.engine.methods.sides import find_side
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


# Beside a decomposition: the joined left and right vectors, the sum and what a task vector has beside the common space.
@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=SVD_SLABS + 5)
def iso_cts(base: Tensor, deltas: list[Tensor], place: Place, *, common: Density = 0.8, lambda_: float = 1.0) -> Tensor:
    """Return ``base + lambda · mean(S) · U·Vᵀ``, U and V the nearest orthonormal factors of the joined directions.

    Joined are c of ``ΣDᵢ = U·diag(S)·Vᵀ``, about the share `common` of all r = min(m, n), and of each of the K task
    vectors, less its projection on these left vectors, the s largest: ``s = round((r - ⌊common·r⌋)/K)``, at most
    ⌊r/K⌋, and ``c = r - K·s``. The mean is over r values. Numerically zero ones take no part; dependent directions are
    taken once, as in TSV-Merge. Shapes: all ``[n]``; of what is no matrix the mean task vector is added.
    """

    def join(matrices: list[Tensor]) -> Tensor:
        common_directions, own = _share_out(min(place.shape), len(matrices), common)
        return _join_directions(matrices, common_directions, own)

    return add_matrix(base, deltas, place, join, lambda_=lambda_, normalize=True)


def _share_out(rank: int, models: int, common: float) -> tuple[int, int]:
    """Return how many directions are common, and how many are each model's own.

    >>> _share_out(100, 3, 0.8), _share_out(3, 5, 0.0), _share_out(10, 4, 1.0)
    ((79, 7), (3, 0), (10, 0))
    """
    own = min(round((rank - int(rank * common)) / models), rank // models)
    return rank - models * own, own


def _join_directions(matrices: list[Tensor], common: int, own: int) -> Tensor:
    """Return the flat spectrum's matrix.

    What a task vector has beside the common left vectors is found among the other left vectors of the sum, where these
    are the smaller side: a matrix of few rows.
    """
    stored, rank = matrices[0].dtype, min(matrices[0].shape)
    total = matrices[0].to(torch.float64, copy=True)
    for matrix in matrices[1:]:
        total.add_(matrix)
    side = find_side(total, stored)
    shared = take_triples(total, side, min(common, side.clear))
    rest = side.vectors[:, len(shared.values) :] if is_wide(total) else None
    parts = [shared]
    if own:
        found = (_find_own(matrix, shared.left, rest, own) for matrix in matrices)
        like = total if rest is None else total[: rest.shape[1]]
        joined = join_triples(found, like, own * len(matrices))
        left = make_orthonormal(joined.left, stored).to(torch.float64)  # as these are orthogonal to the common ones
        parts.insert(0, joined._replace(left=left if rest is None else rest @ left))
    values = torch.cat([part.values for part in parts])
    left, right = (torch.cat([part[at] for part in parts], 1) for at in (0, 2))
    return multiply(left, make_orthonormal(right, stored).T, stored).mul_(float(values.sum()) / rank)


def _find_own(matrix: Tensor, common: Tensor, rest: Tensor | None, own: int) -> Triples:
    """Return the largest triples of what a task vector has beside the common left vectors; left in terms of `rest`."""
    wide = matrix.to(torch.float64)
    beside = wide - common @ (common.T @ wide) if rest is None else rest.T @ wide
    return decompose(beside, matrix.dtype, own, unit=find_norm(matrix))
