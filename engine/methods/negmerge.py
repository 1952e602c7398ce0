"""NegMerge: of fine-tunes of one task, what all change in one direction, taken away from the base to unlearn it.

Source: Kim et al., "NegMerge: sign-consensual weight merging for machine unlearning", arXiv:2410.05583, section 3.2.

For: unlearning: several fine-tunes of what is to be forgotten.

Evidence: none beyond vision models (the source: CLIP and ResNet).
"""

from mergemill.engine.methods.contract import merge_method
from mergemill.engine.methods.sums import sum_weighted
from mergemill.engine.tensors.device import divide_
from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.lazy import Tensor, torch
from mergemill.engine.tensors.place import Place


def _fuse(place: Place, lambda_: float) -> Fusion:
    models = len(place.models)
    return Fusion(Join("consent", (1.0,) * models, divisor=models, lambda_=-lambda_))


@merge_method(reads="element", base="required", fused=_fuse)
def negmerge(base: Tensor, deltas: list[Tensor], *, lambda_: float = 1.0) -> Tensor:
    """Return ``base - lambda · mean(deltas)`` where all deltas have one sign, none of them 0; elsewhere the base.

    Shapes: all ``[n]``.
    """
    rises, falls, mark = torch.zeros_like(base), torch.zeros_like(base), torch.empty_like(base)
    for delta in deltas:
        rises.add_(torch.gt(delta, 0, out=mark))
        falls.add_(torch.lt(delta, 0, out=mark))
    agreed = torch.maximum(rises, falls, out=mark).ge_(len(deltas))
    merged = divide_(sum_weighted(deltas, (1.0,) * len(deltas)), len(deltas))
    return base.add_(merged.mul_(agreed).mul_(-lambda_))
