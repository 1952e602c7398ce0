"""EMR: the unified task vector of EMR-Merging, of each element the largest change in the elected direction.

Source: Huang et al., "EMR-Merging: tuning-free high-performance model merging", arXiv:2405.17461, section 3.3 (elect).
The masks and scales by which the paper makes each model again from the unified one are not made here. A sum of 0
elects no sign, as in the paper; its code takes minus.

For: one model out of many tasks where the largest change is to win; the paper adds masks that are not made here.

Evidence: none for the unified vector alone; with masks CLIP, BEiT-3, RoBERTa and GPT-2 (the source).
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.lazy import Tensor, torch


def _fuse(lambda_: float) -> Fusion:
    return Fusion(Join("farthest", (), lambda_=lambda_))


@merge_method(reads="element", base="required", fused=_fuse)
def emr(base: Tensor, deltas: list[Tensor], *, lambda_: float = 1.0) -> Tensor:
    """Return ``base + lambda · γ · max |Dᵢ|``, γ the sign of ``ΣDᵢ``, the maximum over the deltas of that sign.

    Shapes: all ``[n]``.
    """
    total, sign, falls = deltas[0].clone(), torch.empty_like(base), torch.empty_like(base)
    for delta in deltas[1:]:
        total.add_(delta)
    torch.gt(total, 0, out=sign).sub_(torch.lt(total, 0, out=falls))
    largest = total.zero_()
    for delta in deltas:
        torch.maximum(largest, delta.mul_(sign), out=largest)
    return base.add_(largest.add_(0.0).mul_(sign).mul_(lambda_))  # without the sign of a zero
