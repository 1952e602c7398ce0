"""RAM: the mean of the task vectors that change an element, so that what one model alone learnt is not thinned.

Source: Yuan et al., "Behavior knowledge merge in reinforced agentic models" (RAM), arXiv:2601.13572.

For: fine-tunes by reinforcement, which change few and different elements.

Evidence: agents of LLMs (the source).
"""

from mergemill.engine.methods.changes import drop_unchanged, fuse_changes, mean_of_changes
from mergemill.engine.methods.contract import merge_method
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


def _fuse(place: Place, epsilon: float) -> Fusion:
    return fuse_changes((0.0,) * len(place.models), epsilon)


@merge_method(reads="element", base="required", fused=_fuse)
def ram(base: Tensor, deltas: list[Tensor], *, epsilon: float = 1e-5) -> Tensor:
    """Return the base plus, element by element, the mean of the deltas larger than `epsilon` in magnitude.

    Shapes: all ``[n]``.
    """
    return base.add_(mean_of_changes(deltas, drop_unchanged(deltas, epsilon)))
