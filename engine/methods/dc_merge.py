"""DC-Merge: task vectors in one cover of all their largest directions, joined there by the elected signs.

Source: Zhang et al., "DC-Merge: improving model merging with directional consistency", arXiv:2603.06242, as in the
authors' code for full fine-tunes (vision_fft_merge), whose spectra are not smoothed, as LoRAs' are.

For: many tasks of one base whose strongest directions drown the others.

Evidence: CLIP ViTs and a vision-language model (the authors' code); none known for LLMs.
"""

from collections.abc import Iterator, Sequence

from mergemill.engine.methods.contract import Density, merge_method
from mergemill.engine.methods.matrices import (
    SVD_SLABS,
    Triples,
    add_matrix,
    decompose,
    join_triples,
    make_orthonormal,
    multiply,
    whole_matrices,
)
from mergemill.engine.tensors.heap import return_freed_pages
from mergemill.engine.tensors.lazy import Dtype, Tensor, torch
from mergemill.engine.tensors.place import Place


# Beside a decomposition the joined vectors and their covers; of each model a core.
@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=SVD_SLABS + 6, extra_slabs_each=1)
def dc_merge(
    base: Tensor, deltas: list[Tensor], place: Place, *, density: Density = 0.001, lambda_: float = 1.0
) -> Tensor:
    """Return ``base + lambda · U·C·Vᵀ``, U and V the nearest orthonormal factors of the models' joined vectors.

    Each of K models gives its k = ⌊min(m, n)/K⌋ largest singular triples Tᵢ, at least one, and has the core ``UᵀTᵢV``,
    of which the ``density · (K·k)²`` largest elements stay, at least one. C is, element by element, the mean of the
    cores whose sign is that of their sum, in the K blocks of k directions on the diagonal, and 0 elsewhere. Numerically
    zero triples take no part, nor elements that are the rounding of their core's largest. Shapes: all ``[n]``; of what
    is no matrix the mean task vector is added.
    """

    def join(matrices: list[Tensor]) -> Tensor:
        stored, share = matrices[0].dtype, max(1, min(place.shape) // len(matrices))
        counts: list[int] = []
        joined = join_triples(_decompose_each(matrices, share, counts), matrices[0], share * len(matrices))
        left, right = (make_orthonormal(each, stored).to(torch.float64) for each in (joined.left, joined.right))
        size = (share * len(counts)) ** 2
        parts = zip(*(torch.split(each, counts, -1) for each in joined), strict=True)
        cores = [_keep_largest(_make_core(Triples(*part), left, right), density, size, stored) for part in parts]
        del joined, parts
        return_freed_pages()
        return multiply(left @ _join_blocks(cores, counts), right.T, stored)

    return add_matrix(base, deltas, place, join, lambda_=lambda_, normalize=True)


def _decompose_each(matrices: Sequence[Tensor], share: int, counts: list[int]) -> Iterator[Triples]:
    """Yield each matrix's largest triples, and note how many there are."""
    for matrix in matrices:
        found = decompose(matrix, matrix.dtype, share, apart=True)
        counts.append(len(found.values))
        yield found
        del found


def _make_core(triples: Triples, left: Tensor, right: Tensor) -> Tensor:
    return_freed_pages()
    return ((left.T @ triples.left) * triples.values) @ (triples.right.T @ right)


def _keep_largest(core: Tensor, density: float, size: int, stored: Dtype) -> Tensor:
    """Set to 0 what is less than the share of `density` of `size` elements, and what is the rounding of the largest."""
    if not core.numel():
        return core
    return_freed_pages()
    kept, sizes = min(max(1, int(density * size)), core.numel()), core.abs()
    least = sizes.view(-1).kthvalue(core.numel() - kept + 1).values
    return core.mul_(sizes >= least).mul_(sizes > torch.finfo(stored).eps * sizes.max())


def _join_blocks(cores: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the mean of what agrees with the sum's sign, in blocks of so many directions on the diagonal."""
    joined, start = torch.zeros_like(cores[0]), 0
    for count in counts:
        block = slice(start, start + count)
        parts = [core[block, block] for core in cores]
        sign = torch.stack(parts).sum(0).sign()
        agreeing = [part * (part.sign() == sign) for part in parts]
        voters = torch.stack([(part != 0).to(part.dtype) for part in agreeing]).sum(0)
        joined[block, block] = torch.stack(agreeing).sum(0) / voters.clamp(min=1)
        start += count
    return joined
