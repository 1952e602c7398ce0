"""ExPO: extrapolation along task vectors, with weights above 1.

Source: Zheng et al., "Model extrapolation expedites alignment" (ExPO), arXiv:2404.16792, whose alpha is
``weight - 1``. With a base of its own for each model the same sum gives chat vectors (Huang et al.,
arXiv:2310.04799) and ParamΔ (arXiv:2504.21023).

For: one step of alignment taken further: from a model past the one that was trained from it.

Evidence: LLMs from 1.8 to 70B (the source).
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import PerModel, merge_method
from mergemill.engine.methods.task_vectors import add_deltas, fuse_sum
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor


def _fuse(weight: Sequence[float]) -> Fusion:
    return fuse_sum(weight, lambda_=1.0, normalize=False)


@merge_method(reads="element", base="required", fused=_fuse, unread_at_zero="weight")
def expo(base: Tensor, deltas: list[Tensor], *, weight: PerModel[float]) -> Tensor:
    """Return ``base + sum(weight[i] · deltas[i])``. Shapes: all ``[n]``.

    This is task arithmetic with nothing but its weights: no `normalize`, which would undo an extrapolation, and no
    `lambda`, so that a weight says by itself how far beyond its model the result goes.
    """
    return add_deltas(base, deltas, weight, lambda_=1.0, normalize=False)
