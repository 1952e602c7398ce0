"""Task arithmetic: the base plus the weighted sum of the task vectors.

Source: Ilharco et al., "Editing models with task arithmetic", arXiv:2212.04089, section 2.

For: fine-tunes of one base; the first thing to try with one.

Evidence: CLIP, T5 and GPT-2 (the source); LLMs of 2 to 9B in MergeBench, arXiv:2505.10833.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import PerModel, merge_method
from mergemill.engine.methods.task_vectors import add_deltas, fuse_sum
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor


def _fuse(weight: Sequence[float], normalize: bool, lambda_: float) -> Fusion:
    return fuse_sum(weight, lambda_=lambda_, normalize=normalize)


@merge_method(reads="element", base="required", fused=_fuse, unread_at_zero="weight")
def task_arithmetic(
    base: Tensor,
    deltas: list[Tensor],
    *,
    weight: PerModel[float],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Return ``base + lambda · sum(weight[i] · deltas[i])``. Shapes: all ``[n]``."""
    return add_deltas(base, deltas, weight, lambda_=lambda_, normalize=normalize)
