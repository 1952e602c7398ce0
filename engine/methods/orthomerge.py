"""OrthoMerge: of each model the rotation of the base that is nearest to it, joined as rotations; the rest is added.

Source: Yang et al., "Orthogonal model merging", arXiv:2602.05943, Orthogonal-Residual Decoupling in its global form, as
in the authors' code (OrthoMerge_G_TA), which takes the default of `lambda` for five models.

Where the matrix has fewer rows than columns, or less rank, the nearest rotation is not unique, and that code takes
whatever LAPACK gives; here it is the one nearest to the identity. So it moves nothing beside the rows of base and
model, and no matrix is larger than these span.

For: fine-tunes of one base whose angles between neurons are to be kept.

Evidence: LLMs of 3B and a vision-language model of 7B (the source).
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.matrices import add_matrix, find_norm, is_matrix, whole_matrices
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place

# A rotation by half a turn has no Cayley transform; so near to one, rounding would decide.
LARGEST = 1e8
# Rotations that cancel to this share of their length have no direction.
CANCELLED = 1e-8


# Of each square matrix, which is 2m or less on a side, seven: the product, both vectors and LAPACK's work. The sum of
# skew matrices and what is solved with it grow with the inputs.
@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=20, extra_slabs_each=4)
def orthomerge(base: Tensor, deltas: list[Tensor], place: Place, *, lambda_: float = 0.2) -> Tensor:
    """Return ``W R + lambda · Σᵢ (Wᵢ - W Rᵢ)``, of the base W and the models Wᵢ ``[m, n]``.

    Rᵢ is the orthogonal ``[n, n]`` that minimises ``‖Wᵢ - W Rᵢ‖``; of several the one nearest to the identity. With its
    Cayley transform ``Aᵢ = (Rᵢ - 1)(Rᵢ + 1)⁻¹``, skew, R is the rotation of ``A = (meanᵢ ‖Aᵢ‖ / ‖ΣAᵢ‖) · ΣAᵢ``; of the
    base where these cancel. Where Rᵢ turns a direction by half a turn, as reflections do, it has none and counts as 1.
    Shapes: all ``[n]``; what is no matrix is merged by task arithmetic.
    """

    def join(matrices: list[Tensor]) -> Tensor:
        start = base.view(place.shape).to(torch.float64)
        changes = [matrix.to(torch.float64) for matrix in matrices]
        return _rotate(start, changes, lambda_)

    return add_matrix(base, deltas, place, join, lambda_=1.0 if is_matrix(place.shape) else lambda_)


def _rotate(base: Tensor, changes: Sequence[Tensor], share: float) -> Tensor:
    """Return ``W(R - 1) + share · Σᵢ (Dᵢ - W(Rᵢ - 1))``, of task vectors Dᵢ. Float64, ``[m, n]``."""
    span = _find_span(base, *changes)
    inner = base if span is None else base @ span
    skew, lengths, rest = inner.new_zeros((inner.shape[1],) * 2), 0.0, torch.zeros_like(base)
    for change in changes:
        own = _find_span(base, change)
        turn, found = _find_turn(base, base + change, own)
        rest.add_(change).sub_(turn)
        if own is not None:
            within = own if span is None else span.T @ own
            found = within @ found @ within.T
        skew.add_(found)
        lengths += float(torch.linalg.vector_norm(found))
    total = float(torch.linalg.vector_norm(skew))
    rest.mul_(share)
    if total <= CANCELLED * lengths:
        return rest
    skew.mul_(lengths / len(changes) / total)
    moved = inner @ skew
    turned = torch.linalg.solve(_add_to_diagonal(skew.neg_(), 1.0), moved, left=False).mul_(2)
    return rest.add_(turned if span is None else turned @ span.T)


def _find_span(base: Tensor, *changes: Tensor) -> Tensor | None:
    """Return orthonormal columns ``[n, d]`` that span the rows of all; None where they may span everything."""
    rows, columns = base.shape
    if columns <= rows * (len(changes) + 1):
        return None
    found: Tensor = torch.linalg.qr(torch.cat([base, *changes]).T)[0]
    return found


def _find_turn(base: Tensor, model: Tensor, span: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``W(R - 1)`` and the Cayley transform of R in the span; zeros where it has none."""
    inner, target = (each if span is None else each @ span for each in (base, model))
    turned = _add_to_diagonal(_find_rotation(inner, target), -1.0)
    found, _ = torch.linalg.solve_ex(_add_to_diagonal(turned.clone(), 2.0), turned)
    if not float(found.abs().max()) < LARGEST:
        return torch.zeros_like(base), found.zero_()
    found = (found - found.T).mul_(0.5)
    moved = inner @ turned
    return moved if span is None else moved @ span.T, found


def _find_rotation(base: Tensor, model: Tensor) -> Tensor:
    """Return the orthogonal R of least ``‖model - base R‖``, of several the one nearest to the identity."""
    first, second = (each / (find_norm(each) or 1.0) for each in (base, model))
    left, values, right = torch.linalg.svd(first.T @ second)
    rank = int((values > len(values) * torch.finfo(values.dtype).eps * values[:1]).sum())
    found: Tensor = left[:, :rank] @ right[:rank]
    if rank < len(values):
        nearest = torch.linalg.svd(left[:, rank:].T @ right[rank:].T)
        found.add_(left[:, rank:] @ nearest[0] @ nearest[2] @ right[rank:])
    return found


def _add_to_diagonal(matrix: Tensor, value: float) -> Tensor:
    matrix.diagonal().add_(value)
    return matrix
