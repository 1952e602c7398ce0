"""STAR: each task vector's largest singular values, scaled up to the sum of all of them; then the mean.

Source: Lee et al., "STAR: spectral truncation and rescale for model merging", arXiv:2502.10339, section 3; eta is a
percentage there.

For: many fine-tunes of one base, also LoRAs, and no data to tune a weight with.

Evidence: LoRAs of Flan-T5, Llama 3.2 3B and Mistral 7B (the source).
"""

from mergemill.engine.methods.contract import Density, merge_method
from mergemill.engine.methods.matrices import SVD_SLABS, add_matrix, truncate, whole_matrices
from mergemill.engine.methods.sides import find_side
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


@merge_method(reads="matrix", base="required", grain=whole_matrices, extra_slabs=SVD_SLABS + 2)
def star(base: Tensor, deltas: list[Tensor], place: Place, *, eta: Density = 0.4, lambda_: float = 1.0) -> Tensor:
    """Return ``base + lambda · mean(Tᵢ)``, ``Tᵢ = (Σⱼ sⱼ / Σⱼ≤ᵣ sⱼ) · Uᵣ·diag(s₁…sᵣ)·Vᵣᵀ`` of each task vector.

    r is the least number of singular values, at least one, that add up to `eta` of their sum. Numerically zero ones
    count as zero. Shapes: all ``[n]``; of what is no matrix the mean task vector is added.
    """

    def find_rank(values: Tensor) -> int:
        sums = values.cumsum(0)
        return int((sums < eta * sums[-1]).sum()) + 1

    def join(matrices: list[Tensor]) -> Tensor:
        total = matrices[0].new_zeros(place.shape, dtype=torch.float64)
        for matrix in matrices:
            side = find_side(matrix, matrix.dtype, most=find_rank)
            values = side.values[: side.clear]
            if side.clear:
                rank = min(find_rank(values), side.clear)
                total.add_(truncate(matrix, side, rank, float(values.sum() / values[:rank].sum())))
        return total.div_(len(matrices))

    return add_matrix(base, deltas, place, join, lambda_=lambda_, normalize=True)
