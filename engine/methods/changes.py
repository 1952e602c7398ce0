"""Which elements each task vector changes, and how many of the models change the same element.

Source: Yuan et al., "Behavior knowledge merge in reinforced agentic models" (RAM), arXiv:2601.13572.
"""

from collections.abc import Sequence

from mergemill.engine.tensors.fusion import Fusion, Join
from mergemill.engine.tensors.lazy import Tensor, torch


def drop_unchanged(deltas: Sequence[Tensor], epsilon: float) -> Tensor:
    """Set what is not above `epsilon` in magnitude to 0, in place, and return of how many deltas each element is kept.

    Shapes: all ``[n]``; the counts in the dtype of the deltas.
    """
    count, changed = torch.zeros_like(deltas[0]), torch.empty_like(deltas[0])
    for delta in deltas:
        torch.gt(torch.abs(delta, out=changed), epsilon, out=changed)
        count.add_(changed)
        delta.mul_(changed)
    return count


def mean_of_changes(deltas: Sequence[Tensor], count: Tensor) -> Tensor:
    """Return the sum of what `drop_unchanged` left, over `count` where that is not 0. All are overwritten."""
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total.div_(count.clamp_(min=1))


def fuse_changes(weight: Sequence[float], epsilon: float) -> Fusion:
    """Return the base plus `mean_of_changes` as native loops do it; what only model i changes, times its weight + 1."""
    return Fusion(Join("changed", tuple(weight), threshold=epsilon))
