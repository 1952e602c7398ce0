"""Consensus task arithmetic: task arithmetic without what serves fewer than `k` models.

Source: Wang et al., "Localizing task information for improved model merging and compression" (TALL-masks),
arXiv:2405.07813, section 4 (masks and consensus).

For: many tasks, of which some changes serve one task alone.

Evidence: CLIP ViTs and T5 (the source); LLMs of 2 to 9B in MergeBench, arXiv:2505.10833.
"""

from collections.abc import Sequence
from typing import Annotated

from mergemill.engine.methods.consensus import add_agreed, fuse_agreed
from mergemill.engine.methods.contract import PerModel, Within, merge_method
from mergemill.engine.methods.task_vectors import fuse_sum
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor, torch

_LEAST = 1e-37  # of a weight: native loops leave out what is none in float32


def _fuse(weight: Sequence[float], lambda_mask: Sequence[float], k: int, lambda_: float) -> Fusion | None:
    if any(abs(w) < _LEAST for w in weight):
        return None
    summed = fuse_sum(weight, lambda_=1.0, normalize=False)
    return fuse_agreed(summed, lambda_mask=lambda_mask, k=k, lambda_=lambda_)


@merge_method(reads="element", base="required", fused=_fuse)
def consensus_ta(
    base: Tensor,
    deltas: list[Tensor],
    *,
    weight: PerModel[float],
    lambda_mask: PerModel[float] = (0.4,),
    k: Annotated[int, Within(0)] = 2,
    lambda_: float = 1.0,
) -> Tensor:
    """Return the base plus ``lambda · M``, ``M = sum(weight[i] · deltas[i])``, where at least `k` models agree.

    A model agrees where ``|D| >= lambda_mask · |M - D|`` for its delta D. Shapes: all ``[n]``.
    """
    merged, weighted = torch.zeros_like(base), torch.empty_like(base)
    for delta, w in zip(deltas, weight, strict=True):
        merged.add_(torch.mul(delta, w, out=weighted))
    return add_agreed(base, merged, deltas, lambda_mask=lambda_mask, k=k, lambda_=lambda_)
