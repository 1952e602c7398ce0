"""DARE-TIES: drop elements of the task vectors at random, rescale, elect a sign, merge what agrees.

Source: Yu et al., "Language models are super mario", arXiv:2311.03099, section 3.

For: as dare_linear, where signs disagree as well.

Evidence: LLMs of 7 and 13B (the source); LLMs of 2 to 9B in MergeBench, arXiv:2505.10833.
"""

from collections.abc import Sequence

from mergemill.engine.methods.contract import Density, PerModel, merge_method
from mergemill.engine.methods.drop import drop_at_random, keeps_at_random, kept_norms
from mergemill.engine.methods.task_vectors import add_agreeing_deltas, fuse_agreeing
from mergemill.engine.tensors.fusion import Fusion
from mergemill.engine.tensors.lazy import Tensor
from mergemill.engine.tensors.place import Place


def _fuse(
    statistics: Sequence[float], weight: Sequence[float], density: Sequence[float], normalize: bool, lambda_: float
) -> Fusion:
    return fuse_agreeing(weight, keeps_at_random(density, statistics), lambda_=lambda_, normalize=normalize)


@merge_method(reads="sums", base="required", statistics=kept_norms, rounds=1, fused=_fuse, unread_at_zero="weight")
def dare_ties(
    base: Tensor,
    deltas: list[Tensor],
    statistics: Sequence[float],
    place: Place,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Return the base plus the thinned task vectors where their sign is the elected one. Shapes: all ``[n]``."""
    drop_at_random(deltas, density, statistics, place)
    return add_agreeing_deltas(base, deltas, weight, lambda_=lambda_, normalize=normalize)
