"""MagMax: of each element the task vector of largest magnitude.

Source: Marczak et al., "MagMax: leveraging model merging for seamless continual learning", arXiv:2407.06322.

For: fine-tunes made one after the other, each from the one before.

Evidence: none beyond vision models (the source: CLIP ViTs).
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.lazy import Tensor, torch


def _fuse(lambda_: float) -> Fusion:
    return Fusion(Join("largest", (), lambda_=lambda_))


@merge_method(reads="element", base="required", fused=_fuse)
def magmax(base: Tensor, deltas: list[Tensor], *, lambda_: float = 0.5) -> Tensor:
    """Return ``base + lambda · D`` with D, element by element, the delta of largest magnitude, of equals the later.

    Shapes: all ``[n]``.
    """
    largest, *others = deltas
    later, size = torch.empty_like(base), torch.empty_like(base)
    for delta in others:
        torch.ge(torch.abs(delta, out=size), torch.abs(largest, out=later), out=later)
        delta.mul_(later)
        largest.mul_(later.neg_().add_(1)).add_(delta)
    return base.add_(largest.mul_(lambda_))
